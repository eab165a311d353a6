"""The vision encoder: folders as transformers writes them, whole CLIP models, and folders that hold none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from model.errors import UsageError
from model.hub.modeling import MiniMindVForConditionalGeneration, save_vision_encoder
from model.recipes.train_tiny_clip import TinyCLIP, save
from model.vision import encode_images
from model.weights import load_vision_encoder, vision_encoder_fingerprint
from tests.conftest import REPOSITORY, make_model, make_vision_encoder

TINY_CLIP = REPOSITORY / "model" / "vision_model" / "tiny-clip"


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A whole CLIPModel with ViT-B/16's own vision half and a text half of some size."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    vision = CLIPVisionConfig(patch_size=16)  # 768 wide, 12 layers, 224 pixels: the class's own defaults
    text = CLIPTextConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["5.x", "4.57"])
def clip_layout(request, clip_folder, tmp_path_factory) -> Path:
    """The folder as transformers 5 writes it, and with the names and buffers that version 4.57 and the hub have."""
    if request.param == "5.x":
        return clip_folder
    folder = tmp_path_factory.mktemp("clip457")
    state = load_file(clip_folder / "model.safetensors")
    assert any(name.startswith("vision_model.embeddings.") for name in state)
    state["vision_model.embeddings.position_ids"] = torch.arange(197)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((clip_folder / "config.json").read_text()) | {"transformers_version": "4.57.0"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_whole_clip_model_gives_its_vision_half(clip_layout, clip_folder):
    encoder = load_vision_encoder(clip_layout)
    assert type(encoder) is CLIPVisionModel and not encoder.training
    assert 85_000_000 < sum(p.numel() for p in encoder.parameters()) < 87_000_000
    assert not any("text" in name for name, _ in encoder.named_parameters())
    assert not any(p.requires_grad for p in encoder.parameters())
    pixels = torch.randn(2, 3, 224, 224)
    features = encode_images(encoder, pixels)
    assert features.shape == (2, 196, 768) and not features.requires_grad
    with torch.no_grad():
        whole = CLIPModel.from_pretrained(clip_folder).eval().vision_model(pixel_values=pixels)
    assert (features - whole.last_hidden_state[:, 1:]).abs().max() < 1e-4


def test_folders_that_hold_no_vision_encoder_say_so(tmp_path):
    with pytest.raises(UsageError, match=r"(?s)hf download openai/clip-vit-base-patch16.*tiny-clip"):
        load_vision_encoder(tmp_path / "nothing")
    make_vision_encoder().save_pretrained(tmp_path / "part")
    state = load_file(tmp_path / "part" / "model.safetensors")
    taken = next(name for name in state if name.endswith("k_proj.weight"))
    save_file(state | {taken: state[taken] * float("nan")}, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="weights that are not finite"):
        load_vision_encoder(tmp_path / "part")
    state.pop(taken)
    save_file(state, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="1 weights missing"):
        load_vision_encoder(tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").write_bytes(b"corrupt")
    with pytest.raises(UsageError, match="SafetensorError"):
        load_vision_encoder(tmp_path / "part")


def test_fingerprint_is_of_the_weights(tmp_path):
    one, same, other = make_vision_encoder(1), make_vision_encoder(1), make_vision_encoder(2)
    assert vision_encoder_fingerprint(one) == vision_encoder_fingerprint(same) != vision_encoder_fingerprint(other)
    one.save_pretrained(tmp_path)
    assert vision_encoder_fingerprint(load_vision_encoder(tmp_path)) == vision_encoder_fingerprint(same)


def test_encoders_are_written_by_the_names_that_every_release_reads(tmp_path):
    """transformers 4 leaves weights of other names at random values, and says so only in a warning."""
    encoder, model = make_vision_encoder(), TinyCLIP()
    save_vision_encoder(encoder, tmp_path / "ours")
    make_model(encoder=encoder, kind=MiniMindVForConditionalGeneration).save_pretrained(tmp_path / "model")
    save(model, tmp_path / "clip")
    for folder in (tmp_path / "ours", tmp_path / "model" / "vision_model", tmp_path / "clip", TINY_CLIP):
        names = set(load_file(folder / "model.safetensors"))
        assert names == {f"vision_model.{name}" for name in load_vision_encoder(folder).state_dict()}, folder
    encoder.save_pretrained(tmp_path / "new names")
    assert not any(name.startswith("vision_model.") for name in load_file(tmp_path / "new names" / "model.safetensors"))
    prints = {vision_encoder_fingerprint(load_vision_encoder(tmp_path / name)) for name in ("ours", "model/vision_model", "new names")}
    assert prints == {vision_encoder_fingerprint(encoder)}
    assert vision_encoder_fingerprint(load_vision_encoder(TINY_CLIP)) == "3209d5e00bdb0d40", "sidecars hold it"


def test_a_fingerprint_is_the_same_in_releases_that_keep_the_prefix_in_memory():
    class Classic:
        """As CLIPVisionModel of transformers 4 is in memory."""

        config = make_vision_encoder().config

        def state_dict(self):
            return {f"vision_model.{name}": tensor for name, tensor in make_vision_encoder().state_dict().items()}

    assert vision_encoder_fingerprint(Classic()) == vision_encoder_fingerprint(make_vision_encoder())


def test_the_demos_vision_encoder_is_what_its_readme_says():
    encoder = load_vision_encoder(TINY_CLIP)
    assert sum(p.numel() for p in encoder.parameters()) == 1_965_696
    assert (TINY_CLIP / "model.safetensors").stat().st_size < 8 * 2**20
    assert {tensor.dtype for tensor in load_file(TINY_CLIP / "model.safetensors").values()} == {torch.float16}
    assert encode_images(encoder, torch.zeros(1, 3, 224, 224)).shape == (1, 196, 192)
