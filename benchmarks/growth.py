"""Suite `growth` of the benchmark: samples per second as batch, sample or data set grow, as rows and as a picture."""

import json
import random
from pathlib import Path

from model.conversation import load_tokenizer
from model.storage import REPOSITORY

from .synthetic import words_of, write_data
from .train import Contestant, make_folder

BATCHES = (1, 4, 16, 32)
LENGTHS = (128, 512, 1536)  # tokens of a sample, text alone
ROWS = (10**3, 10**4, 10**5, 10**6)
PICTURES = 16  # different ones: soon all in the cache


def write_texts(path: Path, tokens: int, count: int) -> None:
    """Conversations of about `tokens` tokens without pictures."""
    rng, words = random.Random(0), words_of(load_tokenizer(str(REPOSITORY / "model")))
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            answer = " ".join(rng.choices(words, k=tokens - 40))
            turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"conversations": turns}) + "\n")


def measure(folder: Path, device: str, stage: str, data_path: Path, updates: int, **flags) -> dict:
    """Figures of the real training loop after a first turn that fills the cache."""
    contestant = Contestant(stage=stage, folder=str(folder), device=device, data_path=str(data_path), updates=updates, flags=flags)
    contestant.turn("cached")  # fills the cache
    figures = contestant.turn("cached")
    contestant.end()
    return figures


def growth_suite(folder: Path, device: str, plot: str | None) -> list[dict]:
    """Rows of all three series."""
    make_folder(folder, {"pretrain": PICTURES, "sft": PICTURES})
    tokenizer = load_tokenizer(str(REPOSITORY / "model"))
    rows = []

    def add(series: str, value: int, figures: dict) -> None:
        rows.append({"name": f"{series}_{value}", "series": series, "value": value, **figures})
        print(f"{series:10} {value:8} {figures['samples_per_second']:8.2f} samples/s {figures['tokens_per_second']:8.0f} tokens/s"
              f" {figures['peak_memory_mb']:6.0f} MB, start {figures['start_seconds']:.1f} s", flush=True)  # fmt: skip

    captions, _ = write_data(folder / "pretrain", "pretrain", 2000, tokenizer, PICTURES)
    for size in BATCHES:
        add("batch", size, measure(folder, device, "pretrain", captions, max(4, 48 // size), batch_size=size))
    for length in LENGTHS:
        path = folder / f"texts_{length}.jsonl"
        write_texts(path, length, 200)
        add("length", length, measure(folder, device, "sft", path, max(4, 2048 // length)))
    for count in ROWS:
        path, _ = write_data(folder / "pretrain", "pretrain", count, tokenizer, PICTURES)
        add("rows", count, measure(folder, device, "pretrain", path, 6))
    if plot:
        draw(rows, Path(plot))
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """The three series side by side; needs matplotlib (requirements-dev.txt)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (("batch", "captions in a batch", "samples_per_second", "samples/s"),
              ("length", "tokens of a sample (batches of 4, all trained)", "tokens_per_second", "tokens/s"),
              ("rows", "samples in the data set", "samples_per_second", "samples/s"))  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    for axis, (series, label, key, unit) in zip(axes, panels, strict=True):
        points = [row for row in rows if row["series"] == series]
        axis.plot([row["value"] for row in points], [row[key] for row in points], "o-", color="#1f5fa8")
        axis.set_xscale("log", base=10 if series == "rows" else 2)
        if series != "rows":
            axis.set_xticks([row["value"] for row in points], [str(row["value"]) for row in points])
        axis.set(xlabel=label, ylabel=unit, ylim=(0, 1.08 * max(row[key] for row in points)))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
