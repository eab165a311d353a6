"""Reads a data set as training would and says what training would meet.

    python -m dataset.validate dataset/sft_data.jsonl --images_path dataset/sft_images
    python -m dataset.validate "shards/*.parquet" --plot lengths.png

Every sample is checked, tokenized and its images decoded, in several processes. Prints what is wrong by kind, with the
first places of each; the samples' lengths; how many --max_seq_len would cut; samples that stand there twice; and the
updates and the time of an epoch. Ends with 0 when every sample is good, 1 when some are bad, 2 when it cannot be read.
"""

import argparse
import os
import re
import sys
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from machine import cores
from model.conversation import Renderer
from model.errors import DataError, SampleError, UsageError, first_line, print_anything
from model.model_minimind import IGNORE_INDEX
from model.outputs import check_output
from model.storage import REPOSITORY, home_for_tilde
from model.weights import load_tokenizer

from .images import ImageSource, hash_of, open_images
from .sources import Mixture, open_samples

CHUNK = 256  # samples that a process checks at a time
SHOWN = 5  # places named for each kind of trouble
STAGES = {640: "train_pretrain_vlm.py", 1536: "train_sft_vlm.py"}  # by their --max_seq_len
FOUND = np.dtype([("images", "u4"), ("length", "u4"), ("used", "u4"), ("supervised", "u4"), ("hash", "u8")])
# FOUND of each sample, a length of 0 for a bad one; what is wrong with those; and where a truncated image is used.
Report = tuple[np.ndarray, list[SampleError], list[str]]


class Checker(Dataset):
    """Checks samples as training reads them."""

    def __init__(self, samples: Mixture, images: ImageSource, renderer: Renderer, max_length: int):
        self.samples, self.images, self.renderer, self.max_length = samples, images, renderer, max_length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, numbers: list[int]) -> Report:
        """A report on the samples with these numbers. DataLoader calls this."""
        found, errors, notes = np.zeros(len(numbers), FOUND), [], []
        for place, number in enumerate(numbers):
            try:
                sample = self.samples[number]
                whole, used = self.renderer.render(sample), self.renderer.render(sample, self.max_length)
                for ref in sample.images:
                    self.images.pixels(ref, sample.where, notes)
            except SampleError as error:
                errors.append(error)
                continue
            supervised, content = (used.labels[1:] != IGNORE_INDEX).sum(), hash_of(repr([sample.turns, sample.images]))
            found[place] = len(sample.images), len(whole), len(used), supervised, content
        return found, errors, notes


def check_all(checker: Checker, processes: int) -> Report:
    """One report on all samples, in their order."""
    loader = DataLoader(checker, CHUNK, num_workers=processes if processes > 1 else 0, collate_fn=tuple)
    reports, errors, notes = [], [], []
    with tqdm(total=len(checker), unit="sample", disable=not sys.stderr.isatty()) as bar:
        for found, wrong, truncated in loader:
            reports.append(found)
            errors += wrong
            notes += truncated
            bar.update(len(found))
    return np.concatenate(reports), errors, notes


def plot(lengths: np.ndarray, max_length: int, path: Path) -> None:
    """A histogram of the lengths, as an image file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(lengths, bins=60)
    axes.axvline(max_length, color="tab:red", label=f"max_seq_len {max_length}")
    axes.set(xlabel="tokens of a sample", ylabel="samples")
    axes.legend()
    figure.savefig(path, dpi=120)


def counted(count: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"


def duration(seconds: float) -> str:
    """In hours or minutes."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"


def kind_of(error: SampleError) -> str:
    """The problem without the values in it: names and numbers differ from sample to sample, but not those of a path."""
    problem = re.sub(r"'[^']*'|b'[^']*'|\"[^\"]*\"", "...", error.problem)
    return re.sub(r"\S*/[^:]*|\d+", lambda found: found[0] if "/" in found[0] else "N", problem)[:100]


def tell_problems(errors: list[SampleError], notes: list[str]) -> None:
    """Prints the kinds of what is wrong, the most frequent first, with their first places."""
    places = defaultdict(list)
    for error in errors:
        places[kind_of(error)].append(str(error))
    kinds = sorted(places.items(), key=lambda item: -len(item[1]))
    for kind, found in [*kinds, ("truncated images, used", notes)] if notes else kinds:
        print(f"  {len(found):,} x {kind}", *(f"      {place}" for place in found[:SHOWN]), sep="\n")


def tell_lengths(found: np.ndarray, max_length: int) -> None:
    """Prints how long the good samples are, and how many would be cut."""
    lengths = found["length"]
    middle, most, longest = np.percentile(lengths, [50, 95, 100]).astype(int)
    print(f"tokens of a sample: median {middle}, 95% up to {most}, longest {longest};"
          f" {found['supervised'].sum() / found['used'].sum():.1%} of the tokens carry loss")  # fmt: skip
    for limit in sorted({*STAGES, max_length}):
        cut, stage = int((lengths > limit).sum()), f", the default of {STAGES[limit]}" if limit in STAGES else ""
        print(f"--max_seq_len {limit} cuts {cut:,} of them ({cut / len(lengths):.2%}){stage}")


def tell_duplicates(hashes: np.ndarray, numbers: np.ndarray, samples: Mixture) -> None:
    """Prints which samples have conversation and images of one that came before; `numbers` are those of the samples."""
    _, first, kind = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[kind] != np.arange(len(hashes)))
    print(f"{counted(len(again), 'duplicate')}")
    for later in again[:SHOWN]:
        print(f"      {samples.where(int(numbers[later]))} is {samples.where(int(numbers[first[kind[later]]]))}")


def validate(args: argparse.Namespace) -> int:
    """The number of bad samples; prints the report. Raises DataError, UsageError."""
    begin = time.monotonic()
    if args.plot:
        check_output("--plot", args.plot, (".png", ".pdf", ".svg", ".jpg"))
        if find_spec("matplotlib") is None:
            raise UsageError("--plot needs matplotlib: pip install matplotlib")
    samples, images = open_samples(args.data), open_images(args.images_path)
    renderer = Renderer(load_tokenizer(args.tokenizer_path), args.image_tokens)
    found, errors, notes = check_all(Checker(samples, images, renderer, args.max_seq_len), args.processes)
    numbers = np.flatnonzero(found["length"])  # of the good samples
    good, seconds = found[numbers], time.monotonic() - begin
    print(f"{counted(len(found), 'sample')}, {counted(good['images'].sum(), 'image')};"
          f" {len(errors):,} bad ({len(errors) / len(found):.2%})")  # fmt: skip
    tell_problems(errors, notes)
    if len(good):
        tell_lengths(good, args.max_seq_len)
        tell_duplicates(good["hash"], numbers, samples)
    size = samples.epoch_size
    print(f"an epoch: {counted(size, 'sample')}, {counted(-(-size // args.batch_size), 'update')} of {args.batch_size}")
    line = f"  to read: {duration(seconds * size / len(found))} with {counted(args.processes, 'process')}"
    if args.tokens_per_second and len(good):
        needed = good["used"].mean() * size / args.tokens_per_second
        line += f"; to train at {args.tokens_per_second:,g} tokens/s: {duration(needed)}"
    print(line, flush=True)
    if args.plot:
        plot(good["length"], args.max_seq_len, args.plot)
    return len(errors)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 or 2, as the module's description says; 130 after Ctrl-C."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="what --data_path of training takes")
    parser.add_argument("--images_path", default=str(REPOSITORY / "dataset" / "sft_images"), help="as for training")
    parser.add_argument("--tokenizer_path", default=str(REPOSITORY / "model"))
    parser.add_argument("--image_tokens", type=int, default=196, help="tokens of an image, times all its tiles (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=int, default=1536,
                        help="as SFT has it; samples are bad that do not fit, so give 640 for captions")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=4, help="to count the updates of an epoch")
    parser.add_argument("--tokens_per_second", type=float, help="as training prints them, for the time of an epoch")
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--plot", type=Path, help="file for an image of the lengths; needs matplotlib")
    args = parser.parse_args(home_for_tilde(argv))
    if min(args.max_seq_len, args.batch_size, args.processes) < 1 or not (args.tokens_per_second or 1) > 0:
        parser.error("--max_seq_len, --batch_size, --processes and --tokens_per_second are greater than 0")
    try:
        return int(validate(args) > 0)
    except BrokenPipeError:  # who reads us, `head` perhaps, has read enough; the flush at the end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (DataError, UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        print(f"error: a process died, for want of memory if it said nothing: {first_line(error)}. Fewer --processes need"
              " less of it", file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
