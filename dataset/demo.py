"""The embedded demo: the whole pipeline in small, on easy-VQA's images. `make demo` runs it.

    python -m dataset.demo                 # data, three trainings, scoring; at the end accuracy and where things lie
    python -m dataset.demo --prepare_only  # the data alone
    python -m dataset.demo --stage grpo    # afterwards: a short SFT, and what learning from marks makes of it

Reads   the PyPI package `easy-vqa` (MIT): 5,000 images of one coloured shape each, 48,248 questions, official split
Writes  dataset/demo/ (jsonl files, images), out/{llm,pretrain_vlm,sft_vlm}_256.*, out/demo_predictions.jsonl, out/demo_report.json;
        out/{short,grpo}_vlm_256.* and out/grpo_report.json
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from model.errors import print_anything

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER, OUT = REPOSITORY / "dataset" / "demo", REPOSITORY / "out"
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
DESCRIBE = "Describe the image."
NEGATED = 0.4  # fraction of the negated questions that the text-only stage keeps
PREDICTIONS = OUT / "demo_predictions.jsonl"
# Weights, data, script and flags; what the stage is, its minutes on two cores, and what its first loss means.
STAGES = (
    ("llm", "llm.jsonl", "train_sft_vlm.py", "--from_weight none --epochs 1 --batch_size 32 --learning_rate 1e-3",
     "a language model from scratch, on text alone: to compare what is asked with what is described", 1.5,
     "near ln(6400) = 8.76, as for a model to which all 6,400 tokens are equally likely"),
    ("pretrain_vlm", "captions.jsonl", "train_pretrain_vlm.py", "--from_weight llm --epochs 1 --batch_size 16 --learning_rate 4e-3",
     "the projector alone, on captions: to turn patch vectors into what the language model understands", 1.5,
     "far below 8.76: the language model can talk, and has to guess what it cannot see yet"),
    ("sft_vlm", "sft.jsonl", "train_sft_vlm.py", "--from_weight pretrain_vlm --epochs 1 --batch_size 16 --learning_rate 5e-4",
     "projector and language model together, on questions about images", 5,
     "images are seen and words are known, but questions about images are new"),
    ("score", "test.jsonl", "eval_vlm.py", "--weight sft_vlm", "the answers to all test questions, about images that no stage has shown", 0.5, ""),
)  # fmt: skip
GRPO_STAGES = (
    ("short_vlm", "short.jsonl", "train_sft_vlm.py", "--from_weight pretrain_vlm --epochs 1 --batch_size 16 --learning_rate 5e-4",
     "a tenth of the demo's third stage, so that something is left to learn", 0.5, "as in the third stage"),
    ("score", "test.jsonl", "eval_vlm.py", "--weight short_vlm", "what it answers by then", 0.5, ""),
    ("grpo_vlm", "marks.jsonl", "train_grpo_vlm.py", "--from_weight short_vlm --epochs 1 --batch_size 32 --learning_rate 2e-4"
     f" --group_size 16 --temperature 1.2 --normalize 1 --max_new_tokens 8 --cache_features 1 --eval_data_path {FOLDER / 'held_out.jsonl'} --eval_interval 50",
     "from marks alone: 16 answers to each training question, right or wrong; it is never told what is right", 6, ""),
    ("score", "test.jsonl", "eval_vlm.py", "--weight grpo_vlm", "what it answers now", 0.5, ""),
)  # fmt: skip


def kind_of(answer: str) -> str:
    """easy-VQA's three kinds of questions, told by their answers."""
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"


def is_negated(question: str) -> bool:
    """Whether a yes/no question asks for absence."""
    return bool({"no", "not"} & set(question.rstrip("?").split()))


def describe(questions: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """(colour, shape) of an image as far as its own questions and answers tell, yes/no questions included."""
    found: dict[str, str] = {}
    for question, answer in questions:
        kind, word = kind_of(answer), answer
        if kind == "yes/no":
            word = next((w for w in question.rstrip("?").split() if w in SHAPES or w in COLOURS), None)
            if word is None or (answer == "yes") == is_negated(question):
                continue  # it tells what is absent
            kind = kind_of(word)
        found[kind] = word
    return found.get("colour"), found.get("shape")


def conversation(turns: list[tuple[str, str]], image: str | None = None, **more) -> dict:
    """One jsonl row: questions and answers in turn, the image shown with the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        placeholder = "<image>\n" if image and number == 0 else ""
        messages += [{"role": "user", "content": placeholder + question}, {"role": "assistant", "content": answer}]
    return {"conversations": messages, **({"image": image} if image else {}), **more}


def text_rows(train: dict, rng: random.Random, count: int) -> list[dict]:
    """Text-only conversations: a description and one question that training images of that kind were asked.

    A curriculum (docs/how-it-works.md tells why): presence is balanced and most questions are plain, so that comparing is
    learned first, and negation after it.
    """
    asked: dict[tuple, dict[str, str]] = {}
    for turns in train.values():
        if None not in describe(turns):
            asked.setdefault(describe(turns), {}).update(turns)
    pools = []
    for (colour, shape), known in sorted(asked.items()):
        yes_no = [turn for turn in sorted(known.items()) if kind_of(turn[1]) == "yes/no"]
        named = [turn for turn in yes_no if {colour, shape} & set(turn[0].rstrip("?").split())]
        absent = [turn for turn in yes_no if turn not in named]
        open_ended = [turn for turn in sorted(known.items()) if turn not in yes_no]
        description = f"a {colour} {shape}"  # as its questions write it, too: "red" and " red" are different tokens
        pools.append((description, [*open_ended, (DESCRIBE, description)], named, absent))
    rows = []
    while len(rows) < count:
        description, open_ended, named, absent = rng.choice(pools)
        pool = open_ended if rng.random() < 0.15 else named if rng.random() < 0.5 else absent
        question, answer = rng.choice(pool)
        if kind_of(answer) != "yes/no" or not is_negated(question) or rng.random() < NEGATED:
            rows.append(conversation([(f"{description}\n{question}", answer)]))
    return rows


def question_rows(train: dict, rng: random.Random, questions: int, count: int) -> list[dict]:
    """`count` conversations of a few training questions about one image; no question twice."""
    rows = []
    for number, turns in train.items():
        turns = rng.sample(turns, len(turns))
        rows += [conversation(turns[start : start + questions], f"train/{number}.png") for start in range(0, len(turns), questions)]
    return rng.sample(rows, count)


def marked_rows(train: dict, rng: random.Random, count: int) -> list[dict]:
    """`count` single questions for learning from marks, as many of each kind and, of yes/no questions, of each answer.

    In the data nine of ten negated questions about colours are answered "yes": a model that always says so is marked right nine
    times of ten, and where all answers of a group are alike, nothing tells it better.
    """
    pools: dict[tuple, list[dict]] = {}
    for number, turns in train.items():
        for question, answer in turns:
            yes_no = kind_of(answer) == "yes/no" and (answer, is_negated(question), bool(set(SHAPES) & set(question.rstrip("?").split())))
            pools.setdefault((kind_of(answer), yes_no), []).append(conversation([(question, answer)], f"train/{number}.png"))
    rows = [row for _, pool in sorted(pools.items()) for row in rng.sample(pool, count // len(pools))]
    return rng.sample(rows, len(rows))


def read_split(questions: tuple[list, list, list], paths: dict[int, str], folder: Path) -> dict[int, list[tuple[str, str]]]:
    """Questions and answers of each image of a split; copies its images to `folder`."""
    images: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in zip(*questions, strict=True):
        images.setdefault(number, []).append((question, answer))
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in paths.items():
        shutil.copyfile(path, folder / f"{number}.png")
    return dict(sorted(images.items()))


def prepare(folder: Path = FOLDER, seed: int = 42) -> None:
    """Writes the demo's data, the same for the same seed."""
    try:
        import easy_vqa
    except ImportError as error:
        raise SystemExit("the demo needs easy-VQA's images: pip install easy-vqa==1.0 (make demo does it)") from error
    rng = random.Random(seed)
    train = read_split(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths(), folder / "images" / "train")
    test = read_split(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths(), folder / "images" / "test")
    texts = text_rows(train, rng, count=19_200)
    captions = [conversation([(DESCRIBE, f"a {colour} {shape}")], f"train/{number}.png")
                for number, turns in train.items() for colour, shape in [describe(turns)] if colour and shape]  # fmt: skip
    # A few captions among the questions, or the model forgets how to describe.
    sft = question_rows(train, rng, questions=4, count=7000) + rng.sample(captions, 400)
    one_by_one = [conversation([(question, answer)], f"test/{number}.png", kind=kind_of(answer))
                  for number, turns in test.items() for question, answer in turns]  # fmt: skip
    files = {"llm": texts, "captions": captions, "sft": rng.sample(sft, len(sft)), "test": one_by_one}
    files |= {"short": files["sft"][:700], "marks": marked_rows(train, rng, 12_600), "held_out": one_by_one[::24]}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} conversations", flush=True)


def run_stage(number: int, of: int, name: str, data: str, script: str, flags: str, teaches: str, minutes: float, first_loss: str) -> None:
    """Runs one of the project's scripts and says what for, how long, and what came of it; ends the demo when it fails."""
    command, data, images = [script, *flags.split(), "--hidden_size", "256"], str(FOLDER / data), str(FOLDER / "images")
    if name == "score":
        command += ["--score", data, "--image_dir", images, "--predictions", str(PREDICTIONS)]
    else:
        command += ["--num_hidden_layers", "4", "--save_weight", name, "--data_path", data, "--images_path", images,
                    "--vision_model_path", str(REPOSITORY / "model" / "vision_model" / "tiny-clip"), "--num_workers", "1", "--log_interval", "50"]  # fmt: skip
    print(f"\nstage {number} of {of}: {teaches}; about {minutes} minutes on two cores\n$ python {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, str(REPOSITORY / script), *command[1:]], check=False)
    if done.returncode:
        raise SystemExit(f"demo: {script} ended with exit code {done.returncode}")
    if first_loss:
        first, *_, last = map(json.loads, (OUT / f"{name}_256.metrics.jsonl").read_bytes().splitlines())
        print(f"first loss {first['loss']:.2f}: {first_loss}. Last loss {last['loss']:.3f}\n"
              f"saved: {OUT / name}_256.pth (weights), .json (how they were made), .metrics.jsonl (losses)", flush=True)  # fmt: skip


def accuracy() -> float:
    """Of the last scoring."""
    return mean(json.loads(line)["correct"] for line in PREDICTIONS.read_bytes().splitlines())


def run_grpo() -> None:
    """A short SFT and GRPO, both scored: out/grpo_report.json, and a line of it."""
    if not (OUT / "pretrain_vlm_256.pth").is_file():
        raise SystemExit(f"--stage grpo continues the demo's second stage, and {OUT / 'pretrain_vlm_256.pth'} is not there: make demo")
    figures, names = {}, ("sft_seconds", "accuracy_before", "grpo_seconds", "accuracy_after")
    for number, (stage, name) in enumerate(zip(GRPO_STAGES, names, strict=True), start=1):
        start = time.monotonic()
        run_stage(number, len(GRPO_STAGES), *stage)
        figures[name] = accuracy() if stage[0] == "score" else time.monotonic() - start
    (OUT / "grpo_report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("\ndemo: accuracy {accuracy_before:.3f} after {sft_seconds:.0f} s of SFT, {accuracy_after:.3f} after {grpo_seconds:.0f} s of"
          " learning from marks".format(**figures))  # fmt: skip


def report(seconds: float, timings: dict[str, float]) -> None:
    """Writes out/demo_report.json and prints the figures, some answers, and what to try next."""
    rows = [json.loads(line) for line in PREDICTIONS.read_bytes().splitlines()]
    by_kind = {kind: mean(row["correct"] for row in rows if row["kind"] == kind) for kind in sorted({row["kind"] for row in rows})}
    figures = {"accuracy": mean(row["correct"] for row in rows), "questions": len(rows), "seconds": seconds,
               "accuracy_by_kind": by_kind, "seconds_by_stage": timings}  # fmt: skip
    (OUT / "demo_report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("\nSome answers:")
    for row in random.Random(0).sample(rows, 8):
        print(f"  {row['images'][0]}: {row['question']} -> {row['prediction']} ({'right' if row['correct'] else row['answer']})")
    print(f"\nseconds by stage: {', '.join(f'{name} {value:.0f}' for name, value in timings.items())}\n"
          f"accuracy by kind: {', '.join(f'{kind} {value:.3f}' for kind, value in by_kind.items())}\n"
          f"weights: {OUT}/sft_vlm_256.pth, predictions: {PREDICTIONS}, data: {FOLDER}\n"
          "chat with it (inside make's environment: . .venv/bin/activate):\n"
          "  python eval_vlm.py --weight sft_vlm --hidden_size 256 --mode chat\n"
          f"or in a browser: python web_demo_vlm.py --image_dir {FOLDER / 'images' / 'test'}\n"
          f"demo: accuracy {figures['accuracy']:.3f} on {len(rows)} test questions, {seconds:.0f} s")  # fmt: skip


def main() -> None:
    """Data, trainings, scoring and report; every step is timed."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prepare_only", action="store_true", help="make the data and stop")
    parser.add_argument("--stage", choices=("grpo",), help="continue the demo by learning from marks")
    args, began, timings = parser.parse_args(), time.monotonic(), {}
    prepare()
    if args.prepare_only:
        return
    if args.stage:
        return run_grpo()
    for number, stage in enumerate(STAGES, start=1):
        start = time.monotonic()
        run_stage(number, len(STAGES), *stage)
        timings[stage[0]] = time.monotonic() - start
    report(time.monotonic() - began, timings)


if __name__ == "__main__":
    main()
