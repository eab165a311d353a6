"""The training state: what it holds, and how it is written, before the weights and the sidecar that are made of it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from model.errors import UsageError
from model.model_vlm import MiniMindVLM
from model.storage import write_atomically
from model.weights import half_weights, read_sidecar, read_state, read_tensors, tensors_fingerprint, write_weights

STATE_VERSION = 4


def rng_state(device: torch.device) -> dict:
    """torch's random states of this process."""
    accelerator = torch.get_device_module(device).get_rng_state() if device.type != "cpu" else None
    return {"torch": torch.get_rng_state(), "device": accelerator}


def set_rng_state(state: dict, device: torch.device) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


def copy_to_cpu(value: Any) -> Any:
    """Containers and tensors as they are now; later changes of the originals do not show."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_cpu(item) for item in value)
    return value


class Saver:
    """Writes training states and weights in the background, one after the other.

    The state is the truth; weights and sidecar are exports of it, written after it, and again by a resume that finds them
    older.
    """

    def __init__(self):
        self._executor, self._task = ThreadPoolExecutor(1, "saver"), None
        self._exported: dict[Path, str] = {}  # fingerprints of the run's weights on disk
        self.newest_is_corrupt = False  # then it is replaced, and not kept in place of the good one before it

    def find_export(self, weight_file: Path, update: int) -> bool:
        """For a resumed run: whether the weights of `update` and their sidecar are on disk, both whole."""
        try:
            sidecar, weights = read_sidecar(weight_file) or {}, read_state(weight_file)[0]
            self._exported[weight_file] = tensors_fingerprint(weights)
            return sidecar["progress"]["update"] == update and sidecar["weights"][0] == self._exported[weight_file]
        except (UsageError, KeyError, TypeError, IndexError):  # missing, corrupt, or written by others
            return False

    def save(self, state_file: Path, objects: dict[str, Any], extra: dict, weight_file: Path, model: MiniMindVLM, sidecar: dict) -> None:
        """Takes a snapshot and returns; then writes a training state and its export. `objects` have a state_dict();
        `extra` are plain values and tensors. Otherwise as `export`."""
        content = copy_to_cpu({name: item.state_dict() for name, item in objects.items()}) | {"version": STATE_VERSION, **extra}
        keep = None if self.newest_is_corrupt else previous_state(state_file)
        self.newest_is_corrupt = False
        self._submit(weight_file, model, sidecar, lambda: write_atomically(state_file, lambda file: torch.save(content, file), keep))

    def export(self, weight_file: Path, model: MiniMindVLM, sidecar: dict) -> None:
        """Takes a snapshot and returns; then writes weights and sidecar.

        Waits for the save before; raises StorageError when that could not be written, FloatingPointError for weights
        beyond fp16's range.
        """
        self._submit(weight_file, model, sidecar, lambda: None)

    def _submit(self, weight_file: Path, model: MiniMindVLM, sidecar: dict, first: Callable[[], None]) -> None:
        weights, config = half_weights(model), model.config.to_diff_dict()

        def write() -> None:
            try:
                first()
            finally:  # a disk that has no room for the state may be another than that of the weights
                self._exported[weight_file] = write_weights(weight_file, weights, config, sidecar, self._exported.get(weight_file))

        try:
            self.wait()
        finally:
            self._task = self._executor.submit(write)

    def wait(self) -> None:
        """Returns when everything is on disk; raises StorageError when it could not be written."""
        task, self._task = self._task, None
        if task is not None:
            task.result()


def previous_state(path: Path) -> Path:
    """Where the training state before the one at `path` is kept."""
    return path.with_name(f"{path.stem}_previous{path.suffix}")


def load_training_state(path: Path) -> tuple[dict, str | None]:
    """The content of a training state, or of the one before it when the newest is corrupt; then also what is wrong.

    Raises UsageError when there is none, none can be read, or it is of another version.
    """
    previous = previous_state(path)
    if not path.is_file() and not previous.is_file():
        raise UsageError(
            f"--from_resume 1, but there is no training state at {path}. Start without it, or check --save_weight,"
            f" --hidden_size, --use_moe and --checkpoint_dir."
        )
    if not path.is_file():  # it is there at every instant once a run has saved
        raise UsageError(f"--from_resume 1, but this run has saved nothing yet at {path}. To resume the run before it, give its state that"
                         f" name: mv '{previous}' '{path}'")  # fmt: skip
    problems = []
    for file in (path, previous):
        try:
            content = read_tensors(file, "training state")
        except UsageError as error:
            problems.append(str(error).rstrip("."))
            continue
        if not isinstance(content, dict) or content.get("version") != STATE_VERSION:
            raise UsageError(f"{file} is no training state of version {STATE_VERSION}; start anew, without --from_resume")
        return content, "; ".join(problems) or None
    raise UsageError(f"no training state can be read: {'; '.join(problems)}. Start anew, without --from_resume 1.")
