"""The vision-language model: patch vectors take the places of image placeholders, the rest is the decoder.

    input_ids [B, T] -> token embeddings [B, T, D] ----------------------+
    pixel_values -> vision encoder [N, P, W] -> projector [N, P, D] -----+-> splice [B, T, D] -> decoder -> logits

Legend of shapes: B rows of a batch, T tokens, N images of the whole batch in reading order, S pixels a side, P patches
of an image (196), W width of the vision encoder, D of the decoder.
Source: LLaVA (Liu et al., arXiv 2304.08485): a frozen encoder, one projector, a language model.
"""

import re
from dataclasses import replace

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .model_minimind import MiniMindConfig, MiniMindForCausalLM
from .pixels import CLIP, PixelSettings, normalize
from .vision import VisionProj, encode_images, patches_per_image, pixel_settings_of, pool_patches, pooling

# Keys of the original project's configuration files that have no meaning here.
PUBLISHED_EXTRAS = ("auto_map", "dropout", "flash_attn", "image_special_token", "inference_rope_scaling")


class VLMConfig(MiniMindConfig):
    """The decoder's configuration and how images enter it.

    Reads the original project's configuration files as well: their `image_ids` say which token stands for an image, and
    how often.
    """

    model_type = "minimind-v"

    image_token_id: int = 34  # "@" in the published tokenizer and in ours
    image_tokens: int = 196  # placeholders, and patch vectors, of one image
    vision_hidden_size: int = 768  # of these vectors: the encoder's width, times the patches that are pooled in one
    projector: str = "linear"  # or "mlp"
    tiles: int = 0  # at most, that an image is cut into besides being shown whole

    def __post_init__(self, image_ids: list[int] | None = None, **kwargs):
        if image_ids is not None:
            if len(set(image_ids)) != 1:
                raise ValueError(f"image_ids hold {len(set(image_ids))} different tokens; an image is a run of one")
            self.image_token_id, self.image_tokens = image_ids[0], len(image_ids)
        if self.projector not in ("linear", "mlp"):
            raise ValueError(f"projector {self.projector!r} is unknown; known are 'linear' and 'mlp'")
        super().__post_init__(**{name: value for name, value in kwargs.items() if name not in PUBLISHED_EXTRAS})

    @classmethod
    def from_dict(cls, settings: dict, **kwargs):
        """As transformers' own; also of the minimind-3 family's published files, which name some settings otherwise."""
        if "image_token_len" in settings:
            from .minimind3 import renamed  # which only their readers need

            settings = renamed(settings)
        return super().from_dict(settings, **kwargs)


def find_image_positions(input_ids: torch.Tensor, image_token_id: int, image_tokens: int) -> torch.Tensor:
    """Indices int64 [N * P] into the flattened ids [B * T]: the non-overlapping leftmost runs of P placeholders.

    For callers that know ids only. The renderer records positions itself, so that no user's text can pass for an image.
    """
    run, T = re.compile(b"\x01" * image_tokens), input_ids.shape[1]
    rows = (input_ids == image_token_id).to(torch.uint8).tolist()
    starts = [row * T + match.start() for row, ids in enumerate(rows) for match in run.finditer(bytes(ids))]
    starts = torch.tensor(starts, dtype=torch.int64, device=input_ids.device)
    return (starts.unsqueeze(1) + torch.arange(image_tokens, device=input_ids.device)).flatten()


def splice_image_features(
    inputs_embeds: torch.Tensor, features: torch.Tensor, image_positions: torch.Tensor
) -> torch.Tensor:
    """`features` [N, P, D] at `image_positions` [N * P] (indices into B * T) of `inputs_embeds` [B, T, D].

    Raises ValueError when the numbers of images and of positions do not match.
    """
    N, P, D = features.shape
    if image_positions.numel() != N * P:
        raise ValueError(f"{N} images ({N * P} patch vectors), but image positions for {image_positions.numel() / P:g}"
                         f" ({image_positions.numel()} placeholder tokens)")  # fmt: skip
    # Out of place, so that gradients reach the projector through the copied rows, and the embedding through the others.
    flat = inputs_embeds.reshape(-1, D)  # [B * T, D], so that one index finds any row and token
    return flat.index_copy(0, image_positions, features.reshape(-1, D).to(flat.dtype)).view_as(inputs_embeds)


class MiniMindVLM(MiniMindForCausalLM):
    """Decoder, projector, and a frozen vision encoder that is held but is no submodule.

    The encoder appears in neither `parameters()` nor `state_dict()`, and `train()` does not reach it. It does follow
    the model to its device. Without one, the model reads text and `image_features`. `generate` of transformers takes
    `inputs_embeds` (see `embed`); with images it is model.hub's class that generates.
    """

    config_class = VLMConfig

    def __init__(self, config: VLMConfig, vision_encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.vision_proj = VisionProj(config.vision_hidden_size, config.hidden_size, config.projector)
        self.attach_vision_encoder(vision_encoder)
        self.post_init()

    def attach_vision_encoder(self, vision_encoder: PreTrainedModel | None) -> None:
        """Raises ValueError when the encoder's width or number of patches is not the configuration's."""
        if vision_encoder is not None:
            width, patches, tokens = vision_encoder.config.hidden_size, patches_per_image(vision_encoder), self.config.image_tokens
            if self.config.vision_hidden_size * tokens != width * patches:
                raise ValueError(
                    f"the vision encoder gives {patches} patch vectors of width {width}; the model was made for"
                    f" {tokens} of width {self.config.vision_hidden_size}"
                )
            pooling(patches, tokens)
            vision_encoder.eval().requires_grad_(False)
        # Not registered as a submodule: nothing that walks the model trains, saves or wakes it.
        self.__dict__["vision_encoder"] = vision_encoder

    def _apply(self, fn, recurse=True):
        """Moves the encoder along when the model moves (`to`, `cuda`, `half`)."""
        if self.vision_encoder is not None:
            self.vision_encoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch vectors [N, P, W] of images [N, 3, S, S], pooled if the model wants fewer than its encoder gives. Pixels
        are uint8, or floats that are normalized already. Raises ValueError when there is no vision encoder."""
        if self.vision_encoder is None:
            raise ValueError("images were given, but the model has no vision encoder; attach one, or give features")
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize(pixel_values, self.pixel_settings)
        features = encode_images(self.vision_encoder, pixel_values)
        return features if features.shape[1] == self.config.image_tokens else pool_patches(features, self.config.image_tokens)

    @property
    def pixel_settings(self) -> PixelSettings:
        """How images are prepared for this model."""
        return replace(pixel_settings_of(self.vision_encoder) if self.vision_encoder else CLIP, tiles=self.config.tiles)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings [B, T, D] with the images' projected patch vectors at their positions."""
        inputs_embeds = self.model.embed_tokens(input_ids)  # [B, T, D]; those of placeholders are replaced below
        if image_features is None and pixel_values is not None and len(pixel_values):
            image_features = self.encode_images(pixel_values)  # [N, P, W], without gradients
        if image_features is None or len(image_features) == 0:
            if self.training:
                # Every parameter takes part in every step: under DDP a rank without images would otherwise leave the
                # projector without a gradient, and the others waiting for it.
                blank = inputs_embeds.new_zeros(1, self.config.vision_hidden_size)
                inputs_embeds = inputs_embeds + 0.0 * self.vision_proj(blank).sum()
            return inputs_embeds
        if image_positions is None:
            image_positions = find_image_positions(input_ids, self.config.image_token_id, self.config.image_tokens)
        # [N, P, W] -> [N, P, D]: all that lies between the two models, and all that pretraining trains.
        return splice_image_features(inputs_embeds, self.vision_proj(image_features), image_positions)

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
        pixel_values: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """As the decoder's forward, with all its keyword arguments, and with images.

        `pixel_values` [N, 3, S, S], normalized, are all images of the batch in reading order; `image_features`
        [N, P, W] are the encoder's output for them, to skip it. `image_positions` int64 [N * P] are indices into the
        flattened ids [B * T]; None means the leftmost runs of P placeholder ids.
        Raises ValueError when the numbers of images and positions do not match, and for images next to embeddings.
        """
        if inputs_embeds is not None and (pixel_values is not None or image_features is not None):
            raise ValueError("images go with input_ids; inputs_embeds hold them already (see `embed`)")
        if input_ids is not None and inputs_embeds is None:
            input_ids, inputs_embeds = None, self.embed(input_ids, pixel_values, image_positions, image_features)
        # From here on this is a language model: it reads vectors, and is not told which of them were an image.
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels,
                               use_cache, logits_to_keep, **kwargs)  # fmt: skip
