"""Copies of data files that cannot be read in place, one object a line: of packed ones (.gz, .bz2, .zst), of json."""

import json
import shutil
import sys
from pathlib import Path
from typing import BinaryIO

import pyarrow

from model.errors import DataError

from .derived import derived_file
from .jsonl import PACKED, is_packed, kind_of


def one_object_a_line(path: Path) -> Path:
    """The copy, made once; a .json file that holds one object a line itself is copied as it is. Raises DataError."""

    def write(copy: BinaryIO) -> None:
        print(f"notice: {path} is copied to .{path.name}.lines once", file=sys.stderr)
        codec = PACKED[path.suffix.lower()] if is_packed(path) else None
        try:
            with open(path, "rb") as file, pyarrow.input_stream(file, compression=codec) as source:
                if kind_of(path) == ".json":
                    copy.write(lines_of(source.read()))
                else:
                    shutil.copyfileobj(source, copy, 2**20)
        except (OSError, ValueError, RecursionError) as error:
            if getattr(error, "errno", None):  # the disk's, rather than the content's
                raise
            raise DataError(f"cannot read {path}: {error}") from error

    return derived_file(path, "lines", write)


def lines_of(document: bytes) -> bytes:
    """The samples of a json document, one a line: of an array, or of an object with one as `data`. Where the first line
    is a sample, all of them are."""
    text = document.decode("utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or "\n" in text[: error.pos].strip():
            raise
        return document
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    rows = content if isinstance(content, list) else [content]
    return b"".join(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n" for row in rows)
