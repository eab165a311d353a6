"""Decoding: prompts with pictures in, tokens out.

A prompt is read in chunks into a key/value cache; then each token is chosen from the last logits and fed back. What two
prompts have in common at their beginning is computed once: across the turns of a chat, and across a batch.

Legend of shapes: B rows, T tokens, K tokens in the cache, N pictures, P placeholders of a picture, W width of the tower,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import Cache, DynamicCache

from .model_vlm import MiniMindVLM

CHUNK = 512  # tokens of a prompt read at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: `temperature` 0 is greedy, `top_k` 0 keeps all, `seed` makes it repeatable."""

    max_new_tokens: int = 512
    temperature: float = 0.65
    top_p: float = 0.85
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


class Chooser:
    """Chooses tokens for B rows; random numbers come from a generator of its own."""

    def __init__(self, sampling: Sampling, device: torch.device):
        self.sampling = sampling
        self.generator = torch.Generator(device)
        self.generator.seed() if sampling.seed is None else self.generator.manual_seed(sampling.seed)

    def scores(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """logits [B, V] after penalty, temperature, top-k and top-p, in fp32; `seen` bool [B, V] are the tokens that
        stand in a row already. -inf where a token cannot be chosen."""
        scores, s = logits.float(), self.sampling
        if s.repetition_penalty != 1.0 and seen is not None:
            # Divided or multiplied by sign: dividing a negative logit would make its token likelier.
            penalized = torch.where(scores > 0, scores / s.repetition_penalty, scores * s.repetition_penalty)
            scores = torch.where(seen, penalized, scores)
        if s.temperature == 0:
            return scores
        scores = scores / s.temperature
        if 0 < s.top_k < scores.shape[-1]:
            least = scores.topk(s.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if s.top_p < 1:
            ordered, order = scores.sort(descending=True)
            shares = ordered.softmax(-1)
            out = shares.cumsum(-1) - shares >= s.top_p  # what stands before a token suffices already
            scores = scores.masked_fill(out.scatter(-1, order, out), -torch.inf)
        return scores

    def __call__(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """The next tokens, int64 [B]."""
        scores = self.scores(logits, seen)
        if self.sampling.temperature == 0:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(-1)


@dataclass(frozen=True)
class Prompt:
    """ids int64 [T], the first placeholder of each picture, and the pictures' numbers (one picture, one number)."""

    ids: np.ndarray
    image_starts: tuple[int, ...]
    pictures: tuple[int, ...]
    image_tokens: int

    def key(self) -> np.ndarray:
        """int64 [T] that says what each position reads: its token, or -1 - number of its picture."""
        key = self.ids.copy()
        for start, number in zip(self.image_starts, self.pictures, strict=True):
            key[start : start + self.image_tokens] = -1 - number
        return key


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many positions two keys share at their beginning."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


@dataclass
class Memory:
    """What a model has read: a cache of one row, and the key of what it was computed from."""

    cache: Cache
    key: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` positions, and what an interrupted step left in some layers."""
        for layer in self.cache.layers:
            layer.crop(min(0, count - layer.get_seq_length()))
        self.key = self.key[:count]


def embed(model: MiniMindVLM, prompt: Prompt, features: Sequence[torch.Tensor], start: int) -> torch.Tensor:
    """Embeddings [1, T - start, D] of the prompt from `start` on; features[number] are [P, W]."""
    ids = torch.from_numpy(prompt.ids[start:]).to(model.device)
    shown = [(at, number) for at, number in zip(prompt.image_starts, prompt.pictures, strict=True) if at >= start]
    if not shown:
        return model.embed(ids[None])
    positions = torch.cat([torch.arange(prompt.image_tokens) + at - start for at, _ in shown]).to(model.device)
    return model.embed(ids[None], None, positions, torch.stack([features[number] for _, number in shown]))


@torch.inference_mode()
def generate_stream(
    model: MiniMindVLM, memory: Memory, prompt: Prompt, features: Sequence[torch.Tensor], sampling: Sampling, stop: int
) -> Iterator[int]:
    """The tokens that follow `prompt`, one by one, until `stop` (which is not given) or `max_new_tokens`.

    What `memory` holds of the prompt is not read again; afterwards it holds the prompt and the tokens given so far, also
    when the iterator is closed or an exception ends it.
    """
    key = prompt.key()
    memory.keep(min(common_prefix(memory.key, key), len(key) - 1))  # the last one is read anew, for its logits
    embeddings = embed(model, prompt, features, len(memory.key))
    hidden = None
    for chunk in embeddings.split(CHUNK, dim=1):
        hidden = model.model(inputs_embeds=chunk, past_key_values=memory.cache).last_hidden_state
        memory.key = key[: len(memory.key) + chunk.shape[1]]
    chooser, seen = Chooser(sampling, model.device), None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool, device=model.device)
        seen[0, torch.from_numpy(prompt.ids).to(model.device)] = True
    for number in range(sampling.max_new_tokens):
        token = chooser(model.lm_head(hidden[:, -1]), seen)
        chosen = int(token)
        if chosen == stop:
            return
        yield chosen
        if number + 1 == sampling.max_new_tokens:
            return
        hidden = model.model(input_ids=token[:, None], past_key_values=memory.cache).last_hidden_state
        memory.key = np.append(memory.key, chosen)
        if seen is not None:
            seen[0, chosen] = True


def new_memory(model: MiniMindVLM) -> Memory:
    """An empty memory for `model`."""
    return Memory(DynamicCache(config=model.config))
