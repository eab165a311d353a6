"""Suite `inference` of the benchmark: answers the plain way and ours, two processes that take turns, on random weights
that never stop.

The plain way is transformers' `generate` on fp32 weights: transformers' processor, the tower, every projection by
itself, a cache that is copied for every token, one question after another.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.conversation import IMAGE_PLACEHOLDER, Renderer, Turn, load_tokenizer
from model.device import bf16_is_fast
from model.inference.assistant import Assistant
from model.inference.generation import Memory, Sampling, generate_batch, generate_stream
from model.layers import rope_tables
from model.model_vlm import MiniMindVLM, VLMConfig
from model.storage import REPOSITORY
from model.vision import preprocess
from trainer.plain import norm, rotate

from .train import Contestant

QUESTION = "Describe the picture in a few words: what does it show, and where?"  # about 230 tokens with the picture
SECOND = "And what stands behind it, to the left of the open window?"
NEW_TOKENS, BATCH = 128, 32
PLAIN_QUESTIONS = 3  # of the batch, asked the plain way: one costs as much as the other
ROUNDS = 5
GREEDY = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
NEVER = -1  # no token ends an answer


class PlainVLM(MiniMindVLM):
    """The same weights with a textbook's forward, the key and value heads repeated for the query heads that share them."""

    def forward(
        self, input_ids, pixel_values=None, image_positions=None, image_features=None, past_key_values=None, **_
    ) -> CausalLMOutputWithPast:
        """ids [B, T] after the cache -> logits [B, 1, V] of the last token."""
        x, start = self.embed(input_ids, pixel_values, image_positions, image_features), past_key_values.get_seq_length()
        cos, sin = rope_tables(self.config, torch.arange(start, start + x.shape[1], device=x.device))
        for layer, block in enumerate(self.model.layers):
            x = x + self.attend(block.self_attn, norm(block.input_layernorm, x), cos, sin, past_key_values, layer)
            normed = norm(block.post_attention_layernorm, x)
            x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed))
        return CausalLMOutputWithPast(logits=self.lm_head(norm(self.model.norm, x[:, -1:])), past_key_values=past_key_values)

    @staticmethod
    def attend(module, x, cos, sin, cache, layer: int) -> torch.Tensor:
        """Attention of new tokens [B, T, D] over the cache and themselves."""
        B, T, D = x.shape
        q, k, v = (p(x).view(B, T, -1, module.head_dim) for p in (module.q_proj, module.k_proj, module.v_proj))
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        k, v = cache.update(k, v, layer)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return module.o_proj(out.transpose(1, 2).reshape(B, T, D))


@dataclass
class Stamps(BaseStreamer):
    """The tokens that `generate` gives, and when each came."""

    def __post_init__(self):
        self.tokens, self.times = [], []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then token after token."""
        self.tokens.append(value)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass
class Plain:
    """The plain way to answer."""

    model: PlainVLM
    renderer: Renderer

    def __post_init__(self):
        self.processor = CLIPImageProcessor()  # its defaults are those of ViT-B/16

    def ask(self, turns: tuple[Turn, ...], picture: Image.Image, new_tokens: int) -> tuple[list[int], list[float]]:
        """An answer's tokens, and seconds from the question to each of them."""
        stamps, begin = Stamps(), time.perf_counter()
        prompt = self.renderer.render_prompt(turns)
        pixels = self.processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        positions = torch.arange(self.renderer.image_tokens) + prompt.image_starts[0]
        self.model.generate(
            torch.from_numpy(prompt.ids)[None], pixel_values=pixels, image_positions=positions, max_new_tokens=new_tokens,
            past_key_values=DynamicCache(config=self.model.config), do_sample=False, eos_token_id=None, streamer=stamps,
        )  # fmt: skip
        return [int(token) for token in stamps.tokens[1:]], [moment - begin for moment in stamps.times[1:]]


@dataclass
class Real:
    """Our way, as `Chat` and `--score` answer, but for the end of an answer."""

    assistant: Assistant

    def ask(self, turns: tuple[Turn, ...], memory: Memory, picture: Image.Image | None, features: list) -> Iterator[int]:
        """An answer token by token; a picture that is not in `features` yet is encoded."""
        rendered = self.assistant.renderer.render_prompt(turns)
        if picture is not None:
            features += self.assistant.encode([preprocess(picture)])
        prompt = self.assistant.prompt(rendered, range(len(rendered.image_starts)))
        yield from generate_stream(self.assistant.decoder, memory, prompt, features, GREEDY, NEVER)

    def ask_all(self, turns: tuple[Turn, ...], pictures: list[Image.Image], new_tokens: int) -> list[list[int]]:
        """The same question about each picture."""
        rendered = self.assistant.renderer.render_prompt(turns)
        features = self.assistant.encode([preprocess(picture) for picture in pictures])
        prompts = [self.assistant.prompt(rendered, [number]) for number in range(len(pictures))]
        return generate_batch(self.assistant.decoder, prompts, features, replace(GREEDY, max_new_tokens=new_tokens), NEVER)


def timed(tokens: Iterator[int]) -> tuple[list[int], list[float]]:
    """The tokens, and seconds until each."""
    begin, given, seconds = time.perf_counter(), [], []
    for token in tokens:
        given.append(token)
        seconds.append(time.perf_counter() - begin)
    return given, seconds


def make_model(kind: type[MiniMindVLM]) -> MiniMindVLM:
    """Random weights, the same for all kinds: decoder 512x8, a tower of ViT-B/16's shape."""
    torch.manual_seed(0)
    return kind(VLMConfig(), CLIPVisionModel(CLIPVisionConfig(patch_size=16))).eval()


def make_plain() -> Plain:
    """The plain way on those weights."""
    return Plain(make_model(PlainVLM), Renderer(load_tokenizer(str(REPOSITORY / "model"))))


def make_real() -> Real:
    """Ours on the same, with the settings and the dtype of `load_assistant`."""
    dtype = torch.bfloat16 if bf16_is_fast(torch.device("cpu")) else torch.float32
    return Real(Assistant(make_model(MiniMindVLM).to(dtype), load_tokenizer(str(REPOSITORY / "model"))))


def make_pictures(count: int) -> list[Image.Image]:
    """Noise of the usual size of a picture."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 15, 20, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(pixels.numpy()).resize((640, 480)) for pixels in noise]


def measured(first: list[float], second: list[float]) -> dict[str, float]:
    """Seconds to the first token of a chat's first and second turn, and of each token that follows the first."""
    return {"first": first[0], "second": second[0], "token": (first[-1] - first[0]) / (len(first) - 1)}


def plain_turns() -> Iterator[dict]:
    """Each turn is a chat of two questions ("chat"), or some of the 32 questions one by one ("batch")."""
    plain, pictures = make_plain(), make_pictures(BATCH)
    first, answer, number = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{QUESTION}"),), None, 0
    while True:
        what = yield answer
        if what == "chat":
            tokens, seconds = plain.ask(first, pictures[0], NEW_TOKENS)
            said = plain.renderer.tokenizer.decode(tokens, skip_special_tokens=True)
            answer = measured(seconds, plain.ask((*first, Turn("assistant", said), Turn("user", SECOND)), pictures[0], 1)[1])
        else:
            begin = time.perf_counter()
            asked = [plain.ask(first, pictures[number + at], NEW_TOKENS)[1] for at in range(PLAIN_QUESTIONS)]
            answer = {"batch": (time.perf_counter() - begin) / PLAIN_QUESTIONS,
                      "steps": sum(seconds[-1] - seconds[0] for seconds in asked) / PLAIN_QUESTIONS}  # fmt: skip
            number += 1


def real_turns() -> Iterator[dict]:
    """Each turn is the same, but all 32 questions at once."""
    real, pictures = make_real(), make_pictures(BATCH)
    first, answer = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{QUESTION}"),), None
    while True:
        what = yield answer
        if what == "chat":
            memory, features = Memory(real.assistant.decoder.new_cache()), []
            tokens, seconds = timed(real.ask(first, memory, pictures[0], features))
            second = (*first, Turn("assistant", real.assistant.text(tokens)), Turn("user", SECOND))
            answer = measured(seconds, timed(itertools.islice(real.ask(second, memory, None, features), 1))[1])
        else:
            begin = time.perf_counter()
            real.ask_all(first, pictures, 1)
            between = time.perf_counter()
            real.ask_all(first, pictures, NEW_TOKENS)
            end = time.perf_counter()
            answer = {"batch": end - between, "steps": end - between - (between - begin)}


def inference_suite() -> list[dict]:
    """The rows of suite `inference`."""
    ways = {"plain": Contestant(answers="plain"), "real": Contestant(answers="real")}
    turns = {(way, what): [] for what in ("chat", "batch") for way in ways}
    for what, rounds in (("chat", ROUNDS), ("batch", 3)):
        for way in ways.values():
            way.turn(what)  # warms up
        for _ in range(rounds):
            for name, way in ways.items():
                turns[name, what].append(way.turn(what))
    for way in ways.values():
        way.end()
    plain, real = (
        {key: statistics.median(turn[key] for turn in turns[way, what])
         for what in ("chat", "batch") for key in turns[way, what][0]}
        for way in ways
    )  # fmt: skip
    speed, plain_speed = BATCH * NEW_TOKENS / real["batch"], NEW_TOKENS / plain["batch"]
    steps, plain_steps = BATCH * (NEW_TOKENS - 1) / real["steps"], (NEW_TOKENS - 1) / plain["steps"]
    rows = [
        {"name": "decode_single", "ratio": plain["token"] / real["token"],
         "tokens_per_second": 1 / real["token"], "plain_tokens_per_second": 1 / plain["token"]},
        {"name": "first_token", "ratio": plain["first"] / real["first"],
         "milliseconds": 1e3 * real["first"], "plain_milliseconds": 1e3 * plain["first"]},
        {"name": "second_turn_ms", "ratio": plain["second"] / real["second"],
         "milliseconds": 1e3 * real["second"], "plain_milliseconds": 1e3 * plain["second"]},
        {"name": "decode_batch32", "ratio": speed / plain_speed, "tokens_per_second": speed,
         "plain_tokens_per_second": plain_speed, "steps_ratio": steps / plain_steps, "steps_tokens_per_second": steps},
    ]  # fmt: skip
    for row in rows:
        figures = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key not in ("name", "ratio"))
        print(f"{row['name']:24} {row['ratio']:8.2f}   {figures}", flush=True)
    return rows
