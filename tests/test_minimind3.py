"""The family that is published since 2026: its recorded figures, names and layout of conversations."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import model.hub  # noqa: F401  (teaches transformers the family)
from model.conversation import IMAGE_PAD, Renderer, Turn
from model.inference.generation import Prompt, Sampling, generate_batch
from model.inference.packed import PackedDecoder
from model.load import settings_of
from model.minimind3 import settings_for
from model.model_vlm import MiniMindVLM, VLMConfig
from tests.conftest import load_reference

KINDS, CASES = ["dense", "moe"], ["one_image", "two_rows_one_image", "two_rows_two_images", "text_only"]


def part(reference: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): value for key, value in reference.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def recorded() -> dict:
    return load_reference("minimind3v")


def weights_of(recorded: dict, kind: str) -> dict:
    weights = part(recorded, f"{kind}/weights/")
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}


def load_model(recorded: dict, kind: str) -> MiniMindVLM:
    model = MiniMindVLM(VLMConfig.from_dict(recorded[f"published_{kind}"]))
    model.load_state_dict(weights_of(recorded, kind))
    return model.eval()


def inputs(recorded: dict, kind: str, case: str) -> tuple[dict, dict]:
    tensors = part(recorded, f"{kind}/{case}/")
    images = {"image_features": tensors["vision_features"].flatten(0, 1)} if "vision_features" in tensors else {}
    return tensors, {"input_ids": tensors["input_ids"].long(), "labels": tensors["labels"].long(), **images}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(recorded, kind, case):
    model, (tensors, given) = load_model(recorded, kind), inputs(recorded, kind, case)
    output = model(**given)
    assert (output.logits[:, -8:] - tensors["logits"]).abs().max() < 1e-5
    assert output.loss.item() == pytest.approx(tensors["loss"].item(), rel=1e-5)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norms = part(tensors, "grad_norm/")
    assert set(norms) - set(gradients) <= {"lm_head.weight"} and len(norms) > 30
    for name in norms.keys() & gradients.keys():
        norm = 0.0 if gradients[name] is None else gradients[name].norm().item()  # the projector's, without images
        assert norm == pytest.approx(norms[name].item(), rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("case", CASES)
def test_auxiliary_loss(recorded, case):
    model, (_, given) = load_model(recorded, "moe").train(), inputs(recorded, "moe", case)
    output, tensors = model(**given), part(recorded, f"moe/train/{case}/")
    assert output.loss.item() == pytest.approx(tensors["loss"].item(), rel=1e-5)
    assert output.aux_loss.item() == pytest.approx(tensors["aux_loss"].item(), rel=1e-4)


@pytest.mark.parametrize(("name", "moe"), [("768x8", False), ("768x8_moe", True)])
def test_names_and_shapes_tell_the_published_sizes(recorded, name, moe):
    manifest = recorded["manifest"][name]
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest.items()}
    with torch.device("meta"):
        model = MiniMindVLM(VLMConfig.from_dict(settings_of(state)))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == manifest
    assert vars(model.config).items() >= settings_for(768).items() and model.config.use_moe == moe


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_folder_answers(recorded, kind, tmp_path):
    """Through transformers, without a vision encoder, and by the packed decoder: the tokens of plain greedy choice."""
    (tmp_path / "config.json").write_text(json.dumps(recorded[f"published_{kind}"]))
    weights = {key: value.clone() for key, value in weights_of(recorded, kind).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    _, given = inputs(recorded, kind, "one_image")
    ids, features = given["input_ids"], given["image_features"]
    plain = ids
    with torch.no_grad():
        for _ in range(12):
            plain = torch.cat((plain, model(plain, image_features=features).logits[:, -1:].argmax(-1)), 1)
    answer = model.generate(ids, image_features=features, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert torch.equal(answer, plain)
    prompt = Prompt(ids[0].numpy(), (int((ids[0] == 12).nonzero()[0]),), (0,), 64)
    assert generate_batch(PackedDecoder(model), [prompt], features, Sampling(12, temperature=0), stop=-1) == [
        plain[0, ids.shape[1] :].tolist()
    ]


@pytest.mark.parametrize(("name", "value"), [("head_dim", 32), ("moe_intermediate_size", 128)])
def test_sizes_that_contradict_one_another_are_refused(recorded, name, value):
    with pytest.raises(ValueError, match=f"{name} {value}"):
        VLMConfig.from_dict(recorded["published_moe"] | {name: value})


@pytest.fixture
def family_tokenizer(tokenizer):
    """This project's own, with the family's further tokens."""
    tokenizer = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PAD]})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def test_conversations_have_the_familys_layout(family_tokenizer):
    """No system turn of its own, and a thought before every answer; text is text all the same."""
    turns = (Turn("user", "<image>\nWhat? <|im_end|> <|image_pad|>"), Turn("assistant", "A cat."), Turn("user", "Sure?"),
             Turn("assistant", "<think>\nHm.\n</think>\n\nYes."))  # fmt: skip
    renderer = Renderer(family_tokenizer, 4)
    rendered = renderer.render_turns(turns)
    shown = family_tokenizer.decode(rendered.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    question = f"<|im_start|>user\n{IMAGE_PAD * 4}\nWhat? <|im_end|> <|image_pad|><|im_end|>\n<|im_start|>assistant\n"
    assert shown == (f"{question}<think>\n\n</think>\n\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
                     "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n")  # fmt: skip
    ids = rendered.ids.tolist()
    assert [ids.count(renderer.image_token_id), ids.count(renderer.im_end)] == [4, 4] and rendered.image_starts[0] == 3
    learned = family_tokenizer.decode([i for i in rendered.labels if i >= 0], clean_up_tokenization_spaces=False)
    assert learned == "<think>\n\n</think>\n\nA cat.<|im_end|>\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n"
    prompt = renderer.render_prompt(turns[:1]).ids
    assert prompt.tolist() == ids[: len(prompt)] and family_tokenizer.decode(prompt).endswith("</think>\n\n")
    bare = Renderer(family_tokenizer, 4, empty_thoughts=False).render_turns(turns).ids
    assert family_tokenizer.decode(bare, clean_up_tokenization_spaces=False).count("<think>") == 1
