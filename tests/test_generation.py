"""Decoding: whatever the path, the tokens are those of full forwards."""


import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from model.generation import Memory, Prompt, Sampling, generate_batch, generate_stream
from model.packed import PackedDecoder, growing_cache
from tests.conftest import make_model

P = 196
NEVER = -1  # no token: answers go on to max_new_tokens
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
KINDS = {"dense": {}, "moe": {"use_moe": True}, "yarn": {"rope_parameters": YARN}, "one key head": {"num_key_value_heads": 1}}


def make_prompt(*parts, seed: int = 0) -> Prompt:
    """Numbers of text tokens and "a", "b", ... for pictures 0, 1, ..."""
    rng, ids, starts, pictures = np.random.default_rng(seed), [1], [], []
    for part in parts:
        if isinstance(part, str):
            starts.append(len(ids))
            pictures.append(ord(part) - ord("a"))
            ids += [34] * P
        else:
            ids += rng.integers(100, 6000, part).tolist()
    return Prompt(np.array(ids), tuple(starts), tuple(pictures), P)


PROMPTS = [make_prompt(3, "a", 4), make_prompt(3, "a", 9), make_prompt(6), make_prompt(3, "a", "b", 2, seed=1),
           make_prompt(3, "a", 4), make_prompt(30, seed=2)]  # fmt: skip
FEATURES = torch.randn(2, P, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(hidden_size=64, initializer_range=0.3, **KINDS[request.param]).eval()


def by_full_forwards(model, prompt: Prompt, sampling: Sampling = GREEDY) -> list[int]:
    """The definition: all tokens through the whole model for every new one."""
    ids = torch.from_numpy(prompt.ids)[None]
    features = FEATURES[list(prompt.pictures)]
    positions = torch.cat([torch.arange(P) + at for at in prompt.image_starts]) if prompt.pictures else None
    with torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            logits = model(ids, image_features=features, image_positions=positions).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt.ids) :].tolist()


def stream(decoder, prompt, memory=None, sampling=GREEDY, stop=NEVER, **options) -> list[int]:
    memory = memory or Memory(growing_cache(decoder.model.config.num_hidden_layers))
    return list(generate_stream(decoder, memory, prompt, FEATURES, sampling, stop, **options))


def test_every_path_gives_the_tokens_of_full_forwards(model):
    decoder = PackedDecoder(model)
    expected = [by_full_forwards(model, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) >= 4 and max(len(set(tokens)) for tokens in expected) > 3
    for chunk in (7, 2048):
        assert [stream(decoder, prompt, chunk=chunk) for prompt in PROMPTS] == expected
    assert generate_batch(decoder, PROMPTS, FEATURES, GREEDY, NEVER) == expected
    assert generate_batch(decoder, PROMPTS[2:3], FEATURES, GREEDY, NEVER) == expected[2:3], "text alone"
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=420), growing_cache(2)):
        prompt = PROMPTS[3]
        out = model.generate(
            torch.from_numpy(prompt.ids)[None], image_features=FEATURES[list(prompt.pictures)], past_key_values=cache,
            max_new_tokens=8, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        assert out[0, len(prompt.ids) :].tolist() == expected[3]
