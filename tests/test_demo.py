"""The demo's data: right answers, no test image in training; and what it says of its stages."""

import json
import types

import pytest

from dataset import demo


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("demo")
    demo.prepare(folder)
    found = {name: list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())) for name in ("llm", "captions", "sft", "test", "marks")}
    assert all((folder / "images" / row["image"]).is_file() for name in ("captions", "sft", "test", "marks") for row in found[name])
    return found


def test_text_only_answers_follow_from_the_description(rows):
    answers = {"yes": 0, "no": 0}
    for row in rows["llm"]:
        question, answer = (turn["content"] for turn in row["conversations"])
        description, question = question.split("\n")
        _, colour, shape = description.split()
        if answer in answers:
            answers[answer] += 1
            (asked,) = set(question.rstrip("?").split()) & {*demo.COLOURS, *demo.SHAPES}
            assert (answer == "yes") == ((asked in (colour, shape)) != demo.is_negated(question)), row
        else:
            assert answer in (colour, shape, description), row
    assert 0.8 < answers["yes"] / answers["no"] < 1.25


def test_no_test_image_is_trained_on_and_no_question_comes_twice(rows):
    assert len(rows["test"]) == 9673 and all(row["image"].startswith("test/") for row in rows["test"])
    assert all(row["image"].startswith("train/") for name in ("captions", "sft") for row in rows[name])
    questions = [(row["image"], turn["content"].removeprefix("<image>\n")) for row in rows["sft"] for turn in row["conversations"]
                 if turn["role"] == "user" and demo.DESCRIBE not in turn["content"]]  # fmt: skip
    assert len(set(questions)) > 0.98 * len(questions)  # easy-VQA itself asks some twice
    captions = {row["image"]: row["conversations"][1]["content"] for row in rows["captions"]}
    assert len(captions) > 3000 and all(caption.split()[1] in demo.COLOURS and caption.split()[2] in demo.SHAPES for caption in captions.values())


def test_questions_to_be_marked_have_either_answer_as_often(rows):
    counts = {}
    for row in rows["marks"]:
        question, answer = (turn["content"] for turn in row["conversations"])
        assert row["image"].startswith("train/")
        if answer in ("yes", "no"):
            counts.setdefault(demo.is_negated(question), []).append(answer)
    assert len(rows["marks"]) == 12_600 and all(answers.count("yes") == answers.count("no") > 1000 for answers in counts.values())


def test_learning_from_marks_is_scored_before_and_after(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "PREDICTIONS", tmp_path / "predictions.jsonl")
    with pytest.raises(SystemExit, match="make demo"):
        demo.run_grpo()
    (tmp_path / "pretrain_vlm_256.pth").touch()
    (tmp_path / "short_vlm_256.metrics.jsonl").write_text('{"loss": 2.0}\n{"loss": 0.5}\n')
    scripts = []

    def run(command, check):
        scripts.append(command[1])
        right = [True, len(scripts) > 2]  # the first scoring finds half right, the second all
        demo.PREDICTIONS.write_text("".join(json.dumps({"correct": correct}) + "\n" for correct in right))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo.subprocess, "run", run)
    demo.run_grpo()
    assert [script.rpartition("/")[2] for script in scripts] == ["train_sft_vlm.py", "eval_vlm.py", "train_grpo_vlm.py", "eval_vlm.py"]
    assert "demo: accuracy 0.500 after" in capsys.readouterr().out
    assert json.loads((tmp_path / "grpo_report.json").read_text())["accuracy_after"] == 1


def test_a_stage_says_what_it_is_for_and_what_came_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUT", tmp_path)
    (tmp_path / "llm_256.metrics.jsonl").write_text('{"loss": 8.9}\n{"loss": 0.5}\n')
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=0))
    demo.run_stage(1, 4, *demo.STAGES[0])
    said = capsys.readouterr().out
    assert "stage 1 of 4: a language model from scratch" in said and "about 1.5 minutes" in said
    assert "first loss 8.90: near ln(6400) = 8.76" in said and "Last loss 0.500" in said and f"saved: {tmp_path}/llm_256.pth" in said
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit, match=r"eval_vlm\.py ended with exit code 2"):
        demo.run_stage(4, 4, *demo.STAGES[3])
