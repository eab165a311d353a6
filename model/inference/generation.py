"""Decoding: prompts with images in, tokens out.

A prompt is read in chunks into a key/value cache; then each token is chosen from the last logits and fed back. What two
prompts have in common at their beginning is computed once: across the turns of a chat, and across a batch.

Legend of shapes: B rows, T tokens, K tokens in the cache, P placeholders of an image, W width of the vision encoder, V
vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.model_vlm import MiniMindVLM

from .packed import KeyValueCache, PackedDecoder

CHUNK = 2048  # tokens of a prompt read at once
SHRINK = 0.75  # a batch is copied without its finished rows when no more than this fraction continues

Features = Mapping[int, torch.Tensor] | Sequence[torch.Tensor]  # patch vectors [P, W] by number of the image


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: `temperature` 0 is greedy, `top_k` 0 keeps all, `seed` makes it repeatable.

    Raises ValueError for a value out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.65
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        for name, holds, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "is at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "is at least 0"),
            ("top_p", 0 < self.top_p <= 1, "lies in (0, 1]"),
            ("top_k", self.top_k >= 0, "is at least 0"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "is above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "lies in [0, 2^63)"),
        ):
            if not holds:
                raise ValueError(f"{name} {rule}, not {getattr(self, name)}")


class Chooser:
    """Chooses the next token of each row; random numbers come from a generator of its own."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.greedy, self.processors = sampling.temperature == 0, LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if not self.greedy:
            self.processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                self.processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self.processors.append(TopPLogitsWarper(float(sampling.top_p)))
        self.generator = torch.Generator(device)
        self.generator.seed() if sampling.seed is None else self.generator.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """logits [B, V] and the tokens so far, int64 [B, T] -> the next tokens, int64 [B]."""
        scores = self.processors(history, logits.float())
        if self.greedy:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(-1)


@dataclass(frozen=True)
class Prompt:
    """ids int64 [T], the first placeholder of each image, and the images' numbers (one image, one number)."""

    ids: np.ndarray
    image_starts: tuple[int, ...]
    images: tuple[int, ...]
    image_tokens: int

    def key(self) -> np.ndarray:
        """int64 [T] that says what each position reads: its token, or -1 - number of its image."""
        key = self.ids.copy()
        for start, number in zip(self.image_starts, self.images, strict=True):
            key[start : start + self.image_tokens] = -1 - number
        return key


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as text, without half a character at its end."""
    return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=True).rstrip("\ufffd")


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many positions two keys share at their beginning."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


@dataclass
class Memory:
    """What a decoder has read: a cache of one row, and the key of what it was computed from."""

    cache: KeyValueCache
    key: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` positions."""
        self.cache.length = count
        self.key = self.key[:count]


def embed(
    model: MiniMindVLM, prompts: Sequence[Prompt], spans: Sequence[tuple[int, int]], features: Features
) -> torch.Tensor:
    """Embeddings [B, T, D] of a span (start, end) of each prompt, padded on the right; features[number] are the patch
    vectors [P, W] of an image, which a span may cut."""
    T = max(end - start for start, end in spans)
    ids = torch.full((len(prompts), T), model.config.pad_token_id)
    places, patches = [], []
    for row, (prompt, (start, end)) in enumerate(zip(prompts, spans, strict=True)):
        ids[row, : end - start] = torch.from_numpy(prompt.ids[start:end])
        for at, number in zip(prompt.image_starts, prompt.images, strict=True):
            first, last = max(at, start), min(at + prompt.image_tokens, end)
            if first < last:
                places.append(torch.arange(first, last) + row * T - start)
                patches.append(features[number][first - at : last - at])
    ids = ids.to(model.device)
    if not places:
        return model.embed(ids)
    return model.embed(ids, None, torch.cat(places).to(model.device), torch.cat(patches).unsqueeze(0))


def histories(prompts: Sequence[Prompt], device: torch.device) -> torch.Tensor:
    """The tokens of B prompts, int64 [B, T]; shorter ones are padded with their first token, which they hold anyway."""
    T = max(len(prompt.ids) for prompt in prompts)
    rows = [np.pad(prompt.ids, (0, T - len(prompt.ids)), constant_values=prompt.ids[0]) for prompt in prompts]
    return torch.from_numpy(np.stack(rows)).to(device)


@torch.inference_mode()
def generate_stream(
    decoder: PackedDecoder, memory: Memory, prompt: Prompt, features: Features, sampling: Sampling, stop: int,
    chunk: int = CHUNK,
) -> Iterator[int]:  # fmt: skip
    """The tokens that follow `prompt`, one by one, until `stop` (which is not given) or `max_new_tokens`.

    What `memory` holds of the prompt is not read again; afterwards it holds the prompt and the tokens given so far, also
    when the iterator is closed or an exception ends it.
    """
    model, key = decoder.model, prompt.key()
    memory.keep(min(common_prefix(memory.key, key), len(key) - 1))  # the last one is read again, for its logits
    logits = None
    for part in embed(model, [prompt], [(len(memory.key), len(key))], features).split(chunk, dim=1):
        logits = decoder(part, memory.cache)
        memory.key = key[: len(memory.key) + part.shape[1]]
    chooser, history = Chooser(sampling, model.device), histories([prompt], model.device)
    for number in range(1, sampling.max_new_tokens + 1):
        token = chooser(logits, history)
        chosen = int(token)
        if chosen == stop:
            return
        yield chosen
        if number == sampling.max_new_tokens:
            return
        logits = decoder(model.embed(token[:, None]), memory.cache)
        memory.key = np.append(memory.key, chosen)
        history = torch.cat((history, token[:, None]), dim=1)


def different(keys: Sequence[np.ndarray]) -> tuple[list[int], list[int]]:
    """Places of the different ones among the keys, and for each key which of those it is."""
    numbers: dict[bytes, int] = {}
    rows = [numbers.setdefault(key.tobytes(), len(numbers)) for key in keys]
    return [rows.index(number) for number in range(len(numbers))], rows


def read_prompts(
    decoder: PackedDecoder, prompts: Sequence[Prompt], features: Features, room: int
) -> tuple[torch.Tensor, KeyValueCache, torch.Tensor, torch.Tensor]:
    """Reads B prompts: logits [B, V], the cache, with `room` for more tokens, which of its K places hold a token of a row
    (bool [B, K]), and the rows' lengths int64 [B].

    The text up to the last image's end is read once for all prompts that share it, and their rows are copies. Both that
    and the rest are padded on the right; `mask` hides the padding between the two from all that follows.
    """
    model, device = decoder.model, decoder.model.device
    shared = [min(p.image_starts[-1] + p.image_tokens, len(p.ids) - 1) if p.image_starts else 0 for p in prompts]
    first, rows = different([p.key()[:end] for p, end in zip(prompts, shared, strict=True)])
    cache, width = decoder.new_cache(room), max(shared)
    if width:
        decoder(embed(model, [prompts[i] for i in first], [(0, shared[i]) for i in first], features), cache)
        if rows != list(range(len(prompts))):
            cache.select(torch.tensor(rows, device=device))
    begins, lengths = torch.tensor(shared, device=device), torch.tensor([len(p.ids) for p in prompts], device=device)
    rest = lengths - begins
    x = embed(model, prompts, [(end, len(p.ids)) for p, end in zip(prompts, shared, strict=True)], features)
    steps = torch.arange(x.shape[1], device=device)
    held = torch.cat((torch.arange(width, device=device) < begins[:, None], steps < rest[:, None]), dim=1)
    mask = held[:, None, None] & torch.ones(len(steps), width + len(steps), dtype=torch.bool, device=device).tril(width)
    logits = decoder(x, cache, mask, begins[:, None] + steps, rest - 1)
    return logits, cache, held, lengths


@torch.inference_mode()
def generate_batch(
    decoder: PackedDecoder, prompts: Sequence[Prompt], features: Features, sampling: Sampling, stop: int,
    choose: Callable[[torch.Tensor, list[int]], torch.Tensor] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The tokens that follow each of B prompts, up to `stop` or `max_new_tokens`: the same as one by one.

    A prompt that is given several times gets as many samples, and is read once. Rows that have ended leave the batch.
    `choose`, if given, chooses the tokens int64 [B'] in place of `sampling`, from logits [B', V] and the rows' numbers.
    """
    first, copies = different([prompt.key() for prompt in prompts])
    logits, cache, held, lengths = read_prompts(decoder, [prompts[place] for place in first], features, min(256, sampling.max_new_tokens))
    if len(first) < len(prompts):
        copies = torch.tensor(copies, device=logits.device)
        cache.select(copies)
        logits, held, lengths = logits[copies], held[copies], lengths[copies]
    chooser, history = Chooser(sampling, logits.device), histories(prompts, logits.device)
    held = F.pad(held, (0, sampling.max_new_tokens), value=True)
    answers: list[list[int]] = [[] for _ in prompts]
    rows, going = list(range(len(prompts))), [True] * len(prompts)  # whose answer a row is, and whether it continues
    for number in range(1, sampling.max_new_tokens + 1):
        tokens = choose(logits, rows) if choose else chooser(logits, history)
        for place, token in enumerate(tokens.tolist()):
            going[place] = going[place] and token != stop
            if going[place]:
                answers[rows[place]].append(token)
        if not any(going) or number == sampling.max_new_tokens:
            break
        if sum(going) < SHRINK * len(going):
            kept = torch.tensor([place for place, on in enumerate(going) if on], device=logits.device)
            cache.select(kept)
            tokens, history, held, lengths = tokens[kept], history[kept], held[kept], lengths[kept]
            rows, going = [rows[place] for place in kept.tolist()], [True] * len(kept)
        history = torch.cat((history, tokens[:, None]), dim=1)
        K = cache.length + 1
        logits = decoder(decoder.model.embed(tokens[:, None]), cache, held[:, None, None, :K], lengths[:, None])
        lengths = lengths + 1
    return answers
