"""An image's pixels as a vision encoder wants them: PIL image -> preprocess -> uint8 [3, S, S] -> normalize -> floats.

Legend of shapes: N images, S pixels a side.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

# Mean and standard deviation of CLIP's training pixels per channel, of values in [0, 1] (its release's constants).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FILTERS = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers, which preprocessor_config.json holds


@dataclass(frozen=True)
class PixelSettings:
    """How images are prepared: as the vision encoder wants them, CLIP by default, and in how many tiles besides."""

    size: int = 224  # S
    shortest_edge: int | None = 224  # the shorter side is brought to this and the middle cut out; None: all is squeezed
    filter: str = "bicubic"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    tiles: int = 0  # at most

    @classmethod
    def from_dict(cls, given: dict) -> "PixelSettings":
        """Those of a preprocessor_config.json. Raises ValueError for what cannot be done here."""
        size, crop = given.get("size") or 0, given.get("crop_size") if given.get("do_center_crop") else None
        size = size if isinstance(size, dict) else {"shortest_edge": size}  # old files hold a number
        crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop} if crop else size
        edge, side, squeezed = max(size.values()), max(crop.values()), size.keys() == {"height", "width"}
        whole = len({*size.values()}) == len({*crop.values()}) == 1  # squares
        fits = edge == side if squeezed else "shortest_edge" in size and edge >= side and given.get("do_center_crop")
        if not (whole and fits and side > 0):
            raise ValueError(f"size {given.get('size')}, do_center_crop {given.get('do_center_crop')}, crop_size"
                             f" {given.get('crop_size')} give no squares")  # fmt: skip
        scaled = given.get("do_rescale", True) and math.isclose(given.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3)
        if not given.get("do_resize", True) or not scaled or given.get("resample", 3) not in FILTERS:
            raise ValueError(f"images are resized by one of {FILTERS}, and their bytes divided by 255")
        mean, std = (given["image_mean"], given["image_std"]) if given.get("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
        return cls(side, None if squeezed else edge, FILTERS[given.get("resample", 3)], tuple(mean), tuple(std))

    def to_dict(self) -> dict:
        """As `from_dict` and transformers' image processors read it."""
        size = {"height": self.size, "width": self.size}
        edge = {"shortest_edge": self.shortest_edge} if self.shortest_edge else size
        return {"size": edge, "crop_size": size, "do_center_crop": self.shortest_edge is not None, "do_resize": True,
                "resample": {name: number for number, name in FILTERS.items()}[self.filter], "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std)}  # fmt: skip


CLIP = PixelSettings()


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


def resize(image: Image.Image, height: int, width: int, filter: str) -> torch.Tensor:
    """An RGB image as uint8 [3, height, width]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
    # Antialiased interpolation of bytes is Pillow's own algorithm, at twice its speed.
    return F.interpolate(pixels.permute(0, 3, 1, 2), (height, width), mode=filter, antialias=True)[0]


def preprocess(image: Image.Image, settings: PixelSettings = CLIP) -> torch.Tensor:
    """uint8 pixels [3, S, S], within 2 levels of what transformers' image processor for the encoder makes.

    With `tiles`, a sheet [3, (1 + R) * S, C * S] of all that the encoder sees: top left the whole image as above, under
    it the image once more, larger, as R rows of C tiles (LLaVA-NeXT's idea; see `tile_grid` and `views_of`).
    """
    image, S, edge = to_rgb(image), settings.size, settings.shortest_edge
    rows, columns = tile_grid(image.width, image.height, settings.tiles)
    if edge is None:
        whole = resize(image, S, S, settings.filter)
    else:
        # Of an image more than 4 times as long as wide only the middle is resized: the ends would be cut off anyway,
        # and enlarging them could fill the memory.
        long = 4 * min(image.size)
        left, top = (max(0, (side - long) // 2) for side in image.size)
        middle = image.crop((left, top, image.width - left, image.height - top))
        height, width = (int(edge * side / min(middle.size)) for side in (middle.height, middle.width))
        top, left = (height - S) // 2, (width - S) // 2
        whole = resize(middle, height, width, settings.filter)[:, top : top + S, left : left + S]
    if not rows:
        return whole.contiguous()
    sheet = torch.zeros(3, (1 + rows) * S, columns * S, dtype=torch.uint8)
    sheet[:, :S, :S], sheet[:, S:] = whole, resize(image, rows * S, columns * S, settings.filter)
    return sheet


def tile_grid(width: int, height: int, tiles: int) -> tuple[int, int]:
    """Rows and columns of an image's tiles: of those with at most `tiles` in all the nearest to the image's shape, and
    the most tiles among equals; no row where that is a single tile."""
    grids = [(rows, columns) for rows in range(1, tiles + 1) for columns in range(1, tiles // rows + 1)]
    stretch = {grid: abs(math.log(grid[1] * height / (grid[0] * width))) for grid in grids}
    rows, columns = min(grids, key=lambda grid: (stretch[grid], -grid[0] * grid[1]), default=(1, 1))
    return (rows, columns) if rows * columns > 1 else (0, 1)


def grid_of(pixels: torch.Tensor, S: int) -> tuple[int, int]:
    """Rows and columns of the tiles of a preprocessed image."""
    return pixels.shape[1] // S - 1, pixels.shape[2] // S


def views_of(pixels: torch.Tensor, S: int) -> torch.Tensor:
    """A preprocessed image as what the encoder sees, uint8 [1 + R * C, 3, S, S]: the whole and the tiles, row by row."""
    rows, columns = grid_of(pixels, S)
    squares = pixels.view(3, 1 + rows, S, columns, S).permute(1, 3, 0, 2, 4)  # [1 + R, C, 3, S, S]
    return torch.cat((squares[0, :1], squares[1:].flatten(0, 1)))


def normalize(pixels: torch.Tensor, settings: PixelSettings = CLIP) -> torch.Tensor:
    """uint8 pixels [N, 3, S, S] -> the floats that the encoder expects, (pixels / 255 - mean) / std per channel."""
    # Numbers rather than tensors of three: bringing those to a GPU would make the host wait for it.
    channels = zip(pixels.unbind(1), settings.mean, settings.std, strict=True)
    return torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], dim=1)


def blank(shape: tuple[int, ...], settings: PixelSettings = CLIP) -> torch.Tensor:
    """uint8 pixels of this shape, [..., 3, height, width], all of the encoder's mean colour: `normalize` makes nearly 0 of it."""
    return torch.tensor(settings.mean).mul(255).round().to(torch.uint8).view(3, 1, 1).expand(shape).contiguous()
