"""Image files as others write them: cut short, of many kinds and modes, and what is none."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

from dataset import kinds
from dataset.images import IMAGE_SUFFIXES, ImageRefused, decode, image_files, open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import VLMDataset, collate
from model.errors import SampleError, reason
from model.vision import to_rgb
from tests.conftest import write_jsonl

GRAIN = np.random.default_rng(0).normal(0, 8, (300, 400, 3))
PHOTO = Image.fromarray((np.indices((300, 400))[[0, 1, 0]].transpose(1, 2, 0) % 200 + 30 + GRAIN).clip(0, 255).astype(np.uint8))


ROW = {"conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}], "image": "a.png"}


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


CUT = {"jpeg": ("JPEG", {}), "progressive": ("JPEG", {"progressive": True}), "png": ("PNG", {}), "webp": ("WEBP", {}), "bmp": ("BMP", {}),
       "tiff": ("TIFF", {})}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_a_truncated_file_is_refused(name):
    form, options = CUT[name]
    data = encoded(PHOTO, form, **options)
    assert decode(data, 10**6).size == PHOTO.size
    for kept in (len(data) - 54, len(data) // 2, 99):
        with pytest.raises((ImageRefused, OSError, SyntaxError)):
            decode(data[:kept], 10**6)


def test_a_truncated_image_makes_a_bad_sample(renderer, tmp_path):
    data = encoded(PHOTO, "JPEG")
    for name, content in (("a.jpg", data), ("b.jpg", data[:-10])):
        (tmp_path / name).write_bytes(content)
    path = write_jsonl(tmp_path / "data.jsonl", [ROW | {"image": name} for name in ("a.jpg", "b.jpg")])
    dataset = VLMDataset(open_samples(path), open_images(tmp_path), renderer, 640)
    batch = collate(dataset.__getitems__([0, 1]), 0, 196)
    (bad,) = batch.bad
    assert batch.indices == (0,) and bad.index == 1
    assert f"{path}:2: image 'b.jpg' cannot be read: " in bad.reason and "truncated" in bad.reason


def file_of(array, form: str) -> Image.Image:
    return decode(encoded(Image.fromarray(np.asarray(array)), form), 10**6)


@pytest.mark.parametrize(
    ("values", "form", "expected"),
    [(np.float32([0, 0.5, 1]), "TIFF", [0, 127, 255]), (np.float32([0, 100, 255]), "TIFF", [0, 100, 255]),
     (np.float32([0, 32768, 65535]), "TIFF", [0, 127, 255]), (np.float32([0, 5e8, 1e9]), "TIFF", [0, 127, 255]),
     (np.float32([-0.1, 0.5, 1.2]), "TIFF", [0, 127, 255]), (np.float32([np.nan, 0.5, np.inf]), "TIFF", [0, 127, 0]),
     (np.float32([np.nan] * 3), "TIFF", [0, 0, 0]), (np.float32([0, 0.5, 1]), "PPM", [0, 127, 255]),
     (np.int32([0, 100, 255]), "TIFF", [0, 100, 255]), (np.int32([0, 32768, 65535]), "TIFF", [0, 127, 255]),
     (np.uint16([0, 128, 257]), "TIFF", [0, 0, 1]), (np.uint16([0, 32768, 65535]), "PNG", [0, 127, 255]),
     (np.array([0, 32768, 65535], ">u2"), "TIFF", [0, 127, 255]), (np.uint16([0, 32768, 65535]), "PPM", [0, 127, 255])],
)  # fmt: skip
def test_greys_of_many_bits_become_those_people_see(values, form, expected):
    image = file_of(np.tile(values, (4, 1)), form)
    assert [to_rgb(image).getpixel((x, 2)) for x in range(3)] == [(value,) * 3 for value in expected]


RED = Image.new("RGB", (24, 20), "red")
MODES = {
    "1": (Image.new("1", (24, 20), 1), "PNG", {}, (255, 255, 255)), "1 tiff": (Image.new("1", (24, 20), 0), "TIFF", {}, (0, 0, 0)),
    "L": (Image.new("L", (24, 20), 77), "PNG", {}, (77, 77, 77)), "cmyk jpeg": (RED.convert("CMYK"), "JPEG", {"quality": 95}, (255, 0, 0)),
    "cmyk tiff": (RED.convert("CMYK"), "TIFF", {}, (255, 0, 0)), "ycbcr": (RED.convert("YCbCr"), "TIFF", {}, (255, 0, 0)),
    "P": (RED.quantize(), "PNG", {}, (255, 0, 0)), "P, transparent": (RED.quantize(), "PNG", {"transparency": 0}, (255, 255, 255)),
    "gif, transparent": (RED.quantize(), "GIF", {"transparency": 0}, (255, 255, 255)),
    "L, transparent": (Image.new("L", (24, 20), 7), "PNG", {"transparency": 7}, (255, 255, 255)),
    "RGB, transparent": (RED, "PNG", {"transparency": (255, 0, 0)}, (255, 255, 255)),
    "LA": (Image.new("LA", (24, 20), (10, 128)), "PNG", {}, (132, 132, 132)),
    "RGBA": (Image.new("RGBA", (24, 20), (255, 0, 0, 128)), "PNG", {}, (255, 127, 127)),
    "webp": (Image.new("RGBA", (24, 20), (255, 0, 0, 0)), "WEBP", {"lossless": True}, (255, 255, 255)),
    "avif": (RED, "AVIF", {"quality": 100}, (255, 0, 0)), "jp2": (RED, "JPEG2000", {}, (255, 0, 0)), "tga": (RED, "TGA", {}, (255, 0, 0)),
    "ico": (RED, "ICO", {"sizes": [(24, 20)]}, (255, 0, 0)), "pcx": (RED, "PCX", {}, (255, 0, 0)), "qoi": (RED, "QOI", {}, (255, 0, 0)),
    "long comment": (RED, "PNG", {"pnginfo": PngImagePlugin.PngInfo()}, (255, 0, 0)),
}  # fmt: skip
MODES["long comment"][2]["pnginfo"].add_text("workflow", "a" * 5_000_000, zip=True)


@pytest.mark.parametrize("name", MODES)
def test_every_kind_is_seen_in_its_colours(name):
    image, form, options, expected = MODES[name]
    seen = to_rgb(decode(encoded(image, form, **options), 10**6)).getpixel((9, 9))
    assert seen == pytest.approx(expected, abs=6)


def test_transparency_that_is_multiplied_in_already():
    assert to_rgb(Image.new("RGBA", (4, 4), (255, 0, 0, 128)).convert("RGBa")).getpixel((1, 1)) == (255, 127, 127)


@pytest.mark.parametrize("name", ["heic", "jpeg xl"])
def test_kinds_that_another_package_reads(name, tmp_path, monkeypatch):
    data = {"heic": b"\0\0\0\x1cftypheic\0\0\0\0mif1", "jpeg xl": b"\0\0\0\x0cJXL \r\n\x87\n"}[name]
    key = {"heic": "HEIC", "jpeg xl": "JPEG XL"}[name]
    form, _, package = kinds.PLUGINS[key]
    monkeypatch.setitem(kinds.PLUGINS, key, (form, "no_such_module.plugin", package))
    with pytest.raises(ImageRefused, match=f"it is {key}, which {package} reads: pip install {package}"):
        decode(data, 10**6)
    plugin = f"plugin_of_{form.lower()}"
    (tmp_path / f"{plugin}.py").write_text(
        "from PIL import Image, ImageFile\n"
        "class File(ImageFile.ImageFile):\n"
        f"    format = {form!r}\n"
        "    def _open(self):\n"
        "        self._size, self._mode, self.tile = (6, 5), 'L', []\n"
        "        self.im = Image.core.fill('L', (6, 5), 99)\n"
        f"Image.register_open({form!r}, File)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(kinds.PLUGINS, key, (form, plugin, package))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    assert decode(data, 10**6).getpixel((2, 2)) == 99 and plugin in sys.modules


def test_suffixes_are_those_of_what_can_be_read(tmp_path):
    assert {".jpg", ".avif", ".tga", ".jp2", ".tif", ".bmp", ".ico", ".ppm", ".heic", ".jxl", ".mpo"} <= IMAGE_SUFFIXES
    assert not {".pdf", ".eps", ".ps", ".h5", ".mpg", ".mpeg", ".wmf"} & IMAGE_SUFFIXES
    for name in ("b.TGA", "a.png", "._a.png", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["a.png", "b.TGA"]


@pytest.mark.parametrize("step", ["decode", "preprocess"])
def test_memory_that_runs_out_is_no_bad_sample(step, renderer, tmp_path, monkeypatch):
    RED.save(tmp_path / "a.png")

    def run_out(*_):
        raise MemoryError

    monkeypatch.setattr(f"dataset.images.{step}", run_out)
    with pytest.raises(MemoryError):
        open_images(tmp_path).pixels("a.png")
    dataset = VLMDataset(open_samples(write_jsonl(tmp_path / "a.jsonl", [ROW])), open_images(tmp_path), renderer, 640)
    with pytest.raises(MemoryError):  # also out of a loader process
        next(iter(DataLoader(dataset, num_workers=1, collate_fn=lambda items: collate(items, 0, 196))))
    assert reason(MemoryError()) == "MemoryError" and reason(ValueError("odd")) == "ValueError: odd"


def test_an_error_without_words_has_its_name(tmp_path, monkeypatch):
    RED.save(tmp_path / "a.png")
    monkeypatch.setattr("dataset.images.preprocess", lambda _: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(SampleError, match=r"cannot be read: KeyError$"):
        open_images(tmp_path).pixels("a.png")
