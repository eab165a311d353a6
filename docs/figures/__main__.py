"""The pictures of the README, drawn by this project.

    python -m docs.figures structure   # the model, dense and as a mixture of experts
    python -m docs.figures sample      # the way of a sample from its file to the loss
    python -m docs.figures loss        # loss curves of the demo; or of the metrics files named
    python -m docs.figures attention   # where the demo's model looked; or another model

Reads   what `make demo` leaves in out/ (loss, attention), dataset/eval_images
Writes  images/{name}.png, or --out. Needs requirements-dev.txt. The other pictures there: images/page.png by
`python -m tests.screenshot`, images/growth.png by `python -m benchmarks growth --plot images/growth.png`.
"""

import argparse
import sys
from pathlib import Path

from model.errors import SampleError, UsageError, print_anything
from model.storage import REPOSITORY, check_output, home_for_tilde
from model.weights import weight_name

PICTURES = REPOSITORY / "dataset" / "eval_images"
STAGES = ("llm", "pretrain_vlm", "sft_vlm")
SUFFIXES = (".png", ".jpg", ".webp")  # of --out


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """The picture to make and its flags; the defaults are the README's pictures."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--out", type=Path, default=REPOSITORY / "images" / f"{name}.png", help="default: %(default)s")
        return command

    for name, summary in (("structure", "the model, one block, both kinds of feed-forward layer"), ("sample", "from a line of jsonl to the loss")):
        command = add(name, summary)
        command.add_argument("--hidden_size", type=int, default=512, help="width of the decoder (default: %(default)s)")
        command.add_argument("--num_hidden_layers", type=int, default=8, help="its blocks (default: %(default)s)")
        command.add_argument("--image", type=Path, default=PICTURES / "chelsea.jpg", help="the picture shown (default: %(default)s)")

    command = add("loss", "loss curves, a panel a run")
    demo = [REPOSITORY / "out" / f"{weight_name(stage, 256, False)}.metrics.jsonl" for stage in STAGES]
    command.add_argument("files", nargs="*", type=Path, default=demo, help="metrics files of runs (default: those of the demo)")

    command = add("attention", "where a model looked for each token of its answers")
    command.add_argument("images", nargs="*", type=Path, default=sorted(PICTURES.glob("easy_vqa_*.png")), help="pictures to ask about (default: easy-VQA's in dataset/eval_images)")
    command.add_argument("--question", default="Describe the image.", help="default: %(default)s")
    command.add_argument("--layer", type=int, help="one block, from 0 (default: the mean of all)")
    command.add_argument("--head", type=int, help="one query head, from 0 (default: the mean of all)")
    command.add_argument("--load_from", default="model", help="'model' for native weights, or a transformers folder")
    command.add_argument("--save_dir", type=Path, default=REPOSITORY / "out", help="folder of the weights (default: %(default)s)")
    command.add_argument("--weight", default="sft_vlm", help="prefix of the weight file (default: %(default)s)")
    command.add_argument("--hidden_size", type=int, help="width, where there are several weight files of that name")
    command.add_argument("--use_moe", type=int, choices=(0, 1), help="likewise")
    command.add_argument("--vision_model_path", help="CLIP folder (default: that of the weights' training)")
    return parser.parse_args(home_for_tilde(argv))


def draw(args: argparse.Namespace) -> None:
    """Makes the picture. What it needs is imported here: each command asks for no more than its own."""
    if args.picture == "structure":
        from .structure import draw_structure

        draw_structure(args.out, args.image, args.hidden_size, args.num_hidden_layers)
    elif args.picture == "sample":
        from .sample import draw_sample

        draw_sample(args.out, args.image, args.hidden_size, args.num_hidden_layers)
    elif args.picture == "loss":
        from .loss import draw_loss

        draw_loss(args.out, args.files)
    elif args.picture == "attention":
        from model.inference.assistant import load_assistant
        from model.weights import find_weights

        from .attention import draw_attention

        file = find_weights(args.save_dir, args.weight, args.hidden_size, args.use_moe)
        assistant = load_assistant(args.load_from, file, "cpu", args.vision_model_path)
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
