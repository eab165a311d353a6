"""Suite `data` of the benchmark: what starting on and reading from large data costs, side by side with the plain ways."""

import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.convert import main as convert
from dataset.images import open_images
from dataset.jsonl import JsonlSamples
from dataset.sources import open_samples
from model.conversation import load_tokenizer
from model.storage import REPOSITORY
from model.vision import preprocess
from trainer.sampler import ResumableSampler

from .synthetic import write_data

PUBLISHED, LARGE, SMALL = 595_000, 10_000_000, 10_000  # lines of jsonl
PICTURES = 8000  # for parquet against loose files
WORKERS = 8


class Texts(Dataset):
    """Characters of a sample's first turn; from a source, or (the plain way) from a list of parsed rows."""

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> int:
        sample = self.source[index]
        return len(sample["conversations"][0]["content"] if isinstance(sample, dict) else sample.turns[0].content)


def write_lines(path: Path, count: int) -> None:
    """jsonl of `count` captions of the published length, about 270 bytes a line."""
    rng, pool = random.Random(0), []
    for number in range(1000):
        answer = " ".join(rng.choice(("small", "wooden", "table", "near", "an", "open", "window")) for _ in range(20))
        turns = [{"role": "user", "content": "Provide a brief description of the given image.\n<image>"},
                 {"role": "assistant", "content": answer}]  # fmt: skip
        pool.append(json.dumps({"conversations": turns, "image": f"{number:09}.jpg"}) + "\n")
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, 1000):
            file.writelines(pool[: min(1000, count - start)])


def own_memory(process: int | str = "self") -> int:
    """Bytes that a process uses, a page that several share counting as a part (PSS)."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("smaps_rollup has no line Pss")


def measure_start(path: str, way: str) -> dict:
    """In a process of its own: seconds until the first sample, and memory of it and 8 loader processes once all have read."""
    begin = time.perf_counter()
    if way == "nothing":
        source = [{"conversations": [{"content": "x"}]}] * 4000
    elif way == "rows":
        with open(path, encoding="utf-8") as file:
            source = [json.loads(line) for line in file]
    else:
        source = open_samples(path)
    data = Texts(source)
    data[0]
    seconds = time.perf_counter() - begin
    order = np.random.default_rng(0).permutation(len(data))[:40_000].tolist()  # of a list, every row would be touched in time
    loader = DataLoader(data, batch_size=16, sampler=order, num_workers=WORKERS, persistent_workers=True)
    batches = iter(loader)
    for _ in loader if way != "nothing" else [next(batches)]:
        pass
    children = [worker.pid for worker in loader._iterator._workers] if way != "nothing" else [w.pid for w in batches._workers]
    return {"seconds": seconds, "memory": own_memory() + sum(map(own_memory, children))}


def run_self(*arguments: str | Path) -> Any:
    """What this module prints in a fresh interpreter: `measure_start` of a path and a way, or `read_all` of data, pictures and workers."""
    command = [sys.executable, "-m", "benchmarks.data", *map(str, arguments)]
    return json.loads(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout)


def measure_jsonl(folder: Path) -> list[dict]:
    """Start and memory at the published size; start and cost of a sample at ten million lines."""
    path = folder / "published.jsonl"
    write_lines(path, PUBLISHED)
    first, later = run_self(path, "index"), run_self(path, "index")
    plain, nothing = run_self(path, "rows"), run_self(path, "nothing")
    memory, plain_memory = later["memory"] - nothing["memory"], plain["memory"] - nothing["memory"]
    rows = [{"name": "jsonl_first_start", "ratio": plain["seconds"] / first["seconds"], "seconds": first["seconds"]},
            {"name": "jsonl_later_start", "ratio": plain["seconds"] / later["seconds"], "seconds": later["seconds"]},
            {"name": "jsonl_memory", "ratio": memory / plain_memory, "megabytes": memory / 1e6, "plain_megabytes": plain_memory / 1e6}]  # fmt: skip
    path.unlink()
    write_lines(folder / "large.jsonl", LARGE)
    write_lines(folder / "small.jsonl", SMALL)
    began = run_self(folder / "large.jsonl", "index")["seconds"]
    start = run_self(folder / "large.jsonl", "index")
    sources = {name: JsonlSamples(folder / f"{name}.jsonl") for name in ("large", "small")}
    fresh = measure_samples(sources)
    for source in sources.values():
        read_twice(source.path)
    costs = measure_samples(sources)
    return [*rows, {"name": "ten_million_start", "ratio": began / start["seconds"], "seconds": start["seconds"],
                    "megabytes": (start["memory"] - nothing["memory"]) / 1e6},
            {"name": "ten_million_sample", "ratio": costs["large"] / costs["small"], "microseconds": costs["large"] * 1e6,
             "first_touch_ratio": fresh["large"] / fresh["small"]}]  # fmt: skip


def measure_samples(sources: dict[str, JsonlSamples]) -> dict[str, float]:
    """Processor seconds of a sample in the order of training, the sources taking turns: the median of 16 turns."""
    costs = {name: [] for name in sources}
    samplers = {name: ResumableSampler(len(source), 16, 1, 0, lengths=lambda indices, s=source: s.lengths(indices, 196))
                for name, source in sources.items()}  # fmt: skip
    for epoch in range(17):
        for name, source in sources.items():
            begin, count = time.thread_time(), 0
            for (micro_batch,) in samplers[name].updates(epoch):
                for index in micro_batch:
                    source[index]
                count += len(micro_batch)
                if count >= SMALL // 2:
                    break
            costs[name].append((time.thread_time() - begin) / count)
    return {name: statistics.median(values[1:]) for name, values in costs.items()}


def read_twice(path: Path) -> None:
    """Reads a file through, as training does: of some 14 lines on a page the first two cost Linux more than the others, since
    a page counts as used from its second reading on."""
    for _ in range(2):
        with open(path, "rb", buffering=0) as file:
            while file.read(2**20):
                pass


def measure_trillion() -> dict:
    """Microseconds of the next sample number among 10^12, in the order of training, and among 10^4."""
    seconds = {}
    for size in (10**12, 10**4):
        sampler = ResumableSampler(size, 16, 1, 0, lengths=lambda indices: indices % 500)
        updates, count = sampler.updates(0, skip=size // 2), 0
        begin = time.perf_counter()
        for (micro_batch,) in updates:
            count += len(micro_batch)
            if count >= 4000:
                break
        seconds[size] = (time.perf_counter() - begin) / count
    return {"name": "trillion_next", "ratio": seconds[10**12] / seconds[10**4], "microseconds": seconds[10**12] * 1e6}


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_all(data: str, images: str, workers: int = 1) -> dict:
    """Reads the samples that one of `workers` loader processes gets, and their pictures' bytes, once in the order of training:
    seconds from the start, and processor seconds of a sample."""
    begin, samples, source = time.perf_counter(), open_samples(data), open_images(images)
    sampler = ResumableSampler(len(samples), 16, 1, 0, lengths=lambda indices: samples.lengths(indices, 196),
                               order=lambda epoch: samples.order(0, epoch))  # fmt: skip
    numbers = [index for (micro_batch,) in itertools.islice(sampler.updates(0), 0, None, workers) for index in micro_batch]
    processor = time.process_time()
    for index in numbers:
        sample = samples[index]
        for ref in sample.images:
            ref if isinstance(ref, bytes) else source.read(ref, sample.where)
    return {"seconds": time.perf_counter() - begin, "processor": (time.process_time() - processor) / len(numbers)}


def system_calls(data: str, images: str) -> int | None:
    """System calls of `read_all`, by strace; None without it."""
    if shutil.which("strace") is None:
        return None
    command = ["strace", "-f", "-c", sys.executable, "-m", "benchmarks.data", data, images, "read", "1"]
    lines = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stderr.splitlines()
    total = next(line for line in reversed(lines) if line.rstrip().endswith("total"))
    return int(total.split()[3])


def measure_parquet(folder: Path) -> list[dict]:
    """Reading parquet, and a zip, against loose files, from a cold cache; and their system calls."""
    tokenizer = load_tokenizer(str(REPOSITORY / "model"))
    data, pictures = write_data(folder / "loose", "pretrain", PICTURES, tokenizer, PICTURES)
    if convert([str(data), "--images_path", str(pictures), "--out", str(folder / "shards")]):
        raise RuntimeError("the data could not be converted")
    shutil.make_archive(str(folder / "zip" / "pictures"), "zip", pictures)
    ways = {"loose": (str(data), str(pictures)), "parquet": (str(folder / "shards"), "none"),
            "zip": (str(data), str(folder / "zip" / "pictures.zip"))}  # fmt: skip
    for way in ways.values():
        read_all(*way)  # the indices are made
    seconds = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            forget(folder)
            seconds[name].append(run_self(*way, "read", 1)["seconds"])  # in a process of its own: row groups read before are kept
    calls = {name: system_calls(*way) for name, way in ways.items()}
    idle = system_calls("nothing", "nothing")
    times = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name in ("parquet", "zip"):
        rows.append({"name": f"{name}_cold", "ratio": times["loose"] / times[name], "samples_per_second": PICTURES / times[name]})
        if idle is not None:
            own, loose = calls[name] - idle, calls["loose"] - idle
            rows.append({"name": f"{name}_system_calls", "ratio": loose / own, "calls_per_sample": own / PICTURES})
    return [*rows, measure_sharing(str(folder / "shards"), str(pictures))]


def measure_sharing(shards: str, pictures: str) -> dict:
    """A sample with 8 loader processes, each of which reads every row group, against one: processor time to read it and to
    make pixels of its picture."""
    costs, images, pixels = {1: [], WORKERS: []}, open_images(pictures), []
    for _ in range(3):
        for workers, values in costs.items():
            values.append(run_self(shards, "none", "read", workers)["processor"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    for name in sorted(os.listdir(pictures))[:500]:
        begin = time.thread_time()
        preprocess(images.load(name))
        pixels.append(time.thread_time() - begin)
    torch.set_num_threads(threads)
    one, many, picture = statistics.median(costs[1]), statistics.median(costs[WORKERS]), statistics.median(pixels)
    return {"name": "parquet_8_readers", "ratio": (many + picture) / (one + picture), "microseconds": many * 1e6,
            "alone_microseconds": one * 1e6, "picture_microseconds": picture * 1e6}  # fmt: skip


def data_suite(folder: Path) -> list[dict]:
    """The rows of suite `data`."""
    rows = [*measure_jsonl(folder), measure_trillion(), *measure_parquet(folder)]
    for row in rows:
        figures = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if key not in ("name", "ratio"))
        print(f"{row['name']:24} {row['ratio']:8.2f}   {figures}", flush=True)
    return rows


if __name__ == "__main__":
    if sys.argv[3:4] == ["read"]:
        if sys.argv[1] != "nothing":
            print(json.dumps(read_all(*sys.argv[1:3], int(sys.argv[4]))))
    else:
        print(json.dumps(measure_start(*sys.argv[1:3])))
