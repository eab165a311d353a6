"""Pretraining: the projector learns to turn patch vectors into vectors that the language model can read.

    python train_pretrain_vlm.py --epochs 4 --from_weight llm
    torchrun --standalone --nproc_per_node 2 train_pretrain_vlm.py --epochs 4 --from_weight llm

Reads   out/llm_512.pth, dataset/pretrain_data.jsonl, dataset/pretrain_images/, model/vision_model/clip-vit-base-patch16/
Writes  out/pretrain_vlm_512.pth (+ .json, .metrics.jsonl), checkpoints/pretrain_vlm_512_resume.pth
Ctrl-C saves and ends; the same command with --from_resume 1 resumes. All flags: --help.
"""

import sys

from trainer.main import main

DEFAULTS: dict = {}  # those of trainer/config.py

if __name__ == "__main__":
    sys.exit(main(__doc__, DEFAULTS))
