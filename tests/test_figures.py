"""Diagrams whose numbers are the model's, and plots of what runs and models left."""

import json
import math
import os
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.jsonl import parse_sample
from docs.figures import attention, loss
from docs.figures.__main__ import main
from model.conversation import Rendered, Renderer
from model.inference.assistant import Assistant
from model.model_vlm import MiniMindVLM, VLMConfig
from tests.conftest import REPOSITORY, make_model, make_vision_encoder

CAT = REPOSITORY / "dataset" / "eval_images" / "chelsea.jpg"
ROW = {"conversations": [{"role": "user", "content": "What is this?\n<image>"}, {"role": "assistant", "content": "A cat."}], "image": "chelsea.jpg"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def models() -> tuple[MiniMindVLM, MiniMindVLM]:
    """The published sizes around CLIP ViT-B/16, dense and as a mixture of experts, in shapes alone."""
    with torch.device("meta"):
        return tuple(MiniMindVLM(VLMConfig(use_moe=use_moe), CLIPVisionModel(CLIPVisionConfig(patch_size=16))) for use_moe in (False, True))


@pytest.fixture(scope="module")
def rendered(renderer) -> Rendered:
    """The sample that sample.svg shows."""
    return renderer.render(parse_sample(ROW))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def working(model: MiniMindVLM) -> int:
    """Parameters that take part in a token: without the experts that the router leaves out."""
    blocks = [block.mlp for block in model.model.layers]
    return count(model) - sum(count(mlp.experts[0]) * (len(mlp.experts) - model.config.num_experts_per_tok) for mlp in blocks)


@pytest.fixture(scope="module")
def numbers(models, rendered) -> dict[str, str]:
    """What the diagrams name by `data-is`, as they write it."""
    dense, moe = models
    config, vision, block, experts = dense.config, dense.vision_encoder.config, dense.model.layers[0], moe.model.layers[0].mlp
    (inner, D), (kv_width, _) = block.mlp.gate_proj.weight.shape, block.self_attn.k_proj.weight.shape
    sizes = {
        "image_size": vision.image_size, "side": math.isqrt(config.image_tokens), "patch_size": vision.patch_size, "P": config.image_tokens,
        "W": vision.hidden_size, "encoder_layers": vision.num_hidden_layers, "D": D, "V": dense.lm_head.weight.shape[0],
        "layers": len(dense.model.layers), "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "head_dim": config.head_dim,
        "group": config.num_attention_heads // config.num_key_value_heads, "kv_width": kv_width, "inner": inner, "experts": len(experts.experts),
        "chosen": config.num_experts_per_tok, "T": len(rendered), "S": int((rendered.labels != -100).sum()), "B": 1, "N": 1, "channels": 3,
        "first_position": rendered.image_starts[0], "last_position": rendered.image_starts[0] + config.image_tokens - 1,
    }  # fmt: skip
    parameters = {
        "encoder": count(dense.vision_encoder), "projector": count(dense.vision_proj), "embedding": count(dense.model.embed_tokens),
        "blocks": count(dense.model.layers), "attention": count(block.self_attn), "expert": count(block.mlp), "working": working(moe),
    } | {"": count(dense), "moe": count(moe)}  # fmt: skip
    words = {f"{name}_parameters".strip("_"): f"{number / 1e6:.{2 if number < 1e7 else 1}f}M" for name, number in parameters.items()}
    assert count(experts.experts[0]) == count(block.mlp)
    return {name: f"{size:,}" for name, size in sizes.items()} | words


@pytest.mark.parametrize("name", ["structure", "sample"])
def test_numbers_of_the_diagrams_are_the_models(name, numbers):
    texts = list(ET.parse(REPOSITORY / "docs" / "figures" / f"{name}.svg").iter(f"{SVG}text"))
    checked = 0
    for text in texts:
        shown = re.findall(r"\d+(?:,\d{3})*(?:\.\d+M)?", text.text)
        if names := text.get("data-is", "").split():
            assert shown == [numbers[each] for each in names], text.text
            checked += len(names)
        elif not {"id", "label"} & set(text.get("class", "").split()):  # of tokens: see the next test
            assert shown in ([], ["1"], ["2"], ["3"], ["4"]), f"{text.text!r} holds a number that nothing checks"  # names of experts
    assert checked > 15


def test_the_way_of_the_sample_is_the_one_it_takes(rendered, renderer):
    root = ET.parse(REPOSITORY / "docs" / "figures" / "sample.svg").getroot()
    words = {kind: [text.text for text in root.iter(f"{SVG}text") if kind in text.get("class", "").split()] for kind in ("id", "label", "cell", "special", "code", "file")}
    start, P = rendered.image_starts[0], renderer.image_tokens
    once = [number for number in range(len(rendered)) if not start < number < start + P]  # the image's placeholders as one
    assert words["id"] == [str(rendered.ids[number]) for number in once]
    assert words["label"] == ["–" if rendered.labels[number] == -100 else str(rendered.labels[number]) for number in once]
    assert json.loads("".join(words["code"])) == ROW
    texts = [renderer.tokenizer.decode([int(token)]).replace("\n", "↵").replace(" ", "·") for token in rendered.ids]
    shown = [text for text in words["cell"] + words["special"] if text not in words["id"] + words["label"]]
    assert sorted(shown) == sorted(f"{texts[number]} × {P}" if number == start else texts[number] for number in once)
    learned = [number for number in range(len(rendered)) if rendered.labels[number] != -100]
    boxes = [text.text for text in root.iter(f"{SVG}text") if text.text.startswith(("after ", "learn "))]
    assert boxes == [word for number in learned for word in (f"after {texts[number - 1]}", f"learn {texts[number]}")]
    assert len(set(words["file"])) == 6 and all((REPOSITORY / file).is_file() for file in words["file"])


def test_experts_at_work_are_those_the_router_takes():
    model = make_model(use_moe=True)
    model(torch.tensor([[7]])).logits.sum().backward()
    # One token's gradient reaches what took part; an expert that got no token has a gradient of zeros.
    used = [parameter for name, parameter in model.named_parameters() if ".experts." in name and parameter.grad.abs().sum() > 0]
    others = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." not in name)
    assert working(model) == others + sum(parameter.numel() for parameter in used) < count(model)


def test_loss_curves_are_those_of_the_files(tmp_path, capsys):
    lines = [{"update": 1, "loss": 8.5}, {"update": 50, "loss": 0.5}, {"update": 50, "eval_loss": 0.7, "samples": ["\u2028"]}]
    file = tmp_path / "run_32.metrics.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + '{"update": 60, "lo', encoding="utf-8")
    assert loss.read_curves(file) == {"loss": [(1, 8.5), (50, 0.5)], "eval_loss": [(50, 0.7)]}
    for _ in range(2):  # the second replaces the first
        assert main(["loss", str(file), str(file), "--out", str(tmp_path / "new" / "loss.png")]) == 0
    assert Image.open(tmp_path / "new" / "loss.png").size[0] > 1500
    for content, message in (("", "holds no loss"), ('{"update": 1, "loss": "much"}\n', f"{file}:1: no json object"), ("[1]\n", f"{file}:1"), (None, "no metrics file")):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content, encoding="utf-8")
        assert main(["loss", str(file), "--out", str(tmp_path / "loss.png")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "loss.png").exists()


def test_attention_is_drawn_for_each_token(tokenizer, tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(attention, "save", lambda figure, path: figures.append(figure))
    assistant = Assistant(make_model(0, make_vision_encoder()), tokenizer)
    answer = "a red one for $5, or so it seems"
    monkeypatch.setattr(Assistant, "generate", lambda *_: [answer])
    attention.draw_attention(tmp_path / "a.png", assistant, [CAT, CAT], "What is this?")
    titles = [axis.get_title().split("\n") for axis in figures[0].axes if axis.get_title()]
    assert [word for word, _ in titles].count("red") == 2 and len(titles) == 2 * attention.TOKENS
    # A randomly initialized model looks everywhere alike.
    row = {"conversations": [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": answer}], "image": "x"}
    length = len(Renderer(tokenizer).render(parse_sample(row)))
    assert all(math.isclose(float(fraction.split("%")[0]) / 100, 196 / length, abs_tol=0.1) for _, fraction in titles)


@pytest.mark.parametrize(("arguments", "message"), [
    (["attention", "--save_dir", "nowhere"], "no weights at nowhere/sft_vlm_512.pth"),
    (["loss", "--out", "noext"], "ends in .png, .jpg or .webp"),
    (["loss", "--out", "folder.png"], "a folder, a device or a dangling link"),
    (["loss", "--out", "file/a.png"], "no file can be written there"),
])  # fmt: skip
def test_mistakes_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder.png").mkdir()
    assert main([*arguments, *([] if "--out" in arguments else ["--out", "x.png"])]) == 2
    said = capsys.readouterr().err
    assert message in said and sorted(os.listdir(tmp_path)) == ["file", "folder.png"]
