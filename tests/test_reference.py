"""Weights published for the original give the same results here: its recorded figures, within 1e-5."""

import json
import math

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from model.layers import rope_frequencies, rope_tables
from model.model_minimind import MiniMindConfig
from model.model_vlm import MiniMindVLM, VLMConfig
from model.moe import MoEGate
from model.vision import encode_images
from tests.conftest import FIXTURES

CASES = ["one_image", "two_rows_one_image", "two_rows_two_images", "text_only"]


def part(reference: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in reference.items() if key.startswith(prefix)}


def load_model(reference: dict, kind: str, vision_encoder: CLIPVisionModel | None = None) -> MiniMindVLM:
    model = MiniMindVLM(VLMConfig(**reference["configs"][kind], vision_hidden_size=48), vision_encoder)
    weights = part(reference, f"{kind}/weights/")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def vision_encoder(reference) -> CLIPVisionModel:
    vision_encoder = CLIPVisionModel(CLIPVisionConfig(**reference["configs"]["vision_encoder"]))
    vision_encoder.load_state_dict(part(reference, "dense/vision_encoder/"))
    return vision_encoder.eval()


def inputs(reference: dict, kind: str, case: str) -> tuple[dict, dict]:
    """The case's tensors, and ids with one token more and labels that say the same as targets and loss mask."""
    tensors = part(reference, f"{kind}/{case}/")
    ids = torch.cat((tensors["input_ids"], tensors["last_target"][:, None]), 1).long()
    labels = ids.clone()
    labels[:, 0] = -100
    labels[:, 1:][tensors["loss_mask"] == 0] = -100
    features = tensors.get("vision_features")
    images = {} if features is None else {"image_features": features.flatten(0, 1)}
    return tensors, {"input_ids": ids, "labels": labels, **images}


@pytest.mark.parametrize("case", CASES)
def test_dense_logits_loss_and_gradients(reference, case):
    model = load_model(reference, "dense").train()
    tensors, given = inputs(reference, "dense", case)
    images = {name: given[name] for name in given if name == "image_features"}
    logits = model(tensors["input_ids"].long(), logits_to_keep=8, **images).logits
    assert (logits - tensors["logits"]).abs().max() < 1e-5
    loss = model(**given).loss
    assert loss.item() == pytest.approx(tensors["loss"].item(), rel=1e-5)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = part(tensors, "grad_norm/")
    assert set(norms) - set(gradients) <= {"lm_head.weight"} and len(norms) > 15 * (case == "one_image")
    for name, norm in norms.items():
        if name in gradients:
            assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=1e-5, abs=1e-9), name
    for name, recorded in part(tensors, "grad/").items():
        assert (gradients[name] - recorded).abs().max() < 1e-5 * recorded.abs().max()


def test_images_give_the_recorded_features_and_logits(reference, vision_encoder):
    tensors, given = inputs(reference, "dense", "one_image")
    pixels = tensors["pixel_values"].flatten(0, 1).float() / 8
    assert (encode_images(vision_encoder, pixels) - given["image_features"]).abs().max() < 1e-5
    model = load_model(reference, "dense", vision_encoder).eval()
    logits = model(tensors["input_ids"].long(), pixel_values=pixels, logits_to_keep=8).logits
    assert (logits - tensors["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["one_image", "text_only"])
def test_moe_logits_and_loss(reference, case):
    model = load_model(reference, "moe_eval").eval()
    tensors, given = inputs(reference, "moe_eval", case)
    images = {name: given[name] for name in given if name == "image_features"}
    logits = model(tensors["input_ids"].long(), logits_to_keep=8, **images).logits
    assert (logits - tensors["logits"]).abs().max() < 1e-5
    assert model(**given).loss.item() == pytest.approx(tensors["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("formula", ["seq_aux", "token_aux"])
def test_router(reference, formula):
    recorded = part(reference, f"moe_gate/{formula}/")
    gate = MoEGate(VLMConfig(**reference["configs"]["moe_eval"], seq_aux=formula == "seq_aux")).train()
    gate.weight.data = recorded["gate_weight"]
    experts, weights, aux_loss = gate(recorded["hidden_states"])
    assert torch.equal(experts, recorded["topk_idx"].long())
    assert (weights - recorded["topk_weight"]).abs().max() < 1e-6
    assert aux_loss.item() == pytest.approx(recorded["aux_loss"].item(), rel=1e-5)


def test_rope_tables(reference):
    cos, sin = rope_tables(MiniMindConfig(), torch.arange(0, 4096, 37)[::3])
    assert (cos - reference["rope/plain/cos"]).abs().max() < 1e-6
    assert (sin - reference["rope/plain/sin"]).abs().max() < 1e-6


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_yarn_slows_slow_channels_alone(factor):
    """Pairs that turn more than 32 times in the original context stay, those that turn less than once are stretched."""
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 2048}
    frequencies, scale = rope_frequencies(MiniMindConfig(rope_scaling=yarn))
    plain, one = rope_frequencies(MiniMindConfig())
    turns = plain * 2048 / (2 * math.pi)
    assert one == 1.0 and scale == pytest.approx(0.1 * math.log(factor) + 1)
    assert torch.allclose(frequencies[turns > 40], plain[turns > 40]) and (turns > 40).any()
    assert torch.allclose(frequencies[turns < 0.5], plain[turns < 0.5] / factor) and (turns < 0.5).any()
    assert (frequencies <= plain * 1.000001).all() and (frequencies >= plain / factor * 0.999999).all()


@pytest.mark.parametrize(
    ("name", "config", "parameters"),
    [("512x8", {}, 26_223_616), ("512x8_moe", {"use_moe": True}, 95_446_016),
     ("768x16", {"hidden_size": 768, "num_hidden_layers": 16}, 104_621_568)],
)  # fmt: skip
def test_weight_names_and_shapes(name, config, parameters):
    manifest = json.loads((FIXTURES / "state_dict_manifest.json").read_text())[name]
    with torch.device("meta"):
        model = MiniMindVLM(VLMConfig(**config))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == manifest
    assert model.num_parameters() == parameters
