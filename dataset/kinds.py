"""Files that Pillow does not read as they are: truncated images, formats of other packages, and what is no image."""

import io
import re
from importlib import import_module
from importlib.util import find_spec

import numpy as np
from PIL import Image

from .images import ImageRefused

MOST_MISSING = 0.05  # fraction of a truncated image that may be missing
PLUGINS = {"HEIC": ("HEIF", "pillow_heif.HeifImagePlugin", "pillow-heif"),
           "JPEG XL": ("JXL", "pillow_jxl", "pillow-jxl-plugin")}  # fmt: skip
KINDS = {  # how a file begins that no decoder took, and what it is
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC", rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftypavi|....jP  ":
        "an image, but damaged, truncated or of a variant that Pillow does not read",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ": "a video, not an image",
    rb"%PDF|%!PS|\xc5\xd0\xd3\xc6": "a PDF or PostScript document; save its pages as PNG",
    rb"\s*(<[?!][^>]*>\s*)*<svg": "an SVG drawing; save it as PNG",
    rb"(?i)\s*<(!doctype html|html|head|body)": "a web page, perhaps an error that was saved in place of the image",
    rb"version https://git-lfs": "a git-lfs pointer, not the image; git lfs pull fetches it",
    rb"[\t\n\r -~\x80-\xff]+$": "text, not an image",
}  # fmt: skip


def open_by_plugin(data: bytes) -> Image.Image:
    """The image, by the package that reads its format; raises ImageRefused where none does, or it is not installed."""
    kinds = (kind for start, kind in KINDS.items() if re.match(start, data[:1000], re.DOTALL))
    kind = next(kinds, "of no known kind of image")
    format, module, package = PLUGINS.get(kind, ("", "", ""))
    if not package:
        raise ImageRefused(f"it is {kind if data else 'empty'}")
    if find_spec(module.partition(".")[0]) is None:
        raise ImageRefused(f"it is {kind}, which {package} reads: pip install {package}, or save it as JPEG")
    import_module(module)  # tells Pillow
    return Image.open(io.BytesIO(data), formats=[format])


def load_truncated(image: Image.Image, data: bytes) -> Image.Image:
    """What is there of a JPEG, PNG or BMP file whose end is missing; raises ImageRefused unless that is nearly all, and
    for other kinds, which hide it: a hundredth of the bytes of a WebP may hold most of its pixels."""
    if image.format in ("JPEG", "MPO"):  # comes in blocks; with an end mark those that are missing become grey
        image = Image.open(io.BytesIO(data + b"\xff\xd9"), formats=["JPEG"])
        blank = np.isin(np.asarray(image).reshape(image.height, image.width, -1), (127, 128)).all(2)
    elif image.format in ("PNG", "BMP"):  # comes in rows; those that are missing stay zeros
        image.tile = []
        blank = (np.asarray(image).reshape(image.height, -1) == 0).all(1)
    else:
        raise ImageRefused("it is truncated")
    # A progressive JPEG comes in scans, of which the last has all frequencies, to the last bit (ITU-T T.81, B.2.3): after
    # a count of components, and two bytes for each, stand the first and the last frequency, and bits.
    scan = data[data.rfind(b"\xff\xda") + 4 :] + bytes(11)
    last_frequency, bits = scan[2 * scan[0] + 2 :][:2] if "progressive" in image.info else (63, 0)
    if blank.mean() > MOST_MISSING or last_frequency != 63 or bits % 16:
        raise ImageRefused("it is truncated, and too much of it is missing")
    image.info["truncated"] = True
    return image
