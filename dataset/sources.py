"""Where samples and pictures come from. Today: jsonl files and a folder of pictures.

A sample source is anything with `len()`, `[i] -> Sample` (raising SampleError) and `where(i)`; a picture source is
anything with `load(name) -> PIL picture`. Other formats join here, in `open_samples` and `open_images`.
"""

import json
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from .conversation import Sample, parse_sample
from .errors import SampleError

MAX_PIXELS = 90_000_000  # a larger picture is refused: a few bytes of file can unfold to gigabytes


class DataError(Exception):
    """A data set as a whole is missing or unusable; the message says what to do."""


class SampleSource(Protocol):
    """Checked samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def where(self, index: int) -> str:
        """file:line of a sample."""


class ImageSource(Protocol):
    """Pictures by name."""

    def load(self, name: str, where: str = "") -> Image.Image:
        """The decoded picture; raises SampleError."""


class JsonlSamples:
    """A jsonl file, read by byte offset: memory holds 16 bytes a line, whatever the lines hold.

    Empty lines are no samples. The file is opened anew in each process that reads from it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        offsets, numbers, at = [], [], 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    offsets.append(at)
                    numbers.append(number)
                at += len(line)
        if not offsets:
            raise DataError(f"{self.path} holds no samples: every line is empty")
        self._offsets = np.array(offsets, dtype=np.int64)
        self._numbers = np.array(numbers, dtype=np.int64)
        self._file = None

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> str:
        """file:line, lines counted from 1."""
        return f"{self.path}:{self._numbers[index]}"

    def __getitem__(self, index: int) -> Sample:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115  (open for the life of the process)
        self._file.seek(self._offsets[index])
        line, where = self._file.readline(), self.where(index)
        try:
            row = json.loads(line.decode("utf-8-sig" if index == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            raise SampleError(f"not UTF-8 text ({error.reason} at byte {error.start})", where) from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise SampleError(f"not json ({error}): {line[:60]!r}", where) from error
        return parse_sample(row, where)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}  # an open file does not travel to another process


class FolderImages:
    """Pictures in a folder and its subfolders. No name leads out of it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()

    def load(self, name: str, where: str = "") -> Image.Image:
        """The decoded picture; raises SampleError for a missing, broken or oversized file and for a path that leaves
        the folder."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise SampleError(f"picture {name!r} leads out of {self.folder}", where)
        if not path.is_file():
            raise SampleError(f"picture {name!r} is not in {self.folder}", where)
        return load_picture(path, name, where)


class NoImages:
    """The source of a run that was given no folder: every picture is missing."""

    def __init__(self, folder: str | Path):
        self.folder = folder

    def load(self, name: str, where: str = "") -> Image.Image:
        """Raises SampleError."""
        raise SampleError(f"picture {name!r}: there is no folder {self.folder}", where)


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
