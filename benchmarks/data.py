"""Suite `data`: seconds until the first sample of a large jsonl file; the baseline is a list of all its rows."""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from dataset.sources import open_samples
from model.storage import REPOSITORY
from model.weights import load_tokenizer

from .synthetic import Size, conversation, words_of

ROWS = ("jsonl_first_start", "jsonl_later_start")


def measure(wanted: list[str], folder: Path, size: Size, args: argparse.Namespace) -> Iterator[dict]:
    """The rows: without, and with what an earlier start left next to the file."""
    rng, words, path = random.Random(0), words_of(load_tokenizer(str(REPOSITORY / "model"))), folder / "large.jsonl"
    pool = [json.dumps({"conversations": conversation("pretrain", words, rng), "image": f"{number:09}.jpg"}) for number in range(1000)]
    path.write_text("".join(f"{pool[number % 1000]}\n" for number in range(size.lines)), encoding="utf-8")
    begin = time.perf_counter()
    with open(path, encoding="utf-8") as file:
        len([json.loads(line) for line in file])
    plain = time.perf_counter() - begin
    for name in ROWS:  # in this order, whichever are wanted
        begin = time.perf_counter()
        open_samples(path)[0]
        seconds = time.perf_counter() - begin
        if name in wanted:
            yield {"name": name, "seconds": seconds, "plain_seconds": plain, "plain_ratio": plain / seconds}
