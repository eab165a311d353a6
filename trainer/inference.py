"""Answers: loading a trained model, one chat with memory, and many questions in batches. Terminal and page share it.

Legend: B prompts of a batch, T tokens, P placeholders of a picture.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerBase, TextStreamer

from dataset.conversation import IMAGE_MARK, Renderer, Turn
from model import MiniMindVLM
from model.vision import VisionTowerError, load_vision_tower, normalize, preprocess

from .build import bf16_is_fast, build_model, load_tokenizer
from .checkpoint import fingerprints, load_weights, read_sidecar
from .config import UsageError
from .distributed import keep_freed_memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; `temperature` 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.65
    top_p: float = 0.85
    repetition_penalty: float = 1.0
    seed: int | None = None

    def arguments(self) -> dict:
        """As keyword arguments of transformers' generate."""
        arguments = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature > 0:
            return arguments | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return arguments | {"do_sample": False}


@dataclass
class Assistant:
    """A trained model with its renderer, ready to answer."""

    model: MiniMindVLM
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer = field(init=False)

    def __post_init__(self):
        self.renderer = Renderer(self.tokenizer, self.model.config.image_tokens)
        self.model.eval()

    @torch.inference_mode()
    def generate(
        self, conversations: list[tuple[Turn, ...]], pixels: list[torch.Tensor], sampling: Sampling,
        streamer: TextStreamer | None = None,
    ) -> list[str]:
        """Answers to B conversations at once. `pixels` are uint8 [3, 224, 224], all pictures in reading order; one
        that stands there several times is encoded once."""
        P = self.model.config.image_tokens
        prompts = [self.renderer.render_prompt(turns) for turns in conversations]
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.model.config.pad_token_id)
        mask = torch.zeros_like(ids)
        positions = []
        for row, prompt in enumerate(prompts):  # padded on the left: answers begin side by side
            start = longest - len(prompt)
            ids[row, start:], mask[row, start:] = torch.from_numpy(prompt.ids), 1
            positions += [torch.arange(P) + row * longest + start + at for at in prompt.image_starts]
        images = {}
        if pixels:
            unique = list({id(picture): picture for picture in pixels}.values())
            place = {id(picture): number for number, picture in enumerate(unique)}
            pictures = normalize(torch.stack(unique).to(self.model.device))
            features = self.model.encode_images(pictures)
            images = {"image_features": features[[place[id(picture)] for picture in pixels]],
                      "image_positions": torch.cat(positions).to(self.model.device)}  # fmt: skip
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        out = self.model.generate(
            ids.to(self.model.device), attention_mask=mask.to(self.model.device), streamer=streamer, use_cache=True,
            eos_token_id=self.renderer.im_end, pad_token_id=self.model.config.pad_token_id,
            **sampling.arguments(), **images,
        )  # fmt: skip
        return [self._text(row) for row in out[:, longest:].tolist()]

    def _text(self, ids: list[int]) -> str:
        end = ids.index(self.renderer.im_end) if self.renderer.im_end in ids else len(ids)
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)


def load_assistant(
    load_from: str, weight_file: Path, device: str, vision_model_path: str, tokenizer_path: str,
    hidden_size: int, num_hidden_layers: int, use_moe: bool,
) -> Assistant:  # fmt: skip
    """A model for answering: native weights when `load_from` is "model", otherwise a transformers folder.

    In bf16 where the device multiplies that faster, else in fp32.
    Raises UsageError for anything missing or not fitting.
    """
    if device == "cpu":
        keep_freed_memory()
    dtype = torch.bfloat16 if bf16_is_fast(torch.device(device)) else torch.float32
    if load_from == "model":
        sizes = (read_sidecar(weight_file) or {}).get("config", {})
        tokenizer = load_tokenizer(tokenizer_path)
        layers = sizes.get("num_hidden_layers", 8) if sizes else num_hidden_layers
        model = build_model(hidden_size, layers, use_moe, vision_model_path, tokenizer)
        if fresh := load_weights(weight_file, model, fingerprints(model, tokenizer)):
            raise UsageError(f"{weight_file} holds a language model without projector ({', '.join(fresh)} missing)")
        return Assistant(model.to(device, dtype), tokenizer)
    folder = Path(load_from)
    if not (folder / "config.json").is_file():
        raise UsageError(f"--load_from {load_from}: no config.json there; give 'model' or a transformers folder")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type != "minimind-v":
        raise UsageError(f"{folder} holds a model of type {config.model_type!r}, not 'minimind-v'")
    tokenizer = load_tokenizer(load_from if (folder / "tokenizer.json").is_file() else tokenizer_path)
    model, info = MiniMindVLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"]:
        raise UsageError(f"{folder} lacks weights: {sorted(info['missing_keys'])[:3]}")
    try:
        model.attach_vision_tower(load_vision_tower(vision_model_path))
    except (VisionTowerError, ValueError) as error:
        raise UsageError(str(error)) from error
    return Assistant(model.to(device, dtype), tokenizer)


@dataclass
class Chat:
    """A conversation with memory: turns, the pictures they show, and room for the next answer."""

    assistant: Assistant
    sampling: Sampling
    max_length: int = 2048  # tokens of history, question and answer together
    turns: list[Turn] = field(default_factory=list)
    pixels: list[torch.Tensor] = field(default_factory=list)
    waiting: list[torch.Tensor] = field(default_factory=list)  # pictures for the next question

    def add_picture(self, picture: Image.Image) -> None:
        """The next question is about this picture, too."""
        self.waiting.append(preprocess(picture))

    def reset(self) -> None:
        """Forgets everything."""
        self.turns, self.pixels, self.waiting = [], [], []

    def ask(self, question: str, streamer: TextStreamer | None = None) -> str:
        """The answer, which becomes part of the history; given piece by piece to `streamer` as it grows.

        An <image> in the question is text; pictures come from `add_picture` and stand before it. When the history
        grows too long for the model, its oldest exchanges are dropped whole, with their pictures.
        Raises UsageError when the question alone is too long.
        """
        marks = f"{IMAGE_MARK}\n" * len(self.waiting)
        # A zero-width space keeps a typed mark from asking for a picture that is not there.
        turn = Turn("user", marks + question.replace(IMAGE_MARK, "<\u200bimage>"))
        turns, pixels = [*self.turns, turn], [*self.pixels, *self.waiting]
        limit = max(self.max_length - self.sampling.max_new_tokens, self.max_length // 2)
        while len(self.assistant.renderer.render_prompt(tuple(turns))) > limit:
            if len(turns) == 1:
                raise UsageError(f"the question is too long: with its pictures it passes {limit} tokens")
            pixels = pixels[turns[0].content.count(IMAGE_MARK) :]
            turns = turns[2:]  # a question and its answer
        answer = self.assistant.generate([tuple(turns)], pixels, self.sampling, streamer)[0]
        self.turns, self.pixels, self.waiting = [*turns, Turn("assistant", answer)], pixels, []
        return answer


@dataclass(frozen=True)
class Question:
    """One question with its history, pictures (by name) and reference answer."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    answer: str
    kind: str


def answer_in_batches(
    assistant: Assistant, questions: list[Question], load_pixels, batch_size: int, max_new_tokens: int
) -> Iterator[tuple[Question, str]]:
    """Greedy answers, in batches of prompts of like pictures. `load_pixels(name)` gives uint8 [3, 224, 224]."""
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        cache = {name: load_pixels(name) for name in dict.fromkeys(name for q in batch for name in q.images)}
        pixels = [cache[name] for question in batch for name in question.images]
        yield from zip(batch, assistant.generate([q.turns for q in batch], pixels, sampling), strict=True)
