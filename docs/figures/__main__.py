"""The plots of the README, from what `make demo` leaves in out/.

    python -m docs.figures loss        # loss curves of the demo, or of the metrics files named
    python -m docs.figures grpo        # marks over time, from what `python -m dataset.demo --stage grpo` leaves
    python -m docs.figures attention   # where the demo's model looked, or another one

Writes images/{name}.png, or --out. Needs requirements-dev.txt. The diagrams of the same folder come from structure.svg and
sample.svg, next to this file, which are written by hand: a test compares their numbers with the model.
"""

import argparse
import sys
from pathlib import Path

from model.errors import SampleError, UsageError, print_anything
from model.load import find_weights
from model.outputs import check_output
from model.storage import REPOSITORY, home_for_tilde
from model.weights import weight_name

IMAGES = REPOSITORY / "dataset" / "eval_images"
STAGES = ("llm", "pretrain_vlm", "sft_vlm")
SUFFIXES = (".png", ".jpg", ".webp")  # of --out


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The plot to make and its flags; the defaults are the README's plots."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="plot", required=True, metavar="PLOT")

    command = commands.add_parser("loss", help="loss curves, a panel a run")
    demo = [REPOSITORY / "out" / f"{weight_name(stage, 256, False)}.metrics.jsonl" for stage in STAGES]
    command.add_argument("files", nargs="*", type=Path, default=demo, help="metrics files of runs (default: those of the demo)")

    command = commands.add_parser("grpo", help="marks of a run that learned from them")
    command.add_argument("file", nargs="?", type=Path, default=REPOSITORY / "out" / "grpo_vlm_256.metrics.jsonl", help="its metrics file (default: %(default)s)")

    command = commands.add_parser("attention", help="where a model looked for each token of its answers")
    command.add_argument("images", nargs="*", type=Path, default=sorted(IMAGES.glob("easy_vqa_*.png")), help="images to ask about (default: easy-VQA's in dataset/eval_images)")
    command.add_argument("--question", default="Describe the image.", help="default: %(default)s")
    command.add_argument("--layer", type=int, help="one block, from 0 (default: the mean of all)")
    command.add_argument("--head", type=int, help="one query head, from 0 (default: the mean of all)")
    command.add_argument("--save_dir", type=Path, default=REPOSITORY / "out", help="folder of the weights (default: %(default)s)")
    command.add_argument("--weight", default="sft_vlm", help="prefix of the weight file (default: %(default)s)")
    command.add_argument("--hidden_size", type=int, help="width, where there are several weight files of that name")
    command.add_argument("--use_moe", type=int, choices=(0, 1), help="likewise")
    command.add_argument("--vision_model_path", help="folder of the vision encoder (default: that of the weights' training)")
    for name, command in commands.choices.items():
        command.add_argument("--out", type=Path, default=REPOSITORY / "images" / f"{name}.png", help="default: %(default)s")
    return parser.parse_args(home_for_tilde(argv))


def draw(args: argparse.Namespace) -> None:
    """Makes the plot."""
    if args.plot in ("loss", "grpo"):
        from .loss import draw_loss, draw_marks  # only here is matplotlib needed

        draw_loss(args.out, args.files) if args.plot == "loss" else draw_marks(args.out, args.file)
    else:
        from model.inference.assistant import load_assistant

        from .attention import draw_attention

        file = find_weights(args.save_dir, args.weight, args.hidden_size, args.use_moe)
        assistant = load_assistant("model", file, "cpu", args.vision_model_path)
        draw_attention(args.out, assistant, args.images, args.question, args.layer, args.head)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 for a user's mistake."""
    print_anything()
    args = parse_flags(argv)
    try:
        check_output("--out", args.out, SUFFIXES)
        draw(args)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print(f"error: {error.name} is not installed: pip install -r requirements-dev.txt", file=sys.stderr)
        return 2
    except (UsageError, SampleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
