"""Where images come from: a folder, a zip or tar that is read in place, or the sample itself; and how they are decoded.

A sample names its images, or holds them (bytes of an image file, as parquet has them); either is a `Ref`.
"""

import contextlib
import hashlib
import io
import os
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from model.errors import DataError, SampleError, reason, shown
from model.pixels import CLIP, PixelSettings, preprocess, tile_grid
from model.storage import is_regular

if TYPE_CHECKING:
    from .archive import Archive  # which only zips and tars load

Ref = str | bytes

MAX_PIXELS = 90_000_000  # a larger image is refused: a few bytes of file can unfold to gigabytes
MAX_BYTES = 256 * 2**20  # likewise a larger file in a zip
Image.init()  # registers all formats
CLOSED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # for Pillow mere names; EPS is a program
FORMATS = ["JPEG", "PNG", "WEBP", *(kind for kind in Image.OPEN if kind not in CLOSED)]  # tried in this order
IMAGE_SUFFIXES = {".heic", ".heif", ".hif", ".jxl", ".mpo"} | {
    suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS
}  # fmt: skip
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # one comment may be as long as all together
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS is our own limit


class ImageSource:
    """Images by name in folders, zips and tars; a name has to be in one of them alone. What a sample holds itself is
    decoded here, too."""

    def __init__(self, places: "list[Folder | Archive]"):
        self.places, self.path = places, ", ".join(str(place.path) for place in places)
        self.missing = all(place.missing for place in places)  # then there is no such folder

    def load(self, ref: Ref, where: str = "") -> Image.Image:
        """The decoded image; raises SampleError."""
        return load_image(ref if isinstance(ref, bytes) else self.read(ref, where), name_of(ref), where)

    def pixels(self, ref: Ref, where: str = "", notes: list[str] | None = None, settings: PixelSettings = CLIP) -> torch.Tensor:
        """What the model sees of the image, see `preprocess`; raises SampleError. `notes` get truncated ones."""
        image = self.load(ref, where)
        if notes is not None and image.info.get("truncated"):
            notes.append(f"{where}: image {shown(name_of(ref))} is truncated, used: nearly all of it is there")
        with unreadable(name_of(ref), where):
            return preprocess(image, settings)

    def grid(self, ref: Ref, where: str, tiles: int) -> tuple[int, int]:
        """Rows and columns of the image's tiles, without decoding it; raises SampleError."""
        data = ref if isinstance(ref, bytes) else self.read(ref, where)
        with unreadable(name_of(ref), where):
            image, turned = open_image(data, MAX_PIXELS), False
            with contextlib.suppress(Exception):  # as `to_rgb` has it of a damaged EXIF block
                turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return tile_grid(*(image.size[::-1] if turned else image.size), tiles)

    def read(self, name: str, where: str = "") -> bytes:
        """The bytes of the image's file; raises SampleError."""
        place, entry = self.find(name, where)
        with unreadable(name, where):
            return place.read(entry)

    def signature(self, ref: Ref, where: str = "") -> int:
        """A number other than 0 that changes with the file behind a name; raises SampleError when there is none."""
        if isinstance(ref, bytes):
            return zlib.crc32(ref) + 1
        place, entry = self.find(ref, where)
        return zlib.crc32(place.state(entry, ref)) + 1

    def find(self, name: str, where: str) -> "tuple[Folder | Archive, Any]":
        """The one place of that name or, where there is none, of that name in another spelling; raises SampleError."""
        found, problem = [], f"is not in {self.path}"
        for loosely in (False, True):
            for place in self.places if not found else []:
                try:
                    found += [(place, entry) for entry in place.lookup(name, loosely)]
                except ImageRefused as error:  # an absolute name leads out of all folders but one
                    problem = str(error)
        if len(found) != 1:
            problem = f"could be any of {len(found)} files in {self.path}" if found else problem
            raise SampleError(f"image {shown(name)} {problem}", where)
        return found[0]


class Folder:
    """Images in a folder and its subfolders. No name leads out of it; links in it may."""

    def __init__(self, path: str):
        self.path, self.missing = os.path.abspath(path), not os.path.isdir(path)
        self._inside = os.path.join(self.path, ""), os.path.join(os.path.realpath(path), "")
        self._listings: dict[str, dict[str, list[str]]] = {}  # of folders where a name was not found: names by likeness

    def lookup(self, name: str, loosely: bool) -> list[str]:
        """The paths of that name, in other spellings, too, if `loosely`; raises ImageRefused for what can be none."""
        if self.missing:
            raise ImageRefused(f"cannot be found: there is no folder {self.path}")
        # os.path is several times faster here than Path; isfile is False for what can be no name, as with a NUL.
        path = os.path.normpath(os.path.join(self.path, name.replace("\\", "/") if loosely else name))
        if not os.path.join(path, "").startswith(self._inside) or (loosely and PureWindowsPath(name).drive):
            raise ImageRefused(f"leads out of {self.path}")
        found = [path]
        if loosely:
            found = [self.path]
            for part in map(likeness, os.path.relpath(path, self.path).split(os.sep)):
                found = [os.path.join(folder, name) for folder in found for name in self._names(folder).get(part, [])]
        return [path for path in found if os.path.isfile(path)]

    def _names(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._listings:
            names = self._listings[folder] = {}
            with contextlib.suppress(OSError):  # no folder, or none that may be listed
                for name in os.listdir(folder):
                    names.setdefault(likeness(name), []).append(name)
        return self._listings[folder]

    def read(self, path: str) -> bytes:
        """The bytes of a file."""
        with open(path, "rb", buffering=0) as file:
            return file.read()

    def state(self, path: str, name: str) -> bytes:
        """Bytes that change with the file."""
        status = os.stat(path)
        return f"{name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogatepass")


def open_images(paths: str | Path) -> ImageSource:
    """The images in a folder, a zip or a tar, or in several with commas between. Raises DataError.

    A single missing folder is no error yet: text-only data and parquet need none.
    """
    names = [name for name in split_names(str(paths), os.path.exists) if name] or [""]
    for name in names if len(names) > 1 else []:
        if not os.path.exists(name):
            raise DataError(f"{name} does not exist; a folder or a .zip of images is wanted")
    return ImageSource([open_place(name) for name in names])


def open_place(name: str) -> "Folder | Archive":
    """One of them; raises DataError."""
    if not os.path.exists(name) or os.path.isdir(name):
        return Folder(name)
    if os.path.splitext(name)[1].lower() in (".zip", ".tar"):
        from .archive import Archive  # not needed for folders

        return Archive(name)
    packed = f": mkdir images && tar -xf '{name}' -C images" if name.endswith((".tar.gz", ".tgz")) else ""
    raise DataError(f"{name} is no folder of images, no .zip and no .tar{packed}")


def split_names(names: str, leads: Callable[[str], bool]) -> list[str]:
    """Names with commas between. What stands between two commas is a name of its own, unless it leads nowhere and does
    so together with what follows it."""
    parts, found = names.split(","), []
    while parts:
        joined = (",".join(parts[:end]).strip() for end in range(1, len(parts) + 1))
        name = next(filter(leads, joined), parts[0].strip())
        found.append(name)
        parts = parts[name.count(",") + 1 :]
    return found


class ImageRefused(Exception):
    """Why a file is not taken, in words for the user."""

    strerror = property(str)  # `errors.reason` shows them without the exception's name


def image_files(folder: Path) -> list[Path]:
    """The files of a folder that are named like images, in order; hidden ones are companions of others."""
    return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)


def load_image(file: Path | bytes, name: str, where: str = "", most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a file or its bytes, at most so many pixels; raises SampleError with the name and the reason."""
    with unreadable(name, where):
        if isinstance(file, Path) and not is_regular(file):
            raise ImageRefused("it is a folder, a pipe or a device")
        return decode(file.read_bytes() if isinstance(file, Path) else file, most_pixels)


@contextlib.contextmanager
def unreadable(name: str, where: str) -> Iterator[None]:
    """Raises SampleError for whatever a decoder raises: OSError, SyntaxError, struct.error, ValueError, ..."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise SampleError(f"image {shown(name)} cannot be read: {reason(error)}", where) from error


def decode(data: bytes, most_pixels: int) -> Image.Image:
    """The first frame, decoded; of a truncated file, too, if nearly all of it is there: `info["truncated"]` says so.

    Raises ImageRefused for what is no image or has too many pixels, and what decoders raise, which is all kinds.
    """
    image = open_image(data, most_pixels)
    try:
        image.load()
    except OSError as error:
        if "truncated" not in str(error):
            raise
        from .kinds import load_truncated  # for such files alone

        return load_truncated(image, data)
    return image


def open_image(data: bytes, most_pixels: int) -> Image.Image:
    """The image, yet to be decoded; raises ImageRefused."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"it has more than {most_pixels:,} pixels; save it smaller") from error
    except UnidentifiedImageError:
        from .kinds import open_by_plugin  # for such files alone

        image = open_by_plugin(data)
    if image.width * image.height > most_pixels:
        raise ImageRefused(f"it has {image.width} x {image.height} pixels, more than {most_pixels:,}; save it smaller")
    return image


def name_of(ref: Ref) -> str:
    """An image as messages call it."""
    return ref if isinstance(ref, str) else f"of {len(ref)} bytes"


def hash_of(ref: Ref) -> np.uint64:
    """64 bits of a name or of an image's bytes: among a million, two are alike once in forty million data sets."""
    data = ref if isinstance(ref, bytes) else ref.encode(errors="surrogatepass")
    return np.frombuffer(hashlib.blake2b(data, digest_size=8).digest(), "<u8")[0]


def likeness(name: str) -> str:
    """What spellings of a file name have in common: of macOS (Unicode form), Windows (slashes), either's capitals."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.replace("\\", "/")).casefold())
