"""Samples from a parquet file."""

import hashlib
import json
import mmap
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from tqdm import tqdm

from .conversation import IMAGE_MARK, Sample, parse_sample
from .errors import DataError, SampleError
from .index import DataFile, file_state, keep, open_index
from .jsonl import BYTES_PER_TOKEN, parse_json

TEXT, PICTURES = "conversations", "image_bytes"  # columns
WINDOW_BYTES = 64 * 2**20  # of row groups whose samples are shuffled together; each loader process keeps twice as much
LARGEST_GROUP = 2 * WINDOW_BYTES  # of a file that is read by row groups


class KeptGroups:
    """Row groups that were read last, of all files of this process, within a number of bytes; but never fewer than 2."""

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
        while self.bytes > self.most_bytes and len(self._tables) > 2:
            self.bytes -= self._tables.popitem(last=False)[1].nbytes
        return table


KEPT = KeptGroups(2 * WINDOW_BYTES)


class ParquetSamples(DataFile):
    """A parquet file as the published data set comes: columns `conversations` (json text, or list of structs with `role` and
    `content`) and `image_bytes` (a picture file's bytes, or a list of such).

    Such rows always hold a picture; where no <image> mark shows it, it is a placeholder of a text-only sample and left out.

    A row group is read when one of its samples is wanted, and kept for a while; `blocks` lets the order of samples keep to
    that. Where row groups are too large for it (many writers make one of a whole file), a copy of the two columns is made
    once, as an Arrow file, and mapped: any row is then as quick to read as the next, and processes share its pages.
    Sizes of texts come from an index, for which the text column is read once. Raises DataError.
    """

    RECORD = np.dtype([("size", "<i4"), ("marks", "<i4")])

    def _open(self) -> None:
        try:
            with parquet.ParquetFile(self.path) as file:
                self._metadata, schema = file.metadata, file.schema_arrow
            self._columns = check_columns(self.path, schema)
            groups = [self._metadata.row_group(number) for number in range(self._metadata.num_row_groups)]
            largest = max(map(self._group_bytes, groups), default=0)
        except (ValueError, OSError) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{self.path} is no readable parquet file: {error}") from error
        if not self._metadata.num_rows:
            raise DataError(f"{self.path} holds no samples")
        self._copy = self._open_copy(schema, largest) if largest > LARGEST_GROUP else None
        self.block_bytes = largest if self._copy is None else 0
        rows = [group.num_rows for group in groups] if self._copy is None else [self._metadata.num_rows]
        self.blocks = np.concatenate([[0], np.cumsum(rows)])
        self._records, extra = open_index(self.path, self.RECORD, self._read_text)
        self._fingerprint = extra["fingerprint"]

    def _group_bytes(self, group: parquet.RowGroupMetaData) -> int:
        chunks = map(group.column, range(group.num_columns))
        return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in self._columns)

    def _open_copy(self, schema: arrow.Schema, largest: int) -> arrow.Table:
        plain = [(name, kind.value_type if arrow.types.is_dictionary(kind := schema.field(name).type) else kind) for name in self._columns]
        fields = arrow.schema(plain, {"source": json.dumps([*self._state, self._metadata.num_rows])})
        table = keep(self.path, "rows", lambda place: map_table(place, fields), lambda place: self._write_copy(place, fields))
        if table is None:
            raise DataError(
                f"{self.path} has row groups of {largest / 1e9:.1f} GB, too large to hold, and neither its folder nor"
                f" ~/.cache has room for a copy; write it with smaller ones: pyarrow.parquet.write_table(..., row_group_size=1000)"
            )
        return table

    def _write_copy(self, place: Path, schema: arrow.Schema) -> None:
        print(f"notice: {self.path} has row groups too large to hold; its rows are copied to {place.with_suffix('')} once", file=sys.stderr)
        with arrow.ipc.new_file(str(place), schema) as writer:
            for batch in self._batches(self._columns, f"copy of {self.path.name}"):
                writer.write_batch(batch.cast(schema))

    def _batches(self, columns: list[str], doing: str) -> Iterator[arrow.RecordBatch]:
        """All rows, 1,024 at a time, with a progress bar on a terminal; memory does not depend on the row groups."""
        try:
            with parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=2**20) as file:
                batches = file.iter_batches(batch_size=1024, columns=columns, use_threads=False)
                yield from tqdm(batches, total=-(-self._metadata.num_rows // 1024), desc=doing, delay=3, disable=None)
        except (ValueError, OSError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error

    def _read_text(self) -> tuple[np.ndarray, dict]:
        sizes, marks, digest = array("q"), array("q"), hashlib.blake2b(str(self._state[0]).encode(), digest_size=16)
        for batch in self._batches([TEXT], f"index of {self.path.name}"):
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
        table = self._copy if self._copy is not None else KEPT.get((self.path, self._state, group), lambda: self._read_group(group, where))
        row = index - int(self.blocks[group])
        try:
            conversations = table.column(TEXT)[row].as_py()
        except UnicodeDecodeError as error:
            raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
        if isinstance(conversations, str):
            conversations = parse_json(conversations, where)
        pictures = table.column(PICTURES)[row].as_py() if PICTURES in self._columns else None
        blobs = picture_bytes(pictures, where) if shows_pictures(conversations) else ()
        return parse_sample({"conversations": conversations}, where, blobs)

    def _read_group(self, number: int, where: str) -> Any:
        try:
            state = file_state(self.path)
        except OSError as error:
            raise SampleError(f"the file is gone: {error}", where) from error
        if state != self._state:
            raise SampleError("the file has changed since the start", where)
        try:
            with parquet.ParquetFile(self.path, metadata=self._metadata, pre_buffer=False) as file:
                return file.read_row_group(number, columns=self._columns, use_threads=False)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise SampleError(f"row group {number} cannot be read: {error}", where) from error


def map_table(place: Path, schema: arrow.Schema) -> arrow.Table | None:
    """The rows of an Arrow file, mapped into memory; None where there is none of this schema, its metadata included."""
    try:
        with open(place, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = arrow.ipc.open_file(arrow.py_buffer(mapped)).read_all()
        return table if table.schema.equals(schema, check_metadata=True) else None
    except (OSError, ValueError):  # torn ones among them
        return None


def check_columns(path: Path, schema: arrow.Schema) -> list[str]:
    """The columns to read, in the file's order; raises DataError for others than are wanted."""
    names = schema.names
    if names.count(TEXT) != 1 or names.count(PICTURES) > 1:
        raise DataError(f"{path} has columns {', '.join(names)}; wanted are one {TEXT!r} and at most one {PICTURES!r}")
    for name, wanted, fits in ((TEXT, "text, or lists of structs", is_conversation), (PICTURES, "bytes, or lists of bytes", is_pictures)):
        if name in names and not fits(kind := schema.field(name).type):
            raise DataError(f"{path} has {kind} in column {name!r}; wanted are {wanted}")
    return [name for name in names if name in (TEXT, PICTURES)]


def is_conversation(kind: arrow.DataType) -> bool:
    """Text, also by a dictionary or marked as json, or lists of structs."""
    kind = kind.value_type if arrow.types.is_dictionary(kind) else getattr(kind, "storage_type", kind)
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        return arrow.types.is_struct(kind.value_type)
    return any(fits(kind) for fits in (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view))


def is_pictures(kind: arrow.DataType) -> bool:
    """Bytes, structs with a field `bytes`, lists of either, or nothing but nulls."""
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        kind = kind.value_type
    if arrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return any(fits(kind) for fits in (arrow.types.is_binary, arrow.types.is_large_binary, arrow.types.is_binary_view, arrow.types.is_null))


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
