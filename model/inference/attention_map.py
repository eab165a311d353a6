"""Where did it look? Attention from the tokens of an answer to the patches of the pictures, computed on demand.

Legend of shapes: L tokens of the prompt, A of the answer, T = L + A - 1 (nothing follows the last one), N pictures, P
patches of a picture in s rows of s, D hidden size, H query heads, G key/value heads, d size of a head.
"""

import math
from collections.abc import Sequence

import torch

from model.layers import apply_rope, rope_tables
from model.model_minimind import Attention
from model.model_vlm import MiniMindVLM


@torch.no_grad()
def attention_to_pictures(
    model: MiniMindVLM, prompt_ids: torch.Tensor, image_starts: Sequence[int], answer_ids: torch.Tensor,
    image_features: torch.Tensor, layer: int | None = None, head: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention weights fp32 [A, N, s, s], on the model's device.

    Entry [a, n, row, column] is the weight of that patch of picture n for the position that chose token a of the answer:
    the one before it. The softmax runs over all that this position sees, text included, so a token's patches add up to
    at most 1. Mean over layers and query heads, unless `layer` or `head` (counted from 0) names one.

    `prompt_ids` int64 [L] end where the answer begins; `image_starts` are the indices of each picture's first
    placeholder in them; `answer_ids` int64 [A]; `image_features` [N, P, W] are the tower's output.
    A forward pass of its own through the model's blocks: it leaves weights, mode and caches alone, and the attention
    that answers and trains never has to hand out weights.
    Raises ValueError for an empty answer, for pictures and places that do not match, for patches that make no square,
    and for a layer or head that is not there.
    """
    config, P = model.config, model.config.image_tokens
    side, count = math.isqrt(P), len(answer_ids)
    for name, value, limit in (("layer", layer, config.num_hidden_layers), ("head", head, config.num_attention_heads)):
        if value is not None and not 0 <= value < limit:
            raise ValueError(f"{name} {value} is not there: the model has {limit}, counted from 0")
    if count == 0:
        raise ValueError("the answer has no token")
    if side**2 != P:
        raise ValueError(f"{P} patches of a picture make no square")
    if len(image_starts) != len(image_features):
        raise ValueError(f"places for {len(image_starts)} pictures in the prompt, but {len(image_features)} pictures")

    ids = torch.cat((prompt_ids, answer_ids[:-1])).to(model.device)
    places = torch.tensor(image_starts, dtype=torch.int64, device=model.device)[:, None]
    places = (places + torch.arange(P, device=model.device)).flatten()  # [N * P]
    hidden_states = model.embed(ids[None], image_positions=places, image_features=image_features.to(model.device))
    rope = rope_tables(config, torch.arange(len(ids), device=model.device))
    total = torch.zeros(count, len(places), device=model.device)
    for number, block in enumerate(model.model.layers):
        if layer in (None, number):
            normed = block.input_layernorm(hidden_states)
            weights = attention_weights(block.self_attn, normed, rope, len(ids) - count)[:, :, places]  # [H, A, N * P]
            total += weights.mean(0) if head is None else weights[head]
        hidden_states, _ = block(hidden_states, rope, None, None, None)
    if layer is None:
        total /= config.num_hidden_layers
    return total.view(count, -1, side, side)


def attention_weights(
    attention: Attention, hidden_states: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], first: int
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) under a causal mask, fp32 [H, T - first, T], for the queries from position `first` on.

    `hidden_states` [1, T, D] are the attention's normed input; `rope` as `rope_tables` gives it.
    """
    T, d = hidden_states.shape[1], attention.head_dim
    cos, sin = rope
    q = attention.q_proj(hidden_states[0, first:]).view(T - first, -1, d).transpose(0, 1)  # [H, T - first, d]
    k = attention.k_proj(hidden_states[0]).view(T, -1, d).transpose(0, 1)  # [G, T, d]
    q, k = apply_rope(q, cos[first:], sin[first:]).float(), apply_rope(k, cos, sin).float()
    H, G = len(q), len(k)
    # The H / G query heads that share a key head stand side by side, as in `causal_attention`.
    scores = (q.reshape(G, H // G * (T - first), d) @ k.transpose(1, 2) * d**-0.5).view(H, T - first, T)
    ahead = torch.ones(T - first, T, dtype=torch.bool, device=scores.device).triu(first + 1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)
