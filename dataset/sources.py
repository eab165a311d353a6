"""Where samples come from: jsonl and parquet files, one or many, mixed by weights.

A sample source is anything with `len()`, `[i] -> Sample` (raising SampleError) and the methods of SampleSource. Other
formats join here, in `open_file`.
"""

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from .conversation import Sample
from .errors import DataError
from .jsonl import JsonlSamples
from .order import EpochOrder, Order, share
from .parquet import WINDOW_BYTES, ParquetSamples

FILES = (".jsonl", ".parquet")  # taken from a folder; .json is jsonl, too, when it is named
MOST_WEIGHT = 1000


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

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch, weights considered."""
        return sum(share(len(source), weight) for source, weight in zip(self.sources, self.weights, strict=True))

    def order(self, seed: int, epoch: int) -> Order:
        """The epoch's order of samples, without its batches' likeness of lengths."""
        sizes = [source.block_bytes for source in self.sources]
        window = max(1, WINDOW_BYTES // max(1, *sizes))
        return EpochOrder([source.blocks for source in self.sources], [size > 0 for size in sizes], self.weights, seed, epoch, window)

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
        for path in find_files(entry):
            if path.resolve() in seen:
                raise DataError(f"--data_path names {path} twice; a weight takes samples more often ({path}:2)")
            seen.add(path.resolve())
            sources.append(open_file(path))
            weights.append(weight)
    return Mixture(sources, weights)


def split_entries(paths: str) -> list[tuple[str, float]]:
    """What --data_path names, with weights; a path that exists as it stands is not split."""
    if paths and Path(paths).exists():
        return [(paths, 1.0)]
    return [split_weight(entry.strip()) for entry in paths.split(",")]


def split_weight(entry: str) -> tuple[str, float]:
    """"a.jsonl:0.3" as its parts; the weight is 1 where none is given."""
    if entry and Path(entry).exists():
        return entry, 1.0
    path, colon, weight = entry.rpartition(":")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:  # a colon within a name
        return entry, 1.0
    if not 0 < value <= MOST_WEIGHT:
        raise DataError(f"--data_path {entry}: the weight must be greater than 0 and at most {MOST_WEIGHT}")
    return (path, value) if colon else (entry, 1.0)


def find_files(entry: str) -> Iterator[Path]:
    """The data files that an entry of --data_path means, by name."""
    path = Path(entry)
    found = [path] if entry and path.exists() else [Path(name) for name in sorted(glob.glob(entry, recursive=True))]
    if not found or not entry:
        raise DataError(
            f"no training data at {entry or 'an empty name'}. Fetch the published data set with\n"
            f"    hf download jingyaogong/minimind-v_dataset --repo-type dataset --local-dir dataset\n"
            f"or   modelscope download --dataset gongjy/minimind-v_dataset --local_dir dataset\n"
            f"or name your own jsonl or parquet file with --data_path (format: README, 'Your own pictures')."
        )
    for path in found:
        inside = sorted(p for p in path.iterdir() if p.suffix in FILES and p.is_file()) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"{path} holds no .jsonl and no .parquet files")
        yield from inside


def open_file(path: Path) -> SampleSource:
    """The samples of one file; raises DataError."""
    if path.suffix not in (*FILES, ".json"):
        raise DataError(f"{path} is no .jsonl and no .parquet file")
    try:
        if path.suffix == ".json":
            with open(path, "rb") as file:
                if file.read(64).lstrip().startswith(b"["):
                    raise DataError(f"{path} is one json array; one object a line is wanted: jq -c '.[]' {path} > data.jsonl")
        return ParquetSamples(path) if path.suffix == ".parquet" else JsonlSamples(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
