"""Samples from a jsonl file."""

import codecs
import hashlib
import io
import json
import os
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as arrow
from tqdm import tqdm

from model.conversation import IMAGE_PLACEHOLDER
from model.errors import DataError, NoSamples, SampleError, shown
from model.storage import read_at

from .index import DataFile, file_state, keep, open_index
from .vlm_dataset import Sample, parse_sample

UNPACK = {".gz": ("gzip", "gzip -dk"), ".bz2": ("bz2", "bzip2 -dk"), ".zst": ("zstd", "zstd -dk")}  # codec, command
MOST_BYTES = 2**30  # of a line
MOST_OPEN = 256  # files of this process: a data set of thousands must not run out of them
BOM = b"\xef\xbb\xbf"  # at the start of a file, or where one was appended to another
BYTES_PER_TOKEN = 4  # of English in a vocabulary of 6,400; only lengths relative to each other matter


class JsonlSamples(DataFile):
    """A jsonl file, or one whose samples a copy holds line by line, read by byte offset through an index (dataset/index.py): no row of it stays in memory.

    Empty lines are no samples. Reads do not move a file position, so forked processes may share the open file.
    """

    RECORD = np.dtype([("offset", "<i8"), ("size", "<i4"), ("marks", "<i4")])
    _opened: deque[io.FileIO] = deque()  # of all jsonl files

    def _open(self) -> None:
        self._lines = one_a_line(self.path)
        self._records, extra = open_index(self._lines, self.RECORD, self._read_lines)
        self._blanks, self._fingerprint = np.array(extra["blanks"], dtype=np.int64), extra["fingerprint"]
        self._open_file()  # what takes the file's name later is another file

    def _open_file(self) -> None:
        self._file = open(self._lines, "rb", buffering=0)  # noqa: SIM115  (until others take its place)
        self._opened.append(self._file)
        if len(self._opened) > MOST_OPEN:
            self._opened.popleft().close()

    def _read_lines(self) -> tuple[np.ndarray, dict]:
        """Offset, size and <image> marks of each line; before which samples the empty lines stand; a hash of it all."""
        offsets, sizes, marks, blanks, at = array("q"), array("i"), array("i"), [], 0
        digest, mark = hashlib.blake2b(digest_size=16), IMAGE_PLACEHOLDER.encode()
        bar = tqdm(total=self._lines.stat().st_size, unit="B", unit_scale=True, desc=f"index of {self.path.name}", delay=3, disable=None)
        with open(self._lines, "rb") as file, bar:
            for line in iter(lambda: file.readline(MOST_BYTES + 1), b""):
                digest.update(line)
                if len(line) > MOST_BYTES:
                    raise DataError(f"{self.path}:{len(offsets) + len(blanks) + 1} has more than {MOST_BYTES:,} bytes in one line")
                if not line.removeprefix(BOM).strip():
                    blanks.append(len(offsets))
                else:
                    offsets.append(at)
                    sizes.append(len(line))
                    marks.append(line.count(mark))
                at += len(line)
                if len(offsets) % 2**16 == 0:
                    bar.update(at - bar.n)
        if not offsets:
            raise NoSamples(f"{self.path} holds no samples: {'every line' if blanks else 'it'} is empty")
        records = np.empty(len(offsets), self.RECORD)
        records["offset"], records["size"], records["marks"] = offsets, sizes, marks
        return records, {"blanks": blanks, "fingerprint": digest.hexdigest()}

    def __len__(self) -> int:
        return len(self._records)

    def where(self, index: int) -> str:
        """file:line, lines counted from 1."""
        return f"{self.path}:{index + 1 + int(np.searchsorted(self._blanks, index, side='right'))}"

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """About four bytes of a line a token, and the images."""
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
        line = self._read_line(int(record["offset"]), int(record["size"]), index == len(self) - 1, where)
        try:
            text = line.removeprefix(BOM).decode()
        except UnicodeDecodeError as error:
            raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
        return parse_json(text, where)

    def _read_line(self, offset: int, size: int, last: bool, where: str) -> bytes:
        before = min(1, offset)  # the end of the line before it
        try:
            if self._file.closed:
                self._open_file()
            line = read_at(self._file, before + size, offset - before)
        except OSError as error:
            raise SampleError(f"the line cannot be read: {error}", where) from error
        end = line.find(b"\n", before)
        ends = end == before + size - 1 or (last and end < 0 and len(line) == before + size)
        if line[:before] not in (b"", b"\n") or not ends:
            raise SampleError("the file has changed since the start: the line is no longer where it was", where)
        return line[before:]


def kind_of(path: Path) -> str:
    """The suffix of what a data file holds, packed or not."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in UNPACK


def one_a_line(path: Path) -> Path:
    """The file itself if it holds one object a line; of one that is packed, or one json document, a copy that does, which is
    made once. Raises DataError."""
    with unpacked(path) as file:
        begin = next((line for line in iter(lambda: file.readline(64), b"") if line.removeprefix(BOM).strip()), b"")
        if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"\0{", b"[\0", b"\0[")):
            raise DataError(f"{path} is UTF-16 text; UTF-8 is wanted: iconv -f UTF-16 -t UTF-8 '{path}' > data.jsonl")
        begin = begin.removeprefix(BOM).lstrip()
        document = begin.startswith(b"[") or (kind_of(path) == ".json" and is_document(begin, file))
    if not document and not is_packed(path):
        return path
    stamp = zlib.crc32(repr(file_state(path)).encode())  # whose copy it is, told by its time: whole seconds stay on any disk

    def write(place: Path) -> None:
        print(f"notice: {path} is {'packed' if is_packed(path) else 'one json document'}; its lines are copied to {place.with_suffix('')} once", file=sys.stderr)
        with unpacked(path) as file, open(place, "wb") as copy:
            pieces = read_pieces(file, path)
            copy.writelines(lines_of(b"".join(pieces)) if document else pieces)
        os.utime(place, (stamp, stamp))

    try:
        found = keep(path, "lines", lambda place: place if place.is_file() and place.stat().st_mtime == stamp else None, write)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is neither one json document nor one object a line: {error}") from error
    if found is None:
        command = f"{UNPACK[path.suffix.lower()][1]} '{path}'" if is_packed(path) else f"jq -c '.[]' '{path}' > data.jsonl"
        raise DataError(f"neither the folder of {path} nor ~/.cache has room for its lines; write them elsewhere: {command}")
    return found


def unpacked(path: Path) -> BinaryIO:
    """The file, or what is packed in it."""
    file = open(path, "rb")  # noqa: SIM115  (by the caller)
    if not is_packed(path):
        return file
    return io.BufferedReader(arrow.input_stream(file, compression=UNPACK[path.suffix.lower()][0]), 2**20)


def is_document(begin: bytes, file: BinaryIO) -> bool:
    """Whether a .json file is more than one object a line: its first line is not whole, or alone and holds `data`."""
    try:
        row = json.loads(begin if begin.endswith(b"\n") else begin + file.readline())
    except (ValueError, RecursionError):
        return True
    return isinstance(row, dict) and "data" in row and not file.read(2**12).strip()


def read_pieces(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """What is left of a file; raises DataError for a torn one."""
    try:
        yield from iter(lambda: file.read(2**20), b"")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; it is damaged or cut short, or packed otherwise than its name says") from error


def lines_of(document: bytes) -> Iterator[bytes]:
    """The samples in one json document: an array, an object with one as `data`, or a single sample."""
    content = json.loads(document.decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    for row in content if isinstance(content, list) else [content]:
        yield json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


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
        raise ValueError(f"key {shown(next(name for name in names if names.count(name) > 1))} stands there twice")
    return row
