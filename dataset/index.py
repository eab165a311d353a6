"""Indices of large files: made once by reading the file, kept beside it, mapped into memory ever after.

An index is a file `.NAME.index`: a line of json, padded to a multiple of 64 bytes, that says what the data file looked like, then
its records. Processes that map it share its pages. Where the data's folder is read-only, it goes to
~/.cache/minimind-v (or $XDG_CACHE_HOME); where that is, too, it is made anew at every start.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

VERSION = 1
SMALL = 2**20  # bytes of records that are read rather than mapped: a map holds a file open


def open_index(path: Path, dtype: np.dtype, build: Callable[[], tuple[np.ndarray, dict]]) -> tuple[np.ndarray, dict]:
    """The records and the extra facts that `build` finds in the file at `path`; from the index, if there is one that fits.

    A file counts as the same while its size and the time of its last change are.
    """
    stat = path.stat()
    state = {"version": VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "dtype": str(dtype)}
    places = _places(path)
    for place in places:
        found = _map(place, dtype, state)
        if found is not None:
            return found
    records, extra = build()
    for place in places:
        try:
            if _map(place, dtype, state) is None:  # another process may have been quicker, and others may have mapped its file
                _write(place, records, {**state, "count": len(records), "extra": extra})
        except OSError:
            continue  # read-only, or full: the next place, or none
        return _map(place, dtype, state) or (records, extra)
    return records, extra


def _places(path: Path) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minimind-v"
    digest = hashlib.blake2b(str(path.absolute()).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return [path.with_name(f".{path.name}.index"), cache / f"{path.name}.{digest}.index"]


def _map(place: Path, dtype: np.dtype, state: dict) -> tuple[np.ndarray, dict] | None:
    try:
        with open(place, "rb") as file:
            line = file.readline()
            header = json.loads(line)
        whole = len(line) + header["count"] * dtype.itemsize == place.stat().st_size
        if not whole or any(header[name] != value for name, value in state.items()):
            return None
        if header["count"] * dtype.itemsize <= SMALL:
            return np.fromfile(place, dtype, offset=len(line)), header["extra"]
        return np.memmap(place, dtype, "r", offset=len(line), shape=(header["count"],)), header["extra"]
    except (OSError, ValueError, KeyError, TypeError) as error:  # none, torn, or of another kind: it is made again
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None


def _write(place: Path, records: np.ndarray, header: dict) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(header).encode()
    line += b" " * (-(len(line) + 1) % 64) + b"\n"
    descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=place.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(line)
            records.tofile(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, place)  # several processes may do this at once, all with the same content
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
