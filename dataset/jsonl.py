"""Samples from a jsonl file, each found by the byte offset of its line.

The offsets are collected once, by reading the file, and stored next to it as `.NAME.index`; later starts map that file into
memory, and all processes share its pages. Packed files (.gz, .bz2, .zst) and json documents are copied line by line first.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from model.conversation import IMAGE_PLACEHOLDER
from model.errors import DataError, NoSamples, SampleError, shown
from model.storage import derived_file, read_index

from .vlm_dataset import Sample, parse_sample

UNPACK = {".gz": ("gzip", "gzip -dk"), ".bz2": ("bz2", "bzip2 -dk"), ".zst": ("zstd", "zstd -dk")}  # codec, command
UTF16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")  # how a file in UTF-16 begins
BOM = b"\xef\xbb\xbf"  # at the start of a file, or where one was appended to another
LINE = np.dtype([("offset", "<i8"), ("size", "<i4"), ("placeholders", "<i4"), ("number", "<i4"), ("crc", "<u4")])
MOST_BYTES = 2**30  # of a line
BYTES_PER_TOKEN = 4  # of English in a vocabulary of 6,400; only lengths relative to each other matter


class JsonlSamples:
    """The samples of a jsonl file; empty lines are none. Raises DataError for a file that holds no lines of text."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lines_path = one_object_a_line(self.path)
        index = read_index(self._lines_path, "index", LINE, self._write_index)
        self._lines, self._fingerprint = index[:-1], index[-1].tobytes().hex()
        if not len(self._lines):
            raise NoSamples(f"{self.path} holds no samples: every line is empty")

    def __reduce__(self):
        return JsonlSamples, (self.path,)  # another process maps the index itself

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        return parse_sample(self.row(index), self.where(index))

    def where(self, index: int) -> str:
        """file:line, lines counted from 1."""
        return f"{self.path}:{self._lines[index]['number']}"

    def lengths(self, indices: np.ndarray, image_tokens: int) -> np.ndarray:
        """About one token for four bytes of a line, and the images."""
        lines = self._lines[indices]
        return lines["size"] // BYTES_PER_TOKEN + lines["placeholders"] * image_tokens

    def fingerprint(self) -> str:
        """A hash of all lines."""
        return self._fingerprint

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
        try:
            text = content.removeprefix(BOM).decode()
        except UnicodeDecodeError as error:
            raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
        return parse_json(text, where)

    def _write_index(self, index: BinaryIO) -> None:
        """A LINE for every line that is not empty, and a hash of them in place of a last one."""
        digest, lines, offset, placeholder = hashlib.blake2b(digest_size=LINE.itemsize), [], 0, IMAGE_PLACEHOLDER.encode()

        def flush() -> None:
            records = np.array(lines, LINE).tobytes()
            digest.update(records)
            index.write(records)
            bar.update(offset - bar.n)
            lines.clear()

        bar = tqdm(total=self._lines_path.stat().st_size, unit="B", unit_scale=True, desc=f"index of {self.path.name}", delay=3, disable=None)
        with open(self._lines_path, "rb") as file, bar:
            for number, line in enumerate(iter(lambda: file.readline(MOST_BYTES + 1), b""), start=1):
                if len(line) > MOST_BYTES:
                    raise DataError(f"{self.path}:{number} has more than {MOST_BYTES:,} bytes in one line")
                if line.removeprefix(BOM).strip():
                    lines.append((offset, len(line), line.count(placeholder), number, zlib.crc32(line)))
                offset += len(line)
                if len(lines) == 2**16:
                    flush()
            flush()
        index.write(digest.digest())


def kind_of(path: Path) -> str:
    """The suffix of what a data file holds, packed or not."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether the name says so."""
    return path.suffix.lower() in UNPACK


def one_object_a_line(path: Path) -> Path:
    """The file itself if it holds one object a line; of a packed file or a json document, a copy that does. Raises DataError."""
    begin = next(read_pieces(path), b"")
    if begin.startswith(UTF16):
        raise DataError(f"{path} is UTF-16 text; UTF-8 is wanted: iconv -f UTF-16 -t UTF-8 '{path}' > data.jsonl")
    begin = begin.removeprefix(BOM).lstrip()
    document = begin.startswith(b"[") or (kind_of(path) == ".json" and begins_document(begin.partition(b"\n")[0]))
    if not document and not is_packed(path):
        return path

    def write(copy: BinaryIO) -> None:
        print(f"notice: the lines of {path} are copied to .{path.name}.lines once", file=sys.stderr)
        pieces = read_pieces(path)
        copy.writelines(lines_of(b"".join(pieces)) if document else pieces)

    try:
        copy = derived_file(path, "lines", write)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is neither one json document nor one object a line: {error}") from error
    if copy is None:
        command = f"{UNPACK[path.suffix.lower()][1]} '{path}'" if is_packed(path) else f"jq -c '.[]' '{path}' > data.jsonl"
        raise DataError(f"neither the folder of {path} nor ~/.cache has room for its lines; write them elsewhere: {command}")
    return copy


def read_pieces(path: Path) -> Iterator[bytes]:
    """The file, or what is packed in it, a MB at a time; raises DataError where that is damaged."""
    with open(path, "rb") as file:
        source = file
        if is_packed(path):
            import pyarrow  # takes a while, and is needed for nothing else here

            source = pyarrow.input_stream(file, compression=UNPACK[path.suffix.lower()][0])
        try:
            yield from iter(lambda: source.read(2**20), b"")
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}; it is damaged or truncated, or packed otherwise than its name says") from error


def begins_document(line: bytes) -> bool:
    """Whether a .json file that begins with this line is one document, rather than one object a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return isinstance(row, dict) and isinstance(row.get("data"), list)


def lines_of(document: bytes) -> Iterator[bytes]:
    """The samples of a json document: an array, an object with one as `data`, or a single sample."""
    content = json.loads(document.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    for row in content if isinstance(content, list) else [content]:
        yield json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def parse_json(text: str, where: str) -> Any:
    """Decoded json; raises SampleError, also for an object that names a key twice, which could mean either."""
    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are plain ValueErrors
        raise SampleError(f"not json ({error}): {text.encode(errors='replace')[:60]!r}", where) from error


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    """A json object; raises ValueError when a key stands there twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {shown(next(name for name in names if names.count(name) > 1))} stands there twice")
    return row
