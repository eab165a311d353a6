"""The family that is published since 2026: its recorded figures, names and layout of conversations."""

import io
import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

import eval_vlm
import model.hub  # noqa: F401  (teaches transformers the family)
from model.conversation import IMAGE_PAD, Renderer, Turn
from model.convert import main as convert
from model.inference.generation import Prompt, Sampling, generate_batch
from model.inference.packed import PackedDecoder
from model.load import read_folder, read_native, settings_of
from model.minimind3 import settings_for
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.pixels import CLIP
from model.weights import half_weights, load_vision_encoder, read_sidecar
from tests.conftest import REPOSITORY, load_reference, make_data
from tests.test_training import run_training

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


def further_tokens(tokenizer):
    """This project's own tokenizer with the family's further tokens."""
    tokenizer = type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_PAD]})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


@pytest.fixture
def family_tokenizer(tokenizer):
    return further_tokens(tokenizer)


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


def standing_in(family_tokenizer):
    """The same, <|image_pad|> being number 12 as in the published one."""
    content = json.loads(family_tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    [entry] = (entry for entry in content["added_tokens"] if entry["content"] == IMAGE_PAD)
    [displaced] = (token for token, number in vocabulary.items() if number == 12)
    vocabulary[displaced], vocabulary[IMAGE_PAD], entry["id"] = entry["id"], 12, 12
    content["added_tokens"].sort(key=lambda entry: entry["id"])
    backend = type(family_tokenizer.backend_tokenizer).from_str(json.dumps(content))
    return type(family_tokenizer)(tokenizer_object=backend, pad_token=family_tokenizer.pad_token, eos_token=family_tokenizer.eos_token)


@pytest.fixture
def published_tokenizer(family_tokenizer):
    return standing_in(family_tokenizer)


def save_eye(folder: Path, **sizes) -> Path:
    """A vision encoder of the published geometry as it is downloaded: 64 patches of 256 pixels, no class token."""
    encoder = SiglipVisionModel(SiglipVisionConfig(image_size=256, patch_size=32, **sizes))
    encoder.save_pretrained(folder)
    size, half = {"height": 256, "width": 256}, [0.5] * 3
    SiglipImageProcessorPil(size=size, resample=2, image_mean=half, image_std=half).save_pretrained(folder)
    return folder


@pytest.fixture
def eye(recorded, tmp_path) -> Path:
    """The recorded vision encoder."""
    sizes = recorded["configs"]["vision_encoder"]
    folder = save_eye(tmp_path / "siglip2", **{name: value for name, value in sizes.items() if name not in ("image_size", "patch_size")})
    save_file(part(recorded, "dense/vision_encoder/"), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_encoders_features_and_the_answer_to_pixels(recorded, eye):
    model = load_model(recorded, "dense")
    model.attach_vision_encoder(load_vision_encoder(eye))
    tensors, given = inputs(recorded, "dense", "one_image")
    pixels = tensors["pixel_values"].flatten(0, 1).float() / 8
    assert (model.encode_images(pixels) - given["image_features"]).abs().max() < 1e-5
    with torch.no_grad():
        output = model(given["input_ids"], labels=given["labels"], pixel_values=pixels)
    assert (output.logits[:, -8:] - tensors["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("use_moe", [0, 1])
def test_downloads_train_answer_are_scored_and_exported(eye, published_tokenizer, tmp_path, capsys, use_moe):
    """A language model without a sidecar, its tokenizer, the encoder and parquet with dictionaries, as they are published."""
    (out := tmp_path / "out").mkdir()
    settings = {**settings_for(64), "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": len(published_tokenizer), "use_moe": bool(use_moe)}
    torch.save(half_weights(MiniMindForCausalLM(MiniMindConfig(**settings))), out / f"llm_64{'_moe' * use_moe}.pth")
    published_tokenizer.save_pretrained(out)
    Image.new("RGB", (90, 40), "red").save(image := io.BytesIO(), "PNG")
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A red square."}]
    columns = {"conversations": arrow.array([json.dumps(turns)] * 8).dictionary_encode(),
               "image_bytes": arrow.array([image.getvalue()] * 8).dictionary_encode()}  # fmt: skip
    parquet.write_table(arrow.table(columns), data := tmp_path / "sft_i2t.parquet")
    flags = {"hidden_size": 64, "use_moe": use_moe, "cache_features": 1}
    pretrain = {"script": "train_pretrain_vlm.py", "from_weight": "llm", "freeze_llm": 1}
    said = run_training((data, tmp_path), eye, tmp_path, save_weight="pretrain_vlm", **pretrain, **flags)
    assert said.returncode == 0, said.stderr
    assert "mlp" in said.stderr and "randomly initialized" in said.stderr
    name = f"pretrain_vlm_64{'_moe' * use_moe}"
    made = read_sidecar(out / f"{name}.pth")["training"]
    assert (made["family"], made["projector"], made["image_tokens"], made["tokenizer_path"]) == ("minimind3", "mlp", 64, str(out))
    said = run_training((data, tmp_path), eye, tmp_path, from_weight="pretrain_vlm", **flags)
    assert said.returncode == 0 and "64 filled" not in said.stderr, said.stderr

    path = out / f"sft_vlm_64{'_moe' * use_moe}.pth"
    path.with_suffix(".json").unlink()  # as published weights come, whose names and shapes tell what they are
    ask = ["--save_dir", str(out), "--weight", "sft_vlm", "--hidden_size", "64", "--device", "cpu", "--vision_model_path", str(eye)]
    predictions = tmp_path / "predictions.jsonl"
    assert eval_vlm.main([*ask, "--score", str(data), "--predictions", str(predictions), "--max_new_tokens", "4"]) == 0
    assert len(predictions.read_text().splitlines()) == 8
    assert convert([str(path), str(tmp_path / "folder"), "--vision_model_path", str(eye)]) == 0
    folder, native = read_folder(tmp_path / "folder").model, read_native(path, None, eye).model
    assert folder.config.qk_norm and folder.pixel_settings == native.pixel_settings != CLIP
    assert all(torch.equal(value, native.state_dict()[key]) for key, value in folder.state_dict().items())


def test_a_tokenizer_of_the_other_family_is_refused(eye, recorded, tmp_path):
    (out := tmp_path / "out").mkdir()
    torch.save(half_weights(MiniMindForCausalLM(MiniMindConfig(**settings_for(64), num_hidden_layers=2, hidden_size=64))), out / "llm_64.pth")
    data = make_data(tmp_path, 4)
    said = run_training(data, eye, tmp_path, from_weight="llm", hidden_size=64, tokenizer_path=REPOSITORY / "model")
    assert said.returncode == 2 and "token for images is number 12" in said.stderr and "--tokenizer_path" in said.stderr


def test_a_new_run_takes_the_family_that_is_asked_for(eye, tmp_path):
    data = make_data(tmp_path, 4)
    run_training(data, eye, tmp_path, hidden_size=64, family="minimind3")
    model = read_native(tmp_path / "out" / "sft_vlm_64.pth").model
    assert vars(model.config).items() >= settings_for(64).items()
    said = run_training(data, eye, tmp_path, hidden_size=64, family="minimind2", from_weight="sft_vlm", save_weight="more")
    assert said.returncode == 2 and "--family" in said.stderr, "its weights are of the other"
