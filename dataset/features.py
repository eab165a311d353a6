"""The frozen encoder's output of every image, computed once and kept on disk.

Legend: M different images of a data set, P patch vectors of width W each.

A cache is a folder of a few files. An image has `views` slots (1 without tiles); its first is its number among the M times views:

    meta.json     what the features depend on; another encoder, number format or list of images makes a new cache
    names.npy     uint64 [M], ascending: hashes of the images' names; an image's slot is the place of its hash
    features.bin  bf16 [M * views, P, W], sparse until filled
    filled.bin    one record a slot: what the image's file looked like, and a checksum of its features

A slot counts as filled when its record fits both the image's file and the features. So a kill at any instant, a
power cut, or two processes writing at once cost no more than encoding an image again, and a changed image is noticed.
"""

import contextlib
import json
import shutil
import sys
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from model.errors import DataError, SampleError
from model.storage import hold, write_atomically

from .images import Ref, hash_of
from .sources import Mixture

RECORD = np.dtype([("signature", "<i8"), ("checksum", "<u4")])  # a record of zeros is an empty slot
PREPROCESSING = 3  # raised when the same file gives other pixels than before


@dataclass(frozen=True)
class CacheKey:
    """What features depend on besides the images: the encoder's fingerprint, the number format it computes in, ..."""

    encoder: str
    dtype: str
    patches: int
    width: int
    preprocessing: int = PREPROCESSING
    tiles: int = 0  # of an image at most


class FeatureCache:
    """Features by slot: read by loader processes, written by the trainers of all ranks.

    Raises DataError when the disk cannot hold the features.
    """

    def __init__(self, folder: Path, key: CacheKey, samples: Mixture):
        self.folder, self.key = Path(folder), key
        lock = hold(self.folder / "lock", wait=True)  # ranks and other runs wait until the first has made the files
        try:
            self.rebuilt_because = self._prepare(samples)
            # Held open: should another run remake the files, this one continues with its own.
            paths = [self.folder / name for name in ("features.bin", "filled.bin")]
            self._files = [open(path, "r+b", buffering=0) for path in paths]  # noqa: SIM115
        finally:
            lock.release()
        self.broken: OSError | None = None  # the error that ended writing
        self._writer: ThreadPoolExecutor | None = None
        self._written: Future | None = None  # the last batch given to it

    @property
    def image_bytes(self) -> int:
        """Disk space of one image's features."""
        return self.views * self.key.patches * self.key.width * 2

    @property
    def views(self) -> int:
        """Slots of one image."""
        return 1 + self.key.tiles

    @property
    def count(self) -> int:
        """M."""
        return len(self._names)

    def slot_of(self, ref: Ref) -> int:
        """An image's first slot. One that was not in the data at the start gets another's, whose signature differs."""
        return int(np.searchsorted(self._names, hash_of(ref))) % max(1, self.count) * self.views

    def filled(self) -> int:
        """Number of slots that hold features."""
        return int(np.count_nonzero(self._filled["signature"]))

    def read(self, slot: int, signature: int) -> torch.Tensor | None:
        """Features bf16 [P, W]; None when the slot is empty, or filled from a file that looked otherwise."""
        record = self._filled[slot]
        if record["signature"] != signature:
            return None
        features = self._features[slot].copy()
        if zlib.crc32(features) != record["checksum"]:
            return None
        return torch.from_numpy(features).view(torch.bfloat16)

    def write(self, entries: tuple[tuple[int, int], ...], features: torch.Tensor) -> None:
        """Stores `features` bf16 [n, P, W] of n entries (slot, signature) in the background; `flush` waits for it.

        A disk that refuses ends the writing, not the run: `broken` then holds the error.
        """
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "features")
        self.flush()  # a disk slower than the encoder must not fill the memory
        self._written = self._writer.submit(self._write, entries, features)

    def flush(self) -> None:
        """Waits until everything given to `write` can be read."""
        if self._written is not None:
            self._written.result()

    def _write(self, entries: tuple[tuple[int, int], ...], features: torch.Tensor) -> None:
        if self.broken is not None:
            return
        try:
            # This thread waits for the device, not the training loop.
            for (slot, signature), row in zip(entries, features.cpu().view(torch.int16).numpy(), strict=True):
                record = np.array((signature, zlib.crc32(row)), dtype=RECORD)
                for file, data in zip(self._files, (row.tobytes(), record.tobytes()), strict=True):
                    file.seek(slot * len(data))
                    if file.write(data) != len(data):
                        raise OSError(f"{file.name}: the disk is full")
        except OSError as error:
            self.broken = error
            print(f"warning: the feature cache keeps no more ({error}); training continues", file=sys.stderr)

    def _prepare(self, samples: Mixture) -> str | None:
        """Maps the files, made from scratch unless they fit; returns why an older cache was thrown away, if one was."""
        old, meta = read_meta(self.folder), {"key": asdict(self.key), "data": samples.fingerprint()}
        problem, names = f"it was made with another encoder or format: {old.get('key')}" if old else None, None
        if old.get("key") == meta["key"]:
            try:
                self._map_files()
                names = self._names if old == meta else hash_images(samples)
                if np.array_equal(names, self._names):
                    self._write_meta(meta)
                    self._check_disk(self.count)
                    return None
                problem = "the images listed in the data are others"
            except (OSError, ValueError, EOFError) as error:  # cut by a sudden end, or by hand
                problem = f"its files were damaged ({error})"
        names = hash_images(samples) if names is None else names
        for name in ("meta.json", "features.bin", "filled.bin"):  # until all is in place again there is no cache
            (self.folder / name).unlink(missing_ok=True)
        self._check_disk(len(names))
        write_atomically(self.folder / "names.npy", lambda file: np.save(file, names))  # the old one may be mapped
        for name, size in (("features.bin", self.image_bytes), ("filled.bin", self.views * RECORD.itemsize)):
            with open(self.folder / name, "wb") as file:
                file.truncate(max(1, len(names)) * size)
        self._write_meta(meta)
        self._map_files()
        return problem

    def _write_meta(self, meta: dict) -> None:
        write_atomically(self.folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=2).encode()))

    def _check_disk(self, count: int) -> None:
        path = self.folder / "features.bin"
        present = path.stat().st_blocks * 512 if path.exists() else 0
        needed, free = count * self.image_bytes - present, shutil.disk_usage(self.folder).free
        if needed > free:
            raise DataError(f"the features of {count:,} images take {needed / 1e9:.1f} GB more than now; {self.folder}"
                            f" has {free / 1e9:.1f} GB free. Name a larger disk with --checkpoint_dir, or train without"
                            " --cache_features")  # fmt: skip

    def _map_files(self) -> None:
        self._names = np.load(self.folder / "names.npy", mmap_mode="r").view(np.ndarray)
        shape = (max(1, self.count) * self.views, self.key.patches, self.key.width)
        self._features = np.memmap(self.folder / "features.bin", np.int16, "r", shape=shape)
        self._filled = np.memmap(self.folder / "filled.bin", RECORD, "r", shape=shape[:1])

    def __getstate__(self) -> dict:
        # A reader in another process maps the files itself: pickled, a map would become a copy.
        return {"folder": self.folder, "key": self.key}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map_files()


def read_meta(folder: Path) -> dict:
    """What meta.json of a cache holds; nothing where there is none."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return {}
    if isinstance(meta, dict) and isinstance(meta.get("key"), dict):
        meta["key"].setdefault("tiles", 0)  # which older ones do not hold
    return meta if isinstance(meta, dict) else {}


def format_of(folder: Path, encoder: str) -> str | None:
    """The number format in which the encoder `encoder` computed the cache in `folder`; None without such a cache."""
    key = read_meta(folder).get("key", {})
    return key.get("dtype") if key.get("encoder") == encoder else None


def hash_images(samples: Mixture) -> np.ndarray:
    """Hashes uint64 [M] of the different images, ascending. A sample that cannot be read has none."""
    found = set()
    for index in range(len(samples)):
        with contextlib.suppress(SampleError):
            found.update(int(hash_of(ref)) for ref in samples[index].images)
    return np.sort(np.fromiter(found, np.uint64, len(found)))
