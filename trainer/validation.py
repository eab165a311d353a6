"""Loss on held-out data while a run trains, and what the model answers to a few questions of it.

The data are files of their own, or a share of the training samples that no epoch takes. All ranks measure together; pictures
are encoded as in training: anew each time, or with --cache_features once.
"""

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from dataset.images import open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import BadSample, Sample, VLMDataset
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.errors import DataError, UsageError
from model.inference.assistant import Assistant
from model.inference.generation import Sampling
from model.vision import normalize, preprocess

from .build import Run, build_loader, open_cache
from .guards import BadSampleGuard
from .objective import Objective
from .progress import TrainState
from .sampler import ResumableSampler
from .signals import StopRequest

ASKED = 3  # questions answered at each validation
ANSWER = Sampling(max_new_tokens=32, temperature=0.0)


@dataclass(frozen=True)
class Result:
    """One validation: mean cross-entropy over all supervised tokens of the held-out samples, and answers."""

    loss: float
    samples: list[dict]


@dataclass(frozen=True)
class Asked:
    """A question that is asked at each validation: the conversation up to it, its pictures, and the record of it."""

    turns: tuple[Turn, ...]
    features: tuple[torch.Tensor, ...]  # [P, W] each
    record: dict


def better(loss: float, best: float | None) -> bool:
    """Whether a validation loss is the lowest so far."""
    return math.isfinite(loss) and (best is None or loss < best)


def hold_out(run: Run) -> tuple[Run, np.ndarray]:
    """The run with the held-out data in place of the training data, and the numbers of its samples.

    Raises UsageError for files that are missing or of another kind.
    """
    config, ranks, image_tokens = run.config, run.ranks, run.model.config.image_tokens
    if config.eval_share:
        dataset, numbers = run.dataset, run.dataset.samples.held_out
    else:
        of_files = replace(config, data_path=config.eval_data_path, images_path=config.eval_images_path or config.images_path)
        try:
            samples, images = open_samples(of_files.data_path), open_images(of_files.images_path)
        except DataError as error:
            raise UsageError(f"--eval_data_path: {error}") from error
        tower = run.fingerprints["vision_encoder"]
        cache = open_cache(of_files, ranks, run.model, samples, tower) if config.cache_features else None
        dataset = VLMDataset(samples, images, run.dataset.renderer, config.max_seq_len, cache)
        numbers = np.sort(samples.order(config.seed, 0)(np.arange(samples.epoch_size)))
    sampler = ResumableSampler(
        len(numbers), config.batch_size, 1, config.seed, ranks.rank, ranks.size,
        lambda indices: dataset.samples.lengths(indices, image_tokens).clip(max=config.max_seq_len),
        lambda _: numbers.take,
    )  # fmt: skip
    return replace(run, dataset=dataset, sampler=sampler), numbers


class Validation:
    """Measures a run's model on held-out data."""

    def __init__(self, run: Run, workers: int):
        self.run, numbers = hold_out(run)
        self.loader, self.interval = build_loader(self.run, workers), run.config.eval_interval
        self.objective = Objective(self.run)
        self.bad_samples = BadSampleGuard(run.ranks, run.config.on_bad_sample == "raise")
        self.asked = self.choose_questions(numbers) if run.ranks.is_main else []
        when = f"every {self.interval} updates and at the end" if self.interval else "after every epoch"
        run.ranks.print(f"validation: {len(numbers)} samples, {when}; the best weights go to {run.config.best_file}")

    def due(self, state: TrainState, total: int) -> bool:
        """Whether the update just finished is one to validate after, and has not been."""
        update = state.update
        regular = update % self.interval == 0 if self.interval else state.samples == 0
        return (regular or update == total) and update != state.validated

    def measure(self, stop: StopRequest) -> Result | None:
        """Loss and answers; None when a signal came meanwhile to any rank."""
        self.run.model.eval()
        try:
            loss = self.loss(stop)
            return None if loss is None else Result(loss, self.answers())
        finally:
            self.run.model.train()

    @torch.no_grad()
    def loss(self, stop: StopRequest) -> float | None:
        """Mean cross-entropy over the supervised tokens of all ranks' samples; None when a signal came to one of them.

        Raises TrainingFailed when too many samples are bad.
        """
        total, supervised, read, bad = 0.0, 0, 0, 0
        for batch in self.loader:
            if stop.signum:
                break
            self.bad_samples.report(list(batch.bad), list(batch.truncated))
            loss, _ = self.objective(self.run.model, batch)
            total, supervised = total + loss.item() * batch.supervised, supervised + batch.supervised
            read, bad = read + len(batch.indices) + len(batch.bad), bad + len(batch.bad)
        if self.run.cache:
            self.run.cache.flush()
        sums = self.run.ranks.sum([total, float(supervised), float(read), float(bad), float(stop.signum)])
        total, supervised, read, bad, any_signal = sums
        if any_signal:
            return None
        self.bad_samples.judge(int(bad), int(bad), int(read), done=True)
        return total / supervised

    def choose_questions(self, numbers: np.ndarray) -> list[Asked]:
        """The first questions of a few good samples, spread over the data: the same at each validation."""
        asked = []
        for number in numbers[np.linspace(0, len(numbers) - 1, min(ASKED, len(numbers))).astype(int)].tolist():
            if not isinstance(self.run.dataset[number], BadSample):
                asked += self.first_question(self.run.dataset.samples[number])
        return asked

    def first_question(self, sample: Sample) -> list[Asked]:
        """One question, or none where nobody asks before the first answer."""
        at = next(number for number, turn in enumerate(sample.turns) if turn.role == "assistant")
        turns = sample.turns[:at]
        if not turns or turns[-1].role != "user":
            return []
        refs = sample.images[: sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")]
        record = {"question": turns[-1].content.replace(IMAGE_PLACEHOLDER, "").strip(),
                  "image": ", ".join(ref for ref in refs if isinstance(ref, str)), "where": sample.where,
                  "reference": sample.turns[at].content}  # fmt: skip
        pixels = [preprocess(self.run.dataset.images.load(ref, sample.where)) for ref in refs]
        features = self.encode(torch.stack(pixels)) if pixels else ()
        return [Asked(turns, tuple(features), record)]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features [N, P, W] of pictures uint8 [N, 3, 224, 224], rounded as in training."""
        features = self.run.model.encode_images(normalize(pixels.to(self.run.ranks.device)))
        return features.to(torch.bfloat16).to(self.run.dtype)

    def answers(self) -> list[dict]:
        """The chosen questions with greedy answers, by the first rank."""
        if not self.asked:
            return []
        model = self.run.model
        decoder = copy.deepcopy(model, {id(model.vision_encoder): None}).to(self.run.dtype)  # as it will be used
        assistant = Assistant(decoder, self.run.dataset.renderer.tokenizer)
        features, prompts = [], []
        for asked in self.asked:
            numbers = range(len(features), len(features) + len(asked.features))
            prompts.append(assistant.prompt(assistant.renderer.render_prompt(asked.turns), numbers))
            features += asked.features
        texts = assistant.answer(prompts, features, ANSWER)
        return [{**asked.record, "answer": text} for asked, text in zip(self.asked, texts, strict=True)]
