"""What a run saves and resumes: the training state, the one truth, and the weights and sidecar that are exports of it."""

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.errors import UsageError
from model.model_vlm import MiniMindVLM
from model.storage import write_atomically
from model.weights import (
    check_fingerprints,
    half_weights,
    read_state,
    read_tensors,
    tensors_fingerprint,
    write_weights,
)

from .config import fraction_of
from .distributed import Ranks
from .sampler import ResumableSampler

if TYPE_CHECKING:  # which imports this module
    from .build import Run

STATE_VERSION = 6
# Flags that a resumed run must not change, and those that it may, at the price of another result.
FIXED = ("seed", "freeze_llm", "hidden_size", "num_hidden_layers", "use_moe")
SHAPING = ("epochs", "batch_size", "accumulation_steps", "learning_rate", "dtype", "device", "use_compile", "grad_clip",
           "max_seq_len", "data_path")  # fmt: skip


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
    best_loss: float | None = None  # the lowest validation loss, and its update
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


# --- saving -----------------------------------------------------------------------------------------------------------


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


# --- resuming ---------------------------------------------------------------------------------------------------------


def load_training_state(path: Path) -> tuple[dict, str | None]:
    """The content of a training state, or of the previous one when the newest is corrupt; then also what is wrong.

    Raises UsageError when there is none, none can be read, or it is of another version.
    """
    previous, problems = previous_state(path), []
    if not path.is_file():  # it is there at every instant once a run has saved
        raise UsageError(f"--from_resume 1, but there is no training state at {path}. Start without it, or check --save_weight,"
                         " --hidden_size, --use_moe and --checkpoint_dir.")  # fmt: skip
    for file in (path, previous):
        try:
            content = read_tensors(file, "training state")
        except UsageError as error:
            problems.append(str(error).rstrip("."))
            continue
        if not isinstance(content, dict) or content.get("version") != STATE_VERSION:
            raise UsageError(f"{file} is no training state of version {STATE_VERSION}; start again, without --from_resume 1")
        return content, "; ".join(problems) or None
    raise UsageError(f"no training state can be read: {'; '.join(problems)}. Start again, without --from_resume 1.")


def restore(run: "Run") -> TrainState:
    """Brings model, optimizer, scaler and sampler back to where they were saved; raises UsageError when flags or files do
    not allow an exact resume."""
    config, sampler, ranks, path = run.config, run.sampler, run.ranks, run.config.resume_file
    (content, problem), run.saved = run.saved, None
    check_fingerprints(path, run.fingerprints, content["fingerprints"])
    check_settings(run, content)
    ranks.sum([0.0])  # all of them have read it
    if problem and ranks.is_main:
        ranks.print(f"warning: {problem}. The previous checkpoint is used, and replaces it")
        os.replace(previous_state(path), path)
    if changes := differences(run, content):
        ranks.print(f"notice: not what an uninterrupted run would do: {', '.join(changes)}")
    run.model.load_state_dict(content["model"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.scaler.load_state_dict(content["scaler"])
    torch.set_rng_state(content["rng"])
    state = TrainState(**content["state"])
    sampler.grain = content["grain"]
    keep_global_batch(sampler, content["samples_per_update"], ranks)
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    left = (config.epochs - state.epoch) * sampler.size - state.samples
    ranks.print(f"resumed from {path} (saved {saved}): {state.update} updates done, epoch {state.epoch + 1},"
                f" sample {state.samples} of {sampler.size}; {left} to go")  # fmt: skip
    return state


def check_settings(run: "Run", content: dict) -> None:
    """Raises UsageError when a setting that must stay is another than in the saved state."""
    config, then, path = run.config, content["config"], run.config.resume_file
    for name in FIXED:
        if getattr(config, name) != then[name]:
            raise UsageError(f"{path} was saved with --{name} {then[name]}, now it is {getattr(config, name)}:"
                             " no exact resume is possible")  # fmt: skip
    if fraction_of(config.eval_data_path) != fraction_of(then["eval_data_path"]):
        raise UsageError(
            f"{path} was saved with --eval_data_path {then['eval_data_path'] or 'not given'}, now it is"
            f" {config.eval_data_path or 'not given'}: samples would be held out and trained on, and no exact resume is possible"
        )
    if content["data_size"] != run.sampler.size:
        raise UsageError(
            f"{path} was saved with {content['data_size']} training samples, {config.data_path} has"
            f" {run.sampler.size}: no exact resume is possible. Instead, start from the saved weights: --from_weight"
            f" {config.save_weight} without --from_resume"
        )


def differences(run: "Run", content: dict) -> list[str]:
    """What will make the run's result another than that of an uninterrupted one."""
    now, then = asdict(run.config), content["config"]
    changes = [f"--{name} {then[name]} -> {now[name]}" for name in SHAPING if then[name] != now[name]]
    if run.ranks.device.type == "cpu" and content["threads"] != torch.get_num_threads():  # sums are rounded otherwise
        changes.append(f"{content['threads']} -> {torch.get_num_threads()} threads")
    if content["data"] != run.dataset.samples.fingerprint():
        changes.append(f"{run.config.data_path} does not hold what was trained on before")
    return changes


def keep_global_batch(sampler: ResumableSampler, wanted: int, ranks: Ranks) -> None:
    """With another number of processes, as many micro-batches an update as give the samples that it had before."""
    if sampler.samples_per_update == wanted:
        return
    stride = sampler.batch_size * sampler.ranks
    if wanted % stride == 0:
        sampler.accumulation_steps = wanted // stride
        ranks.print(f"notice: {sampler.accumulation_steps} micro-batches an update, so that it takes"
                    f" {wanted} samples as before")  # fmt: skip
    else:
        ranks.print(f"notice: an update takes {sampler.samples_per_update} samples now, not {wanted}:"
                    f" {sampler.ranks} processes of --batch_size {sampler.batch_size} cannot share those evenly")  # fmt: skip
