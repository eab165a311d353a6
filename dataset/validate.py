"""Reads a data set as training would and says what training would meet.

    python -m dataset.validate dataset/sft_data.jsonl --images_path dataset/sft_images
    python -m dataset.validate "shards/*.parquet" --plot lengths.png

Every sample is checked, tokenized and its pictures decoded, in several processes. Prints what is wrong by kind, with the
first places of each; the samples' lengths; how many --max_seq_len would cut; samples that stand there twice; and what an epoch
comes to. Ends with 0 when every sample is good, 1 when some are bad, 2 when the data cannot be read at all.
"""

import argparse
import hashlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from .conversation import Renderer
from .errors import DataError, SampleError
from .pictures import ImageSource, open_images
from .sources import Mixture, open_samples

REPOSITORY = Path(__file__).resolve().parent.parent
CHUNK = 256  # samples that a process checks at a time
SHOWN = 5  # places named for each kind of trouble
WIDTH = 50  # characters of the longest bar


@dataclass
class Report:
    """What was found in some of the samples; reports add up."""

    samples: int = 0
    pictures: int = 0
    bad: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # places by kind
    lengths: list[int] = field(default_factory=list)  # tokens of the good ones
    supervised: int = 0  # tokens
    cut: int = 0  # samples longer than max_seq_len that can still be used
    hashes: list[tuple[bytes, str]] = field(default_factory=list)  # of content, with its place

    def add(self, other: "Report") -> None:
        """Takes up what another report found."""
        for name in ("samples", "pictures", "supervised", "cut"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths += other.lengths
        self.hashes += other.hashes
        for kind, places in other.bad.items():
            self.bad[kind] += places

    def duplicates(self) -> list[tuple[str, str]]:
        """Pairs of places with the same conversation and pictures."""
        first, pairs = {}, []
        for digest, where in self.hashes:
            if digest in first:
                pairs.append((first[digest], where))
            else:
                first[digest] = where
        return pairs


def kind_of(error: SampleError) -> str:
    """The problem without the values in it: names and numbers differ from sample to sample."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|b'[^']*'|\"[^\"]*\"", "...", error.problem))[:100]


class Checker:
    """Checks samples as training reads them."""

    def __init__(self, samples: Mixture, images: ImageSource, renderer: Renderer, max_length: int):
        self.samples, self.images, self.renderer, self.max_length = samples, images, renderer, max_length

    def check(self, span: range) -> Report:
        """A report on the samples with these numbers."""
        report = Report(samples=len(span))
        for index in span:
            try:
                sample = self.samples[index]
                whole = self.renderer.render(sample)
                used = self.renderer.render(sample, self.max_length)
                for ref in sample.images:
                    self.images.load(ref, sample.where)
            except SampleError as error:
                report.bad[kind_of(error)].append(str(error))
                continue
            report.pictures += len(sample.images)
            report.lengths.append(len(whole))
            report.supervised += int((used.labels[1:] != -100).sum())
            report.cut += len(whole) > len(used)
            content = hashlib.blake2b(repr([sample.turns, sample.images]).encode(errors="surrogatepass"), digest_size=12)
            report.hashes.append((content.digest(), sample.where))
        return report


_checker: Checker | None = None  # of a worker process


def _check(span: range) -> Report:
    return _checker.check(span)


def check_all(checker: Checker, processes: int) -> Iterator[Report]:
    """Reports on all samples, chunk by chunk in their order."""
    global _checker
    _checker = checker
    spans = [range(start, min(len(checker.samples), start + CHUNK)) for start in range(0, len(checker.samples), CHUNK)]
    if processes == 1:
        yield from map(_check, spans)
        return
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:  # the processes share the checker's memory
        yield from pool.map(_check, spans)


def histogram(lengths: np.ndarray) -> str:
    """Lengths in at most 20 bins, as bars of characters."""
    counts, edges = np.histogram(lengths, bins=min(20, len(np.unique(lengths))))
    return "\n".join(f"{low:7.0f} - {high:6.0f} {'#' * round(WIDTH * count / counts.max())} {count}"
                     for count, low, high in zip(counts, edges, edges[1:], strict=False))  # fmt: skip


def plot(lengths: np.ndarray, max_length: int, path: str) -> None:
    """The histogram as a picture; raises DataError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise DataError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.hist(lengths, bins=60)
    axes.axvline(max_length, color="tab:red", label=f"max_seq_len {max_length}")
    axes.set(xlabel="tokens of a sample", ylabel="samples")
    axes.legend()
    figure.savefig(path, dpi=120)


def tell(report: Report, args: argparse.Namespace, epoch_size: int) -> None:
    """Prints the report."""
    bad = sum(map(len, report.bad.values()))
    print(f"{report.samples:,} samples, {report.pictures:,} pictures; {bad:,} bad ({bad / max(1, report.samples):.2%})")
    for kind, places in sorted(report.bad.items(), key=lambda item: -len(item[1])):
        print(f"  {len(places):,} x {kind}")
        for place in places[:SHOWN]:
            print(f"      {place}")
    if not report.lengths:
        return
    lengths = np.array(report.lengths)
    middle, most, longest = np.percentile(lengths, [50, 95, 100]).astype(int)
    print(f"tokens of a sample: median {middle}, 95% up to {most}, longest {longest}; {report.supervised / lengths.sum():.1%}"
          " of all tokens carry loss")  # fmt: skip
    print(histogram(lengths))
    print(f"--max_seq_len {args.max_seq_len} cuts {report.cut:,} of them ({report.cut / len(lengths):.2%})")
    pairs = report.duplicates()
    print(f"{len(pairs):,} samples stand there more than once" + "".join(f"\n      {b} is {a}" for a, b in pairs[:SHOWN]))
    steps = -(-epoch_size // args.batch_size)
    line = f"an epoch: {epoch_size:,} samples, {steps:,} updates of {args.batch_size}"
    if args.samples_per_second:
        line += f", {epoch_size / args.samples_per_second / 3600:.1f} hours at {args.samples_per_second:g} samples/s"
    print(line)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 or 2, as the module's description says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="what --data_path of training takes")
    parser.add_argument("--images_path", default=str(REPOSITORY / "dataset" / "sft_images"), help="as for training")
    parser.add_argument("--tokenizer_path", default=str(REPOSITORY / "model"))
    parser.add_argument("--max_seq_len", type=int, default=1536)
    parser.add_argument("--batch_size", type=int, default=4, help="to count the updates of an epoch")
    parser.add_argument("--samples_per_second", type=float, help="of training, to estimate the time of an epoch")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--plot", help="file for a picture of the lengths")
    args = parser.parse_args(argv)
    try:
        samples, images = open_samples(args.data), open_images(args.images_path)
        renderer, total = Renderer(AutoTokenizer.from_pretrained(args.tokenizer_path)), Report()
        with tqdm(total=len(samples), unit="sample", disable=not sys.stderr.isatty()) as bar:
            for report in check_all(Checker(samples, images, renderer, args.max_seq_len), max(1, args.processes)):
                total.add(report)
                bar.update(report.samples)
        tell(total, args, samples.epoch_size)
        if args.plot:
            plot(np.array(total.lengths), args.max_seq_len, args.plot)
    except (DataError, OSError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(bool(total.bad))


if __name__ == "__main__":
    sys.exit(main())
