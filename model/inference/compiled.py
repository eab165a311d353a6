"""Decoding with a compiled step: for devices that are quicker than Python is at asking them, GPUs above all."""


import torch
from transformers import StaticCache

from model.model_minimind import MiniMindForCausalLM


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
