"""Reads a data set as training would and says what training would meet.

    python -m dataset.validate dataset/sft_data.jsonl --images_path dataset/sft_images
    python -m dataset.validate "shards/*.parquet" --plot lengths.png

Every sample is checked, tokenized and its images decoded, in several processes. Prints what is wrong by kind, with the
first places of each; which images are truncated; the samples' lengths; how many --max_seq_len would cut; samples that stand there twice; and the updates
and the time of an epoch. Ends with 0 when every sample is good, 1 when some are bad, 2 when the data cannot be read at all.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from array import array
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context
from operator import iadd

import numpy as np
import torch
from tqdm import tqdm

from machine import cores
from model.conversation import Renderer
from model.errors import DataError, SampleError, UsageError, print_anything
from model.storage import REPOSITORY, check_plot, home_for_tilde
from model.weights import load_tokenizer

from .images import ImageSource, open_images
from .sources import Mixture, open_samples

CHUNK = 256  # samples that a process checks at a time
SHOWN = 5  # places named for each kind of trouble
STAGES = {640: "train_pretrain_vlm.py", 1536: "train_sft_vlm.py"}  # by their --max_seq_len


@dataclass
class Report:
    """What was found in some of the samples; reports add up. 20 bytes a sample."""

    samples: int = 0
    images: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # bad samples by kind
    remarks: dict[str, int] = field(default_factory=dict)  # good samples that something is to be said of, by kind
    places: dict[str, list[str]] = field(default_factory=dict)  # the first of each kind
    supervised: int = 0  # tokens
    used: int = 0  # tokens that max_seq_len leaves
    numbers: array = field(default_factory=lambda: array("Q"))  # of the good samples
    lengths: array = field(default_factory=lambda: array("I"))  # their tokens
    hashes: array = field(default_factory=lambda: array("Q"))  # of their content

    def note(self, counts: dict[str, int], kind: str, count: int, places: list[str]) -> None:
        """`count` more samples of a kind in `bad` or `remarks`, and where the first of them are."""
        counts[kind] = counts.get(kind, 0) + count
        known = self.places.setdefault(kind, [])
        known += places[: SHOWN - len(known)]

    def add(self, other: "Report") -> None:
        """Takes up what another report found."""
        for name in ("samples", "images", "supervised", "used", "numbers", "lengths", "hashes"):
            setattr(self, name, iadd(getattr(self, name), getattr(other, name)))  # arrays grow in place
        for ours, theirs in ((self.bad, other.bad), (self.remarks, other.remarks)):
            for kind, count in theirs.items():
                self.note(ours, kind, count, other.places[kind])

    def duplicates(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of samples whose conversation and images came before, and of those they repeat."""
        hashes = np.frombuffer(self.hashes, np.uint64)
        _, first, kind = np.unique(hashes, return_index=True, return_inverse=True)
        numbers, first = np.frombuffer(self.numbers, np.uint64), first[kind]
        again = first != np.arange(len(hashes))
        return numbers[again], numbers[first[again]]


def kind_of(error: SampleError) -> str:
    """The problem without the values in it: names and numbers differ from sample to sample, but not those of a path."""
    problem = re.sub(r"'[^']*'|b'[^']*'|\"[^\"]*\"", "...", error.problem)
    return re.sub(r"\S*/[^:]*|\d+", lambda found: found[0] if "/" in found[0] else "N", problem)[:100]


class Checker:
    """Checks samples as training reads them."""

    def __init__(self, samples: Mixture, images: ImageSource, renderer: Renderer, max_length: int):
        self.samples, self.images, self.renderer, self.max_length = samples, images, renderer, max_length

    def check(self, span: range) -> Report:
        """A report on the samples with these numbers."""
        report = Report(samples=len(span))
        for index in span:
            notes: list[SampleError] = []
            try:
                sample = self.samples[index]
                whole = self.renderer.render(sample)
                used = self.renderer.render(sample, self.max_length)
                for ref in sample.images:
                    self.images.pixels(ref, sample.where, notes)
            except SampleError as error:
                report.note(report.bad, kind_of(error), 1, [str(error)])
                continue
            for note in notes:
                report.note(report.remarks, kind_of(note), 1, [str(note)])
            report.images += len(sample.images)
            report.supervised += int((used.labels[1:] != -100).sum())
            report.used += len(used)
            content = hashlib.blake2b(repr([sample.turns, sample.images]).encode(errors="surrogatepass"), digest_size=8)
            report.numbers.append(index)
            report.lengths.append(len(whole))
            report.hashes.append(int.from_bytes(content.digest(), "little"))
        return report


_checker: Checker | None = None  # of this process


def _check(span: range) -> Report:
    return _checker.check(span)


def check_all(checker: Checker, processes: int) -> Iterator[Report]:
    """Reports on all samples, chunk by chunk in their order."""
    global _checker
    _checker = checker
    spans = [range(start, min(len(checker.samples), start + CHUNK)) for start in range(0, len(checker.samples), CHUNK)]
    if processes == 1 or "fork" not in get_all_start_methods():  # on Windows
        yield from map(_check, spans)
        return
    # Forked processes share the memory of the checker. Torch has lost its threads in them, and would wait for them: one thread each.
    with ProcessPoolExecutor(processes, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(_check, spans)


def plot(lengths: np.ndarray, max_length: int, path: str) -> None:
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


def tell(report: Report, args: argparse.Namespace, samples: Mixture) -> None:
    """Prints the report, but for times."""
    bad = sum(report.bad.values())
    print(f"{counted(report.samples, 'sample')}, {counted(report.images, 'image')}; {bad:,} bad ({bad / max(1, report.samples):.2%})")
    for kind, count in sorted((report.bad | report.remarks).items(), key=lambda item: (item[0] in report.remarks, -item[1])):
        print(f"  {count:,} x {kind}")
        for place in report.places[kind]:
            print(f"      {place}")
    if not report.lengths:
        return
    lengths = np.frombuffer(report.lengths, np.uint32)
    middle, most, longest = np.percentile(lengths, [50, 95, 100]).astype(int)
    print(f"tokens of a sample: median {middle}, 95% up to {most}, longest {longest}; {report.supervised / report.used:.1%}"
          " of those trained on carry loss")  # fmt: skip
    for limit in sorted({*STAGES, args.max_seq_len}):
        cut = int((lengths > limit).sum())
        print(f"--max_seq_len {limit} cuts {cut:,} of them ({cut / len(lengths):.2%})" + (f", the default of {STAGES[limit]}" if limit in STAGES else ""))
    again, first = report.duplicates()
    print(f"{counted(len(again), 'sample')} standing there more than once" + "".join(
        f"\n      {samples.where(int(b))} is {samples.where(int(a))}" for a, b in zip(first[:SHOWN], again[:SHOWN], strict=True)))  # fmt: skip
    print(f"an epoch: {counted(samples.epoch_size, 'sample')}, {counted(-(-samples.epoch_size // args.batch_size), 'update')} of {args.batch_size}")


def tell_times(report: Report, args: argparse.Namespace, samples: Mixture, seconds: float) -> None:
    """Prints how long an epoch takes: to read, by the time that this took, and to train."""
    line = f"  to read: {duration(seconds * samples.epoch_size / report.samples)} with {counted(args.processes, 'process')}"
    if args.tokens_per_second:
        tokens = report.used / max(1, len(report.lengths)) * samples.epoch_size
        line += f"; to train at {args.tokens_per_second:,g} tokens/s: {duration(tokens / args.tokens_per_second)}"
    print(line)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 or 2, as the module's description says; 130 after Ctrl-C."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="what --data_path of training takes")
    parser.add_argument("--images_path", default=str(REPOSITORY / "dataset" / "sft_images"), help="as for training")
    parser.add_argument("--tokenizer_path", default=str(REPOSITORY / "model"))
    parser.add_argument("--max_seq_len", type=int, default=1536, help="as SFT has it; samples are bad that do not fit, so give 640 for captions")
    parser.add_argument("--batch_size", type=int, default=4, help="to count the updates of an epoch")
    parser.add_argument("--tokens_per_second", type=float, help="as training prints them, to estimate the time of an epoch")
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--plot", help="file for an image of the lengths; needs matplotlib (pip install matplotlib)")
    args = parser.parse_args(home_for_tilde(argv))
    if min(args.max_seq_len, args.batch_size, args.processes) < 1 or not (args.tokens_per_second or 1) > 0:
        parser.error("--max_seq_len, --batch_size, --processes and --tokens_per_second are greater than 0")
    begin = time.monotonic()
    try:
        check_plot(args.plot)
        samples, images = open_samples(args.data), open_images(args.images_path)
        renderer, total = Renderer(load_tokenizer(args.tokenizer_path)), Report()
        with tqdm(total=len(samples), unit="sample", disable=not sys.stderr.isatty()) as bar:
            for report in check_all(Checker(samples, images, renderer, args.max_seq_len), args.processes):
                total.add(report)
                bar.update(report.samples)
        tell(total, args, samples)
        tell_times(total, args, samples, time.monotonic() - begin)
        if args.plot:
            plot(np.frombuffer(total.lengths, np.uint32), args.max_seq_len, args.plot)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads us, `head` perhaps, has read enough; the flush at the end must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, UsageError, OSError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return int(bool(total.bad))


if __name__ == "__main__":
    sys.exit(main())
