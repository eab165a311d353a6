"""Loss curves of runs, from the metrics files they leave beside their weights."""

import json
import math
from pathlib import Path

from matplotlib import pyplot as plt

from model import VLMConfig
from trainer.config import UsageError

from .canvas import INK, PAPER, TEXT, UNIT, save_figure


def read_curve(file: Path) -> list[tuple[int, float]]:
    """(update, loss) of each line; raises UsageError when the file is missing or holds none."""
    if not file.is_file():
        raise UsageError(f"no metrics file {file}; a run writes it beside its weights, `make demo` the default ones")
    points = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            points.append((int(row["update"]), float(row["loss"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}:{number}: no json object with numbers 'update' and 'loss'") from error
    if not points:
        raise UsageError(f"{file} is empty: the run has logged nothing yet")
    return points


def draw_loss(path: Path, files: list[Path]) -> None:
    """A panel a run, all with the same logarithmic scale."""
    curves, vocabulary = [read_curve(file) for file in files], VLMConfig().vocab_size
    figure, axes = plt.subplots(1, len(files), figsize=(1000 * UNIT, 300 * UNIT), sharey=True, squeeze=False, facecolor=PAPER,
                                constrained_layout=True)  # fmt: skip
    for axis, file, curve in zip(axes[0], files, curves, strict=True):
        updates, losses = zip(*curve, strict=True)
        axis.plot(updates, losses, "o-", markersize=4, color=TEXT[1])
        axis.axhline(math.log(vocabulary), color="#8a94a0", linestyle="--", linewidth=1)
        axis.set_yscale("log")
        axis.set_title(f"{file.name.removesuffix('.metrics.jsonl')}: {losses[-1]:.2g} at the end", fontsize=11, fontweight="bold", color=INK)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("training loss")
    axes[0][-1].text(0.98, math.log(vocabulary) * 0.93, f"knows nothing: ln {vocabulary:,}", fontsize=9, ha="right", va="top",
                     color="#5a6672", transform=axes[0][-1].get_yaxis_transform())  # fmt: skip
    save_figure(figure, path)
