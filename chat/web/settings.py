"""Flags of the page, and what all of its visitors share: settings, models, the engine.

Nothing heavy is imported here: the page opens while torch is still on its way.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from model.storage import home_for_tilde

from .engine import Engine
from .models import ModelShelf

REPOSITORY = Path(__file__).resolve().parent.parent.parent
HEAD_START = 4.0  # seconds for a first visitor who is there at once


@dataclass(frozen=True)
class Settings:
    """What the owner of the page decides; a visitor can change none of it."""

    save_dir: Path
    weight: str
    load_from: Path | None
    vision_model_path: str | None
    tokenizer_path: str | None
    device: str | None
    max_seq_len: int
    image_dir: Path
    host: str
    port: int | None


def parse_flags(argv: list[str], description: str) -> Settings:
    """Flags as settings; ends the process with code 2 for bad ones."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: every network (default: this machine)")
    parser.add_argument("--port", type=int, help="(default: 8501, or the next free one)")
    parser.add_argument("--save_dir", default=str(REPOSITORY / "out"), help="folder of weights and metrics files")
    parser.add_argument("--weight", default="sft_vlm", help="prefix of the weights to begin with (default: sft_vlm)")
    parser.add_argument("--load_from", help="a transformers folder to begin with; those in --save_dir are found anyway")
    parser.add_argument("--vision_model_path", help="CLIP folder (default: that of the weights' training)")
    parser.add_argument("--tokenizer_path", help="folder of the tokenizer (default: that of the weights' training)")
    parser.add_argument("--device", help="default: cuda:0, mps or cpu, the best there is")
    parser.add_argument("--max_seq_len", type=int, default=2048, help="tokens of a chat that are remembered")
    parser.add_argument("--image_dir", default=str(REPOSITORY / "dataset" / "eval_images"), help="folder of example pictures")
    args = parser.parse_args(home_for_tilde(argv))
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port {args.port}: a number from 1 to 65535")
    if args.max_seq_len < 512:
        parser.error(f"--max_seq_len {args.max_seq_len}: below 512 there is no room for a picture and an answer")
    for flag in ("save_dir", "load_from", "image_dir", "tokenizer_path"):
        value = getattr(args, flag)
        if value and not Path(value).is_dir():
            parser.error(f"--{flag} {value}: no such folder")
    return Settings(
        save_dir=Path(args.save_dir), weight=args.weight, load_from=Path(args.load_from) if args.load_from else None,
        vision_model_path=args.vision_model_path, tokenizer_path=args.tokenizer_path, device=args.device,
        max_seq_len=args.max_seq_len, image_dir=Path(args.image_dir), host=args.host, port=args.port,
    )  # fmt: skip


@dataclass(frozen=True)
class Server:
    """What all visitors share."""

    settings: Settings
    shelf: ModelShelf
    engine: Engine


_server: Server | None = None


def start(settings: Settings) -> Server:
    """Makes the shared things and begins to load the first model. Once a process."""
    global _server
    shelf = ModelShelf(settings.save_dir, settings.weight, settings.load_from, settings.vision_model_path,
                       settings.tokenizer_path, settings.device, HEAD_START)  # fmt: skip
    _server = Server(settings, shelf, Engine())
    if choices := shelf.choices():
        shelf.load(choices[0])
    return _server


def server() -> Server:
    """What `start` made."""
    if _server is None:
        raise RuntimeError("the page is opened by web_demo_vlm.py, which starts its server first")
    return _server
