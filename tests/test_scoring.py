"""Marks against their definitions and the library's own figures; intervals; files that a stop leaves whole."""

import json
import math
import sys

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from chat import scoring
from chat.scoring import (
    Question,
    common_subsequence,
    kind_of,
    make_metrics,
    make_report,
    read_questions,
    rouge_l,
)
from dataset import convert
from dataset.images import open_images
from dataset.sources import open_samples
from model.conversation import Turn
from model.errors import SampleError, UsageError
from model.inference.assistant import Assistant
from tests.conftest import make_model, make_vision_encoder, write_jsonl

WORDS = ["the", "a", "cat", "dog", "sits", "on", "mat", "red", "big"]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def report_of(predictions: list[str], references: list[str], groups: list[str], metrics: dict, seed: int = 0) -> dict:
    questions = [Question((Turn("user", "?"),), (group,), reference, "other") for reference, group in zip(references, groups, strict=True)]
    return make_report(questions, predictions, metrics, seed)["total"]


def test_common_subsequences():
    for a, b, length in (("", "abc", 0), ("abcbdab", "bdcaba", 4), ("aaaa", "aa", 2), ("abc", "cba", 1), ("abc", "abc", 3)):
        assert common_subsequence(list(a), list(b)) == common_subsequence(list(b), list(a)) == length


def test_rouge_l():
    assert rouge_l("A cat.", "a cat") == 1 and rouge_l("", "a cat") == rouge_l("dog", "a cat") == 0
    assert rouge_l("the cat sits", "the big cat") == pytest.approx(2 * 2 / 6), "precision and recall 2 of 3"
    assert rouge_l("一隻黑貓", "一隻白貓。") == pytest.approx(2 * 3 / 8), "a character is a word"
    assert rouge_l("+", "+") == 1 and rouge_l("+", "-") == 0


@pytest.mark.parametrize("chinese", [False, True])
def test_bleu_and_chrf_are_those_of_sacrebleu(chinese):
    predictions, references = sentences(60), sentences(60, seed=1)
    if chinese:
        predictions, references = ["一隻" + text for text in predictions], ["一隻貓" + text for text in references]
    metrics = make_metrics("bleu,chrf", references)
    total = report_of(predictions, references, references, metrics)
    bleu = BLEU(tokenize="zh" if chinese else "13a")
    assert total["bleu"]["value"] == pytest.approx(bleu.corpus_score(predictions, [references]).score / 100, abs=1e-9)
    marks = [CHRF().sentence_score(prediction, [reference]).score for prediction, reference in zip(predictions, references, strict=True)]
    assert total["chrf"]["value"] == pytest.approx(np.mean(marks) / 100)
    assert all(0 < total[name]["low"] < total[name]["value"] < total[name]["high"] < 1 for name in metrics)


def test_intervals_of_independent_questions_are_binomial():
    rng = np.random.default_rng(0)
    right = rng.random(2000) < 0.3
    predictions = ["yes" if mark else "no" for mark in right]
    exact = report_of(predictions, ["yes"] * 2000, [str(number) for number in range(2000)], make_metrics("exact", []))["exact"]
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 2000)
    assert exact["value"] == right.mean()
    assert exact["high"] - exact["value"] == pytest.approx(half, rel=0.1) and exact["value"] - exact["low"] == pytest.approx(half, rel=0.1)


def test_questions_about_one_image_are_drawn_together():
    """Asking each question eight times adds nothing, and narrows no interval."""
    predictions, references = sentences(50), sentences(50, seed=1)
    groups = [str(number) for number in range(50)]
    metrics = make_metrics("exact,rouge_l", references)
    once = report_of(predictions, references, groups, metrics)
    often = report_of(predictions * 8, references * 8, groups * 8, metrics)
    assert often["questions"] == 400 and often["groups"] == 50
    for name in metrics:
        assert often[name] == pytest.approx(once[name]), name


def test_intervals_are_repeatable_by_seed():
    rows, metrics = (sentences(40), sentences(40, seed=1), sentences(40)), make_metrics("rouge_l", [])
    first, again, other = (report_of(*rows, metrics, seed) for seed in (1, 1, 2))
    assert first == again and first["rouge_l"]["low"] != other["rouge_l"]["low"]


def test_metrics_that_are_not_there(monkeypatch):
    for names in ("exact,blue", "", " , "):
        with pytest.raises(UsageError, match=f"--metrics {names!r}: known are exact, rouge_l, chrf, bleu"):
            make_metrics(names, [])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(UsageError, match="--metrics chrf needs sacrebleu: pip install sacrebleu"):
        make_metrics("exact,chrf", [])


def test_kinds_of_answers():
    assert [kind_of(answer) for answer in ("yes", "No.", "12", "3.5", "a cat")] == ["yes/no", "yes/no", "number", "number", "other"]


def test_questions_of_a_conversation(tmp_path):
    turns = [("assistant", "Welcome."), ("user", "<image>\nWhat?"), ("assistant", "A cat."), ("user", "<image> and <image>?"), ("assistant", "7")]
    row = {"conversations": [{"role": role, "content": content} for role, content in turns], "image": "a.png, b.png, c.png"}
    for name in "abc":
        (tmp_path / f"{name}.png").touch()
    images = open_images(str(tmp_path))
    first, second = read_questions(open_samples(write_jsonl(tmp_path / "test.jsonl", [row])), images)
    assert first.images == ("a.png",) and first.answer == "A cat." and second.images == ("a.png", "b.png", "c.png")
    assert second.kind == "number" and [turn.content for turn in second.turns][-2:] == ["A cat.", "<image> and <image>?"]
    row["conversations"], row["image"] = row["conversations"][:1], ""
    with pytest.raises(SampleError, match=r"test2\.jsonl:1: no answer stands after a user's turn"):
        read_questions(open_samples(write_jsonl(tmp_path / "test2.jsonl", [row])), images)


@pytest.fixture(scope="module")
def assistant(tokenizer) -> Assistant:
    return Assistant(make_model(), tokenizer)


def rows(count: int) -> list[dict]:
    return [{"conversations": [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "yes"}]} for number in range(count)]


def test_a_stop_loses_no_answer(assistant, tmp_path, monkeypatch, capsys):
    job = {"data": str(write_jsonl(tmp_path / "test.jsonl", rows(5))), "image_dir": str(tmp_path),
           "predictions": tmp_path / "p.jsonl", "batch_size": 1, "max_new_tokens": 2}  # fmt: skip
    (tmp_path / "p.jsonl").write_text("of an earlier run")
    answers = scoring.answer_in_batches

    def interrupted(*arguments):
        for number, answer in enumerate(answers(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield answer

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "answer_in_batches", interrupted)
        scoring.score(assistant, **job)
    assert (tmp_path / "p.jsonl").read_text() == "of an earlier run"
    partial = (tmp_path / "p.jsonl.partial").read_text()
    assert f"stopped after 3 of 5 questions; their answers: {tmp_path}/p.jsonl.partial" in capsys.readouterr().out
    scoring.score(assistant, **job)
    assert (tmp_path / "p.jsonl").read_text().startswith(partial) and len(partial.splitlines()) == 3
    assert [json.loads(line)["question"] for line in (tmp_path / "p.jsonl").read_text().splitlines()] == ["0?", "1?", "2?", "3?", "4?"]
    assert not (tmp_path / "p.jsonl.partial").exists()


def test_a_missing_image_is_told_before_the_first_answer(assistant, tmp_path, monkeypatch):
    lines = [*rows(3), {"conversations": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A cat."}], "image": "no.png"}]
    monkeypatch.setattr(scoring, "answer_in_batches", lambda *_: pytest.fail("asked"))
    with pytest.raises(SampleError, match=r"test\.jsonl:4: image 'no\.png' is not in"):
        scoring.score(assistant, str(write_jsonl(tmp_path / "test.jsonl", lines)), str(tmp_path), tmp_path / "p.jsonl")
    assert not list(tmp_path.glob("p.jsonl*"))


@pytest.mark.parametrize(("kind", "expected"), [({}, "other"), ({"kind": None}, "other"), ({"kind": "colour"}, "colour"), ({"kind": 7}, "7"), ({"kind": 0}, "0")])
def test_kinds_that_rows_name_or_do_not(tmp_path, kind, expected):
    path = write_jsonl(tmp_path / "a.jsonl", [rows(1)[0] | {"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a cat"}]} | kind])
    assert convert.main([str(path), "--out", str(tmp_path / "shards")]) == 0
    assert [read_questions(open_samples(place), open_images(str(tmp_path)))[0].kind for place in (path, tmp_path / "shards")] == [expected] * 2


def test_parquet_is_scored_like_the_images_it_was_made_of(data, tokenizer, tmp_path, monkeypatch):
    """Predictions, kinds and intervals; and no question holds an image's bytes."""
    lines = [json.loads(line) | {"kind": f"kind {number % 3}"} for number, line in enumerate(data[0].read_text().splitlines())] * 2
    plain = write_jsonl(tmp_path / "plain.jsonl", lines)
    assert convert.main([str(plain), "--images_path", str(data[1]), "--out", str(tmp_path / "shards")]) == 0
    assistant, reports, predictions = Assistant(make_model(encoder=make_vision_encoder()), tokenizer), [], []
    for path in (plain, tmp_path / "shards"):
        target = tmp_path / "p.jsonl"
        report = scoring.score(assistant, str(path), str(data[1]), target, max_new_tokens=3, batch_size=4)
        reports.append(report | {"data": ""})
        predictions.append([json.loads(line) for line in target.read_text().splitlines()])
    assert reports[0]["kinds"].keys() == {"kind 0", "kind 1", "kind 2"} and reports[0]["total"]["questions"] == 44
    assert [{**row, "images": 0} for row in predictions[0]] == [{**row, "images": 0} for row in predictions[1]]
    assert predictions[1][-1]["images"] == [f"of {tmp_path}/shards/data.parquet:44"] * len(predictions[0][-1]["images"])
    for kind in ("exact", "rouge_l"):
        assert reports[0]["total"][kind]["value"] == reports[1]["total"][kind]["value"]
    questions = read_questions(open_samples(tmp_path / "shards"), open_images(str(data[1])))
    assert all(isinstance(image, int) for question in questions for image in question.images), "bytes are read when their turn comes"
