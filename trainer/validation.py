"""Loss on held-out data while a run trains, and what the model answers to a few questions of it.

The data are files of their own, or a fraction of the training samples that no epoch takes. All ranks measure together; images
are encoded as in training: again each time, or with --cache_features once.
"""

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dataset.images import open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import BadSample, VLMDataset
from model.conversation import IMAGE_PLACEHOLDER
from model.errors import DataError, UsageError
from model.vision import normalize, preprocess

from .build import Loader, Run, make_sampler, open_cache
from .checkpoint import TrainState
from .guards import BadSampleGuard, Stopped, StopRequest

ASKED = 3  # questions answered at each validation
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Result:
    """One validation: mean cross-entropy over all supervised tokens of the held-out samples, and answers."""

    loss: float
    samples: list[dict]


@dataclass(frozen=True)
class Question:
    """A question that is asked at each validation, as the model reads it, and the record of it for the metrics file."""

    ids: torch.Tensor  # int64 [1, T]
    images: dict[str, torch.Tensor]  # image_features [N, P, W] and image_positions [N * P]; empty for text alone
    record: dict


def better(loss: float, best: float | None) -> bool:
    """Whether a validation loss is the lowest so far."""
    return math.isfinite(loss) and (best is None or loss < best)


def hold_out(run: Run) -> tuple[Run, np.ndarray]:
    """The run with the held-out data in place of the training data, and the numbers of its samples.

    Raises UsageError for files that are missing or of another kind.
    """
    config, dataset = run.config, run.dataset
    numbers = dataset.samples.held_out
    if not config.eval_fraction:
        files = replace(config, data_path=config.eval_data_path, images_path=config.eval_images_path or config.images_path)
        try:
            samples, images = open_samples(files.data_path), open_images(files.images_path)
        except DataError as error:
            raise UsageError(f"--eval_data_path: {error}") from error
        cache = open_cache(files, run.ranks, run.model, samples, run.fingerprints["vision_encoder"]) if config.cache_features else None
        dataset = VLMDataset(samples, images, dataset.renderer, config.max_seq_len, cache)
        numbers = np.sort(samples.order(config.seed, 0)(np.arange(samples.epoch_size)))
    one_by_one = replace(config, accumulation_steps=1)
    sampler = make_sampler(one_by_one, run.ranks, dataset.samples, run.model.config.image_tokens, len(numbers), lambda _: numbers.take)
    return replace(run, dataset=dataset, sampler=sampler), numbers


class Validation:
    """Measures a run's model on held-out data. `compute_loss` is the training's."""

    def __init__(self, run: Run, workers: int, compute_loss: Callable):
        self.run, numbers = hold_out(run)
        self.loader, self.interval = Loader(self.run, workers), run.config.eval_interval
        self.compute_loss = compute_loss
        self.bad_samples = BadSampleGuard(run.ranks, run.config.on_bad_sample == "raise")
        chosen = numbers[np.linspace(0, len(numbers) - 1, min(ASKED, len(numbers))).astype(int)].tolist()
        self.questions = [q for number in chosen if (q := self.first_question(number))] if run.ranks.is_main else []
        when = f"every {self.interval} updates and at the end" if self.interval else "after every epoch"
        run.ranks.print(f"validation: {len(numbers)} samples, {when}; the best weights go to {run.config.best_file}")

    def due(self, state: TrainState, total: int) -> bool:
        """Whether the update just finished is one to validate after, and has not been."""
        update = state.update
        regular = update % self.interval == 0 if self.interval else state.samples == 0
        return (regular or update == total) and update != state.validated

    @torch.no_grad()
    def measure(self, stop: StopRequest) -> Result:
        """Loss and answers. Raises Stopped when a signal comes meanwhile to any rank."""
        self.run.model.eval()
        try:
            return Result(self.loss(stop), [{**question.record, "answer": self.answer(question)} for question in self.questions])
        finally:
            self.run.model.train()

    @torch.no_grad()
    def loss(self, stop: StopRequest) -> float:
        """Mean cross-entropy over the supervised tokens of all ranks' samples.

        Raises Stopped, and BadData when too many samples are bad.
        """
        total, supervised, read, bad = 0.0, 0, 0, 0
        for [batch] in self.loader.epoch(0):
            if stop.signum:
                break
            self.bad_samples.report(list(batch.bad), list(batch.truncated))
            loss, _ = self.compute_loss(self.run, self.run.model, batch)
            total, supervised = total + loss.item() * batch.supervised, supervised + batch.supervised
            read, bad = read + len(batch.indices) + len(batch.bad), bad + len(batch.bad)
        if self.run.cache:
            self.run.cache.flush()
        total, supervised, read, bad, signals = self.run.ranks.sum([total, supervised, read, bad, stop.signum])
        if signals:
            raise Stopped(stop.signum or signal.SIGTERM)
        self.bad_samples.judge(int(bad), int(bad), int(read), done=True)
        return total / supervised

    def first_question(self, number: int) -> Question | None:
        """The conversation of a sample up to its first answer; None for a bad sample, and where nobody asks before it."""
        dataset = self.run.dataset
        if isinstance(dataset[number], BadSample):
            return None
        sample = dataset.samples[number]
        at = next(number for number, turn in enumerate(sample.turns) if turn.role == "assistant")
        turns = sample.turns[:at]
        if not turns or turns[-1].role != "user":
            return None
        prompt = dataset.renderer.render_prompt(turns)
        refs = sample.images[: len(prompt.image_starts)]
        record = {"question": turns[-1].content.replace(IMAGE_PLACEHOLDER, "").strip(),
                  "image": ", ".join(ref for ref in refs if isinstance(ref, str)), "where": sample.where,
                  "reference": sample.turns[at].content}  # fmt: skip
        images, device = {}, self.run.ranks.device
        if refs:
            pixels = torch.stack([preprocess(dataset.images.load(ref, sample.where)) for ref in refs])
            patches = torch.arange(self.run.model.config.image_tokens)
            features = self.run.model.encode_images(normalize(pixels.to(device))).to(torch.bfloat16)  # rounded as in training
            images = {"image_features": features.to(self.run.dtype),
                      "image_positions": torch.cat([start + patches for start in prompt.image_starts]).to(device)}  # fmt: skip
        return Question(torch.from_numpy(prompt.ids)[None].to(device), images, record)

    def answer(self, question: Question) -> str:
        """The model's greedy answer, by transformers' generate."""
        tokenizer = self.run.dataset.renderer.tokenizer
        with self.run.autocast(), torch.compiler.set_stance("force_eager"):
            ids = self.run.model.generate(
                question.ids, attention_mask=torch.ones_like(question.ids), max_new_tokens=ANSWER_TOKENS, do_sample=False,
                eos_token_id=self.run.dataset.renderer.im_end, pad_token_id=tokenizer.pad_token_id, **question.images,
            )  # fmt: skip
        return tokenizer.decode(ids[0, question.ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")
