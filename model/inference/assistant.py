"""A trained model that answers: loading it, prompts, batches of questions.

Legend: B prompts of a batch, T tokens, P placeholders of an image.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from model.conversation import Rendered, Renderer, Turn
from model.device import bf16_is_fast, usable_device
from model.errors import UsageError
from model.inference.generation import Prompt, Sampling, generate_batch
from model.inference.packed import PackedDecoder
from model.load import read_folder, read_native
from model.model_vlm import MiniMindVLM
from model.vision import normalize


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

    @torch.inference_mode()
    def encode(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        """Patch vectors [N, P, W] of images uint8 [3, 224, 224]; raises UsageError when there is no vision encoder."""
        if self.model.vision_encoder is None:
            raise UsageError("the model was loaded without a vision encoder and cannot see; give one by --vision_model_path")
        return self.model.encode_images(normalize(torch.stack(pixels).to(self.model.device)))

    def generate(self, conversations: list[tuple[Turn, ...]], pixels: list[torch.Tensor], sampling: Sampling) -> list[str]:
        """Answers to B conversations at once. `pixels` are uint8 [3, 224, 224], all images in reading order; one that
        stands there several times is encoded once, and what conversations share up to their last image is read once."""
        number = {image: place for place, image in enumerate(dict.fromkeys(pixels))}
        numbers, prompts = iter([number[image] for image in pixels]), []
        for turns in conversations:
            rendered = self.renderer.render_prompt(turns)
            prompts.append(self.prompt(rendered, [next(numbers) for _ in rendered.image_starts]))
        features = self.encode(list(number)) if number else ()  # [P, W] of an image by its number
        return [self.text(ids) for ids in generate_batch(self.decoder, prompts, features, sampling, self.renderer.im_end)]

    def prompt(self, rendered: Rendered, images: Sequence[int]) -> Prompt:
        """A rendered conversation whose images have these numbers."""
        return Prompt(rendered.ids, rendered.image_starts, tuple(images), self.model.config.image_tokens)

    def text(self, ids: list[int]) -> str:
        """Tokens as text, without half a character at its end."""
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")

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
        loaded = read_folder(Path(load_from), tokenizer_path, vision_model_path)
    return Assistant(loaded.model.to(device, dtype), loaded.tokenizer)
