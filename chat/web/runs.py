"""Training runs as their files tell of them: metrics files and sidecars."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .models import read_json

METRICS = ["update", "epoch", "seconds", "loss", "eval_loss", "eval_loss_seen", "eval_loss_blank", "eval_loss_shuffled", "aux_loss",
           "reward", "eval_reward", "useless_groups", "entropy", "length", "kl", "learning_rate", "tokens_per_second", "peak_memory_mb", "seconds_left"]  # fmt: skip
SUFFIX = ".metrics.jsonl"
MOST_POINTS = 1500  # of a curve on the screen


@dataclass(frozen=True)
class Run:
    """One metrics file and the sidecar next to it."""

    path: Path
    frame: pd.DataFrame  # a line of the file a row; columns METRICS, NaN where a line lacks one
    samples: list[dict]  # answers to the same questions: {"update", "question", "answer", "reference", "image"}
    bad: int  # lines that are no json object with an update
    written: float  # time of the last line

    def last(self, name: str) -> float | None:
        """The newest value of a figure, None when no line has it."""
        values = self.frame[name].dropna()
        return None if values.empty else float(values.iloc[-1])

    @property
    def is_live(self) -> bool:
        """Whether another line may come: within three times the pause before the last one, or a minute."""
        pause = self.frame["seconds"].dropna().diff().iloc[-1:].sum()
        return time.time() - self.written < max(60.0, 3 * pause) and self.last("seconds_left") != 0

    def arguments(self) -> dict[str, str]:
        """What the run was started with, from its sidecar; empty before its first save."""
        training = read_json(self.path.with_name(self.path.name.removesuffix(SUFFIX) + ".json")).get("training")
        return {key: str(value) for key, value in training.items()} if isinstance(training, dict) else {}


def find_runs(folder: Path) -> dict[str, tuple[Path, int]]:
    """Metrics files in a folder and the folders in it by the runs' names, with their modification times (ns), the
    newest first."""
    found = [(path, path.stat().st_mtime_ns) for pattern in ("*", "*/*") for path in folder.glob(pattern + SUFFIX)]
    found.sort(key=lambda item: -item[1])
    return {item[0].relative_to(folder).as_posix().removesuffix(SUFFIX): item for item in found}


def read_run(path: Path) -> Run:
    """The run behind a metrics file, up to its last whole line."""
    rows, samples, bad = [], [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is still being written
        try:
            row = json.loads(line)
            samples += [{**answer, "update": int(row["update"])} for answer in row.get("samples", ())]
            rows.append(row)
        except (ValueError, LookupError, TypeError, AttributeError):
            bad += 1
    frame = pd.DataFrame(rows, columns=METRICS).apply(pd.to_numeric, errors="coerce").astype("float64")
    return Run(path, frame, samples, bad, path.stat().st_mtime)


def curve(run: Run, name: str, axis: str, smoothing: float) -> pd.DataFrame:
    """Columns x, y, raw of a figure over "update", "epoch" or "seconds", where both are known: y is an exponential mean
    with the weight `smoothing` in [0, 1) for the past, unbiased at the start; a long curve is thinned evenly."""
    points = run.frame[[axis, name]].set_axis(["x", "raw"], axis=1).replace([math.inf, -math.inf], math.nan).dropna()
    points["y"] = points["raw"].ewm(alpha=1 - smoothing).mean()
    step = -(-len(points) // MOST_POINTS) or 1
    return points[::-1][::step][::-1]  # the last one stays
