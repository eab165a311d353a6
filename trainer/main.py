"""What both training scripts do: flags, start, training, and an exit code that says how it went."""

import ctypes
import sys

from . import distributed
from .build import build
from .config import UsageError, parse_config
from .loop import Trainer, TrainingFailed


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what tensors free instead of handing it back to the system.

    By default every large tensor is mapped anew and each of its pages faults on first touch; an update allocates
    hundreds of them. A quarter of the time of a CPU update was spent there. Other C libraries are left alone.
    """
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 * 2**20)


def main(description: str, defaults: dict, argv: list[str] | None = None) -> int:
    """Runs a training script. Returns 0 when all went well, 1 for a failure at run time, 2 for a user's mistake."""
    config = parse_config(description, defaults, argv)
    ranks = distributed.start(config.device or distributed.default_device())
    if ranks.device.type == "cpu":
        keep_freed_memory()
    try:
        return Trainer(build(config, ranks)).train()
    except UsageError as error:
        ranks.print(f"error: {error}")
        return 2
    except (TrainingFailed, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.stop()
