"""The plain way to train, as textbooks write it: the benchmark's measure and the tests' oracle. Nothing here is fast.

Every sample is padded to max_seq_len, every picture goes through transformers' processor and the encoder in every
epoch, logits are computed at every position, all in fp32. It reads the weights of the same model as the real path.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import CLIPImageProcessor

from dataset.images import ImageSource
from dataset.vlm_dataset import SampleSource
from model.conversation import Renderer
from model.layers import rope_tables
from model.model_minimind import IGNORE_INDEX
from model.model_vlm import MiniMindVLM
from model.moe import MOEFeedForward


def norm(module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm with the weight of `module`."""
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on [B, T, heads, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def attend(module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Causal attention, the key and value heads repeated for the query heads that share them."""
    B, T, D = x.shape
    q, k, v = (p(x).view(B, T, -1, module.head_dim) for p in (module.q_proj, module.k_proj, module.v_proj))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    shared = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared, dim=2), v.repeat_interleave(shared, dim=2)
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
    return module.o_proj(out.transpose(1, 2).reshape(B, T, D))


def mix_experts(module: MOEFeedForward, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixture of Experts by a loop over experts: every token stands there k times, masks pick an expert's own."""
    chosen, weights, aux_loss = module.gate(x, mask)
    k = chosen.shape[1]
    tokens = x.flatten(0, 1).repeat_interleave(k, dim=0)
    outputs = torch.zeros_like(tokens)
    for number, expert in enumerate(module.experts):
        outputs[chosen.flatten() == number] = expert(tokens[chosen.flatten() == number]).to(x.dtype)
    mixed = (outputs.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1).view_as(x)
    for expert in module.shared_experts:
        mixed = mixed + expert(x)
    return mixed, aux_loss


def plain_forward(
    model: MiniMindVLM, ids: torch.Tensor, features: torch.Tensor, image_positions: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] and features [N, P, W] of the pictures at `image_positions` -> logits [B, T, V], auxiliary loss."""
    x = F.embedding(ids, model.model.embed_tokens.weight)
    if len(features):
        projected = model.vision_proj(features).flatten(0, 1)
        x = x.flatten(0, 1).index_copy(0, image_positions, projected).view_as(x)
    cos, sin = rope_tables(model.config, torch.arange(ids.shape[1], device=ids.device))
    aux_loss = x.new_zeros(())
    for block in model.model.layers:
        x = x + attend(block.self_attn, norm(block.input_layernorm, x), cos, sin)
        normed = norm(block.post_attention_layernorm, x)
        if model.config.use_moe:
            update, aux = mix_experts(block.mlp, normed, mask)
            aux_loss = aux_loss + aux
        else:
            update = block.mlp.down_proj(F.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed))
        x = x + update
    return F.linear(norm(model.model.norm, x), model.model.embed_tokens.weight), aux_loss


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy at every position [B, T], then the mean over those that carry loss."""
    targets = labels[:, 1:].clamp(min=0)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    mask = (labels[:, 1:] != IGNORE_INDEX).flatten().float()
    return (losses * mask).sum() / mask.sum()


@dataclass
class PlainDataset(Dataset):
    """Items as dictionaries of tensors, padded to `max_length`; one picture a sample."""

    samples: SampleSource
    images: ImageSource
    renderer: Renderer
    max_length: int

    def __post_init__(self):
        self.processor = CLIPImageProcessor()  # its defaults are those of ViT-B/16

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        rendered = self.renderer.render(sample, self.max_length)
        length, picture = len(rendered), self.images.load(sample.images[0])
        pad = (0, self.max_length - length)
        return {
            "ids": F.pad(torch.from_numpy(rendered.ids), pad),
            "labels": F.pad(torch.from_numpy(rendered.labels), pad, value=IGNORE_INDEX),
            "mask": F.pad(torch.ones(length), pad),
            "positions": torch.arange(self.renderer.image_tokens) + rendered.image_starts[0],
            "pixel_values": self.processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0],
        }


def plain_update(model: MiniMindVLM, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> float:
    """One update; returns its loss."""
    B, L = batch["ids"].shape
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    positions = (batch["positions"] + torch.arange(B, device=model.device)[:, None] * L).flatten()
    features = model.encode_images(batch["pixel_values"])
    logits, aux_loss = plain_forward(model, batch["ids"], features, positions, batch["mask"])
    loss = plain_loss(logits, batch["labels"])
    (loss + aux_loss).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
