"""Ranks and devices, absorbed here: the loop does not know whether it runs alone.

Started by `torchrun`, a process group is made (NCCL on CUDA, gloo elsewhere); started plainly, there is one rank.
"""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from machine import LAUNCHER, allow_many_files
from model.device import usable_device
from model.errors import UsageError, first_line

JOIN_SECONDS = 600  # that processes wait for one another at the start


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `size`, on `device`."""

    rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """The first rank of its machine."""
        return self.rank % self.local_size == 0

    def print(self, message: str) -> None:
        """Printed once, by the first rank, on standard error."""
        if self.is_main:
            print(message, file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        """Printed by whichever rank has something to say."""
        print(f"[rank {self.rank}] {message}" if self.size > 1 else message, file=sys.stderr, flush=True)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)  # by gloo: what the host needs does not wait for the device
        dist.all_reduce(tensor)
        return tensor.tolist()


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


def join(backend: str, rank: int, size: int, seconds: float) -> None:
    """Joins the group that meets at torchrun's address; raises OSError when it does not come about in time."""
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=seconds)))
        # torchrun's agent may keep one store of keys over all restarts of its workers: what the dead ones left there must not
        # be found (github.com/pytorch/pytorch/issues/135712). Without the agent's, each start has a store of its own.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, OSError) as error:
        raise OSError(
            f"rank {rank} of {size} did not meet the others at MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT"
            f" {os.environ['MASTER_PORT']}, within {seconds:.0f} s: {first_line(error)}. A port in use: another --master_port,"
            " or --standalone on one machine; no answer: is that address to be reached from here?"
        ) from error


def start(device_name: str) -> Ranks:
    """This process among those that torchrun started, if it did."""
    group = launched()
    rank, size, local_rank, local_size = group or (0, 1, 0, 1)
    device = usable_device(device_name)
    allow_many_files()
    if device.type == "cuda":
        if local_size > (there := torch.cuda.device_count()):
            raise UsageError(f"--nproc_per_node {local_size}: this machine has {there} GPUs, and each process needs its own")
        device = torch.device("cuda", local_rank if group else device.index or 0)
        torch.accelerator.set_device_index(device.index)
    if group:
        join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank, size, JOIN_SECONDS)
    return Ranks(rank, size, local_size, device)


def stop() -> None:
    """Leaves the process group, after every rank has come here: none is left waiting for one that is still saving."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
