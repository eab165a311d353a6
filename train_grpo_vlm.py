"""Learning from marks (GRPO): of each question several answers are sampled, and those marked above the others' mean become likelier.

    python train_grpo_vlm.py --from_weight sft_vlm --reward exact
    torchrun --standalone --nproc_per_node 2 train_grpo_vlm.py --from_weight sft_vlm --reward my_module:my_function

Reads   out/sft_vlm_512.pth, dataset/sft_data.jsonl (a sample's last question; its answer is for the rewarder alone), dataset/sft_images/
Writes  out/grpo_vlm_512.pth (+ .json, .metrics.jsonl), checkpoints/grpo_vlm_512_resume.pth
Ctrl-C saves and ends; the same command with --from_resume 1 resumes. All flags: --help. How it works: trainer/grpo.py.
"""

import sys

from train_sft_vlm import DEFAULTS as SFT
from trainer.grpo import GRPOConfig, GRPOTrainer
from trainer.main import main

DEFAULTS = SFT | {"save_weight": "grpo_vlm", "epochs": 1, "batch_size": 16, "from_weight": "sft_vlm", "log_interval": 10, "eval_blind": 0,
                  "wandb_project": "MiniMind-V-GRPO"}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main(__doc__, DEFAULTS, kind=GRPOConfig, trainer=GRPOTrainer))
