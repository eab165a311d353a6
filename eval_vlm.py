"""Evaluation: describe a folder of images or a video, chat about them, score answers, or compare scored ones.

    python eval_vlm.py --weight sft_vlm                     # asks which of the first two
    python eval_vlm.py --weight sft_vlm --mode folder       # describes every image of dataset/eval_images
    python eval_vlm.py --weight sft_vlm --video clip.mp4    # describes it; on a terminal: a chat about it
    python eval_vlm.py --weight sft_vlm --mode chat         # /help lists the commands
    python eval_vlm.py --weight sft_vlm --score test.jsonl --image_dir images --predictions out/predictions.jsonl
    python eval_vlm.py --weight sft_vlm --score test.jsonl --image_dir images --blind   # and without seeing the images
    python eval_vlm.py --compare out/a.jsonl out/b.jsonl    # two files of predictions, with intervals of the difference

Reads   out/{weight}_{hidden}{_moe}.pth, or a transformers folder with --load_from; the vision encoder's folder. --compare
        needs neither
Writes  nothing but the predictions of --score (default: next to the weights) and --report. All flags: --help.
"""

import argparse
import sys
from pathlib import Path

from chat.chat import Chat
from chat.scoring import METRICS, compare_files, score
from chat.terminal import Screen, TerminalChat
from dataset.images import IMAGE_SUFFIXES, image_files, load_image
from machine import ran_out_of_memory
from model.device import default_device
from model.errors import DataError, SampleError, UsageError, first_line, print_anything
from model.inference.assistant import Assistant, load_assistant
from model.inference.generation import Sampling
from model.load import find_weights
from model.storage import REPOSITORY, StorageError, home_for_tilde
from model.weights import weight_name

FOLDER_QUESTION, VIDEO_QUESTION = "Describe the image.", "Describe the video."


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the published interface, and those that chat and scoring need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--load_from", default="model", help="'model' for native weights, or a transformers folder, or org/name on a hub")
    flag("--save_dir", default=str(REPOSITORY / "out"), help="folder of the weights")
    flag("--weight", default="sft_vlm", help="prefix of the weight file")
    flag("--hidden_size", type=int, help="width, where several files have that name (default: the only one, or 512)")
    flag("--num_hidden_layers", type=int, default=8, help="for old commands: the weights tell it")
    flag("--use_moe", type=int, choices=(0, 1), help="likewise; 1: Mixture of Experts")
    flag("--max_new_tokens", type=int, default=512)
    flag("--temperature", type=float, default=0.65, help="0: greedy")
    flag("--top_p", type=float, default=0.85)
    flag("--top_k", type=int, default=0, help="choose among the k likeliest tokens; 0: all")
    flag("--repetition_penalty", type=float, default=1.0, help="above 1: repeats become less likely")
    flag("--seed", type=int, help="makes sampled answers repeatable; of the bootstrap in --score")
    flag("--max_seq_len", type=int, default=2048, help="tokens of a chat that are remembered")
    flag("--image_dir", default=str(REPOSITORY / "dataset" / "eval_images"), help="folder of images")
    flag("--video", metavar="FILE", help="a video for the first question of a chat, or to be described")
    flag("--video_frames", type=int, default=8, help="frames that stand for a video, if as many fit")
    flag("--device", help="default: cuda:0, mps or cpu, the best there is")
    flag("--vision_model_path", help="folder of the vision encoder, or org/name on a hub (default: that of the weights' training)")
    flag("--tokenizer_path", help="folder of the tokenizer, or org/name on a hub (default: that of the weights' training)")
    flag("--mode", choices=("folder", "chat"), help="default: asks on a terminal, otherwise folder")
    flag("--prompt", help=f"the question of folder mode (default: {FOLDER_QUESTION} Of a video: {VIDEO_QUESTION})")
    flag("--score", metavar="FILE.jsonl", help="conversations with reference answers, to score")
    flag("--blind", action="store_true", help="--score also with blank images: what the questions alone tell")
    flag("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="predictions of two models for the same questions")
    flag("--metrics", default="exact,rouge_l", help=f"of --score and --compare: {', '.join(METRICS)}, with commas between")
    flag("--predictions", help="where --score writes every answer")
    flag("--report", type=Path, metavar="FILE.json", help="where --score and --compare write their figures")
    flag("--batch_size", type=int, default=64, help="questions at once in --score")
    args = parser.parse_args(home_for_tilde(argv))
    try:
        args.sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k,
                                 args.repetition_penalty, args.seed)  # fmt: skip
    except ValueError as error:
        parser.error(f"--{error}")
    if min(args.batch_size, args.hidden_size or 1, args.num_hidden_layers, args.video_frames) < 1:
        parser.error("--batch_size, --hidden_size, --num_hidden_layers and --video_frames are at least 1")
    if args.prompt is not None and (args.score or args.mode == "chat"):
        parser.error("--prompt goes with folder mode")
    if (args.blind and not args.score) or (args.compare and args.score):
        parser.error("--blind goes with --score, and --compare without: it reads what --score has written")
    if args.max_seq_len < 512:
        parser.error("--max_seq_len below 512 leaves no room for an image and an answer")
    return args


def describe_folder(assistant: Assistant, args: argparse.Namespace, screen: Screen) -> None:
    """Streams the answer about every image in the folder; a corrupt one is reported and skipped."""
    folder, question = Path(args.image_dir), args.prompt or FOLDER_QUESTION
    names = image_files(folder) if folder.is_dir() else []
    if not names:
        raise UsageError(f"--image_dir {folder}: no images there (.jpg, .png and {len(IMAGE_SUFFIXES) - 2} more kinds)")
    screen.write(f"{question}\n")
    for path in names:
        screen.write(f"\n[{path.name}] ")
        try:
            image = load_image(path, path.name)
        except SampleError as error:
            screen.write(f"skipped: {error}\n")
            continue
        chat = Chat(assistant, args.sampling, args.max_seq_len)
        chat.add_image(image)
        for piece in chat.stream(question):
            screen.write(piece)
        screen.write("\n")


def talk(assistant: Assistant, weight_file: Path, args: argparse.Namespace, screen: Screen) -> None:
    """Folder, video or chat, as the flags or the user say."""
    mode = args.mode or "folder"
    if args.mode is None and sys.stdin.isatty():
        chosen = args.video or input("[0] describe the images of a folder   [1] chat: ").strip() == "1"
        mode = "chat" if chosen else "folder"
    if mode == "folder" and not args.video:
        return describe_folder(assistant, args, screen)
    chat = TerminalChat(Chat(assistant, args.sampling, args.max_seq_len), screen, args.video_frames)
    if args.video:
        chat.video(args.video)
    if mode == "folder":
        return chat.ask(args.prompt or VIDEO_QUESTION)
    return chat.run(f"{weight_file.stem if args.load_from == 'model' else args.load_from} on {assistant.model.device}")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 for a user's mistake, 1 for a failure of the machine, 130 after Ctrl-C."""
    print_anything()
    args = parse_flags(argv)
    try:
        if args.compare:
            compare_files(args.compare, args.metrics, args.seed or 0, args.report)
            return 0
        if args.load_from == "model":
            weight_file = find_weights(Path(args.save_dir), args.weight, args.hidden_size, args.use_moe)
        else:  # its name goes to the predictions
            name = weight_name(args.weight, args.hidden_size or 512, bool(args.use_moe))
            weight_file = Path(args.save_dir) / f"{name}.pth"
        assistant = load_assistant(
            args.load_from, weight_file, args.device or default_device(), args.vision_model_path, args.tokenizer_path
        )
        if args.score:
            predictions = Path(args.predictions or weight_file.with_name(f"{weight_file.stem}_predictions.jsonl"))
            score(assistant, args.score, args.image_dir, predictions, args.report, args.metrics, args.seed or 0,
                  args.batch_size, args.max_new_tokens, args.blind)  # fmt: skip
        else:
            talk(assistant, weight_file, args, Screen(sys.stdout))
    except (UsageError, DataError, SampleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StorageError, OSError, MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            error = (f"memory ran out: {first_line(error)}. Smaller --batch_size, --max_new_tokens and --max_seq_len"
                     " need less of it")  # fmt: skip
        elif isinstance(error, RuntimeError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    except EOFError:  # no choice between folder and chat
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
