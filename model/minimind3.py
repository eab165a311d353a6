"""The family that the original project publishes since 2026 (minimind-3v): where it differs from that of 2025.

Queries and keys are normed, feed-forward layers are wider, the projector has two layers, and experts, where there are any,
are asked one a token. The layout of its conversations follows from its tokenizer (conversation.py).
"""

import math

RENAMED = {"image_hidden_size": "vision_hidden_size", "image_token_len": "image_tokens", "num_experts": "n_routed_experts",
           "router_aux_loss_coef": "aux_loss_alpha"}  # fmt: skip

# How SigLIP 2 (base, patch 32, 256 pixels), the family's vision encoder, wants its images; published folders do not say.
SIGLIP2 = {"size": {"height": 256, "width": 256}, "do_center_crop": False, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIGLIP2_TOKENS = 64


def settings_for(hidden_size: int) -> dict:
    """The family's settings that are not this project's defaults."""
    return {"qk_norm": True, "num_key_value_heads": 4, "intermediate_size": 64 * math.ceil(math.pi * hidden_size / 64),
            "rms_norm_eps": 1e-6, "projector": "mlp", "n_shared_experts": 0, "num_experts_per_tok": 1, "norm_top1_prob": True,
            "aux_loss_alpha": 5e-4, "seq_aux": False}  # fmt: skip


def renamed(published: dict) -> dict:
    """The family's published configuration under this project's names. Raises ValueError for sizes that it contradicts."""
    hidden_size = published["hidden_size"]
    settings = settings_for(hidden_size) | {RENAMED.get(name, name): value for name, value in published.items()}
    (settings["image_token_id"],) = set(settings.pop("image_ids"))
    for name, implied in (("head_dim", hidden_size // settings["num_attention_heads"]),
                          ("moe_intermediate_size", settings["intermediate_size"])):  # fmt: skip
        if settings.pop(name, implied) != implied:
            raise ValueError(f"{name} {published[name]}: {implied} is wanted, as the other sizes have it")
    return settings
