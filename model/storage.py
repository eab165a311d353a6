"""Files that cannot be torn: written whole or not at all, alone or several as one, and one writer at a time.

A set of files is written in three steps. Each goes to a temporary file beside its place and is forced to disk; then a
journal that names them all appears, by one rename; then the files are renamed into place and the journal goes. Before the
journal nothing has happened; after it everything has: whoever comes next and finds it (`finish_commit`) does the
remaining renames. So the files of a set belong together at whatever instant the machine stops.
"""

import errno
import fcntl
import json
import os
import socket
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"  # suffix of files that are being written

Write = Callable[[BinaryIO], None]


class StorageError(Exception):
    """The disk does not do what is needed; the message names the file, the reason and the remedy."""


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
    """Forces names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Write) -> None:
    """The file at `path` is the old one or the whole new one, whenever the machine stops."""
    temporary = write_temporary(path, write)
    os.replace(temporary, path)
    sync_folder(path.parent)


def check_zip(path: Path) -> None:
    """Reads a file of torch.save through and compares every checksum in it; raises StorageError for a torn one."""
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise StorageError(f"{path} is torn: {type(error).__name__}: {error}") from error
    if broken is not None:
        raise StorageError(f"{path} is corrupt: the checksum of {broken} is wrong")


def write_set(journal: Path, files: dict[Path, Write], keep: dict[Path, Path]) -> None:
    """Writes all of `files` as one. `keep` names, for some of them, where the version before goes.

    Files of torch.save (.pth) are read back before anything old is touched.
    Raises StorageError when the disk refuses; then nothing has changed and nothing is left behind.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            temporaries[path] = write_temporary(path, write)
            if path.suffix == ".pth":
                check_zip(temporaries[path])
        steps = [{"from": str(temporaries[path].absolute()), "to": str(path.absolute()),
                  "keep": str(keep[path].absolute()) if path in keep else None} for path in files]  # fmt: skip
        write_atomically(journal, lambda file: file.write(json.dumps(steps).encode()))
    except Exception as error:  # torch.save answers a full disk with a RuntimeError
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise StorageError(_explain(error, next(iter(files)).parent)) from error
    try:
        finish_commit(journal)
    except OSError as error:  # whoever comes next does the rest
        raise StorageError(_explain(error, next(iter(files)).parent)) from error


class BackgroundWriter:
    """Writes sets of files in the background, one at a time."""

    def __init__(self):
        self._executor, self._task = ThreadPoolExecutor(1, "saver"), None

    def submit(self, journal: Path, files: dict[Path, Write], keep: dict[Path, Path]) -> None:
        """Starts to write a set (see `write_set`). Waits for the one before; raises StorageError, after the start, when
        that could not be written."""
        try:
            self.wait()
        finally:
            self._task = self._executor.submit(write_set, journal, files, keep)

    def wait(self) -> None:
        """Returns when everything is on disk; raises StorageError when it could not be written."""
        task, self._task = self._task, None
        if task is not None:
            task.result()


def finish_commit(journal: Path) -> None:
    """Does what a journal still asks for, if there is one. Doing it twice is doing it once. Raises StorageError for a
    journal that holds something else."""
    try:
        steps = [(Path(step["from"]), Path(step["to"]), Path(step["keep"]) if step["keep"] else None)
                 for step in json.loads(journal.read_text())]  # fmt: skip
        if not steps:
            raise ValueError("it is empty")
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{journal}, the list of files of a save that was cut short, is damaged: {error!r}. Remove it to go"
                           " on; weights and training state may then be of two different saves") from error  # fmt: skip
    for source, target, keep in steps:
        if not source.exists():
            continue  # done before the stop
        if keep and target.exists():
            os.replace(target, keep)
        os.replace(source, target)
    for folder in {target.parent for _, target, _ in steps}:
        sync_folder(folder)
    journal.unlink(missing_ok=True)
    sync_folder(journal.parent)


def remove_temporaries(folder: Path, names: list[str]) -> None:
    """Removes what killed writers of files called `names` left in `folder`."""
    for name in names:
        for path in folder.glob(f".{name}.*{TEMPORARY}"):
            path.unlink(missing_ok=True)


class OutputLock:
    """Keeps a second process from writing the same files. Gone with its process, however that ends.

    A POSIX record lock: unlike flock's it is not shared with forked loader processes, which may live a little longer.
    """

    def __init__(self, path: Path, remedy: str = "give this one another --save_weight, or another --save_dir and --checkpoint_dir"):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+")  # noqa: SIM115  (held as long as the process)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise StorageError(f"cannot lock {path}: {error}") from error
            raise StorageError(
                f"another run writes the same files ({holder or 'unknown process'}; lock {path}). Wait for it, or {remedy}"
            ) from error
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Lets others write."""
        self._file.close()


def check_writable(folder: Path) -> None:
    """Raises StorageError when no file can be written in `folder`: better now than after the first hours."""
    try:
        write_temporary(folder / "probe", lambda file: file.write(b"x")).unlink()
    except OSError as error:
        raise StorageError(_explain(error, folder)) from error


def _explain(error: Exception, folder: Path) -> str:
    if isinstance(error, StorageError):
        return str(error)
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__
    remedies = {
        errno.ENOSPC: "make room, or name another disk with --save_dir and --checkpoint_dir",
        errno.EDQUOT: "the quota is used up: make room, or name another disk with --save_dir and --checkpoint_dir",
        errno.EROFS: "it is read-only: name another folder with --save_dir and --checkpoint_dir",
        errno.EEXIST: "a file has the name of a folder: name another folder",
        errno.ENOTDIR: "a file has the name of a folder: name another folder",
        errno.EACCES: "it may not be written: change its permissions, or name another folder",
    }
    remedy = remedies.get(error.errno, "check the disk") if isinstance(error, OSError) else "check the disk"
    return f"cannot write in {folder}: {error}; {remedy}"
