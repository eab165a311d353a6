"""Images that people bring: checked, decoded, and kept without their metadata."""

import base64
import contextlib
import functools
import io
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps

from dataset.images import image_files, load_image
from model.errors import SampleError
from model.pixels import CLIP, PixelSettings, preprocess, to_rgb

MAX_MEGABYTES = 20  # of a file
MAX_PIXELS = 64_000_000  # a camera's 50 megapixels pass; decoded, one such image takes 200 MB
MAX_IMAGES = 6  # with a question: 196 tokens each
MAX_EXAMPLES = 12
PREVIEW = 640  # pixels of the longer side of what the page shows

_decoding = threading.Lock()  # eight sessions with 64 megapixels each would take 1.6 GB


@dataclass(frozen=True, eq=False)
class SessionImage:
    """An image of a session: a preview (a PNG file of pixels and nothing else), and what models see of it."""

    name: str
    preview: bytes
    seen: dict[PixelSettings, torch.Tensor] = field(repr=False)  # preprocessed so

    def pixels(self, settings: PixelSettings) -> torch.Tensor:
        """What a model sees of it; one that came after the image was brought gets it from the preview."""
        if settings not in self.seen:
            self.seen[settings] = preprocess(Image.open(io.BytesIO(self.preview)), settings)
        return self.seen[settings]

    @functools.cached_property
    def thumbnail(self) -> str:
        """The preview as a small square, a data: URL."""
        with Image.open(io.BytesIO(self.preview)) as preview:
            return data_url(ImageOps.fit(preview, (72, 72)))


def take(data: bytes, name: str, settings: PixelSettings = CLIP) -> SessionImage:
    """A checked image, for a model that wants it so; raises SampleError."""
    if len(data) > MAX_MEGABYTES * 2**20:
        raise SampleError(f"image {name!r} has {len(data) / 2**20:.0f} MB, more than {MAX_MEGABYTES}; save it smaller")
    with _decoding:
        image = to_rgb(load_image(data, name, most_pixels=MAX_PIXELS))
        pixels = preprocess(image, settings)
    image.thumbnail((PREVIEW, PREVIEW))
    return SessionImage(name, to_png(Image.frombytes("RGB", image.size, image.tobytes())), {settings: pixels})


def to_png(image: Image.Image) -> bytes:
    """As bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    """As a data: URL."""
    return f"data:image/png;base64,{base64.b64encode(to_png(image)).decode()}"


@functools.cache
def examples(folder: Path) -> tuple[SessionImage, ...]:
    """The first images of the owner's folder, by name; what is no image is left out."""
    found = []
    for path in image_files(folder)[:MAX_EXAMPLES]:
        with contextlib.suppress(SampleError, OSError):
            found.append(take(path.read_bytes(), path.name))
    return tuple(found)
