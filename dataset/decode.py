"""Image files of other hands: which kinds are read, a lost end forgiven, a name for what is no image. Needs no torch."""

import io
import re
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

MOST_MISSING = 0.05  # share of an image that may be missing: of its pixels or rows
PLUGINS = {"HEIC": ("HEIF", "pillow_heif.HeifImagePlugin", "pillow-heif"), "JPEG XL": ("JXL", "pillow_jxl", "pillow-jxl-plugin")}
CLOSED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them by name alone; EPS is a program for Ghostscript
IMAGE_SUFFIXES = {".heic", ".heif", ".hif", ".jxl", ".mpo"} | {
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in CLOSED
}  # fmt: skip
FORMATS = ["JPEG", "PNG", "WEBP", *(kind for kind in Image.OPEN if kind not in CLOSED)]  # tried in this order
KINDS = {  # how a file begins that no decoder took, and what it is
    rb"....ftyp(hei|hev|mif1|msf1)": "HEIC", rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftypavi|....jP  ": "an image, but damaged, cut short or of a variant that Pillow does not read",
    rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ": "a video, not an image",
    rb"%PDF|%!PS|\xc5\xd0\xd3\xc6": "a PDF or PostScript document; save its pages as PNG",
    rb"\s*(<[?!][^>]*>\s*)*<svg": "an SVG drawing; save it as PNG",
    rb"(?i)\s*<(!doctype html|html|head|body)": "a web page, perhaps an error that was saved in place of the image",
    rb"version https://git-lfs": "a git-lfs pointer, not the image; git lfs pull fetches it",
    rb"[\t\n\r -~\x80-\xff]+$": "text, not an image",
}  # fmt: skip

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # one comment may be as long as all together
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our own limit stands below


class ImageRefused(Exception):
    """Says in words of ours why a file is not taken."""

    strerror = property(str)  # which stand without the exception's name, see `errors.reason`


def image_files(folder: Path) -> list[Path]:
    """The files of a folder that are named like images, in order; hidden ones are companions of others."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))


def decode(data: bytes, most_pixels: int) -> tuple[Image.Image, bool]:
    """The first frame, decoded, and whether the file ends early: then nearly all of it is there.

    Raises ImageRefused, and what decoders raise, which is all kinds.
    """
    image, cut = open_image(data, most_pixels), False
    try:
        image.load()
    except OSError as error:
        if "truncated" not in str(error):
            raise
        if jpeg := image.format in ("JPEG", "MPO"):
            image = open_image(data + b"\xff\xd9", most_pixels)  # with an end mark; what did not come is grey
        else:
            image.tile = []  # its decoder has left the rows that came; the others are as they were filled
        image.load()
        filling = (127, 128) if jpeg else (0, image.info.get("transparency", 0) if image.format == "GIF" else 0)
        blank = np.isin(np.asarray(image).reshape(image.height, image.width, -1), filling)
        missing = blank.all(2).mean() if jpeg else blank.all(1).mean(0).max()  # a JPEG comes in blocks, others in rows, perhaps a channel at a time
        if missing > MOST_MISSING or (jpeg and lacks_scans(image, data)):
            raise ImageRefused("it is cut short, and too much of it is missing") from error
        cut = True
    return image, cut


def open_image(data: bytes, most_pixels: int) -> Image.Image:
    """The image, not yet decoded; raises ImageRefused for what is none or has too many pixels."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageRefused(f"it has more than {most_pixels:,} pixels; save it smaller") from error
    except UnidentifiedImageError as error:  # its own words are an address in memory
        kind = next((kind for start, kind in KINDS.items() if re.match(start, data[:1000], re.DOTALL)), "of no known kind of image")
        format, module, package = PLUGINS.get(kind, ("", "", ""))
        if not package:
            raise ImageRefused(f"it is {kind if data else 'empty'}") from error
        if find_spec(module.partition(".")[0]) is None:
            raise ImageRefused(f"it is {kind}, which {package} reads: pip install {package}, or save it as JPEG") from error
        import_module(module)  # tells Pillow
        image = Image.open(io.BytesIO(data), formats=[format])
    if image.width * image.height > most_pixels:
        raise ImageRefused(f"it has {image.width} x {image.height} pixels, more than {most_pixels:,}; save it smaller")
    return image


def lacks_scans(image: Image.Image, data: bytes) -> bool:
    """Whether a progressive JPEG ends before a scan with the last bits of the highest frequencies (ITU-T T.81, B.2.3) begins."""
    scan = data[data.rfind(b"\xff\xda") + 4 :]  # how many components, two bytes of each; first and last frequency; bits
    last_frequency, bits = (scan + bytes(11))[2 * scan[0] + 2 :][:2] if scan else (0, 0)
    return "progressive" in image.info and (last_frequency != 63 or bits & 15 != 0)
