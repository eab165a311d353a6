"""Where samples come from: jsonl and parquet files, one or many, mixed by weights.

A sample source is anything with `len()`, `[i] -> Sample` (raising SampleError) and the methods of SampleSource. Other
formats join here, in `open_file`.
"""

import errno
import glob
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from model.errors import check_fetched

from .errors import DataError, NoSamples
from .files import is_regular
from .jsonl import UNPACK, JsonlSamples, is_packed, kind_of
from .order import EpochOrder, Order, Permutation, share
from .parquet import WINDOW_BYTES, ParquetSamples
from .sample import Sample

FILES = (".jsonl", ".ndjson", ".parquet")  # taken from a folder; .json, too, when it is named
MOST_WEIGHT = 1000
MOST_COMMAS = 8  # of a name
T = TypeVar("T")
HOLD_OUT = 1  # in a key of random numbers: the choice of held-out samples is no order of an epoch


class SampleSource(Protocol):
    """Checked samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def where(self, index: int) -> str:
        """file:line of a sample."""

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """Tokens of samples, estimated without reading them again."""

    def fingerprint(self) -> str:
        """Another one whenever the samples are others."""

    @property
    def blocks(self) -> np.ndarray:
        """int64 [blocks + 1]: where the stretches begin that are read as a whole, and n. [0, n] where any sample is as
        quick to read as the next."""

    @property
    def block_bytes(self) -> int:
        """Size of the largest block in memory; 0 where there are none."""


class Mixture:
    """Several sources as one: their samples numbered through, and an order that takes from each by its weight."""

    def __init__(self, sources: list[SampleSource], weights: list[float]):
        self.sources, self.weights = sources, weights
        self.bounds = np.concatenate([[0], np.cumsum([len(source) for source in sources])])
        self.held_out = np.empty(0, dtype=np.int64)  # numbers of samples that no epoch takes, ascending

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch, weights considered."""
        sizes = [int(blocks[-1]) for blocks in self._blocks()]
        return sum(share(size, weight) for size, weight in zip(sizes, self.weights, strict=True))

    def hold_out(self, part: float, seed: int) -> np.ndarray:
        """Takes this part of every source's samples, in (0, 1), out of all epochs, and returns their numbers, ascending.

        One choice for a seed; at least one sample of each source stays.
        """
        chosen = []
        for number, source in enumerate(self.sources):
            count = min(round(len(source) * part), len(source) - 1)
            chosen.append(self.bounds[number] + Permutation(len(source), (seed, number, 0, HOLD_OUT))(np.arange(count)))
        self.held_out = np.sort(np.concatenate(chosen))
        return self.held_out

    def _blocks(self) -> list[np.ndarray]:
        """The sources' blocks, in a numbering without the samples held out."""
        if not len(self.held_out):
            return [source.blocks for source in self.sources]
        found = []
        for begin, source in zip(self.bounds, self.sources, strict=False):
            before = np.searchsorted(self.held_out, begin + source.blocks)
            found.append(np.unique(source.blocks - before + before[0]))
        return found

    def order(self, seed: int, epoch: int) -> Order:
        """The epoch's order of samples, without its batches' likeness of lengths."""
        sizes = [source.block_bytes for source in self.sources]
        window = max(1, WINDOW_BYTES // max(1, *sizes))
        order = EpochOrder(self._blocks(), [size > 0 for size in sizes], self.weights, seed, epoch, window)
        if not len(self.held_out):
            return order
        skipped = self.held_out - np.arange(len(self.held_out))  # of each held-out sample: how many others come before it
        return lambda places: (numbers := order(places)) + np.searchsorted(skipped, numbers, side="right")

    def _place(self, index: int) -> tuple[SampleSource, int]:
        number = int(np.searchsorted(self.bounds, index, side="right")) - 1
        return self.sources[number], int(index - self.bounds[number])

    def __getitem__(self, index: int) -> Sample:
        source, own = self._place(index)
        return source[own]

    def where(self, index: int) -> str:
        """file:line of a sample."""
        source, own = self._place(index)
        return source.where(own)

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """Estimated tokens of samples."""
        number, lengths = np.searchsorted(self.bounds, indices, side="right") - 1, np.empty(len(indices), dtype=np.int64)
        for source in np.unique(number):
            own = number == source
            lengths[own] = self.sources[source].lengths(indices[own] - self.bounds[source], image_tokens)
        return lengths

    def fingerprint(self) -> str:
        """A hash of the sources'."""
        return hashlib.blake2b("".join(source.fingerprint() for source in self.sources).encode(), digest_size=16).hexdigest()


def open_samples(paths: str | Path) -> Mixture:
    """The samples in files, in folders of them and where patterns lead, with commas between, each with a weight when wanted:
    "a.jsonl, shards/*.parquet:0.3, more/". Raises DataError when there is no such file or it is of another kind."""
    sources, weights, seen = [], [], set()
    for entry, weight in split_entries(str(paths)):
        files = {os.path.realpath(path): path for path in find_files(entry)}  # links in a circle lead to a file many times
        if twice := next((files[real] for real in files if real in seen), None):
            raise DataError(f"{twice} is named twice; a weight takes samples more often ({twice}:2)")
        seen.update(files)
        sources += (opened := open_files(files.values()))
        weights += [weight] * len(opened)
    return Mixture(sources, weights)


def split_entries(paths: str) -> list[tuple[str, float]]:
    """What --data_path names, with weights. A comma within the name of a file belongs to it."""
    return [split_weight(entry) for entry in split_names(paths, lambda entry: leads_somewhere(split_weight(entry)[0]))]


def split_names(names: str, leads: Callable[[str], bool]) -> list[str]:
    """Names with commas between. What stands between two commas is a name of its own, unless it leads nowhere and does so
    together with what follows it."""
    if leads(names):
        return [names]
    parts, found = names.split(","), []
    while parts:
        ends = range(1, min(len(parts), MOST_COMMAS + 1) + 1)
        end = next((end for end in ends if leads(",".join(parts[:end]).strip())), 1)
        found.append(",".join(parts[:end]).strip())
        parts = parts[end:]
    return found


def leads_somewhere(entry: str) -> bool:
    """Whether there is a file, a folder or anything that a pattern matches."""
    return bool(entry) and (os.path.exists(entry) or next(glob.iglob(entry, recursive=True), None) is not None)


def split_weight(entry: str) -> tuple[str, float]:
    """"a.jsonl:0.3" as its parts; the weight is 1 where none is given."""
    if os.path.exists(entry):
        return entry, 1.0
    path, colon, weight = entry.rpartition(":")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:  # a colon within a name
        return entry, 1.0
    if not 0 < value <= MOST_WEIGHT:
        raise DataError(f"{entry}: the weight must be greater than 0 and at most {MOST_WEIGHT}")
    return (path, value) if colon else (entry, 1.0)


def find_files(entry: str) -> Iterator[Path]:
    """The data files that an entry of --data_path means, by name; raises DataError, UsageError for one that was not fetched."""
    found = [entry] if os.path.exists(entry) else sorted(glob.glob(entry, recursive=True))
    if not found:
        raise DataError(
            f"no data at {entry or 'an empty name'}. Fetch the published data set with\n"
            f"    hf download jingyaogong/minimind-v_dataset --repo-type dataset --local-dir dataset\n"
            f"or   modelscope download --dataset gongjy/minimind-v_dataset --local_dir dataset\n"
            f"or name a jsonl or parquet file of your own (format: README, 'Train on your own pictures')."
        )
    pattern, any_file = not os.path.exists(entry), False
    for path in map(Path, found):
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if kind_of(file) in FILES and not file.is_dir())
            files = [file for file in files if not file.name.startswith(".")]
        else:
            files = [path] * (not pattern or kind_of(path) in (*FILES, ".json"))  # what a pattern meets may be anything
        for file in files:
            if (pattern or path.is_dir()) and is_packed(file) and file.with_suffix("").exists():
                continue  # unpacked beside it
            if file.exists() and not is_regular(file):
                raise DataError(f"{file} is a pipe or a device; data are read more than once: write them to a file")
            check_fetched(file)
            any_file = True
            yield file
    if not any_file:
        raise DataError(f"{entry} holds no .jsonl and no .parquet files (.json files are named, or met by a pattern: {entry.rstrip('/')}/*.json)")


def open_file(path: Path) -> SampleSource:
    """The samples of one file; raises DataError."""
    if kind_of(path) not in (*FILES, ".json") or (kind_of(path) == ".parquet" and is_packed(path)):
        raise DataError(f"{path} is no .jsonl and no .parquet file (nor .ndjson, .json, or such packed as {', '.join(UNPACK)})")
    try:
        return ParquetSamples(path) if path.suffix.lower() == ".parquet" else JsonlSamples(path)
    except OSError as error:
        remedy = "; raise the limit (ulimit -n) or join files" if error.errno == errno.EMFILE else ""
        raise DataError(f"cannot read {path}: {error}{remedy}") from error


def open_files(paths: Iterable[Path], opened: Callable[[Path], T] = open_file) -> list[T]:
    """What is `opened` of each file. Empty ones beside others, as Spark leaves them, are left out. Raises DataError."""
    sources, empty = [], []
    for path in paths:
        try:
            sources.append(opened(path))
        except NoSamples as error:
            empty.append(error)
    if empty and not sources:
        raise empty[0]
    if empty:
        print(f"notice: {len(empty)} of {len(empty) + len(sources)} files left out: {empty[0]}", file=sys.stderr)
    return sources
