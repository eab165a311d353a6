"""The training state: what it holds, and how it is written as one with weights and sidecar (model/weights.py)."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import MiniMindVLM
from model.errors import UsageError
from model.storage import BackgroundWriter
from model.weights import half_weights, journal_of, read_tensors, weight_files

STATE_VERSION = 4


def rng_state(device: torch.device) -> dict:
    """The random states of this process, in types that a safe loader accepts."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.get_device_module(device).get_rng_state() if device.type != "cpu" else None,
        "python": [version, list(internal), gauss],
        "numpy": [keys.tolist(), position, has_gauss, cached],
    }


def set_rng_state(state: dict, device: torch.device) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def copy_to_cpu(value: Any) -> Any:
    """Containers and tensors as they are now; later changes of the originals do not show."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_cpu(item) for item in value)
    return value


class Saver(BackgroundWriter):
    """Writes weights, sidecar and training state as one, in the background, one set at a time."""

    def __init__(self, weight_file: Path, state_file: Path):
        super().__init__()
        self.weight_file, self.state_file = weight_file, state_file
        self.newest_is_torn = False  # then it is replaced, and not kept in place of the good one before it

    def save(self, model: MiniMindVLM, sidecar: dict, objects: dict[str, Any], extra: dict) -> None:
        """Takes a snapshot and returns. `objects` have a state_dict(); `extra` are plain values and tensors.

        Waits for the set before; raises StorageError when that could not be written, FloatingPointError for weights
        beyond fp16's range.
        """
        weights = half_weights(model)
        content = copy_to_cpu({name: item.state_dict() for name, item in objects.items()})
        content |= {"version": STATE_VERSION, **extra}
        files = weight_files(self.weight_file, weights, model.config.to_diff_dict(), sidecar)
        files[self.state_file] = lambda file: torch.save(content, file)
        keep = {} if self.newest_is_torn else {self.state_file: previous_state(self.state_file)}
        self.newest_is_torn = False
        self.submit(journal_of(self.weight_file), files, keep)


def previous_state(path: Path) -> Path:
    """Where the training state before the one at `path` is kept."""
    return path.with_name(f"{path.stem}_previous{path.suffix}")


def load_training_state(path: Path) -> tuple[dict, str | None]:
    """The content of a training state, or of the one before it when the newest is torn; then also what is wrong.

    Raises UsageError when there is none, none can be read, or it is of another version.
    """
    previous = previous_state(path)
    if not path.is_file() and not previous.is_file():
        raise UsageError(
            f"--from_resume 1, but there is no training state at {path}. Start without it, or check --save_weight,"
            f" --hidden_size, --use_moe and --checkpoint_dir."
        )
    problems = []
    for file in (path, previous):
        if not file.is_file():
            problems.append(f"{file} is missing")
            continue
        try:
            content = read_tensors(file, "training state")
        except UsageError as error:
            problems.append(str(error))
            continue
        if not isinstance(content, dict) or content.get("version") != STATE_VERSION:
            raise UsageError(f"{file} is no training state of version {STATE_VERSION}; start anew, without --from_resume")
        return content, "; ".join(problems) or None
    raise UsageError(f"no training state can be read: {'; '.join(problems)}. Start anew, without --from_resume 1.")
