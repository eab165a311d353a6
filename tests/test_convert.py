"""Weights that travel: folders for transformers and back, folders of the original project, the processor, LoRA."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
)

import eval_vlm
from model import convert
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.errors import UsageError
from model.hub.modeling import MiniMindVForConditionalGeneration
from model.hub.processing import MiniMindVProcessor
from model.inference.assistant import Assistant, load_assistant
from model.inference.generation import Sampling
from model.load import read_folder, read_native
from model.model_vlm import MiniMindVLM
from model.pixels import normalize, preprocess
from model.weights import fingerprints, load_vision_encoder, read_sidecar, save_weights
from tests.conftest import REPOSITORY, make_model, make_vision_encoder

P = 196
NORM = "model.norm.weight"
SIZES = {"hidden_size": 32, "num_attention_heads": 8, "vision_hidden_size": 24}
ANSWER = Sampling(max_new_tokens=5, temperature=0.0)


def plain(colour: str, size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.new("RGB", size, colour)


def save_native(path, model, tokenizer) -> dict:
    """Weights as training leaves them; returns what fp16 made of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, model, {"fingerprints": fingerprints(model, tokenizer), "training": {"epochs": 3}, "progress": {"update": 7}})
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def native(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("native") / "sft_vlm_32.pth"
    save_native(path, make_model(encoder=make_vision_encoder(), **SIZES), tokenizer)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, native, encoder_folder):
    target = tmp_path_factory.mktemp("folder") / "minimind-v"
    assert convert.main([str(native), str(target), "--vision_model_path", str(encoder_folder)]) == 0
    return target


@pytest.fixture(scope="module")
def processor(folder) -> MiniMindVProcessor:
    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("use_moe", [False, True])
def test_native_to_folder_and_back_is_bit_for_bit(tmp_path, tokenizer, encoder_folder, use_moe):
    path = tmp_path / "out" / f"sft_vlm_32{'_moe' * use_moe}.pth"
    before = save_native(path, make_model(encoder=make_vision_encoder(), use_moe=use_moe, **SIZES), tokenizer)
    flags = ["--vision_model_path", str(encoder_folder)]
    assert convert.main([str(path), str(tmp_path / "hf"), *flags]) == 0
    back = tmp_path / "back" / path.name
    assert convert.main([str(tmp_path / "hf"), str(back)]) == 0
    after = torch.load(back, weights_only=True)
    assert list(after) == list(before) and all(after[name].dtype == torch.float16 for name in after)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert read_sidecar(back) == read_sidecar(path)
    assert all(value.dtype == torch.float16 for value in load_file(tmp_path / "hf" / "model.safetensors").values())


def test_a_folder_has_all_that_transformers_looks_for(folder, tokenizer):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "sidecar.json",
            "chat_template.jinja", "processor_config.json", "preprocessor_config.json", "vision_model/model.safetensors"} <= names  # fmt: skip
    assert not any(name.endswith((".py", ".bin")) for name in names)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert AutoImageProcessor.from_pretrained(folder).size["shortest_edge"] == 224
    given, frozen = CLIPVisionModel.from_pretrained(folder / "vision_model").state_dict(), make_vision_encoder().state_dict()
    assert all(torch.equal(given[name], frozen[name]) for name in frozen)


def test_published_weights_without_sidecar_tell_their_sizes(tmp_path, tokenizer, encoder_folder):
    model = make_model(encoder=make_vision_encoder(), use_moe=True, n_routed_experts=3, num_hidden_layers=3, **SIZES)
    path = tmp_path / "sft_vlm_32_moe.pth"
    before = save_native(path, model, tokenizer)
    path.with_suffix(".json").unlink()
    loaded = read_native(path, REPOSITORY / "model", encoder_folder)
    config = loaded.model.config
    assert (config.num_hidden_layers, config.n_routed_experts, config.use_moe) == (3, 3, True)
    assert all(torch.equal(value.half(), before[name]) for name, value in loaded.model.state_dict().items())


def test_without_a_vision_encoder_the_folder_needs_one_given(tmp_path, native, encoder_folder):
    assert convert.main([str(native), str(tmp_path / "hf"), "--vision_model_path", "none"]) == 0
    assert not (tmp_path / "hf" / "vision_model").exists()
    assert read_folder(tmp_path / "hf", "", "none").model.vision_encoder is None
    load_assistant(str(tmp_path / "hf"), native, "cpu", str(encoder_folder), "")
    blind = load_assistant(str(tmp_path / "hf"), native, "cpu", "none", "")
    assert blind.generate([(Turn("user", "hello"),)], [], ANSWER)
    with pytest.raises(UsageError, match="without a vision encoder"):
        blind.generate([(Turn("user", IMAGE_PLACEHOLDER),)], [preprocess(plain("red"))], ANSWER)
    other = tmp_path / "encoder"
    make_vision_encoder(seed=5).save_pretrained(other)
    with pytest.raises(UsageError, match="another vision encoder"):
        read_folder(tmp_path / "hf", "", other)


def test_a_repository_in_the_hubs_cache_brings_its_vision_encoder(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--me--mine", "a" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert AutoModelForCausalLM.from_pretrained("me/mine", cache_dir=tmp_path).vision_encoder is not None
    assert AutoProcessor.from_pretrained("me/mine", cache_dir=tmp_path).image_tokens == P
    shutil.rmtree(repository / "snapshots" / commit / "vision_model")
    assert AutoModelForCausalLM.from_pretrained("me/mine", cache_dir=tmp_path).vision_encoder is None


def test_native_weights_and_their_folder_answer_alike(native, folder, encoder_folder):
    turns, pixels = (Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat?"),), [preprocess(plain("red"))]
    answers = [load_assistant(source, native, "cpu", str(encoder), str(REPOSITORY / "model")).generate([turns], pixels, ANSWER)
               for source, encoder in (("model", encoder_folder), (str(folder), "/nowhere"))]  # fmt: skip
    assert answers[0] == answers[1] and answers[0][0]


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_save_and_from_pretrained_keep_model_and_vision_encoder(tmp_path, auto, use_moe):
    model = make_model(encoder=make_vision_encoder(), kind=MiniMindVForConditionalGeneration, use_moe=use_moe, **SIZES).eval()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    ids = torch.cat([torch.full((1, P), 34), torch.arange(100, 110)[None]], 1)
    pixels = normalize(preprocess(plain("blue"))[None])
    with torch.no_grad():
        assert torch.equal(loaded(ids, pixel_values=pixels).logits, model(ids, pixel_values=pixels).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and loaded.dtype == torch.float32
    half = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == half.vision_encoder.dtype == torch.bfloat16
    answers = loaded.generate(ids, pixel_values=pixels, num_return_sequences=2, num_beams=2, max_new_tokens=4, do_sample=False)
    assert answers.shape == (2, ids.shape[1] + 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda state: state.update({NORM: torch.ones(5)}), r"1 of another shape \(first: model.norm.weight \(5,\), the model has \(32,\)"),
     (lambda state: state.pop(NORM), r"1 missing \(first: model.norm.weight"),
     (lambda state: state.update(extra=torch.ones(5)), r"1 unexpected \(first: extra")],
)  # fmt: skip
def test_from_pretrained_refuses_weights_that_do_not_fit(tmp_path, folder, change, message):
    shutil.copytree(folder, tmp_path / "hf")
    spoil_weights(change)(tmp_path / "hf")
    for more in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **more)


def test_vision_encoder_and_decoder_may_differ_in_number_format(folder):
    """As converted: the decoder in fp16, the encoder as it was trained."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.dtype, model.vision_encoder.dtype) == (torch.float16, torch.float32)
    ids = torch.cat([torch.full((1, P), 34), torch.arange(100, 110)[None]], 1)
    with torch.no_grad():
        assert torch.isfinite(model(ids, pixel_values=normalize(preprocess(plain("blue"))[None])).logits).all()


def publish(folder, model: MiniMindVLM, weights: str, **changes) -> None:
    """A folder as the original project publishes it: keys of its own, code beside the weights, no encoder."""
    config = model.config
    keys = {
        "architectures": ["MiniMindVLM"], "aux_loss_alpha": 0.1, "bos_token_id": 1, "dropout": 0.0, "eos_token_id": 2,
        "auto_map": {"AutoConfig": "model_vlm.VLMConfig", "AutoModelForCausalLM": "model_vlm.MiniMindVLM"},
        "flash_attn": True, "hidden_act": "silu", "hidden_size": config.hidden_size, "image_ids": [34] * P,
        "image_special_token": "@" * P, "inference_rope_scaling": False, "intermediate_size": config.intermediate_size,
        "max_position_embeddings": 32768, "model_type": "minimind-v", "n_routed_experts": 4, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "pad_token_id": None, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
        "scoring_func": "softmax", "seq_aux": True, "torch_dtype": "float16", "transformers_version": "4.57.1",
        "use_cache": True, "use_moe": config.use_moe, "vocab_size": 6400,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(keys | changes))
    (folder / "model_vlm.py").write_text(f"open({str(folder / 'executed')!r}, 'w').close()\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((REPOSITORY / "model" / name).read_bytes())
    state = {name: value.half() for name, value in model.state_dict().items()}
    state["vision_encoder.embeddings.class_embedding"] = torch.zeros(768)  # full checkpoints had such keys
    if weights == "pytorch_model.bin":
        torch.save(state, folder / weights)
    else:
        save_file({name: value.clone() for name, value in state.items()}, folder / weights, metadata={"format": "pt"})


@pytest.mark.parametrize(("weights", "use_moe"), [("pytorch_model.bin", False), ("model.safetensors", True)])
def test_folders_of_the_original_project_load_and_run_no_code(tmp_path, tokenizer, weights, use_moe, capsys):
    encoder = make_vision_encoder(width=768)
    encoder.save_pretrained(tmp_path / "clip")
    model = make_model(encoder=encoder, use_moe=use_moe, rope_theta=50000.0, hidden_size=32, num_attention_heads=8, vision_hidden_size=768)
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    publish(tmp_path / "original", model, weights)
    (tmp_path / "images").mkdir()
    plain("green").save(tmp_path / "images" / "a.png")
    flags = ["--load_from", str(tmp_path / "original"), "--vision_model_path", str(tmp_path / "clip"), "--device", "cpu"]
    assert eval_vlm.main([*flags, "--image_dir", str(tmp_path / "images"), "--mode", "folder", "--max_new_tokens", "3"]) == 0
    assert "[a.png]" in capsys.readouterr().out

    turns, pixels = (Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat?"),), [preprocess(plain("red"))]
    expected = Assistant(model, tokenizer).generate([turns], pixels, ANSWER)
    loaded = read_folder(tmp_path / "original", "", tmp_path / "clip")
    assert Assistant(loaded.model, loaded.tokenizer).generate([turns], pixels, ANSWER) == expected
    assert loaded.model.config.rope_parameters["rope_theta"] == 50000.0
    AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    AutoProcessor.from_pretrained(tmp_path / "original")

    native = tmp_path / f"mine_32{'_moe' * use_moe}.pth"
    assert convert.main([str(tmp_path / "original"), str(native)]) == 0
    again = read_native(native, REPOSITORY / "model", tmp_path / "clip")
    assert Assistant(again.model, again.tokenizer).generate([turns], pixels, ANSWER) == expected, "rope_theta came along in the sidecar"
    config = read_sidecar(native)["config"]
    assert not {"image_ids", "image_special_token", "flash_attn", "dropout", "auto_map", "architectures"} & set(config)
    assert not (tmp_path / "original" / "executed").exists()


class Attack:
    """What a pickle of it would do: create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, encoder_folder, capsys):
    publish(tmp_path / "hf", make_model(**SIZES), "pytorch_model.bin")
    torch.save({"model.embed_tokens.weight": Attack(tmp_path / "executed")}, tmp_path / "hf" / "pytorch_model.bin")
    assert eval_vlm.main(["--load_from", str(tmp_path / "hf"), "--vision_model_path", str(encoder_folder), "--mode", "folder"]) == 2
    error = capsys.readouterr().err
    assert "nothing was run" in error and error.count("\n") == 1
    with pytest.raises(Exception, match="weights_only"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "hf" / "executed").exists()


def spoil_config(**changes):
    def spoil(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def spoil_sidecar(**changes):
    """Of native weights; other settings go into its "config"."""
    def spoil(path):
        file = path.with_suffix(".json")
        content = json.loads(file.read_text()) if file.exists() else {"config": {}}
        fields = {key: changes[key] for key in ("fingerprints", "config") if key in changes}
        content["config"] |= {key: value for key, value in changes.items() if key not in fields}
        file.write_text(json.dumps(content | fields))

    return spoil


def flip_bits(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def spoil_tensor(path):
    state = torch.load(path)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    torch.save(state, path)


def spoil_weights(change):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


SPOILERS = {
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "no configuration of this model": lambda folder: (folder / "config.json").write_text("{"),
    "type 'llama'": spoil_config(model_type="llama"),
    "not a multiple of 7 heads": spoil_config(num_attention_heads=7),
    "different tokens": spoil_config(image_ids=[34, 35]),
    "no model.safetensors and no": lambda folder: (folder / "model.safetensors").unlink(),
    "no readable weight file": lambda folder: (folder / "model.safetensors").write_bytes(b"corrupt"),
    "1 missing (first: model.norm.weight)": spoil_weights(lambda state: state.pop(NORM)),
    "1 unexpected (first: extra)": spoil_weights(lambda state: state.update(extra=torch.ones(2))),
    "model.norm.weight (5,), the model has (32,)": spoil_weights(lambda state: state.update({NORM: torch.ones(5)})),
    "model.embed_tokens.weight (6400, 32), the model has (6300, 32)": spoil_config(vocab_size=6300),
    "another tokenizer": spoil_config(image_token_id=35),
    "fingerprint": lambda folder: (folder / "sidecar.json").write_text('{"fingerprints": {"tokenizer": "abc"}}'),
    "sidecar.json is broken": lambda folder: (folder / "sidecar.json").write_text("{"),
    "vision_model": lambda folder: (folder / "vision_model" / "model.safetensors").write_bytes(b"corrupt"),
    "not finite (1 of": spoil_weights(lambda state: state[NORM].fill_(torch.nan)),
    "num_hidden_layers '4': a whole number above 0": spoil_config(num_hidden_layers="4"),
    "cannot load the tokenizer in": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "the tokenizer in": lambda folder: (folder / "tokenizer.json").write_text(""),
}


@pytest.mark.parametrize("message", SPOILERS)
def test_a_spoilt_folder_ends_with_one_line_and_code_2(tmp_path, folder, message, capsys):
    shutil.copytree(folder, tmp_path / "hf")
    SPOILERS[message](tmp_path / "hf")
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "sft_vlm_32.pth")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda path: torch.save([1], path), "no state dict"), (lambda path: path.write_bytes(b"corrupt"), "no readable weight file"),
     (lambda path: torch.save({"model.norm.weight": torch.ones(3)}, path), "missing (first: model.embed_tokens.weight)"),
     (lambda path: torch.save({**torch.load(path), "extra": torch.ones(1)}, path), "1 unexpected (first: extra)"),
     (lambda path: path.with_suffix(".json").write_text("[]"), "is broken"),
     (lambda path: path.with_suffix(".json").write_text('{"config": {"num_attention_heads": 7}}'), "multiple of 7 heads"),
     (lambda path: path.write_bytes(b""), "no readable weight file"), (flip_bits, "is wrong. It is corrupt"),
     (spoil_tensor, "not finite (1 of"), (spoil_sidecar(fingerprints=None), "'fingerprints' should hold texts"),
     (spoil_sidecar(fingerprints={"tokenizer": 7}), "'fingerprints' should hold texts"), (spoil_sidecar(config=[1]), "no configuration"),
     *((spoil_sidecar(**{key: value}), f"{key} {value!r}: a whole number above 0") for key, value in (
         ("num_attention_heads", 0), ("num_key_value_heads", -2), ("num_hidden_layers", "4"), ("vocab_size", None), ("hidden_size", "x"))),
     (spoil_sidecar(rms_norm_eps="x"), "rms_norm_eps 'x': a number above 0"), (spoil_sidecar(rope_parameters="x"), "no configuration"),
     (spoil_sidecar(rope_parameters={"rope_theta": 0}), "rope_theta 0: a number above 0"),
     (spoil_sidecar(dtype="zzz"), "no configuration"),
     (lambda path: path.unlink(), "no weights at")],
)  # fmt: skip
@pytest.mark.parametrize("sidecar", [True, False])
def test_spoilt_native_weights_end_with_code_2_and_leave_nothing(tmp_path, native, encoder_folder, spoil, message, sidecar, capsys):
    path = tmp_path / native.name
    shutil.copy(native, path)
    if sidecar:
        shutil.copy(native.with_suffix(".json"), path.with_suffix(".json"))
    spoil(path)
    assert convert.main([str(path), str(tmp_path / "hf"), "--vision_model_path", str(encoder_folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error, error
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".hf*"))


WEIGHT, HEAD = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
PLACEHOLDERS = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 12345\n",
    "a web page": b"\n<!DOCTYPE html>\n<html><body>Access denied</body></html>",
}


def prefixed(prefix: str):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    "change",
    [prefixed("module."), prefixed("_orig_mod."), prefixed("module._orig_mod."), prefixed("_orig_mod.module."),
     lambda state: {name.replace(".1.", ".1._orig_mod."): tensor for name, tensor in state.items()},
     lambda state: {"model": state, "epoch": 3}, lambda state: {"state_dict": prefixed("module.")(state)},
     lambda state: state | {"vision_encoder.x": torch.ones(1, dtype=torch.int64)},
     lambda state: {name: tensor.double() for name, tensor in state.items()},
     lambda state: state | {WEIGHT: torch.nn.Parameter(state[WEIGHT].float())},
     lambda state: {name: tensor for name, tensor in state.items() if name != HEAD},
     lambda state: {name: tensor for name, tensor in state.items() if name != "model.embed_tokens.weight"}],
)  # fmt: skip
def test_weights_of_other_programs_are_read(tmp_path, native, encoder_folder, change):
    state, path = torch.load(native), tmp_path / "theirs_32.pth"
    changed = change(state)
    for write in (torch.save, lambda state, path: save_file({name: tensor.clone() for name, tensor in state.items()}, path)):
        if write is torch.save or all(isinstance(value, torch.Tensor) for value in changed.values()):
            write(changed, path)
            loaded = read_native(path, REPOSITORY / "model", encoder_folder).model.state_dict()
            assert all(torch.equal(loaded[name].half(), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("sidecar", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda tensor: tensor.to(torch.float8_e4m3fn), f"{WEIGHT} is of torch.float8_e4m3fn"), (lambda tensor: tensor.to(torch.int8), "torch.int8"),
     (lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8), "torch.qint8"), (lambda tensor: tensor > 0, "torch.bool"),
     (lambda tensor: tensor.float().to_sparse(), "torch.sparse_coo"), (lambda tensor: tensor.float().to_sparse_csr(), "torch.sparse_csr"),
     (lambda tensor: tensor.to(torch.complex64), "torch.complex64"), (lambda tensor: tensor.to("meta"), "on meta"),
     (lambda tensor: tensor[0, 0], f"{WEIGHT} ()"),
     (lambda tensor: tensor.double() * 1e300, "not finite"), (lambda tensor: tensor.tolist(), f"holds {WEIGHT}")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on what these kinds are
def test_weights_of_other_kinds_are_named_for_what_they_are(tmp_path, native, encoder_folder, change, message, sidecar, capsys):
    path = tmp_path / native.name
    if sidecar:
        shutil.copy(native.with_suffix(".json"), path.with_suffix(".json"))
    state = torch.load(native)
    torch.save(state | {WEIGHT: change(state[WEIGHT])}, path)
    assert convert.main([str(path), str(tmp_path / "hf"), "--vision_model_path", str(encoder_folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_folder_of_quantized_or_untied_weights_is_refused(tmp_path, folder, dtype):
    shutil.copytree(folder, tmp_path / "hf")
    spoil_weights(lambda state: state.update({WEIGHT: state[WEIGHT].to(dtype)}))(tmp_path / "hf")
    with pytest.raises(UsageError, match=f"{WEIGHT} is of {dtype}"):
        read_folder(tmp_path / "hf")
    shutil.copy(folder / "model.safetensors", tmp_path / "hf")
    spoil_weights(lambda state: state.update({HEAD: state["model.embed_tokens.weight"] + 1}))(tmp_path / "hf")
    with pytest.raises(UsageError, match=r"lm_head\.weight differ"):
        read_folder(tmp_path / "hf")


def test_a_training_state_serves_as_weights_and_untied_ones_do_not(tmp_path, native, encoder_folder):
    state, path = torch.load(native), tmp_path / "sft_vlm_32_resume.pth"
    torch.save({"version": 4, "model": state, "optimizer": {"state": {}}, "rng": [1]}, path)
    loaded = read_native(path, REPOSITORY / "model", encoder_folder).model.state_dict()
    assert all(torch.equal(loaded[name].half(), tensor) for name, tensor in state.items())
    torch.save(state | {HEAD: state[HEAD] + 1}, path)
    with pytest.raises(UsageError, match=r"lm_head\.weight differ"):
        read_native(path, REPOSITORY / "model", encoder_folder)


@pytest.mark.parametrize("kind", PLACEHOLDERS)
@pytest.mark.parametrize("name", ["sft_vlm_32.pth", "sft_vlm_32.json", "hf/config.json", "hf/model.safetensors", "hf/pytorch_model.bin", "hf/tokenizer.json",
                                  "hf/sidecar.json", "hf/vision_model/model.safetensors", "encoder/model.safetensors", "encoder/config.json",
                                  "encoder/pytorch_model.bin"])
def test_what_stands_for_a_file_that_was_not_fetched_is_named(tmp_path, native, folder, encoder_folder, name, kind):
    shutil.copytree(folder, tmp_path / "hf")
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    for file in (native, native.with_suffix(".json")):
        shutil.copy(file, tmp_path)
    if name.endswith(".bin"):
        (tmp_path / name).with_name("model.safetensors").unlink()
    (tmp_path / name).write_bytes(PLACEHOLDERS[kind])
    with pytest.raises(UsageError, match=f"^{tmp_path / name} is {kind}.*hf download") as caught:
        read_folder(tmp_path / "hf", None, tmp_path / "encoder") if name.startswith("hf") else read_native(
            tmp_path / native.name, None, tmp_path / "encoder")
    assert "weights_only" not in str(caught.value)


def test_placeholders_of_other_libraries_weights_do_no_harm(tmp_path, encoder_folder):
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    for name in ("tf_model.h5", "flax_model.msgpack", "pytorch_model.bin"):
        (tmp_path / "encoder" / name).write_bytes(PLACEHOLDERS["a git-lfs pointer"])
    assert load_vision_encoder(tmp_path / "encoder").config.hidden_size == 24


@pytest.mark.filterwarnings("ignore:.*[jJ]it")
def test_no_advice_to_load_unsafely_is_passed_on(tmp_path, native, encoder_folder, capsys):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "a_32.pth"))
    (tmp_path / "b_32.pth").write_bytes(b"GGUF" + bytes(60))
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").unlink()
    torch.save({"x": Attack(tmp_path / "executed")}, tmp_path / "encoder" / "pytorch_model.bin")
    for source, encoder in ((tmp_path / "a_32.pth", encoder_folder), (tmp_path / "b_32.pth", encoder_folder), (native, tmp_path / "encoder")):
        assert convert.main([str(source), str(tmp_path / "hf"), "--vision_model_path", str(encoder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "weights_only" not in error and "trust" not in error, error
    assert not (tmp_path / "executed").exists()


def test_nothing_is_overwritten_and_names_must_be_found_again(tmp_path, native, folder, encoder_folder, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for source, target, message in [
        (native, tmp_path / "full", "exists already"), (folder, native, "exists already"),
        (folder, tmp_path / "sft_vlm_64.pth", "NAME_32.pth"), (folder, tmp_path / "other", "one of them is a weight file"),
        (tmp_path / "none_32.pth", tmp_path / "hf", "no weights at"),
    ]:  # fmt: skip
        assert convert.main([str(source), str(target), "--vision_model_path", str(encoder_folder)]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_weights_beyond_fp16_are_refused_and_rounding_is_said(tmp_path, tokenizer, capsys):
    model = make_model(**SIZES)
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "a_32.pth")]) == 0
    assert "were rounded to fp16" in capsys.readouterr().out
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    model.save_pretrained(tmp_path / "hf")
    assert convert.main([str(tmp_path / "hf"), str(tmp_path / "b_32.pth")]) == 2
    assert "beyond fp16's range" in capsys.readouterr().err and not (tmp_path / "b_32.pth").exists()


def test_the_command(native, tmp_path, encoder_folder):
    done = subprocess.run([sys.executable, "-m", "model.convert", native, tmp_path / "hf", "--vision_model_path", encoder_folder],
                          cwd=REPOSITORY, text=True, capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "hf" / "config.json").is_file() and done.stderr == "", done.stderr
