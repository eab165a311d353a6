"""Where samples and pictures come from. Today: jsonl files and a folder of pictures.

A sample source is anything with `len()`, `[i] -> Sample` (raising SampleError) and `where(i)`; a picture source is
anything with `load(name) -> PIL picture`. Other formats join here, in `open_samples` and `open_images`.
"""

import hashlib
import json
import warnings
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .conversation import IMAGE_MARK, Sample, parse_sample
from .errors import SampleError

BYTES_PER_TOKEN = 4  # of English in a vocabulary of 6,400; only lengths relative to each other matter
MAX_PIXELS = 90_000_000  # a larger picture is refused: a few bytes of file can unfold to gigabytes


class DataError(Exception):
    """A data set as a whole is missing or unusable; the message says what to do."""


class SampleSource(Protocol):
    """Checked samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def where(self, index: int) -> str:
        """file:line of a sample."""

    def lengths(self, image_tokens: int) -> np.ndarray:
        """Tokens of every sample, int32 [n], estimated without reading them again."""

    def fingerprint(self) -> str:
        """Another one whenever the samples are others."""


class ImageSource(Protocol):
    """Pictures by name."""

    def load(self, name: str, where: str = "") -> Image.Image:
        """The decoded picture; raises SampleError."""

    def signature(self, name: str, where: str = "") -> int:
        """A number other than 0 that changes with the file behind a name; raises SampleError when there is none."""


class JsonlSamples:
    """A jsonl file, read by byte offset: memory holds 24 bytes a line, whatever the lines hold.

    Empty lines are no samples. The file is opened anew in each process that reads from it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        offsets, numbers, sizes, marks, at = [], [], [], [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    offsets.append(at)
                    numbers.append(number)
                    sizes.append(len(line))
                    marks.append(line.count(IMAGE_MARK.encode()))
                at += len(line)
        if not offsets:
            raise DataError(f"{self.path} holds no samples: every line is empty")
        self._offsets = np.array(offsets, dtype=np.int64)
        self._numbers = np.array(numbers, dtype=np.int64)
        self._sizes, self._marks = np.array(sizes, dtype=np.int32), np.array(marks, dtype=np.int32)
        self._file = None

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        """file:line, lines counted from 1."""
        return f"{self.path}:{self._numbers[index]}"

    def lengths(self, image_tokens: int) -> np.ndarray:
        """Estimated tokens, int32 [n]: about four bytes of a line a token, and the pictures."""
        return self._sizes // BYTES_PER_TOKEN + self._marks * image_tokens

    def fingerprint(self) -> str:
        """A hash of the file's bytes."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]

    def __getitem__(self, index: int) -> Sample:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115  (open for the life of the process)
        self._file.seek(self._offsets[index])
        line, where = self._file.readline(), self.where(index)
        try:
            text = line.decode("utf-8-sig" if index == 0 else "utf-8")
            row = json.loads(text, object_pairs_hook=_no_duplicates)
        except UnicodeDecodeError as error:
            raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits are plain ValueErrors
            raise SampleError(f"not json ({error}): {line[:60]!r}", where) from error
        return parse_sample(row, where)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}  # an open file does not travel to another process


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    """An object of json; one that names a key twice could mean either, so it is refused."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


class FolderImages:
    """Pictures in a folder and its subfolders. No name leads out of it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()

    def load(self, name: str, where: str = "") -> Image.Image:
        """The decoded picture; raises SampleError for a missing, broken or oversized file and for a path that leaves
        the folder."""
        return load_picture(self._path(name, where), name, where)

    def signature(self, name: str, where: str = "") -> int:
        """From the name, the size and the time of the last change."""
        stat = self._path(name, where).stat()
        return zlib.crc32(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogateescape")) + 1

    def _path(self, name: str, where: str) -> Path:
        try:
            path = (self.folder / name).resolve()
            inside, found = path.is_relative_to(self.folder), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, half a character, a circle of links
            raise SampleError(f"picture {name!r} is no file name: {error}", where) from error
        if not inside:
            raise SampleError(f"picture {name!r} leads out of {self.folder}", where)
        if not found:
            raise SampleError(f"picture {name!r} is not in {self.folder}", where)
        return path


class NoImages:
    """The source of a run that was given no folder: every picture is missing."""

    def __init__(self, folder: str | Path):
        self.folder = folder

    def load(self, name: str, where: str = "") -> Image.Image:
        """Raises SampleError."""
        raise SampleError(f"picture {name!r}: there is no folder {self.folder}", where)

    def signature(self, name: str, where: str = "") -> int:
        """Raises SampleError."""
        return self.load(name, where)


def load_picture(path: Path, name: str, where: str = "") -> Image.Image:
    """Opens and decodes one file, within MAX_PIXELS; raises SampleError with the name and the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit stands below
            picture = Image.open(path)
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise SampleError(f"picture {name!r} has {width} x {height} pixels, more than {MAX_PIXELS:,}", where)
        picture.load()
    except SampleError:
        raise
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ValueError, ...
        raise SampleError(f"picture {name!r} cannot be read: {type(error).__name__}: {error}", where) from error
    return picture


def open_samples(path: str | Path) -> SampleSource:
    """The samples in a jsonl file; raises DataError when there is no such file or it is of another kind."""
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"no training data at {path}. Fetch the published data set with\n"
            f"    hf download jingyaogong/minimind-v_dataset --repo-type dataset --local-dir dataset\n"
            f"or name your own jsonl file with --data_path (format: README, 'Your own pictures')."
        )
    if path.suffix not in (".jsonl", ".json"):
        raise DataError(f"{path} is no .jsonl file")
    try:
        return JsonlSamples(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def open_images(path: str | Path) -> ImageSource:
    """The pictures in a folder. A missing folder is no error yet: text-only data needs none."""
    path = Path(path)
    if path.is_dir():
        return FolderImages(path)
    if path.exists():
        raise DataError(f"{path} is no folder of pictures")
    return NoImages(path)
