"""Samples, and where they are in a jsonl file: each is found by the byte offset of its line.

The offsets are collected once, by reading the file, and stored next to it as `.NAME.index`; later starts map that file
into memory, and all processes share its pages. Of packed files and json documents a copy is read (dataset/lines.py).
"""

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from model.conversation import IMAGE_PLACEHOLDER, Turn, count_images, parse_turns
from model.errors import NoSamples, SampleError, shown

from .derived import read_index

PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # suffix and codec
BLANK = b" \t\r\n\xef\xbb\xbf"  # an empty line may have a byte order mark
LINE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("placeholders", "<i4"), ("number", "<i4"), ("crc", "<u4")])
RECORD, PLACEHOLDER = struct.Struct("<qiiiI"), IMAGE_PLACEHOLDER.encode()
BYTES_PER_TOKEN = 4  # of English in a vocabulary of 6,400; only lengths relative to each other matter


@dataclass(frozen=True)
class Sample:
    """A checked sample: turns, and the images they show in reading order, by name or as a file's bytes. `where` is "file:line"."""

    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    where: str = ""
    kind: str = ""  # of the answers, for scoring; optional
    answers: Any = ()  # references for the last one, for scoring and rewards, which check them (answers.references); optional


def parse_sample(row: Any, where: str = "", images: tuple[str | bytes, ...] | None = None) -> Sample:
    """A decoded json line as a Sample; `images` replace its field `image` where a format holds them itself.

    Raises SampleError for missing keys, wrong types, unknown roles, no answer to learn from, and <image> placeholders
    that do not match the images; of a format that convert knows it names the command.
    """
    try:
        if not isinstance(row, dict):
            raise SampleError(f"a sample is an object with 'conversations', not {type(row).__name__}")
        turns = parse_turns(row.get("conversations"), where)
        images = parse_images(row.get("image"), where) if images is None else images
        placeholders = count_images(turns)
        if placeholders != len(images):
            raise SampleError(f"{placeholders} <image> placeholders in the user's turns, but {len(images)} images")
        if not any(turn.role == "assistant" for turn in turns):
            raise SampleError("no assistant turn: nothing to learn from")
    except SampleError as error:
        from .foreign import remedy  # for an error alone

        raise SampleError(error.problem + remedy(row, where), where) from error
    return Sample(turns, images, where, "" if row.get("kind") is None else str(row["kind"]), row.get("answers", ()))


def parse_images(value: Any, where: str = "") -> tuple[str, ...]:
    """The `image` field: absent, "a.jpg", "a.jpg, b.jpg" or a list."""
    if value is None or value == "":
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise SampleError(f"'image' must be a file name, several with commas between, or a list: {shown(value)}", where)
    return tuple(name.strip() for name in names)


class JsonlSamples:
    """The samples of a jsonl file; empty lines are none. Raises DataError for a file that holds no samples."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lines_path, self._lines = self._open()
        if not len(self._lines):
            raise NoSamples(f"{self.path} holds no samples: every line is empty")

    def _open(self) -> tuple[Path, np.ndarray]:
        """The file whose lines are read, this one or a copy, and where they are in it."""
        path = self.path
        if is_packed(path) or kind_of(path) == ".json":
            from .lines import one_object_a_line  # not needed for jsonl

            path = one_object_a_line(path)
        return path, read_index(path, LINE, partial(self._write_index, path))

    def __reduce__(self):
        return type(self), (self.path,)  # another process maps the index itself

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        return parse_sample(self.row(index), self.where(index))

    def where(self, index: int) -> str:
        """file:line, lines counted from 1."""
        return f"{self.path}:{self._lines[index]['number']}"

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """Tokens of samples, estimated without reading them: one for four bytes of a line, and the images."""
        lines = self._lines[indices]
        return lines["size"] // BYTES_PER_TOKEN + lines["placeholders"] * image_tokens

    def fingerprint(self) -> str:
        """A hash of all lines."""
        return hashlib.blake2b(self._lines, digest_size=LINE.itemsize).hexdigest()

    def row(self, index: int) -> Any:
        """The decoded line; raises SampleError."""
        line, where = self._lines[index], self.where(index)
        try:
            with open(self._lines_path, "rb", buffering=0) as file:
                file.seek(line["offset"])
                content = file.read(line["size"])
        except OSError as error:
            raise SampleError(f"the line cannot be read: {error}", where) from error
        if zlib.crc32(content) != line["crc"]:
            raise SampleError("the file has changed since the start: the line is not what it was", where)
        return parse_json(content, where)

    def _write_index(self, path: Path, index: BinaryIO) -> None:
        """A LINE for every line that is not empty."""
        offset, size = 0, path.stat().st_size
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"index of {path.name}", delay=3, disable=None)
        with open(path, "rb") as file, bar:
            for number, line in enumerate(file, start=1):
                if line.strip(BLANK):
                    index.write(describe(line, offset, number))
                offset += len(line)
                bar.update(len(line))


def describe(line: bytes, offset: int, number: int) -> bytes:
    """A LINE."""
    return RECORD.pack(offset, len(line), line.count(PLACEHOLDER), number, zlib.crc32(line))


def kind_of(path: Path) -> str:
    """The suffix of what a data file holds, packed or not."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in PACKED


def parse_json(text: str | bytes, where: str) -> Any:
    """Decoded json; raises SampleError."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are plain ValueErrors
        begin = text[:60] if isinstance(text, bytes) else text[:60].encode(errors="replace")
        raise SampleError(f"not json ({error}): {begin!r}", where) from error
