"""A trained model that answers: loading it, prompts, batches of questions.

Legend: B prompts of a batch, T tokens, P placeholders of an image, V views of it: the whole and its tiles.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from model.conversation import Rendered, Renderer, Turn, count_images, with_tiles
from model.device import bf16_is_fast, usable_device
from model.errors import UsageError
from model.inference.generation import Prompt, Sampling, generate_batch, text_of
from model.inference.packed import PackedDecoder
from model.load import read_folder, read_native
from model.model_vlm import MiniMindVLM
from model.pixels import grid_of, preprocess, views_of


@dataclass
class Assistant:
    """A trained model with its renderer, ready to answer."""

    model: MiniMindVLM
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer = field(init=False)
    decoder: PackedDecoder = field(init=False, repr=False)

    def __post_init__(self):
        self.renderer = Renderer(self.tokenizer, self.model.config.image_tokens)
        self.model.eval()
        self.decoder = PackedDecoder(self.model)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """The image as this model's encoder sees it, with its tiles; see pixels.py."""
        return preprocess(image, self.model.pixel_settings)

    def views(self, pixels: torch.Tensor) -> torch.Tensor:
        """A preprocessed image and its tiles, uint8 [V, 3, S, S]."""
        return views_of(pixels, self.model.pixel_settings.size)

    @torch.inference_mode()
    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Patch vectors [V, P, W] of each preprocessed image; raises UsageError when there is no vision encoder."""
        if self.model.vision_encoder is None:
            raise UsageError("the model was loaded without a vision encoder and cannot see; give one by --vision_model_path")
        views = [self.views(image) for image in pixels]
        return list(self.model.encode_images(torch.cat(views).to(self.model.device)).split([len(some) for some in views]))

    def tiled(self, turns: tuple[Turn, ...], pixels: Iterable[torch.Tensor]) -> tuple[Turn, ...]:
        """The turns with placeholders for the tiles of their preprocessed images as well."""
        return with_tiles(turns, [grid_of(image, self.model.pixel_settings.size) for image in pixels])

    def generate(self, conversations: list[tuple[Turn, ...]], pixels: list[torch.Tensor], sampling: Sampling) -> list[str]:
        """Answers to B conversations at once. `pixels` are all images, preprocessed, in reading order; one that stands
        there several times is encoded once, and what conversations share up to their last image is read once."""
        unique = list(dict.fromkeys(pixels))
        encoded = self.encode(unique) if unique else []
        ends = list(accumulate(map(len, encoded)))
        numbers = {image: range(end - len(views), end) for image, views, end in zip(unique, encoded, ends, strict=True)}
        left, prompts = iter(pixels), []
        for turns in conversations:
            shown = list(islice(left, count_images(turns)))
            rendered = self.renderer.render_prompt(self.tiled(turns, shown))
            prompts.append(self.prompt(rendered, [number for image in shown for number in numbers[image]]))
        features = torch.cat(encoded) if encoded else ()  # [P, W] of a view by its number
        return [self.text(ids) for ids in generate_batch(self.decoder, prompts, features, sampling, self.renderer.im_end)]

    def prompt(self, rendered: Rendered, images: Sequence[int]) -> Prompt:
        """A rendered conversation whose images and tiles have these numbers."""
        return Prompt(rendered.ids, rendered.image_starts, tuple(images), self.model.config.image_tokens)

    def text(self, ids: list[int]) -> str:
        """Tokens as text."""
        return text_of(self.tokenizer, ids)

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of each token as it comes, joined that of all: a character spread over several tokens comes with the
        last of them, and "" with the others."""
        pending = []  # tokens since the last whole character
        for token in tokens:
            pending.append(token)
            piece = self.tokenizer.backend_tokenizer.decode(pending, skip_special_tokens=True)
            if piece.endswith("\ufffd"):
                yield ""
            else:
                pending = []
                yield piece
        if rest := self.text(pending):
            yield rest


def load_assistant(
    load_from: str, weight_file: Path, device: str, vision_model_path: str | None = None, tokenizer_path: str | None = None
) -> Assistant:
    """A model for answering: native weights when `load_from` is "model", otherwise a transformers folder. With the vision
    encoder and tokenizer of its training, as its sidecar tells, where none are given.

    In bf16 where the device multiplies that faster, else in fp32.
    Raises UsageError for anything missing or not fitting.
    """
    usable_device(device)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dtype = torch.bfloat16 if bf16_is_fast(torch.device(device)) else torch.float32
    if load_from == "model":
        loaded = read_native(weight_file, tokenizer_path, vision_model_path)
    else:
        loaded = read_folder(load_from, tokenizer_path, vision_model_path)
    return Assistant(loaded.model.to(device, dtype), loaded.tokenizer)
