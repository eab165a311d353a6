"""Files that people name, looked at before the work: whether one can be read to its end, and whether one can be written."""

import os
import stat
from pathlib import Path

from model.errors import UsageError
from model.storage import write_temporary


def is_regular(path: str | Path) -> bool:
    """Whether that is a file with an end; who opens a named pipe may wait for ever. Raises OSError when nothing is there."""
    return stat.S_ISREG(os.stat(path).st_mode)


def check_output(flag: str, path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises UsageError when no file with one of these suffixes can be written at `path`. Makes the folder for it."""
    there = os.path.exists(path)
    if path.suffix.lower() not in suffixes or (there and not is_regular(path)):
        raise UsageError(f"{flag} {path}: give the name of a file that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    try:
        if there:
            open(path, "ab").close()
        else:
            write_temporary(path, lambda file: None).unlink()
    except OSError as error:
        raise UsageError(f"{flag} {path}: no file can be written there ({error.strerror}); name another one") from error
