"""Loss on held-out data while a run trains, what seeing is worth of it, and what the model answers to a few questions.

The data are files of their own, or a fraction of the training samples that no epoch takes. All ranks measure together; images
are encoded as in training: again each time, or with --cache_features once.

A low loss does not say that the model looks: questions alone may tell the answers (Goyal et al., arXiv 1612.00837). So the loss
of samples with images is measured twice more, with a blank image in place of each, and with an image of another sample.

Legend: B rows of T tokens in a batch, S of them supervised; N images, each P patch vectors of width W.
"""

import math
import signal
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from dataset.images import open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import BadSample, Batch, VLMDataset, collate
from model.conversation import IMAGE_PLACEHOLDER, count_images
from model.errors import DataError, UsageError
from model.model_minimind import IGNORE_INDEX
from model.pixels import blank

from .build import Loader, Run, make_sampler, open_cache
from .checkpoint import TrainState
from .config import fraction_of
from .guards import BadSampleGuard, Stopped, StopRequest
from .loop import encode

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
        seen, self.interval, self.blank = self.run, run.config.eval_interval, None
        if run.config.eval_blind:
            from dataset.others import WithOthers  # not needed without

            seen = replace(self.run, dataset=WithOthers(self.run.dataset, numbers, run.config.seed))
            settings = run.model.pixel_settings
            pixels = blank((1, 3, settings.size, settings.size), settings).to(run.ranks.device)
            self.blank = run.model.encode_images(pixels).to(torch.bfloat16).to(run.dtype)  # [1, P, W], as encode does it
        self.loader = Loader(seen, workers)
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
    def measure(self, stop: StopRequest) -> tuple[dict[str, float | None], list[dict], str, float]:
        """The losses, answers to a few questions, the losses in words, and what is lowest for the best weights. Raises Stopped when
        a signal comes meanwhile to any rank."""
        self.run.model.eval()
        try:
            losses, asked = self.losses(stop), self.asked if self.run.ranks.is_main else []
            answers = [answer for number in asked if (answer := self.ask(number))]
            finite = {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}  # json knows no infinity
            return finite, answers, in_words(losses), losses["eval_loss"]
        finally:
            self.run.model.train()

    @torch.no_grad()
    def losses(self, stop: StopRequest) -> dict[str, float]:
        """Mean cross-entropy over the supervised tokens of all ranks' samples, in nats: `eval_loss`. With --eval_blind, where
        samples have images, over these alone: with blank images `eval_loss_blank`, with others' images `eval_loss_shuffled`
        unless a sample finds none, and with their own `eval_loss_seen` unless it is `eval_loss`, all samples having images.
        """
        total, supervised, seen, looking, unseen, swapped, alone = self.total(self.sums, stop)
        losses = {"eval_loss": total / supervised}
        if looking and looking < supervised:
            losses["eval_loss_seen"] = seen / looking
        if looking:
            losses["eval_loss_blank"] = unseen / looking
        if looking and not alone:
            losses["eval_loss_shuffled"] = swapped / looking
        return losses

    def total(self, figures: Callable[[Batch], list[float]], stop: StopRequest) -> list[float]:
        """Sums of a batch's figures over all batches of all ranks. Raises Stopped, and BadData when too many samples are bad."""
        sums, read, bad = [], 0, 0
        for [batch] in self.loader.epoch(0):
            if stop.signum:
                break
            self.bad_samples.report(list(batch.bad), list(batch.truncated))
            sums.append(figures(batch))
            read, bad = read + len(batch.indices) + len(batch.bad), bad + len(batch.bad)
        if self.run.cache:
            self.run.cache.flush()
        if self.run.ranks.sum([stop.signum])[0]:
            raise Stopped(stop.signum or signal.SIGTERM)
        *sums, read, bad = self.run.ranks.sum([*np.sum(sums, axis=0).tolist(), read, bad])
        self.bad_samples.judge(int(bad), int(bad), int(read), done=True)
        return sums

    def sums(self, batch: Batch) -> list[float]:
        """Of a batch: cross-entropies of all supervised tokens, and their number; both again of those in samples with images;
        their cross-entropies with blank images, and with others' images; images without another."""
        batch = batch.to(self.run.ranks.device)
        N, T = len(batch.image_index), batch.ids.shape[1]
        features = encode(self.run, replace(batch, image_index=torch.cat([batch.image_index, batch.other_index])))
        plain = self.cross_entropies(batch, features[:N])
        if self.blank is None or not N:
            return [plain.sum().item(), len(plain), 0, 0, 0, 0, 0]
        looking = torch.isin(batch.loss_positions // T, batch.image_positions // T)
        unseen = self.cross_entropies(batch, self.blank.expand(N, -1, -1))[looking].sum().item()
        alone = N - len(batch.other_index)
        swapped = 0 if alone else self.cross_entropies(batch, features[N:])[looking].sum().item()
        return [plain.sum().item(), len(plain), plain[looking].sum().item(), int(looking.sum()), unseen, swapped, alone]

    def cross_entropies(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """fp32 [S], of each supervised token, with the patch vectors `features` [N, P, W] as its images."""
        with self.run.autocast():
            logits = self.run.model(batch.ids, loss_positions=batch.loss_positions, use_cache=False, image_features=features,
                                    image_positions=batch.image_positions).logits  # fmt: skip
        return F.cross_entropy(logits.float(), batch.labels.flatten()[batch.loss_positions + 1], reduction="none")

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


def in_words(losses: dict[str, float]) -> str:
    """The figures of a validation as one line."""
    text = f"validation loss {losses['eval_loss']:.4f}"
    if "eval_loss_blank" not in losses:
        return text
    seen, unseen = losses.get("eval_loss_seen", losses["eval_loss"]), losses["eval_loss_blank"]
    own = f"of samples with images {seen:.4f}, " if "eval_loss_seen" in losses else ""
    others = f", others' images {losses['eval_loss_shuffled']:.4f}" if "eval_loss_shuffled" in losses else ""
    return f"{text} ({own}blank images {unseen:.4f}{others}: images lower the loss by {unseen - seen:.2f} nats a token)"
