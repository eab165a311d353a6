"""Data of the published data set's shape without its content, and models of the real sizes with random weights.

Captions have one image and an answer of 10 to 35 tokens; fine-tuning samples have one image and one to four turns,
whose answers together have 50 to 400 tokens (short ones more often, as in the published data).
"""

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerBase
from transformers.utils import logging

IMAGE_SIZE = 128  # pixels a side, as in the published data


@dataclass(frozen=True)
class Size:
    """What is measured: the model, and how much data."""

    hidden_size: int = 512
    num_hidden_layers: int = 8
    encoder: dict = field(default_factory=dict)  # of a CLIPVisionConfig; by default ViT-B's
    samples: dict = field(default_factory=lambda: {"pretrain": 96, "sft": 48})
    lines: int = 595_000  # of jsonl: the published captions
    new_tokens: int = 128  # of an answer
    questions: int = 32  # in a batch
    compile: int = 1  # whether training is compiled


FULL = Size()
TINY = Size(32, 2, {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
            {"pretrain": 32, "sft": 8}, lines=100, new_tokens=4, questions=2, compile=0)  # fmt: skip


def make_encoder(folder: Path, size: Size, image_size: int = 224, patch_size: int = 16) -> Path:
    """A folder with a vision encoder."""
    torch.manual_seed(0)
    logging.disable_progress_bar()
    CLIPVisionModel(CLIPVisionConfig(image_size=image_size, patch_size=patch_size, **size.encoder)).save_pretrained(folder)
    return folder


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lower-case words that are one token each after a space."""
    pieces = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    return [piece[1:] for piece in pieces if piece[0] == " " and piece[1:].isascii() and piece[1:].isalpha()]


def conversation(kind: str, words: list[str], rng: random.Random) -> list[dict[str, str]]:
    """The turns of one sample of `kind` "pretrain" or "sft"."""
    if kind == "pretrain":
        lengths = [rng.randint(10, 35)]
    else:
        total, turns = round(50 * math.exp(rng.random() * math.log(400 / 50))), rng.randint(1, 4)
        lengths = [total // turns] * turns
    messages = []
    for number, length in enumerate(lengths):
        question = " ".join(rng.choices(words, k=rng.randint(5, 15)))
        messages.append({"role": "user", "content": question + ("\n<image>" if number == 0 else "")})
        messages.append({"role": "assistant", "content": " ".join(rng.choices(words, k=length))})
    return messages


def write_data(folder: Path, kind: str, count: int, tokenizer: PreTrainedTokenizerBase, images: int) -> tuple[Path, Path]:
    """`count` samples that show `images` different images: the jsonl file and the folder of images (smooth noise)."""
    rng, words, path = random.Random(0), words_of(tokenizer), folder / f"{kind}.jsonl"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, colours in enumerate(np.random.default_rng(0).integers(0, 256, (images, 6, 6, 3), dtype=np.uint8)):
        image = Image.fromarray(colours).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{number}.jpg")
    rows = [{"conversations": conversation(kind, words, rng), "image": f"{number % images}.jpg"} for number in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path, folder / "images"
