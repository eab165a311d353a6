"""Samples from a parquet file."""

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from .conversation import IMAGE_MARK, Sample, parse_sample
from .errors import DataError, SampleError
from .index import open_index
from .jsonl import BYTES_PER_TOKEN, parse_json

WINDOW_BYTES = 128 * 2**20  # of row groups whose samples are shuffled together
LARGEST_GROUP = 2 * 2**30  # bytes of a row group, which has to be read as a whole


class KeptGroups:
    """Row groups that were read last, of all files of this process, within a number of bytes; but never fewer than 3."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.bytes = most_bytes, 0
        self._tables: OrderedDict[tuple, Any] = OrderedDict()

    def get(self, key: tuple, read: Callable[[], Any]) -> Any:
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
            self._state = self._file_state()
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
        sizes, marks, digest = array("q"), array("q"), hashlib.blake2b(str(self._state[0]).encode(), digest_size=16)
        with parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=1024, columns=[self.TEXT]):
                for text in cell_bytes(batch.column(0)):
                    digest.update(text)
                    sizes.append(len(text))
                    marks.append(text.count(IMAGE_MARK.encode()))
        records = np.empty(len(sizes), self.RECORD)
        records["size"], records["marks"] = sizes, marks
        return records, {"fingerprint": digest.hexdigest()}

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
        """From the file's size and all texts."""
        return self._fingerprint

    def __getitem__(self, index: int) -> Sample:
        where = self.where(index)
        group = int(np.searchsorted(self.blocks, index, side="right")) - 1
        table = KEPT.get((self.path, self._state, group), lambda: self._read_group(group, where))
        row = index - int(self.blocks[group])
        try:
            conversations = table.column(self.TEXT)[row].as_py()
        except UnicodeDecodeError as error:
            raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
        if isinstance(conversations, str):
            conversations = parse_json(conversations, where)
        pictures = table.column(self.PICTURES)[row].as_py() if self.PICTURES in self._columns else None
        blobs = picture_bytes(pictures, where) if shows_pictures(conversations) else ()
        return parse_sample({"conversations": conversations}, where, blobs)

    def _file_state(self) -> tuple[int, int]:
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def _read_group(self, number: int, where: str) -> Any:
        try:
            state = self._file_state()
        except OSError as error:
            raise SampleError(f"the file is gone: {error}", where) from error
        if state != self._state:
            raise SampleError("the file has changed since the start", where)
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


def picture_bytes(value: Any, where: str) -> tuple[bytes, ...]:
    """The pictures in a cell of parquet: bytes, a list of such, none; or structs with a field `bytes`, as the datasets
    library writes them."""
    cells = value if isinstance(value, list) else [] if value is None else [value]
    pictures = tuple(cell.get("bytes") if isinstance(cell, dict) else cell for cell in cells)
    if not all(isinstance(picture, bytes) for picture in pictures):
        raise SampleError("'image_bytes' holds something other than bytes", where)
    return tuple(picture for picture in pictures if picture)


def shows_pictures(conversations: Any) -> bool:
    """Whether a turn has an <image> mark."""
    turns = conversations if isinstance(conversations, list) else []
    return any(isinstance(turn, dict) and IMAGE_MARK in str(turn.get("content")) for turn in turns)


def cell_bytes(column: Any) -> Iterator[bytes]:
    """The cells of a text column as bytes, UTF-8 or not; structs as json, and nothing for what has no such form."""
    if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
        yield from (cell or b"" for cell in column.cast(arrow.large_binary()).to_pylist())
        return
    for cell in column:
        try:
            yield json.dumps(cell.as_py(), default=str).encode()
        except UnicodeDecodeError:
            yield b""
