"""Loss curves of runs, from the metrics files they leave beside their weights."""

import json
import math
from pathlib import Path

from matplotlib import pyplot as plt

from model.errors import UsageError
from model.model_vlm import VLMConfig

from .canvas import INK, PAPER, PICTURE, TEXT, UNIT, drawable, save_figure


def read_curves(file: Path) -> dict[str, list[tuple[int, float]]]:
    """(update, value) of "loss", and of "eval_loss" where the run was validated.

    Raises UsageError when the file is missing, a line is no json object of figures, or no loss is there.
    """
    if not file.is_file():
        raise UsageError(f"no metrics file {file}; a run writes it beside its weights, `make demo` the default ones")
    curves = {"loss": [], "eval_loss": []}
    lines = file.read_bytes().splitlines(keepends=True)  # of text it would cut at more than newlines: answers hold anything
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break  # still being written, or torn by a sudden end
        try:
            row = json.loads(line)
            for name, points in curves.items():
                if row.get(name) is not None:
                    points.append((int(row["update"]), float(row[name])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{file}:{number}: no json object with numbers 'update' and 'loss'") from error
    if not curves["loss"]:
        raise UsageError(f"{file} holds no loss: the run has logged nothing yet")
    return curves


def draw_loss(path: Path, files: list[Path]) -> None:
    """A panel a run, all with the same logarithmic scale."""
    runs, vocabulary = [read_curves(file) for file in files], VLMConfig().vocab_size
    figure, axes = plt.subplots(1, len(files), figsize=(1000 * UNIT, 300 * UNIT), sharey=True, squeeze=False, facecolor=PAPER,
                                constrained_layout=True)  # fmt: skip
    for axis, file, curves in zip(axes[0], files, runs, strict=True):
        axis.plot(*zip(*curves["loss"], strict=True), "o-", markersize=4, color=TEXT[1], label="training")
        if curves["eval_loss"]:
            axis.plot(*zip(*curves["eval_loss"], strict=True), "s-", markersize=4, color=PICTURE[1], label="validation")
            axis.legend(loc="lower left", frameon=False)
        axis.axhline(math.log(vocabulary), color="#8a94a0", linestyle="--", linewidth=1)
        axis.set_yscale("log")
        title, fonts = drawable(f"{file.name.removesuffix('.metrics.jsonl')}: {curves['loss'][-1][1]:.2g} at the end")
        axis.set_title(title, fontsize=11, fontweight="bold", color=INK, fontfamily=fonts, parse_math=False)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss")
    axes[0][-1].text(0.98, math.log(vocabulary) * 0.93, f"knows nothing: ln {vocabulary:,}", fontsize=9, ha="right", va="top",
                     color="#5a6672", transform=axes[0][-1].get_yaxis_transform())  # fmt: skip
    save_figure(figure, path)
