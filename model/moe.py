"""Mixture of Experts: a router sends each token to a few of many feed-forward networks (DeepSeekMoE, arXiv 2401.06066).

Legend of shapes: N = B * T tokens, E routed experts, k experts a token, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .model_minimind import FeedForward, MiniMindConfig


class MoEGate(nn.Module):
    """The router: scores each token against E experts and keeps the best k."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.alpha = config.aux_loss_alpha
        self.seq_aux = config.seq_aux
        self.norm_topk_prob, self.norm_top1_prob = config.norm_topk_prob, config.norm_top1_prob
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) * config.initializer_range)

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """hidden_states [B, T, D] -> experts int64 [N, k], their weights [N, k], auxiliary loss (None in eval mode).

        `token_mask` [B, T], 0 for padding: padding is routed like any token, but left out of the auxiliary loss.
        """
        B, T, _ = hidden_states.shape
        scores = F.linear(hidden_states, self.weight).float().softmax(dim=-1)  # [B, T, E]
        topk_weight, topk_idx = scores.topk(self.top_k, dim=-1)  # [B, T, k]
        aux_loss = None
        if self.training and self.alpha > 0:
            aux_loss = self.alpha * self._balance(scores, topk_idx, token_mask)
        if self.norm_topk_prob and (self.top_k > 1 or self.norm_top1_prob):
            topk_weight = topk_weight / (topk_weight.sum(-1, keepdim=True) + 1e-20)
        return topk_idx.view(B * T, -1), topk_weight.view(B * T, -1), aux_loss

    def _balance(self, scores: torch.Tensor, topk_idx: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Sum over experts of (fraction of tokens sent there) * E/k * (mean score): equations 12-14 of the paper.

        1.0 when the load is even. Taken per sequence and averaged (`seq_aux`), or once over all tokens.
        """
        E = scores.shape[-1]
        chosen = torch.zeros_like(scores).scatter(-1, topk_idx, 1.0)
        mask = scores.new_ones(scores.shape[:2]) if token_mask is None else token_mask.to(scores.dtype)
        if not self.seq_aux:
            scores, chosen, mask = scores.flatten(0, 1)[None], chosen.flatten(0, 1)[None], mask.flatten()[None]
        tokens = mask.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
        load = (chosen * mask.unsqueeze(-1)).sum(1) / tokens * (E / self.top_k)  # [B, E]
        mean_score = (scores * mask.unsqueeze(-1)).sum(1) / tokens
        return (load * mean_score).sum(-1).mean()


class MOEFeedForward(nn.Module):
    """Routed experts plus shared ones that see every token."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.experts = nn.ModuleList([FeedForward(config) for _ in range(config.n_routed_experts)])
        self.gate = MoEGate(config)
        self.shared_experts = nn.ModuleList([FeedForward(config) for _ in range(config.n_shared_experts)])

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, D] -> [B, T, D] and the auxiliary loss.

        Tokens are sorted by expert once, so that every expert works on one contiguous slice.
        """
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states, token_mask)
        tokens = hidden_states.flatten(0, 1)
        order = topk_idx.flatten().argsort(stable=True)  # [N*k] entries of topk_idx, grouped by expert
        counts = topk_idx.flatten().bincount(minlength=len(self.experts))
        grouped = tokens.index_select(0, order // topk_idx.shape[1])
        # Only the CPU knows the counts without waiting, and only bf16 has a grouped product on every accelerator; layers
        # that are more than their weight (adapters, quantized ones) have to run themselves.
        weights_alone = all(type(layer) is nn.Linear for expert in self.experts for layer in expert.children())
        apart = grouped.device.type == "cpu" or grouped.dtype != torch.bfloat16 or not weights_alone
        outputs = self.run_apart(grouped, counts) if apart else self.run_grouped(grouped, counts)
        outputs = outputs * topk_weight.flatten()[order].unsqueeze(-1).to(outputs.dtype)
        mixed = torch.zeros_like(tokens, dtype=outputs.dtype).index_add(0, order // topk_idx.shape[1], outputs)
        mixed = mixed.view_as(hidden_states)
        for expert in self.shared_experts:
            mixed = mixed + expert(hidden_states)
        return mixed, aux_loss

    def run_apart(self, grouped: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """[N*k, D] sorted by expert, int64 [E] tokens of each -> [N*k, D], expert by expert.

        An expert that got no token still runs, on an empty slice: its parameters then have a zero gradient rather than
        none, which DDP needs.
        """
        slices = grouped.split(counts.tolist())
        return torch.cat([expert(part) for expert, part in zip(self.experts, slices, strict=True)])

    def run_grouped(self, grouped: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The same as one grouped product over all experts, which leaves the counts on the device."""
        ends = counts.cumsum(0).to(torch.int32)

        def product(x: torch.Tensor, name: str) -> torch.Tensor:
            weights = torch.stack([getattr(expert, name).weight for expert in self.experts]).to(x.dtype)
            return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)

        hidden = F.silu(product(grouped, "gate_proj")) * product(grouped, "up_proj")
        return product(hidden, "down_proj")
