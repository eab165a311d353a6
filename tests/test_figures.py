"""The README's pictures: what they show is the model's and the sample's own, and no word is cut or covered."""

import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.vlm_dataset import parse_sample
from docs.figures import attention, canvas, loss, sample
from docs.figures.__main__ import main
from docs.figures.structure import at_work, build, count
from model.conversation import Renderer
from model.inference.assistant import Assistant
from tests.conftest import REPOSITORY, make_model, make_vision_encoder

CAT = REPOSITORY / "dataset" / "eval_images" / "chelsea.jpg"


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are saved meanwhile, each with its renderer and its boxes as (words, outline)."""
    saved, boxes, plain_save, plain_box = [], [], canvas.save_figure, canvas.Canvas.box

    def save(figure, path):
        saved.append((figure, figure.canvas.get_renderer(), list(boxes)))
        plain_save(figure, path)

    def box(self, *arguments, **options):
        plain_box(self, *arguments, **options)
        boxes.append((self.axes.texts[-1], self.axes.patches[-1]))

    monkeypatch.setattr(canvas, "save_figure", save)
    monkeypatch.setattr(canvas.Canvas, "box", box)
    return saved


def assert_legible(figure, renderer, boxes) -> None:
    """All words lie on the sheet, inside their boxes, and on no other words."""
    places = [(text.get_text(), text.get_window_extent(renderer)) for axis in figure.axes for text in axis.texts if text.get_text()]
    assert len(places) > 10
    for number, (words, place) in enumerate(places):
        assert figure.bbox.x0 <= place.x0 and place.x1 <= figure.bbox.x1 and figure.bbox.y0 <= place.y0 and place.y1 <= figure.bbox.y1, words
        for other, other_place in places[:number]:
            assert not place.overlaps(other_place), (words, other)
    for text, outline in boxes:
        inner, outer = text.get_window_extent(renderer), outline.get_window_extent(renderer)
        assert not text.get_text() or (outer.x0 <= inner.x0 and inner.x1 <= outer.x1), text.get_text()


@pytest.mark.parametrize("size", [(512, 8), (768, 16)])
def test_the_structure_is_that_of_the_model(figures, size, tmp_path):
    assert main(["structure", "--hidden_size", str(size[0]), "--num_hidden_layers", str(size[1]), "--out", str(tmp_path / "s.png")]) == 0
    ((figure, renderer, boxes),) = figures
    assert_legible(figure, renderer, boxes)
    with torch.device("meta"):
        dense = build(*size)
    words = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert f"{count(dense) / 1e6:.1f}M in all" in words
    rows, columns = dense.model.layers[0].self_attn.k_proj.weight.shape
    assert f"keys\n{columns} → {rows}\n" in words
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.mode == "RGB" and 1700 < picture.width < 1900 and np.asarray(picture).std() > 20


def test_experts_at_work_are_those_the_router_takes():
    model = make_model(use_moe=True)
    model(torch.tensor([[7]])).logits.sum().backward()
    # One token's gradient reaches what took part; an expert that got no token has a gradient of zeros.
    used = [parameter for name, parameter in model.named_parameters() if ".experts." in name and parameter.grad.abs().sum() > 0]
    others = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." not in name)
    assert at_work(model) == others + sum(parameter.numel() for parameter in used) < count(model)
    assert at_work(make_model()) == count(make_model())


def test_the_way_of_a_sample_is_the_one_it_takes(figures, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "build", lambda width, layers: make_model(tower=make_vision_encoder(), hidden_size=width, num_hidden_layers=layers))
    assert main(["sample", "--hidden_size", "32", "--num_hidden_layers", "2", "--out", str(tmp_path / "s.png")]) == 0
    ((figure, renderer, boxes),) = figures
    assert_legible(figure, renderer, boxes)
    row = {"conversations": [{"role": "user", "content": sample.QUESTION}, {"role": "assistant", "content": sample.ANSWER}], "image": "x.jpg"}
    rendered = Renderer(tokenizer).render(parse_sample(row))
    learned, start = int((rendered.labels != -100).sum()), rendered.image_starts[0]
    words = [text.get_text() for text in figure.axes[0].texts]
    for expected in (f"Rendered: {len(rendered)} tokens, {learned} of them with a label to learn", f"positions {start} to {start + 195}"):
        assert expected in words
    assert any(f"logits {learned} × 6,400" in word for word in words) and any(f"1 × {len(rendered)} × 32" in word for word in words)
    assert sum(word.startswith("after ") for word in words) == learned
    files = [word for word in words if word.endswith(".py")]
    assert len(files) == 6 and all((REPOSITORY / file).is_file() for file in files)


def test_loss_curves_are_those_of_the_files(tmp_path, capsys):
    lines = [{"update": 1, "loss": 8.5}, {"update": 50, "loss": 0.5}, {"update": 50, "eval_loss": 0.7, "samples": ["\u2028"]}]
    file = tmp_path / "run_32.metrics.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + '{"update": 60, "lo', encoding="utf-8")
    assert loss.read_curves(file) == {"loss": [(1, 8.5), (50, 0.5)], "eval_loss": [(50, 0.7)]}
    assert main(["loss", str(file), str(file), "--out", str(tmp_path / "new" / "loss.png")]) == 0
    assert Image.open(tmp_path / "new" / "loss.png").size[0] > 1500
    for content, message in (("", "holds no loss"), ('{"update": 1, "loss": "much"}\n', f"{file}:1: no json object"), ("[1]\n", f"{file}:1"), (None, "no metrics file")):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content, encoding="utf-8")
        assert main(["loss", str(file), "--out", str(tmp_path / "loss.png")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "loss.png").exists()


def test_attention_is_drawn_for_each_token(figures, tokenizer, tmp_path, monkeypatch):
    assistant = Assistant(make_model(tower=make_vision_encoder()), tokenizer)
    monkeypatch.setattr(Assistant, "generate", lambda *_: ["a red one, or so it seems"])
    attention.draw_attention(tmp_path / "a.png", assistant, [CAT, CAT], "What is this?")
    ((figure, *_),) = figures
    words = [text.get_text() for text in figure.axes[0].texts]
    shares = [float(word.split("%")[0]) / 100 for word in words if word.endswith("% on the picture")]
    assert words.count("red") == 2 and len(shares) == 2 * attention.TOKENS
    # A fresh model looks about everywhere alike.
    length = len(assistant.renderer.render(parse_sample({"conversations": [
        {"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "a red one, or so it seems"}], "image": "x"})))  # fmt: skip
    assert all(math.isclose(share, 196 / length, abs_tol=0.1) for share in shares)


def test_long_words_of_questions_and_answers_stay_in_their_places(figures, tokenizer, tmp_path, monkeypatch):
    assistant = Assistant(make_model(tower=make_vision_encoder()), tokenizer)
    answer = "the automatically corresponding administrators documentation\nand more"
    monkeypatch.setattr(Assistant, "generate", lambda *_: [answer])
    attention.draw_attention(tmp_path / "a.png", assistant, [CAT, CAT], "What is to be seen here, and where, and for how much: $5 or $6?")
    ((figure, renderer, boxes),) = figures
    assert_legible(figure, renderer, boxes)
    pictures = [image.get_window_extent(renderer) for image in figure.axes[0].get_images()]
    for text in figure.axes[0].texts:
        assert not any(text.get_window_extent(renderer).overlaps(picture) for picture in pictures), text.get_text()
    assert "corresponding" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("installed", [True, False])
def test_no_word_becomes_boxes(figures, tokenizer, tmp_path, monkeypatch, installed):
    """By whatever fonts there are; without any for it, a character is written as its code."""
    if not installed:
        usual = [font for font in canvas.font_manager.fontManager.ttflist if font.name.startswith(canvas.FONT)]
        monkeypatch.setattr(canvas.font_manager.fontManager, "ttflist", usual)
    canvas.font_of.cache_clear()
    assistant = Assistant(make_model(tower=make_vision_encoder()), tokenizer)
    monkeypatch.setattr(Assistant, "generate", lambda *_: ["一隻貓 \U0001F408"])
    run = tmp_path / "訓練_$1$_32.metrics.jsonl"
    run.write_text('{"update": 1, "loss": 8.5}\n{"update": 2, "loss": 8.0}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
        attention.draw_attention(tmp_path / "a.png", assistant, [CAT], "這是什麼？")
        loss.draw_loss(tmp_path / "b.png", [run])
    canvas.font_of.cache_clear()
    words = [text.get_text() for text in figures[0][0].axes[0].texts]
    if not installed:
        assert any(word.startswith(r"\u9019\u662f") for word in words)
    elif canvas.font_of("貓"):
        assert "這是什麼？" in words


@pytest.mark.parametrize("arguments, message", [
    (["structure", "--hidden_size", "500"], "--hidden_size 500: hidden_size 500 is not a multiple of 8 heads"),
    (["sample", "--num_hidden_layers", "0"], "--num_hidden_layers 0: at least 1"),
    (["structure", "--image", "nowhere.jpg"], "'nowhere.jpg' cannot be read"),
    (["attention", "--save_dir", "nowhere"], "no weights at nowhere/sft_vlm_512.pth"),
])  # fmt: skip
def test_mistakes_are_named(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "x.png")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name, message", [("noext", "ends in .png, .jpg or .webp"), ("", "a folder, a pipe or a device"), ("a.h5", "ends in .png"), ("pipe.png", "a folder, a pipe or a device"),
                                           ("file/a.png", "no file can be written there (File exists)")])  # fmt: skip
def test_the_place_of_a_picture_is_looked_at_first(name, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("docs.figures.__main__.draw", lambda args: pytest.fail("work before the look"))
    (tmp_path / "file").write_text("precious")
    os.mkfifo(tmp_path / "pipe.png")
    assert main(["structure", "--out", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out {tmp_path / name}: ") and message in said and said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe.png"]


def test_a_picture_takes_the_place_of_an_older_one(tmp_path):
    for _ in range(2):
        assert main(["structure", "--out", str(tmp_path / "new" / "a.JPG")]) == 0
        assert Image.open(tmp_path / "new" / "a.JPG").format == "JPEG" and os.listdir(tmp_path / "new") == ["a.JPG"]
