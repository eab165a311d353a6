"""What a resumed run takes up: the training state, where its flags and files allow an exact resume."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from model.errors import UsageError
from model.vision import patches_per_image
from model.weights import check_fingerprints, read_tensors

from .checkpoint import STATE_VERSION, TrainState, previous_state
from .config import fraction_of
from .distributed import Ranks
from .sampler import ResumableSampler

if TYPE_CHECKING:  # which imports this module
    from .build import Run

# Flags that a resumed run must not change, and those that it may, at the price of another result.
FIXED = ("seed", "freeze_llm", "hidden_size", "num_hidden_layers", "use_moe", "family", "projector", "image_tokens", "tiles")
SHAPING = ("epochs", "batch_size", "accumulation_steps", "learning_rate", "dtype", "device", "use_compile", "grad_clip",
           "max_seq_len", "data_path", "reward", "group_size", "temperature", "max_new_tokens", "normalize", "kl", "updates_per_batch",
           "clip")  # fmt: skip


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
                f" sample {state.samples} of {sampler.size}; {left} samples to go")  # fmt: skip
    return state


def check_settings(run: "Run", content: dict) -> None:
    """Raises UsageError when a setting that must stay is another than in the saved state."""
    config, path = run.config, run.config.resume_file
    # What older states do not hold.
    then = {"family": "minimind2", "projector": "linear", "image_tokens": patches_per_image(run.model.vision_encoder), "tiles": 0}
    then |= content["config"]
    if ("reward" in then) != hasattr(config, "reward"):
        raise UsageError(f"{path} was saved by another training script: give this run another --save_weight, or resume with that one")
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
    changes = [f"--{name} {then[name]} -> {now[name]}" for name in SHAPING if name in now and then[name] != now[name]]
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
                    f" {sampler.ranks} x --batch_size {sampler.batch_size} does not divide those"
                    + (f"; --batch_size {wanted // sampler.ranks} keeps them" if wanted % sampler.ranks == 0 else ""))  # fmt: skip
