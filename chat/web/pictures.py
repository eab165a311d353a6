"""Pictures that visitors bring: checked, decoded one at a time, and shown without their metadata."""

import base64
import contextlib
import functools
import io
import threading
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageOps

from dataset.images import ImageRefused, decode, image_files

from .models import importing

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
        from model.errors import first_line  # not above: the page is there before torch is
        from model.vision import preprocess

        picture = decoded(self.data, self.name)
        try:
            return preprocess(picture)
        except MemoryError:
            raise
        except Exception as error:  # decoders and conversions raise all kinds
            raise PictureError(f"picture {self.name!r} cannot be converted: {first_line(error).rstrip('.')}. Open it in a viewer and save it anew.") from error


def take(data: bytes, name: str) -> Picture:
    """A checked picture; raises PictureError that says what is wrong with it and what to do."""
    if len(data) > MAX_MEGABYTES * 2**20:
        raise PictureError(f"picture {name!r} has {len(data) / 2**20:.0f} MB, more than {MAX_MEGABYTES}. Save it smaller.")
    picture = decoded(data, name)
    if not (deep := picture.mode[0] in "FI"):  # of more than 8 bits; others are quicker to turn when they are small
        picture.thumbnail((PREVIEW, PREVIEW))
    with contextlib.suppress(Exception):  # a damaged EXIF block raises all kinds, and tells nothing of how the picture is turned
        picture = ImageOps.exif_transpose(picture)
    if deep:
        with importing:
            from model.vision import eight_bits  # not above: only such a picture, and few are, waits for torch
        picture = eight_bits(picture)
        picture.thumbnail((PREVIEW, PREVIEW))
    if picture.mode not in ("RGB", "RGBA", "L"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    clean = Image.frombytes(picture.mode, picture.size, picture.tobytes())  # leaves behind what is no pixel
    file = io.BytesIO()
    clean.save(file, "PNG")
    return Picture(name, file.getvalue(), data)


def decoded(data: bytes, name: str) -> Image.Image:
    """The first frame; raises PictureError for broken files, for what is no picture, and for too many pixels."""
    try:
        with _decoding:
            return decode(data, MAX_PIXELS)[0]
    except MemoryError:
        raise
    except ImageRefused as error:
        raise PictureError(f"picture {name!r} cannot be read: {error}.") from error
    except Exception as error:  # decoders raise all kinds
        raise PictureError(f"picture {name!r} cannot be read: it is broken. Open it in a viewer and save it anew.") from error


@functools.cache
def examples(folder: Path) -> tuple[Picture, ...]:
    """The first pictures of the owner's folder, by name; what is no picture is left out."""
    found = []
    for path in image_files(folder):
        if len(found) < MAX_EXAMPLES and path.is_file():
            try:
                found.append(take(path.read_bytes(), path.name))
            except (PictureError, OSError):
                continue
    return tuple(found)
