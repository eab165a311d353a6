"""Files to batches: images of all kinds, lines of all kinds, and collation."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from dataset.images import load_image, open_images
from dataset.jsonl import JsonlSamples
from dataset.sources import open_samples
from dataset.vlm_dataset import BadSample, VLMDataset, collate
from model.errors import DataError, SampleError
from model.pixels import normalize, preprocess
from tests.conftest import make_data, make_model, make_vision_encoder, write_jsonl

GOOD = {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) % 256], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (300, 200), (200, 333), (640, 480), (148, 37), (31, 120), (225, 224), (1, 1)])
@pytest.mark.parametrize("kind", ["gradient", "noise"])
def test_pixels_are_those_of_transformers_within_two_levels(size, kind):
    noise = np.random.default_rng(0).integers(0, 2, (size[1], size[0], 3), dtype=np.uint8) * 255  # black or white: the worst
    image = gradient(*size) if kind == "gradient" else Image.fromarray(noise)
    theirs = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values[0]
    ours = normalize(preprocess(image)[None])[0]
    level = (1 / 255) / torch.tensor([0.26, 0.26, 0.27]).view(3, 1, 1)
    assert ((ours - theirs).abs() <= 2.1 * level).all()


def test_of_a_very_long_image_the_middle_is_seen_and_the_rest_costs_nothing():
    assert preprocess(gradient(20_000, 1)).shape == (3, 224, 224)
    strip = Image.new("RGB", (900, 30), "red")
    strip.paste("blue", (435, 0, 465, 30))
    for turned in (strip, strip.transpose(Image.Transpose.TRANSPOSE)):
        pixels = preprocess(turned).float()
        assert (pixels[2] > 250).float().mean() > 0.95 and (pixels[0] < 5).float().mean() > 0.95
        assert (pixels - pixels.flip(1, 2)).abs().max() <= 2, "as much of the left as of the right"


def test_modes_are_told_apart():
    red = Image.new("RGB", (30, 30), (200, 10, 20))
    expected = preprocess(red)[:, 0, 0].float()
    half = red.copy()
    half.putalpha(0)
    assert preprocess(half)[:, 0, 0].tolist() == [255, 255, 255], "transparency shows white"
    for other in (red.quantize(), red.convert("CMYK"), red.convert("RGBA")):
        assert (preprocess(other)[:, 0, 0].float() - expected).abs().max() <= 1, other.mode
    deep = Image.fromarray(np.full((30, 30), 40_000, dtype=np.uint16))
    assert abs(int(preprocess(deep)[0, 0, 0]) - 40_000 // 257) <= 1, "16 bits are scaled, not clipped"
    assert preprocess(Image.new("1", (30, 30), 1))[:, 0, 0].tolist() == [255] * 3


def test_exif_rotation_and_animation(tmp_path):
    picture = Image.new("RGB", (100, 100), "black")
    picture.paste("white", (0, 0, 100, 50))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = preprocess(open_images(tmp_path).load("turned.jpg"))
    assert pixels[0, 10, 100] < 30 and pixels[0, 210, 100] > 220
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert preprocess(open_images(tmp_path).load("moving.gif"))[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("block", [b"XXXXgarbage", b"MM\0*\0\0"])
def test_a_damaged_exif_block_does_no_harm(tmp_path, block):
    picture = gradient(40, 30)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", exif=block)
    whole, damaged = (open_images(tmp_path).pixels(name) for name in ("a.png", "b.png"))
    assert torch.equal(whole, damaged)


def test_images_that_cannot_be_had(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    gradient(20, 20).save(tmp_path / "outside.png")
    gradient(40, 40).save(folder / "cut.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    gradient(50, 50).save(folder / "large.png")
    images = open_images(folder)
    for name, reason in [("cut.png", "cannot be read"), ("empty.png", "cannot be read"), ("text.png", "cannot be read"),
                         ("none.png", "is not in"), ("../outside.png", "leads out of"),
                         (str(tmp_path / "outside.png"), "leads out of"), (".", "is not in")]:  # fmt: skip
        with pytest.raises(SampleError, match=f"^f:3: .*{reason}"):
            images.load(name, "f:3")
    with pytest.raises(SampleError, match=r"^f:3: .*50 x 50 pixels, more than 2,000"):
        load_image(folder / "large.png", "large.png", "f:3", most_pixels=2000)


def test_jsonl_lines_are_found_by_offset(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [GOOD | {"kind": f"第{number}"} for number in range(5)]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n" + lines[1] + b"\n   \n" + lines[2] + b"\n" + lines[3] + b"\r\n" + lines[4])
    samples = JsonlSamples(path)
    assert [samples[number].kind for number in (4, 0, 2, 1, 3)] == ["第4", "第0", "第2", "第1", "第3"]
    assert [samples.where(number) for number in range(5)] == [f"{path}:{line}" for line in (1, 3, 5, 6, 7)]
    assert pickle.loads(pickle.dumps(samples))[3].kind == "第3"


@pytest.mark.parametrize("line", ['{"a": ', "[1", "\x00", '{"conversations": [}', "[" * 100_000, "NaNNN"])
def test_broken_lines_name_themselves(tmp_path, line):
    samples = JsonlSamples(write_jsonl(tmp_path / "data.jsonl", [GOOD, line, GOOD]))
    with pytest.raises(SampleError, match=r"data.jsonl:2: not json"):
        samples[1]
    assert samples[2].turns[1].content == "ho"


def test_invalid_utf8_names_its_line(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"conversations": "\xff\xfe"}\n')
    with pytest.raises(SampleError, match=r"data.jsonl:2: not UTF-8"):
        JsonlSamples(tmp_path / "data.jsonl")[1]


def test_missing_data_says_how_to_fetch_it(tmp_path):
    with pytest.raises(DataError, match="hf download"):
        open_samples(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no samples"):
        open_samples(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"no \.jsonl"):
        open_samples(write_jsonl(tmp_path / "data.csv", [GOOD]))
    with pytest.raises(SampleError, match="no folder"):
        open_images(tmp_path / "nowhere").load("a.png")


@pytest.fixture
def dataset(data, renderer) -> VLMDataset:
    return VLMDataset(open_samples(data[0]), open_images(data[1]), renderer, 640)


def test_a_batch_gives_what_its_samples_give_alone(dataset):
    """Padding and neighbours change nothing: losses, however many images each row has."""
    model = make_model(encoder=make_vision_encoder()).eval()
    items = [dataset[number] for number in range(22)]
    assert {len(item.images) for item in items} == {0, 1, 2}
    collated = [collate([item], 0, 196) for item in items]
    batch = collate(items, 0, 196)
    longest = max(len(item.ids) for item in items)
    assert longest <= batch.ids.shape[1] < longest + 8
    assert batch.tokens == sum(len(item.ids) for item in items) == batch.attention_mask.sum()
    with torch.no_grad():
        def total(b):
            out = model(b.ids, labels=b.labels, pixel_values=normalize(b.pixels)[b.image_index], image_positions=b.image_positions)
            return out.loss * b.supervised

        assert torch.allclose(total(batch), sum(total(single) for single in collated), rtol=1e-5)


def test_bad_samples_take_no_row(dataset):
    good, bad = dataset[0], BadSample(7, "f:8: broken")
    batch = collate([bad, good, bad], 0, 196)
    assert batch.ids.shape[0] == 1 and batch.bad == (bad, bad) and batch.indices == (0,)
    empty = collate([bad], 0, 196)
    model = make_model(encoder=make_vision_encoder())
    loss = model(empty.ids, labels=empty.labels, pixel_values=normalize(empty.pixels), image_positions=empty.image_positions).loss
    assert empty.supervised == 0 and loss.item() == 0


def test_samples_too_long_are_bad_samples(data, renderer):
    dataset = VLMDataset(open_samples(data[0]), open_images(data[1]), renderer, 60)
    items = [dataset[number] for number in range(len(dataset))]
    assert any(isinstance(item, BadSample) and "do not fit in 60 tokens" in item.reason for item in items)
    assert all(len(item.ids) <= 60 for item in items if not isinstance(item, BadSample))


def test_make_data_is_deterministic(tmp_path):
    first, second = (make_data(tmp_path / name, 5)[0].read_text() for name in "ab")
    assert first == second
