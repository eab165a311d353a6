"""The frozen encoder's output of every image, computed once and kept on disk.

Legend: M different images of a data set, P patch vectors of width W each.

A cache is a folder of a few files, all addressed by an image's slot, its number among the M:

    meta.json     what the features depend on; another encoder, number format or list of images makes a new cache
    starts.npy    int64 [n + 1]: the images of sample i stand at places starts[i]..starts[i+1] of
    slots.npy     int32 [all images of all samples]: their slots
    features.bin  bf16 [M, P, W], sparse until filled
    filled.bin    one record a slot: what the image's file looked like, and a checksum of its features

A slot counts as filled when its record fits both the image's file and the features. So a kill at any instant, a
power cut, or two processes writing at once cost no more than encoding an image again, and a changed image is noticed.
"""

import hashlib
import json
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.errors import DataError, SampleError
from model.storage import hold, write_atomically

if TYPE_CHECKING:  # which imports this module
    from .sources import SampleSource

RECORD = np.dtype([("signature", "<i8"), ("checksum", "<u4")])  # a record of zeros is an empty slot
MOST_PENDING = 16  # batches that wait to be written
PREPROCESSING = 3  # raised when the same file gives other pixels than before


@dataclass(frozen=True)
class CacheKey:
    """What features depend on besides the images. `encoder` is the encoder's fingerprint, `dtype` what it computes in."""

    encoder: str
    dtype: str
    patches: int
    width: int
    preprocessing: int = PREPROCESSING


class FeatureCache:
    """Features by slot: read by loader processes, written by the trainers of all ranks.

    Raises DataError when the disk cannot hold the features.
    """

    def __init__(self, folder: Path, key: CacheKey, samples: "SampleSource"):
        self.folder, self.key = Path(folder), key
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = hold(self.folder / "lock", wait=True)  # ranks and other runs wait until the first has made the files
        try:
            self.rebuilt_because = self._prepare(samples)
            try:
                self._map_files()
            except (OSError, ValueError, EOFError, KeyError) as error:  # cut by a sudden end, or by hand
                self._forget()
                self._prepare(samples)
                self._map_files()
                self.rebuilt_because = f"its files were damaged ({error})"
            # Held open: should another run remake the files, this one continues with its own.
            self._files = [open(self.folder / name, "r+b", buffering=0) for name in ("features.bin", "filled.bin")]  # noqa: SIM115
        finally:
            lock.release()
        self.broken: OSError | None = None  # the error that ended writing
        self._writer, self._pending = None, []

    @property
    def image_bytes(self) -> int:
        """Disk space of one image's features."""
        return self.key.patches * self.key.width * 2

    def slots_of(self, index: int) -> list[int]:
        """The slots of the images of sample `index`, in reading order."""
        return self.slots[self.starts[index] : self.starts[index + 1]].tolist()

    def filled(self) -> int:
        """Number of slots that hold features."""
        return int(np.count_nonzero(self._filled["signature"])) if self.count else 0

    def read(self, slot: int, signature: int) -> torch.Tensor | None:
        """Features bf16 [P, W]; None when the slot is empty, or filled from a file that looked otherwise."""
        record = self._filled[slot]
        if record["signature"] != signature:
            return None
        features = self._features[slot].copy()
        if zlib.crc32(features) != record["checksum"]:
            return None
        return torch.from_numpy(features).view(torch.bfloat16)

    def write(self, slots: list[int], signatures: list[int], features: torch.Tensor) -> None:
        """Stores `features` bf16 [len(slots), P, W] in the background; `flush` waits for it.

        A disk that refuses ends the writing, not the run: `broken` then holds the error.
        """
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "features")
        copied = None
        if features.device.type != "cpu":
            features = features.to("cpu", non_blocking=True)  # the background thread waits for it, not the loop
            copied = torch.Event(torch.accelerator.current_accelerator().type)
            copied.record()
        self._pending = [task for task in self._pending if not task.done()]
        self._pending.append(self._writer.submit(self._write, slots, signatures, features, copied))
        if len(self._pending) > MOST_PENDING:  # a disk slower than the encoder must not fill the memory
            self._pending[0].result()

    def flush(self) -> None:
        """Waits until everything given to `write` can be read."""
        for task in self._pending:
            task.result()
        self._pending = []

    def _write(self, slots, signatures, features, copied) -> None:
        if copied is not None:
            copied.synchronize()
        try:
            for slot, signature, row in zip(slots, signatures, features.view(torch.int16).numpy(), strict=True):
                if self.broken is not None:
                    return
                record = np.array((signature, zlib.crc32(row)), dtype=RECORD)
                for file, data in zip(self._files, (row.tobytes(), record.tobytes()), strict=True):
                    file.seek(slot * len(data))
                    if file.write(data) != len(data):
                        raise OSError(f"{file.name}: the disk is full")
        except OSError as error:
            self.broken = error
            print(f"warning: the feature cache keeps no more ({error}); training continues", file=sys.stderr, flush=True)

    def _prepare(self, samples: "SampleSource") -> str | None:
        """Makes the files unless they fit; returns why an older cache was thrown away, if one was."""
        meta_file = self.folder / "meta.json"
        try:
            old = json.loads(meta_file.read_text())
        except (OSError, ValueError):
            old = {}
        data = samples.fingerprint()
        old = old if isinstance(old, dict) else {}
        same_key = old.get("key") == asdict(self.key)
        if same_key and old.get("data") == data:
            self._check_disk(old["count"])
            return None
        starts, slots, names = number_images(samples)
        images = hashlib.blake2b("\0".join(names).encode(errors="surrogatepass"), digest_size=16).hexdigest()
        keep = same_key and old.get("images") == images
        meta_file.unlink(missing_ok=True)  # until all is in place again there is no cache
        if not keep:
            self._forget()
        self._check_disk(len(names))
        for name, values in (("starts.npy", starts), ("slots.npy", slots)):  # others may have the old ones mapped
            write_atomically(self.folder / name, lambda file, values=values: np.save(file, values))
        for name, size in (("features.bin", self.image_bytes), ("filled.bin", RECORD.itemsize)):
            with open(self.folder / name, "ab") as file:
                file.truncate(len(names) * size)
        meta = {"key": asdict(self.key), "data": data, "images": images, "count": len(names)}
        write_atomically(meta_file, lambda file: file.write(json.dumps(meta, indent=2).encode()))
        if not old or keep:
            return None
        return "the images listed in the data are others" if same_key else f"it was made with another encoder or format: {old.get('key')}"

    def _forget(self) -> None:
        for name in ("meta.json", "features.bin", "filled.bin"):
            (self.folder / name).unlink(missing_ok=True)

    def _check_disk(self, count: int) -> None:
        path = self.folder / "features.bin"
        present = path.stat().st_blocks * 512 if path.exists() else 0
        needed, free = count * self.image_bytes - present, shutil.disk_usage(self.folder).free
        if needed > free:
            raise DataError(
                f"the features of {count:,} images take {count * self.image_bytes / 1e9:.1f} GB, {needed / 1e9:.1f} GB"
                f" more than now; {self.folder} has {free / 1e9:.1f} GB free. Name a larger disk with --checkpoint_dir,"
                f" or train without --cache_features"
            )

    def _map_files(self) -> None:
        self.starts = np.load(self.folder / "starts.npy", mmap_mode="r")
        self.slots = np.load(self.folder / "slots.npy", mmap_mode="r")
        self.count = json.loads((self.folder / "meta.json").read_text())["count"]
        shape = (self.count, self.key.patches, self.key.width)
        self._features = np.memmap(self.folder / "features.bin", np.int16, "r", shape=shape) if self.count else None
        self._filled = np.memmap(self.folder / "filled.bin", RECORD, "r", shape=shape[:1]) if self.count else None

    def __getstate__(self) -> dict:
        # A reader in another process maps the files itself: pickled, a map would become a copy.
        return {"folder": self.folder, "key": self.key}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map_files()


def format_of(folder: Path, encoder: str) -> str | None:
    """The number format in which the encoder `encoder` computed the cache in `folder`; None without such a cache."""
    try:
        key = json.loads((folder / "meta.json").read_text())["key"]
        return key["dtype"] if key["encoder"] == encoder else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def number_images(samples: "SampleSource") -> tuple[np.ndarray, np.ndarray, list[str]]:
    """`starts` int64 [n + 1], `slots` int32 and the names of the M different images, in order of appearance; a
    image that a sample holds itself goes by a hash.

    A sample that cannot be read has no images.
    """
    starts, slots, numbers = np.zeros(len(samples) + 1, dtype=np.int64), [], {}
    for index in range(len(samples)):
        try:
            names = [ref if isinstance(ref, str) else hashlib.blake2b(ref, digest_size=16).hexdigest()
                     for ref in samples[index].images]  # fmt: skip
        except SampleError:
            names = ()
        slots += [numbers.setdefault(name, len(numbers)) for name in names]
        starts[index + 1] = len(slots)
    return starts, np.array(slots, dtype=np.int32), list(numbers)

