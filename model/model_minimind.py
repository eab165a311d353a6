"""The MiniMind decoder: a small Llama-like language model as a transformers model.

    input_ids [B, T] -> embeddings [B, T, D] -> blocks (attention, feed-forward) -> norm -> lm_head -> logits [B, T, V]

Legend of shapes: B rows of a batch, T tokens of this call, K tokens in the cache plus this call, D hidden size,
H query heads, G key/value heads, d size of a head (D = H * d), V vocabulary, S supervised positions.

Sources: Llama (Touvron et al., arXiv 2302.13971) for the whole; grouped-query attention (2305.13245); SwiGLU
(2002.05202); the pieces of arithmetic are in layers.py, the mixture of experts in moe.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .layers import RMSNorm, apply_rope, attend, causal_attention, rope_tables

IGNORE_INDEX = -100  # the label of a token without loss, as F.cross_entropy has it by default


class MiniMindConfig(PretrainedConfig):
    """Configuration of the decoder; the defaults are the published 26M model. Raises ValueError for impossible sizes.

    `rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}` turns YaRN on;
    transformers keeps it, with `rope_theta`, in `rope_parameters`.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 1_000_000.0  # rope_theta when none is given

    vocab_size: int = 6400  # small, so that most of the 26M weights are in the blocks
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8  # of 64 channels each
    num_key_value_heads: int = 2  # each read by 4 query heads
    intermediate_size: int | None = None  # None: 8/3 of hidden_size, rounded up to a multiple of 64
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5  # keeps a vector of zeros from a division by zero
    rope_parameters: dict | None = None
    hidden_act: str = "silu"
    initializer_range: float | None = None  # standard deviation of random weights; None: 1 / sqrt(hidden_size)
    use_cache: bool = True
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, which keeps their products within bounds
    tie_word_embeddings: bool = True  # embedding and lm_head are one matrix [V, D], 3.3M weights
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    # Mixture of Experts; the names are those of the published configuration files.
    use_moe: bool = False
    num_experts_per_tok: int = 2  # routed ones
    n_routed_experts: int = 4
    n_shared_experts: int = 1  # these see every token
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.1  # weight of the loss that keeps the experts evenly loaded
    seq_aux: bool = True  # balance within each sequence; False: over the whole batch
    norm_topk_prob: bool = True  # the weights of a token's experts add up to 1
    norm_top1_prob: bool = False  # that of a single expert as well: it is 1 then

    def __post_init__(self, **kwargs):
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} {value!r}: a whole number above 0 is wanted")
        if not isinstance(self.rms_norm_eps, float | int) or not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps {self.rms_norm_eps!r}: a number above 0 is wanted")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        for problem, found in {
            f"hidden_size {self.hidden_size} is not a multiple of {heads} heads": self.hidden_size % heads,
            f"heads of size {self.head_dim}: an even size is wanted, for rotary positions turn pairs of channels":
                self.head_dim % 2,
            f"{heads} query heads cannot share {groups} key/value heads evenly": heads % groups,
            f"{self.num_experts_per_tok} experts a token out of {self.n_routed_experts} experts":
                self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts,
            f"hidden_act {self.hidden_act!r} is unknown; known is 'silu'": self.hidden_act != "silu",
            f"scoring_func {self.scoring_func!r} is unknown; known is 'softmax'": self.scoring_func != "softmax",
        }.items():  # fmt: skip
            if found:
                raise ValueError(problem)
        if self.intermediate_size is None:
            self.intermediate_size = 64 * math.ceil(self.hidden_size * 8 / 3 / 64)
        if self.pad_token_id is None:
            self.pad_token_id = type(self).pad_token_id
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        super().__post_init__(**kwargs)
        if not (theta := (self.rope_parameters or {}).get("rope_theta", self.default_theta)) > 0:
            raise ValueError(f"rope_theta {theta!r}: a number above 0 is wanted")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Attention(nn.Module):
    """Causal attention: every token takes a weighted mean of the values of the tokens up to itself.

    Grouped queries: H query heads read G key/value heads, H / G each, which makes the cache H / G times smaller.
    """

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)  # D -> H * d: what each token looks for
        self.k_proj = nn.Linear(width, kv_width, bias=False)  # D -> G * d: what it can be found by
        self.v_proj = nn.Linear(width, kv_width, bias=False)  # D -> G * d: what it passes on
        self.o_proj = nn.Linear(width, width, bias=False)  # H * d -> D
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, hidden_states, rope, attention_mask=None, past_key_values=None) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; `rope` is cos and sin, [1 or B, 1, T, d] each.

        `attention_mask` [B, 1, T, K] is True where attention may look; None stands for plain causal attention, or for
        "look at everything" when a single token follows a cache.
        """
        B, T, D = hidden_states.shape
        # [B, T, heads * d] -> [B, heads, T, d]: each head attends for itself.
        q = self.q_norm(self.q_proj(hidden_states).view(B, T, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(B, T, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
        # Positions enter here alone: queries and keys are turned, values are not.
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if past_key_values is not None:  # keys and values of earlier tokens are kept, not computed again: [B, G, K, d]
            k, v = past_key_values.update(k, v, self.layer_idx)
        out = causal_attention(q, k, v) if attention_mask is None and T > 1 else attend(q, k, v, attention_mask)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))  # heads side by side again, and mixed


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), each token by itself; [..., D] -> [..., D].

    The gate decides how much of each of `intermediate_size` channels passes. 8/3 D of them for three matrices are as
    many weights as the classic 4 D for two.
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MiniMindBlock(GradientCheckpointingLayer):
    """Attention moves information between tokens, the feed-forward layer works on each by itself.

    Both add to the residual stream, which runs from the embedding to the head unscaled: only what a layer reads is
    normed ("pre-norm"), which keeps gradients even in deep stacks.
    """

    def __init__(self, config: MiniMindConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.use_moe = config.use_moe
        if config.use_moe:
            from .moe import MOEFeedForward  # which is made of this module's FeedForward

            self.mlp = MOEFeedForward(config)
        else:
            self.mlp = FeedForward(config)

    def forward(self, hidden_states, rope, attention_mask, token_mask, past_key_values=None):
        """Returns hidden states [B, T, D] and the router's auxiliary loss (None in a dense block or in eval mode)."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, rope, attention_mask, past_key_values)
        normed = self.post_attention_layernorm(hidden_states)
        update, aux_loss = self.mlp(normed, token_mask) if self.use_moe else (self.mlp(normed), None)
        return hidden_states + update, aux_loss


@dataclass
class MiniMindModelOutput(ModelOutput):
    """Hidden states [B, T, D] after the final norm; the cache; if asked for, the input of every block and the final
    hidden states; the sum of the routers' auxiliary losses."""

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
        """As transformers' own, but strict: raises ValueError for weights missing, unexpected or of another shape,
        rather than leaving random ones in their place."""
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are listed, and refused below
        model, info = super().from_pretrained(*args, **kwargs)
        kinds = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
                 "of another shape": [f"{name} {tuple(given)}, the model has {tuple(own)}"
                                      for name, given, own in sorted(info["mismatched_keys"])]}  # fmt: skip
        if problems := [f"{len(names)} {kind} (first: {names[0]})" for kind, names in kinds.items() if names]:
            raise ValueError(f"{model.name_or_path} does not fit its config.json: weights {', '.join(problems)}")
        return (model, info) if output_loading_info else model


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, blocks, final norm: ids or embeddings in, hidden states out."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MiniMindBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # the residual stream itself is never normed
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
        token_mask: torch.Tensor | None = None,
    ) -> MiniMindModelOutput:
        """`input_ids` [B, T] or `inputs_embeds` [B, T, D] -> hidden states [B, T, D].

        `attention_mask` [B, K] is 1 for real tokens and 0 for padding, on either side; rows padded on the right do not
        need it, for causal attention never looks ahead. `token_mask` [B, T] tells the routers' auxiliary loss real
        tokens from padding; by default it is the attention mask. `position_ids` int64 [1 or B, T] continue the cache
        by default; rotary attention depends on distances alone, so padding on the left need not change them.
        Raises ValueError unless exactly one of ids and embeddings is given, and for positions of another length.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, D]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (self.config.use_cache if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        T = inputs_embeds.shape[1]
        if position_ids is not None and (position_ids.ndim != 2 or position_ids.shape[1] != T):
            raise ValueError(f"position_ids {tuple(position_ids.shape)}: [1 or B, {T}] is wanted, one for each token")
        # None where plain causal attention is meant. Default positions are not given: to look for packed sequences in
        # them would wait for the device.
        mask = create_causal_mask(config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                                  past_key_values=past_key_values, position_ids=position_ids)  # fmt: skip
        if position_ids is None:
            position_ids = torch.arange(T, device=inputs_embeds.device).unsqueeze(0) + past
        rope = [table.unsqueeze(1) for table in rope_tables(self.config, position_ids)]  # [1 or B, 1, T, d]
        if token_mask is None and attention_mask is not None and attention_mask.ndim == 2:
            token_mask = attention_mask[:, -T:]

        hidden_states, inputs, aux_losses = inputs_embeds, [], []
        for layer in self.layers:
            if output_hidden_states:
                inputs.append(hidden_states)
            hidden_states, aux_loss = layer(hidden_states, rope, mask, token_mask, past_key_values=past_key_values)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
        hidden_states = self.norm(hidden_states)
        all_states = (*inputs, hidden_states) if output_hidden_states else None
        return MiniMindModelOutput(hidden_states, past_key_values, all_states, sum(aux_losses) if aux_losses else None)


def find_loss_positions(labels: torch.Tensor) -> torch.Tensor:
    """Indices int64 [S] into B * T of the positions before supervised tokens of `labels` [B, T]: they predict these."""
    supervised = labels.new_zeros(labels.shape, dtype=torch.bool)  # nothing follows the last position of a row
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
        """Next-token logits [B, T, V], and the loss when `labels` are given; the arguments of transformers' models.

        `labels` int64 [B, T] stand where their tokens stand (the shift happens inside) and are -100 where there is no
        loss. `logits_to_keep=n` (or an index tensor) asks for the last n positions: [B, n, V]. `loss_positions`,
        int64 [S] from `find_loss_positions`, asks for these alone: `logits` are [S, V], in reading order.
        `loss` is the sum of the cross-entropies over `num_items_in_batch`, by default the number of supervised tokens
        (0 when there is none); `aux_loss` is the routers' auxiliary loss in training, not included in `loss`.
        Raises ValueError for labels of another shape than the tokens, and for `output_attentions`.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("output_attentions: no layer keeps them; model.inference.attention_map computes attention")
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                             output_hidden_states, token_mask)  # fmt: skip
        hidden_states, loss = outputs.last_hidden_state, None
        if labels is not None and labels.shape != hidden_states.shape[:2]:
            raise ValueError(f"labels {tuple(labels.shape)}, but tokens {tuple(hidden_states.shape[:2])}")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if loss_positions is not None:
            # [S, D] -> [S, V]: most tokens are image and question, whose predictions nobody reads. An update is 1.14x as fast.
            predictions = logits = self.lm_head(hidden_states.flatten(0, 1).index_select(0, loss_positions))
        elif labels is not None:
            logits, loss_positions = self.lm_head(hidden_states), find_loss_positions(labels)
            predictions, logits = logits.flatten(0, 1).index_select(0, loss_positions), logits[:, kept]
        else:
            logits = self.lm_head(hidden_states[:, kept])
        if labels is not None:
            # The position before a token predicts it. In fp32: a sum of many small exponentials.
            count = max(1, len(loss_positions)) if num_items_in_batch is None else num_items_in_batch
            targets = labels.flatten()[loss_positions + 1]  # [S]
            loss = F.cross_entropy(predictions.float(), targets, reduction="sum") / count
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=outputs.aux_loss, logits=logits,
                                         past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states)
