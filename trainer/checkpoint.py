"""What a run saves: the training state, the one truth, and the weights and sidecar that are exports of it.

resume.py reads it again.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.errors import UsageError
from model.model_vlm import MiniMindVLM
from model.storage import write_atomically
from model.weights import half_weights, read_state, tensors_fingerprint, write_weights

from .sampler import ResumableSampler

if TYPE_CHECKING:  # which imports this module
    from .build import Run

STATE_VERSION = 6


@dataclass
class TrainState:
    """How far a run has come. All counts are of finished things."""

    epoch: int = 0  # finished epochs
    update: int = 0  # finished updates, over all epochs
    progress: float = 0.0  # along the learning rate's curve, from 0 to 1
    samples: int = 0  # samples of the running epoch that are trained on, over all ranks
    read: int = 0  # samples read so far, bad ones included
    bad: int = 0  # bad ones among them
    epoch_bad: int = 0  # those of the running epoch
    truncated: int = 0  # images that are truncated and were used nevertheless
    seconds: float = 0.0  # spent training, over all interruptions
    tracker_id: str | None = None
    validated: int = 0  # the update of the last validation
    best_loss: float | None = None  # the lowest validation loss, or minus the highest reward, and its update
    best_update: int = 0

    def advance(self, sampler: ResumableSampler, total: int) -> None:
        """Counts the update just finished.

        What is left of the learning rate's curve is spread over the updates that are left: it continues without a jump
        where a resumed run has more or fewer of them to do.
        """
        self.progress += (1 - self.progress) / (total - self.update)
        self.update += 1
        self.samples = min(sampler.size, self.samples + sampler.samples_per_update)
        if self.samples == sampler.size:
            self.epoch, self.samples, self.epoch_bad = self.epoch + 1, 0, 0


def previous_state(path: Path) -> Path:
    """Where the previous checkpoint is kept when the one at `path` is written."""
    return path.with_name(f"{path.stem}_previous{path.suffix}")


def snapshot(run: "Run", state: dict) -> dict[str, Any]:
    """The whole content of a training state."""
    return copy_to_cpu({
        "version": STATE_VERSION, "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "state": state,
        "rng": torch.get_rng_state(), "ranks": run.ranks.size, "threads": torch.get_num_threads(),
        "grain": run.sampler.grain, "samples_per_update": run.sampler.samples_per_update,
        "config": asdict(run.config), "fingerprints": run.fingerprints,
        "data_size": run.sampler.size, "data": run.dataset.samples.fingerprint(),
    })  # fmt: skip


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
    """Writes training states and weights in the background, one save after the other."""

    def __init__(self, resumed: bool):
        self._executor, self._task = ThreadPoolExecutor(1, "saver"), None
        self._resumed = resumed
        self._on_disk: dict[Path, str] = {}  # fingerprints of the weights there that are this run's

    def save(self, weight_file: Path, model: MiniMindVLM, sidecar: dict, state_file: Path | None = None,
             content: dict | None = None) -> None:  # fmt: skip
        """Takes a copy of the weights and returns; then writes the training state, if there is one, and weights and sidecar.

        Waits for the save before; raises StorageError when that could not be written, FloatingPointError for weights
        beyond fp16's range.
        """
        weights, config = half_weights(model), model.config.to_diff_dict()

        def write() -> None:
            try:
                if state_file is not None:
                    write_atomically(state_file, lambda file: torch.save(content, file), previous_state(state_file))
            finally:  # a disk that has no room for the state may be another than that of the weights
                self._export(weight_file, weights, config, sidecar)

        try:
            self.wait()
        finally:
            self._task = self._executor.submit(write)

    def wait(self) -> None:
        """Returns when everything is on disk; raises StorageError when it could not be written."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def _export(self, file: Path, weights: dict[str, torch.Tensor], config: dict, sidecar: dict) -> None:
        before = self._on_disk.get(file)
        if self._resumed and before is None:
            with contextlib.suppress(UsageError):  # missing, corrupt, or none that this project writes
                before = tensors_fingerprint(read_state(file))
        # The sidecar is written first, and has to fit the weights that lie there as well.
        self._on_disk[file] = write_weights(file, weights, config, sidecar, before)
