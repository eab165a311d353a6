"""Images in a zip or a tar, read in place."""

import contextlib
import os
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from model.errors import DataError, check_fetched

from .derived import read_index
from .images import IMAGE_SUFFIXES, MAX_BYTES, ImageRefused, hash_of, likeness

IN_TAR, ENCRYPTED = 2**16, 2**16 + 1  # in place of a zip's method


class Archive:
    """Images in a zip or a tar, read where they are, by an index of 96 bytes an image that processes share.

    When all lie in one folder of it, as in the published ones, names may leave that folder out. Raises DataError for
    what is no zip and no tar.
    """

    ENTRY = np.dtype([("like", "<u8"), ("name", "<u8"), ("offset", "<i8"), ("size", "<u8"), ("unpacked", "<u8"),
                      ("crc", "<u4"), ("method", "<u4")])  # fmt: skip
    HEADER = struct.Struct("<4s22xHH")  # in a zip: signature, lengths of name and extra field (APPNOTE.TXT 4.3.7)
    missing = False

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._entries = read_index(self.path, self.ENTRY, self._write_index)
            self._time = self.path.stat().st_mtime_ns
        except (OSError, ValueError, NotImplementedError, struct.error, zipfile.BadZipFile, tarfile.TarError) as error:
            check_fetched(self.path)
            raise DataError(f"{self.path} is no readable {self.path.suffix[1:]} of images: {error}") from error

    def __reduce__(self):
        return Archive, (self.path,)  # another process maps the index itself

    def _write_index(self, index: BinaryIO) -> None:
        """An ENTRY for every file by its name, and one by its name without the folder that holds all images."""
        entries = dict(zip_entries(self.path) if self.path.suffix.lower() == ".zip" else tar_entries(self.path))
        visible = [name for name in entries if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]
        if not visible:
            raise DataError(f"{self.path} holds no files")
        images = [name for name in visible if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        folders = {posixpath.dirname(name) for name in images or visible}
        root = posixpath.commonpath(folders) + "/" if "" not in folders else ""
        names = [(name, name) for name in entries]
        names += [(name.removeprefix(root), name) for name in entries if root and name.startswith(root)]
        found = [(hash_of(likeness(alias)), hash_of(alias), *entries[name]) for alias, name in names]
        index.write(np.sort(np.array(found, self.ENTRY), order="like").tobytes())

    def lookup(self, name: str, loosely: bool) -> list[np.void]:
        """The entries of that name, in other spellings, too, if `loosely`."""
        name = posixpath.normpath(name.replace("\\", "/") if loosely else name)
        like = hash_of(likeness(name))
        begin, end = (int(np.searchsorted(self._entries["like"], like, side)) for side in ("left", "right"))
        found = [entry for entry in self._entries[begin:end] if loosely or entry["name"] == hash_of(name)]
        return list({int(entry["offset"]): entry for entry in found}.values())

    def read(self, entry: np.void) -> bytes:
        """The unpacked file, its checksum compared; raises ImageRefused, OSError."""
        method, size, unpacked = (int(entry[name]) for name in ("method", "size", "unpacked"))
        if max(size, unpacked) > MAX_BYTES:
            raise ImageRefused(f"it unfolds to {unpacked:,} bytes, more than {MAX_BYTES:,}")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, IN_TAR):
            kind = "encrypted" if method == ENCRYPTED else f"packed by method {method}"
            raise ImageRefused(f"it is {kind}; unpack the zip and name the folder")
        try:
            with open(self.path, "rb") as file:
                file.seek(int(entry["offset"]))
                if method != IN_TAR:
                    _, name_size, extra_size = self.HEADER.unpack(file.read(self.HEADER.size))
                    file.seek(name_size + extra_size, os.SEEK_CUR)
                data = file.read(size)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, unpacked + 1)
        except (struct.error, zlib.error) as error:
            raise ImageRefused(f"{self.path} is corrupt there ({error})") from error
        if len(data) != unpacked or (method != IN_TAR and zlib.crc32(data) != entry["crc"]):
            raise ImageRefused(f"its checksum in {self.path} is wrong")
        return data

    def state(self, entry: np.void, name: str) -> bytes:
        """Bytes that change with the file. A tar has no checksums: there it is the whole archive's time."""
        return entry.tobytes() + (b"%d" % self._time if entry["method"] == IN_TAR else b"")


def zip_entries(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names of the files in a zip, with offset, packed and unpacked size, checksum and method. Of entries of one name
    the last counts. A name in UTF-8 that the zip does not declare so, as macOS writes them, is read as what it is."""
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            if not entry.is_dir():
                method, name = ENCRYPTED if entry.flag_bits & 1 else entry.compress_type, entry.filename
                with contextlib.suppress(UnicodeError):
                    name = name if entry.flag_bits & 0x800 else name.encode("cp437").decode()
                sizes = entry.compress_size, entry.file_size
                yield posixpath.normpath(name), (entry.header_offset, *sizes, entry.CRC, method)


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
