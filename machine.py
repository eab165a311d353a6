"""The machine that a process finds itself on: cores, threads, memory, open files. Imported before torch, and without it."""

import atexit
import contextlib
import gc
import math
import os
import sys
from pathlib import Path

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


def cpu_quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that the control group of this process and those above it grant it: the least of them."""
    least = math.inf
    with contextlib.suppress(OSError, ValueError):  # another system than Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)  # version 2 has no controllers; version 1 a tree for each
            if controllers and "cpu" not in controllers.split(","):
                continue
            names, path = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",), Path(own.lstrip("/"))
            for folder in (path, *path.parents):  # a container may see its own tree under the host's names
                with contextlib.suppress(OSError, ValueError):  # not there; "max"
                    files = [root / "sys/fs/cgroup" / controllers / folder / name for name in names]
                    quota, period = map(float, " ".join(file.read_text() for file in files).split())
                    least = min(least, quota / period if quota > 0 else math.inf)
    return least


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: those of its affinity, or fewer by the quota of its container; at least 1."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(mine, cpu_quota(root))))


def threads_chosen() -> bool:
    """Whether somebody chose OMP_NUM_THREADS. torchrun sets it to 1 where nobody did: what it was started with tells."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return "OMP_NUM_THREADS" in os.environ
    try:
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return False


def settle_threads() -> None:
    """Settings of OpenMP, which reads them once, when torch is loaded. What the user set stays.

    Threads that wait spin for half a millisecond, and sleep then. Those of libgomp's default spin for 16: where anything else
    runs, they keep the core from the very thread that they wait for. Not to spin at all costs an idle machine a quarter of
    its speed. As many threads as cores, shared among the processes that torchrun started here.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of libgomp alone: Intel's and LLVM's give way by themselves
    processes = os.environ["LOCAL_WORLD_SIZE"] if all(map(os.environ.get, LAUNCHER)) else ""
    shared = processes.isdecimal() and int(processes) > 1
    if not threads_chosen() and (shared or cpu_quota() < math.inf):
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores() // (int(processes) if shared else 1)))


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes; 0 on Windows, which has no `resource`."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def allow_many_files() -> None:
    """As many open files as the system lets this process have: data may come in thousands of them."""
    try:
        import resource
    except ImportError:
        return
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (most, 10240):  # macOS says "no limit", and takes no more than the second
        with contextlib.suppress(OSError, ValueError):
            return resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it tells of memory that is not there: the host's, by Python's word or by torch's, or a GPU's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(word in text for word in (
        "out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed"))  # fmt: skip


def keep_few_kernels() -> None:
    """Fewer compiled kernels in oneDNN's cache, by default of 1,024 shapes: compiling one again costs next to nothing, and with
    batches of all lengths they take a tenth of SFT's memory after 12 updates (1,985 MB against 1,787), later half a gigabyte."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


settle_threads()
keep_few_kernels()
atexit.register(gc.freeze)  # an ending interpreter searches all objects for circles, several times: seconds, after torch
