"""Any eye: encoders of the CLIP, SigLIP and DINOv2 kind in their real formats, small and random, from pixels to export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import eval_vlm
import model.hub  # noqa: F401  (teaches transformers the family)
from dataset.vlm_dataset import collate
from model.conversation import Turn
from model.convert import main as convert
from model.errors import UsageError
from model.inference.assistant import Assistant
from model.inference.generation import Sampling
from model.load import read_folder, read_native
from model.pixels import CLIP, grid_of, normalize, preprocess, tile_grid, views_of
from model.vision import encode_images, patches_per_image, pixel_settings_of, pool_patches
from model.weights import load_vision_encoder, read_sidecar, vision_encoder_fingerprint
from tests.conftest import REPOSITORY, make_data, training_flags, write_jsonl
from tests.test_training import assert_same, make_trainer, run_training, train, weights
from trainer.loop import encode
from trainer.main import main

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 64, "max_position_embeddings": 16}
# Of each kind: the classes of configuration, model and image processor, what differs from SMALL, the processor's settings,
# and tokens before the patches.
CROPPED = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
KINDS = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", "CLIPImageProcessorPil", {"image_size": 48, "patch_size": 12}, CROPPED, 1),
    "clip pair": ("CLIPConfig", "CLIPModel", "CLIPImageProcessorPil", {"image_size": 48, "patch_size": 8}, CROPPED, 1),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", "SiglipImageProcessorPil", {"image_size": 64, "patch_size": 16},
               {"size": {"height": 64, "width": 64}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0),
    "siglip pair": ("SiglipConfig", "SiglipModel", "SiglipImageProcessorPil", {"image_size": 44, "patch_size": 14},
                    {"size": {"height": 44, "width": 44}}, 0),
    "dinov2": ("Dinov2Config", "Dinov2Model", "BitImageProcessorPil", {"image_size": 70, "patch_size": 14, "mlp_ratio": 2},
               {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "image_mean": [0.485, 0.456, 0.406]}, 1),
    "dinov2 registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", "BitImageProcessorPil",
                         {"image_size": 42, "patch_size": 14, "mlp_ratio": 2, "num_register_tokens": 4},
                         {"size": {"shortest_edge": 42}, "crop_size": {"height": 42, "width": 42}}, 5),
}  # fmt: skip


def make_encoder(folder: Path, kind: str) -> Path:
    """The folder as transformers writes it."""
    config, model, processor, sizes, pixels, _ = KINDS[kind]
    torch.manual_seed(0)
    both = {"vision_config": {**SMALL, **sizes}, "text_config": TEXT} if "pair" in kind else {**SMALL, **sizes}
    getattr(transformers, model)(getattr(transformers, config)(**both)).save_pretrained(folder)
    getattr(transformers, processor)(**pixels).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    return {kind: make_encoder(tmp_path_factory.mktemp("encoders") / kind.replace(" ", "_"), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("shapes"), 12)


def noise(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(width).integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_and_features_are_those_of_transformers(encoders, kind):
    encoder = load_vision_encoder(encoders[kind])
    settings, first = pixel_settings_of(encoder), KINDS[kind][5]
    images = [noise(*size) for size in ((300, 200), (40, 90), (64, 64), (21, 20), (1200, 900))]
    theirs = transformers.AutoImageProcessor.from_pretrained(encoders[kind])(images=images, return_tensors="pt")["pixel_values"]
    ours = normalize(torch.stack([preprocess(image, settings) for image in images]), settings)
    assert ours.shape == theirs.shape and settings != CLIP
    assert ((ours - theirs).abs() * 255 * torch.tensor(settings.std)[:, None, None]).max() <= 2.01
    whole = getattr(transformers, KINDS[kind][1]).from_pretrained(encoders[kind])
    output = (whole.vision_model if "pair" in kind else whole)(pixel_values=theirs).last_hidden_state[:, first:]
    features = encode_images(encoder, theirs)
    assert features.shape == (5, patches_per_image(encoder), 24) and torch.allclose(features, output, atol=1e-5)
    assert not any("head" in name for name in encoder.state_dict()), "the pooling head answers nobody"


def edit(folder: Path, file: str, **changes) -> None:
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


BAD = {
    "type 'bert'": ("siglip", lambda f: edit(f, "config.json", model_type="bert")),
    "type 'siglip2_vision_model'": ("siglip", lambda f: edit(f, "config.json", model_type="siglip2_vision_model")),
    "type None": ("clip", lambda f: edit(f, "config.json", model_type=None)),
    "Expecting": ("clip", lambda f: (f / "config.json").write_text("{")),
    "preprocessor_config.json is missing": ("siglip", lambda f: (f / "preprocessor_config.json").unlink()),
    "asks for images of 48 pixels, config.json for 64": ("siglip", lambda f: edit(f, "preprocessor_config.json", size=dict.fromkeys(("height", "width"), 48))),
    "give no squares": ("siglip", lambda f: edit(f, "preprocessor_config.json", size={"height": 64, "width": 48})),
    "do_center_crop False, crop_size": ("clip", lambda f: edit(f, "preprocessor_config.json", do_center_crop=False)),
    "size None": ("dinov2", lambda f: edit(f, "preprocessor_config.json", size=None)),
    "images are resized by": ("siglip", lambda f: edit(f, "preprocessor_config.json", resample=0)),
    "8 are left over": ("dinov2", lambda f: edit(f, "preprocessor_config.json", crop_size=dict.fromkeys(("height", "width"), 50))),
    "cannot be used": ("clip", lambda f: edit(f, "config.json", patch_size=16)),
    "weights missing": ("dinov2", lambda f: edit(f, "config.json", num_hidden_layers=3)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_folders_are_named(encoders, tmp_path, message):
    kind, break_it = BAD[message]
    folder = shutil.copytree(encoders[kind], tmp_path / "encoder")
    break_it(folder)
    with pytest.raises(UsageError, match="cannot be used") as refused:
        load_vision_encoder(folder)
    assert message in str(refused.value) and "--vision_model_path" in str(refused.value)


def test_a_clip_without_a_preprocessor_file_sees_as_every_clip(encoders, tmp_path):
    folder = shutil.copytree(encoders["clip"], tmp_path / "encoder")
    (folder / "preprocessor_config.json").unlink()
    assert pixel_settings_of(load_vision_encoder(folder)) == pixel_settings_of(load_vision_encoder(encoders["clip"]))


def test_how_images_are_prepared_is_part_of_the_fingerprint(encoders, tmp_path):
    folder = shutil.copytree(encoders["siglip"], tmp_path / "encoder")
    edit(folder, "preprocessor_config.json", image_std=[0.25] * 3)
    assert vision_encoder_fingerprint(load_vision_encoder(folder)) != vision_encoder_fingerprint(load_vision_encoder(encoders["siglip"]))


def test_pooling_puts_squares_of_patches_side_by_side():
    features = torch.arange(16.0).view(1, 16, 1)  # the numbers of 4 x 4 patches
    assert pool_patches(features, 4)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(pool_patches(features, 16), features) and pool_patches(features, 1).shape == (1, 1, 16)
    with pytest.raises(ValueError, match="9 tokens cannot be made of an image's 4 x 4 patches; possible are 16, 4, 1"):
        pool_patches(features, 9)


@pytest.mark.parametrize(("size", "tiles", "grid"), [((100, 100), 4, (2, 2)), ((100, 100), 3, (0, 1)), ((200, 100), 4, (1, 2)),
                                                     ((100, 310), 4, (3, 1)), ((400, 300), 6, (2, 3)), ((400, 300), 12, (3, 4)),
                                                     ((90, 90), 0, (0, 1)), ((100, 100), 1, (0, 1)), ((1000, 1), 4, (1, 4))])  # fmt: skip
def test_tiles_follow_the_images_shape(size, tiles, grid):
    assert tile_grid(*size, tiles) == grid


def test_a_tile_is_its_part_of_the_image_enlarged(encoders):
    settings = replace(pixel_settings_of(load_vision_encoder(encoders["siglip"])), tiles=6)
    image = noise(128, 192)  # tiles of 64 pixels fit without resizing: 3 rows of 2
    sheet = preprocess(image, settings)
    views = views_of(sheet, 64)
    assert grid_of(sheet, 64) == (3, 2) and views.shape == (7, 3, 64, 64)
    assert torch.equal(views[0], preprocess(image, replace(settings, tiles=0)))
    for number, view in enumerate(views[1:]):
        left, top = 64 * (number % 2), 64 * (number // 2)
        part = np.asarray(image.crop((left, top, left + 64, top + 64)))
        assert np.array_equal(view.permute(1, 2, 0).numpy(), part)


# Each pair of choices occurs: encoder, projector, pooling, tiles, family, feature cache.
MATRIX = [("clip", "linear", 4, 0, "minimind3", 1), ("clip", "mlp", 16, 3, "minimind2", 1), ("clip pair", "mlp", 9, 2, "minimind2", 0),
          ("siglip", "linear", 16, 2, "minimind2", 0), ("siglip", "mlp", 4, 3, "minimind3", 0), ("siglip pair", "linear", 1, 2, "minimind3", 1),
          ("dinov2", "mlp", 16, 0, "minimind2", 0), ("dinov2", "linear", 4, 2, "minimind3", 1),
          ("dinov2 registers", "mlp", 9, 2, "minimind2", 1)]  # fmt: skip


@pytest.mark.parametrize(("kind", "projector", "image_tokens", "tiles", "family", "cache"), MATRIX)
def test_train_resume_answer_export_and_back(encoders, shapes, tmp_path, capsys, kind, projector, image_tokens, tiles, family, cache):
    settings = {"projector": projector, "image_tokens": image_tokens, "tiles": tiles, "family": family}
    flags = {"hidden_size": 64, "max_seq_len": 300, "accumulation_steps": 2, "cache_features": cache}
    train(shapes, encoders[kind], tmp_path, epochs=2, save_interval=1, **flags, **settings)
    name, path, state = "sft_vlm_64", tmp_path / "out" / "sft_vlm_64.pth", tmp_path / "checkpoints" / "sft_vlm_64_resume.pth"
    expected = weights(tmp_path, name)
    path.unlink()
    state.with_name("sft_vlm_64_resume_previous.pth").replace(state)  # as after a kill before the last update
    done = train(shapes, encoders[kind], tmp_path, epochs=2, from_resume=1, **flags)  # the state knows the rest
    assert "resumed from" in done.stderr
    assert_same(weights(tmp_path, name), expected)
    assert read_sidecar(path)["training"].items() >= settings.items()

    train(shapes, encoders[kind], tmp_path, from_weight="sft_vlm", save_weight="more", **flags)  # so do the weights
    assert read_sidecar(tmp_path / "out" / "more_64.pth")["training"].items() >= settings.items()

    ask = ["--device", "cpu", "--image_dir", str(shapes[1]), "--mode", "folder", "--max_new_tokens", "4", "--temperature", "0"]
    assert convert([str(path), str(tmp_path / "folder")]) == 0
    for source in (["--save_dir", str(tmp_path / "out"), "--weight", "sft_vlm"], ["--load_from", str(tmp_path / "folder")]):
        capsys.readouterr()
        assert eval_vlm.main([*source, *ask]) == 0
        assert capsys.readouterr().out.count("[") == len(list(shapes[1].iterdir()))
    assert convert([str(tmp_path / "folder"), str(tmp_path / "back_64.pth")]) == 0
    assert_same(torch.load(tmp_path / "back_64.pth", weights_only=True), expected)
    native, other = (Assistant(one.model, one.tokenizer) for one in (read_native(path), read_folder(tmp_path / "folder")))
    assert native.model.pixel_settings == other.model.pixel_settings and native.model.pixel_settings.tiles == tiles
    turns, sampling = (Turn("user", "<image>\nWhat?"),), Sampling(6, 0.0)
    [answer] = native.generate([turns], [native.preprocess(noise(90, 40))], sampling)
    assert other.generate([turns], [other.preprocess(noise(90, 40))], sampling) == [answer]

    processor = AutoProcessor.from_pretrained(tmp_path / "folder")
    asked = [{"role": "user", "content": [{"type": "image", "image": noise(90, 40)}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True, add_generation_prompt=True)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    [ids] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert native.text(ids[inputs["input_ids"].shape[1] :].tolist()) == answer


def test_the_encoder_of_the_weights_is_taken_where_none_is_named_and_shapes_tell_pooling(encoders, shapes, tmp_path):
    train(shapes, encoders["clip"], tmp_path, hidden_size=64, image_tokens=4)
    flags = training_flags(shapes, "", tmp_path, hidden_size=64, num_workers=0, from_weight="sft_vlm", save_weight="more")
    at = flags.index("--vision_model_path")
    assert main("", {}, flags[:at] + flags[at + 2 :]) == 0
    path = tmp_path / "out" / "more_64.pth"
    assert read_sidecar(path)["training"]["vision_model_path"] == str(encoders["clip"])
    path.with_suffix(".json").unlink()
    assert read_native(path, REPOSITORY / "model", encoders["clip"]).model.config.image_tokens == 4


def test_a_damaged_sidecar_is_named(encoders, shapes, tmp_path):
    train(shapes, encoders["clip"], tmp_path, hidden_size=64)
    edit(tmp_path / "out", "sft_vlm_64.json", config={"projector": "three"})
    done = run_training(shapes, encoders["clip"], tmp_path, hidden_size=64, from_weight="sft_vlm", save_weight="more")
    assert done.returncode == 2 and "sft_vlm_64.json holds no configuration of this model: projector 'three'" in done.stderr


@pytest.mark.parametrize("orientation", [1, 6, 9, 0x600])
def test_tiles_are_the_same_from_the_cache(encoders, tmp_path, orientation):
    (tmp_path / "pictures").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise(200, 100).save(tmp_path / "pictures" / "a.jpg", exif=exif)
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Noise."}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"conversations": turns, "image": "a.jpg"}]), tmp_path / "pictures"
    made = make_trainer(data, encoders["siglip"], tmp_path, tiles=2, cache_features=1)
    first = made.run.dataset[0]
    encode(made.run, collate([first], 0, 16))
    made.run.cache.flush()
    second = made.run.dataset[0]
    assert [image.features is None for image in first.images + second.images] == [True] * 3 + [False] * 3
    assert np.array_equal(first.ids, second.ids)
