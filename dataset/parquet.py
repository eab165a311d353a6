"""Samples from a parquet file."""

import hashlib
import json
import mmap
import os
import re
import sys
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from tqdm import tqdm

from model.conversation import IMAGE_PLACEHOLDER
from model.errors import DataError, NoSamples, SampleError

from .foreign import as_list, image_of, remedy, with_images
from .index import DataFile, file_state, keep, open_index
from .jsonl import BYTES_PER_TOKEN, parse_json
from .sources import WINDOW_BYTES
from .vlm_dataset import Sample, parse_sample

CONVERSATION_COLUMNS, IMAGE_COLUMNS = ("conversations", "messages"), ("image_bytes", "images", "image")  # columns; the first that is there counts
FURTHER = ("kind", "more")  # columns that training needs besides; `more` is convert's: json text of a line's further fields
TEXT_TYPE = r"(large_)?(string|binary)|list<[^:]*: struct<"  # how types of these columns begin
BYTES_TYPE = r"(list<[^:]*: )?((large_|fixed_size_)?binary|null|struct<.*\b(bytes|path): )"
NAMES_TYPE = rf"(list<[^:]*: )?(large_)?string|{BYTES_TYPE}"
BATCH_ROWS, BATCH_BYTES = 1024, 32 * 2**20  # to read at a time, at most
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
    `content`) and `image_bytes` (an image file's bytes, or a list of such); or as the datasets library writes it: `messages`,
    and `images` or `image` of structs with `bytes` or `path`. A path, or text in place of bytes, is a file's name.

    Published rows always hold an image; where no <image> mark shows it, it is a placeholder of a text-only sample and left out.

    A row group is read when one of its samples is wanted, and kept for a while; `blocks` lets the order of samples keep to
    that. Where row groups are too large for it (many writers make one of a whole file), a copy of the two columns is made
    once, as an Arrow file, and mapped: any row is then as quick to read as the next, and processes share its pages.
    Sizes of texts come from an index, for which the text column is read once. Raises DataError.
    """

    RECORD = np.dtype([("size", "<i4"), ("marks", "<i4")])

    def _open(self) -> None:
        try:
            with parquet.ParquetFile(arrow_file(self.path)) as file:
                self._metadata, schema = file.metadata, file.schema_arrow
            self._text, self._images = find_columns(self.path, schema)
            wanted = (self._text, self._images, *FURTHER)
            self._columns = [name for name in dict.fromkeys(schema.names) if name in wanted and schema.names.count(name) == 1]
            groups = [self._metadata.row_group(number) for number in range(self._metadata.num_row_groups)]
            largest = max((group_bytes(group, self._columns) for group in groups), default=0)
            if not self._metadata.num_rows:
                raise NoSamples(f"{self.path} holds no samples")
            self._copy = self._open_copy(schema, largest) if largest > LARGEST_GROUP else None
        except (ValueError, OSError, arrow.ArrowException) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{self.path} is no readable parquet file: {error}") from error
        self.block_bytes = largest if self._copy is None else 0
        rows = [group.num_rows for group in groups] if self._copy is None else [self._metadata.num_rows]
        self.blocks = np.concatenate([[0], np.cumsum(rows)])
        self._records, extra = open_index(self.path, self.RECORD, self._read_text)
        self._fingerprint = extra["fingerprint"]

    def _open_copy(self, schema: arrow.Schema, largest: int) -> arrow.Table:
        fields = arrow.schema([(name, plain(schema.field(name).type)) for name in self._columns], {"source": json.dumps([*self._state, self._metadata.num_rows])})
        table = keep(self.path, "rows", lambda place: map_table(place, fields), lambda place: self._write_copy(place, fields))
        if table is None:
            raise DataError(
                f"{self.path} has row groups of {largest / 1e9:.1f} GB, too large to hold, and neither its folder nor"
                f" ~/.cache has room for a copy; write it with smaller ones: pyarrow.parquet.write_table(..., row_group_size=1000)"
            )
        return table

    def _write_copy(self, place: Path, schema: arrow.Schema) -> None:
        print(f"notice: {self.path} has row groups too large to hold; its rows are copied to {place.with_suffix('')} once", file=sys.stderr)
        with arrow_file(place, "wb") as file, arrow.ipc.new_file(file, schema) as writer:
            for batch in read_batches(self.path, self._columns, f"copy of {self.path.name}"):
                columns = zip(batch.columns, schema.types, strict=True)  # what arrow casts list views to is too short
                parts = [arrow.array(column.to_pylist(), kind) if "list_view" in str(column.type) else column.cast(kind) for column, kind in columns]
                writer.write_batch(arrow.record_batch(parts, schema=schema))

    def _read_text(self) -> tuple[np.ndarray, dict]:
        sizes, marks, digest = array("q"), array("q"), hashlib.blake2b(str(self._state[0]).encode(), digest_size=16)
        for batch in read_batches(self.path, [self._text], f"index of {self.path.name}"):
            for text in cell_bytes(batch.column(0)):
                digest.update(text)
                sizes.append(len(text))
                marks.append(text.count(IMAGE_PLACEHOLDER.encode()))
        records = np.empty(len(sizes), self.RECORD)
        records["size"], records["marks"] = sizes, marks
        return records, {"fingerprint": digest.hexdigest()}

    def __len__(self) -> int:
        return int(self.blocks[-1])

    def where(self, index: int) -> str:
        """file:row, rows counted from 1."""
        return f"{self.path}:{index + 1}"

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """About four bytes of text a token, and the images."""
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
        fields, images = row_of(cells_of(table, row, where, [self._text]), self._text, self._images, where)
        return parse_sample(fields, where, images)

    def _read_group(self, number: int, where: str) -> Any:
        try:
            state = file_state(self.path)
        except OSError as error:
            raise SampleError(f"the file is gone: {error}", where) from error
        if state != self._state:
            raise SampleError("the file has changed since the start", where)
        try:
            with parquet.ParquetFile(arrow_file(self.path), metadata=self._metadata, pre_buffer=False) as file:
                return file.read_row_group(number, columns=self._columns, use_threads=False)
        except (OSError, ValueError, arrow.ArrowException) as error:
            raise SampleError(f"row group {number} cannot be read: {error}", where) from error


def arrow_file(path: Path, mode: str = "rb") -> arrow.NativeFile:
    """A file for Arrow, which takes its name for UTF-8 and in that of the locale."""
    return arrow.OSFile(os.fsencode(path), mode)


def map_table(place: Path, schema: arrow.Schema) -> arrow.Table | None:
    """The rows of an Arrow file, mapped into memory; None where there is none of this schema, its metadata included."""
    try:
        with open(place, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = arrow.ipc.open_file(arrow.py_buffer(mapped)).read_all()
        return table if table.schema.equals(schema, check_metadata=True) else None
    except (OSError, ValueError):  # torn ones among them
        return None


def read_batches(path: Path, columns: list[str] | None = None, doing: str = "") -> Iterator[arrow.RecordBatch]:
    """All rows, some at a time, with a progress bar on a terminal if it is called something; memory does not depend on the row
    groups. Raises DataError."""
    try:
        with (parquet.ParquetFile(arrow_file(path), pre_buffer=False, buffer_size=2**20) as file,
              tqdm(total=file.metadata.num_rows, unit="row", desc=doing, delay=3, disable=None if doing else True) as bar):  # fmt: skip
            rows, done = batch_rows(file.metadata, columns), 0
            while done < file.metadata.num_rows:
                at = 0
                try:
                    for batch in file.iter_batches(rows, columns=columns, use_threads=False):
                        begin, at = at, at + len(batch)
                        if at > done:
                            part, done = batch.slice(max(0, done - begin)), at
                            yield part
                            bar.update(len(part))
                except arrow.ArrowNotImplementedError:  # lists of more than 2 GB: large rows that stand together
                    if rows == 1:
                        raise
                    rows = max(1, rows // 16)
    except (ValueError, OSError, arrow.ArrowException) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path} cannot be read: {error}") from error


def batch_rows(metadata: parquet.FileMetaData, columns: list[str] | None = None) -> int:
    """Rows to read at a time, so that those of the average size fit in BATCH_BYTES."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    fitting = (BATCH_BYTES * group.num_rows // max(1, group_bytes(group, columns)) for group in groups if group.num_rows)
    return max(1, min((BATCH_ROWS, *fitting)))


def group_bytes(group: parquet.RowGroupMetaData, columns: list[str] | None = None) -> int:
    """Size of a row group's columns, or of some of them, in memory."""
    chunks = map(group.column, range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if columns is None or chunk.path_in_schema.split(".")[0] in columns)


def find_columns(path: Path, schema: arrow.Schema) -> tuple[str, str | None]:
    """The columns of conversations and of images, if there are any; raises DataError for others than are wanted."""
    found, names = [], schema.names
    for known, wanted in ((CONVERSATION_COLUMNS, "text, or lists of structs"), (IMAGE_COLUMNS, "bytes, structs of them, or lists of either")):
        there = [name for name in known if name in names]
        if names.count(known[0]) > 1 or (known is CONVERSATION_COLUMNS and not there):
            raise DataError(f"{path} has columns {', '.join(names)}; wanted are one {CONVERSATION_COLUMNS[0]!r} and at most one {IMAGE_COLUMNS[0]!r}"
                            + remedy(dict.fromkeys(names), str(path)))  # fmt: skip
        forms = {name: TEXT_TYPE if known is CONVERSATION_COLUMNS else BYTES_TYPE if name == IMAGE_COLUMNS[0] else NAMES_TYPE for name in there}
        fitting = [name for name in there if names.count(name) == 1 and re.match(forms[name], str(plain(schema.field(name).type)))]
        if not fitting and there and (known is CONVERSATION_COLUMNS or there[0] == known[0]):
            raise DataError(f"{path} has {schema.field(there[0]).type} in column {there[0]!r}; wanted are {wanted}")
        found.append(fitting[0] if fitting else None)
    return tuple(found)


def plain(kind: arrow.DataType) -> arrow.DataType:
    """The type of the same values without dictionaries and extensions, and with lists of one kind."""
    kind = getattr(kind, "storage_type", kind)
    if arrow.types.is_struct(kind):
        return arrow.struct([field.with_type(plain(field.type)) for field in kind])
    if arrow.types.is_dictionary(kind):
        return plain(kind.value_type)
    return arrow.list_(plain(kind.value_type)) if hasattr(kind, "value_type") else kind


def cells_of(rows: arrow.Table | arrow.RecordBatch, number: int, where: str, texts: Iterable[str]) -> dict[str, Any]:
    """One row by column, decoded where these columns hold json text; raises SampleError."""
    try:
        cells = {name: column[number].as_py() for name, column in zip(rows.schema.names, rows.columns, strict=True)}
        for name in cells.keys() & texts:
            text = cells[name].decode() if isinstance(cells[name], bytes) else cells[name]
            cells[name] = parse_json(text, where) if isinstance(text, str) else text
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
    return cells


def row_of(cells: dict[str, Any], text: str, images: str | None, where: str) -> tuple[dict, tuple[str | bytes, ...]]:
    """A row of parquet, as a line of jsonl would have it, and the images that it shows: bytes, or names. Raises SampleError."""
    conversations, held = cells.pop(text), as_list(cells.pop(images, None))
    row = cells | fields_of(cells.pop("more", None)) | {"conversations": conversations}
    if images == IMAGE_COLUMNS[0] and not shows_images(conversations):
        return row, ()  # the published data set has a placeholder in such rows
    return with_images(row, [image_of(cell, where) for cell in held])


def fields_of(more: Any) -> dict:
    """The fields in convert's column `more`; what others call so is a field itself."""
    try:
        fields = json.loads(more or "{}")
    except (TypeError, ValueError, RecursionError):
        fields = None
    return fields if isinstance(fields, dict) else {"more": more}


def shows_images(conversations: Any) -> bool:
    """Whether a turn has an <image> mark."""
    turns = conversations if isinstance(conversations, list) else []
    return any(isinstance(turn, dict) and IMAGE_PLACEHOLDER in str(turn.get("content")) for turn in turns)


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
