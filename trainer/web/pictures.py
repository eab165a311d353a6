"""Pictures that visitors bring: checked, decoded one at a time, and shown without their metadata."""

import base64
import contextlib
import functools
import io
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from .models import importing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no other decoder sees a visitor's bytes
SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
MAX_MEGABYTES = 20  # of a file
MAX_PIXELS = 64_000_000  # a camera's 50 megapixels pass; at three bytes each, one picture takes 200 MB while it is decoded
MAX_PICTURES = 6  # with a question: 196 tokens each
MAX_EXAMPLES = 12
PREVIEW = 640  # pixels of the longer side of what the page shows

_decoding = threading.Lock()  # eight visitors with 64 megapixels each would take 1.5 GB


class PictureError(Exception):
    """A picture that cannot be taken; the message says what is wrong with it and what to do."""


@dataclass(eq=False)
class Picture:
    """A picture of a visitor: a preview (PNG bytes, upright, pixels and nothing else), and the bytes of his file until the
    model's pixels have been made of it, or could not be."""

    name: str
    preview: bytes
    data: bytes | None = field(repr=False)
    _pixels: object | None = field(default=None, repr=False)
    _problem: str = ""
    _making: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @functools.cached_property
    def thumbnail(self) -> str:
        """The preview as a small square, a data: URL."""
        with Image.open(io.BytesIO(self.preview)) as preview:
            small = ImageOps.fit(preview, (72, 72))
        file = io.BytesIO()
        small.convert("RGB").save(file, "JPEG")
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

    @property
    def converted(self) -> bool:
        """Whether `pixels` gives its answer at once."""
        return self.data is None

    def pixels(self):
        """As the model takes it, uint8 [3, 224, 224], the same tensor every time; raises PictureError, likewise."""
        with self._making:  # an example is everybody's
            if not self.converted:
                try:
                    self._pixels = self._convert()
                except PictureError as error:
                    self._problem = str(error)
                self.data = None
        if self._problem:
            raise PictureError(self._problem)
        return self._pixels

    def _convert(self):
        from model.vision import preprocess  # not above: the page is there before torch is

        picture = decode(self.data, self.name)
        try:
            return preprocess(picture)
        except MemoryError:
            raise
        except Exception as error:  # decoders and conversions raise all kinds
            raise PictureError(f"picture {self.name!r} cannot be converted: {str(error).rstrip('.')}. Open it in a viewer and save it anew.") from error


def take(data: bytes, name: str) -> Picture:
    """A checked picture; raises PictureError that says what is wrong with it and what to do."""
    if len(data) > MAX_MEGABYTES * 2**20:
        raise PictureError(f"picture {name!r} has {len(data) / 2**20:.0f} MB, more than {MAX_MEGABYTES}. Save it smaller.")
    picture = decode(data, name)
    picture.thumbnail((PREVIEW, PREVIEW))
    with contextlib.suppress(Exception):  # a damaged EXIF block raises all kinds, and tells nothing of how the picture is turned
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        with importing:
            from model.vision import eight_bits  # not above: only such a picture, and few are, waits for torch
        picture = eight_bits(picture)
    if picture.mode not in ("RGB", "RGBA", "L"):
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    clean = Image.frombytes(picture.mode, picture.size, picture.tobytes())  # leaves behind what is no pixel
    file = io.BytesIO()
    clean.save(file, "PNG")
    return Picture(name, file.getvalue(), data)


def decode(data: bytes, name: str) -> Image.Image:
    """The first frame, decoded; raises PictureError for other formats, broken files and too many pixels."""
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # our own limit stands below
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise PictureError(f"picture {name!r} has {width} x {height} pixels, more than {MAX_PIXELS:,}. Save it smaller.")
        with _decoding:
            picture.load()
    except (PictureError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"picture {name!r} has more than {MAX_PIXELS:,} pixels. Save it smaller.") from error
    except Exception as error:  # decoders raise all kinds
        raise PictureError(f"picture {name!r} cannot be read: it is broken, or none of {', '.join(FORMATS)}."
                           " Open it in a viewer and save it anew.") from error  # fmt: skip
    return picture


@functools.cache
def examples(folder: Path) -> tuple[Picture, ...]:
    """The first pictures of the owner's folder, by name; what is no picture is left out."""
    found = []
    for path in sorted(folder.iterdir()):
        if len(found) < MAX_EXAMPLES and path.suffix.lower().removeprefix(".") in SUFFIXES and path.is_file():
            try:
                found.append(take(path.read_bytes(), path.name))
            except (PictureError, OSError):
                continue
    return tuple(found)
