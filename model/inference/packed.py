"""The model's forward as inference wants it: the mathematics of model_minimind.py, fewer and better laid out products.

At a batch of one a token reads every weight once and does little else, so what counts is how fast weights stream from
memory: projections that read the same input are one product, and on a CPU their weights lie in oneDNN's own layout,
which `F.linear` would make anew at every call. The model that is packed keeps its own weights and stays as it was.

Legend of shapes: B rows, T tokens of this call, K tokens in the cache with these, D hidden size, H query heads,
G key/value heads, d size of a head, N images, P placeholders of an image, W width of the vision encoder.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, CLIPVisionModel
from transformers.cache_utils import DynamicLayer

from model.layers import RMSNorm, causal_attention, rope_tables
from model.model_minimind import FeedForward, MiniMindForCausalLM
from model.moe import MOEFeedForward
from model.vision import attend_by_products


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


class PackedLinear(nn.Module):
    """The same as a module."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.forward = pack_linear(linear)


def pack_vision_encoder(encoder: CLIPVisionModel) -> CLIPVisionModel:
    """A vision encoder of the same weights whose linear layers are packed; gives the same patch vectors, faster on a CPU."""
    packed = copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})
    attend_by_products(packed)
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
    return packed


class GrowingLayer(DynamicLayer):
    """A layer of transformers' cache that writes into memory with room to grow, where DynamicLayer copies everything
    for every token. `keys` and `values` are views of what is filled."""

    ROOM = 256  # tokens
    room: tuple[torch.Tensor, torch.Tensor] | None = None  # [B, G, capacity, d] each: keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers': keeps [B, G, T, d] more, returns all [B, G, K, d]."""
        B, G, T, d = key_states.shape
        start = self.keys.shape[2] if self.is_initialized else 0
        # Keys that lie elsewhere were selected or reordered by a method of transformers.
        if start == 0 or start + T > self.room[0].shape[2] or self.keys.data_ptr() != self.room[0].data_ptr():
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.room = key_states.new_empty(2, B, G, start + T + self.ROOM, d).unbind()
            if start:
                self.room[0][:, :, :start], self.room[1][:, :, :start] = self.keys, self.values
        keys, values = self.room
        keys.narrow(2, start, T).copy_(key_states)
        values.narrow(2, start, T).copy_(value_states)
        self.keys, self.values = keys.narrow(2, 0, start + T), values.narrow(2, 0, start + T)
        return self.keys, self.values


def pack_norm(norm: RMSNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function [..., D] -> [..., D]: x beside -x has mean 0 and the mean square of x, so its LayerNorm, which is one
    kernel, is the RMSNorm of x, which is eight. Rounds once where the module rounds twice."""
    D, eps = len(norm.weight), norm.eps
    weight = torch.cat((norm.weight, norm.weight)).detach()
    return lambda x: F.layer_norm(torch.cat((x, -x), dim=-1), (2 * D,), weight, None, eps)[..., :D].contiguous()


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`apply_rope` in fewer calls, with the first half of `sin` negated."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def cached_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """q [B, H, T, d] over k, v [B, G, K, d] -> [B, H, T, d]. `mask` bool [B or 1, 1, T, K], True where to look; without
    one, a single token looks at everything and several at what stands before them (K = T).

    The H/G query heads of a key head stand side by side as queries of their own: nothing is repeated.
    """
    B, H, T, d = q.shape
    if mask is None and T > 1:
        return causal_attention(q, k, v)
    G = k.shape[1]
    if mask is not None and T > 1:
        mask = mask.repeat(1, 1, H // G, 1)
    return F.scaled_dot_product_attention(q.reshape(B, G, H // G * T, d), k, v, attn_mask=mask).view(B, H, T, d)


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
        self.norms = pack_norm(block.input_layernorm), pack_norm(block.post_attention_layernorm)
        self.qkv = pack_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = pack_linear(attention.o_proj)
        self.kv_heads = attention.k_proj.out_features // attention.head_dim
        self.mlp = PackedExperts(block.mlp) if block.use_moe else PackedFeedForward(block.mlp)

    def __call__(self, x: torch.Tensor, B: int, rope, cache: Cache, mask, last: torch.Tensor | None) -> torch.Tensor:
        """x [B * T, D] -> [B * T, D]; or [B, D] at the places `last` int64 [B], when nobody reads the others."""
        heads = self.qkv(self.norms[0](x)).view(B, len(x) // B, -1, self.head_dim).transpose(1, 2)
        turned = turn(heads[:, : -self.kv_heads], *rope)
        q = turned[:, : -self.kv_heads]
        k, v = cache.update(turned[:, -self.kv_heads :], heads[:, -self.kv_heads :], self.layer)
        if last is not None:
            rows = torch.arange(B, device=x.device)
            q, x = q[rows, :, last].unsqueeze(2), x.view(B, -1, x.shape[-1])[rows, last]
            mask = mask.expand(B, -1, -1, -1)[rows, :, last].unsqueeze(2)
        attended = cached_attention(q, k, v, mask)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norms[1](x))


class PackedDecoder:
    """Blocks, final norm and head of `model`, whose weights must not change any more."""

    def __init__(self, model: MiniMindForCausalLM):
        self.model = model
        self.blocks = [PackedBlock(block) for block in model.model.layers]
        self.norm, self.head = pack_norm(model.model.norm), pack_linear(model.lm_head)
        self.rope = (torch.empty(0, device=model.device),) * 2
        self.reserve(1)

    def new_cache(self) -> Cache:
        """An empty cache."""
        return Cache(layers=[GrowingLayer() for _ in self.blocks])

    def rope_at(self, positions: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin: [T, d] of a slice, [B, 1, T, d] of positions int64 [B, T]."""
        if isinstance(positions, slice):
            return self.rope[0][positions], self.rope[1][positions]
        return self.rope[0][positions].unsqueeze(1), self.rope[1][positions].unsqueeze(1)

    def reserve(self, count: int) -> None:
        """Rotary tables for positions below `count`, as `turn` wants them."""
        if count > len(self.rope[0]):
            positions = torch.arange(max(count, 2 * len(self.rope[0])), device=self.rope[0].device)
            cos, sin = rope_tables(self.model.config, positions)
            first, second = sin.chunk(2, dim=-1)
            self.rope = cos, torch.cat((-first, second), dim=-1)

    def __call__(
        self, x: torch.Tensor, cache: Cache, mask: torch.Tensor | None = None, positions: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Embeddings [B, T, D] after what `cache` holds -> logits [B, V] of each row's last token, or of its token
        `last` int64 [B].

        `mask` bool [B or 1, 1, T, K] as in `cached_attention`; `positions` int64 [B, T], by default those that follow
        the cache.
        """
        B, T, _ = x.shape
        start = cache.get_seq_length()
        self.reserve(start + T)
        rope = self.rope_at(slice(start, start + T) if positions is None else positions)
        causal = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)[None, None] if T > 1 else None
        if mask is None and start:
            mask = causal
        if last is None and T > 1:
            last = torch.full((B,), T - 1, device=x.device)
        x = x.flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block(x, B, rope, cache, mask, None)
        x = self.blocks[-1](x, B, rope, cache, causal if mask is None else mask, last)
        return self.head(self.norm(x))
