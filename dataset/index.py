"""What is found out about large files once, by reading them, and kept beside them ever after: indices, mapped into memory.

An index is a file `.NAME.index`: a line of json, padded to a multiple of 64 bytes, that says what the data file looked like, then
its records. Processes that map it share its pages. Where the data's folder is read-only, it goes to
~/.cache/minimind-v (or $XDG_CACHE_HOME); where that is, too, it is made anew at every start.
"""

import contextlib
import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import lock_descriptor

from model.errors import DataError

VERSION = 2
SMALL = 2**20  # bytes of records that are read rather than mapped: a map holds a file open
T = TypeVar("T")


class DataFile:
    """What reads one file, `path`. Where it goes to another process by pickle, it is opened anew there, and has to be the same.
    Raises DataError for a file that changes meanwhile."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._state = file_state(self.path)
        self._open()
        if file_state(self.path) != self._state:
            raise DataError(f"{self.path} changes while it is read; start again when it is whole")

    def _open(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return {"path": self.path, "state": self._state}

    def __setstate__(self, kept: dict) -> None:
        DataFile.__init__(self, kept["path"])
        if self._state != kept["state"]:
            raise DataError(f"{self.path} has changed since the start")


def file_state(path: Path) -> tuple[int, int]:
    """Size and time of the last change, in ns: a file counts as the same while they are."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def open_index(path: Path, dtype: np.dtype, make: Callable[[], tuple[np.ndarray, dict]]) -> tuple[np.ndarray, dict]:
    """The records and the extra facts that `make` finds in the file at `path`; from the index, if there is one that fits."""
    size, mtime_ns = file_state(path)
    state, build = {"version": VERSION, "size": size, "mtime_ns": mtime_ns, "dtype": str(dtype)}, cache(lambda: make())
    return keep(path, "index", lambda place: _map(place, dtype, state), lambda place: _write(place, *build(), state)) or build()


def keep(path: Path, kind: str, read: Callable[[Path], T | None], write: Callable[[Path], None]) -> T | None:
    """What `read` finds in the file of a kind that belongs to `path`: beside it or in the cache folder. Where it finds None
    in both, `write` makes the file, in one process while the others wait. None where it can be written nowhere."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minimind-v"
    digest = hashlib.blake2b(str(path.absolute()).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    places = [path.with_name(f".{path.name}.{kind}"), folder / f"{path.name}.{digest}.{kind}"]
    for place in places:
        if (found := read(place)) is not None:
            return found
    with alone(path) as locked:
        for place in places:
            if (found := read(place)) is not None:  # another process was quicker
                return found
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                _write_whole(place, write, "tmp" if locked else f"{os.getpid()}.tmp")
            except OSError:
                continue  # read-only, or full: the next place, or none
            return read(place)
    return None


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Waits until no other process is in here with the same file. Tells whether it can be known: not on every network drive."""
    with open(path, "rb") as file:
        try:
            lock_descriptor(file.fileno())
        except OSError:
            yield False
        else:
            yield True


def _write_whole(place: Path, write: Callable[[Path], None], suffix: str) -> None:
    """A file that is there as a whole or not at all. What a killed process left under the same name is written over."""
    part = place.with_name(f"{place.name}.{suffix}")
    try:
        write(part)
        if part.stat().st_size > SMALL:  # smaller ones carry a checksum: thousands of shards would wait for the disk thousands of times
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _map(place: Path, dtype: np.dtype, state: dict) -> tuple[np.ndarray, dict] | None:
    try:
        with open(place, "rb") as file:
            line = file.readline()
            header = json.loads(line)
        whole = len(line) + header["count"] * dtype.itemsize == place.stat().st_size
        if not whole or any(header[name] != value for name, value in state.items()):
            return None
        if header["count"] * dtype.itemsize <= SMALL:
            records = np.fromfile(place, dtype, offset=len(line))
            return (records, header["extra"]) if zlib.crc32(records) == header["crc"] else None
        mapped = np.memmap(place, dtype, "r", offset=len(line), shape=(header["count"],))
        return mapped.view(np.ndarray), header["extra"]  # a memmap's own [i] takes three times as long
    except (OSError, ValueError, KeyError, TypeError) as error:  # none, torn, or of another kind: it is made again
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None


def _write(place: Path, records: np.ndarray, extra: dict, state: dict) -> None:
    line = json.dumps({**state, "count": len(records), "crc": zlib.crc32(records), "extra": extra}).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"
    with open(place, "wb") as file:
        file.write(line)
        records.tofile(file)
