"""Supervised fine-tuning: the projector and the whole decoder learn to answer questions about images.

    python train_sft_vlm.py --epochs 2 --from_weight pretrain_vlm
    torchrun --standalone --nproc_per_node 2 train_sft_vlm.py --epochs 2 --from_weight pretrain_vlm

Reads   out/pretrain_vlm_512.pth, dataset/sft_data.jsonl, dataset/sft_images/, model/vision_model/clip-vit-base-patch16/
Writes  out/sft_vlm_512.pth (+ .json, .metrics.jsonl), checkpoints/sft_vlm_512_resume.pth
Ctrl-C saves and ends; the same command with --from_resume 1 resumes. All flags: --help.
"""

import sys

from model.storage import REPOSITORY
from trainer.main import main

DEFAULTS = {
    "save_weight": "sft_vlm", "epochs": 2, "batch_size": 4, "learning_rate": 1e-6, "max_seq_len": 1536,
    "data_path": str(REPOSITORY / "dataset" / "sft_data.jsonl"), "images_path": str(REPOSITORY / "dataset" / "sft_images"),
    "from_weight": "pretrain_vlm", "freeze_llm": 0, "wandb_project": "MiniMind-V-SFT",
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(__doc__, DEFAULTS))
