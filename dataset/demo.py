"""The embedded demo: the whole pipeline in small, on easy-VQA's pictures. `make demo` runs it.

    python -m dataset.demo                 # data, three trainings, scoring; at the end accuracy and where things lie
    python -m dataset.demo --prepare_only  # the data alone

Reads the PyPI package `easy-vqa` (MIT): 5,000 pictures of one coloured shape each, 48,248 questions, official split.
Writes dataset/demo/ (jsonl files, pictures) and, by the project's own scripts, out/{llm,pretrain_vlm,sft_vlm}_256.pth,
out/demo_predictions.jsonl and out/demo_report.json.

The stages are the real ones in small. `llm` learns on text alone to compare what is asked with what is described
("blue rectangle" / "is there no red shape?"); `pretrain_vlm` teaches the projector to say what a picture shows;
`sft_vlm` trains everything on questions about pictures.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from model.errors import print_anything

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "dataset" / "demo"
OUT = REPOSITORY / "out"
TOWER = REPOSITORY / "model" / "vision_model" / "tiny-clip"
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
DESCRIBE = "Describe the image."
NEGATED_SHARE = 0.4  # of the negated questions that the text-only stage keeps
WIDTH = ["--hidden_size", "256"]
DECODER = [*WIDTH, "--num_hidden_layers", "4"]
STAGES = {
    "llm": ["train_sft_vlm.py", "--from_weight", "none", "--data_path", "llm.jsonl", "--epochs", "1",
            "--batch_size", "32", "--learning_rate", "1e-3"],
    "pretrain_vlm": ["train_pretrain_vlm.py", "--from_weight", "llm", "--data_path", "captions.jsonl", "--epochs", "1",
                     "--batch_size", "16", "--learning_rate", "4e-3"],
    "sft_vlm": ["train_sft_vlm.py", "--from_weight", "pretrain_vlm", "--data_path", "sft.jsonl", "--epochs", "1",
                "--batch_size", "16", "--learning_rate", "5e-4"],
}  # fmt: skip


def kind_of(answer: str) -> str:
    """easy-VQA's three kinds of questions, told by their answers."""
    return "yes/no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "colour"


def describe(questions: list[tuple[str, str]]) -> tuple[str | None, str | None]:
    """(colour, shape) of a picture as far as its own questions and answers tell, yes/no questions included."""
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
    """One jsonl row: questions and answers in turn, the picture shown with the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if image and number == 0 else ""
        messages += [{"role": "user", "content": mark + question}, {"role": "assistant", "content": answer}]
    return {"conversations": messages, **({"image": image} if image else {}), **more}


def read_split(split: str) -> dict[int, list[tuple[str, str]]]:
    """Questions and answers of each picture of "train" or "test"."""
    try:
        import easy_vqa
    except ImportError as error:
        raise SystemExit("the demo needs easy-VQA's pictures: pip install easy-vqa==1.0 (make demo does it)") from error
    read = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    pictures: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in zip(*read(), strict=True):
        pictures.setdefault(image, []).append((question, answer))
    return dict(sorted(pictures.items()))


def copy_pictures(folder: Path) -> None:
    """easy-VQA's pictures as {folder}/train/0.png and so on."""
    import easy_vqa

    for split, paths in (("train", easy_vqa.get_train_image_paths()), ("test", easy_vqa.get_test_image_paths())):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for number, path in paths.items():
            shutil.copyfile(path, folder / split / f"{number}.png")


def phrase(colour: str, shape: str) -> str:
    """The description of a picture, in words that its questions use, too ("red" and " red" are different tokens)."""
    return f"a {colour} {shape}"


def is_negated(question: str) -> bool:
    """Whether a yes/no question asks for absence."""
    return bool({"no", "not"} & set(question.rstrip("?").split()))


def text_rows(train: dict, rng: random.Random, count: int) -> list[dict]:
    """Text-only conversations: a description and one question that training pictures of that kind were asked.

    The mix is a curriculum in itself. In easy-VQA as it is, half of the yes/no questions are negated and seven of eight
    colours are absent, so "yes exactly when negated" is right most of the time, and with presence balanced as well the
    answer is an exclusive or, with nothing to learn from one half alone. Here presence is balanced and most questions
    are plain: comparing is learned within a minute, and negation after it.
    """
    asked: dict[tuple, dict[str, str]] = {}
    for turns in train.values():
        if None not in describe(turns):
            asked.setdefault(describe(turns), {}).update(turns)
    pools = {}
    for (colour, shape), known in sorted(asked.items()):
        yes_no = [(question, answer) for question, answer in sorted(known.items()) if kind_of(answer) == "yes/no"]
        open_ended = [(question, answer) for question, answer in sorted(known.items()) if kind_of(answer) != "yes/no"]
        named = [turn for turn in yes_no if {colour, shape} & set(turn[0].rstrip("?").split())]
        absent = [turn for turn in yes_no if turn not in named]
        pools[colour, shape] = [*open_ended, (DESCRIBE, phrase(colour, shape))], named, absent
    rows = []
    while len(rows) < count:
        (colour, shape), (open_ended, named, absent) = rng.choice(list(pools.items()))
        pool = open_ended if rng.random() < 0.15 else named if rng.random() < 0.5 else absent
        question, answer = rng.choice(pool)
        if kind_of(answer) != "yes/no" or not is_negated(question) or rng.random() < NEGATED_SHARE:
            rows.append(conversation([(f"{phrase(colour, shape)}\n{question}", answer)]))
    return rows


def caption_rows(train: dict) -> list[dict]:
    """One caption a picture: what its own questions and answers tell of it."""
    described = {number: describe(turns) for number, turns in train.items()}
    return [conversation([(DESCRIBE, phrase(colour, shape))], f"train/{number}.png")
            for number, (colour, shape) in described.items() if colour and shape]  # fmt: skip


def question_rows(train: dict, rng: random.Random, questions: int, count: int) -> list[dict]:
    """`count` conversations of a few training questions about one picture; no question twice."""
    rows = []
    for number, turns in train.items():
        turns = rng.sample(turns, len(turns))
        groups = [turns[start : start + questions] for start in range(0, len(turns), questions)]
        rows += [conversation(group, f"train/{number}.png") for group in groups]
    return rng.sample(rows, count)


def test_rows(test: dict) -> list[dict]:
    """Every test question by itself."""
    return [conversation([(question, answer)], f"test/{number}.png", kind=kind_of(answer))
            for number, turns in test.items() for question, answer in turns]  # fmt: skip


def prepare(folder: Path = FOLDER, seed: int = 42) -> None:
    """Writes the demo's data, the same for the same seed."""
    rng = random.Random(seed)
    train, test = read_split("train"), read_split("test")
    copy_pictures(folder / "images")
    texts, captions = text_rows(train, rng, count=19_200), caption_rows(train)
    # A few captions among the questions, or the model forgets how to describe.
    sft = question_rows(train, rng, questions=4, count=5800) + rng.sample(captions, 400)
    files = {
        "llm": texts,
        "captions": captions,
        "sft": rng.sample(sft, len(sft)),
        "test": test_rows(test),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} conversations", flush=True)


def run_script(arguments: list[str]) -> None:
    """Runs one of the project's scripts and shows what it says; ends the demo when the script fails."""
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, str(REPOSITORY / arguments[0]), *arguments[1:]], check=False)
    if done.returncode:
        raise SystemExit(f"demo: {arguments[0]} ended with exit code {done.returncode}")


def train_stage(stage: str) -> None:
    """One stage of training, with the demo's data, decoder and tower."""
    script, *flags = STAGES[stage]
    flags = [str(FOLDER / flag) if flag.endswith(".jsonl") else flag for flag in flags]
    run_script([script, *flags, *DECODER, "--save_weight", stage, "--images_path", str(FOLDER / "images"),
                "--vision_model_path", str(TOWER), "--num_workers", "1", "--log_interval", "50", "--save_interval", "500"])  # fmt: skip


def report(seconds: float, timings: dict[str, float]) -> None:
    """Writes out/demo_report.json and prints the figures, some answers, and what to try next."""
    rows = [json.loads(line) for line in (OUT / "demo_predictions.jsonl").read_bytes().splitlines()]
    right = sum(row["correct"] for row in rows)
    by_kind = {}
    for kind in sorted({row["kind"] for row in rows}):
        of_kind = [row["correct"] for row in rows if row["kind"] == kind]
        by_kind[kind] = sum(of_kind) / len(of_kind)
    figures = {
        "accuracy": right / len(rows), "questions": len(rows), "seconds": seconds, "accuracy_by_kind": by_kind,
        "seconds_by_stage": timings,
    }  # fmt: skip
    (OUT / "demo_report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("\nSome answers:")
    for row in random.Random(0).sample(rows, 8):
        print(f"  {row['images'][0]}: {row['question']} -> {row['prediction']} ({'right' if row['correct'] else row['answer']})")
    print(f"\nseconds by stage: {', '.join(f'{name} {value:.0f}' for name, value in timings.items())}")
    print(f"accuracy by kind: {', '.join(f'{kind} {value:.3f}' for kind, value in by_kind.items())}")
    print(f"weights: {OUT}/sft_vlm_256.pth, predictions: {OUT}/demo_predictions.jsonl, data: {FOLDER}")
    print("chat with it (inside make's environment: . .venv/bin/activate):")
    print(f"  python eval_vlm.py --weight sft_vlm {' '.join(WIDTH)} --mode chat")
    print(f"or in a browser: python web_demo_vlm.py --image_dir {FOLDER / 'images' / 'test'}")
    print(f"demo: accuracy {right / len(rows):.3f} on {len(rows)} test questions, {seconds:.0f} s")


def main() -> None:
    """Data, trainings, scoring and report; every step is timed."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prepare_only", action="store_true", help="make the data and stop")
    args = parser.parse_args()
    began, timings = time.monotonic(), {}
    prepare()
    timings["data"] = time.monotonic() - began
    if args.prepare_only:
        return
    steps = {stage: lambda stage=stage: train_stage(stage) for stage in STAGES}
    steps["score"] = lambda: run_script([
        "eval_vlm.py", "--weight", "sft_vlm", *WIDTH, "--score", str(FOLDER / "test.jsonl"), "--image_dir", str(FOLDER / "images"),
        "--predictions", str(OUT / "demo_predictions.jsonl"),
    ])  # fmt: skip
    for name, step in steps.items():
        start = time.monotonic()
        step()
        timings[name] = time.monotonic() - start
    report(time.monotonic() - began, timings)


if __name__ == "__main__":
    main()
