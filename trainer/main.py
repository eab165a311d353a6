"""What both training scripts do: flags, start, training, and an exit code that says how it went."""

import dataclasses
import os
import sys

from model.storage import OutputLock, StorageError, check_writable, finish_commit, remove_temporaries
from model.weights import journal_of, lock_of

from . import distributed
from .build import build
from .config import TrainConfig, UsageError, parse_config
from .distributed import Ranks
from .guards import TrainingFailed
from .loop import Trainer


def main(description: str, defaults: dict, argv: list[str] | None = None) -> int:
    """Runs a training script. Returns 0 when all went well, 1 for a failure at run time, 2 for a user's mistake."""
    config, ranks = parse_config(description, defaults, argv), None
    try:
        ranks = distributed.start(config.device or distributed.default_device())
        locks = claim_outputs(config, ranks)
        config = resume_after_restart(config, ranks)
        code = Trainer(build(config, ranks)).train()
        distributed.stop()
        del locks
        return code
    except UsageError as error:
        if ranks is None or ranks.is_first_here:  # another machine may lack what the first has
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, FloatingPointError, StorageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1  # without waiting for other ranks, which may be waiting for this one; torchrun ends them
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print(f"error: a loader process died, for want of memory perhaps: {' '.join(str(error).split())}. Go on from"
              f" {config.resume_file} with --from_resume 1, with fewer --num_workers if it comes again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first update or after the last: training itself answers signals
        print("stopped; what was saved before is whole", file=sys.stderr)
        return 130


def claim_outputs(config: TrainConfig, ranks: Ranks) -> list[OutputLock]:
    """Before anything else, by the first rank: no other run writes these files, the folders can be written, what a
    killed run left half done is finished or removed. Raises UsageError."""
    if not ranks.is_main:
        return []
    files = [config.weight_file, config.resume_file, *([config.best_file] if config.eval_data_path else [])]
    try:
        for file in files:
            check_writable(file.parent)
        locks = [OutputLock(lock_of(file)) for file in files]
        for file in files:
            finish_commit(journal_of(file))
    except StorageError as error:
        raise UsageError(str(error)) from error
    for file in files:
        remove_temporaries(file.parent, [file.name, file.with_suffix(".json").name, journal_of(file).name])
    return locks


def resume_after_restart(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """torchrun that starts its workers again after a failure wants them to go on, not to begin anew.

    Decided by all ranks together: a machine that came back counts its own restarts from 0.
    """
    there = float(ranks.is_main and config.resume_file.is_file())
    restarts, there = ranks.sum([float(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), there])
    if restarts and there:
        return dataclasses.replace(config, from_resume=1)
    return config
