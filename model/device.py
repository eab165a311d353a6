"""The device that computes, and how it does so best."""

import time

import torch

from .errors import UsageError, first_line


def default_device() -> str:
    """"cuda:0", "mps" or "cpu": the best there is."""
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        return "cuda:0" if kind == "cuda" else kind
    return "cpu"


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
    """Whether the device multiplies bf16 matrices at least as fast as fp32 ones: known of a GPU, else measured, in milliseconds."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
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


def check_compile(device: torch.device) -> None:
    """Raises UsageError where torch.compile cannot work: no compiler, one without Python.h, a cache that cannot be written.
    Tried on a line of arithmetic, which is another at each call: one compiled before would prove nothing."""
    salt = time.time_ns() % 2**40 / 2**40
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: (x * salt).exp().sum())(x).backward()
    except Exception as error:  # of compilers, all kinds
        cause = next((line.strip() for line in str(error).splitlines() if "error: " in line), first_line(error))
        raise UsageError(f"--use_compile 1: torch.compile does not work here: {cause}. Leave the flag out") from error
