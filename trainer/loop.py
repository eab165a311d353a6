"""The training loop. An update is: a few micro-batches forward and backward, clipping, one step of the optimizer.

What is exact here, and tested: a loss is the mean over the supervised tokens of the whole update, however these are
spread over micro-batches and ranks; every sample of an epoch is trained on once, across interruptions; a resumed run
ends bit for bit (on a CPU) where an uninterrupted one does.
"""

import contextlib
import math
import resource
import signal
import time
from dataclasses import asdict, dataclass, fields
from itertools import islice

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dataset.vlm_dataset import BadSample, Batch
from model.vision import normalize

from .build import Run, build_loader, worker_count
from .checkpoint import (
    TrainState,
    check_fingerprints,
    load_training_state,
    rng_state,
    save_training_state,
    save_weights,
    set_rng_state,
)
from .config import UsageError
from .signals import StopRequest
from .tracking import Tracker

MOST_BAD = 0.01  # share of unusable samples past which a run stops
BAD_GRACE = 10  # so many bad samples are borne before the share is judged within an epoch
MOST_NON_FINITE = 3  # updates in a row


class TrainingFailed(Exception):
    """A run that cannot go on; the last good state is on disk. The scripts end with exit code 1."""


@dataclass
class Interval:
    """Sums over the updates since the last log line, over all ranks."""

    loss: float = 0.0
    aux_loss: float = 0.0
    supervised: float = 0.0
    tokens: float = 0.0
    updates: float = 0.0


def cosine(update: int, total: int, peak: float) -> float:
    """Learning rate after `update` finished updates of `total`: from the peak to a tenth of it (arXiv 1608.03983)."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * update / total)))


class Trainer:
    """One run from its first update, or from where it left off, to its last."""

    def __init__(self, run: Run):
        self.run, self.config, self.ranks = run, run.config, run.ranks
        self.state, self.interval = TrainState(), Interval()
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=run.dtype == torch.float16)
        self.parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.total = self.config.epochs * run.sampler.updates_per_epoch
        self.non_finite = 0  # in a row
        self.reported: set[int] = set()
        self.saved_update = -1
        if self.config.from_resume:
            self.restore()
        self.model = run.model
        if self.ranks.size > 1:
            self.model = DistributedDataParallel(run.model, broadcast_buffers=False)
        self.workers = worker_count(self.config.num_workers, self.ranks)
        self.tracker = Tracker(self.config, self.ranks.is_main, self.state.update, self.total, self.state.tracker_id)

    def train(self) -> int:
        """Trains to the end, or until a signal asks to stop. Returns the process's exit code."""
        self.began, self.began_update = time.monotonic(), self.state.update
        with StopRequest() as stop:
            while self.state.epoch < self.config.epochs:
                loader, sizes = build_loader(self.run, self.state.epoch, self.state.samples, self.workers)
                with contextlib.closing(batch for batch in loader) as batches:  # ends the loader's processes, too
                    for size in sizes:
                        micro_batches = list(islice(batches, size))
                        supervised, tokens, signum = self.agree(micro_batches, stop.signum)
                        if signum:
                            return self.stop_early(signum)
                        learning_rate = cosine(self.state.update, self.total, self.config.learning_rate)
                        self.update(micro_batches, learning_rate, supervised, tokens)
                        self.advance()
                        self.log_if_due(learning_rate)
                        self.save_if_due()
        self.save_if_due(last=True)
        self.tracker.close()
        return 0

    def agree(self, micro_batches: list[Batch], signum: int) -> tuple[float, float, int]:
        """What all ranks have to know of an update before it: supervised tokens, tokens, and a signal that came.

        Counts bad samples on the way; raises TrainingFailed when there are too many.
        """
        bad = [sample for batch in micro_batches for sample in batch.bad]
        for sample in bad:
            self.report_bad(sample)
        read = len(bad) + sum(len(batch.indices) for batch in micro_batches)
        sums = self.ranks.sum([
            sum(batch.supervised for batch in micro_batches), sum(batch.tokens for batch in micro_batches),
            float(read), float(len(bad)), float(signum),
        ])  # fmt: skip
        supervised, tokens, read, bad_count, any_signal = sums
        if any_signal:  # these samples wait for the resume, which counts them then
            return supervised, tokens, signum or signal.SIGTERM  # 0: another rank was asked to stop
        self.state.read, self.state.bad = self.state.read + int(read), self.state.bad + int(bad_count)
        epoch_done = self.state.samples + read >= self.run.sampler.size
        if bad_count and self.config.on_bad_sample == "raise":
            raise TrainingFailed("stopped at the first bad sample (--on_bad_sample raise)")
        if self.state.bad > MOST_BAD * self.state.read and (self.state.bad > BAD_GRACE or epoch_done):
            raise TrainingFailed(
                f"{self.state.bad} of {self.state.read} samples read were bad, more than {MOST_BAD:.0%}: something is"
                f" wrong with the data as a whole (the first are named above)"
            )
        return supervised, tokens, 0

    def report_bad(self, sample: BadSample) -> None:
        """Says once what is wrong with a sample."""
        if sample.index not in self.reported:
            self.reported.add(sample.index)
            self.ranks.warn(f"bad sample skipped: {sample.reason}")

    def update(self, micro_batches: list[Batch], learning_rate: float, supervised: float, tokens: float) -> None:
        """Forward and backward over all micro-batches, then one step, unless something is not finite."""
        for group in self.run.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum = aux_sum = 0.0
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last or self.ranks.size == 1 else self.model.no_sync():
                loss, aux_loss = self.forward(batch)
                loss = loss * (batch.supervised / max(1.0, supervised))
                aux_loss = aux_loss / (len(micro_batches) * self.ranks.size)
                # DDP averages gradients over ranks; what we want is their sum.
                self.scaler.scale((loss + aux_loss) * self.ranks.size).backward()
            loss_sum, aux_sum = loss_sum + float(loss.detach()), aux_sum + float(aux_loss.detach())
        self.step(micro_batches, math.isfinite(loss_sum + aux_sum))
        loss_sum, aux_sum = self.ranks.sum([loss_sum, aux_sum])
        self.interval.loss += loss_sum * supervised
        self.interval.aux_loss += aux_sum
        self.interval.supervised += supervised
        self.interval.tokens += tokens
        self.interval.updates += 1

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy over the batch's supervised tokens, and the auxiliary loss (0 for a dense model)."""
        batch = batch.to(self.ranks.device)
        dtype = self.run.dtype
        with torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = self.model(
                batch.ids, labels=batch.labels, pixel_values=normalize(batch.pixels),
                image_positions=batch.image_positions,
                # Rows are padded on the right: causal attention needs no mask, only the routers' loss does.
                attention_mask=batch.attention_mask if self.config.use_moe else None,
            )  # fmt: skip
        return out.loss, out.aux_loss if out.aux_loss is not None else out.loss.new_zeros(())

    def step(self, micro_batches: list[Batch], loss_is_finite: bool) -> None:
        """Clips and steps. A loss or gradient that is not finite changes nothing and is reported with its samples;
        an fp16 overflow, which the scaler handles, is no error."""
        self.scaler.unscale_(self.run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        (broken,) = self.ranks.sum([0.0 if loss_is_finite else 1.0])
        if broken or not (torch.isfinite(norm) or self.scaler.is_enabled()):
            self.non_finite += 1
            samples = [self.run.dataset.samples.where(index) for batch in micro_batches for index in batch.indices]
            self.ranks.warn(f"loss or gradient is not finite: no update. Samples: {', '.join(samples)}")
            if self.scaler.is_enabled():
                self.scaler.update(self.scaler.get_scale() / 2)
        else:
            self.non_finite = 0
            self.scaler.step(self.run.optimizer)
            self.scaler.update()
        self.run.optimizer.zero_grad()
        if self.non_finite >= MOST_NON_FINITE:
            raise TrainingFailed(
                f"{MOST_NON_FINITE} updates in a row were not finite; the last good state is"
                f" {self.config.resume_file}. Lower --learning_rate, look at the samples named, or try --dtype float32"
            )

    def advance(self) -> None:
        """Counts the update just finished."""
        sampler = self.run.sampler
        self.state.update += 1
        self.state.samples = min(sampler.size, self.state.samples + sampler.samples_per_update)
        if self.state.samples == sampler.size:
            self.state.epoch, self.state.samples = self.state.epoch + 1, 0
        self.tracker.advance()

    def log_if_due(self, learning_rate: float) -> None:
        """Logs the first update, every log_interval-th and the last."""
        update = self.state.update
        if update != 1 and update % self.config.log_interval and update != self.total:
            return
        now = time.monotonic()
        elapsed = now - getattr(self, "logged", self.began)
        per_update = (now - self.began) / (update - self.began_update)
        accelerator = self.ranks.device.type == "cuda"
        memory = torch.accelerator.max_memory_allocated() if accelerator else _peak_memory()
        self.tracker.log({
            "update": update, "epoch": self.state.epoch + self.state.samples / self.run.sampler.size,
            "loss": self.interval.loss / max(1.0, self.interval.supervised),
            "aux_loss": self.interval.aux_loss / self.interval.updates,
            "learning_rate": learning_rate, "tokens_per_second": self.interval.tokens / max(elapsed, 1e-9),
            "seconds": self.state.seconds + now - self.began, "seconds_left": per_update * (self.total - update),
            "peak_memory_mb": memory / 2**20, "bad_samples": self.state.bad,
        })  # fmt: skip
        if update == 1:
            vocabulary = self.run.model.config.vocab_size
            self.tracker.message(f"first loss; a model that knows nothing has ln({vocabulary}) = {math.log(vocabulary):.2f}")
        self.logged, self.interval = now, Interval()

    def save_if_due(self, last: bool = False) -> None:
        """Saves every save_interval-th update and the last one."""
        due = last or self.state.update % self.config.save_interval == 0
        if due and self.state.update != self.saved_update:
            self.save()

    def save(self) -> None:
        """Weights, sidecar and training state, by the first rank; the random states are everybody's."""
        self.saved_update = self.state.update
        states = [rng_state(self.ranks.device)]
        if self.ranks.size > 1:
            states = [None] * self.ranks.size
            dist.all_gather_object(states, rng_state(self.ranks.device))
        if not self.ranks.is_main:
            return
        now = time.monotonic()
        self.state.tracker_id = self.tracker.run_id
        state = TrainState(**{**asdict(self.state), "seconds": self.state.seconds + now - self.began})
        save_weights(self.config.weight_file, self.run.model, {
            "fingerprints": self.run.fingerprints, "training": asdict(self.config), "progress": asdict(state),
        })  # fmt: skip
        objects = {"model": self.run.model, "optimizer": self.run.optimizer, "scaler": self.scaler}
        save_training_state(self.config.resume_file, state, objects, {
            "interval": asdict(self.interval), "rng": states, "ranks": self.ranks.size,
            "fingerprints": self.run.fingerprints, "config": asdict(self.config), "data_size": self.run.sampler.size,
        })  # fmt: skip

    def restore(self) -> None:
        """Brings everything back to where the saved state was; raises UsageError when flags or files do not allow."""
        path = self.config.resume_file
        content = load_training_state(path)
        check_fingerprints(path, self.run.fingerprints, content["fingerprints"])
        for name in ("seed", "freeze_llm", "hidden_size", "num_hidden_layers", "use_moe"):
            now, then = getattr(self.config, name), content["config"][name]
            if now != then:
                raise UsageError(f"{path} was saved with --{name} {then}, now it is {now}: no exact resume is possible")
        if content["data_size"] != self.run.sampler.size:
            raise UsageError(
                f"{path} was saved with {content['data_size']} training samples, {self.config.data_path} has"
                f" {self.run.sampler.size}: no exact resume is possible"
            )
        self.run.model.load_state_dict(content["model"])
        self.run.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.state = TrainState(**content["state"])
        self.interval = Interval(**{item.name: content["interval"][item.name] for item in fields(Interval)})
        if content["ranks"] == self.ranks.size:
            set_rng_state(content["rng"][self.ranks.rank], self.ranks.device)
        self.saved_update = self.state.update
        self.ranks.print(
            f"resumed from {path}: {self.state.update} updates done, epoch {self.state.epoch + 1},"
            f" sample {self.state.samples} of {self.run.sampler.size}"
        )

    def stop_early(self, signum: int) -> int:
        """Saves what is done and says how to go on."""
        self.save_if_due(last=True)
        self.tracker.close()
        self.ranks.print(
            f"stopped by {signal.Signals(signum).name} after update {self.state.update} of {self.total}; saved."
            f" To go on, repeat the command with --from_resume 1"
        )
        return 143 if signum == signal.SIGTERM else 0


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
