"""Samples from a parquet file, by way of a copy of its rows that is mapped into memory.

Parquet is read in row groups, which writers make of a hundred rows or of a whole file. The copy, an Arrow file `.NAME.rows` next to
the original, is made once; in it any row is as quick to read as the next, and all processes share its pages.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from tqdm import tqdm

from model.conversation import IMAGE_PLACEHOLDER
from model.errors import DataError, NoSamples, SampleError

from .foreign import as_list, image_of, remedy, with_images
from .jsonl import BYTES_PER_TOKEN, Sample, parse_json, parse_sample
from .lines import copied

CONVERSATION_COLUMNS, IMAGE_COLUMNS = ("conversations", "messages"), ("image_bytes", "images", "image")  # the first that is there counts
FURTHER = ("kind", "more")  # columns that training needs besides; `more` is convert's: json text of a line's further fields
BATCH_ROWS = 256  # to read at a time: Arrow holds no list of more than 2 GB
ROWS = arrow.schema([  # of the copy
    ("row", arrow.large_binary()),  # json text, as a line of jsonl has it
    ("images", arrow.list_(arrow.large_binary())), ("names", arrow.list_(arrow.large_string())),  # one or the other of each image
    ("problem", arrow.large_string()),  # of a row that cannot be read
    ("size", arrow.int32()), ("placeholders", arrow.int32()), ("crc", arrow.uint32()),
])  # fmt: skip


class ParquetSamples:
    """A parquet file as the published data set comes: columns `conversations` (json text, or list of structs with `role` and
    `content`) and `image_bytes` (an image file's bytes, or a list of such); or as the datasets library writes it: `messages`,
    and `images` or `image` of structs with `bytes` or `path`. A path, or text in place of bytes, is a file's name.

    Published rows always hold an image; where no <image> placeholder shows it, the sample is text-only and the image left out.
    Raises DataError.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        names = read_schema(self.path)[0].names
        self._text, self._images = find_columns(self.path, names)
        self._columns = [name for name in (self._text, self._images, *FURTHER) if name in names]
        copy = copied(self.path, "rows", self._write_copy)
        with open(copy, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = arrow.ipc.open_file(arrow.py_buffer(mapped))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._bounds = np.cumsum([0, *map(len, self._batches)])
        self._sizes, self._placeholders, self._crcs = (
            np.concatenate([batch.column(name).to_numpy() for batch in self._batches]) for name in ("size", "placeholders", "crc")
        )

    def __reduce__(self):
        return ParquetSamples, (self.path,)  # another process maps the copy itself

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, index: int) -> Sample:
        number, where = int(np.searchsorted(self._bounds, index, side="right")) - 1, self.where(index)
        place = int(index - self._bounds[number])  # in its batch: a table of all batches takes a hundred times as long
        row = {name: self._batches[number].column(name)[place].as_py() for name in ROWS.names[:4]}
        if row["problem"] is not None:
            raise SampleError(row["problem"], where)
        images = tuple(name if blob is None else blob for blob, name in zip(row["images"], row["names"], strict=True))
        return parse_sample(json.loads(row["row"].decode(errors="surrogatepass")), where, images)

    def where(self, index: int) -> str:
        """file:row, rows counted from 1."""
        return f"{self.path}:{index + 1}"

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """About one token for four bytes of text, and the images."""
        return self._sizes[indices] // BYTES_PER_TOKEN + self._placeholders[indices].astype(np.int64) * image_tokens

    def fingerprint(self) -> str:
        """A hash of all texts."""
        return hashlib.blake2b(self._crcs, digest_size=16).hexdigest()

    def _write_copy(self, file: BinaryIO) -> None:
        with arrow.ipc.new_file(file, ROWS) as writer:
            for batch, first in read_batches(self.path, self._columns, f"copy of {self.path.name}"):
                rows = [copied_row(batch, number, self._text, self._images, self.where(first + number)) for number in range(len(batch))]
                writer.write_batch(arrow.RecordBatch.from_pylist(rows, ROWS))


def copied_row(batch: arrow.RecordBatch, number: int, text: str, images: str | None, where: str) -> dict[str, Any]:
    """A row of the copy."""
    try:
        fields, refs = row_of(cells_of(batch, number, where, [text]), text, images, where)
        content, problem = json.dumps(fields, default=str, ensure_ascii=False).encode(errors="surrogatepass"), None
    except SampleError as error:
        content, refs, problem = b"", (), error.problem
    return {
        "row": content, "problem": problem, "size": len(content), "crc": zlib.crc32(content),
        "images": [None if isinstance(ref, str) else ref for ref in refs], "names": [ref if isinstance(ref, str) else None for ref in refs],
        "placeholders": content.count(IMAGE_PLACEHOLDER.encode()),
    }  # fmt: skip


def open_parquet(path: Path) -> parquet.ParquetFile:
    """The file; Arrow would take its name for UTF-8, and in messages for that of the locale."""
    return parquet.ParquetFile(arrow.OSFile(os.fsencode(path)), pre_buffer=False, buffer_size=2**20)


def read_schema(path: Path) -> tuple[arrow.Schema, int]:
    """The columns of a file and the number of its rows; raises DataError for one that is no parquet or holds no rows."""
    try:
        with open_parquet(path) as file:
            count, schema = file.metadata.num_rows, file.schema_arrow
    except (OSError, ValueError, arrow.ArrowException) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path} is no readable parquet file: {error}") from error
    if not count:
        raise NoSamples(f"{path} holds no samples")
    return schema, count


def find_columns(path: Path, names: list[str]) -> tuple[str, str | None]:
    """The columns of conversations and of images, if there are any; raises DataError for others than are wanted."""
    text, images = (next((name for name in known if name in names), None) for known in (CONVERSATION_COLUMNS, IMAGE_COLUMNS))
    if text is None or names.count(text) > 1 or names.count(images) > 1:
        raise DataError(f"{path} has columns {', '.join(names)}; wanted are one 'conversations' and at most one 'image_bytes'"
                        + remedy(dict.fromkeys(names), str(path)))  # fmt: skip
    return text, images


def read_batches(path: Path, columns: list[str], doing: str = "") -> Iterator[tuple[arrow.RecordBatch, int]]:
    """All rows, some at a time, with the number of the first; with a progress bar on a terminal if it is called something. Memory
    does not depend on the row groups. Raises DataError."""
    first = 0
    try:
        with (open_parquet(path) as file,
              tqdm(total=file.metadata.num_rows, unit="row", desc=doing, delay=3, disable=None if doing else True) as bar):  # fmt: skip
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                yield batch, first
                first += len(batch)
                bar.update(len(batch))
    except (ValueError, OSError, arrow.ArrowException) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path} cannot be read: {error}") from error


def cells_of(rows: arrow.RecordBatch, number: int, where: str, texts: list[str]) -> dict[str, Any]:
    """One row by column, decoded where these columns hold json text; raises SampleError."""
    try:
        cells = {name: column[number].as_py() for name, column in zip(rows.schema.names, rows.columns, strict=True)}
        for name in cells.keys() & set(texts):
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
    """The fields in convert's column `more`; a column of others that is called so is a field itself."""
    try:
        fields = json.loads(more or "{}")
    except (TypeError, ValueError, RecursionError):
        fields = None
    return fields if isinstance(fields, dict) else {"more": more}


def shows_images(conversations: Any) -> bool:
    """Whether a turn has an <image> placeholder."""
    turns = conversations if isinstance(conversations, list) else []
    return any(isinstance(turn, dict) and IMAGE_PLACEHOLDER in str(turn.get("content")) for turn in turns)
