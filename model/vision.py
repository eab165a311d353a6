"""An image as patch vectors: pixels -> frozen vision encoder -> projector to the decoder's width.

    floats [N, 3, S, S] of pixels.py -> encode_images -> [N, P, W] -> VisionProj -> [N, P, D]

Legend of shapes: N images, S pixels a side, P patches of an image (CLIP ViT-B/16 at 224 pixels: 14 rows of 14 patches
of 16 pixels, 196), W width of the vision encoder (768), D of the decoder.
Sources: CLIP (Radford et al., arXiv 2103.00020), ViT (2010.11929), the linear projector (LLaVA, 2304.08485); other
encoders: SigLIP (2303.15343, 2502.14786), DINOv2 (2304.07193).
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from .pixels import PixelSettings


class VisionProj(nn.Module):
    """From the encoder's width to the decoder's, [..., W] -> [..., D]: all that joins the two.

    CLIP's vectors already hold what is seen: one linear layer can turn them into the decoder's terms. The minimind-3
    family takes a norm and two layers ("mlp", as LLaVA-1.5 in arXiv 2310.03744).
    """

    def __init__(self, vision_width: int, hidden_size: int, kind: str = "linear"):
        super().__init__()
        # Both under the names of the published weights.
        if kind == "linear":
            self.vision_proj = nn.Sequential(nn.Linear(vision_width, hidden_size))
        else:
            self.mlp = nn.Sequential(nn.LayerNorm(vision_width), nn.Linear(vision_width, hidden_size), nn.GELU(),
                                     nn.Linear(hidden_size, hidden_size))  # fmt: skip

    def named_modules(self, *args, **kwargs):
        """Without the inner container, whose name is the outer one's: PEFT finds modules by the end of their names, and
        would train one inside the other."""
        modules = super().named_modules(*args, **kwargs)
        return ((name, module) for name, module in modules if not name.endswith("vision_proj.vision_proj"))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        (layers,) = self.children()
        return layers(features.to(layers[0].weight.dtype))


@torch.no_grad()
def encode_images(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, S, S], normalized -> patch vectors [N, P, W] of the encoder's last layer.

    Most encoders put tokens of their own before the patches, as CLIP's class token, a summary of the whole image; the
    decoder gets the patches alone.
    """
    return encoder(pixel_values=pixel_values.to(encoder.dtype)).last_hidden_state[:, -patches_per_image(encoder) :]


def pool_patches(features: torch.Tensor, image_tokens: int) -> torch.Tensor:
    """Patch vectors [N, P, W] -> [N, image_tokens, W * P / image_tokens]: those of a small square side by side in one.

    Nothing is lost, and the decoder reads fewer tokens (pixel shuffle, Shi et al., arXiv 1609.05158, backwards).
    """
    N, P, W = features.shape
    side, f = math.isqrt(P), pooling(P, image_tokens)
    features = features.view(N, side // f, f, side // f, f, W).transpose(2, 3)
    return features.reshape(N, image_tokens, f * f * W)


def pooling(patches: int, image_tokens: int) -> int:
    """How many patches a side one token stands for. Raises ValueError when squares of patches do not come out so."""
    side = math.isqrt(patches)
    possible = {(side // f) ** 2: f for f in range(1, side + 1) if side % f == 0}
    if image_tokens not in possible:
        raise ValueError(f"{image_tokens} tokens cannot be made of an image's {side} x {side} patches; possible are"
                         f" {', '.join(map(str, possible))} (--image_tokens)")  # fmt: skip
    return possible[image_tokens]


def pixel_settings_of(encoder: PreTrainedModel) -> PixelSettings:
    """How the encoder wants its images: as its folder says (`load_vision_encoder`), or else as CLIP does."""
    size = encoder.config.image_size
    return getattr(encoder, "pixel_settings", PixelSettings(size, size))


def patches_per_image(encoder: PreTrainedModel) -> int:
    """P, the number of patch vectors of one image."""
    return (pixel_settings_of(encoder).size // encoder.config.patch_size) ** 2
