"""What a group of processes needs: to know that torchrun started it, to meet, and to resume when torchrun starts it again."""

import dataclasses
import os
import sys
from datetime import timedelta

import torch.distributed as dist

from machine import LAUNCHER
from model.errors import UsageError, first_line

from .checkpoint import previous_state
from .config import TrainConfig
from .distributed import Ranks

JOIN_SECONDS = 600  # that processes wait for one another at the start
BEGAN = "minimind-v/began"  # a key in the store of torchrun's agent


def launched() -> tuple[int, int, int, int] | None:
    """Rank, size, local rank and local size, if torchrun started this process: then all of its variables are set.

    Some of them, left in a shell or set by a scheduler, are ignored with a notice. Raises UsageError for a whole set that
    cannot be.
    """
    present = ", ".join(f"{name}={os.environ[name]!r}" for name in LAUNCHER if name in os.environ)
    if missing := [name for name in LAUNCHER if not os.environ.get(name)]:
        if present:
            print(f"notice: one process alone: {present} without {', '.join(missing)} is not torchrun's doing, and is ignored",
                  file=sys.stderr)  # fmt: skip
        return None
    try:
        rank, size, local_rank, local_size, port = (int(os.environ[name]) for name in LAUNCHER if name != "MASTER_ADDR")
    except ValueError:
        port = 0
    if not (0 < port < 2**16 and 0 <= local_rank < local_size <= size and local_rank <= rank < size):
        raise UsageError(f"{present} describe no group of processes. torchrun sets them; for one process alone: unset"
                         f" {' '.join(LAUNCHER)}")  # fmt: skip
    return rank, size, local_rank, local_size


def join(backend: str, rank: int, size: int) -> None:
    """Joins the group that meets at torchrun's address; raises OSError when it does not come about in time."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=JOIN_SECONDS)))
        # torchrun's agent may keep one store of keys over all restarts of its workers: what the dead ones left there must not
        # be found (github.com/pytorch/pytorch/issues/135712). Without the agent's, each start has a store of its own.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, OSError) as error:
        raise OSError(
            f"rank {rank} of {size} did not meet the others at MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT"
            f" {os.environ['MASTER_PORT']}, within {JOIN_SECONDS} s: {first_line(error)}. A port in use: another --master_port,"
            " or --standalone on one machine; no answer: is that address to be reached from here?"
        ) from error


def resume_after_restart(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """torchrun that starts its workers again wants them to resume what this run saved, and nothing else: where it may do so,
    a run from scratch first moves the state of an older run of the same name to the previous one's place.

    That it began is recorded in the store of torchrun's agent, which outlives the workers: they may have died before. Without
    such a store all ranks' restarts are counted: a machine that came back counts its own from 0.
    """
    if config.from_resume:
        return config
    counts = [float(os.environ.get(f"TORCHELASTIC_{name}") or 0) for name in ("MAX_RESTARTS", "RESTART_COUNT")]
    may_restart, restarts = ranks.sum(counts)
    if not may_restart:  # on none of the machines
        return config
    began, there = restarts > 0, False
    if ranks.is_main:
        there = config.resume_file.is_file()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            began = store.check([BEGAN])
            store.set(BEGAN, "")
        if there and not began:
            os.replace(config.resume_file, previous_state(config.resume_file))
            ranks.print(f"notice: the training state of an older run is kept at {previous_state(config.resume_file)}")
    return dataclasses.replace(config, from_resume=int(ranks.sum([float(there and began)])[0]))
