"""What both training scripts do: flags, start, training, and an exit code that says how it went."""

import sys

from . import distributed
from .build import build
from .config import UsageError, parse_config
from .loop import Trainer, TrainingFailed


def main(description: str, defaults: dict, argv: list[str] | None = None) -> int:
    """Runs a training script. Returns 0 when all went well, 1 for a failure at run time, 2 for a user's mistake."""
    config = parse_config(description, defaults, argv)
    ranks = distributed.start(config.device or distributed.default_device())
    try:
        code = Trainer(build(config, ranks)).train()
        distributed.stop()
        return code
    except UsageError as error:
        ranks.print(f"error: {error}")
        return 2
    except (TrainingFailed, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1  # without waiting for other ranks, which may be waiting for this one; torchrun ends them
