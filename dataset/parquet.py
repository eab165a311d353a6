"""Samples from a parquet file, by way of a copy of its rows.

Parquet is read in row groups, which writers make of a hundred rows or of a whole file. The copy `.NAME.rows` next to the
original is made once: of each row a line of json and the bytes of its images, and at the end an index, as of jsonl files.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from tqdm import tqdm

from model.conversation import IMAGE_PLACEHOLDER
from model.errors import DataError, NoSamples, SampleError

from .derived import derived_file
from .foreign import as_list, image_of, remedy, with_images
from .jsonl import LINE, JsonlSamples, Sample, describe, parse_json, parse_sample

# The first of each that is there counts.
CONVERSATION_COLUMNS, IMAGE_COLUMNS = ("conversations", "messages"), ("image_bytes", "images", "image")
FURTHER = ("kind", "answers", "more")  # what is read besides; `more` is convert's: json text of a line's further fields
BATCH_ROWS = 256  # to read at a time: Arrow holds no list of more than 2 GB


class ParquetSamples(JsonlSamples):
    """A parquet file as the published data set comes: columns `conversations` (json text, or list of structs with
    `role` and `content`) and `image_bytes` (an image file's bytes, or a list of such); or as the datasets library writes it:
    `messages`, and `images` or `image` of structs with `bytes` or `path`. A path, or text, is a file's name.

    Published rows always hold an image; where no <image> placeholder shows it, it is text-only. Raises DataError.
    """

    def _open(self) -> tuple[Path, np.ndarray]:
        schema, count = read_schema(self.path)
        self._text, self._images = find_columns(self.path, schema.names)
        self._columns = [name for name in (self._text, self._images, *FURTHER) if name in schema.names]
        copy = derived_file(self.path, "rows", self._write_copy)
        index = np.memmap(copy, LINE, "r", offset=copy.stat().st_size - count * LINE.itemsize)
        return copy, index.view(np.ndarray)

    def __getitem__(self, index: int) -> Sample:
        """The copy's line holds the row and its images, by name or by number of bytes; or why it cannot be used."""
        row, where, line = self.row(index), self.where(index), self._lines[index]
        if "problem" in row:
            raise SampleError(row["problem"], where)
        with open(self._lines_path, "rb", buffering=0) as file:
            file.seek(line["offset"] + line["size"])
            images = tuple(image if isinstance(image, str) else file.read(image) for image in row["images"])
        return parse_sample(row["row"], where, images)

    def _write_copy(self, file: BinaryIO) -> None:
        print(f"notice: {self.path} is copied to .{self.path.name}.rows once", file=sys.stderr)
        index, offset = bytearray(), 0
        rows = read_rows(self.path, self._columns, (self._text,), f"copy of {self.path.name}")
        for number, (_, read) in enumerate(rows, start=1):
            images = ()
            try:
                row, images = row_of(read(), self._text, self._images)
                content = {"row": row, "images": [image if isinstance(image, str) else len(image) for image in images]}
            except SampleError as error:
                content = {"problem": error.problem}
            line = json.dumps(content, default=str).encode() + b"\n"
            index += describe(line, offset, number)
            line += b"".join(image for image in images if isinstance(image, bytes))
            file.write(line)
            offset += len(line)
        file.write(index)


def open_parquet(path: Path) -> parquet.ParquetFile:
    """The file; Arrow would take its name for UTF-8, and in messages for that of the locale."""
    return parquet.ParquetFile(arrow.OSFile(os.fsencode(path)), pre_buffer=False, buffer_size=2**20)


def read_schema(path: Path) -> tuple[arrow.Schema, int]:
    """The columns of a file and the number of its rows; raises DataError for one that is no parquet or has no rows."""
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
    text = next((name for name in CONVERSATION_COLUMNS if name in names), None)
    images = next((name for name in IMAGE_COLUMNS if name in names), None)
    if text is None or names.count(text) > 1 or names.count(images) > 1:
        raise DataError(f"{path} has columns {', '.join(names)}; wanted are one 'conversations' and at most one"
                        f" 'image_bytes'{remedy(dict.fromkeys(names), str(path))}")  # fmt: skip
    return text, images


def read_rows(path: Path, columns: list[str], texts: tuple[str, ...],
              doing: str = "") -> Iterator[tuple[str, Callable[[], dict]]]:  # fmt: skip
    """The place of each row, and what reads it, with a progress bar on a terminal if it is called something. Memory
    does not depend on the row groups. Raises DataError."""
    first = 1
    try:
        with (open_parquet(path) as file, tqdm(total=file.metadata.num_rows, unit="row", desc=doing, delay=3,
                                               disable=None if doing else True) as bar):  # fmt: skip
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                for number in range(len(batch)):
                    where = f"{path}:{first + number}"
                    yield where, partial(cells_of, batch, number, texts, where)
                first += len(batch)
                bar.update(len(batch))
    except (ValueError, OSError, arrow.ArrowException) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{path} cannot be read: {error}") from error


def cells_of(rows: arrow.RecordBatch, number: int, texts: tuple[str, ...], where: str) -> dict[str, Any]:
    """One row by column, decoded where these columns hold json text; raises SampleError."""
    try:
        cells = {name: column[number].as_py() for name, column in zip(rows.schema.names, rows.columns, strict=True)}
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
    for name in cells.keys() & set(texts):
        cells[name] = parse_json(cells[name], where) if isinstance(cells[name], str | bytes) else cells[name]
    return cells


def row_of(cells: dict[str, Any], text: str, images: str | None) -> tuple[dict, tuple[str | bytes, ...]]:
    """A row of parquet, as a line of jsonl has it, and the images that it shows, bytes or names. Raises SampleError."""
    conversations, held, more = cells.pop(text), as_list(cells.pop(images, None)), cells.pop("more", None)
    fields = {} if more is None else {"more": more}  # of others
    with contextlib.suppress(TypeError, ValueError):
        found = json.loads(more)
        fields = found if isinstance(found, dict) else fields
    row = cells | fields | {"conversations": conversations}
    if images == IMAGE_COLUMNS[0] and not shows_images(conversations):
        return row, ()  # the published data set has a placeholder in such rows
    return with_images(row, [image_of(cell) for cell in held])


def shows_images(conversations: Any) -> bool:
    """Whether a turn has an <image> placeholder."""
    turns = conversations if isinstance(conversations, list) else []
    return any(isinstance(turn, dict) and IMAGE_PLACEHOLDER in str(turn.get("content")) for turn in turns)
