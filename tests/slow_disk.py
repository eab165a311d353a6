"""Runs train_sft_vlm.py on a disk that takes its time or is full, and notes which samples each update trained on.

For tests/storm.py, where kills shall often fall into a save, and tests/test_never_lose_work.py. Settings come by the
environment: DISK_DELAY, seconds that every fsync and rename takes longer; DISK_FULL, a file whose presence means that nothing
can be written; TRAINED, where the samples are noted, one file a rank.
"""

import errno
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_sft_vlm
from trainer.loop import Trainer
from trainer.main import main


def slow_or_full(function, delay: float, full: str):
    """The same, a little later, or refused."""

    def call(*arguments, **keywords):
        time.sleep(delay)
        if full and os.path.exists(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments, **keywords)

    return call


def noting(update, path: str):
    """Trainer.update that first appends "update samples..." to this rank's file."""

    def call(self, micro_batches, *arguments):
        samples = " ".join(str(index) for batch in micro_batches for index in batch.indices)
        with open(f"{path}.{self.ranks.rank}", "a", encoding="utf-8") as file:
            file.write(f"{self.state.update} {samples}\n")
        update(self, micro_batches, *arguments)

    return call


if __name__ == "__main__":
    delay, full = float(os.environ.get("DISK_DELAY", 0)), os.environ.get("DISK_FULL", "")
    os.fsync, os.replace = slow_or_full(os.fsync, delay, full), slow_or_full(os.replace, delay, "")
    if "TRAINED" in os.environ:
        Trainer.update = noting(Trainer.update, os.environ["TRAINED"])
    sys.exit(main("", train_sft_vlm.DEFAULTS))
