"""Loss curves of runs, from the metrics files that are stored next to their weights."""

import json
import math
from pathlib import Path

from matplotlib import pyplot as plt

from model.errors import UsageError
from model.model_vlm import VLMConfig

from .style import save


def read_curves(file: Path) -> dict[str, list[tuple[int, float]]]:
    """(update, value) of "loss", and of "eval_loss" where the run was validated.

    Raises UsageError when the file is missing, a line is no json object of figures, or no loss is there.
    """
    if not file.is_file():
        raise UsageError(f"no metrics file {file}; a run stores it next to its weights, `make demo` the default ones")
    curves = {"loss": [], "eval_loss": []}
    lines = file.read_bytes().splitlines(keepends=True)  # text would be cut at more than newlines: answers hold anything
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break  # still being written, or truncated by a sudden end
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


def draw_marks(path: Path, file: Path) -> None:
    """Mean marks of a run that learned from marks, of the answers that it sampled and of greedy ones in validation, over minutes."""
    if not file.is_file():
        raise UsageError(f"no metrics file {file}; python -m dataset.demo --stage grpo makes one")
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    for name, label in (("reward", "sampled answers to training questions"), ("eval_reward", "greedy answers to test questions"),
                        ("useless_groups", "groups whose marks are all equal")):  # fmt: skip
        points = [(row["seconds"] / 60, row[name]) for row in rows if row.get(name) is not None]
        if not points:
            raise UsageError(f"{file} holds no {name}: a run of train_grpo_vlm.py with --eval_data_path is wanted")
        axis.plot(*zip(*points, strict=True), "o-" if name == "eval_reward" else "-", markersize=4, label=label)
    axis.set(xlabel="minutes", ylabel="mean mark, fraction of groups", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    save(figure, path)


def draw_loss(path: Path, files: list[Path]) -> None:
    """A panel a run, all with the same logarithmic scale."""
    runs, vocabulary = [read_curves(file) for file in files], VLMConfig().vocab_size
    figure, axes = plt.subplots(1, len(files), figsize=(10, 3), sharey=True, squeeze=False, layout="constrained")
    for axis, file, curves in zip(axes[0], files, runs, strict=True):
        for (name, points), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=True):
            if points:
                axis.plot(*zip(*points, strict=True), "o-", markersize=4, color=color, label=name)
        axis.axhline(math.log(vocabulary), color="gray", linestyle="--", linewidth=1, label=f"knows nothing: ln {vocabulary:,}")
        axis.set(yscale="log", xlabel="update")
        title = f"{file.name.removesuffix('.metrics.jsonl')}: {curves['loss'][-1][1]:.2g} at the end"
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss")
    axes[0][-1].legend(loc="best", fontsize=8)
    save(figure, path)
