"""The MiniMind decoder: a small Llama-like language model as a transformers-native class.

Legend of shapes: B rows of a batch, T tokens of this call, K tokens in cache plus this call, D hidden size,
H query heads, G key/value heads, d size of a head, V vocabulary, S supervised positions.

Parts and sources: RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245),
SwiGLU (2002.05202), YaRN for longer contexts (2309.00071). The Mixture-of-Experts variant is in moe.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .layers import GatedSiLU, RMSNorm, apply_rope, causal_attention, rope_tables
from .moe import MOEFeedForward, MoEGate

IGNORE_INDEX = -100  # the label of a token that carries no loss


class MiniMindConfig(PretrainedConfig):
    """Configuration of the decoder; the defaults are the published 26M model.

    `rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}` turns YaRN on.
    transformers keeps both it and `rope_theta` in `rope_parameters`.

    Raises ValueError for sizes that cannot work together.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 1_000_000.0  # rope_theta when none is given

    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    intermediate_size: int | None = None  # None: 8/3 of hidden_size, rounded up to a multiple of 64
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    hidden_act: str = "silu"
    initializer_range: float | None = None  # standard deviation of fresh weights; None: 1 / sqrt(hidden_size)
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    # Mixture of Experts; the names are those of the published configuration files.
    use_moe: bool = False
    num_experts_per_tok: int = 2
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.1
    seq_aux: bool = True
    norm_topk_prob: bool = True

    def __post_init__(self, **kwargs):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} {value!r}: a whole number above 0 is wanted")
        if not isinstance(self.rms_norm_eps, float | int) or not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps {self.rms_norm_eps!r}: a number above 0 is wanted")
        if self.intermediate_size is None:
            self.intermediate_size = 64 * math.ceil(self.hidden_size * 8 / 3 / 64)
        if self.pad_token_id is None:
            self.pad_token_id = type(self).pad_token_id
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")
        if self.head_dim % 2:
            raise ValueError(f"hidden_size {self.hidden_size} over {self.num_attention_heads} heads gives heads of {self.head_dim}:"
                             " an even size is wanted, for rotary positions turn pairs of channels")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads evenly"
            )
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(f"{self.num_experts_per_tok} experts a token out of {self.n_routed_experts} experts")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown; the feed-forward layers know 'silu'")
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func {self.scoring_func!r} is unknown; the router knows 'softmax'")
        super().__post_init__(**kwargs)
        if not (theta := (self.rope_parameters or {}).get("rope_theta", self.default_theta)) > 0:
            raise ValueError(f"rope_theta {theta!r}: a number above 0 is wanted")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def take_rows(hidden_states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """[B, T, D] -> [S, D] at `rows` int64 [S], indices into B * T; everything when `rows` is None."""
    return hidden_states if rows is None else hidden_states.flatten(0, 1).index_select(0, rows)


class Attention(nn.Module):
    """Causal grouped-query attention: H query heads read G key/value heads."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D], or [S, D] for `rows` int64 [S], indices into B * T.

        `attention_mask` [B, 1, T, K] is True where attention may look; None stands for plain causal attention, or for
        "look at everything" when a single token follows a cache.
        """
        B, T, D = hidden_states.shape
        q = self.q_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        k = self.k_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        v = self.v_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if attention_mask is None and T > 1:
            out = causal_attention(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, enable_gqa=True)
        return self.o_proj(take_rows(out.transpose(1, 2).reshape(B, T, D), rows))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))


class MiniMindBlock(nn.Module):
    """Pre-norm block: attention, then the feed-forward layer (dense, or a mixture of experts)."""

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MOEFeedForward(config, expert_class=FeedForward) if config.use_moe else FeedForward(config)
        self.use_moe = config.use_moe

    def forward(self, hidden_states, rope, attention_mask, past_key_values, token_mask, rows=None):
        """Returns hidden states [B, T, D] and the router's auxiliary loss (None in a dense block or in eval mode).

        `rows` int64 [S] are the only positions (indices into B * T) whose output anybody reads: [S, D] comes back, and
        the feed-forward layer works on these alone. A dense block's business: a router's loss depends on all tokens.
        """
        normed = self.input_layernorm(hidden_states)
        hidden_states = take_rows(hidden_states, rows) + self.self_attn(
            normed, rope, attention_mask, past_key_values, rows
        )
        normed = self.post_attention_layernorm(hidden_states)
        update, aux_loss = self.mlp(normed, token_mask) if self.use_moe else (self.mlp(normed), None)
        return hidden_states + update, aux_loss


@dataclass
class MiniMindModelOutput(ModelOutput):
    """Hidden states [B, T, D] after the final norm, the cache, the sum of the routers' auxiliary losses, and if asked
    for the input of every block with the final hidden states behind them."""

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class MiniMindPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about this family."""

    config_class = MiniMindConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniMindBlock"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As transformers' own, but strict: raises ValueError where that would start weights afresh or leave some out."""
        kwargs["ignore_mismatched_sizes"] = True  # to be named below rather than in a table
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        shapes = [f"{name} {tuple(theirs)}, the model has {tuple(ours)}"
                  for name, theirs, ours in sorted(info["mismatched_keys"])]  # fmt: skip
        kinds = {"missing": sorted(info["missing_keys"] - {shape[0] for shape in info["mismatched_keys"]}),
                 "unexpected": sorted(info["unexpected_keys"]), "of another shape": shapes}  # fmt: skip
        problems = [f"{len(names)} {kind} (first: {names[0]})" for kind, names in kinds.items() if names]
        if problems:
            raise ValueError(f"{model.name_or_path} does not fit its config.json: weights {'; '.join(problems)}")
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoEGate):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, blocks, final norm: ids or embeddings in, hidden states out."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MiniMindBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False  # switched by activation_checkpointing_enable()
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        rows: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> MiniMindModelOutput:
        """`input_ids` [B, T] or `inputs_embeds` [B, T, D] -> hidden states [B, T, D], or [S, D] of the positions
        `rows` int64 [S] (indices into B * T), which saves the last block most of its work.

        `attention_mask` [B, K] is 1 for real tokens and 0 for padding, on either side. Rows padded on the right need
        none for right results: causal attention never looks ahead. For the routers' auxiliary loss `token_mask` [B, T]
        then tells real tokens from padding; by default it is the attention mask. `position_ids` int64 [1 or B, T] follow
        the cache by default; rotary attention depends on distances alone, so padding on the left need not change them.
        Raises ValueError unless exactly one of ids and embeddings is given, and for positions of another length.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        recomputes = self.gradient_checkpointing and self.training  # blocks run twice, and would fill a cache twice
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache and past_key_values is None and not recomputes:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        T = inputs_embeds.shape[1]
        if position_ids is not None and (position_ids.ndim != 2 or position_ids.shape[1] != T):
            raise ValueError(f"position_ids {tuple(position_ids.shape)}: [1 or B, {T}] is wanted, one for each token")
        mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values,
            position_ids=position_ids,  # not the default ones: looking for packed sequences in them waits for the device
        )  # fmt: skip
        if position_ids is None:
            position_ids = torch.arange(T, device=inputs_embeds.device).unsqueeze(0) + past
        rope = [table.unsqueeze(1) for table in rope_tables(self.config, position_ids)]  # [1 or B, 1, T, d]
        if token_mask is None and attention_mask is not None and attention_mask.ndim == 2:
            token_mask = attention_mask[:, -T:]

        hidden_states, inputs, aux_losses = inputs_embeds, [], []
        for layer in self.layers:
            if output_hidden_states:
                inputs.append(hidden_states)
            last_rows = rows if layer is self.layers[-1] and not self.config.use_moe else None
            arguments = (hidden_states, rope, mask, past_key_values, token_mask, last_rows)
            if recomputes:
                hidden_states, aux_loss = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                hidden_states, aux_loss = layer(*arguments)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        if self.config.use_moe:
            hidden_states = take_rows(hidden_states, rows)
        hidden_states = self.norm(hidden_states)
        return MiniMindModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*inputs, hidden_states) if output_hidden_states else None,
            aux_loss=torch.stack(aux_losses).sum() if aux_losses else None,
        )


def find_loss_positions(labels: torch.Tensor) -> torch.Tensor:
    """Indices int64 [S] into B * T of the positions that predict a supervised token of `labels` [B, T]."""
    supervised = labels.new_zeros(labels.shape, dtype=torch.bool)
    supervised[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return supervised.flatten().nonzero().squeeze(1)


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head, tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True  # transformers' Trainer gives num_items_in_batch

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # for transformers' Trainer: labels are shifted inside
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        loss_positions: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> MoeCausalLMOutputWithPast:
        """Next-token logits [B, T, V], and the loss when `labels` are given; arguments as transformers' models take them.

        `labels` int64 [B, T] stand where their tokens stand (the shift happens inside) and are -100 where there is no
        loss. `logits_to_keep=n` (or an index tensor) asks for the last n positions, [B, n, V]. `loss_positions` int64 [S],
        indices into B * T of the positions that predict the supervised tokens of `labels` (see `find_loss_positions`),
        ask for these alone: `logits` are [S, V], in reading order, which saves work, memory, and a search that an
        accelerator would have to wait for. `hidden_states` are the blocks' inputs and the last hidden states.
        `loss` is the sum of the cross-entropies over `num_items_in_batch`, by default the number of supervised tokens
        (0 when there is none); `aux_loss` is the routers' auxiliary loss in training, not included in `loss`.
        Raises ValueError for labels of another shape than the tokens, and for `output_attentions`.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: attention weights are never made here; model.inference.attention_map computes them")
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            loss_positions, token_mask,
        )  # fmt: skip
        hidden_states, loss = outputs.last_hidden_state, None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None:
            logits = self.lm_head(hidden_states if loss_positions is not None else hidden_states[:, kept])
        else:
            predictions = logits = self.lm_head(hidden_states)
            if loss_positions is None:
                if labels.shape != logits.shape[:2]:
                    raise ValueError(f"labels {tuple(labels.shape)}, but tokens {tuple(logits.shape[:2])}")
                loss_positions, logits = find_loss_positions(labels), logits[:, kept]
                predictions = take_rows(predictions, loss_positions)
            count = max(1, len(loss_positions)) if num_items_in_batch is None else num_items_in_batch
            targets = labels.flatten()[loss_positions + 1]
            loss = F.cross_entropy(predictions.float(), targets, reduction="sum") / count
        return MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=outputs.aux_loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )  # fmt: skip
