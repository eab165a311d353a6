"""Where did it look? Attention from the tokens of an answer to the patches of the images, computed on demand.

Legend of shapes: L tokens of the prompt, A of the answer, T = L + A - 1 (nothing follows the last one), N images, P
patches of an image in s rows of s, D hidden size, H query heads, G key/value heads, d size of a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from model.conversation import Turn, count_images
from model.errors import UsageError
from model.inference.assistant import Assistant
from model.layers import apply_rope, rope_tables
from model.model_minimind import Attention
from model.model_vlm import MiniMindVLM


@dataclass(frozen=True)
class AnswerAttention:
    """Where the tokens of an answer looked.

    `tokens` are the texts of its A tokens, which join to the answer: a character spread over several tokens stands with
    the last of them, the others have "". `views` uint8 [N, 3, S, S] are the images, tiles among them, as the model saw
    them, and `maps` fp32 [A, N, s, s] the weights, see `attention_to_images`.
    """

    tokens: list[str]
    views: torch.Tensor
    maps: torch.Tensor


def look(
    assistant: Assistant, turns: Sequence[Turn], pixels: Sequence[torch.Tensor], layer: int | None = None, head: int | None = None
) -> AnswerAttention:
    """Where the answer that ends `turns` looked. `pixels` are the conversation's images, preprocessed, in
    reading order; those that only later turns show may follow.

    The answer's text is tokenized again, as every later question about it sees it.
    Raises UsageError when the last turn is no answer, is empty, or no image stands before it, and for a layer or head
    that does not exist.
    """
    if not turns or turns[-1].role != "assistant" or not turns[-1].content:
        raise UsageError("only an answer that says something can be looked into")
    shown = count_images(turns)
    if not 0 < shown <= len(pixels):
        raise UsageError(f"the conversation shows {shown} images up to this answer, and {len(pixels)} were given")
    renderer, pixels = assistant.renderer, pixels[:shown]
    turns = assistant.tiled(tuple(turns), pixels)
    prompt = renderer.render_prompt(turns[:-1])
    answer = renderer.render_turns(turns).ids[len(prompt) :].tolist()
    answer = answer[: answer.index(renderer.im_end)]
    maps = attention_to_images(assistant.model, torch.from_numpy(prompt.ids), prompt.image_starts, torch.tensor(answer),
                               torch.cat(assistant.encode(pixels)), layer, head)  # fmt: skip
    views = torch.cat([assistant.views(image) for image in pixels])
    return AnswerAttention(list(assistant.pieces(answer))[: len(answer)], views, maps.cpu())


@torch.no_grad()
def attention_to_images(
    model: MiniMindVLM, prompt_ids: torch.Tensor, image_starts: Sequence[int], answer_ids: torch.Tensor,
    image_features: torch.Tensor, layer: int | None = None, head: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention weights fp32 [A, N, s, s], on the model's device.

    Entry [a, n, row, column] is the weight of that patch of image n for the position that chose token a of the answer:
    the one before it. The softmax runs over all that this position sees, text included, so a token's patches add up to
    at most 1. Mean over layers and query heads, unless `layer` or `head` (counted from 0) names one.

    `prompt_ids` int64 [L] end where the answer begins; `image_starts` are the indices of each image's first
    placeholder in them; `answer_ids` int64 [A]; `image_features` [N, P, W] are the vision encoder's output.
    A forward pass of its own through the model's blocks: the attention that answers and trains never computes weights.
    Raises UsageError for a layer or head that does not exist.
    """
    config, P = model.config, model.config.image_tokens
    side, count = math.isqrt(P), len(answer_ids)
    for name, value, limit in (("layer", layer, config.num_hidden_layers), ("head", head, config.num_attention_heads)):
        if value is not None and not 0 <= value < limit:
            raise UsageError(f"{name} {value} is not there: the model has {limit}, counted from 0")

    ids = torch.cat((prompt_ids, answer_ids[:-1])).to(model.device)
    positions = torch.tensor(image_starts, dtype=torch.int64, device=model.device)[:, None]
    positions = (positions + torch.arange(P, device=model.device)).flatten()  # [N * P]
    hidden_states = model.embed(ids[None], image_positions=positions, image_features=image_features.to(model.device))
    rope = rope_tables(config, torch.arange(len(ids), device=model.device))
    total = torch.zeros(count, len(positions), device=model.device)
    for number, block in enumerate(model.model.layers):
        if layer in (None, number):
            normed = block.input_layernorm(hidden_states)
            weights = attention_weights(block.self_attn, normed, rope, len(ids) - count)[:, :, positions]  # [H, A, N * P]
            total += weights.mean(0) if head is None else weights[head]
        hidden_states, _ = block(hidden_states, rope, None, None, None)
    if layer is None:
        total /= config.num_hidden_layers
    return total.view(count, len(image_starts), side, side)


def attention_weights(
    attention: Attention, hidden_states: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], first: int
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) under a causal mask, fp32 [H, T - first, T], for the queries from position `first` on.

    `hidden_states` [1, T, D] are the attention's normed input; `rope` as `rope_tables` gives it.
    """
    T, d = hidden_states.shape[1], attention.head_dim
    cos, sin = rope
    q = attention.q_norm(attention.q_proj(hidden_states[0, first:]).view(T - first, -1, d)).transpose(0, 1)  # [H, T - first, d]
    k = attention.k_norm(attention.k_proj(hidden_states[0]).view(T, -1, d)).transpose(0, 1)  # [G, T, d]
    q, k = apply_rope(q, cos[first:], sin[first:]).float(), apply_rope(k, cos, sin).float()
    k = k.repeat_interleave(len(q) // len(k), dim=0)  # [H, T, d]: neighbouring query heads share a key head
    scores = q @ k.transpose(1, 2) * d**-0.5
    ahead = torch.ones(T - first, T, dtype=torch.bool, device=scores.device).triu(first + 1)
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)


def pixels_to_image(pixels: torch.Tensor) -> Image.Image:
    """What the model saw, uint8 [3, H, W], as an image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
