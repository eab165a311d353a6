"""An image as patch vectors: image -> pixels -> frozen CLIP vision encoder -> projector to the decoder's width.

    PIL image -> preprocess -> uint8 [3, 224, 224] -> normalize -> encode_images -> [N, P, W] -> VisionProj -> [N, P, D]

Legend of shapes: N images, P patches of an image (ViT-B/16 at 224 pixels: 14 rows of 14 patches of 16 pixels, 196),
W width of the vision encoder (768), D of the decoder.
Sources: CLIP (Radford et al., arXiv 2103.00020), ViT (2010.11929), the linear projector (LLaVA, 2304.08485).
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import CLIPVisionModel

IMAGE_SIZE = 224  # pixels a side
# Mean and standard deviation of CLIP's training pixels per channel, of values in [0, 1] (its release's constants).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB: upright, transparency on white, an animation's first frame, 16 and 32 bits scaled to 8."""
    image.seek(0)
    try:
        image = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block raises errors of all kinds, and says nothing about how the image is turned
        image.load()
    image = eight_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 or 32 bits as one of 8; any other as it is.

    No file says what white is in 32 bits: 1, 255 or 65535, the least whose double the brightest pixel stays below
    (filters overshoot), or else that pixel. NaN and infinity become black.
    """
    if image.mode[0] not in "FI":
        return image
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    highest = values.max()
    tops = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
    top = next((top for top in tops if highest < 2 * top), highest)
    return Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))


def preprocess(image: Image.Image) -> torch.Tensor:
    """uint8 pixels [3, 224, 224]: shorter side to 224 (bicubic), then the middle square, as CLIP was trained.

    Within 2 levels of transformers' CLIPImageProcessor. Of an image more than 4 times as long as wide only the middle
    is resized: the ends would be cut off anyway, and enlarging them could fill the memory.
    """
    image = to_rgb(image)
    long = 4 * min(image.size)
    left, top = (max(0, (side - long) // 2) for side in image.size)
    image = image.crop((left, top, image.width - left, image.height - top))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
    height, width = (int(IMAGE_SIZE * side / min(image.size)) for side in (image.height, image.width))
    # Antialiased bicubic interpolation of bytes is Pillow's own algorithm, at twice its speed.
    pixels = F.interpolate(pixels.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True)[0]
    top, left = (height - IMAGE_SIZE) // 2, (width - IMAGE_SIZE) // 2
    return pixels[:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE].contiguous()


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels [N, 3, 224, 224] -> the float values that CLIP expects, (pixels / 255 - mean) / std per channel."""
    # Numbers rather than tensors of three: bringing those to a GPU would make the host wait for it.
    channels = zip(pixels.unbind(1), CLIP_MEAN, CLIP_STD, strict=True)
    return torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], dim=1)


@torch.no_grad()
def encode_images(encoder: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, 224, 224] -> patch vectors [N, P, W] of the encoder's last layer.

    The encoder puts a class token before the patches, a summary of the whole image; the decoder gets the patches alone.
    """
    return encoder(pixel_values=pixel_values.to(encoder.dtype)).last_hidden_state[:, 1:]


def patches_per_image(encoder: CLIPVisionModel) -> int:
    """P, the number of patch vectors of one image."""
    return (encoder.config.image_size // encoder.config.patch_size) ** 2
