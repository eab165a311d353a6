"""What files are that Pillow does not read: formats of other packages, and no images at all."""

import io
import re
from importlib import import_module
from importlib.util import find_spec

from PIL import Image

from .images import ImageRefused

PLUGINS = {"HEIC": ("HEIF", "pillow_heif.HeifImagePlugin", "pillow-heif"), "JPEG XL": ("JXL", "pillow_jxl", "pillow-jxl-plugin")}
KINDS = {  # how a file begins that no decoder took, and what it is
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC", rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftypavi|....jP  ": "an image, but damaged, truncated or of a variant that Pillow does not read",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ": "a video, not an image",
    rb"%PDF|%!PS|\xc5\xd0\xd3\xc6": "a PDF or PostScript document; save its pages as PNG",
    rb"\s*(<[?!][^>]*>\s*)*<svg": "an SVG drawing; save it as PNG",
    rb"(?i)\s*<(!doctype html|html|head|body)": "a web page, perhaps an error that was saved in place of the image",
    rb"version https://git-lfs": "a git-lfs pointer, not the image; git lfs pull fetches it",
    rb"[\t\n\r -~\x80-\xff]+$": "text, not an image",
}  # fmt: skip


def open_by_plugin(data: bytes) -> Image.Image:
    """The image, by the package that reads its format; raises ImageRefused where none does, or it is not installed."""
    kind = next((kind for start, kind in KINDS.items() if re.match(start, data[:1000], re.DOTALL)), "of no known kind of image")
    format, module, package = PLUGINS.get(kind, ("", "", ""))
    if not package:
        raise ImageRefused(f"it is {kind if data else 'empty'}")
    if find_spec(module.partition(".")[0]) is None:
        raise ImageRefused(f"it is {kind}, which {package} reads: pip install {package}, or save it as JPEG")
    import_module(module)  # tells Pillow
    return Image.open(io.BytesIO(data), formats=[format])
