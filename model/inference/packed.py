"""The model's forward as inference wants it: the mathematics of model_minimind.py, fewer and better laid out products.

At a batch of one a token reads every weight once and does little else, so what counts is how fast weights stream from
memory: projections that read the same input are one product, and on a CPU their weights lie in oneDNN's own layout,
which `F.linear` would make anew at every call. The model that is packed keeps its own weights and stays as it was.

Legend of shapes: B rows, T tokens of this call, K tokens in the cache with these, D hidden size, H query heads,
G key/value heads, d size of a head, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from model.layers import RMSNorm, apply_rope, attend, rope_tables
from model.model_minimind import FeedForward, MiniMindForCausalLM
from model.moe import MOEFeedForward


def pack_linear(*linears: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function x [..., in] -> x W^T + b [..., out]; several layers without bias that read the same input are one.

    Layers that are more than their weight (quantized ones, adapters) stay what they are.
    """
    if any(type(linear) is not nn.Linear for linear in linears):
        return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)
    weight, bias = linears[0].weight.detach(), linears[0].bias
    if len(linears) > 1:
        weight = torch.cat([linear.weight.detach() for linear in linears])
    known = weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not known:
        return lambda x: F.linear(x, weight, bias)
    packed, product = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", [], "")


class KeyValueCache:
    """Keys and values of the first `length` positions, in memory with `room` for more tokens; transformers' cache copies everything
    for every token. Positions that a step did not finish are written again: `length` grows when a step ends."""

    def __init__(self, layers: int, room: int = 256):
        self.length, self.room = 0, room
        self.layers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * layers  # [B, G, capacity, d] each

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes [B, G, T, d] after the first `length` positions of a layer; returns all [B, G, K, d]."""
        B, G, T, d = k.shape
        held, start, end = self.layers[layer], self.length, self.length + T
        if held is None or end > held[0].shape[2]:
            larger = k.new_empty(2, B, G, end + self.room, d).unbind()
            if start:
                larger[0][:, :, :start], larger[1][:, :, :start] = held[0][:, :, :start], held[1][:, :, :start]
            self.layers[layer] = held = larger
        keys, values = held
        keys.narrow(2, start, T).copy_(k)
        values.narrow(2, start, T).copy_(v)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps the rows int64 [B'], in this order; a row may come several times."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]


class PackedFeedForward:
    """SwiGLU in two products."""

    def __init__(self, module: FeedForward):
        self.gate_up, self.down = pack_linear(module.gate_proj, module.up_proj), pack_linear(module.down_proj)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class PackedExperts:
    """A mixture of experts that asks only those experts that a token chose."""

    def __init__(self, module: MOEFeedForward):
        self.gate = module.gate
        self.experts = [PackedFeedForward(expert) for expert in module.experts]
        self.shared = [PackedFeedForward(expert) for expert in module.shared_experts]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights, _ = self.gate(x[None])
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                mixed.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None].to(x.dtype))
        for expert in self.shared:
            mixed = mixed + expert(x)
        return mixed


class PackedBlock:
    """One decoder block."""

    def __init__(self, block: nn.Module):
        attention = block.self_attn
        self.layer, self.head_dim = attention.layer_idx, attention.head_dim
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.qkv = pack_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.head_norms = (attention.q_norm, attention.k_norm) if isinstance(attention.q_norm, RMSNorm) else ()
        self.out = pack_linear(attention.o_proj)
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        self.mlp = PackedExperts(block.mlp) if block.use_moe else PackedFeedForward(block.mlp)

    def __call__(self, x: torch.Tensor, B: int, rope, cache: KeyValueCache, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B * T, D] -> [B * T, D]; `mask` bool [B or 1, 1, T, K], or None where every token sees all before it."""
        heads = self.qkv(self.norms[0](x)).view(B, len(x) // B, -1, self.head_dim).transpose(1, 2)  # [B, H + 2 G, T, d]
        G, qk = self.kv_heads, heads[:, : -self.kv_heads]
        if self.head_norms:
            q_norm, k_norm = self.head_norms
            qk = torch.cat((q_norm(qk[:, :-G]), k_norm(qk[:, -G:])), dim=1)
        rotated = apply_rope(qk, *rope)
        q = rotated[:, :-G]
        k, v = cache.append(self.layer, rotated[:, -G:], heads[:, -G:])
        causal = mask is None and q.shape[2] > 1
        attended = attend(q, k, v, mask, causal)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norms[1](x))


class PackedDecoder:
    """Blocks, final norm and head of `model`, whose weights must not change any more."""

    def __init__(self, model: MiniMindForCausalLM):
        self.model = model
        self.blocks = [PackedBlock(block) for block in model.model.layers]
        self.norm, self.head = model.model.norm, pack_linear(model.lm_head)

    def new_cache(self, room: int = 256) -> KeyValueCache:
        """An empty cache."""
        return KeyValueCache(len(self.blocks), room)

    def __call__(
        self, x: torch.Tensor, cache: KeyValueCache, mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None, last: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Embeddings [B, T, D] after what `cache` holds -> logits [B, V] of each row's last token, or of its token
        `last` int64 [B].

        `mask` bool [B or 1, 1, T, K], True where to look, by default at all positions up to a token's own; `positions`
        int64 [B, T], by default those that follow the cache.
        """
        B, T, D = x.shape
        start = cache.length
        if positions is None:
            positions = torch.arange(start, start + T, device=x.device)[None]
        if mask is None and start and T > 1:
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)[None, None]
        rope = tuple(table.unsqueeze(1) for table in rope_tables(self.model.config, positions))  # [B or 1, 1, T, d] each
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, B, rope, cache, mask)
        cache.length += T
        x = x.view(B, T, D)
        return self.head(self.norm(x[:, -1] if last is None else x[torch.arange(B, device=x.device), last]))
