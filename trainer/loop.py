"""The training loop. An update is: a few micro-batches forward and backward, clipping, one step of the optimizer.

What is exact here, and tested: a loss is the mean over the supervised tokens of the whole update, however these are
spread over micro-batches and ranks; every sample of an epoch is trained on once, across interruptions; a resumed run
ends bit for bit (on a CPU) where an uninterrupted one does.

Shapes: B rows of T tokens in a micro-batch, S of them supervised; N images, each P patch vectors of width W.
"""

import contextlib
import math
import signal
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dataset.vlm_dataset import Batch
from machine import peak_memory
from model.storage import StorageError

from .build import Loader, Run, worker_count
from .checkpoint import Saver, TrainState, snapshot
from .guards import BadData, BadSampleGuard, FiniteGuard, Stopped, StopRequest, TrainingFailed
from .tracking import Tracker

MOST_UNREAD = 100  # updates whose outcome may wait on the device


def cosine(progress: float, peak: float) -> float:
    """Learning rate at a fraction of the run in [0, 1]: from the peak to a tenth of it (arXiv 1608.03983)."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def compute_loss(run: Run, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy over the batch's supervised tokens, and the routers' auxiliary loss (0 for a dense model).

    `model` is the run's, or what distributed training wraps it in.
    """
    batch = batch.to(run.ranks.device)
    features = encode(run, batch)
    # The decoder computes in bf16 or fp16; its weights, their gradients and the optimizer's averages stay in fp32: bf16
    # keeps eight bits, in which an update of a thousandth of a weight would be lost.
    with run.autocast():
        out = model(
            batch.ids, labels=batch.labels, loss_positions=batch.loss_positions, use_cache=False,
            image_features=features, image_positions=batch.image_positions,
            # Rows are padded on the right: causal attention needs no mask, only the routers' loss does.
            token_mask=batch.attention_mask if run.config.use_moe else None,
        )  # fmt: skip
    return out.loss, out.aux_loss if out.aux_loss is not None else out.loss.new_zeros(())


def encode(run: Run, batch: Batch) -> torch.Tensor:
    """Patch vectors [images shown in the batch, P, W]. An image is encoded once, and not at all if it is in the cache.

    Rounded to bf16 whatever the run's format, as the cache keeps them: a run with the cache is the run without it.
    """
    features = batch.features  # [images read from the cache, P, W]
    if len(batch.pixels):
        # The vision encoder is frozen: no gradient, always in eval mode (see model/vision.py).
        features = run.model.encode_images(batch.pixels).to(torch.bfloat16)
        if run.cache:
            run.cache.write(batch.entries, features)
        if len(batch.features):
            features = torch.cat([features, batch.features])
    return features[batch.image_index].to(run.dtype)  # an image shown twice is taken twice


class Trainer:
    """One run from its first update, or from where it left off, to its last."""

    def __init__(self, run: Run):
        self.run, self.config, self.ranks = run, run.config, run.ranks
        self.parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.state = TrainState()
        if self.config.from_resume:
            from .resume import restore  # not needed without

            self.state = restore(run)
        left = run.sampler.count_updates(self.config.epochs, self.state.epoch, self.state.samples)
        self.total = self.state.update + left
        # Sums since the last log line: cross-entropy and auxiliary loss of this rank; supervised tokens, updates and
        # tokens of all ranks.
        self.interval = torch.zeros(5, device=run.ranks.device)
        self.saver = Saver(resumed=bool(self.config.from_resume))
        self.saved_update, self.has_news = self.state.update, False  # without news, nothing on disk is replaced
        self.model = run.model
        if self.ranks.size > 1:  # from here on a backward averages the gradients of all ranks
            self.model = DistributedDataParallel(run.model, forward_sync_buffers=False)
        self.bad_samples = BadSampleGuard(self.ranks, self.config.on_bad_sample == "raise")
        self.finite = FiniteGuard(self.ranks, run.dataset.samples.where, self.config.resume_file)
        workers = worker_count(self.config.num_workers, self.ranks)
        self.loader = Loader(run, workers)
        self.validation = self.make_validation(workers) if self.config.eval_data_path else None
        self.logged = self.began = time.monotonic()
        self.began_update = self.state.update
        self.tracker = Tracker(self.config, self.ranks.is_main, self.state.update, self.total, self.state.tracker_id)
        self.state.tracker_id = self.tracker.run_id

    def make_validation(self, workers: int):
        """What measures the model on held-out data."""
        from .validation import Validation  # it uses encode, from here

        return Validation(self.run, workers)

    def train(self) -> int:
        """Trains to the end, or until a signal asks to stop: then returns its number, else 0. Everything is saved."""
        stopped_by = 0
        with StopRequest() as stop, self.tracker:
            if self.config.from_resume:
                self.save_weights(self.config.weight_file)  # a kill may have come between the state and them
            try:
                self.validate_if_due(stop)  # a stop may have cut the last one short
                self.train_epochs(self.config.epochs, stop)
            except Stopped as stopped:
                stopped_by = stopped.signum
            except BadData as error:
                if not self.has_news:
                    raise TrainingFailed(f"{error}. Nothing was trained since the start; mend that and start as before") from error
                self.state.epoch_bad = 0  # a resume counts bad samples from here on
                self.save_if_due(last=True)
                self.saver.wait()
                remedy = error.remedy.format(weight=self.config.save_weight)
                raise TrainingFailed(f"{error}. What was trained until update {self.state.update} is saved. {remedy}") from error
            self.save_if_due(last=True)
            self.saver.wait()
        return stopped_by

    def train_epochs(self, until: int, stop: StopRequest) -> None:
        """Trains on what is left of the epochs below `until`. Raises Stopped when a signal came."""
        for epoch in range(self.state.epoch, until):
            for micro_batches in self.loader.epoch(epoch, skip=self.state.samples):
                supervised, tokens = self.agree(micro_batches, stop)
                learning_rate = cosine(self.state.progress, self.config.learning_rate)
                if supervised:  # else all its samples were bad, and momentum would move the weights all the same
                    self.update(micro_batches, learning_rate, supervised, tokens)
                self.state.advance(self.run.sampler, self.total)
                self.tracker.advance()
                self.log_if_due(learning_rate)
                self.validate_if_due(stop)
                self.save_if_due()
            if self.run.cache:
                self.run.cache.flush()  # the next epoch's readers find everything

    def agree(self, micro_batches: list[Batch], stop: StopRequest) -> tuple[float, float]:
        """Supervised tokens and all tokens of an update, over all ranks: each needs them before its backward.

        Counts bad samples on the way. Raises BadData when there are too many, Stopped when a signal came to any rank.
        """
        bad = [sample for batch in micro_batches for sample in batch.bad]
        truncated = [sample for batch in micro_batches for sample in batch.truncated]
        self.bad_samples.report(bad, truncated)
        supervised, tokens, good, bad_count, truncated_count, signals = self.ranks.sum([
            sum(batch.supervised for batch in micro_batches), sum(batch.tokens for batch in micro_batches),
            sum(len(batch.indices) for batch in micro_batches), len(bad), len(truncated), stop.signum,
        ])  # fmt: skip
        if signals:  # these samples wait for the resume, which counts them then
            raise Stopped(stop.signum or signal.SIGTERM)  # 0: another rank was asked to stop
        state, new, read = self.state, int(bad_count), int(good + bad_count)
        done = state.samples + read
        self.bad_samples.judge(new, state.epoch_bad + new, done, done >= self.run.sampler.size)
        state.read, state.bad, state.epoch_bad = state.read + read, state.bad + new, state.epoch_bad + new
        state.truncated += int(truncated_count)
        return supervised, tokens

    def update(self, micro_batches: list[Batch], learning_rate: float, supervised: float, tokens: float) -> None:
        """Forward and backward over all micro-batches, then one step. Nothing here waits for the device."""
        self.has_news = True
        for group in self.run.optimizer.param_groups:
            group["lr"] = learning_rate
        # Sums stay on the device: to ask for a number (.item()) is to wait for everything that was queued before it.
        loss_sum = aux_sum = torch.zeros((), device=self.ranks.device)
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with self.exchange(last):
                loss, aux_loss = compute_loss(self.run, self.model, batch)
                # The mean of micro-batches' means is not the mean over tokens: sum first, then divide by all.
                loss = loss * batch.supervised
                aux_loss = aux_loss / (len(micro_batches) * self.ranks.size)
                # DDP averages gradients over ranks; what we want is their sum.
                self.run.scaler.scale((loss / supervised + aux_loss) * self.ranks.size).backward()
            loss_sum, aux_sum = loss_sum + loss.detach(), aux_sum + aux_loss.detach()
        broken = self.step(loss_sum + aux_sum)
        self.finite.add(broken, [index for batch in micro_batches for index in batch.indices])
        if self.ranks.device.type == "cpu" or len(self.finite.unread) == MOST_UNREAD:
            self.finite.read()
        counts = [loss_sum.new_full((), value) for value in (supervised, 1, tokens)]  # made on the device, not copied
        self.interval += torch.where(broken > 0, 0.0, torch.stack([loss_sum, aux_sum, *counts]))

    def exchange(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are exchanged between ranks once an update, during the backward of the last micro-batch."""
        return contextlib.nullcontext() if last or self.ranks.size == 1 else self.model.no_sync()

    def step(self, loss: torch.Tensor) -> torch.Tensor:
        """Clips and steps. A loss or gradient that is not finite changes nothing; returns a tensor that is then 1.

        An fp16 overflow, which the scaler handles itself, is no error.
        """
        optimizer, scaler = self.run.optimizer, self.run.scaler
        scaler.unscale_(optimizer)  # scaled up, gradients lie within fp16's range; their norm is that of the true ones
        # One odd batch must not throw the weights far away: gradients that are longer than grad_clip are shortened.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        broken = (~torch.isfinite(loss if scaler.is_enabled() else loss + norm)).float()
        if self.ranks.size > 1:
            dist.all_reduce(broken, dist.ReduceOp.MAX)  # one rank's is everybody's: weights must stay the same on all
        if scaler.is_enabled():
            scaler.step(optimizer)  # leaves out a step with a non-finite gradient
            scaler.update()
        else:
            optimizer.found_inf = broken  # likewise: a fused optimizer looks at it on the device, as with a scaler
            optimizer.step()
            del optimizer.found_inf
        optimizer.zero_grad()
        return broken

    def log_if_due(self, learning_rate: float) -> None:
        """Logs the first update, every log_interval-th and the last."""
        update = self.state.update
        if update not in (1, self.total) and update % self.config.log_interval:
            return
        self.finite.read()
        values, tokens, text = self.figures()
        now = time.monotonic()
        per_update = (now - self.began) / (update - self.began_update)
        memory = torch.accelerator.max_memory_allocated() if self.ranks.device.type == "cuda" else peak_memory()
        self.tracker.log({
            "update": update, "epoch": self.state.epoch + self.state.samples / self.run.sampler.size,
            **values, "learning_rate": learning_rate, "tokens_per_second": tokens / max(now - self.logged, 1e-9),
            "seconds": self.progress()["seconds"], "seconds_left": per_update * (self.total - update),
            "peak_memory_mb": memory / 2**20, "bad_samples": self.state.bad,
            "truncated_images": self.state.truncated,
        }, text)  # fmt: skip
        self.logged = now
        if update == 1 and values.get("loss"):
            # To guess evenly among V tokens costs ln(V): a first loss far above that means that something is wrong.
            V = self.run.model.config.vocab_size
            self.tracker.message(f"first loss {values['loss']:.2f}; a model that knows nothing has ln({V}) = {math.log(V):.2f}")

    def figures(self) -> tuple[dict[str, float | None], float, str]:
        """Losses since the last log line, None where all samples were bad or no loss was finite; tokens; the losses in words."""
        loss, aux_loss, supervised, updates, tokens = self.interval.tolist()
        loss, aux_loss = self.ranks.sum([loss, aux_loss])
        self.interval.zero_()
        if not supervised:
            return {"loss": None, "aux_loss": None}, tokens, "nothing trained"
        loss, aux_loss = loss / supervised, aux_loss / updates
        return {"loss": loss, "aux_loss": aux_loss}, tokens, f"loss {loss:.4f}" + (f" aux {aux_loss:.4f}" if aux_loss else "")

    def validate_if_due(self, stop: StopRequest) -> None:
        """Measures the loss on held-out data and keeps the weights when it is the lowest so far.

        Nothing of it reaches the training: neither weights nor random states nor the figures of an interval.
        """
        state = self.state
        if self.validation is None or not self.validation.due(state, self.total):
            return
        begin = time.monotonic()
        figures, answers, text, loss = self.validation.measure(stop)  # stopped by a signal, a resume does it
        best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        state.validated, self.saved_update, self.has_news = state.update, -1, True
        if best:
            state.best_loss, state.best_update = loss, state.update
            self.save_weights(self.config.best_file)
        self.logged += time.monotonic() - begin
        self.tracker.log_validation({
            "update": state.update, "epoch": state.epoch + state.samples / self.run.sampler.size,
            "seconds": self.progress()["seconds"], **figures, "best": best, "samples": answers,
        }, text)  # fmt: skip

    def save_if_due(self, last: bool = False) -> None:
        """Saves every save_interval-th update and the last one, when there is something new to save."""
        due = last or self.state.update % self.config.save_interval == 0
        if not (due and self.has_news and self.state.update != self.saved_update):
            return
        self.finite.read()
        self.saved_update = self.state.update
        if self.ranks.is_main:
            if self.run.cache:
                self.run.cache.flush()
            self.save_weights(self.config.weight_file, self.snapshot())

    def snapshot(self) -> dict:
        """The content of a training state."""
        return snapshot(self.run, self.progress())

    def save_weights(self, weight_file: Path, content: dict | None = None) -> None:
        """Weights and sidecar, and before them the training state with this content, if any; by the first rank.

        A save that fails is reported, and training continues: the next one may work.
        """
        if not self.ranks.is_main:
            return
        sidecar = {"fingerprints": self.run.fingerprints, "training": asdict(self.config), "progress": self.progress()}
        try:
            self.saver.save(weight_file, self.run.model, sidecar, self.config.resume_file if content else None, content)
        except StorageError as error:
            self.ranks.warn(f"warning: a save failed, training continues: {error}")

    def progress(self) -> dict:
        """The state as it is saved: with the time spent until now."""
        return asdict(self.state) | {"seconds": self.state.seconds + time.monotonic() - self.began}
