"""Suite `train`: samples a second of the training scripts as users run them, against one update after another of
docs/minimal_vlm.py.

The baseline pads every sample to --max_seq_len and encodes every image in every epoch, all in fp32. A turn is a process
that trains from its start; a script's own figures are those it logs.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from timeit import timeit

import torch
from torch.utils.data import DataLoader
from transformers import CLIPVisionModel

from dataset.images import open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import VLMDataset, collate
from docs import minimal_vlm
from machine import peak_memory
from model.conversation import Renderer
from model.device import check_compile
from model.errors import UsageError
from model.storage import REPOSITORY
from model.weights import load_tokenizer

from .synthetic import Size, make_encoder, write_data

STAGES = {  # the scripts' own settings
    "pretrain": {"batch_size": 16, "max_seq_len": 640, "freeze_llm": 1, "learning_rate": 4e-4},
    "sft": {"batch_size": 4, "max_seq_len": 1536, "freeze_llm": 0, "learning_rate": 1e-6},
}
# By the tokens of an image: pixels a side and patch of the encoder, as of ViT-B; the last pools four patches.
TOKENS = {576: (384, 16), 196: (224, 16), 64: (256, 32), 49: (224, 16)}
ROWS = (*(f"{stage}_{what}" for stage in STAGES for what in ("first_epoch", "cached")), "loader", "image_tokens")
EPOCHS = 4  # of a script's turn: the first fills the feature cache, the others read it
PLAIN_UPDATES = 2  # of the baseline's turn, after one that is not counted


def measure(wanted: list[str], folder: Path, size: Size, args: argparse.Namespace) -> Iterator[dict]:
    """The rows, each with its ratio to the baseline where that is measured, too."""
    tokenizer, encoder = load_tokenizer(str(REPOSITORY / "model")), make_encoder(folder / "encoder", size)
    try:
        if size.compile and wanted != ["loader"]:
            check_compile(torch.device(args.device))
    except UsageError as error:
        print(f"notice: {error}, as is done here")
        size = replace(size, compile=0)
    fp32, bf16 = (product_speed(torch.device(args.device), dtype) for dtype in (torch.float32, torch.bfloat16))
    for stage in STAGES:
        rows = [name for name in wanted if name.startswith(stage)]
        if rows or "image_tokens" in wanted:
            write_data(folder / stage, stage, size.samples[stage], tokenizer, images=size.samples[stage])
        if rows:
            for row in race(stage, rows, folder, encoder, size, args):  # ratios hang on what bf16 is worth here
                yield row | {"bf16_to_fp32": bf16 / fp32}
    if "loader" in wanted:
        yield measure_loader(folder, tokenizer)
    if "image_tokens" in wanted:
        yield from measure_tokens(folder, size, args)


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product, the best of several."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    return max(2 * n**3 / timeit(lambda: (a @ a)[0, 0].item(), number=1) for _ in range(8))


def race(stage: str, rows: list[str], folder: Path, encoder: Path, size: Size, args: argparse.Namespace) -> Iterator[dict]:
    """The rows of a stage: the script, the baseline and the script of another clone take turns."""
    here = partial(run_script, stage, folder, encoder, size, args.device)
    ways = {"": partial(here, REPOSITORY)}  # by what stands before the names of their figures
    if not args.alone:
        ways["plain_"] = partial(run_plain, stage, folder, encoder, size, args.device)
    if args.against:
        ways["against_"] = partial(here, args.against)
    turns = [{way: run() for way, run in ways.items()} for _ in range(args.rounds)]
    for name in rows:
        row, what = {"name": name}, name.removeprefix(f"{stage}_")
        for way in ways:
            row |= {way + key: statistics.median(turn[way][what][key] for turn in turns) for key in turns[0][way][what]}
            if way:
                row[f"{way}ratio"] = row["samples_per_second"] / row[f"{way}samples_per_second"]
        yield row


def measure_tokens(folder: Path, size: Size, args: argparse.Namespace) -> Iterator[dict]:
    """What the tokens of an image cost: the scripts with encoders of more and fewer patches, which take turns."""
    encoders = {tokens: make_encoder(folder / f"encoder_{tokens}", size, *shape) for tokens, shape in TOKENS.items()}
    turns = [{(tokens, stage): run_script(stage, folder, encoder, size, args.device, REPOSITORY, image_tokens=tokens)
              for tokens, encoder in encoders.items() for stage in STAGES} for _ in range(args.rounds)]  # fmt: skip
    for tokens in encoders:
        yield {"name": f"image_tokens_{tokens}"} | {
            f"{stage}_{what}": statistics.median(turn[tokens, stage][what]["samples_per_second"] for turn in turns)
            for stage in STAGES for what in ("first_epoch", "cached")
        }  # fmt: skip


def run_script(stage: str, folder: Path, encoder: Path, size: Size, device: str, clone: Path,
               launcher: tuple = (sys.executable,), **more) -> dict[str, dict]:  # fmt: skip
    """Figures of a training script's first epoch and of its later ones, from the metrics file that it leaves.

    Its first update, which waits for the loader and the compiler, is left out.
    """
    out, flags = folder / "out", STAGES[stage] | more
    if "from_resume" not in more:
        shutil.rmtree(out, ignore_errors=True)
    updates = size.samples[stage] // flags["batch_size"]
    flags = flags | {
        "data_path": folder / stage / f"{stage}.jsonl", "images_path": folder / stage / "images", "vision_model_path": encoder,
        "from_weight": "none", "epochs": EPOCHS, "log_interval": updates, "save_interval": 10**9, "num_workers": 1,
        "cache_features": 1, "use_compile": size.compile, "device": device, "save_dir": out, "checkpoint_dir": out,
        "hidden_size": size.hidden_size, "num_hidden_layers": size.num_hidden_layers, **more,
    }  # fmt: skip
    command = [*launcher, clone / f"train_{stage}_vlm.py", *(word for name, value in flags.items() for word in (f"--{name}", value))]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"train_{stage}_vlm.py failed:\n{done.stderr[-3000:]}")
    (metrics,) = out.glob("*.metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    ends = [line["seconds"] for line in lines]  # of the first update, then of each epoch
    first, *later = (after - before for before, after in pairwise(ends))
    both = {"peak_memory_mb": lines[-1]["peak_memory_mb"]}
    return {"first_epoch": {"samples_per_second": (updates - 1) * flags["batch_size"] / first, **both},
            "cached": {"samples_per_second": updates * flags["batch_size"] / statistics.median(later), **both,
                       "tokens_per_second": lines[-1]["tokens_per_second"]}}  # fmt: skip


def run_plain(*arguments) -> dict[str, dict]:
    """Figures of the baseline, in a process of its own for its peak of memory; all its epochs are alike."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        figures = process.submit(train_plain, *arguments).result()
    return {"first_epoch": figures, "cached": figures}


def train_plain(stage: str, folder: Path, encoder: Path, size: Size, device: str) -> dict:
    """A few updates of docs/minimal_vlm.py's model."""
    flags, vision = STAGES[stage], CLIPVisionModel.from_pretrained(encoder)
    sizes = minimal_vlm.Config(size.hidden_size, size.num_hidden_layers, vision_hidden_size=vision.config.hidden_size)
    model = minimal_vlm.MiniVLM(sizes, vision).to(device)
    model.requires_grad_(False)
    for module in [model.vision_proj] if flags["freeze_llm"] else [model.vision_proj, model.model]:
        module.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.01)
    data = minimal_vlm.Conversations(folder / stage / f"{stage}.jsonl", folder / stage / "images", minimal_vlm.load_tokenizer())
    loader = DataLoader(data, flags["batch_size"], collate_fn=partial(minimal_vlm.collate, length=flags["max_seq_len"], device=device))
    for done, batch in enumerate(loader):
        if done == 1:  # the first update only warms up
            begin = time.perf_counter()
        minimal_vlm.update(model, batch, optimizer, flags["learning_rate"])
        if done == PLAIN_UPDATES:
            break
    seconds = time.perf_counter() - begin
    memory = peak_memory() if device == "cpu" else torch.accelerator.max_memory_allocated()
    return {"samples_per_second": done * flags["batch_size"] / seconds, "peak_memory_mb": memory / 2**20}


def measure_loader(folder: Path, tokenizer) -> dict:
    """Captions with their images to batches of 16, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path, images = write_data(folder / "loader", "pretrain", 16, tokenizer, images=16)
    plain = minimal_vlm.Conversations(path, images, minimal_vlm.load_tokenizer())
    real = VLMDataset(open_samples(path), open_images(images), Renderer(tokenizer), 640)
    ways = {"plain": lambda: minimal_vlm.collate([plain[number] for number in range(16)], 640),
            "real": lambda: collate(real.__getitems__(list(range(16))), 0, 196)}  # fmt: skip
    turns = [{name: timeit(way, number=1) for name, way in ways.items()} for _ in range(10)]
    seconds = {name: statistics.median(turn[name] for turn in turns[1:]) for name in ways}  # the first warms up
    torch.set_num_threads(threads)
    return {"name": "loader", "samples_per_second": 16 / seconds["real"], "plain_samples_per_second": 16 / seconds["plain"],
            "plain_ratio": seconds["plain"] / seconds["real"]}  # fmt: skip
