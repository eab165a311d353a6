"""Paths as people type them, files that cannot be half written, and one writer at a time.

A file is written beside its place under a temporary name, forced to disk and renamed: at whatever instant the machine stops,
the old file or the whole new one is there. Locks are those of the filelock library, which has them on every system.
"""

import errno
import functools
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

REPOSITORY = Path(__file__).resolve().parent.parent
TEMPORARY = ".tmp"  # suffix of files that are being written
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524)  # answers of NFS, Lustre and others; 524 is Linux's ENOTSUPP

CAUSES = {errno.ENOSPC: "make room", errno.EDQUOT: "the quota is used up: make room", errno.EROFS: "make the read-only disk writable",
          errno.EEXIST: "remove the file that has a folder's name", errno.ENOTDIR: "remove the file that has a folder's name",
          errno.EACCES: "change its permissions"}  # fmt: skip

Write = Callable[[BinaryIO], None]


class StorageError(Exception):
    """The disk does not do what is needed; the message names the file, the reason and the remedy."""


def home_for_tilde(argv: list[str] | None = None) -> list[str]:
    """Command-line arguments (those of the process for None) with every "~" that begins a path replaced by a home folder.

    A shell does so at the beginning of a word only, not in --save_dir=~/x or a.jsonl,~/b.jsonl.
    """
    words = sys.argv[1:] if argv is None else argv
    return [re.sub(r"(?:^|(?<=[=,]))~[^/,]*", lambda match: os.path.expanduser(match[0]), word) for word in words]


def write_temporary(path: Path, write: Write) -> Path:
    """A temporary file beside `path`, written and forced to disk. Leaves nothing behind when that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def sync_folder(folder: Path) -> None:
    """Forces names in a folder to disk, where a folder can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Write, keep: Path | None = None) -> None:
    """The file at `path` is the old one or the whole new one, whenever the machine stops. `keep` is where the old one is
    kept. Raises StorageError when the disk refuses; then nothing has changed and nothing is left behind."""
    temporary = None
    try:
        temporary = write_temporary(path, write)
        if keep and path.exists():
            copy = keep.with_name(f".{keep.name}.copy{TEMPORARY}")
            copy.unlink(missing_ok=True)  # of a killed writer
            try:
                os.link(path, copy)  # rather than renamed: there is a file at `path` at every instant
            except OSError:  # a file system without hard links
                shutil.copyfile(path, copy)
            os.replace(copy, keep)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:  # torch.save answers a full disk with a RuntimeError
        if temporary:
            temporary.unlink(missing_ok=True)
        raise StorageError(_explain(error, path.parent)) from error


def remove_temporaries(path: Path) -> None:
    """Removes what killed writers of the file at `path` left beside it."""
    for left in path.parent.glob(f".{path.name}.*{TEMPORARY}"):
        left.unlink(missing_ok=True)


def hold(path: Path, remedy: str = "", wait: bool = False) -> FileLock:
    """The lock at `path`, until its release() or the end of the process, however that comes; forked processes do not share
    it. `wait`: until its holder is done, rather than raising StorageError with the remedy.

    On a file system without locks the work goes on after a warning.
    """
    lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False, fallback_to_soft=False, preserve_lock_file=True,
                    on_acquired=_sign)  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise StorageError(f"another run writes the same files ({_holder(path)}; lock {path}). Wait for it, or {remedy}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise StorageError(f"cannot lock {path}: {error}") from error
        _warn_of_no_locks(path.parent, os.strerror(error.errno))
    return lock


def _sign(descriptor: int) -> None:
    os.truncate(descriptor, 0)
    os.write(descriptor, f"\nprocess {os.getpid()} on {socket.gethostname()}".encode())  # Windows locks the first byte


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "unknown process"
    except OSError:  # Windows keeps others from reading
        return "unknown process"


@functools.cache
def _warn_of_no_locks(folder: Path, reason: str) -> None:
    print(f"warning: {folder} lies on a file system without locks ({reason}): nothing keeps a second run from writing the same"
          " files. See to it that there is one", file=sys.stderr, flush=True)  # fmt: skip


def check_writable(path: Path) -> None:
    """Raises StorageError when no file can be written at `path`: better now than after the first hours."""
    if os.path.lexists(path) and not path.is_file():
        raise StorageError(f"cannot write {path}: a folder, a device or a dangling link has that name. Remove it, or name another place")
    try:
        write_temporary(path, lambda file: file.write(b"x")).unlink()
    except OSError as error:
        raise StorageError(_explain(error, path.parent)) from error


def _explain(error: Exception, folder: Path) -> str:
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__
    cause = CAUSES.get(getattr(error, "errno", None))
    return f"cannot write in {folder}: {error}; " + (f"{cause}, or name another folder" if cause else "check the disk")


def is_regular(path: str | Path) -> bool:
    """Whether that is a file with an end; who opens a named pipe may wait for ever. Raises OSError when nothing is there."""
    return stat.S_ISREG(os.stat(path).st_mode)
