"""What all training scripts do: flags, start, training, and an exit code that says how it went."""

import atexit
import io
import multiprocessing
import os
import signal
import sys
import time

import torch.distributed as dist
from filelock import FileLock

from machine import ran_out_of_memory
from model.device import default_device
from model.errors import UsageError, first_line
from model.storage import StorageError, check_writable, hold, remove_temporaries
from model.weights import lock_of

from . import distributed
from .build import build, loader_remedy
from .checkpoint import previous_state
from .config import TrainConfig, parse_config
from .distributed import Ranks
from .guards import TrainingFailed
from .loop import Trainer


def main(description: str, defaults: dict, argv: list[str] | None = None, kind: type = TrainConfig, trainer: type = Trainer) -> int:
    """Runs a training script with settings and loop of these kinds. Returns 0 when all went well, 1 for a failure at run time, 2 for a user's mistake."""
    keep_talking()
    config = parse_config(description, defaults, argv, kind)
    code = run(config, trainer)
    if config.use_wandb:
        from .swanlab_thread import end_process_if_stuck

        end_process_if_stuck(code)
    return code


def run(config: TrainConfig, kind: type[Trainer] = Trainer) -> int:
    """A whole training run; returns the process's exit code."""
    began, ranks = time.time(), None
    try:
        ranks = distributed.start(config.device or default_device())
        locks = claim_outputs(config, ranks)
        if dist.is_initialized():
            from .torchrun import resume_after_restart

            config = resume_after_restart(config, ranks)
        trainer = kind(build(config, ranks))
        stopped_by = trainer.train()
        ranks.print(ending(trainer, stopped_by))
        # DDP goes before the process group: as its last owner it would wait, holding Python's lock, for gloo's threads,
        # which want that lock.
        del trainer
        distributed.stop()
        del locks
        return 128 + stopped_by if stopped_by in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) else 0
    except UsageError as error:
        if ranks is None or ranks.is_first_here:  # another machine may lack what the first has
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, FloatingPointError, StorageError, OSError, EOFError, MemoryError, RuntimeError) as error:
        forget_loaders()
        if (message := failure(error, config, began)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1  # without waiting for other ranks, which may be waiting for this one; torchrun ends them
    except KeyboardInterrupt:  # before the first update or after the last: training itself answers signals
        forget_loaders()
        print("stopped; what was saved before is whole", file=sys.stderr)
        return 130


def forget_loaders() -> None:
    """Ends the loader processes of a run that failed: they answer nothing less, and Python's exit waits for each of them."""
    if hasattr(signal, "SIGCHLD"):  # torch raises an error of its own, anywhere, for every loader process that ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


# Also of one that ended well, where something still holds the loader (an error's traceback): Python's exit would ask them by
# SIGTERM, which is the trainer's to answer, and wait for ever. Registered after multiprocessing's own, so it comes before it.
atexit.register(forget_loaders)


def ending(trainer: Trainer, stopped_by: int) -> str:
    """What a run says at its end: where the weights are, or how to continue."""
    config, state = trainer.config, trainer.state
    if stopped_by:
        saved = "saved. To continue, repeat the command with --from_resume 1" if trainer.has_news else "nothing new to save"
        return f"stopped by {signal.Signals(stopped_by).name} after update {state.update} of {trainer.total}; {saved}"
    best = f", those of the best validation in {config.best_file}" if state.best_loss is not None else ""
    bad = f", {state.bad} bad samples left out" if state.bad else ""
    return f"done{bad}. The weights are in {config.weight_file}{best}"


def failure(error: Exception, config: TrainConfig, began: float) -> str | None:
    """The message for a failure at run time, with the remedy; None for a fault of the program."""
    text = str(error).strip()
    if "in DataLoader worker process" in text:  # its traceback follows, and last what it died of
        text = text.splitlines()[-1]
    text = " ".join(text.split()).rstrip(".") or type(error).__name__
    remedy = loader_remedy(error)
    if ran_out_of_memory(error):
        text = (f"memory ran out: {first_line(error)}. An update needs less of it with a smaller --batch_size (times as many"
                " --accumulation_steps), with --gradient_checkpointing 1, a smaller --max_seq_len, fewer --image_tokens, --group_size")  # fmt: skip
    # When a loader process dies, its connection may be seen to break first.
    elif "DataLoader worker (pid" in text or isinstance(error, (ConnectionError, EOFError)):
        text = f"a loader process died, for want of memory if it said nothing: {text}. Fewer --num_workers need less of it"
    elif not remedy:
        return None if isinstance(error, RuntimeError) else text
    state = config.resume_file  # perhaps an older run's
    saved = state.is_file() and (config.from_resume or state.stat().st_mtime > began)
    rest = f"Continue from {state} with --from_resume 1" if saved else "Nothing was saved yet"
    return ". ".join(filter(None, (text, remedy, rest)))


def claim_outputs(config: TrainConfig, ranks: Ranks) -> list[FileLock]:
    """Before anything else, by the first rank: no other run writes these files, they can be written, and what killed runs left
    half written is removed. Raises UsageError."""
    if not ranks.is_main:
        return []
    weights = [config.weight_file, *([config.best_file] if config.eval_data_path else [])]
    files = [config.resume_file, previous_state(config.resume_file), config.metrics_file,
             *weights, *(file.with_suffix(".json") for file in weights)]  # fmt: skip
    try:
        for file in files:
            check_writable(file)
        remedy = "give this one another --save_weight, or another --save_dir and --checkpoint_dir"
        locks = [hold(lock_of(file), remedy) for file in (*weights, config.resume_file)]
    except StorageError as error:
        raise UsageError(str(error)) from error
    for file in files:
        remove_temporaries(file)
    return locks


class _Lossy(io.FileIO):
    """A file that loses what it cannot write: nobody reads it, the disk is full, the terminal is gone."""

    def write(self, data) -> int:
        try:
            return super().write(data) or len(data)  # None: a full pipe that does not wait
        except OSError:
            return len(data)


def keep_talking() -> None:
    """From now on no message can fail: what standard output and error cannot write or spell is lost, and the training, which
    takes hours, continues."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when the process started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (as long as the process)
        elif stream is getattr(sys, f"__{name}__"):  # and no notebook's or test's
            raw = _Lossy(stream.fileno(), "w", closefd=False)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=True))
