"""Where images come from: a folder, a zip that is read in place, or the sample itself.

A sample names its images, or holds them (bytes of an image file, as parquet has them); either is a `Ref`.
"""

import contextlib
import hashlib
import io
import mmap
import os
import posixpath
import re
import struct
import sys
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from model.errors import DataError, SampleError, check_fetched, reason, shown
from model.storage import is_regular, read_at
from model.vision import preprocess

from .index import DataFile, open_index

Ref = str | bytes

MOST_COMMAS = 8  # of a name
MAX_PIXELS = 90_000_000  # a larger image is refused: a few bytes of file can unfold to gigabytes
MAX_BYTES = 256 * 2**20  # likewise a larger file in a zip


MOST_MISSING = 0.05  # share of an image that may be missing: of its pixels or rows
PLUGINS = {"HEIC": ("HEIF", "pillow_heif.HeifImagePlugin", "pillow-heif"), "JPEG XL": ("JXL", "pillow_jxl", "pillow-jxl-plugin")}
CLOSED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them by name alone; EPS is a program for Ghostscript
IMAGE_SUFFIXES = {".heic", ".heif", ".hif", ".jxl", ".mpo"} | {
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in CLOSED
}  # fmt: skip
FORMATS = ["JPEG", "PNG", "WEBP", *(kind for kind in Image.OPEN if kind not in CLOSED)]  # tried in this order
KINDS = {  # how a file begins that no decoder took, and what it is
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC", rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftypavi|....jP  ": "an image, but damaged, cut short or of a variant that Pillow does not read",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ": "a video, not an image",
    rb"%PDF|%!PS|\xc5\xd0\xd3\xc6": "a PDF or PostScript document; save its pages as PNG",
    rb"\s*(<[?!][^>]*>\s*)*<svg": "an SVG drawing; save it as PNG",
    rb"(?i)\s*<(!doctype html|html|head|body)": "a web page, perhaps an error that was saved in place of the image",
    rb"version https://git-lfs": "a git-lfs pointer, not the image; git lfs pull fetches it",
    rb"[\t\n\r -~\x80-\xff]+$": "text, not an image",
}  # fmt: skip

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # one comment may be as long as all together
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our own limit stands below


class ImageSource:
    """Images by name; a subclass says where they lie. What a sample holds itself is decoded here."""

    path: str | Path  # of them all

    def load(self, ref: Ref, where: str = "", notes: list[SampleError] | None = None) -> Image.Image:
        """The decoded image; raises SampleError. `notes` is told of a file that ends early."""
        if isinstance(ref, bytes):
            return load_image(io.BytesIO(ref), f"of {len(ref)} bytes", where, notes)
        return load_image(self.open(ref, where), ref, where, notes)

    def pixels(self, ref: Ref, where: str = "", notes: list[SampleError] | None = None) -> torch.Tensor:
        """What the model sees of the image, uint8 [3, 224, 224]; as `load` otherwise."""
        image = self.load(ref, where, notes)
        try:
            return preprocess(image)
        except MemoryError:
            raise
        except Exception as error:  # as decoders do: all kinds
            raise SampleError(f"image {shown(ref if isinstance(ref, str) else 'of the row')} cannot be converted: {reason(error)}", where) from error

    def read(self, name: str, where: str = "") -> bytes:
        """The bytes of the image's file; raises SampleError."""
        file = self.open(name, where)
        return file.read_bytes() if isinstance(file, Path) else file.read()

    def signature(self, ref: Ref, where: str = "") -> int:
        """A number other than 0 that changes with the file behind a name; raises SampleError when there is none."""
        return zlib.crc32(ref if isinstance(ref, bytes) else self.state(ref, where)) + 1

    def find(self, name: str, where: str) -> Any:
        """The one place of that name or, where there is none, of that name in another spelling; raises SampleError."""
        places = self.lookup(name, where)
        if not places and len(places := self.lookup(name, where, loosely=True)) == 1:
            tell_once(f"notice: image {shown(name)}, and others perhaps, found in another spelling in {self.path}"
                      " (Unicode form, slashes, capitals)")  # fmt: skip
        if len(places) != 1:
            problem = f"could be any of {len(places)} files" if places else "is not"
            raise SampleError(f"image {shown(name)} {problem} in {self.path}", where)
        return places[0]

    def lookup(self, name: str, where: str, loosely: bool = False) -> list:
        """The places of that name, in other spellings, too, if `loosely`. Raises SampleError for what can be no name."""
        raise NotImplementedError

    def open(self, name: str, where: str) -> Path | BinaryIO:
        """The image's file; raises SampleError."""
        raise NotImplementedError

    def state(self, name: str, where: str) -> bytes:
        """Bytes that change with the file; raises SampleError when there is none."""
        raise NotImplementedError


class FolderImages(ImageSource):
    """Images in a folder and its subfolders. No name leads out of it; links in it may."""

    def __init__(self, folder: str | Path):
        self.path = os.path.abspath(folder)
        self._inside = os.path.join(self.path, ""), os.path.join(os.path.realpath(folder), "")
        self._listings: dict[str, list[str]] = {}  # names by their likeness, of folders where a name was not found

    def lookup(self, name: str, where: str, loosely: bool = False) -> list[str]:
        try:  # os.path is several times faster here than Path
            path = os.path.normpath(os.path.join(self.path, on_disk(name.replace("\\", "/") if loosely else name)))
            if not os.path.join(path, "").startswith(self._inside) or (loosely and PureWindowsPath(name).drive):
                raise SampleError(f"image {shown(name)} leads out of {self.path}", where)
            return [found for found in (self._alike(path) if loosely else [path]) if is_file(found)]
        except SampleError:
            raise
        except (OSError, ValueError) as error:  # too long, a NUL, half a character, a circle of links
            raise SampleError(f"image {shown(name)} is no file name: {reason(error)}", where) from error

    def _alike(self, path: str) -> list[str]:
        """Paths below the folder that differ from this one in spelling alone."""
        parts = os.path.relpath(path, self.path).split(os.sep)
        found = [self.path]
        for part in parts:
            found = [os.path.join(folder, name) for folder in found for name in self._names_like(folder, disk_likeness(part))]
        return found + [os.path.join(self.path, "\\".join(parts))] * (len(parts) > 1)  # as some unpack a zip of Windows

    def _names_like(self, folder: str, wanted: str) -> list[str]:
        if folder not in self._listings:
            try:
                self._listings[folder] = sorted(os.listdir(folder), key=disk_likeness)
            except OSError:  # no folder, or none that may be listed
                return []
        names = self._listings[folder]
        return names[bisect_left(names, wanted, key=disk_likeness) : bisect_right(names, wanted, key=disk_likeness)]

    def open(self, name: str, where: str) -> Path:
        return Path(self.find(name, where))

    def state(self, name: str, where: str) -> bytes:
        status = os.stat(self.find(name, where))
        return f"{name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogatepass")


def is_file(path: str) -> bool:
    """Whether there is a regular file, by whatever links; raises OSError for what can be no path."""
    try:
        return is_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return False


class ZipImages(DataFile, ImageSource):
    """Images in a zip or a tar, read where they are: an index holds 40 bytes an image, and an image costs two reads.

    When all lie in one folder of it, as in the published ones, names may leave that folder out. Reads do not move
    a file position, so forked processes may share the open file. Raises DataError for what is no zip.
    """

    RECORD = np.dtype([("like", "<u8"), ("name", "<u8"), ("offset", "<i8"), ("size", "<u4"), ("unpacked", "<u4"), ("crc", "<u4"),
                       ("method", "<u4")])  # fmt: skip
    LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field (APPNOTE.TXT 4.3.7)

    def _open(self) -> None:
        try:
            self._records, extra = open_index(self.path, self.RECORD, self._read_directory)
            self._root = extra["root"]
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (open for the life of the process)
        except (OSError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile, tarfile.TarError) as error:  # all by damaged ones
            check_fetched(self.path)
            raise DataError(f"{self.path} is no readable {self.path.suffix[1:]} of images: {error}") from error

    def _read_directory(self) -> tuple[np.ndarray, dict]:
        entries = dict(zip_entries(self.path) if self.path.suffix.lower() == ".zip" else tar_entries(self.path))
        names = [name for name in entries if not any(part.startswith((".", "__MACOSX")) for part in posixpath.normpath(name).split("/"))]
        if not names:
            raise DataError(f"{self.path} holds no files")
        folders = {os.path.dirname(name.replace("\\", "/") if name.isascii() else name)
                   for name in [name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES] or names}  # fmt: skip
        folder = os.path.commonpath(folders) if "" not in folders else ""
        most = 2**32 - 1  # larger ones are refused when they are wanted
        records = np.array([(name_hash(likeness(name)), name_hash(name), offset, min(most, size), min(most, unpacked), crc, method)
                            for name, (offset, size, unpacked, crc, method) in entries.items()], self.RECORD)  # fmt: skip
        return np.sort(records, order="like"), {"root": f"{folder}/" if folder else ""}

    def open(self, name: str, where: str) -> BinaryIO:
        """The unpacked file in memory, its checksum compared; raises SampleError."""
        record, problem, kind = self.find(name, where), None, self.path.suffix[1:]
        if record["unpacked"] > MAX_BYTES or record["size"] > MAX_BYTES:
            raise SampleError(f"image {shown(name)} in {self.path} unfolds to {record['unpacked']:,} bytes, more than {MAX_BYTES:,}", where)
        try:
            offset, size, most, method = int(record["offset"]), int(record["size"]), int(record["unpacked"]) + 1, int(record["method"])
            signature = b"PK\x03\x04"
            if method != IN_TAR:
                signature, name_size, extra_size = self.LOCAL_HEADER.unpack(read_at(self._file, self.LOCAL_HEADER.size, offset))
                offset += self.LOCAL_HEADER.size + name_size + extra_size
            data = read_at(self._file, size, offset)
            if signature != b"PK\x03\x04" or len(data) < size:
                problem = f"the {kind} is truncated"
            elif method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)
            elif method == zipfile.ZIP_BZIP2:
                import bz2  # which not every Python was built with, like lzma

                data = bz2.BZ2Decompressor().decompress(data, most)
            elif method == zipfile.ZIP_LZMA:
                import lzma

                # With the head of a .lzma file of unknown size.
                data = lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data[4:9] + b"\xff" * 8 + data[9:], most)
            elif method not in (zipfile.ZIP_STORED, IN_TAR):
                problem = f"it is {'encrypted' if method == ENCRYPTED else f'packed by method {method}'}; unpack the zip and name the folder"
        except ImportError as error:
            problem = str(error)
        except MemoryError:
            raise
        except Exception as error:  # OSError, EOFError, struct.error, zlib.error, lzma.LZMAError
            problem = f"the {kind} is truncated: {error}"
        if problem is None and (len(data) != record["unpacked"] or (method != IN_TAR and zlib.crc32(data) != record["crc"])):
            problem = "its checksum is wrong"
        if problem:
            raise SampleError(f"image {shown(name)} in {self.path} cannot be read: {problem}", where)
        return io.BytesIO(data)

    def state(self, name: str, where: str) -> bytes:
        record = self.find(name, where)
        return record.tobytes() + (repr(self._state).encode() if record["method"] == IN_TAR else b"")  # a tar has no checksums

    def lookup(self, name: str, where: str, loosely: bool = False) -> list[np.void]:
        for full in (folder + spelled for spelled in spellings(name, loosely) for folder in ("", self._root)):
            like, exact = name_hash(likeness(full)), name_hash(full)
            found = []
            for place in range(int(np.searchsorted(self._records["like"], like)), len(self._records)):
                if self._records[place]["like"] != like:
                    break
                if loosely or self._records[place]["name"] == exact:
                    found.append(self._records[place])
            if found:
                return found
        return []


IN_TAR, ENCRYPTED = 2**16, 2**16 + 1  # in place of a zip's method


def zip_entries(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of the files in a zip, with offset, packed and unpacked size, checksum and method. Of entries of one name the
    last counts, as everywhere."""
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if not entry.is_dir():
                method = ENCRYPTED if entry.flag_bits & 1 else entry.compress_type
                yield posixpath.normpath(entry.filename), (entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, method)


def tar_entries(path: Path) -> dict[str, tuple[int, ...]]:
    """The same for a tar that is not packed. A hard link is the file before it that it names."""
    found: dict[str, tuple[int, ...]] = {}
    with tarfile.open(path, "r:", encoding="utf-8") as file:
        while entry := file.next():
            file.members.clear()  # which the library would keep, a kilobyte each
            name, target = posixpath.normpath(entry.name), posixpath.normpath(entry.linkname)
            if entry.isreg() and not entry.issparse():
                found[name] = (entry.offset_data, entry.size, entry.size, 0, IN_TAR)
            elif entry.islnk() and target in found:
                found[name] = found[target]
    return found


def spellings(name: str, loosely: bool) -> Iterator[str]:
    """What a file may be called in a zip: by its name; without "./"; and, since many write names in UTF-8 or a Chinese or
    Japanese code page without saying so, in what zipfile makes of those."""
    yield name
    yield (plain := posixpath.normpath(name.replace("\\", "/") if loosely else name))
    for form in () if plain.isascii() else (plain, unicodedata.normalize("NFD", plain)):
        for page in ("utf-8", "cp950", "cp936", "cp932"):
            with contextlib.suppress(UnicodeError):
                yield form.encode(page).decode("cp437")


def likeness(name: str) -> str:
    """What spellings of a file name have in common: those of macOS (Unicode form), Windows (slashes) and either's capitals."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.replace("\\", "/")).casefold())


def disk_likeness(name: str) -> str:
    """The likeness of a name as the system gives it, which is UTF-8 whatever the locale."""
    return likeness(name if name.isascii() else os.fsencode(name).decode(errors="surrogateescape"))


def name_hash(name: str) -> np.uint64:
    """64 bits of a file name in a zip: among a million names, two are alike once in forty million data sets."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


class ManyImages(ImageSource):
    """Several folders and zips; a name has to be in one of them alone."""

    def __init__(self, sources: list[ImageSource]):
        self.sources, self.path = sources, ", ".join(str(source.path) for source in sources)

    def lookup(self, name: str, where: str, loosely: bool = False) -> list[ImageSource]:
        found, problem = [], None
        for source in self.sources:
            try:
                found += [source for _ in source.lookup(name, where, loosely)]
            except SampleError as error:  # an absolute name leads out of all folders but one
                problem = error
        if problem and not found:
            raise problem
        return found

    def open(self, name: str, where: str) -> Path | BinaryIO:
        return self.find(name, where).open(name, where)

    def state(self, name: str, where: str) -> bytes:
        return self.find(name, where).state(name, where)


class NoImages(ImageSource):
    """The source of a run that was given no folder: every image that a sample does not hold is missing."""

    def __init__(self, folder: str | Path):
        self.folder = folder

    def open(self, name: str, where: str) -> Path:
        raise SampleError(f"image {shown(name)}: there is no folder {self.folder}", where)

    def state(self, name: str, where: str) -> bytes:
        raise SampleError(f"image {shown(name)}: there is no folder {self.folder}", where)


def load_image(file: Path | BinaryIO, name: str, where: str = "", notes: list[SampleError] | None = None) -> Image.Image:
    """Opens and decodes one file, within MAX_PIXELS; raises SampleError with the name and the reason. `notes` is told of a
    file that ends early."""
    try:
        if isinstance(file, Path) and not is_regular(file):
            raise ImageRefused("it is a folder, a pipe or a device")
        image, cut = decode(file.read_bytes() if isinstance(file, Path) else file.read(), MAX_PIXELS)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ValueError, ...
        raise SampleError(f"image {shown(name)} cannot be read: {reason(error)}", where) from error
    if cut and notes is not None:
        notes.append(SampleError(f"image {shown(name)} is truncated; used, for nearly all of it is there", where))
    return image


def open_images(paths: str | Path) -> ImageSource:
    """The images in a folder or a zip, or in several with commas between.

    A single missing folder is no error yet: text-only data and parquet need none.
    """
    paths = str(paths)
    names = [name for name in split_names(paths, os.path.exists) if name]
    if not names:
        return NoImages(paths)
    sources = [_open_one(Path(name), len(names) == 1) for name in names]
    return sources[0] if len(sources) == 1 else ManyImages(sources)


def _open_one(path: Path, may_miss: bool) -> ImageSource:
    if path.is_dir():
        return FolderImages(path)
    if path.suffix.lower() in (".zip", ".tar") and path.is_file():
        return ZipImages(path)
    if path.exists():
        packed = f": mkdir images && tar -xf '{path}' -C images" if ".tar." in path.name or path.suffix == ".tgz" else ""
        raise DataError(f"{path} is no folder of images, no .zip and no .tar{packed}")
    if not may_miss:
        raise DataError(f"{path} does not exist; a folder or a .zip of images is wanted")
    return NoImages(path)


def on_disk(name: str) -> str:
    """A name in the data as this process has to spell it for the system to meet the UTF-8 name, whatever the locale."""
    return os.fsdecode(name.encode(errors="surrogateescape"))


_told = mmap.mmap(-1, 1)  # shared with the loader processes that are forked


def tell_once(text: str) -> None:
    """Says what one case of is enough to know, once in a run."""
    if not _told[0]:
        _told[0] = 1
        print(text, file=sys.stderr, flush=True)


class ImageRefused(Exception):
    """Says in words of ours why a file is not taken."""

    strerror = property(str)  # which stand without the exception's name, see `errors.reason`


def image_files(folder: Path) -> list[Path]:
    """The files of a folder that are named like images, in order; hidden ones are companions of others."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def decode(data: bytes, most_pixels: int) -> tuple[Image.Image, bool]:
    """The first frame, decoded, and whether the file ends early: then nearly all of it is there.

    Raises ImageRefused, and what decoders raise, which is all kinds.
    """
    image, cut = open_image(data, most_pixels), False
    try:
        image.load()
    except OSError as error:
        if "truncated" not in str(error):
            raise
        if jpeg := image.format in ("JPEG", "MPO"):
            image = open_image(data + b"\xff\xd9", most_pixels)  # with an end mark; what did not come is grey
        else:
            image.tile = []  # its decoder has left the rows that came; the others are as they were filled
        image.load()
        filling = (127, 128) if jpeg else (0, image.info.get("transparency", 0) if image.format == "GIF" else 0)
        blank = np.isin(np.asarray(image).reshape(image.height, image.width, -1), filling)
        missing = blank.all(2).mean() if jpeg else blank.all(1).mean(0).max()  # a JPEG comes in blocks, others in rows, perhaps a channel at a time
        if missing > MOST_MISSING or (jpeg and lacks_scans(image, data)):
            raise ImageRefused("it is cut short, and too much of it is missing") from error
        cut = True
    return image, cut


def open_image(data: bytes, most_pixels: int) -> Image.Image:
    """The image, not yet decoded; raises ImageRefused for what is none or has too many pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"it has more than {most_pixels:,} pixels; save it smaller") from error
    except UnidentifiedImageError as error:  # its own words are an address in memory
        kind = next((kind for start, kind in KINDS.items() if re.match(start, data[:1000], re.DOTALL)), "of no known kind of image")
        format, module, package = PLUGINS.get(kind, ("", "", ""))
        if not package:
            raise ImageRefused(f"it is {kind if data else 'empty'}") from error
        if find_spec(module.partition(".")[0]) is None:
            raise ImageRefused(f"it is {kind}, which {package} reads: pip install {package}, or save it as JPEG") from error
        import_module(module)  # tells Pillow
        image = Image.open(io.BytesIO(data), formats=[format])
    if image.width * image.height > most_pixels:
        raise ImageRefused(f"it has {image.width} x {image.height} pixels, more than {most_pixels:,}; save it smaller")
    return image


def lacks_scans(image: Image.Image, data: bytes) -> bool:
    """Whether a progressive JPEG ends before a scan with the last bits of the highest frequencies (ITU-T T.81, B.2.3) begins."""
    scan = data[data.rfind(b"\xff\xda") + 4 :]  # how many components, two bytes of each; first and last frequency; bits
    last_frequency, bits = (scan + bytes(11))[2 * scan[0] + 2 :][:2] if scan else (0, 0)
    return "progressive" in image.info and (last_frequency != 63 or bits & 15 != 0)


def split_names(names: str, leads: Callable[[str], bool]) -> list[str]:
    """Names with commas between. What stands between two commas is a name of its own, unless it leads nowhere and does so
    together with what follows it."""
    if leads(names):
        return [names]
    parts, found = names.split(","), []
    while parts:
        ends = range(1, min(len(parts), MOST_COMMAS + 1) + 1)
        end = next((end for end in ends if leads(",".join(parts[:end]).strip())), 1)
        found.append(",".join(parts[:end]).strip())
        parts = parts[end:]
    return found
