"""Runs train_sft_vlm.py on a disk that takes its time, and notes which samples each update trained on.

For the storm (tests/storm.py): with every fsync and rename slowed, kills often fall into a save.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_sft_vlm
from trainer.loop import Trainer
from trainer.main import main

DELAY = 0.01  # seconds


def slowed(function):
    """The same, a little later."""

    def call(*arguments, **keywords):
        time.sleep(DELAY)
        return function(*arguments, **keywords)

    return call


def noting(update):
    """Trainer.update that first appends "update samples..." to this rank's file."""

    def call(self, micro_batches, *arguments):
        samples = " ".join(str(index) for batch in micro_batches for index in batch.indices)
        with open(f"{os.environ['STORM_LOG']}.{self.ranks.rank}", "a", encoding="utf-8") as file:
            file.write(f"{self.state.update} {samples}\n")
        update(self, micro_batches, *arguments)

    return call


if __name__ == "__main__":
    os.fsync, os.replace = slowed(os.fsync), slowed(os.replace)
    Trainer.update = noting(Trainer.update)
    sys.exit(main("", train_sft_vlm.DEFAULTS))
