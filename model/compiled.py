"""Decoding with a compiled step: for devices that are quicker than Python is at asking them, GPUs above all."""

import time

import torch
from transformers import StaticCache

from .errors import first_line
from .model_minimind import MiniMindForCausalLM


def why_not_compile(device: torch.device) -> str | None:
    """What torch.compile says where it cannot work, in one line: no compiler, one without Python.h, a cache that cannot be
    written. Tried on a line of arithmetic, which is another at each call: one compiled before would prove nothing."""
    salt = time.time_ns() % 2**40 / 2**40
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: (x * salt).exp().sum())(x).backward()
        return None
    except Exception as error:  # of compilers, all kinds
        return next((line.strip() for line in str(error).splitlines() if "error: " in line), first_line(error))


class CompiledDecoder:
    """The model's own forward with a static cache. Prompts are read as they come; the step of one token, whose shapes
    never change, is compiled, on a GPU into CUDA graphs: one launch a token instead of hundreds."""

    def __init__(self, model: MiniMindForCausalLM):
        self.model = model
        self._step = torch.compile(self._forward, mode="reduce-overhead", dynamic=False)

    def new_cache(self, length: int) -> StaticCache:
        """An empty cache of `length` tokens."""
        return StaticCache(config=self.model.config, max_cache_len=length)

    def __call__(self, x: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        """Embeddings [1, T, D] after what `cache` holds -> logits [1, V] of the last token."""
        if x.shape[1] > 1 or not cache.is_initialized:
            return self._forward(x, cache)
        return self._step(x, cache).clone()  # the next step writes where this one's result lies

    def _forward(self, x: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        hidden_states = self.model.model(inputs_embeds=x, past_key_values=cache).last_hidden_state
        return self.model.lm_head(hidden_states[:, -1])
