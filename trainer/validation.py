"""Loss on held-out data while a run trains, and what the model answers to a few questions of it.

The data are files of their own, or a fraction of the training samples that no epoch takes. All ranks measure together; images
are encoded as in training: again each time, or with --cache_features once.
"""

import signal
from dataclasses import replace

import numpy as np
import torch

from dataset.images import open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import BadSample, VLMDataset, collate
from model.conversation import IMAGE_PLACEHOLDER, count_images
from model.errors import DataError, UsageError
from model.model_minimind import IGNORE_INDEX

from .build import Loader, Run, make_sampler, open_cache
from .checkpoint import TrainState
from .config import fraction_of
from .guards import BadSampleGuard, Stopped, StopRequest
from .loop import compute_loss, encode

ASKED = 3  # questions answered at each validation
ANSWER_TOKENS = 32


def hold_out(run: Run) -> tuple[Run, np.ndarray]:
    """The run with the held-out data in place of the training data, and the numbers of its samples.

    Raises UsageError for files that are missing or of another kind.
    """
    config, dataset = run.config, run.dataset
    numbers = dataset.samples.held_out
    if fraction_of(config.eval_data_path) is None:
        files = replace(config, data_path=config.eval_data_path, images_path=config.eval_images_path or config.images_path)
        try:
            samples, images = open_samples(files.data_path), open_images(files.images_path)
        except DataError as error:
            raise UsageError(f"--eval_data_path: {error}") from error
        encoder = run.fingerprints["vision_encoder"]
        cache = open_cache(files, run.ranks, run.model, samples, encoder) if config.cache_features else None
        dataset = VLMDataset(samples, images, dataset.renderer, config.max_seq_len, cache, dataset.settings)
        numbers = np.sort(samples.order(config.seed, 0)(np.arange(samples.epoch_size)))
    one_by_one = replace(config, accumulation_steps=1)
    sampler = make_sampler(one_by_one, run.ranks, dataset.samples, run.model.config, len(numbers), lambda _: numbers.take)
    return replace(run, dataset=dataset, sampler=sampler), numbers


class Validation:
    """Measures a run's model on held-out data."""

    def __init__(self, run: Run, workers: int):
        self.run, numbers = hold_out(run)
        self.loader, self.interval = Loader(self.run, workers), run.config.eval_interval
        self.bad_samples = BadSampleGuard(run.ranks, run.config.on_bad_sample == "raise")
        self.asked = numbers[np.linspace(0, len(numbers) - 1, min(ASKED, len(numbers))).astype(int)].tolist()
        when = f"every {self.interval} updates and at the end" if self.interval else "after every epoch"
        run.ranks.print(f"validation: {len(numbers)} samples, {when}; the best weights go to {run.config.best_file}")

    def due(self, state: TrainState, total: int) -> bool:
        """Whether the update just finished is one to validate after, and has not been."""
        update = state.update
        regular = update % self.interval == 0 if self.interval else state.samples == 0
        return (regular or update == total) and update != state.validated

    @torch.no_grad()
    def measure(self, stop: StopRequest) -> tuple[float, list[dict]]:
        """The loss, and answers to a few questions. Raises Stopped when a signal comes meanwhile to any rank."""
        self.run.model.eval()
        try:
            loss, asked = self.loss(stop), self.asked if self.run.ranks.is_main else []
            return loss, [answer for number in asked if (answer := self.ask(number))]
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
            loss, _ = compute_loss(self.run, self.run.model, batch)
            total, supervised = total + loss.item() * batch.supervised, supervised + batch.supervised
            read, bad = read + len(batch.indices) + len(batch.bad), bad + len(batch.bad)
        if self.run.cache:
            self.run.cache.flush()
        total, supervised, read, bad, signals = self.run.ranks.sum([total, supervised, read, bad, stop.signum])
        if signals:
            raise Stopped(stop.signum or signal.SIGTERM)
        self.bad_samples.judge(int(bad), int(bad), int(read), done=True)
        return total / supervised

    def ask(self, number: int) -> dict | None:
        """What the model answers to the first question of a sample; None for a bad sample, and where nobody asks first."""
        dataset, config, tokenizer = self.run.dataset, self.run.model.config, self.run.dataset.renderer.tokenizer
        example = dataset[number]
        if isinstance(example, BadSample):
            return None
        sample = dataset.samples[number]
        at = next(place for place, turn in enumerate(sample.turns) if turn.role == "assistant")
        if at == 0 or sample.turns[at - 1].role != "user":
            return None
        end = int((example.labels != IGNORE_INDEX).argmax())  # where the first answer begins
        batch = collate([example], config.pad_token_id, config.image_tokens).to(self.run.ranks.device)
        images = sum(start < end for start in example.image_starts)  # those of the question, with their tiles
        with self.run.autocast(), torch.compiler.set_stance("force_eager"):
            question = self.run.model.embed(
                batch.ids[:, :end], image_features=encode(self.run, batch)[:images] if images else None,
                image_positions=batch.image_positions[: images * config.image_tokens],
            )  # fmt: skip
            [answer] = self.run.model.generate(
                inputs_embeds=question, attention_mask=torch.ones_like(batch.ids[:, :end]), max_new_tokens=ANSWER_TOKENS,
                do_sample=False, eos_token_id=dataset.renderer.im_end, pad_token_id=config.pad_token_id,
            )  # fmt: skip
        return {
            "question": sample.turns[at - 1].content.replace(IMAGE_PLACEHOLDER, "").strip(),
            "image": ", ".join(ref for ref in sample.images[: count_images(sample.turns[:at])] if isinstance(ref, str)),
            "where": sample.where,
            "reference": sample.turns[at].content,
            "answer": tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd"),  # cut within a character
        }  # fmt: skip
