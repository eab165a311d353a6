"""Files that are made of a data file once and read from then on: indices of where things are in it, and copies."""

import contextlib
import os
import zlib
from pathlib import Path

import numpy as np
from filelock import lock_descriptor

from model.errors import DataError
from model.storage import Write, remove_temporaries, write_temporary

VERSION = 7  # raised when derived files are written otherwise than before
MAPPED = 2**20  # bytes from which an index is mapped: a map holds a file open, and a data set may have thousands


def derived_file(path: Path, kind: str, write: Write) -> Path:
    """A file that `write` makes of the one at `path`, once: `.NAME.kind` next to it, or in ~/.cache/minimind-v
    ($XDG_CACHE_HOME) where that folder is read-only. It is made again when the original has changed: its time of
    modification says of which state of the original it was made. One process writes, the others wait.

    Raises DataError where it can be written nowhere.
    """
    status, original = path.stat(), str(path.absolute()).encode(errors="surrogateescape")
    stamp = zlib.crc32(f"{VERSION} {status.st_size} {status.st_mtime_ns}".encode())  # whole seconds stay on any disk
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minimind-v"
    places = [path.with_name(f".{path.name}.{kind}"), cache / f"{path.name}.{zlib.crc32(original):08x}.{kind}"]
    with open(path, "rb") as file:
        locked = False
        with contextlib.suppress(OSError):  # not on every network drive
            locked = lock_descriptor(file.fileno())  # until the file is closed
        for place in places:
            if place.is_file() and place.stat().st_mtime == stamp:
                return place
        for place in places:
            with contextlib.suppress(OSError):  # read-only, or full
                if locked:
                    remove_temporaries(place)
                temporary = write_temporary(place, write)
                os.utime(temporary, (stamp, stamp))
                os.replace(temporary, place)
                return place
    raise DataError(f"neither the folder of {path} nor ~/.cache has room for its {kind}, a file that is made of it"
                    " once; name a larger disk by XDG_CACHE_HOME")  # fmt: skip


def read_index(path: Path, record: np.dtype, write: Write) -> np.ndarray:
    """The records that `write` collects from the file at `path`; many of them mapped into memory, for all processes."""
    place = derived_file(path, "index", write)
    if place.stat().st_size < MAPPED:
        return np.fromfile(place, record)
    return np.memmap(place, record, "r").view(np.ndarray)  # a memmap's own [i] takes three times as long
