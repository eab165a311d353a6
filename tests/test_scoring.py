"""Marks against their definitions and the library's own figures; intervals; files that a stop leaves whole."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image
from sacrebleu.metrics import BLEU, CHRF

from chat import scoring
from chat.scoring import Question, compare, compare_files, kind_of, make_metrics, make_report, read_questions
from dataset import convert
from dataset.images import open_images
from dataset.sources import open_samples
from model.conversation import Turn
from model.errors import SampleError, UsageError
from model.inference.assistant import Assistant
from model.pixels import CLIP_MEAN
from tests.conftest import make_model, make_vision_encoder, write_jsonl

WORDS = ["the", "a", "cat", "dog", "sits", "on", "mat", "red", "big"]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def report_of(predictions: list[str], references: list[str], groups: list[str], metrics: dict, seed: int = 0) -> dict:
    questions = [Question((Turn("user", "?"),), (group,), reference, "other") for reference, group in zip(references, groups, strict=True)]
    return make_report(questions, predictions, metrics, seed)["total"]


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


@pytest.mark.parametrize("names", ["exact,rouge_l,vqa,anls", "chrf,bleu"])
def test_several_references_are_as_good_as_their_best(names):
    """Each of these metrics gives an answer that is one of them all it can give; of a single question alone as well."""
    questions = [Question((Turn("user", "?"),), ("a.png",), "unused", "other", answers=("a red cat sits there", "two dogs on the mat"))]
    for prediction, best in (("two dogs on the mat", 1), ("blue", 0)):
        total = make_report(questions, [prediction], make_metrics(names, questions[0].references), 0)["total"]
        for name in names.split(","):
            assert [round(total[name][key], 1) for key in ("value", "low", "high")] == [best] * 3, name


def test_bleu_and_chrf_of_several_references_are_those_of_sacrebleu():
    predictions, one, other = sentences(60), sentences(60, seed=1), sentences(60, seed=2)
    questions = [Question((Turn("user", "?"),), (text,), "", "", answers=pair) for text, *pair in zip(one, one, other, strict=True)]
    total = make_report(questions, predictions, make_metrics("bleu,chrf", one), 0)["total"]
    assert total["bleu"]["value"] == pytest.approx(BLEU().corpus_score(predictions, [one, other]).score / 100, abs=1e-9)
    marks = [CHRF().sentence_score(text, list(pair)).score for text, *pair in zip(predictions, one, other, strict=True)]
    assert total["chrf"]["value"] == pytest.approx(np.mean(marks) / 100)


def test_a_comparison_is_the_difference_of_two_reports():
    """With the intervals of its parts, and a narrower one of the difference than these allow: the draws are the same."""
    references, ours = sentences(80), sentences(80, seed=1)
    theirs = [reference if number % 4 == 0 else text for number, (reference, text) in enumerate(zip(references, ours, strict=True))]
    questions = [Question((Turn("user", "?"),), (str(number),), text, str(number % 2)) for number, text in enumerate(references)]
    metrics = make_metrics("exact,rouge_l,bleu", references)
    compared = compare(questions, {"a": ours, "b": theirs}, metrics, 3)
    reports = [make_report(questions, predictions, metrics, 3) for predictions in (ours, theirs)]
    for name in metrics:
        for part in ("total", "kinds"):
            for kind in compared[name]["kinds"] if part == "kinds" else [""]:
                found, a, b = (row[part][kind] if kind else row[part] for row in (compared[name], *reports))
                assert found["a"] == pytest.approx(a[name]) and found["b"] == pytest.approx(b[name])
                assert found["difference"]["value"] == pytest.approx(b[name]["value"] - a[name]["value"])
        total = compared[name]["total"]
        assert total["difference"]["low"] < total["difference"]["value"] < total["difference"]["high"]
        assert total["difference"]["low"] > 0, "every answer is at least as good"
    same = compare(questions, {"a": ours, "b": ours}, metrics, 3)
    assert all(row["total"]["difference"] == {"value": 0, "low": 0, "high": 0} for row in same.values())


def test_intervals_are_repeatable_by_seed():
    rows, metrics = (sentences(40), sentences(40, seed=1), sentences(40)), make_metrics("rouge_l", [])
    first, again, other = (report_of(*rows, metrics, seed) for seed in (1, 1, 2))
    assert first == again and first["rouge_l"]["low"] != other["rouge_l"]["low"]


def test_metrics_that_are_not_there(monkeypatch):
    for names in ("exact,blue", "", " , "):
        with pytest.raises(UsageError, match=f"--metrics {names!r}: known are exact, rouge_l, vqa, anls, chrf, bleu"):
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
    assert [{**row, "images": 0, "where": 0} for row in predictions[0]] == [{**row, "images": 0, "where": 0} for row in predictions[1]]
    assert predictions[1][-1]["images"] == [f"of {tmp_path}/shards/data.parquet:44"] * len(predictions[0][-1]["images"])
    for kind in ("exact", "rouge_l"):
        assert reports[0]["total"][kind]["value"] == reports[1]["total"][kind]["value"]
    questions = read_questions(open_samples(tmp_path / "shards"), open_images(str(data[1])))
    assert all(isinstance(image, int) for question in questions for image in question.images), "bytes are read when their turn comes"


# --- with closed eyes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [0, 4])
def test_the_blind_are_asked_about_images_of_the_mean_colour(tokenizer, tmp_path, tiles):
    """Their answers are those of a file whose images are blank and as large; questions without images are left out."""
    for folder, make in (("seen", lambda number: Image.effect_noise((300, 100 + 100 * number), 90)),
                         ("blank", lambda number: Image.new("RGB", (300, 100 + 100 * number), tuple(round(255 * mean) for mean in CLIP_MEAN)))):  # fmt: skip
        (tmp_path / folder).mkdir()
        for number in range(3):
            make(number).save(tmp_path / folder / f"{number}.png")
    shows = [row("<image>\n<image>\nBoth?", "yes", image="0.png, 1.png"), row("Hm?", "7"), row("<image>\nWhat?", "a cat", image="2.png", answers=["a", "b"])]
    path = write_jsonl(tmp_path / "test.jsonl", shows)
    assistant = Assistant(make_model(encoder=make_vision_encoder(), tiles=tiles), tokenizer)
    job = {"data": str(path), "max_new_tokens": 6, "batch_size": 2, "metrics": "exact,vqa"}
    report = scoring.score(assistant, image_dir=str(tmp_path / "seen"), predictions=tmp_path / "p.jsonl", blind=True, **job)
    plain = scoring.score(assistant, image_dir=str(tmp_path / "seen"), predictions=tmp_path / "plain.jsonl", **job)
    scoring.score(assistant, image_dir=str(tmp_path / "blank"), predictions=tmp_path / "blank.jsonl", **job)
    seen, seen_plainly, blank = (read_lines(tmp_path / f"{name}.jsonl") for name in ("p", "plain", "blank"))
    assert [line.get("blind") for line in seen] == [blank[0]["prediction"], None, blank[2]["prediction"]]
    assert [{name: value for name, value in line.items() if name != "blind"} for line in seen] == seen_plainly
    assert seen[0]["blind"] != seen[0]["prediction"] and ["answers" in line for line in seen] == [False, False, True]
    assert {name: value for name, value in report.items() if name != "blind"} == plain
    assert report["blind"]["exact"]["total"]["questions"] == 2 and report["blind"].keys() == {"exact", "vqa"}


def test_what_images_are_worth(assistant, tmp_path, monkeypatch, capsys):
    rows = [row("<image>\nWhat?", "yes", image="a.png"), row("<image>\nWhat?", "no", image="b.png"), row("Hm?", "yes")]
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    answers = iter((["yes", "no", "what"], ["yes"] * 2))
    monkeypatch.setattr(scoring, "answer_in_batches", lambda *_: iter(next(answers)))
    report = scoring.score(assistant, str(write_jsonl(tmp_path / "test.jsonl", rows)), str(tmp_path), tmp_path / "p.jsonl", tmp_path / "r.json", blind=True)
    total = report["blind"]["exact"]["total"]
    assert [total[name]["value"] for name in ("blind", "seeing", "difference")] == [0.5, 1, 0.5] and total["groups"] == 2
    assert "without seeing: 0.50 of exact; images are worth 0.50" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text()) == report


def test_the_blind_need_a_question_about_an_image(assistant, tmp_path):
    with pytest.raises(UsageError, match=r"--blind: no question in .*test\.jsonl shows an image"):
        scoring.score(assistant, str(write_jsonl(tmp_path / "test.jsonl", rows(2))), str(tmp_path), tmp_path / "p.jsonl", blind=True)


# --- two files of predictions -----------------------------------------------------------------------------------------


def row(question: str, answer: str, **fields) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(question: str, answer: str, prediction: str, **fields) -> dict:
    return {"images": ["a.png"], "question": question, "answer": answer, "prediction": prediction, "kind": "other", "correct": False} | fields


def test_files_are_compared_by_several_references_and_images(tmp_path, capsys):
    """A line separator within an answer ends no line; three questions about one image are one group."""
    a = [said("?", "2", "two"), said("!", "3", "\u2028"), said("Hm", "4", "", images=["b.png"], answers=["4", "four"]), said("no image", "5", "5", images=[])]
    b = [{**line, "prediction": line["answer"]} for line in a]
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", lines)) for name, lines in (("a", a), ("b", b))]
    total = compare_files(files, "vqa,exact", report=tmp_path / "r.json")["vqa"]["total"]
    assert [total[name]["value"] for name in ("a", "b", "difference")] == [0.5, 1, 0.5] and total["groups"] == 3
    assert "vqa\nkind" in capsys.readouterr().out and json.loads((tmp_path / "r.json").read_text())["vqa"]["total"] == total
    same = compare_files(files[:1] * 2, "vqa,exact")
    assert all(row["total"]["difference"] == {"value": 0, "low": 0, "high": 0} for row in same.values())
    one = str(write_jsonl(tmp_path / "one.jsonl", a[:1]))
    assert compare_files([one, one], "vqa")["vqa"]["total"]["difference"] == {"value": 0, "low": 0, "high": 0}, "a single question"


@pytest.mark.parametrize(
    ("lines", "message"),
    [([said("?", "2", "2"), said("else", "3", "3")], r"question 2 of .*a\.jsonl is \('!', 'a\.png', '3'\), of .*b\.jsonl \('else', .*same file"),
     ([said("?", "2", "2"), said("!", "3", "3", images=["b.png"])], r"question 2 of .*'b\.png'"),
     ([said("?", "2", "2"), said("!", "3", "3", answers=["3", "three"])], r"question 2 of .*'three'"),
     ([said("?", "2", "2")], r"question 2 of .*a\.jsonl is \('!', .*, of .*b\.jsonl None;"),
     ([said("?", "2", "2"), said("!", "3", "3"), said("more", "4", "4")], r"question 3 of .*a\.jsonl is None, of"), ([], "holds no predictions"), (["", " "], "holds no predictions"),
     ([said("?", "2", None)], r"b\.jsonl:1: no line of --predictions: wanted are texts.*'prediction' \(an empty one where nothing was said"),
     ([{"conversations": []}], r"b\.jsonl:1: no line of --predictions"), ([["?"]], r"b\.jsonl:1: no line of"), (["{"], r"b\.jsonl:1: not json"),
     ([said("?", "2", "2", images="a.png")], r"b\.jsonl:1: no line of .* lists 'images'"), (None, r"--compare .*b\.jsonl: No such file")],
)  # fmt: skip
def test_files_that_cannot_be_compared(tmp_path, lines, message):
    a = write_jsonl(tmp_path / "a.jsonl", [said("?", "2", "2"), said("!", "3", "3")])
    if lines is not None:
        write_jsonl(tmp_path / "b.jsonl", lines)
    with pytest.raises((UsageError, SampleError), match=message):
        compare_files([str(a), str(tmp_path / "b.jsonl")], "exact")


def test_a_difference_in_the_middle_of_a_long_question_is_seen(tmp_path):
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", [said("long " * 99 + name + " long" * 99, "2", "2")])) for name in "ab"]
    with pytest.raises(UsageError, match="question 1 of"):
        compare_files(files, "exact")
