"""Flags of the page: what its owner decides, and no session can change."""

import argparse
import functools
import sys
from argparse import Namespace
from pathlib import Path

from model.errors import UsageError
from model.hub_names import folder_of, is_hub_name
from model.storage import REPOSITORY, home_for_tilde


def parse_flags(argv: list[str], description: str = "") -> Namespace:
    """Flags as settings; ends the process with code 2 for bad ones."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every network (default: this machine)")
    add("--port", type=int, help="(default: 8501, or the next free one)")
    add("--save_dir", type=Path, default=REPOSITORY / "out", help="folder of weights and metrics files")
    add("--weight", default="sft_vlm", help="prefix of the weights to begin with (default: sft_vlm)")
    add("--load_from", type=Path, help="a transformers folder, or org/name on a hub, to begin with; those in --save_dir are found, too")
    add("--vision_model_path", help="folder of the vision encoder, or org/name on a hub (default: that of the weights' training)")
    add("--tokenizer_path", help="folder of the tokenizer, or org/name on a hub (default: that of the weights' training)")
    add("--device", help="default: cuda:0, mps or cpu, the best there is")
    add("--max_seq_len", type=int, default=2048, help="tokens of a chat that are remembered")
    add("--image_dir", type=Path, default=REPOSITORY / "dataset" / "eval_images", help="folder of example images")
    args = parser.parse_args(home_for_tilde(argv))
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port {args.port}: a number from 1 to 65535")
    if args.max_seq_len < 512:
        parser.error(f"--max_seq_len {args.max_seq_len}: below 512 there is no room for an image and an answer")
    for flag in ("save_dir", "load_from", "image_dir", "tokenizer_path"):
        value = getattr(args, flag)
        if value and not Path(value).is_dir() and (flag.endswith("_dir") or not is_hub_name(value)):
            parser.error(f"--{flag} {value}: no such folder")
    try:
        if args.load_from:
            folder_of(args.load_from)
    except UsageError as error:
        parser.error(f"--load_from {error}")
    return args


@functools.cache
def page_settings() -> Namespace:
    """The settings of this process, from its command line."""
    return parse_flags(sys.argv[1:])
