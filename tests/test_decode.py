"""Image files as others write them: cut short, of many kinds and modes, and what is none."""

import io
import sys

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

from dataset import kinds, validate
from dataset.images import IMAGE_SUFFIXES, ImageRefused, decode, image_files, open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import VLMDataset, collate
from model.errors import SampleError, reason
from model.pixels import preprocess, to_rgb
from tests.conftest import write_jsonl

GRAIN = np.random.default_rng(0).normal(0, 8, (300, 400, 3))
PHOTO = Image.fromarray((np.indices((300, 400))[[0, 1, 0]].transpose(1, 2, 0) % 200 + 30 + GRAIN).clip(0, 255).astype(np.uint8))


ROW = {"conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}], "image": "a.png"}


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


CUT = {"jpeg": ("JPEG", {}), "420": ("JPEG", {"subsampling": 2}), "restarts": ("JPEG", {"restart_marker_rows": 1}),
       "progressive": ("JPEG", {"progressive": True}), "cmyk": ("JPEG", {"mode": "CMYK"}), "grey": ("JPEG", {"mode": "L"}),
       "png": ("PNG", {}), "bmp": ("BMP", {})}  # fmt: skip


@pytest.mark.parametrize("name", CUT)
def test_a_file_short_of_a_few_bytes_shows_nearly_everything(name):
    form, options = CUT[name]
    image = PHOTO.convert(options.get("mode", "RGB"))
    data = encoded(image, form, **{key: value for key, value in options.items() if key != "mode"})
    whole = decode(data, 10**6)
    assert "truncated" not in whole.info
    whole = np.asarray(whole.convert("RGB")).astype(int)
    for count in (1, 2, 10, 54):
        shown = decode(data[:-count], 10**6)
        assert shown.info.get("truncated") or (name == "png" and count < 54), "a PNG ends with bytes that are no pixels"
        differing = (abs(np.asarray(shown.convert("RGB")) - whole).max(2) > 60).mean()
        assert differing < 0.06 and shown.size == image.size, count
    for kept in (0.5, 0.2):
        if name == "progressive" and kept == 0.5:  # the last bits alone are missing
            assert abs(np.asarray(decode(data[: len(data) // 2], 10**6)) - whole).mean() < 4
            continue
        with pytest.raises((ImageRefused, OSError)):
            decode(data[: int(len(data) * kept)], 10**6)


def test_much_that_is_missing_is_not_hidden_in_few_rows():
    with pytest.raises(ImageRefused, match="too much of it is missing"):  # a single row of blocks
        data = encoded(PHOTO.resize((2000, 8)), "JPEG")
        decode(data[: len(data) // 2], 10**6)
    data = encoded(PHOTO, "JPEG", progressive=True)
    scans = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    for scan in scans[1:7]:  # all pixels have come, but coarse
        with pytest.raises((ImageRefused, OSError), match=r"too much of it is missing|truncated"):
            decode(data[: scan + 40], 10**6)


@pytest.mark.parametrize(("form", "options"), [("WEBP", {}), ("WEBP", {"lossless": True}), ("SGI", {}), ("TIFF", {}), ("GIF", {})])
def test_truncated_files_of_kinds_that_hide_what_is_missing_are_refused(form, options):
    """A hundredth of a WebP's bytes may hold most of the pixels; SGI ends with a whole channel."""
    calm = np.asarray(PHOTO).copy()
    calm[60:] = np.linspace(30, 220, 240)[:, None, None]
    data = encoded(Image.fromarray(calm), form, **options)
    for missing in (10, 54, len(data) // 100, len(data) // 25):
        with pytest.raises((ImageRefused, OSError)):
            decode(data[:-missing], 10**6)


def test_a_truncated_image_is_used_named_and_counted(renderer, tmp_path, capsys):
    data = encoded(PHOTO, "JPEG")
    for name, content in (("a.jpg", data), ("b.jpg", data[:-10]), ("c.jpg", data[:-9000])):
        (tmp_path / name).write_bytes(content)
    path = write_jsonl(tmp_path / "data.jsonl", [ROW | {"image": name} for name in ("a.jpg", "b.jpg", "c.jpg")])
    dataset = VLMDataset(open_samples(path), open_images(tmp_path), renderer, 640)
    batch = collate(dataset.__getitems__([0, 1, 2]), 0, 196)
    (note,), (bad,) = batch.truncated, batch.bad
    assert batch.indices == (0, 1) and note.index == 1 and bad.index == 2
    assert note.reason == f"{path}:2: image 'b.jpg' is truncated, used: nearly all of it is there"
    assert f"{path}:3: image 'c.jpg' cannot be read: it is truncated, and too much" in bad.reason
    assert validate.main([str(path), "--images_path", str(tmp_path), "--processes", "1"]) == 1
    said = capsys.readouterr().out
    assert "3 samples, 2 images; 1 bad (33.33%)" in said and f"1 x truncated images, used\n      {note.reason}" in said
    assert validate.main([str(write_jsonl(path, [ROW | {"image": "b.jpg"}])), "--images_path", str(tmp_path)]) == 0


def test_a_truncated_image_is_seen_by_the_model_as_the_whole_one():
    data = encoded(PHOTO, "JPEG")
    whole, truncated = (preprocess(decode(content, 10**6)).int() for content in (data, data[:-2]))
    assert (whole - truncated).abs().max() <= 1


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
    monkeypatch.setattr("dataset.images.preprocess", lambda *_: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(SampleError, match=r"cannot be read: KeyError$"):
        open_images(tmp_path).pixels("a.png")
