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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dataset.vlm_dataset import BadSample, Batch
from model.vision import normalize

from .build import Run, build_loader, worker_count
from .checkpoint import Saver, TrainState, check_fingerprints, load_training_state, rng_state, set_rng_state
from .config import UsageError
from .distributed import Ranks
from .signals import StopRequest
from .storage import StorageError
from .tracking import Tracker

MOST_BAD = 0.01  # share of unusable samples past which a run stops
BAD_GRACE = 10  # so many bad samples are borne before the share is judged within an epoch
MOST_NON_FINITE = 3  # updates in a row
# Flags that a resumed run must not change, and those that it may but that make it another run.
FIXED = ("seed", "freeze_llm", "hidden_size", "num_hidden_layers", "use_moe")
SHAPING = ("epochs", "batch_size", "accumulation_steps", "learning_rate", "dtype", "grad_clip", "max_seq_len", "data_path")
MOST_UNREAD = 100  # updates whose outcome may wait on the device


class TrainingFailed(Exception):
    """A run that cannot go on; the last good state is on disk. The scripts end with exit code 1."""


class Interval:
    """Sums over the updates since the last log line. They stay on the device until somebody reads them.

    `sums` [4]: cross-entropy over supervised tokens and auxiliary loss, of this rank; supervised tokens and updates, of
    all. `tokens` are those of all ranks, padding apart.
    """

    def __init__(self, device: torch.device, sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0), tokens: float = 0.0):
        self.sums, self.tokens = torch.tensor(sums, device=device), tokens

    def read(self, ranks: Ranks) -> list[float]:
        """The sums over all ranks; waits for the device."""
        loss, aux_loss, supervised, updates = self.sums.tolist()
        return [*ranks.sum([loss, aux_loss]), supervised, updates]


@dataclass(frozen=True)
class Schedule:
    """How far along the learning rate's curve an update is, unbroken when a resumed run has other updates to do.

    Straight from `begin` at update `first` to 1 at update `total`.
    """

    total: int
    first: int = 0
    begin: float = 0.0

    def progress(self, update: int) -> float:
        """In [0, 1], of `update` finished updates."""
        return self.begin + (1 - self.begin) * ((update - self.first) / (self.total - self.first))

    def continued(self, update: int, total: int) -> "Schedule":
        """From where `update` updates are done towards another total."""
        return Schedule(total, update, self.progress(update)) if total > update else Schedule(total)


def cosine(progress: float, peak: float) -> float:
    """Learning rate at a share of the run in [0, 1]: from the peak to a tenth of it (arXiv 1608.03983)."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """One run from its first update, or from where it left off, to its last."""

    def __init__(self, run: Run):
        self.run, self.config, self.ranks = run, run.config, run.ranks
        self.state, self.interval = TrainState(), Interval(self.ranks.device)
        self.scaler = torch.amp.GradScaler(self.ranks.device.type, enabled=run.dtype == torch.float16)
        self.parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.total = self.config.epochs * run.sampler.updates_per_epoch
        self.non_finite = 0  # in a row
        self.unread: list[tuple[torch.Tensor, list[int]]] = []  # of updates: whether it went wrong, its samples
        self.reported: set[int] = set()
        self.cache_given_up = False
        self.stopped_by = 0  # the signal that ended `updates` early
        self.saved_update = -1
        self.saver = Saver(self.config.weight_file, self.config.resume_file)
        self.schedule = Schedule(self.total)
        if self.config.from_resume:
            self.restore()
        self.model = run.model
        if self.ranks.size > 1:
            self.model = DistributedDataParallel(run.model, forward_sync_buffers=False)
        self.workers = worker_count(self.config.num_workers, self.ranks)
        self.began, self.began_update = time.monotonic(), self.state.update
        self.logged = self.began
        self.tracker = Tracker(self.config, self.ranks.is_main, self.state.update, self.total, self.state.tracker_id)

    def train(self) -> int:
        """Trains to the end, or until a signal asks to stop. Returns the process's exit code."""
        with StopRequest() as stop:
            if self.saver.newest_is_torn:
                self.save()
            for learning_rate in self.updates(stop):
                self.log_if_due(learning_rate)
                self.save_if_due()
            if self.stopped_by:
                return self.stop_early(self.stopped_by)
        self.save_if_due(last=True)
        self.finish()
        return 0

    def updates(self, stop: StopRequest) -> Iterator[float]:
        """Trains update by update, yielding the learning rate of each, until the end or a signal."""
        while self.state.epoch < self.config.epochs:
            epoch, skip = self.state.epoch, self.state.samples
            loader = build_loader(self.run, epoch, skip, self.workers)
            with contextlib.closing(batch for batch in loader) as batches:  # ends the loader's processes, too
                for dealt in self.run.sampler.updates(epoch, skip):
                    micro_batches = list(islice(batches, len(dealt)))
                    supervised, tokens, self.stopped_by = self.agree(micro_batches, stop.signum)
                    if self.stopped_by:
                        return
                    learning_rate = cosine(self.schedule.progress(self.state.update), self.config.learning_rate)
                    self.update(micro_batches, learning_rate, supervised, tokens)
                    self.advance()
                    yield learning_rate
            if self.run.cache:
                self.run.cache.flush()  # the next epoch's readers find everything

    def agree(self, micro_batches: list[Batch], signum: int) -> tuple[float, float, int]:
        """What all ranks have to know of an update before it: supervised tokens, tokens, and a signal that came.

        Counts bad samples on the way; raises TrainingFailed when there are too many.
        """
        bad = [sample for batch in micro_batches for sample in batch.bad]
        for sample in bad[:1] if self.config.on_bad_sample == "raise" else bad:
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
        """Forward and backward over all micro-batches, then one step. Nothing here waits for the device."""
        for group in self.run.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum = aux_sum = torch.zeros((), device=self.ranks.device)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last or self.ranks.size == 1 else self.model.no_sync():
                loss, aux_loss = self.forward(batch)
                loss = loss * batch.supervised
                aux_loss = aux_loss / (len(micro_batches) * self.ranks.size)
                # DDP averages gradients over ranks; what we want is their sum.
                self.scaler.scale((loss / max(1.0, supervised) + aux_loss) * self.ranks.size).backward()
            loss_sum, aux_sum = loss_sum + loss.detach(), aux_sum + aux_loss.detach()
        broken = self.step(loss_sum + aux_sum)
        self.unread.append((broken, [index for batch in micro_batches for index in batch.indices]))
        if self.ranks.device.type == "cpu" or len(self.unread) == MOST_UNREAD:
            self.read_broken()
        sums = torch.stack([loss_sum, aux_sum, loss_sum.new_full((), supervised), loss_sum.new_ones(())])
        self.interval.sums += torch.where(broken > 0, 0.0, sums)
        self.interval.tokens += tokens

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy over the batch's supervised tokens, and the auxiliary loss (0 for a dense model)."""
        batch = batch.to(self.ranks.device)
        features = self.encode(batch)
        dtype = self.run.dtype
        with torch.autocast(self.ranks.device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = self.model(
                batch.ids, labels=batch.labels, loss_positions=batch.loss_positions, image_features=features,
                # Rows are padded on the right: causal attention needs no mask, only the routers' loss does.
                image_positions=batch.image_positions, token_mask=batch.attention_mask if self.config.use_moe else None,
            )  # fmt: skip
        return out.loss, out.aux_loss if out.aux_loss is not None else out.loss.new_zeros(())

    def encode(self, batch: Batch) -> torch.Tensor:
        """Features [N, P, W] of the batch's pictures; each is encoded once, those in the cache not at all.

        Rounded to bf16 whatever the run's format, as the cache keeps them: a run with the cache is the run without it.
        """
        features = batch.features
        if len(batch.pixels):
            features = self.run.model.encode_images(normalize(batch.pixels)).to(torch.bfloat16)
            cache = self.run.cache
            if cache and cache.broken is None:
                cache.write(batch.slots, batch.signatures, features)
            elif cache and not self.cache_given_up:
                self.cache_given_up = True
                self.ranks.warn(f"warning: the feature cache keeps no more ({cache.broken}); training goes on")
            if len(batch.features):
                features = torch.cat([features, batch.features])
        return features[batch.image_index].to(self.run.dtype)

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """Clips and steps. A loss or gradient that is not finite changes nothing; returns a tensor that is then 1.

        An fp16 overflow, which the scaler handles by itself, is no error.
        """
        optimizer = self.run.optimizer
        self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        broken = (~torch.isfinite(loss if self.scaler.is_enabled() else loss + norm)).float()
        if self.ranks.size > 1:
            dist.all_reduce(broken, dist.ReduceOp.MAX)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)  # leaves out a step with a non-finite gradient
            self.scaler.update()
        else:
            optimizer.found_inf = broken  # likewise: a fused optimizer looks at it on the device, as with a scaler
            optimizer.step()
            del optimizer.found_inf
        optimizer.zero_grad()
        return broken

    def read_broken(self) -> None:
        """Names the samples of updates that went wrong; raises TrainingFailed after several in a row."""
        unread, self.unread = self.unread, []
        flags = torch.stack([broken for broken, _ in unread]).tolist() if unread else []
        for broken, (_, indices) in zip(flags, unread, strict=True):
            self.non_finite = self.non_finite + 1 if broken else 0
            if broken:
                samples = ", ".join(self.run.dataset.samples.where(index) for index in indices)
                self.ranks.warn(f"loss or gradient is not finite: no update. Samples: {samples}")
            if self.non_finite == MOST_NON_FINITE:
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
        self.read_broken()
        loss, aux_loss, supervised, updates = self.interval.read(self.ranks)
        now = time.monotonic()
        elapsed = now - self.logged
        per_update = (now - self.began) / (update - self.began_update)
        accelerator = self.ranks.device.type == "cuda"
        memory = torch.accelerator.max_memory_allocated() if accelerator else _peak_memory()
        self.tracker.log({
            "update": update, "epoch": self.state.epoch + self.state.samples / self.run.sampler.size,
            "loss": loss / max(1.0, supervised), "aux_loss": aux_loss / max(1.0, updates),
            "learning_rate": learning_rate, "tokens_per_second": self.interval.tokens / max(elapsed, 1e-9),
            "seconds": self.state.seconds + now - self.began, "seconds_left": per_update * (self.total - update),
            "peak_memory_mb": memory / 2**20, "bad_samples": self.state.bad,
        })  # fmt: skip
        if update == 1:
            vocabulary = self.run.model.config.vocab_size
            self.tracker.message(f"first loss; a model that knows nothing has ln({vocabulary}) = {math.log(vocabulary):.2f}")
        self.logged, self.interval = now, Interval(self.ranks.device)

    def save_if_due(self, last: bool = False) -> None:
        """Saves every save_interval-th update and the last one."""
        due = last or self.state.update % self.config.save_interval == 0
        if due and self.state.update != self.saved_update:
            self.save()

    def save(self) -> None:
        """Weights, sidecar and training state, by the first rank; the random states are everybody's.

        A set that cannot be written is reported, and training goes on: the next one may.
        """
        self.read_broken()
        self.saved_update = self.state.update
        sums = self.interval.read(self.ranks)
        states = [rng_state(self.ranks.device)]
        if self.ranks.size > 1:
            states = [None] * self.ranks.size
            dist.all_gather_object(states, rng_state(self.ranks.device))
        if not self.ranks.is_main:
            return
        if self.run.cache:
            self.run.cache.flush()
        now = time.monotonic()
        self.state.tracker_id = self.tracker.run_id
        state = asdict(self.state) | {"seconds": self.state.seconds + now - self.began}
        sidecar = {"fingerprints": self.run.fingerprints, "training": asdict(self.config), "progress": state}
        objects = {"model": self.run.model, "optimizer": self.run.optimizer, "scaler": self.scaler}
        try:
            self.saver.save(self.run.model, sidecar, objects, {
                "state": state, "interval": {"sums": sums, "tokens": self.interval.tokens}, "rng": states,
                "ranks": self.ranks.size, "grain": self.run.sampler.grain, "schedule": asdict(self.schedule),
                "samples_per_update": self.run.sampler.samples_per_update, "fingerprints": self.run.fingerprints,
                "config": asdict(self.config), "data_size": self.run.sampler.size,
                "data": self.run.dataset.samples.fingerprint(),
            })  # fmt: skip
        except StorageError as error:
            self.ranks.warn(f"warning: a save failed, training goes on: {error}")

    def finish(self) -> None:
        """Everything is on disk when this returns; raises StorageError when it cannot be."""
        self.tracker.close()
        self.saver.wait()

    def restore(self) -> None:
        """Brings everything back to where the saved state was; raises UsageError when flags or files do not allow."""
        path, sampler = self.config.resume_file, self.run.sampler
        content, problem = load_training_state(path)
        check_fingerprints(path, self.run.fingerprints, content["fingerprints"])
        for name in FIXED:
            now, then = getattr(self.config, name), content["config"][name]
            if now != then:
                raise UsageError(f"{path} was saved with --{name} {then}, now it is {now}: no exact resume is possible")
        if content["data_size"] != sampler.size:
            raise UsageError(
                f"{path} was saved with {content['data_size']} training samples, {self.config.data_path} has"
                f" {sampler.size}: no exact resume is possible"
            )
        if problem:
            self.ranks.print(f"warning: {problem}. The state before it is used")
        changed = [f"--{name} {content['config'][name]} -> {getattr(self.config, name)}" for name in SHAPING
                   if content["config"][name] != getattr(self.config, name)]  # fmt: skip
        if changed:
            self.ranks.print(f"notice: not what an uninterrupted run would do: {', '.join(changed)}")
        if content["data"] != self.run.dataset.samples.fingerprint():
            self.ranks.print(f"notice: not what an uninterrupted run would do: {self.config.data_path} has changed since")
        self.run.model.load_state_dict(content["model"])
        self.run.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.state = TrainState(**content["state"])
        sampler.grain = content["grain"]
        self.keep_global_batch(content["samples_per_update"])
        left = (self.config.epochs - self.state.epoch) * sampler.size - self.state.samples
        self.total = self.state.update + sampler.count_updates(self.config.epochs, self.state.epoch, self.state.samples)
        self.schedule = Schedule(**content["schedule"])
        if self.schedule.total != self.total:
            self.schedule = self.schedule.continued(self.state.update, self.total)
        if self.ranks.is_main:  # the sums of all ranks
            self.interval = Interval(self.ranks.device, **content["interval"])
        else:
            self.interval.sums[2:] = torch.tensor(content["interval"]["sums"][2:])
        if content["ranks"] == self.ranks.size:
            set_rng_state(content["rng"][self.ranks.rank], self.ranks.device)
        if problem:  # the weights on disk are of the lost state: `train` saves before anything else
            self.saver.newest_is_torn = True
        else:
            self.saved_update = self.state.update
        self.ranks.print(
            f"resumed from {path}: {self.state.update} updates done, epoch {self.state.epoch + 1},"
            f" sample {self.state.samples} of {sampler.size}; {left} to go"
        )

    def keep_global_batch(self, wanted: int) -> None:
        """With another number of processes, as many micro-batches an update as give the samples that it had before."""
        sampler = self.run.sampler
        if sampler.samples_per_update == wanted:
            return
        stride = sampler.batch_size * sampler.ranks
        if wanted % stride == 0:
            sampler.accumulation_steps = wanted // stride
            self.ranks.print(f"notice: {sampler.accumulation_steps} micro-batches an update, so that it takes"
                             f" {wanted} samples as before")  # fmt: skip
        else:
            self.ranks.print(f"notice: an update takes {sampler.samples_per_update} samples now, not {wanted}:"
                             f" {sampler.ranks} processes of --batch_size {sampler.batch_size} cannot share those evenly")  # fmt: skip

    def stop_early(self, signum: int) -> int:
        """Saves what is done and says how to go on."""
        self.save_if_due(last=True)
        self.finish()
        self.ranks.print(
            f"stopped by {signal.Signals(signum).name} after update {self.state.update} of {self.total}; saved."
            f" To go on, repeat the command with --from_resume 1"
        )
        return 143 if signum == signal.SIGTERM else 0


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
