"""Suite `inference`: answers of random weights that never stop, by the assistant that chat and scoring use and by
docs/minimal_vlm.py in fp32, which take turns."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import CLIPVisionModel

from docs import minimal_vlm
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.inference.assistant import Assistant, load_assistant
from model.inference.generation import Memory, Sampling, generate_batch, generate_stream
from model.pixels import preprocess

from .synthetic import Size, make_encoder

ROWS = ("decode_single", "first_token", "second_turn", "decode_batch32")
QUESTION = Turn("user", f"{IMAGE_PLACEHOLDER}\nDescribe the image in a few words: what does it show, and where?")  # about 230 tokens
SAID = Turn("assistant", "A small wooden table near an open window. " * 10)
SECOND = Turn("user", "And what stands behind it, to the left of the open window?")
NEVER = -1  # no token ends an answer


def ask_plain(model: minimal_vlm.MiniVLM, tokenizer: Tokenizer, turns: list[Turn], image: Path, new_tokens: int) -> list[int]:
    """An answer's tokens by docs/minimal_vlm.py, which reads the whole conversation in each turn."""
    rendered, device = minimal_vlm.render(tokenizer, [vars(turn) for turn in turns], answer=True), model.lm_head.weight.device
    prompt = minimal_vlm.collate([minimal_vlm.Example(*rendered, [minimal_vlm.load_image(image)])], device=device)
    return minimal_vlm.generate(model, prompt, new_tokens, stop=None)


class Real:
    """The assistant, asked as a chat and scoring ask it, but for the end of an answer."""

    def __init__(self, assistant: Assistant):
        self.assistant, self.sampling = assistant, Sampling(temperature=0.0)
        self.forget()

    def forget(self) -> None:
        """Starts a new conversation."""
        self.memory, self.features = Memory(self.assistant.decoder.new_cache()), None

    def ask(self, turns: list[Turn], image: Path, new_tokens: int) -> list[int]:
        """An answer's tokens. The image is encoded once in a conversation, and what was read of that is kept."""
        rendered = self.assistant.renderer.render_prompt(tuple(turns))
        if self.features is None:
            self.features = self.assistant.encode([preprocess(Image.open(image))])[0]
        prompt = self.assistant.prompt(rendered, [0])
        return list(islice(generate_stream(self.assistant.decoder, self.memory, prompt, self.features, self.sampling, NEVER), new_tokens))

    def ask_all(self, images: list[Path], new_tokens: int) -> list[list[int]]:
        """The same question about each image, as one batch."""
        rendered = self.assistant.renderer.render_prompt((QUESTION,))
        features = torch.cat(self.assistant.encode([preprocess(Image.open(image)) for image in images]))
        prompts = [self.assistant.prompt(rendered, [number]) for number in range(len(images))]
        return generate_batch(self.assistant.decoder, prompts, features, replace(self.sampling, max_new_tokens=new_tokens), NEVER)


def seconds_of(ask: Callable, *arguments) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    ask(*arguments)
    return time.perf_counter() - begin


def measure(wanted: list[str], folder: Path, size: Size, args: argparse.Namespace) -> Iterator[dict]:
    """The rows, each with the baseline's figure."""
    encoder = make_encoder(folder / "encoder", size)
    vision = CLIPVisionModel.from_pretrained(encoder)
    sizes = minimal_vlm.Config(size.hidden_size, size.num_hidden_layers, vision_hidden_size=vision.config.hidden_size)
    minimal_vlm.save_weights(weights := folder / "random.pth", minimal_vlm.MiniVLM(sizes, vision))
    images = [folder / f"{number}.png" for number in range(size.questions)]
    for image, noise in zip(images, torch.randint(0, 256, (len(images), 15, 20, 3), dtype=torch.uint8), strict=True):
        Image.fromarray(noise.numpy()).resize((640, 480)).save(image)
    baseline = minimal_vlm.load_weights(weights, vision).to(args.device)
    real = Real(load_assistant("model", weights, args.device, str(encoder), "model"))
    ways = {"plain": partial(ask_plain, baseline, minimal_vlm.load_tokenizer()), "real": real.ask}
    questions = {"first": ([QUESTION], 1), "whole": ([QUESTION], size.new_tokens), "second": ([QUESTION, SAID, SECOND], 1)}
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds + 1):
        for way, ask in ways.items():
            for name, (turns, new_tokens) in questions.items():
                if name != "second":
                    real.forget()
                seconds.setdefault(f"{way} {name}", []).append(seconds_of(ask, turns, images[0], new_tokens))
        if "decode_batch32" in wanted:
            seconds.setdefault("real batch", []).append(seconds_of(real.ask_all, images, size.new_tokens))
    median = {key: statistics.median(values[1:]) for key, values in seconds.items()}  # the first round warms up
    for name in wanted:
        if name in ("first_token", "second_turn"):
            own, other = (median[f"{way} {name.partition('_')[0]}"] * 1e3 for way in ("real", "plain"))
            yield {"name": name, "milliseconds": own, "plain_milliseconds": other, "plain_ratio": other / own}
            continue
        own, other = ((size.new_tokens - 1) / (median[f"{way} whole"] - median[f"{way} first"]) for way in ("real", "plain"))
        if name == "decode_batch32":  # with reading the questions
            own, other = len(images) * size.new_tokens / median["real batch"], size.new_tokens / median["plain whole"]
        yield {"name": name, "tokens_per_second": own, "plain_tokens_per_second": other, "plain_ratio": own / other}
