"""A stock LLaVA: what transformers makes of the folder in a process without this repository, and the way back."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

import eval_vlm
from chat.web.models import find_models
from chat.web.settings import parse_flags
from model import convert
from model.conversation import Renderer, parse_turns
from model.errors import UsageError
from model.hub import llava
from model.hub.processing import flatten_message, pad_batch
from model.load import Loaded, read_folder, read_native
from model.minimind3 import settings_for
from model.pixels import normalize, preprocess
from model.weights import fingerprints, read_sidecar, save_weights
from tests.conftest import REPOSITORY, make_data, make_model, make_vision_encoder
from tests.test_encoders import make_encoder, noise
from tests.test_minimind3 import further_tokens, standing_in

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAMILY3 = {**settings_for(32), "projector": "linear", "num_attention_heads": 4, "num_key_value_heads": 2, "image_token_id": 12}
MODELS = {
    "dense": {"image_tokens": 196},
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 256},
    "moe": {"use_moe": True, "n_shared_experts": 2, "tie_word_embeddings": False, "qk_norm": False},
    "moe_single": {"use_moe": True, "num_experts_per_tok": 1, "norm_top1_prob": True, "n_shared_experts": 0},
    "minimind3": FAMILY3,
    "minimind3_moe": {**FAMILY3, "use_moe": True},
    "minimind3_moe_pairs": {**FAMILY3, "use_moe": True, "num_experts_per_tok": 2, "norm_topk_prob": False},
}
TEXTS = {
    "text": ["hello"],
    "image first": ["<image>\nWhat is it?"],
    "image last": ["What is it?\n<image>"],
    "image alone": ["<image>"],
    "two images": ["<image>\n<image>\nWhich is red?"],
    "two without a gap": ["a<image><image>b"],
    "blanks and marks": ["Look at <image> !? It is <image>."],
    "several turns": ["<image>\nWhat?", "A cat.", "Sure?", "", "And now: <image>"],
    "newlines in answers": ["a", "\n\nb\n", "\nc\n\n", "\n", "d\n\n\ne"],
    "other letters": ["<image>\n這是什麼？🙂 ça", "貓 🐈", "a\tb  c"],
    "at signs": ["@<image>@ @@@@ " + "@" * 20],
    "numbers and code": ["  def f(x):\n    return x[0]*12345\n\n<image>\n\n", "```\n1\n```"],
}
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nWhat?"}]
IMAGES = {"a.png": noise(60, 40), "b.png": noise(48, 48), "c.png": noise(224, 224)}
PART = {name: {"type": "image", "path": name} for name in IMAGES}
WORDS = {"type": "text", "text": "Which?"}
CONVERSATIONS = {
    **{kind: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)] for kind, texts in TEXTS.items()},
    "a system turn": SYSTEM,
    "parts": [{"role": "user", "content": [PART["a.png"], WORDS]}],
    "parts, images between": [{"role": "user", "content": [WORDS, PART["a.png"], PART["b.png"], WORDS, WORDS]},
                              {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
                              {"role": "user", "content": [WORDS]}],
}  # fmt: skip
# Without this project's code: reads the folders named on the command line, and writes all that they give into the last one.
STRANGER = """
import json, sys, torch
from pathlib import Path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor, pipeline

*folders, repository, target = sys.argv[1:]
torch.set_num_threads(2)
conversations = json.loads(Path("conversations.json").read_text())
for folder in folders:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor and not any(info.values()), info
    size = processor.image_processor.crop_size["height"]
    results = {"class": type(model.language_model if hasattr(model, "language_model") else model.model.language_model).__name__}
    processor.tokenizer.padding_side = "left"

    def answer(inputs):
        with torch.no_grad():
            logits = model(**inputs).logits
        return {**inputs, "logits": logits, "answer": model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=-1)}

    images = [Image.open(name) for name in ("a.png", "b.png", "c.png")]
    texts = {}
    for kind, messages in conversations.items():
        texts[kind] = processor.apply_chat_template(messages, add_generation_prompt=True)
        if "parts" in kind:
            inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                   return_tensors="pt")
        else:
            shown = sum(message["content"].count("<image>") for message in messages if message["role"] == "user")
            inputs = processor(images=images[:shown] or None, text=texts[kind], return_tensors="pt")
        results[kind] = answer(inputs)
    rows = [texts[kind] for kind in ("two images", "image last", "text")]
    results["batch"] = answer(processor(images=[images[0], images[1], images[2]], text=rows, padding=True, return_tensors="pt"))
    ask = pipeline("image-text-to-text", model=folder, max_new_tokens=5)
    said = ask(text=[{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]}])
    results["pipeline"] = said[0]["generated_text"][-1]["content"]
    torch.save(results, f"{target}/{Path(folder).name}.pt")
files = [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]
ours = [file for file in files if file.startswith(repository) and "/.venv/" not in file]
assert not ours and repository not in sys.path, ours
"""


def family_tokenizer(tokenizer):
    """The 2026 family's, with the names of its special tokens."""
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    words = standing_in(further_tokens(tokenizer))
    words.add_special_tokens(names)
    return words


def build(kind: str, tokenizer):
    """A model of that kind with random norms and biases, everything exact in fp16, and its tokenizer."""
    settings = {"image_tokens": 16, "hidden_size": 32, "num_attention_heads": 8, **MODELS[kind]}
    encoder = make_vision_encoder()
    if settings["image_tokens"] == 16:
        encoder = CLIPVisionModel(CLIPVisionConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                                   patch_size=12, image_size=48, hidden_act="gelu"))  # fmt: skip
    if settings.get("qk_norm"):
        tokenizer = family_tokenizer(tokenizer)
        settings["vocab_size"] = len(tokenizer)
    model = make_model(encoder=encoder, **settings).eval()
    torch.manual_seed(1)
    for parameter in (*model.parameters(), *encoder.parameters()):
        parameter.data = (parameter + 0.1 * torch.randn_like(parameter) * (parameter.dim() == 1)).detach().half().float()
    return model, tokenizer


def export(folder: Path, loaded: Loaded, dtype: torch.dtype = torch.float16) -> None:
    with convert.whole_folder(folder) as inside:
        llava.write_llava(inside, loaded, dtype)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("llava")


@pytest.fixture(scope="module")
def originals(tokenizer) -> dict[str, Loaded]:
    """Before the export."""
    made = {kind: build(kind, tokenizer) for kind in MODELS}
    return {kind: Loaded(model, words, {"fingerprints": fingerprints(model, words), "training": {"epochs": 3}})
            for kind, (model, words) in made.items()}  # fmt: skip


@pytest.fixture(scope="module")
def folders(place, originals) -> dict[str, Path]:
    """As exported, in fp16."""
    for kind, loaded in originals.items():
        export(place / "folders" / kind, loaded)
    return {kind: place / "folders" / kind for kind in MODELS}


@pytest.fixture(scope="module")
def strange(place, folders, originals) -> dict[str, dict]:
    """What a process without this project's code got of fp32 folders of the same weights."""
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    for name, image in IMAGES.items():
        image.save(elsewhere / name)
    (elsewhere / "conversations.json").write_text(json.dumps(CONVERSATIONS), encoding="utf-8")
    (elsewhere / "stranger.py").write_text(STRANGER)
    for kind, loaded in originals.items():
        export(elsewhere / kind, loaded, torch.float32)
    done = subprocess.run([sys.executable, "-I", "stranger.py", *MODELS, str(REPOSITORY), str(elsewhere)], cwd=elsewhere, text=True,
                          capture_output=True, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "2"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: torch.load(elsewhere / f"{kind}.pt", weights_only=True) for kind in MODELS}


def ours(loaded: Loaded, messages: list):
    """Our renderer's prompt."""
    turns = parse_turns([flatten_message(message)[0] for message in messages])
    return Renderer(loaded.tokenizer, loaded.model.config.image_tokens).render_prompt(turns)


def pixels_of(loaded: Loaded, names: list[str]) -> torch.Tensor:
    settings = loaded.model.pixel_settings
    return normalize(torch.stack([preprocess(IMAGES[name], settings) for name in names]), settings)


def image_id(loaded: Loaded) -> int:
    return 12 if loaded.model.config.qk_norm else loaded.model.config.vocab_size


def as_theirs(rendered, loaded: Loaded) -> list[int]:
    ids, P = rendered.ids.tolist(), loaded.model.config.image_tokens
    for start in rendered.image_starts:
        ids[start : start + P] = [image_id(loaded)] * P
    return ids


def compare(loaded: Loaded, rows: list, given: dict, where: str) -> None:
    """ids, logits at every position, and 24 greedy tokens, from the pixels that were given. That each of these is the likeliest
    after those before it, one pass tells for all; the export rules out the image token."""
    config, model, T = loaded.model.config, loaded.model, given["input_ids"].shape[1]
    batch = pad_batch(rows, config.image_tokens, config.pad_token_id, "left", T)
    seen = batch["attention_mask"].bool()
    assert torch.equal(given["attention_mask"].bool(), seen), where
    for row, mask, ids in zip(rows, seen, given["input_ids"], strict=True):
        assert ids[mask].tolist() == as_theirs(row, loaded), where
    answer, positions = given["answer"][:, T:], batch["image_positions"]
    assert answer.shape[1] == 24 and not (answer == image_id(loaded)).any(), where
    images = {"pixel_values": given["pixel_values"], "image_positions": positions + positions // T * 24} if len(positions) else {}
    with torch.no_grad():
        ids, mask = torch.cat((batch["input_ids"], answer), 1), torch.cat((batch["attention_mask"], torch.ones_like(answer)), 1)
        logits = model(ids, mask, **images).logits
    assert (logits[:, :T] - given["logits"][..., : config.vocab_size])[seen].abs().max() < 1e-4 < logits[:, :T][seen].std(), where
    if config.qk_norm:
        logits[..., image_id(loaded)] = -torch.inf
    assert torch.equal(logits[:, T - 1 : -1].argmax(-1), answer), where


@pytest.mark.parametrize("kind", MODELS)
def test_a_stranger_gets_our_ids_logits_and_tokens(strange, originals, kind):
    loaded, results = originals[kind], strange[kind]
    text_model = {"dense": "LlamaModel", "yarn": "LlamaModel", "minimind3": "Qwen3Model"}.get(kind, "Qwen3MoeModel" if "3" in kind else
                                                                                               "GraniteMoeSharedModel")  # fmt: skip
    assert results["class"] == text_model
    for name, messages in CONVERSATIONS.items():
        compare(loaded, [ours(loaded, messages)], results[name], f"{kind}: {name}")
    rows = [ours(loaded, CONVERSATIONS[name]) for name in ("two images", "image last", "text")]
    compare(loaded, rows, results["batch"], f"{kind}: a batch")
    levels = pixels_of(loaded, [*IMAGES]) - results["batch"]["pixel_values"]
    assert levels.abs().max() * 255 * 0.28 < 2.01
    assert isinstance(results["pipeline"], str)


def test_rotary_positions_are_stretched(strange, originals):
    """The same weights without YaRN give other logits: the comparison above sees it."""
    loaded, results = originals["yarn"], strange["yarn"]["two images"]
    plain = make_model(image_tokens=16, hidden_size=32, num_attention_heads=8)
    plain.load_state_dict(loaded.model.state_dict())
    plain.attach_vision_encoder(loaded.model.vision_encoder)
    rendered = ours(loaded, CONVERSATIONS["two images"])
    batch = pad_batch([rendered], 16, 0, "left", len(rendered))
    with torch.no_grad():
        logits = plain.eval()(batch["input_ids"], pixel_values=results["pixel_values"], image_positions=batch["image_positions"]).logits
    assert (logits - results["logits"][..., :6400]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["dense", "minimind3"])
def test_the_image_token_is_never_generated(folders, originals, kind):
    generation = json.loads((folders[kind] / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [image_id(originals[kind])]
    embedding = load_file(folders[kind] / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert len(embedding) == originals[kind].model.config.vocab_size + (kind == "dense")
    if kind == "dense":  # where suppress_tokens is not read: argmax takes the first of equals, which ends nothing and is never learned
        assert torch.equal(embedding[6400], embedding[0])


@pytest.mark.parametrize("kind", MODELS)
def test_names_and_settings_for_other_readers(folders, originals, kind):
    """What transformers 4, vLLM and others look for; found by experiment."""
    folder, config = folders[kind], originals[kind].model.config
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert all(name.startswith(("language_model.", "vision_tower.vision_model.", "multi_modal_projector.")) for name in names)
    assert ("language_model.lm_head.weight" in names) == (not config.tie_word_embeddings)
    settings = json.loads((folder / "config.json").read_text())
    text = settings["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1e6 and text["architectures"][0].endswith("ForCausalLM")
    assert ("rope_scaling" in text) == (kind == "yarn") and settings["vision_feature_layer"] == -1
    words = json.loads((folder / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast" and words["model_input_names"] == ["input_ids", "attention_mask"]
    assert not any(path.suffix in (".py", ".bin") for path in folder.iterdir())
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())


@pytest.mark.parametrize("kind", MODELS)
def test_back_to_weights_bit_for_bit(place, originals, folders, kind):
    """Native weights, a folder of them, weights again; tokenizer and encoder are those of the training."""
    moe = "_moe" * originals[kind].model.config.use_moe
    first, back = place / f"{kind}_32{moe}.pth", place / "back" / f"{kind}_32{moe}.pth"
    back.parent.mkdir(exist_ok=True)
    save_weights(first, originals[kind].model, originals[kind].record)
    assert convert.main([str(folders[kind]), str(back)]) == 0
    before, after = (torch.load(path, weights_only=True) for path in (first, back))
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert read_sidecar(first) == read_sidecar(back)
    loaded = read_folder(folders[kind])
    assert fingerprints(loaded.model, loaded.tokenizer) == originals[kind].record["fingerprints"]
    encoder = originals[kind].model.vision_encoder.state_dict()
    assert all(torch.equal(encoder[name], tensor) for name, tensor in loaded.model.vision_encoder.state_dict().items())


def test_bfloat16_and_folder_to_folder(place, originals, folders, capsys):
    """Another number format, of weights that it rounds; an encoder that it rounds is no stranger."""
    assert convert.main([str(folders["dense"]), str(place / "bf16"), "--to", "llava", "--dtype", "bfloat16"]) == 0
    assert re.search(r"notice: \d+ of \d+ weights were rounded to bf16", capsys.readouterr().out)
    loaded = read_folder(place / "bf16")
    assert loaded.record == originals["dense"].record
    for name, tensor in originals["dense"].model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.bfloat16().float())
    native = place / "dense_32.pth"  # this project's own format in that number format, its encoder as it was
    save_weights(native, originals["dense"].model, originals["dense"].record)
    originals["dense"].model.vision_encoder.save_pretrained(place / "eye")
    flags = ["--vision_model_path", str(place / "eye"), "--dtype", "bfloat16"]
    assert convert.main([str(native), str(place / "own"), *flags]) == 0
    assert json.loads((place / "own" / "config.json").read_text())["dtype"] == "bfloat16"
    assert fingerprints(own := read_folder(place / "own").model, loaded.tokenizer) == originals["dense"].record["fingerprints"]
    assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in loaded.model.state_dict().items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """Native weights with data, encoder and a fp16 LLaVA of them, by the command."""
    place = tmp_path_factory.mktemp("trained")
    encoder = make_vision_encoder(width=32)
    encoder.save_pretrained(place / "encoder")
    model = make_model(encoder=encoder, hidden_size=32, num_attention_heads=8, vision_hidden_size=32)
    save_weights(place / "out" / "sft_vlm_32.pth", model, {"fingerprints": fingerprints(model, tokenizer),
                 "training": {"vision_model_path": str(place / "encoder"), "data_path": "d.jsonl"}, "progress": {"update": 1}})  # fmt: skip
    assert convert.main([str(place / "out" / "sft_vlm_32.pth"), str(place / "out" / "llava"), "--to", "llava"]) == 0
    return place, make_data(place / "data", 12)


def test_answers_scores_and_the_page_are_those_of_the_weights(trained, capsys):
    place, data = trained
    answers, pictures = [], place / "pictures"
    pictures.mkdir()
    for name, image in IMAGES.items():
        image.save(pictures / name)
    for flags in (["--hidden_size", "32"], ["--load_from", str(place / "out" / "llava")]):
        common = ["--save_dir", str(place / "out"), "--device", "cpu", "--max_new_tokens", "8", "--temperature", "0", *flags]
        assert eval_vlm.main([*common, "--mode", "folder", "--image_dir", str(pictures)]) == 0
        described = capsys.readouterr().out
        common += ["--score", str(data[0]), "--image_dir", str(data[1]), "--predictions", str(place / "said.jsonl")]
        assert eval_vlm.main(common) == 0
        capsys.readouterr()
        answers.append((described, (place / "said.jsonl").read_text()))
    assert answers[0] == answers[1] and len(answers[0][1].splitlines()) == 12
    (place / "out" / "foreign").mkdir()
    (place / "out" / "foreign" / "config.json").write_text('{"model_type": "llava"}')
    found = find_models(parse_flags(["--save_dir", str(place / "out"), "--load_from", str(place / "out" / "llava")]))
    assert [choice.name for choice in found] == ["llava", "sft_vlm_32", "llava"]


def refusals() -> dict[str, tuple[dict, str, str]]:
    """Settings, encoder and reason."""
    return {
        "siglip": ({"image_tokens": 16}, "siglip", "before the norm that ends this one (CLIP"),
        "dinov2": ({"image_tokens": 16}, "dinov2", "before the norm that ends this one (CLIP"),
        "mlp": ({"image_tokens": 16, "projector": "mlp"}, "clip", "its projector begins with a norm"),
        "pooled": ({"image_tokens": 4, "vision_hidden_size": 96}, "clip", "it pools 16 patches in 4 tokens"),
        "tiles": ({"image_tokens": 16, "tiles": 4}, "clip", "in tiles"),
        "one expert": ({"image_tokens": 16, "use_moe": True, "num_experts_per_tok": 1}, "clip", "do not add up to 1"),
        "unnormed experts": ({"image_tokens": 16, "use_moe": True, "norm_topk_prob": False}, "clip", "do not add up to 1"),
        "shared": ({**FAMILY3, "image_tokens": 16, "use_moe": True, "n_shared_experts": 1}, "clip", "Qwen3Moe has no shared"),
        "blind": ({}, "none", "give one by --vision_model_path"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", refusals())
def test_what_no_llava_equals_is_refused(tmp_path, tokenizer, capsys, kind):
    settings, eye, reason = refusals()[kind]
    words = family_tokenizer(tokenizer) if settings.get("qk_norm") else tokenizer
    model = make_model(**{"vocab_size": len(words), **settings})
    flags = ["none"] if eye == "none" else [str(make_encoder(tmp_path / "eye", eye))]
    moe = "_moe" * model.config.use_moe
    words.save_pretrained(tmp_path / "words")
    save_weights(tmp_path / f"a_32{moe}.pth", model, {"training": {}})
    command = [str(tmp_path / f"a_32{moe}.pth"), str(tmp_path / "x"), "--to", "llava", "--vision_model_path", *flags]
    assert convert.main([*command, "--tokenizer_path", str(tmp_path / "words")]) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error
    assert not [path.name for path in tmp_path.iterdir() if "x" in path.name and path.name != "words"]


def test_whole_or_not_at_all(tmp_path, originals, folders, monkeypatch, capsys):
    assert convert.main([str(folders["dense"]), str(folders["moe"]), "--to", "llava"]) == 2
    assert "exists already" in capsys.readouterr().err
    monkeypatch.setattr(llava, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    assert convert.main([str(folders["dense"]), str(tmp_path / "new"), "--to", "llava"]) == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.undo()
    big, words = build("dense", originals["dense"].tokenizer)
    big.vision_encoder.state_dict()["pre_layrnorm.bias"][0] = 1e6  # beyond fp16
    with pytest.raises(FloatingPointError, match="beyond fp16's range"):
        export(tmp_path / "new", Loaded(big, words, {}))
    assert not list(tmp_path.iterdir())
    export(tmp_path / "new", Loaded(big, words, {}), torch.bfloat16)


@pytest.mark.parametrize(("arguments", "text"), [
    (["{folder}", "{new}"], "one of them is a weight file"), (["{folder}", "{new}", "--to", "minimind-v"], "one of them is a weight file"),
    (["{folder}", "{new}_32.pth", "--to", "llava"], "--to and --dtype are for folders"),
    (["{folder}", "{new}_32.pth", "--dtype", "float32"], "--to and --dtype are for folders"),
])  # fmt: skip
def test_targets_that_make_no_sense(tmp_path, folders, capsys, arguments, text):
    assert convert.main([word.format(folder=folders["dense"], new=tmp_path / "new") for word in arguments]) == 2
    assert text in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_foreign_or_damaged_llava_gets_one_clear_error(folders, tmp_path):
    def tensors(edit):
        def change(folder: Path) -> None:
            state = load_file(folder / "model.safetensors")
            edit(state)
            save_file(state, folder / "model.safetensors")
        return change

    for text, change in {
        "somebody else's LLaVA": lambda folder: (folder / "sidecar.json").unlink(),
        "is no longer the identity": tensors(lambda state: state["multi_modal_projector.linear_2.bias"].add_(1)),
        "no longer what was exported: KeyError": tensors(lambda state: state.pop("multi_modal_projector.linear_1.bias")),
        "no longer what was exported: RuntimeError": tensors(lambda state: state.pop("vision_tower.vision_model.pre_layrnorm.bias")),
        "1 missing (first: model.layers.1.mlp.up_proj.weight)": tensors(
            lambda state: state.pop("language_model.model.layers.1.mlp.up_proj.weight")),
        "not finite": tensors(lambda state: state["language_model.model.norm.weight"].fill_(np.inf)),
        "is no readable weight file": lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
        "another tokenizer": lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace('"use_regex": true', '"use_regex": false')),
    }.items():  # fmt: skip
        folder = shutil.copytree(folders["dense"], tmp_path / "copy", dirs_exist_ok=True)
        change(folder)
        with pytest.raises(UsageError) as caught:
            read_folder(folder)
        assert text in str(caught.value), (text, str(caught.value))


def test_weights_without_a_sidecar_keep_their_tokenizers_mark(tmp_path, trained, tokenizer):
    """As published: the way through a LLaVA does not make the tokenizer a guess."""
    native = tmp_path / "b_32.pth"
    native.write_bytes((trained[0] / "out" / "sft_vlm_32.pth").read_bytes())
    loaded = read_native(native, REPOSITORY / "model", trained[0] / "encoder")
    assert loaded.record == {}
    export(tmp_path / "llava", loaded)
    assert read_folder(tmp_path / "llava").record["fingerprints"] == fingerprints(loaded.model, tokenizer)
