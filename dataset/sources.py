"""Where samples come from: jsonl and parquet files, one or many, mixed by weights; and their order in an epoch.

A sample source is anything with `len()`, `[i] -> Sample` (raising SampleError) and the methods of SampleSource. Other
formats join here, in `open_file`.
"""

import glob
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from model.errors import DataError, NoSamples, check_fetched
from model.storage import is_regular

from .images import split_names
from .jsonl import PACKED, JsonlSamples, Sample, is_packed, kind_of

FILES = (".jsonl", ".ndjson", ".parquet")  # taken from a folder; .json, too, when it is named
MOST_WEIGHT = 1000
T = TypeVar("T")
HOLD_OUT = 1  # in a key of random numbers: the choice of held-out samples is no order of an epoch
ROUNDS = 6  # of a Permutation
Order = Callable[[np.ndarray], np.ndarray]  # places in an epoch, int64 [k], to samples' numbers, int64 [k]


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


class Mixture:
    """Several sources as one: their samples numbered through, and an order that takes from each by its weight.

    With a weight other than 1 a source continues where it stopped the epoch before: no sample is repeated until all have come.
    """

    def __init__(self, sources: list[SampleSource], weights: list[float]):
        self.sources, self.weights = sources, weights
        self.bounds = running_sum([len(source) for source in sources])
        self.held_out = np.empty(0, dtype=np.int64)  # numbers of samples that no epoch takes, ascending

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def _sizes(self) -> list[int]:
        """Samples of each source that are not held out."""
        held_out = np.diff(np.searchsorted(self.held_out, self.bounds))
        return [len(source) - int(count) for source, count in zip(self.sources, held_out, strict=True)]

    def _counts(self) -> list[int]:
        """Samples that each source gives to an epoch; at least one."""
        return [max(1, round(size * weight)) for size, weight in zip(self._sizes(), self.weights, strict=True)]

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch, weights considered."""
        return sum(self._counts())

    def hold_out(self, part: float, seed: int) -> np.ndarray:
        """Takes this fraction of every source's samples, in (0, 1), out of all epochs, and returns their numbers, ascending.

        One choice for a seed; at least one sample of each source stays.
        """
        chosen = []
        for number, source in enumerate(self.sources):
            count = min(round(len(source) * part), len(source) - 1)
            chosen.append(self.bounds[number] + Permutation(len(source), (seed, number, 0, HOLD_OUT))(np.arange(count)))
        self.held_out = np.sort(np.concatenate(chosen))
        return self.held_out

    def order(self, seed: int, epoch: int) -> Order:
        """The epoch's order of samples, before the sampler puts those of similar lengths together."""
        sizes, counts = self._sizes(), self._counts()
        begins, ends = running_sum(sizes), running_sum(counts)
        shuffled = Permutation(sum(counts), (seed, epoch))
        skipped = self.held_out - np.arange(len(self.held_out))  # of each held-out sample: how many others come before it

        def within(source: int, places: np.ndarray) -> np.ndarray:
            """The samples of a source at places among those it gives to the epoch."""
            if self.weights[source] == 1:
                return places
            running, numbers = places + epoch * counts[source], np.empty_like(places)
            for number in np.unique(running // sizes[source]):  # of passes through the source
                own = running // sizes[source] == number
                permuted = Permutation(sizes[source], (seed, source, int(number)))
                numbers[own] = permuted(running[own] % sizes[source])
            return numbers

        def order(places: np.ndarray) -> np.ndarray:
            mixed = shuffled(places)
            source, numbers = np.searchsorted(ends, mixed, side="right") - 1, np.empty_like(mixed)
            for number in np.unique(source):
                own = source == number
                numbers[own] = begins[number] + within(int(number), mixed[own] - ends[number])
            return numbers + np.searchsorted(skipped, numbers, side="right")

        return order

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


def find_files(entry: str) -> list[Path]:
    """The data files that an entry of --data_path means, by name; raises DataError, UsageError for one that was not fetched."""
    found = [entry] if os.path.exists(entry) else sorted(glob.glob(entry, recursive=True))
    if not found:
        raise DataError(
            f"no data at {entry or 'an empty name'}. Fetch the published data set with\n"
            f"    hf download jingyaogong/minimind-v_dataset --repo-type dataset --local-dir dataset\n"
            f"or   modelscope download --dataset gongjy/minimind-v_dataset --local_dir dataset\n"
            f"or name a jsonl or parquet file of your own (format: README, 'Train on your own images')."
        )
    files = [Path(entry)] if found == [entry] and not os.path.isdir(entry) else []
    if not files:
        for path in map(Path, found):
            if path.is_dir():
                files += sorted(file for file in path.iterdir() if kind_of(file) in FILES)
            elif kind_of(path) in (*FILES, ".json"):
                files.append(path)
        files = [file for file in files if not file.name.startswith(".") and not file.is_dir()]
        files = [file for file in files if not (is_packed(file) and file.with_suffix("").exists())]
    if not files:
        raise DataError(f"{entry} holds no .jsonl and no .parquet files (.json files are named, or met by a pattern: {entry.rstrip('/')}/*.json)")
    for file in files:
        if file.exists() and not is_regular(file):
            raise DataError(f"{file} is a pipe or a device; data are read more than once: write them to a file")
        check_fetched(file)
    return files


def open_file(path: Path) -> SampleSource:
    """The samples of one file; raises DataError."""
    if kind_of(path) not in (*FILES, ".json") or (kind_of(path) == ".parquet" and is_packed(path)):
        raise DataError(f"{path} is no .jsonl and no .parquet file (nor .ndjson, .json, or such packed as {', '.join(PACKED)})")
    try:
        if path.suffix.lower() != ".parquet":
            return JsonlSamples(path)
        from .parquet import ParquetSamples  # pyarrow takes a while to import

        return ParquetSamples(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


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


class Permutation:
    """A bijection of [0, size) chosen by `key`, a tuple of integers; time and memory do not depend on `size`.

    A Feistel network (Luby and Rackoff, SIAM J. Comput. 17, 1988) over the smallest even number of bits that holds
    `size`; what falls outside goes through again until it falls inside (cycle walking; Black and Rogaway, CT-RSA 2002),
    which takes less than four rounds on average, but for the smallest sizes.
    """

    def __init__(self, size: int, key: tuple[int, ...]):
        self.size = size
        self.half = np.uint64(max(3, math.ceil((size - 1).bit_length() / 2)))
        self.mask = np.uint64(2 ** int(self.half) - 1)
        self.keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        numbers = self._mix(np.asarray(places).astype(np.uint64))
        while (outside := np.flatnonzero(numbers >= self.size)).size:
            numbers[outside] = self._mix(numbers[outside])
        return numbers.astype(np.int64)

    def _mix(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self.half, numbers & self.mask
        for key in self.keys:
            left, right = right, left ^ (scramble(right ^ key) & self.mask)
        return left << self.half | right


def scramble(bits: np.ndarray) -> np.ndarray:
    """A hash of uint64: the last steps of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


def running_sum(counts: list[int]) -> np.ndarray:
    """Where each of several parts begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)])
