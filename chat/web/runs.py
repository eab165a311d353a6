"""Training runs as their files tell of them: metrics files, read on from where they were read last, and sidecars."""

import json
import math
import os
import threading
import time
from array import array
from pathlib import Path
from typing import Any

from .models import changed_at, read_json

METRICS = ("update", "epoch", "seconds", "loss", "eval_loss", "aux_loss", "learning_rate", "tokens_per_second",
           "peak_memory_mb", "seconds_left")  # fmt: skip
SUFFIX = ".metrics.jsonl"
MOST_POINTS = 1500  # of a curve on the screen


class Run:
    """One metrics file. Figures are kept as columns of floats, NaN where a line lacks one: a million lines take 80 MB."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.columns = {name: array("d") for name in METRICS}
        self.samples: list[dict] = []  # {"update": ..., "samples": [...]}
        self.bad = 0  # lines that are no json object
        self._read, self._file, self._newest = 0, None, b""  # bytes read, which file it is, its line read last

    def refresh(self) -> "Run":
        """Reads what has been written since the last time; everything anew when the file is another or was cut."""
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    stat = os.fstat(file.fileno())
                    file.seek(self._read - len(self._newest))
                    # A new file may have the number of a deleted one, and one that was cut may have grown again.
                    if (stat.st_dev, stat.st_ino) != self._file or file.read(len(self._newest)) != self._newest:
                        self._forget()
                        self._file = (stat.st_dev, stat.st_ino)
                        file.seek(0)
                    for line in file:
                        if not line.endswith(b"\n"):
                            break  # still being written
                        self._read, self._newest = self._read + len(line), line
                        self._take(line)
            except OSError:  # deleted meanwhile
                self._forget()
        return self

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            update = int(values["update"])
            figures = [float(value) if isinstance(value := values.get(name), (int, float)) else math.nan for name in self.columns]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self.bad += bool(line.strip())
            return
        for column, figure in zip(self.columns.values(), figures, strict=True):
            column.append(figure)
        if isinstance(values.get("samples"), list):
            self.samples.append({"update": update, "samples": values["samples"]})

    def last(self, name: str) -> float | None:
        """The newest value of a figure, None when no line has it."""
        return next((value for value in reversed(self.columns[name]) if not math.isnan(value)), None)

    def curve(self, name: str, axis: str) -> tuple[list[float], list[float]]:
        """(x, y) of a figure over "update", "epoch" or "seconds", where both are known."""
        with self._lock:  # for another visitor's page may be reading on
            columns = self.columns[axis][:], self.columns[name][:]
        both = [(x, y) for x, y in zip(*columns, strict=True) if math.isfinite(x) and math.isfinite(y)]
        return [x for x, _ in both], [y for _, y in both]

    @property
    def is_live(self) -> bool:
        """Whether the last line is so fresh that another may come: within three times the pause before it, or a minute."""
        seconds = [value for value in self.columns["seconds"][-2:] if not math.isnan(value)]
        pause = seconds[1] - seconds[0] if len(seconds) == 2 else 0.0
        try:
            age = time.time() - self.path.stat().st_mtime
        except OSError:
            return False
        left = self.last("seconds_left")
        return age < max(60.0, 3 * pause) and not (left is not None and left <= 0)

    def arguments(self) -> dict[str, str]:
        """What the run was started with, from its sidecar; empty before its first save."""
        sidecar = read_json(self.path.with_name(self.path.name.removesuffix(SUFFIX) + ".json"))
        training = sidecar.get("training")
        return {as_text(key): as_text(value) for key, value in training.items()} if isinstance(training, dict) else {}


def as_text(value: Any) -> str:
    """Anything as text that a browser can be sent: halves of characters, which json can hold, are replaced."""
    return str(value).encode(errors="replace").decode()


class RunFolder:
    """The runs in a folder and the folders in it, each read once for all visitors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Run]:
        """Runs by name, the one that was written to last first. Their figures are as of their last `refresh`."""
        times = {}
        for path in [*self.folder.glob(f"*{SUFFIX}"), *self.folder.glob(f"*/*{SUFFIX}")]:
            if (changed := changed_at(path)) is not None:
                times[path] = changed
        with self._lock:
            for path in times:
                if path not in self._runs:
                    name = path.relative_to(self.folder).as_posix().removesuffix(SUFFIX)
                    self._runs[path] = Run(path, name)
            self._runs = {path: run for path, run in self._runs.items() if path in times}
            return {run.name: run for path, run in sorted(self._runs.items(), key=lambda item: -times[item[0]])}


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential running mean with `weight` in [0, 1) for the past, unbiased at the start (arXiv 1412.6980, section 3)."""
    mean, result = 0.0, []
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**count))
    return result


def thin(points: list, most: int = MOST_POINTS) -> list:
    """At most `most` of the points, evenly taken, the last one among them."""
    step = -(-len(points) // most)
    return points if step <= 1 else points[::-1][::step][::-1]


def differing(arguments: dict[str, dict[str, str]]) -> list[str]:
    """Names of arguments that are not the same in all runs."""
    names = sorted({name for values in arguments.values() for name in values})
    return [name for name in names if len({values.get(name) for values in arguments.values()}) > 1]
