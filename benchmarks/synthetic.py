"""Data of the published data set's shape without its content: for the benchmark.

Captions have one picture and an answer of 10 to 35 tokens; fine-tuning samples have one picture and one to four turns,
whose answers together have 50 to 400 tokens (short ones more often, as in the published data).
"""

import json
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

PICTURE_SIZE = 128  # pixels a side, as in the published data


def words_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lower-case words that are one token each when a space stands before them."""
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


def write_pictures(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Smooth random pictures with a little noise, as JPEG files; returns their names."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.jpg" for number in range(count)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + rng.integers(-12, 13, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name, quality=85)
    return names


def write_data(folder: Path, kind: str, count: int, tokenizer: PreTrainedTokenizerBase, pictures: int, seed: int = 0) -> tuple[Path, Path]:
    """`count` samples that show `pictures` different pictures: the jsonl file and the folder of pictures."""
    rng, words = random.Random(seed), words_of(tokenizer)
    names = write_pictures(folder / "pictures", pictures, seed)
    path = folder / f"{kind}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            row = {"conversations": conversation(kind, words, rng), "image": names[number % pictures]}
            file.write(json.dumps(row) + "\n")
    return path, folder / "pictures"
