"""Where pictures come from: a folder, a zip that is read in place, or the sample itself.

A sample names its pictures, or holds them (bytes of a picture file, as parquet has them); either is a `Ref`.
"""

import contextlib
import hashlib
import io
import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from model.errors import check_fetched
from model.vision import preprocess

from .decode import ImageRefused, decode
from .errors import DataError, SampleError, reason, shown
from .files import is_regular, read_at
from .index import DataFile, open_index
from .sources import split_names

Ref = str | bytes

MAX_PIXELS = 90_000_000  # a larger picture is refused: a few bytes of file can unfold to gigabytes
MAX_BYTES = 256 * 2**20  # likewise a larger file in a zip


class ImageSource:
    """Pictures by name; a subclass says where they lie. What a sample holds itself is decoded here."""

    def load(self, ref: Ref, where: str = "", notes: list[SampleError] | None = None) -> Image.Image:
        """The decoded picture; raises SampleError. `notes` is told of a file that ends early."""
        if isinstance(ref, bytes):
            return load_picture(io.BytesIO(ref), f"of {len(ref)} bytes", where, notes)
        return load_picture(self.open(ref, where), ref, where, notes)

    def pixels(self, ref: Ref, where: str = "", notes: list[SampleError] | None = None) -> torch.Tensor:
        """What the model sees of the picture, uint8 [3, 224, 224]; as `load` otherwise."""
        picture = self.load(ref, where, notes)
        try:
            return preprocess(picture)
        except MemoryError:
            raise
        except Exception as error:  # as decoders do: all kinds
            raise SampleError(f"picture {shown(ref if isinstance(ref, str) else 'of the row')} cannot be converted: {reason(error)}", where) from error

    def read(self, name: str, where: str = "") -> bytes:
        """The bytes of the picture's file; raises SampleError."""
        file = self.open(name, where)
        return file.read_bytes() if isinstance(file, Path) else file.read()

    def signature(self, ref: Ref, where: str = "") -> int:
        """A number other than 0 that changes with the file behind a name; raises SampleError when there is none."""
        return zlib.crc32(ref if isinstance(ref, bytes) else self.state(ref, where)) + 1

    def holds(self, name: str) -> bool:
        """Whether there is a picture of that name."""
        try:
            self.state(name, "")
        except SampleError:
            return False
        return True

    def open(self, name: str, where: str) -> Path | BinaryIO:
        """The picture's file; raises SampleError."""
        raise NotImplementedError

    def state(self, name: str, where: str) -> bytes:
        """Bytes that change with the file; raises SampleError when there is none."""
        raise NotImplementedError


class FolderImages(ImageSource):
    """Pictures in a folder and its subfolders. No name leads out of it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        self._inside = os.path.join(self.folder, "")

    def open(self, name: str, where: str) -> Path:
        """The path of the picture; raises SampleError."""
        try:  # os.path is several times faster here than Path
            path = os.path.realpath(os.path.join(self.folder, name))
            inside = os.path.join(path, "").startswith(self._inside)
            found = inside and is_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            found = False
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, half a character, a circle of links
            raise SampleError(f"picture {shown(name)} is no file name: {reason(error)}", where) from error
        if not inside:
            raise SampleError(f"picture {shown(name)} leads out of {self.folder}", where)
        if not found:
            raise SampleError(f"picture {shown(name)} is not in {self.folder}", where)
        return Path(path)

    def state(self, name: str, where: str) -> bytes:
        status = self.open(name, where).stat()
        return f"{name}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogatepass")


class ZipImages(DataFile, ImageSource):
    """Pictures in a zip, read where they are: an index holds 32 bytes a picture, and a picture costs two reads.

    When all lie in one folder of the zip, as in the published ones, names may leave that folder out. Reads do not move
    a file position, so forked processes may share the open file. Raises DataError for what is no zip.
    """

    RECORD = np.dtype([("name", "<u8"), ("offset", "<i8"), ("size", "<u4"), ("unpacked", "<u4"), ("crc", "<u4"),
                       ("method", "<u4")])  # fmt: skip
    LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field (APPNOTE.TXT 4.3.7)

    def _open(self) -> None:
        try:
            self._records, extra = open_index(self.path, self.RECORD, self._read_directory)
            self._root = extra["root"]
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (open for the life of the process)
        except (OSError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile) as error:  # all by damaged ones
            check_fetched(self.path)
            raise DataError(f"{self.path} is no readable zip of pictures: {error}") from error

    def _read_directory(self) -> tuple[np.ndarray, dict]:
        with zipfile.ZipFile(self.path) as file:  # of entries of one name the last counts, as everywhere
            entries = {entry.filename: entry for entry in file.infolist()
                       if not entry.is_dir() and not entry.filename.startswith("__MACOSX/")}  # fmt: skip
        if not entries:
            raise DataError(f"{self.path} holds no files")
        folder = os.path.commonpath([os.path.dirname(name) for name in entries]) if "" not in map(os.path.dirname, entries) else ""
        most = 2**32 - 1  # larger ones are refused when they are wanted
        records = np.array([(name_hash(entry.filename), entry.header_offset, min(most, entry.compress_size),
                             min(most, entry.file_size), entry.CRC, entry.compress_type if not entry.flag_bits & 1 else 99)
                            for entry in entries.values()], self.RECORD)  # fmt: skip
        return np.sort(records, order="name"), {"root": f"{folder}/" if folder else ""}

    def open(self, name: str, where: str) -> BinaryIO:
        """The unpacked file in memory, its checksum compared; raises SampleError."""
        record, problem = self._find(name, where), None
        offset, size = int(record["offset"]), int(record["size"])
        if record["unpacked"] > MAX_BYTES:
            raise SampleError(f"picture {shown(name)} unfolds to {record['unpacked']:,} bytes, more than {MAX_BYTES:,}", where)
        try:
            header = read_at(self._file, self.LOCAL_HEADER.size, offset)
            signature, name_size, extra_size = self.LOCAL_HEADER.unpack(header)
            begin = offset + self.LOCAL_HEADER.size + name_size + extra_size
            data = read_at(self._file, size, begin)
            if signature != b"PK\x03\x04" or len(data) < size:
                problem = "the zip is torn"
            elif record["method"] == zipfile.ZIP_DEFLATED:
                unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
                data = unpacker.decompress(data, int(record["unpacked"]) + 1)
            elif record["method"] != zipfile.ZIP_STORED:
                problem = "it is packed by another method than deflate, or encrypted"
        except (OSError, struct.error, zlib.error) as error:
            problem = f"the zip is torn: {error}"
        if problem is None and (len(data) != record["unpacked"] or zlib.crc32(data) != record["crc"]):
            problem = "its checksum is wrong"
        if problem:
            raise SampleError(f"picture {shown(name)} in {self.path} cannot be read: {problem}", where)
        return io.BytesIO(data)

    def state(self, name: str, where: str) -> bytes:
        return self._find(name, where).tobytes()

    def _find(self, name: str, where: str) -> np.void:
        for full in (folder + spelled for spelled in spellings(name) for folder in ("", self._root)):
            value = name_hash(full)
            place = int(np.searchsorted(self._records["name"], value))
            if place < len(self._records) and self._records[place]["name"] == value:
                return self._records[place]
        raise SampleError(f"picture {shown(name)} is not in {self.path}", where)


def spellings(name: str) -> Iterator[str]:
    """What a file may be called in a zip: by its name; without "./"; and, since Windows writes names in a code page without
    saying so, in what zipfile makes of the Chinese and Japanese ones."""
    yield name
    yield (plain := posixpath.normpath(name))
    if not plain.isascii():
        for page in ("cp950", "cp936", "cp932"):
            with contextlib.suppress(UnicodeError):
                yield plain.encode(page).decode("cp437")


def name_hash(name: str) -> np.uint64:
    """64 bits of a file name in a zip: among a million names, two are alike once in forty million data sets."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


class ManyImages(ImageSource):
    """Several folders and zips; a name has to be in one of them alone."""

    def __init__(self, sources: list[ImageSource]):
        self.sources = sources

    def open(self, name: str, where: str) -> Path | BinaryIO:
        return self._source(name, where).open(name, where)

    def state(self, name: str, where: str) -> bytes:
        return self._source(name, where).state(name, where)

    def _source(self, name: str, where: str) -> ImageSource:
        holding = [source for source in self.sources if source.holds(name)]
        if len(holding) > 1:
            raise SampleError(f"picture {shown(name)} is in {len(holding)} of the places of pictures", where)
        return holding[0] if holding else self.sources[0]  # which then says what is wrong


class NoImages(ImageSource):
    """The source of a run that was given no folder: every picture that a sample does not hold is missing."""

    def __init__(self, folder: str | Path):
        self.folder = folder

    def open(self, name: str, where: str) -> Path:
        raise SampleError(f"picture {shown(name)}: there is no folder {self.folder}", where)

    def state(self, name: str, where: str) -> bytes:
        raise SampleError(f"picture {shown(name)}: there is no folder {self.folder}", where)


def load_picture(file: Path | BinaryIO, name: str, where: str = "", notes: list[SampleError] | None = None) -> Image.Image:
    """Opens and decodes one file, within MAX_PIXELS; raises SampleError with the name and the reason. `notes` is told of a
    file that ends early."""
    try:
        if isinstance(file, Path) and not is_regular(file):
            raise ImageRefused("it is a folder, a pipe or a device")
        picture, cut = decode(file.read_bytes() if isinstance(file, Path) else file.read(), MAX_PIXELS)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ValueError, ...
        raise SampleError(f"picture {shown(name)} cannot be read: {reason(error)}", where) from error
    if cut and notes is not None:
        notes.append(SampleError(f"picture {shown(name)} is truncated; used, for nearly all of it is there", where))
    return picture


def open_images(paths: str | Path) -> ImageSource:
    """The pictures in a folder or a zip, or in several with commas between.

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
    if path.suffix.lower() == ".zip" and path.is_file():
        return ZipImages(path)
    if path.exists():
        raise DataError(f"{path} is no folder of pictures and no .zip")
    if not may_miss:
        raise DataError(f"{path} does not exist; a folder or a .zip of pictures is wanted")
    return NoImages(path)
