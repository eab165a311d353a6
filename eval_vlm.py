"""Evaluation: describe a folder of pictures, chat about pictures, or score answers.

    python eval_vlm.py --weight sft_vlm                     # asks which of the first two
    python eval_vlm.py --weight sft_vlm --mode folder       # describes every picture of dataset/eval_images
    python eval_vlm.py --weight sft_vlm --mode chat         # /help lists the commands
    python eval_vlm.py --weight sft_vlm --score test.jsonl --image_dir pictures --predictions out/predictions.jsonl

Reads   out/{weight}_{hidden}{_moe}.pth, or a transformers folder with --load_from; the vision tower's folder
Writes  nothing but the predictions of --score (default: beside the weights). All flags: --help.
"""

import argparse
import json
import sys
from collections import defaultdict
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from dataset.conversation import IMAGE_MARK
from dataset.errors import DataError, SampleError
from dataset.pictures import load_picture, open_images
from dataset.sources import open_samples
from model.vision import preprocess
from trainer.config import REPOSITORY, UsageError, weight_name
from trainer.distributed import default_device
from trainer.inference import Assistant, Chat, Question, Sampling, answer_in_batches, load_assistant

FOLDER_QUESTION = "Describe the image."
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
HELP = """/image PATH   show a picture with the next question (several: repeat it)
/reset        forget the conversation
/help         this list
/exit         leave (Ctrl-D does, too)
Anything else is a question."""


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the published interface, and those that chat and scoring need."""
    clip = REPOSITORY / "model" / "vision_model" / "clip-vit-base-patch16"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_from", default="model", help="'model' for native weights, or a transformers folder")
    parser.add_argument("--save_dir", default=str(REPOSITORY / "out"), help="folder of the weights")
    parser.add_argument("--weight", default="sft_vlm", help="prefix of the weight file")
    parser.add_argument("--hidden_size", type=int, default=512, help="part of the weight file's name")
    parser.add_argument("--num_hidden_layers", type=int, default=8, help="for old commands: the weights tell it")
    parser.add_argument("--use_moe", type=int, default=0, choices=(0, 1))
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.65, help="0: greedy")
    parser.add_argument("--top_p", type=float, default=0.85)
    parser.add_argument("--top_k", type=int, default=0, help="choose among the k likeliest tokens; 0: all")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: repeats become less likely")
    parser.add_argument("--seed", type=int, help="makes sampled answers repeatable")
    parser.add_argument("--max_seq_len", type=int, default=2048, help="tokens of a chat that are remembered")
    parser.add_argument("--image_dir", default=str(REPOSITORY / "dataset" / "eval_images"), help="folder of pictures")
    parser.add_argument("--device", default=None, help="default: cuda:0, mps or cpu, the best there is")
    parser.add_argument("--vision_model_path", default=str(clip), help="CLIP folder in transformers format")
    parser.add_argument("--tokenizer_path", default=str(REPOSITORY / "model"))
    parser.add_argument("--use_compile", type=int, default=0, choices=(0, 1), help="1: compile a chat's step; for GPUs")
    parser.add_argument("--mode", choices=("folder", "chat"), help="default: asks on a terminal, otherwise folder")
    parser.add_argument("--score", metavar="FILE.jsonl", help="conversations with reference answers, to score")
    parser.add_argument("--predictions", help="where --score writes every answer")
    parser.add_argument("--batch_size", type=int, default=64, help="questions at once in --score")
    args = parser.parse_args(argv)
    if not 0 < args.top_p <= 1 or min(args.temperature, args.top_k) < 0 or args.repetition_penalty <= 0:
        parser.error("--top_p lies in (0, 1], --temperature and --top_k are at least 0, --repetition_penalty above 0")
    if min(args.max_new_tokens, args.batch_size, args.hidden_size, args.num_hidden_layers) < 1:
        parser.error("--max_new_tokens, --batch_size, --hidden_size and --num_hidden_layers are at least 1")
    if args.max_seq_len < 512:
        parser.error("--max_seq_len below 512 leaves no room for a picture and an answer")
    return args


def describe_folder(assistant: Assistant, folder: Path, sampling: Sampling) -> None:
    """Streams a description of every picture in the folder; a broken one is reported and skipped."""
    names = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES) if folder.is_dir() else []
    if not names:
        raise UsageError(f"--image_dir {folder}: no pictures there ({', '.join(sorted(PICTURE_SUFFIXES))})")
    for path in names:
        print(f"\n[{path.name}] ", end="", flush=True)
        try:
            picture = load_picture(path, path.name)
        except SampleError as error:
            print(f"skipped: {error}")
            continue
        chat = Chat(assistant, sampling)
        chat.add_picture(picture)
        print_pieces(chat, FOLDER_QUESTION)


def chat_loop(assistant: Assistant, sampling: Sampling, max_length: int) -> None:
    """Questions and answers until /exit or the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    chat = Chat(assistant, sampling, max_length)
    print("Chat. /image PATH shows a picture, /help lists the commands, /exit leaves.")
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/help":
            print(HELP)
        elif command == "/reset":
            chat.reset()
            print("forgotten")
        elif command == "/image":
            show_picture(chat, argument.strip().strip("'\""))
        elif command.startswith("/"):
            print(f"no such command: {command}; /help lists them")
        elif line:
            answer(chat, line)


def show_picture(chat: Chat, path: str) -> None:
    """Reads the picture for the next question, or says what is wrong with it."""
    try:
        if not path:
            raise SampleError("/image needs a path")
        chat.add_picture(load_picture(Path(path).expanduser(), path))
        print(f"picture {len(chat.waiting)} for the next question: {path}")
    except (SampleError, OSError, ValueError) as error:
        print(error)


def print_pieces(chat: Chat, question: str) -> None:
    """Prints the answer as it grows."""
    with closing(chat.stream(question)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()


def answer(chat: Chat, question: str) -> None:
    """Streams one answer; Ctrl-C breaks it off, and the chat goes on with what was said."""
    try:
        print_pieces(chat, question)
    except UsageError as error:
        print(error)
    except KeyboardInterrupt:
        print("\n(interrupted)")


def read_questions(path: str) -> list[Question]:
    """Every assistant turn of the file as a question, its history being the conversation before it."""
    samples, questions = open_samples(path), []
    for number in range(len(samples)):
        sample = samples[number]
        for at, turn in enumerate(sample.turns):
            if turn.role == "assistant":
                history = sample.turns[:at]
                shown = sum(t.content.count(IMAGE_MARK) for t in history if t.role == "user")
                questions.append(Question(history, sample.images[:shown], turn.content, sample.kind or kind_of(turn.content)))
    return questions


def kind_of(answer: str) -> str:
    """The usual three kinds of VQA answers (arXiv 1505.00468), for files that name none."""
    text = answer.strip().lower().rstrip(".")
    return "yes/no" if text in ("yes", "no") else "number" if text.replace(".", "", 1).isdigit() else "other"


def score(assistant: Assistant, args: argparse.Namespace) -> None:
    """Prints exact-match accuracy, in total and by kind, and writes every prediction."""
    questions, images = read_questions(args.score), open_images(args.image_dir)
    target = Path(args.predictions or Path(args.save_dir) / f"{args.weight}_predictions.jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    right: dict[str, list[bool]] = defaultdict(list)
    answers = answer_in_batches(assistant, questions, lambda name: preprocess(images.load(name, args.score)),
                                args.batch_size, args.max_new_tokens)  # fmt: skip
    with open(target, "w", encoding="utf-8") as file:
        for question, prediction in tqdm(answers, total=len(questions), unit="question", disable=not sys.stderr.isatty()):
            correct = prediction.strip() == question.answer.strip()
            right[question.kind].append(correct)
            row = {"images": [ref if isinstance(ref, str) else f"{len(ref)} bytes" for ref in question.images],
                   "question": question.turns[-1].content.replace(f"{IMAGE_MARK}\n", ""),
                   "answer": question.answer, "prediction": prediction, "kind": question.kind, "correct": correct}  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    for kind, marks in sorted(right.items()):
        print(f"{kind}: {sum(marks) / len(marks):.4f} ({sum(marks)} of {len(marks)})")
    total = [mark for marks in right.values() for mark in marks]
    print(f"total: {sum(total) / len(total):.4f} ({sum(total)} of {len(total)}), exact match; predictions: {target}")


def ask_mode() -> str:
    """On a terminal, asks; otherwise the folder."""
    if not sys.stdin.isatty():
        return "folder"
    while True:
        choice = input("[0] describe the pictures of a folder   [1] chat: ").strip()
        if choice in ("0", "1"):
            return ("folder", "chat")[int(choice)]


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 for a user's mistake."""
    args = parse_flags(argv)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed)
    weight_file = Path(args.save_dir) / f"{weight_name(args.weight, args.hidden_size, bool(args.use_moe))}.pth"
    try:
        assistant = load_assistant(
            args.load_from, weight_file, args.device or default_device(), args.vision_model_path,
            args.tokenizer_path, bool(args.use_compile),
        )  # fmt: skip
        if args.score:
            score(assistant, args)
        elif (args.mode or ask_mode()) == "folder":
            describe_folder(assistant, Path(args.image_dir), sampling)
        else:
            chat_loop(assistant, sampling, args.max_seq_len)
    except (UsageError, DataError, SampleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
