"""Ranks and devices, absorbed here: the loop does not know whether it runs alone.

Started by `torchrun`, a process group is made (NCCL on CUDA, gloo elsewhere); started plainly, there is one rank.
"""

import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from machine import LAUNCHER, allow_many_files
from model.device import usable_device
from model.errors import UsageError


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


def start(device_name: str) -> Ranks:
    """This process among those that torchrun started, if it did."""
    group = None
    if any(name in os.environ for name in LAUNCHER):
        from .torchrun import join, launched

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
        join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank, size)
    return Ranks(rank, size, local_size, device)


def stop() -> None:
    """Leaves the process group, after every rank has come here: none is left waiting for one that is still saving."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
