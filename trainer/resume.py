"""What an interrupted run takes up again: the content of a training state, and the way back from it."""

import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from machine import cores
from model.errors import UsageError
from model.weights import check_fingerprints

from .build import Run
from .checkpoint import previous_state, rng_state, set_rng_state
from .config import TrainConfig, share_of
from .distributed import Ranks
from .progress import Interval, Schedule, TrainState
from .sampler import ResumableSampler

# Flags that a resumed run must not change, and those that it may but that make it another run.
FIXED = ("seed", "freeze_llm", "hidden_size", "num_hidden_layers", "use_moe")
SHAPING = ("epochs", "batch_size", "accumulation_steps", "learning_rate", "dtype", "device", "use_compile", "grad_clip",
           "max_seq_len", "data_path")  # fmt: skip


@dataclass
class Progress:
    """All that changes while a run trains, model and optimizer apart."""

    state: TrainState
    interval: Interval
    schedule: Schedule
    scaler: torch.amp.GradScaler


def begin(run: Run) -> Progress:
    """The progress of a run before its first update."""
    device = run.ranks.device
    scaler = torch.amp.GradScaler(device.type, enabled=run.dtype == torch.float16)
    total = run.config.epochs * run.sampler.updates_per_epoch
    return Progress(TrainState(), Interval(device), Schedule(total), scaler)


def gather_rng_states(ranks: Ranks) -> list[dict]:
    """The random states of all ranks."""
    states = [rng_state(ranks.device)]
    if ranks.size > 1:
        states = [None] * ranks.size
        dist.all_gather_object(states, rng_state(ranks.device))
    return states


def snapshot(run: Run, progress: Progress, sums: list[float], rng: list[dict]) -> dict:
    """What a training state holds besides the state dicts; `sums` are the interval's over all ranks."""
    return {
        "state": asdict(progress.state), "interval": {"sums": sums, "tokens": progress.interval.tokens}, "rng": rng,
        "ranks": run.ranks.size, "grain": run.sampler.grain, "schedule": asdict(progress.schedule),
        "samples_per_update": run.sampler.samples_per_update, "fingerprints": run.fingerprints,
        "threads": torch.get_num_threads(), "config": asdict(run.config), "data_size": run.sampler.size, "data": run.dataset.samples.fingerprint(),
    }  # fmt: skip


def restore(run: Run, progress: Progress) -> bool:
    """Brings everything back to where the saved state was; raises UsageError when flags or files do not allow.

    Returns whether the newest state is corrupt, so that the one before it is used.
    """
    path, sampler, ranks = run.config.resume_file, run.sampler, run.ranks
    (content, problem), run.saved = run.saved, None
    check_fingerprints(path, run.fingerprints, content["fingerprints"])
    check_settings(run, content)
    if problem:
        ranks.print(f"warning: {problem}. The state before it is used")
    name_changes(run, content)
    run.model.load_state_dict(content["model"])
    run.optimizer.load_state_dict(content["optimizer"])
    progress.scaler.load_state_dict(content["scaler"])
    state = progress.state = TrainState(**content["state"])
    sampler.grain = content["grain"]
    keep_global_batch(sampler, content["samples_per_update"], ranks)
    total = state.update + sampler.count_updates(run.config.epochs, state.epoch, state.samples)
    progress.schedule = Schedule(**content["schedule"])
    if progress.schedule.total != total:
        progress.schedule = progress.schedule.continued(state.update, total)
    if ranks.is_main:  # the sums of all ranks
        progress.interval = Interval(ranks.device, **content["interval"])
    else:
        progress.interval.sums[2:] = torch.tensor(content["interval"]["sums"][2:])
    if content["ranks"] == ranks.size:
        set_rng_state(content["rng"][ranks.rank], ranks.device)
        keep_threads(content.get("threads"), ranks)
    used = previous_state(path) if problem else path
    left = (run.config.epochs - state.epoch) * sampler.size - state.samples
    ranks.print(
        f"resumed from {used} (saved {time.strftime('%Y-%m-%d %H:%M', time.localtime(used.stat().st_mtime))}): {state.update} updates done, epoch {state.epoch + 1},"
        f" sample {state.samples} of {sampler.size}; {left} to go"
    )
    return problem is not None


def check_settings(run: Run, content: dict) -> None:
    """Raises UsageError when a setting that must stay is another than in the saved state."""
    path = run.config.resume_file
    for name in FIXED:
        now, then = getattr(run.config, name), content["config"][name]
        if now != then:
            raise UsageError(f"{path} was saved with --{name} {then}, now it is {now}: no exact resume is possible")
    share, then = run.config.eval_share, content["config"].get("eval_data_path")
    if share != share_of(then):
        raise UsageError(
            f"{path} was saved with --eval_data_path {then or 'not given'}, now it is {run.config.eval_data_path or 'not given'}:"
            f" samples would be held out and trained on, and no exact resume is possible"
        )
    if content["data_size"] != run.sampler.size:
        raise UsageError(
            f"{path} was saved with {content['data_size']} training samples, {run.config.data_path} has"
            f" {run.sampler.size}: no exact resume is possible. Instead, {other_data(run.config)}"
        )


def other_data(config: TrainConfig) -> str:
    """What to do where a resume is not possible, because the number of samples is another."""
    return f"train anew from the saved weights: --from_weight {config.save_weight} without --from_resume"


def name_changes(run: Run, content: dict) -> None:
    """Says what will make the run another than an uninterrupted one."""
    config: TrainConfig = run.config
    changed = [f"--{name} {then} -> {getattr(config, name)}" for name in SHAPING
               if (then := content["config"][name]) not in (None, getattr(config, name))]  # fmt: skip
    if changed:
        run.ranks.print(f"notice: not what an uninterrupted run would do: {', '.join(changed)}")
    if content["data"] != run.dataset.samples.fingerprint():
        run.ranks.print(f"notice: not what an uninterrupted run would do: {config.data_path} does not hold what was trained on before")


def keep_threads(wanted: int | None, ranks: Ranks) -> None:
    """Computes on as many threads as before where there are so many cores: by others, sums are rounded otherwise."""
    now = torch.get_num_threads()
    if ranks.device.type != "cpu" or wanted in (None, now):
        return
    if wanted * ranks.local_size <= cores():
        torch.set_num_threads(wanted)
        ranks.print(f"notice: {wanted} threads instead of {now}, as before the interruption")
    else:
        ranks.print(f"notice: not what an uninterrupted run would do: {wanted} -> {now} threads")


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
