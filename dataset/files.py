"""Files that people name, looked at before the work: whether one can be read to its end, and whether one can be written."""

import mmap
import os
import stat
import sys
from importlib.util import find_spec
from io import RawIOBase
from pathlib import Path

from model.errors import UsageError
from model.storage import write_temporary


def is_regular(path: str | Path) -> bool:
    """Whether that is a file with an end; who opens a named pipe may wait for ever. Raises OSError when nothing is there."""
    return stat.S_ISREG(os.stat(path).st_mode)


def read_at(file: RawIOBase, size: int, offset: int) -> bytes:
    """Bytes from a place in an open file, which forked processes share. Windows has no pread, and no forks."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


def write_at(file: RawIOBase, data: bytes, offset: int) -> int:
    """Likewise; returns how many bytes the disk took."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), data, offset)
    file.seek(offset)
    return file.write(data)


def on_disk(name: str) -> str:
    """A name in the data as this process has to spell it for the system to meet the UTF-8 name, whatever the locale."""
    return os.fsdecode(name.encode(errors="surrogateescape"))


_told = mmap.mmap(-1, 1)  # shared with the loader processes that are forked


def tell_once(text: str) -> None:
    """Says what one case of is enough to know, once in a run."""
    if not _told[0]:
        _told[0] = 1
        print(text, file=sys.stderr, flush=True)


def check_output(flag: str, path: Path, suffixes: tuple[str, ...] = (), replaced: bool = False) -> None:
    """Raises UsageError when no file, with one of these suffixes if there are any, can be written at `path`. Makes the
    folder for it. `replaced`: a file that is there makes way for a new one, rather than being written into."""
    there = os.path.exists(path)
    if path.is_symlink() or (there and not is_regular(path)):
        raise UsageError(f"{flag} {path}: a link, a folder, a pipe or a device is there; name a file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{flag} {path}: give the name of a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    try:
        if there and not replaced:
            open(path, "ab").close()
        else:
            write_temporary(path, lambda file: None).unlink()
    except OSError as error:
        raise UsageError(f"{flag} {path}: no file can be written there ({error.strerror}); name another one") from error


def check_plot(path: str | None) -> None:
    """Raises UsageError when --plot (None: not given) could not draw into that file."""
    if path and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install matplotlib")
    if path:
        check_output("--plot", Path(path), (".png", ".pdf", ".svg", ".jpg"))
