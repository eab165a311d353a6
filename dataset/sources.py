"""Where samples come from: jsonl and parquet files, one or many, mixed by weights; and their order in an epoch."""

import glob
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

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


class Mixture:
    """Several files as one: their samples numbered through, and an order that takes from each by its weight.

    With a weight other than 1 a file continues where it stopped the epoch before: none comes twice before all have.
    """

    def __init__(self, sources: list[JsonlSamples], weights: list[float]):
        self.sources, self.weights = sources, weights
        self.bounds = np.cumsum([0, *map(len, sources)])
        self.held_out = np.empty(0, dtype=np.int64)  # numbers of samples that no epoch takes, ascending

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Sample:
        source, own = self._place(index)
        return source[own]

    def _place(self, index: int) -> tuple[JsonlSamples, int]:
        number = int(np.searchsorted(self.bounds, index, side="right")) - 1
        return self.sources[number], int(index - self.bounds[number])

    def where(self, index: int) -> str:
        """file:line of a sample."""
        source, own = self._place(index)
        return source.where(own)

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """Tokens of samples, estimated without reading them."""
        numbers, lengths = np.searchsorted(self.bounds, indices, side="right") - 1, np.empty_like(indices)
        for number in np.unique(numbers):
            own = numbers == number
            lengths[own] = self.sources[number].lengths(indices[own] - self.bounds[number], image_tokens)
        return lengths

    def fingerprint(self) -> str:
        """Another one whenever the samples are others."""
        hashes = "".join(source.fingerprint() for source in self.sources)
        return hashlib.blake2b(hashes.encode(), digest_size=16).hexdigest()

    def hold_out(self, part: float, seed: int) -> np.ndarray:
        """Takes this fraction of every file's samples, in (0, 1), out of all epochs; their numbers, ascending.

        One choice for a seed; at least one sample of each file stays.
        """
        chosen = []
        for number, source in enumerate(self.sources):
            count = min(round(len(source) * part), len(source) - 1)
            chosen.append(self.bounds[number] + Permutation(len(source), (seed, number, 0, HOLD_OUT))(np.arange(count)))
        self.held_out = np.sort(np.concatenate(chosen))
        return self.held_out

    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples of each file that are not held out, and how many of them an epoch takes; at least one."""
        sizes = np.diff(self.bounds - np.searchsorted(self.held_out, self.bounds))
        return sizes, np.maximum(1, np.round(sizes * self.weights)).astype(int)

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch, weights considered."""
        return int(self._sizes()[1].sum())

    def order(self, seed: int, epoch: int) -> Order:
        """The epoch's order of samples, before the sampler puts those of similar lengths together."""
        sizes, counts = self._sizes()
        begins, ends = np.cumsum([0, *sizes]), np.cumsum([0, *counts])
        shuffled = Permutation(int(ends[-1]), (seed, epoch))
        skipped = self.held_out - np.arange(len(self.held_out))  # others before each held-out sample

        def order(places: np.ndarray) -> np.ndarray:
            mixed = shuffled(places)
            source = np.searchsorted(ends, mixed, side="right") - 1
            numbers = begins[source] + mixed - ends[source]
            for number in np.unique(source[np.take(self.weights, source) != 1]):
                own = source == number
                # Places along endless passes through the file, each in an order of its own.
                passes, within = np.divmod(mixed[own] - ends[number] + epoch * counts[number], sizes[number])
                for key in np.unique(passes):
                    permuted = Permutation(int(sizes[number]), (seed, int(number), int(key)))
                    within[passes == key] = permuted(within[passes == key])
                numbers[own] = begins[number] + within
            return numbers + np.searchsorted(skipped, numbers, side="right")

        return order


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


def open_samples(paths: str | Path) -> Mixture:
    """The samples in files, in folders of them and where patterns lead, with commas between, each with a weight when
    wanted: "a.jsonl, shards/*.parquet:0.3, more/". Raises DataError when there is no such file or none of these kinds."""
    sources, weights, seen = [], [], set()
    for entry, weight in split_entries(str(paths)):
        files = {os.path.realpath(path): path for path in find_files(entry)}  # links in a circle lead there many times
        if twice := next((files[real] for real in files if real in seen), None):
            raise DataError(f"{twice} is named twice; a weight takes samples more often ({twice}:2)")
        seen.update(files)
        sources += (opened := open_files(files.values()))
        weights += [weight] * len(opened)
    return Mixture(sources, weights)


def split_entries(paths: str) -> list[tuple[str, float]]:
    """What --data_path names, with weights. A comma within the name of a file belongs to it."""
    return [split_weight(entry) for entry in split_names(paths, lambda entry: bool(matches(split_weight(entry)[0])))]


def matches(entry: str) -> list[str]:
    """The file or folder of that name; without one, what such a pattern leads to."""
    return [entry] if os.path.exists(entry) else sorted(glob.glob(entry, recursive=True))


def split_weight(entry: str) -> tuple[str, float]:
    """"a.jsonl:0.3" as its parts; the weight is 1 where none is given."""
    path, colon, weight = entry.rpartition(":")
    try:
        value = float(weight)
    except ValueError:  # a colon within a name, or none
        return entry, 1.0
    if not colon or os.path.exists(entry):
        return entry, 1.0
    if not 0 < value <= MOST_WEIGHT:
        raise DataError(f"{entry}: the weight must be greater than 0 and at most {MOST_WEIGHT}")
    return path, value


def find_files(entry: str) -> list[Path]:
    """The data files that an entry of --data_path means; raises DataError, UsageError for one that was not fetched.

    Hidden files, and packed ones beside the unpacked, are no data unless they are named.
    """
    if entry.startswith("hf://"):
        from model.hub_names import fetch_data  # not needed without

        entry = fetch_data(entry)
    found = matches(entry)
    if not found:
        folder = Path(entry).parent
        there = ", ".join([file.name for file in sorted(folder.glob("[!.]*")) if kind_of(file) in FILES][:12])
        raise DataError(
            f"no data at {entry or 'an empty name'}." + (f" In {folder} are {there}." if there else "") + " Fetch the published data set with\n"
            "    hf download jingyaogong/minimind-v_dataset --repo-type dataset --local-dir dataset\n"
            "or   modelscope download --dataset gongjy/minimind-v_dataset --local_dir dataset\n"
            "or name a jsonl or parquet file of your own (format: README, 'Train on your own images')."
        )
    if found == [entry] and not os.path.isdir(entry):
        files = [Path(entry)]
    else:
        files = []
        for path in map(Path, found):
            inside, kinds = (sorted(path.glob("[!.]*")), FILES) if path.is_dir() else ([path], (*FILES, ".json"))
            files += [file for file in inside if kind_of(file) in kinds and not file.is_dir()]
        files = [file for file in files if not (is_packed(file) and file.with_suffix("").exists())]
    if not files:
        raise DataError(f"{entry} holds no .jsonl and no .parquet files"
                        f" (.json files are named, or met by a pattern: {entry.rstrip('/')}/*.json)")  # fmt: skip
    for file in files:
        if file.exists() and not is_regular(file):
            raise DataError(f"{file} is a pipe or a device; data are read more than once: write them to a file")
        check_fetched(file)
    return files


def open_file(path: Path) -> JsonlSamples:
    """The samples of one file; raises DataError."""
    kind = kind_of(path)
    if kind not in (*FILES, ".json") or (kind == ".parquet" and is_packed(path)):
        raise DataError(f"{path} is no .jsonl and no .parquet file (nor .ndjson, .json, packed or not: {', '.join(PACKED)})")
    try:
        if kind != ".parquet":
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
