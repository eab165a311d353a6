"""The eye: picture -> pixels -> patch vectors, by a frozen CLIP vision tower, and the projector to the decoder's width.

Legend of shapes: N pictures, P patches of a picture (196 for ViT-B/16 at 224 pixels), W width of the tower, D of the
decoder.
"""

import functools
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from transformers import CLIPVisionModel

from .errors import UsageError, check_fetched, first_line

IMAGE_SIZE = 224  # pixels a side
CLIP_FOLDER = Path(__file__).resolve().parent / "vision_model" / "clip-vit-base-patch16"  # where it is looked for
# Mean and standard deviation of CLIP's training pixels per channel, of values in [0, 1] (arXiv 2103.00020's release).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Of the names of a tower's weights in transformers 4, which finds no others; since 5 they go without, and either is read.
CLASSIC_PREFIX = "vision_model."


class VisionProj(nn.Module):
    """One linear layer from the tower's width to the decoder's: [..., W] -> [..., D]."""

    def named_modules(self, *args, **kwargs):
        """Without the container within, which published weights name like the whole: PEFT, which finds modules by the
        end of their names, would train one inside the other."""
        return ((name, module) for name, module in super().named_modules(*args, **kwargs) if module is not self.vision_proj)

    def __init__(self, vision_width: int, hidden_size: int):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(vision_width, hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.vision_proj(features.to(self.vision_proj[0].weight.dtype))


def load_vision_encoder(folder: str | Path) -> CLIPVisionModel:
    """The frozen vision half of a CLIP folder in transformers format, in eval mode and fp32.

    A folder of a whole CLIPModel serves as well: its text half is never read into memory.
    Raises UsageError when the folder is missing, holds another kind of model, or lacks some of the weights.
    """
    folder = Path(folder)
    if not os.path.isfile(folder / "config.json"):  # a sidecar may name anything
        raise UsageError(
            f"no vision encoder at {folder} (config.json not found there). Fetch CLIP ViT-B/16 with\n"
            f"    hf download openai/clip-vit-base-patch16 --local-dir {folder}\n"
            f"or   modelscope download --model openai-mirror/clip-vit-base-patch16 --local_dir {folder}\n"
            f"or name another CLIP folder with --vision_model_path; the demo's own is {CLIP_FOLDER.parent / 'tiny-clip'}."
        )
    try:
        tower, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except Exception as error:  # of damaged files, all kinds
        check_fetched(folder)
        raise UsageError(f"cannot load a CLIP vision tower from {folder}: {type(error).__name__}: {first_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(
            f"{folder} is not a whole CLIP vision tower: {len(missing)} weights missing"
            f" (first: {missing[:3]}), wrong shapes: {sorted(info['mismatched_keys'])[:3]}."
            f" Fetch the folder again, or name another with --vision_model_path."
        )
    if not all(torch.isfinite(weight).all() for weight in tower.parameters()):
        raise UsageError(f"{folder} holds weights that are not finite. Fetch the folder again, or name another with --vision_model_path.")
    if tower.config.image_size != IMAGE_SIZE:
        raise UsageError(
            f"the tower in {folder} takes pictures of {tower.config.image_size} pixels, not {IMAGE_SIZE}"
        )
    return tower.eval().requires_grad_(False)


def patches_per_image(tower: CLIPVisionModel) -> int:
    """Patch vectors of one picture."""
    return (tower.config.image_size // tower.config.patch_size) ** 2


def save_vision_encoder(tower: CLIPVisionModel, folder: str | Path) -> None:
    """Writes the tower as a transformers folder, by the names that every release reads."""
    state = {CLASSIC_PREFIX + name.removeprefix(CLASSIC_PREFIX): tensor for name, tensor in tower.state_dict().items()}
    tower.save_pretrained(folder, state_dict=state)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any PIL picture as RGB, upright, transparency on white; the first frame of an animation, 16 and 32 bits scaled to 8."""
    picture.seek(0)
    try:
        picture = ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block raises all kinds, and tells nothing of how the picture is turned
        picture.load()
    picture = eight_bits(picture)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        picture = Image.alpha_composite(white, rgba)
    return picture.convert("RGB")


def eight_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits as one of 8; any other as it is.

    No file says what white is in 32 bits: 1, 255 or 65535, the least whose double the brightest pixel stays below (filters
    overshoot), or else that pixel. What is no number is black.
    """
    if picture.mode[0] not in "FI":
        return picture
    values = np.nan_to_num(np.asarray(picture, dtype=np.float32), posinf=0, neginf=0)
    highest = values.max()
    tops = (65535,) if picture.mode.startswith("I;16") else (1, 255, 65535)
    top = next((top for top in tops if highest < 2 * top), highest)
    return Image.fromarray((values * (255 / top)).clip(0, 255).astype(np.uint8))


def preprocess(picture: Image.Image) -> torch.Tensor:
    """Pixels uint8 [3, 224, 224]: shorter side to 224 (bicubic), then the middle square, as CLIP was trained.

    Only the square is resampled, so a very long picture costs no more than a square one.
    """
    picture = to_rgb(picture)
    width, height = picture.size
    short = min(width, height)
    new_width, new_height = int(IMAGE_SIZE * width / short), int(IMAGE_SIZE * height / short)
    left, top = (new_width - IMAGE_SIZE) // 2, (new_height - IMAGE_SIZE) // 2
    box = (left * width / new_width, top * height / new_height,
           (left + IMAGE_SIZE) * width / new_width, (top + IMAGE_SIZE) * height / new_height)  # fmt: skip
    # Cut out the square's surroundings first, as far as a bicubic kernel reaches: Pillow gives other pixels (by up to
    # 24 levels) for a box deep inside a long picture than for resizing all of it.
    reach = math.ceil(2 * max(1.0, short / IMAGE_SIZE)) + 1
    x, y = max(0, math.floor(box[0]) - reach), max(0, math.floor(box[1]) - reach)
    around = (x, y, min(width, math.ceil(box[2]) + reach), min(height, math.ceil(box[3]) + reach))
    if around != (0, 0, width, height):
        picture = picture.crop(around)
    box = (box[0] - x, box[1] - y, box[2] - x, box[3] - y)
    if short < IMAGE_SIZE:
        return enlarge(picture, box)
    square = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box)
    return pixels_of(square).permute(2, 0, 1).contiguous()


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """The pixels of an RGB picture, uint8 [height, width, 3]."""
    width, height = picture.size
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)


def enlarge(picture: Image.Image, box: tuple[float, float, float, float]) -> torch.Tensor:
    """The part `box` (left, top, right, bottom) of an RGB picture, no larger than 224 x 224, as uint8 [3, 224, 224].

    Pillow's bicubic, columns first and rounded between, in a third of its time: a row of the result is a weighted sum of
    four rows, which is what `embedding_bag` computes, and columns are rows of the transposed picture.
    """
    width, height = picture.size
    columns = pixels_of(picture.transpose(Image.Transpose.TRANSPOSE)).view(width, -1)  # [x, y * channels]
    columns = _weighted_sums(columns, _bicubic(width, box[0], box[2]))
    rows = np.ascontiguousarray(columns.T).reshape(height, -1)  # [y, channels * x]
    rows = _weighted_sums(torch.from_numpy(rows), _bicubic(height, box[1], box[3]))
    return torch.from_numpy(rows).view(IMAGE_SIZE, 3, IMAGE_SIZE).transpose(0, 1)


def _weighted_sums(rows: torch.Tensor, sums: dict[str, torch.Tensor]) -> np.ndarray:
    """Sums of weighted rows, uint8 [n, m] -> uint8 [224, m]."""
    out = F.embedding_bag(mode="sum", weight=rows.float(), **sums).add_(0.5).clamp_(0, 255)
    return out.numpy().astype(np.uint8)  # torch's own way from fp32 to uint8 takes nine times as long


@functools.lru_cache(maxsize=1024)
def _bicubic(size: int, begin: float, end: float) -> dict[str, torch.Tensor]:
    """The four inputs of each of 224 outputs spread over [begin, end] of `size` inputs, and their weights (a = -0.5;
    Keys, IEEE Trans. ASSP 29, 1981). At an edge the weights that fall outside are shared among the others."""
    centre = begin + (torch.arange(IMAGE_SIZE, dtype=torch.float64) + 0.5) * (end - begin) / IMAGE_SIZE
    inputs = (centre - 1.5).floor().long()[:, None] + torch.arange(4)
    distance = (inputs + 0.5 - centre[:, None]).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, far) * ((inputs >= 0) & (inputs < size))
    weights /= weights.sum(1, keepdim=True)
    return {"input": inputs.clamp(0, size - 1), "per_sample_weights": weights.float()}


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels [N, 3, 224, 224] -> the float values that CLIP expects, on the device of the pixels.

    (pixels / 255 - mean) / std, in one pass over the pixels.
    """
    shift, scale = _shift_and_scale(pixels.device)
    return torch.addcmul(shift, pixels, scale)


@functools.cache
def _shift_and_scale(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The constants of `normalize`, [3, 1, 1], brought to a device once."""
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    return (-mean / std).to(device), (1 / (255 * std)).to(device)


def attend_by_products(tower: CLIPVisionModel) -> None:
    """On a CPU: attention as products of matrices, which are quicker there than torch's fused kernel."""
    if tower.device.type == "cpu":
        tower.set_attn_implementation("eager")


@torch.no_grad()
def encode_images(tower: CLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, 224, 224] -> patch vectors [N, P, W] of the tower's last layer, without the class token."""
    return tower(pixel_values=pixel_values.to(tower.dtype)).last_hidden_state[:, 1:]
