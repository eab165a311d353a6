"""The training loop. An update is: a few micro-batches forward and backward, clipping, one step of the optimizer.

What is exact here, and tested: a loss is the mean over the supervised tokens of the whole update, however these are
spread over micro-batches and ranks; every sample of an epoch is trained on once, across interruptions; a resumed run
ends bit for bit (on a CPU) where an uninterrupted one does.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dataset.vlm_dataset import Batch
from machine import peak_memory
from model.storage import StorageError

from .build import Run, build_loader, worker_count
from .checkpoint import Saver
from .guards import BadData, BadSampleGuard, FiniteGuard, TrainingFailed
from .objective import Objective
from .progress import cosine
from .resume import begin, gather_rng_states, other_data, restore, snapshot
from .signals import StopRequest
from .tracking import Tracker
from .validation import Validation, better

MOST_UNREAD = 100  # updates whose outcome may wait on the device


class Trainer:
    """One run from its first update, or from where it left off, to its last."""

    def __init__(self, run: Run):
        self.run, self.config, self.ranks = run, run.config, run.ranks
        self.progress = begin(run)
        self.parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.bad_samples = BadSampleGuard(self.ranks, self.config.on_bad_sample == "raise")
        self.finite = FiniteGuard(self.ranks, run.dataset.samples.where, self.config.resume_file)
        self.stopped_by = 0  # the signal that ended `updates` early
        self.saved_update = -1
        self.waits_for_pictures = self.config.freeze_llm == 1
        self.has_news = False  # trained or validated on something since the start: what is on disk is never replaced by less
        self.saver, self.saves_first = Saver(), False
        if self.config.from_resume:
            self.saver.newest_is_corrupt = restore(run, self.progress)
            self.saved_update = self.progress.state.update
            files = [self.config.best_file, self.config.weight_file] if self.ranks.is_main else []
            exported = [self.saver.find_export(file, self.saved_update) for file in files][-1:]
            self.saves_first = self.saver.newest_is_corrupt or not self.ranks.sum([float(sum(exported))])[0]
        self.state, self.interval, self.scaler = self.progress.state, self.progress.interval, self.progress.scaler
        self.schedule, self.total = self.progress.schedule, self.progress.schedule.total
        self.model, self.objective = run.model, Objective(run)
        if self.ranks.size > 1:
            self.model = DistributedDataParallel(run.model, forward_sync_buffers=False)
        self.workers = worker_count(self.config.num_workers, self.ranks)
        self.began, self.began_update = time.monotonic(), self.state.update
        self.logged = self.began
        self.validation = Validation(run, self.workers) if self.config.eval_data_path else None
        self.bar_is_stale = 0.0  # on the first rank
        self.tracker = Tracker(self.config, self.ranks.is_main, self.state.update, self.total, self.state.tracker_id)
        self.state.tracker_id = self.tracker.run_id

    def train(self) -> int:
        """Trains to the end, or until a signal asks to stop. Returns the process's exit code."""
        with StopRequest() as stop:
            if self.saves_first:
                self.save()
            try:
                self.validate_if_due(stop)  # a stop may have cut the last one short
                for learning_rate in self.updates(stop):
                    self.log_if_due(learning_rate)
                    self.validate_if_due(stop)
                    self.save_if_due()
            except BadData as error:
                raise TrainingFailed(f"{error}. {self.save_before_the_end()}") from error
            if self.stopped_by:
                return self.stop_early(self.stopped_by)
        self.save_if_due(last=True)
        self.finish()
        file, validated = self.config.weight_file, self.state.best_loss is not None
        best = f", those of the lowest validation loss in {self.config.best_file}" if validated else ""
        self.ranks.print(f"done. The weights are in {file}{best}. Next:\n"
                         f"  {self.config.next_command(self.config.save_weight + '_best' * validated)}")  # fmt: skip
        return 0

    def updates(self, stop: StopRequest) -> Iterator[float]:
        """Trains update by update, yielding the learning rate of each, until the end or a signal."""
        loader = build_loader(self.run, self.workers)  # its processes live through all epochs, and end with this generator
        while self.state.epoch < self.config.epochs:
            epoch, skip = self.state.epoch, self.state.samples
            loader.batch_sampler.start(epoch, skip)
            batches = iter(loader)
            for dealt in self.run.sampler.updates(epoch, skip):
                micro_batches = list(islice(batches, len(dealt)))
                supervised, tokens, self.stopped_by = self.agree(micro_batches, stop.signum)
                if self.stopped_by:
                    return
                learning_rate = cosine(self.schedule.progress(self.state.update), self.config.learning_rate)
                if supervised:  # else all its samples were bad, and decay and momentum would move the weights all the same
                    self.has_news = True
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
        truncated = [sample for batch in micro_batches for sample in batch.truncated]
        self.bad_samples.report(bad, truncated)
        read = len(bad) + sum(len(batch.indices) for batch in micro_batches)
        sums = self.ranks.sum([
            sum(batch.supervised for batch in micro_batches), sum(batch.tokens for batch in micro_batches),
            float(sum(len(batch.image_index) for batch in micro_batches)), float(read), float(len(bad)), float(signum),
            float(len(truncated)), float(self.tracker.is_stale),
        ])  # fmt: skip
        supervised, tokens, pictures, read, bad_count, any_signal, truncated_count, self.bar_is_stale = sums
        self.waits_for_pictures = self.waits_for_pictures and not pictures
        if any_signal:  # these samples wait for the resume, which counts them then
            return supervised, tokens, signum or signal.SIGTERM  # 0: another rank was asked to stop
        self.state.truncated += int(truncated_count)
        state, new, done = self.state, int(bad_count), self.state.samples + int(read)
        self.bad_samples.judge(new, state.epoch_bad + new, done, done >= self.run.sampler.size)
        state.read, state.bad, state.epoch_bad = state.read + int(read), state.bad + new, state.epoch_bad + new
        return supervised, tokens, 0

    def update(self, micro_batches: list[Batch], learning_rate: float, supervised: float, tokens: float) -> None:
        """Forward and backward over all micro-batches, then one step. Nothing here waits for the device."""
        for group in self.run.optimizer.param_groups:
            group["lr"] = learning_rate
        loss_sum = aux_sum = torch.zeros((), device=self.ranks.device)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last or self.ranks.size == 1 else self.model.no_sync():
                loss, aux_loss = self.objective(self.model, batch)
                loss = loss * batch.supervised
                aux_loss = aux_loss / (len(micro_batches) * self.ranks.size)
                # DDP averages gradients over ranks; what we want is their sum.
                self.scaler.scale((loss / max(1.0, supervised) + aux_loss) * self.ranks.size).backward()
            loss_sum, aux_sum = loss_sum + loss.detach(), aux_sum + aux_loss.detach()
        broken = self.step(loss_sum + aux_sum)
        self.finite.add(broken, [index for batch in micro_batches for index in batch.indices])
        if self.ranks.device.type == "cpu" or len(self.finite.unread) == MOST_UNREAD:
            self.finite.read()
        sums = torch.stack([loss_sum, aux_sum, loss_sum.new_full((), supervised), loss_sum.new_ones(())])
        self.interval.sums += torch.where(broken > 0, 0.0, sums)
        self.interval.tokens += tokens

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

    def advance(self) -> None:
        """Counts the update just finished."""
        sampler = self.run.sampler
        self.state.update += 1
        self.state.samples = min(sampler.size, self.state.samples + sampler.samples_per_update)
        if self.state.samples == sampler.size:
            self.state.epoch, self.state.samples, self.state.epoch_bad = self.state.epoch + 1, 0, 0
        self.tracker.advance()

    def log_if_due(self, learning_rate: float) -> None:
        """Logs the first update, every log_interval-th and the last; between them a bar's figures are brought up to date."""
        update = self.state.update
        due = update in (1, self.total) or update % self.config.log_interval == 0
        if not (due or self.bar_is_stale):
            return
        self.finite.read()
        loss, aux_loss, supervised, updates = self.interval.read(self.ranks)
        now = time.monotonic()
        elapsed = now - self.logged
        per_update = (now - self.began) / (update - self.began_update)
        accelerator = self.ranks.device.type == "cuda"
        memory = torch.accelerator.max_memory_allocated() if accelerator else peak_memory()
        values = {
            "update": update, "epoch": self.state.epoch + self.state.samples / self.run.sampler.size,
            # None: nothing was trained on, all samples were bad or no loss was finite.
            "loss": loss / supervised if supervised else None, "aux_loss": aux_loss / updates if updates else None,
            "learning_rate": learning_rate, "tokens_per_second": self.interval.tokens / max(elapsed, 1e-9),
            "seconds": self.state.seconds + now - self.began, "seconds_left": per_update * (self.total - update),
            "peak_memory_mb": memory / 2**20, "bad_samples": self.state.bad,
            "truncated_samples": self.state.truncated,
        }  # fmt: skip
        if not due:
            self.tracker.show(values)
            return
        self.tracker.log(values)
        if self.waits_for_pictures and update != 1:
            self.waits_for_pictures = False
            self.ranks.print("warning: no picture so far, so nothing was learned: --freeze_llm 1 trains the projector alone,"
                             " which sees pictures only. Use --freeze_llm 0 or 2 for text")  # fmt: skip
        if update == 1 and supervised:
            vocabulary = self.run.model.config.vocab_size
            self.tracker.message(f"first loss {values['loss']:.2f}; a model that knows nothing has ln({vocabulary}) ="
                                 f" {math.log(vocabulary):.2f}")  # fmt: skip
        self.logged = now
        self.interval.clear()

    def save_if_due(self, last: bool = False) -> None:
        """Saves every save_interval-th update and the last one, when there is something new to save."""
        due = last or self.state.update % self.config.save_interval == 0
        if due and self.has_news and self.state.update != self.saved_update:
            self.save()

    def save(self) -> None:
        """Weights, sidecar and training state, by the first rank; the random states are everybody's.

        A save that fails is reported, and training goes on: the next one may work.
        """
        self.finite.read()
        self.saved_update = self.state.update
        sums = self.interval.read(self.ranks)
        rng = gather_rng_states(self.ranks)
        if not self.ranks.is_main:
            return
        if self.run.cache:
            self.run.cache.flush()
        sidecar = self.sidecar()
        content = snapshot(self.run, self.progress, sums, rng) | {"state": sidecar["progress"]}
        objects = {"model": self.run.model, "optimizer": self.run.optimizer, "scaler": self.scaler}
        try:
            self.saver.save(self.config.resume_file, objects, content, self.config.weight_file, self.run.model, sidecar)
        except StorageError as error:
            self.ranks.warn(f"warning: a save failed, training goes on: {error}")

    def sidecar(self) -> dict:
        """What stands beside weights that are saved now."""
        progress = asdict(self.state)
        progress["seconds"] += time.monotonic() - self.began
        return {"fingerprints": self.run.fingerprints, "training": asdict(self.config), "progress": progress}

    def validate_if_due(self, stop: StopRequest) -> None:
        """Measures the loss on held-out data and keeps the weights when it is the lowest so far.

        Nothing of it reaches the training: neither weights nor random states nor the figures of an interval.
        """
        if self.validation is None or not self.validation.due(self.state, self.total):
            return
        begin = time.monotonic()
        result = self.validation.measure(stop)
        if result is None:  # a resume does it
            self.stopped_by = stop.signum or signal.SIGTERM
            return
        state, best = self.state, better(result.loss, self.state.best_loss)
        state.validated, self.saved_update, self.has_news = state.update, -1, True
        if best:
            state.best_loss, state.best_update = result.loss, state.update
            self.save_best()
        self.logged += time.monotonic() - begin
        self.tracker.log_validation({
            "update": state.update, "epoch": state.epoch + state.samples / self.run.sampler.size,
            "seconds": state.seconds + time.monotonic() - self.began, "eval_loss": result.loss, "best": best,
            "samples": result.samples,
        })  # fmt: skip

    def save_best(self) -> None:
        """Weights and sidecar, by the first rank; what cannot be written is reported."""
        if not self.ranks.is_main:
            return
        try:
            self.saver.export(self.config.best_file, self.run.model, self.sidecar())
        except StorageError as error:
            self.ranks.warn(f"warning: keeping the best weights failed, training goes on: {error}")

    def finish(self) -> None:
        """Everything is on disk when this returns; raises StorageError when it cannot be."""
        try:
            self.saver.wait()
        finally:
            self.tracker.close()

    def save_before_the_end(self) -> str:
        """Saves what was trained when the data let a run down, and says so. A resume counts bad samples anew."""
        if not self.has_news:
            return "Nothing was trained since the start; mend the data and start again"
        self.state.epoch_bad = 0
        self.save_if_due(last=True)
        self.finish()
        return (f"What was trained until update {self.state.update} is saved. Mend the data, a line for a line, and go on with"
                f" --from_resume 1; where lines go or come, {other_data(self.config)}")  # fmt: skip

    def stop_early(self, signum: int) -> int:
        """Saves what is done and says how to go on."""
        self.save_if_due(last=True)
        self.finish()
        self.ranks.print(
            f"stopped by {signal.Signals(signum).name} after update {self.state.update} of {self.total}; "
            + ("saved. To go on, repeat the command with --from_resume 1" if self.has_news else "nothing new to save")
        )
        return 128 + signum if signum in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) else 0
