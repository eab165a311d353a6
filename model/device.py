"""The device that computes, and how it does so best."""

import ctypes
import os
import time

import torch

from .errors import UsageError, first_line


def default_device() -> str:
    """"cuda:0", "mps" or "cpu": the best there is."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        return "cuda:0" if kind == "cuda" else kind
    return "cpu"


def keep_freed_memory(huge_pages: bool = False) -> None:
    """Settings of memory for work on a CPU; to be called before the first tensor is made.

    glibc's malloc keeps what tensors free instead of handing it back to the system. By default every large tensor is
    mapped anew and each of its pages faults on first touch; an update allocates hundreds of them, and spent a quarter of
    its time there. Other C libraries are left alone.

    oneDNN keeps the compiled kernels of fewer shapes than its own 1,024: with batches of all lengths these took half a
    gigabyte, and compiling one again costs next to nothing.

    `huge_pages` asks for them for tensors of 2 MB and more: weights that are read once a token stream up to a tenth faster.
    Training's tensors, of all sizes, would only take a fifth more memory by their alignment.
    """
    if huge_pages:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks once, at its first tensor of any size
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_ARENA_MAX, 1)  # what the backward's thread frees serves the forward's, and the other way round
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 * 2**20)


def usable_device(name: str) -> torch.device:
    """The device of that name; raises UsageError when this machine or this torch has none."""
    try:
        device = torch.device(name)
        if device.type != "cpu":
            torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: {first_line(error).split('. ')[0]}. Without the flag the best there is is taken") from error
    return device


def bf16_is_fast(device: torch.device, size: int = 768) -> bool:
    """Whether the device multiplies bf16 matrices at least as fast as fp32 ones: measured, in milliseconds."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(3):
                b = a @ a
            b.sum().item()  # waits for the device
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] <= seconds[torch.float32]


def why_not_compile(device: torch.device) -> str | None:
    """What torch.compile says where it cannot work, in one line: no compiler, one without Python.h, a cache that cannot be
    written. Tried on a line of arithmetic, which is another at each call: one compiled before would prove nothing."""
    salt = time.time_ns() % 2**40 / 2**40
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: (x * salt).exp().sum())(x).backward()
        return None
    except Exception as error:  # of compilers, all kinds
        return next((line.strip() for line in str(error).splitlines() if "error: " in line), first_line(error))
