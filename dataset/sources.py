"""Where samples come from: jsonl and parquet files, one or many, mixed by weights.

A sample source is anything with `len()`, `[i] -> Sample` (raising SampleError) and the methods of SampleSource. Other
formats join here, in `open_file`.
"""

import glob
import hashlib
import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from .conversation import IMAGE_MARK, Sample, parse_sample
from .errors import DataError, SampleError
from .index import open_index
from .order import EpochOrder, Order, share

BYTES_PER_TOKEN = 4  # of English in a vocabulary of 6,400; only lengths relative to each other matter
WINDOW_BYTES = 128 * 2**20  # of parquet row groups whose samples are shuffled together
LARGEST_GROUP = 2 * 2**30  # bytes of a parquet row group, which has to be read as a whole
FILES = (".jsonl", ".json", ".parquet")


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


class JsonlSamples:
    """A jsonl file, read by byte offset through an index (dataset/index.py): no row of it stays in memory.

    Empty lines are no samples. Reads do not move a file position, so forked processes may share the open file; one that
    gets the object by pickle opens its own.
    """

    RECORD = np.dtype([("offset", "<i8"), ("size", "<i4"), ("marks", "<i4")])

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        self._records, extra = open_index(self.path, self.RECORD, self._read_lines)
        self._blanks, self._fingerprint = np.array(extra["blanks"], dtype=np.int64), extra["fingerprint"]
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (open for the life of the process)

    def _read_lines(self) -> tuple[np.ndarray, dict]:
        """Offset, size and <image> marks of each line; before which samples the empty lines stand; a hash of it all."""
        offsets, sizes, marks, blanks, at = array("q"), array("i"), array("i"), [], 0
        digest, mark = hashlib.blake2b(digest_size=16), IMAGE_MARK.encode()
        with open(self.path, "rb") as file:
            for line in file:
                digest.update(line)
                if line.isspace():
                    blanks.append(len(offsets))
                else:
                    offsets.append(at)
                    sizes.append(len(line))
                    marks.append(line.count(mark))
                at += len(line)
        if not offsets:
            raise DataError(f"{self.path} holds no samples: every line is empty")
        records = np.empty(len(offsets), self.RECORD)
        records["offset"], records["size"], records["marks"] = offsets, sizes, marks
        return records, {"blanks": blanks, "fingerprint": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """file:line, lines counted from 1."""
        return f"{self.path}:{index + 1 + int(np.searchsorted(self._blanks, index, side='right'))}"

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """About four bytes of a line a token, and the pictures."""
        records = self._records[indices]
        return records["size"] // BYTES_PER_TOKEN + records["marks"] * image_tokens

    def fingerprint(self) -> str:
        """A hash of the file's bytes."""
        return self._fingerprint

    @property
    def blocks(self) -> np.ndarray:
        return np.array([0, len(self)])

    block_bytes = 0

    def __getitem__(self, index: int) -> Sample:
        return parse_sample(self.row(index), self.where(index))

    def row(self, index: int) -> Any:
        """The decoded line; raises SampleError."""
        record, where = self._records[index], self.where(index)
        line = os.pread(self._file.fileno(), int(record["size"]), int(record["offset"]))
        try:
            text = line.decode("utf-8-sig" if index == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
        return parse_json(text, where)

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.path = state["path"]
        self._open()


class KeptGroups:
    """Row groups that were read last, of all files of this process, within a number of bytes; but never fewer than 3."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.bytes = most_bytes, 0
        self._tables: OrderedDict[tuple[Path, int], Any] = OrderedDict()

    def get(self, key: tuple[Path, int], read: Callable[[], Any]) -> Any:
        """The table of a row group, by `read` when it is not kept."""
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = self._tables[key] = read()
        self.bytes += table.nbytes
        while self.bytes > self.most_bytes and len(self._tables) > 3:
            self.bytes -= self._tables.popitem(last=False)[1].nbytes
        return table


KEPT = KeptGroups(2 * WINDOW_BYTES)


class ParquetSamples:
    """A parquet file as the published data set comes: columns `conversations` (json text, or list of structs with `role` and
    `content`) and `image_bytes` (a picture file's bytes, or a list of such).

    Such rows always hold a picture; where no <image> mark shows it, it is a placeholder of a text-only sample and left out.

    A row group is read when one of its samples is wanted, and kept for a while; `blocks` lets the order of samples keep to
    that. Sizes of texts come from an index, for which the text column is read once. No file stays open.
    """

    RECORD = np.dtype([("size", "<i4"), ("marks", "<i4")])
    TEXT, PICTURES = "conversations", "image_bytes"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        try:
            with parquet.ParquetFile(self.path) as file:
                self._metadata, names = file.metadata, file.schema_arrow.names
        except (arrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path} is no readable parquet file: {error}") from error
        if self.TEXT not in names:
            raise DataError(f"{self.path} has columns {', '.join(names)}, none of them {self.TEXT!r}")
        self._columns = [name for name in (self.TEXT, self.PICTURES) if name in names]
        groups = [self._metadata.row_group(number) for number in range(self._metadata.num_row_groups)]
        if not self._metadata.num_rows:
            raise DataError(f"{self.path} holds no samples")
        self.block_bytes = max(group.total_byte_size for group in groups)
        if self.block_bytes > LARGEST_GROUP:
            raise DataError(
                f"{self.path} has row groups of up to {self.block_bytes / 1e9:.1f} GB, which each loader process would have"
                f" to hold; write it again with smaller ones: pyarrow.parquet.write_table(..., row_group_size=1000)"
            )
        self.blocks = np.concatenate([[0], np.cumsum([group.num_rows for group in groups])])
        self._records, extra = open_index(self.path, self.RECORD, self._read_text)
        self._fingerprint = extra["fingerprint"]

    def _read_text(self) -> tuple[np.ndarray, dict]:
        sizes, marks = array("i"), array("i")
        with parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=[self.TEXT]):
                for value in batch.column(0).to_pylist():
                    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
                    sizes.append(len(text.encode(errors="surrogatepass")))
                    marks.append(text.count(IMAGE_MARK))
        records = np.empty(len(sizes), self.RECORD)
        records["size"], records["marks"] = sizes, marks
        stat = self.path.stat()
        state = f"{stat.st_size} {stat.st_mtime_ns} {self.blocks.tolist()}"
        return records, {"fingerprint": hashlib.blake2b(state.encode() + records.tobytes(), digest_size=16).hexdigest()}

    def __len__(self) -> int:
        return int(self.blocks[-1])

    def where(self, index: int) -> str:
        """file:row, rows counted from 1."""
        return f"{self.path}:{index + 1}"

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """About four bytes of text a token, and the pictures."""
        records = self._records[indices]
        return records["size"] // BYTES_PER_TOKEN + records["marks"] * image_tokens

    def fingerprint(self) -> str:
        """From the file's state and the sizes of all rows."""
        return self._fingerprint

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        group = int(np.searchsorted(self.blocks, index, side="right")) - 1
        table = KEPT.get((self.path, group), lambda: self._read_group(group, where))
        row = index - int(self.blocks[group])
        conversations = table.column(self.TEXT)[row].as_py()
        if isinstance(conversations, str):
            conversations = parse_json(conversations, where)
        pictures = table.column(self.PICTURES)[row].as_py() if self.PICTURES in self._columns else None
        blobs = picture_bytes(pictures, where) if self._records[index]["marks"] else ()
        return parse_sample({"conversations": conversations}, where, blobs)

    def _read_group(self, number: int, where: str) -> Any:
        try:
            with parquet.ParquetFile(self.path, metadata=self._metadata) as file:
                return file.read_row_group(number, columns=self._columns, use_threads=False)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise SampleError(f"row group {number} cannot be read: {error}", where) from error

    def __getstate__(self) -> dict:
        return {"path": self.path}

    def __setstate__(self, state: dict) -> None:
        self.path = state["path"]
        self._open()


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
        window = max(1, WINDOW_BYTES // max(1, *(source.block_bytes for source in self.sources)))
        return EpochOrder([source.blocks for source in self.sources], self.weights, seed, epoch, window)

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


def parse_json(text: str, where: str) -> Any:
    """Decoded json; raises SampleError, also for an object that names a key twice, which could mean either."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are plain ValueErrors
        raise SampleError(f"not json ({error}): {text.encode(errors='replace')[:60]!r}", where) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


def picture_bytes(value: Any, where: str) -> tuple[bytes, ...]:
    """The pictures in a cell of parquet: bytes, a list of such, none; or structs with a field `bytes`, as the datasets
    library writes them."""
    cells = value if isinstance(value, list) else [] if value is None else [value]
    pictures = tuple(cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells)
    if not all(isinstance(picture, bytes) for picture in pictures):
        raise SampleError("'image_bytes' holds something other than bytes", where)
    return tuple(picture for picture in pictures if picture)


def open_samples(paths: str | Path) -> Mixture:
    """The samples in files, in folders of them and where patterns lead, with commas between, each with a weight when wanted:
    "a.jsonl, shards/*.parquet:0.3, more/". Raises DataError when there is no such file or it is of another kind."""
    sources, weights = [], []
    for text in str(paths).split(","):
        entry, weight = split_weight(text.strip())
        for path in find_files(entry):
            sources.append(open_file(path))
            weights.append(weight)
    return Mixture(sources, weights)


def split_weight(entry: str) -> tuple[str, float]:
    """"a.jsonl:0.3" as its parts; the weight is 1 where none is given."""
    path, colon, weight = entry.rpartition(":")
    try:
        value = float(weight) if colon else 1.0
    except ValueError:  # a colon within a name
        return entry, 1.0
    if not 0 < value < float("inf"):
        raise DataError(f"--data_path {entry}: the weight must be greater than 0")
    return (path, value) if colon else (entry, 1.0)


def find_files(entry: str) -> Iterator[Path]:
    """The data files that an entry of --data_path means, by name."""
    path = Path(entry)
    found = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(entry, recursive=True))]
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
    if path.suffix not in FILES:
        raise DataError(f"{path} is no .jsonl and no .parquet file")
    try:
        return ParquetSamples(path) if path.suffix == ".parquet" else JsonlSamples(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
