"""The file that a tool is to write, checked before its work begins."""

import os
from pathlib import Path

from .errors import UsageError
from .storage import StorageError, check_writable


def check_output(flag: str, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Raises UsageError when no file, with one of these suffixes if there are any, can be written at `path`. Makes the
    folder for it."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{flag} {path}: give the name of a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if path.is_symlink() or (path.is_file() and not os.access(path, os.W_OK)):
        raise UsageError(f"{flag} {path}: a link or a read-only file is there; name another file")
    try:
        check_writable(path)
    except StorageError as error:
        raise UsageError(f"{flag} {path}: no file can be written there: {error}") from error
