"""The arithmetic of a decoder block: RMSNorm, rotary positions, causal attention.

Legend of shapes: B rows of a batch, T tokens, H query heads, G key/value heads, d size of a head.
Sources: RMSNorm (Zhang and Sennrich, arXiv 1910.07467), rotary positions (Su et al., 2104.09864), YaRN (Peng et al.,
2309.00071), grouped-query attention (Ainslie et al., 2305.13245).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: LayerNorm without a mean and without a bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The mean of squares is summed in fp32 whatever the dtype of x.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(config: PretrainedConfig, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
    """Angles per position [d/2] in radians, and the factor on cos and sin (1.0 without YaRN).

    Pair i of a head's channels turns by base^(-2i/d) a position: the first pairs tell neighbours apart, the last ones
    turn once in millions (with base 10^6). YaRN stretches this to longer contexts: slow pairs are slowed down further by its
    `factor`, fast ones stay as they are.
    """
    rope, dim = config.rope_parameters, config.head_dim
    if rope["rope_type"] == "yarn":
        return ROPE_INIT_FUNCTIONS["yarn"](config, device)
    if rope["rope_type"] != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is unknown; the decoder knows 'default' and 'yarn'")
    return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim), 1.0


def rope_tables(config: PretrainedConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [..., T, d], of int64 `positions` [..., T].

    Computed from the configuration at every call (microseconds): a table kept as a non-persistent buffer is lost when
    transformers builds a model on the meta device.
    """
    inv_freq, scale = rope_frequencies(config, positions.device)
    angles = positions.float().unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the channel pairs (i, i + d/2) of x [B, heads, T, d]; in fp32, returned in x's dtype.

    A query at position m and a key at n are turned by m and n steps, so of the positions only m - n
    enters their product.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v under a causal mask: q [B, H, T, d], k and v [B, G, T, d] -> [B, H, T, d].

    On a CPU, the backward of torch's bf16 kernel is slow: there, training takes matrix products instead.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        return attention_in_blocks(q, k, v)
    return attend(q, k, v, causal=True)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False) -> torch.Tensor:
    """torch's attention: q [B, H, T, d], k and v [B, G, K, d], `mask` bool [B or 1, 1, T, K] -> [B, H, T, d].

    H / G query heads share a key head. On CUDA only flash attention knows that; where it cannot be had (fp32, a mask, cards
    before Ampere) torch would make all T * K scores, so there the key heads are repeated, for the memory-saving kernel.
    """
    if q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32 or torch.cuda.get_device_capability() < (8, 0)):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1])


@torch.compiler.disable  # a compiler's backward of it takes four times as long as the library's products
def attention_in_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int = 128) -> torch.Tensor:
    """The same as matrix products: the H / G query heads that share a key head side by side, in blocks of queries, each
    of which sees the keys up to its own end. Takes 1/1.2 to 1/2.4 of the time, forward and backward."""
    B, H, T, d = q.shape
    G = k.shape[1]  # H / G query heads read one key/value head
    q = (q * d**-0.5).reshape(B * G, H // G, T, d)
    k, v = (x[:, :, :T].reshape(B * G, T, d) for x in (k, v))  # a static cache has room beyond T
    outputs = []
    for start, queries in zip(range(0, T, block), q.split(block, dim=2), strict=True):
        end = min(T, start + block)  # no query of this block may look beyond
        scores = torch.bmm(queries.flatten(1, 2), k[:, :end].transpose(1, 2)).view(B * G, H // G, end - start, end)
        # -inf where a key comes after its query, which softmax makes a weight of 0.
        scores = scores + torch.full((end - start, end), -torch.inf, dtype=q.dtype).triu(start + 1)
        weights = scores.softmax(-1).flatten(1, 2)
        outputs.append(torch.bmm(weights, v[:, :end]).view(B * G, H // G, end - start, d))
    return torch.cat(outputs, dim=2).view(B, H, T, d)
