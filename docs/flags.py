"""The tables of docs/flags.md, from the settings of training.

    python -m docs.flags
"""

import dataclasses
import os

from train_sft_vlm import DEFAULTS
from trainer.config import TrainConfig, inside
from trainer.grpo import GRPOConfig


def flags_table() -> str:
    """Every flag with its default, and SFT's default in () where it is another."""

    def shown(value) -> str:
        return "" if value is None else "off" if value is False else str(value).removeprefix(inside() + os.sep)

    rows = ["| flag | default | meaning |", "|---|---|---|"]
    common = dataclasses.fields(TrainConfig)
    for item in (*common, *dataclasses.fields(GRPOConfig)[len(common) :]):
        other = DEFAULTS.get(item.name, item.default)
        default = shown(item.default) + (f" ({shown(other)})" if other != item.default else "")
        if item.name == "reward":
            rows += ["", "Of `train_grpo_vlm.py` alone:", "", *rows[:2]]
        rows.append(f"| --{item.name} | {default} | {item.metadata['help'].replace('%%', '%')} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(flags_table())
