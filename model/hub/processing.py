"""Images and text to model inputs, as transformers' processors do it, with the renderer and the pixels of training.

Legend: B rows of a batch, T tokens, N images of the whole batch in reading order, P placeholder tokens of an image.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image

from model.conversation import (
    IMAGE_PAD,
    IMAGE_PLACEHOLDER,
    TYPED_PLACEHOLDER,
    Rendered,
    Renderer,
    image_token_of,
    mark_tiles,
    parse_turns,
    with_tiles,
)
from model.minimind3 import SIGLIP2, SIGLIP2_TOKENS
from model.model_minimind import IGNORE_INDEX
from model.pixels import CLIP, PixelSettings, grid_of, normalize, preprocess, views_of

SOURCES = ("image", "url", "path", "base64", "image_url")  # keys of a message's image, of transformers and OpenAI


def open_image(source: Any) -> Image.Image:
    """A PIL image, uint8 array [H, W, 3], path, URL or base64 text as a PIL image. Raises ValueError for others."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3:
        return Image.fromarray(source)
    if isinstance(source, Path) or (isinstance(source, str) and len(source) < 4096 and Path(source).is_file()):
        return Image.open(source)
    if isinstance(source, str):
        return load_image(source)
    raise ValueError(f"an image is a PIL image, a uint8 array [H, W, 3], a path or a URL, not {type(source).__name__}")


class MiniMindVImageProcessor(BaseImageProcessor):
    """Images as the model's vision encoder wants them; see `preprocess` and `normalize` of pixels.py.

    The settings are those of transformers' image processors, and `tiles`; CLIP's by default. Raises ValueError for
    what cannot be done.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, tiles: int = 0, **kwargs):
        if "do_center_crop" not in kwargs:  # as older folders were written, all for CLIP
            kwargs = CLIP.to_dict() | {name: value for name, value in kwargs.items() if name != "size"}
        self.settings = replace(PixelSettings.from_dict(kwargs), tiles=tiles)
        super().__init__(tiles=tiles, **kwargs)

    def to_dict(self) -> dict:
        """What is written out."""
        return {name: value for name, value in super().to_dict().items() if name != "settings"}

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """One image or a list of them, as `open_image` takes them -> float `pixel_values` [N, 3, S, S], tiles among them."""
        sheets = self.sheets(images if isinstance(images, list | tuple) else [images])
        return BatchFeature(self.batch(sheets), tensor_type=return_tensors)

    def sheets(self, images: list) -> list[torch.Tensor]:
        """The images as `preprocess` of pixels.py gives them."""
        return [preprocess(open_image(image), self.settings) for image in images]

    def grids(self, sheets: list[torch.Tensor]) -> list[tuple[int, int]]:
        """Rows and columns of their tiles."""
        return [grid_of(sheet, self.settings.size) for sheet in sheets]

    def batch(self, sheets: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those as model inputs."""
        views = torch.cat([views_of(sheet, self.settings.size) for sheet in sheets])
        return {"pixel_values": normalize(views, self.settings)}


def pad_batch(rows: list[Rendered], image_tokens: int, pad_id: int, side: str, T: int) -> dict[str, torch.Tensor]:
    """Rows as `input_ids`, `attention_mask` and `labels` [B, T], padded on a side with `pad_id`, 0 and -100, and
    `image_positions` int64 [N * P], indices into B * T."""
    batch = {"input_ids": torch.full((len(rows), T), pad_id), "attention_mask": torch.zeros(len(rows), T, dtype=torch.int64),
             "labels": torch.full((len(rows), T), IGNORE_INDEX)}  # fmt: skip
    positions = []
    for number, row in enumerate(rows):
        start = T - len(row) if side == "left" else 0
        place = (number, slice(start, start + len(row)))
        batch["input_ids"][place], batch["attention_mask"][place] = torch.from_numpy(row.ids), 1
        batch["labels"][place] = torch.from_numpy(row.labels)
        positions += [torch.arange(image_tokens) + number * T + start + at for at in row.image_starts]
    return batch | {"image_positions": torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)}


def flatten_message(message: Any) -> tuple[Any, list]:
    """A message with its content as one text, and its images in reading order; None for one that is given apart.

    In a text an <image> is a placeholder. In a list of parts images are parts, so an <image> in a text part is text; a
    newline stands between an image and what is next to it, as in the training data. Raises ValueError for other parts.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list | tuple):
        shows = isinstance(content, str) and message.get("role") == "user"
        return message, [None] * content.count(IMAGE_PLACEHOLDER) if shows else []
    text, images, before = "", [], None
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "image", "image_url"):
            raise ValueError(f"a message part of type {kind!r}; known are 'text' and 'image'")
        addition = part["text"].replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER) if kind == "text" else IMAGE_PLACEHOLDER
        if kind != "text":
            source = next((part[key] for key in SOURCES if part.get(key) is not None), None)
            images.append(source["url"] if isinstance(source, dict) else source)
        text += "\n" * (before is not None and IMAGE_PLACEHOLDER in (before, addition)) + addition
        before = addition
    return {**message, "content": text}, images


def flatten_images(images: Any) -> list:
    """Nothing, an image, a list of them, or lists in a list, as one list."""
    if images is None:
        return []
    return [one for some in images for one in flatten_images(some)] if isinstance(images, list | tuple) else [images]


def render_text(renderer: Renderer, text: str) -> Rendered:
    """A prompt that is written out already, ChatML or not: special tokens in it are special, every <image> is an image,
    and the ids of written-out turns are those of the turns, in which the assistant's header is tokenized apart."""
    special, ids, starts = renderer.tokenizer.get_added_vocab(), [], []
    header = r"(?<=<\|im_start\|>)assistant\n"
    for piece in re.split(f"({'|'.join(map(re.escape, special))}|{header})", text):
        if piece in special:
            ids.append(special[piece])
        else:
            piece_ids, piece_starts = renderer.encode(piece, show_images=True)
            starts += [len(ids) + start for start in piece_starts]
            ids += piece_ids
    ids = np.array(ids, dtype=np.int64)
    return Rendered(ids, np.full_like(ids, IGNORE_INDEX), tuple(starts))


class MiniMindVProcessor(ProcessorMixin):
    """Tokenizer and image processor in one: `processor(images, text)` for texts with <image> placeholders,
    `processor.apply_chat_template(messages, tokenize=True, return_dict=True)` for conversations.

    Both give `input_ids`, `attention_mask` and, with images, `pixel_values` and `image_positions`, as PyTorch tensors,
    which `generate` and `forward` take as they are. Conversations become the ids of training, by its renderer, for which
    text is text: "<|im_end|>" or "@" in somebody's message is no boundary and no image.

    Options of both: `padding` True, or "max_length" to fill up to `max_length`; `padding_side` "left", where prompts want
    it, or "right". Nothing is ever cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int = 196, chat_template: str | None = None,
                 pixels: dict | None = None):  # fmt: skip
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)
        if pixels is None and image_token_of(tokenizer) == IMAGE_PAD:
            image_tokens, pixels = SIGLIP2_TOKENS, SIGLIP2
        # Made here rather than read: folders of the original project bring no settings.
        self.image_processor, self.image_tokens, self.pixels = MiniMindVImageProcessor(**pixels or {}), image_tokens, pixels
        self.renderer = Renderer(tokenizer, image_tokens)

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> list[str]:
        """As transformers' own, and the image processor's settings where other programs look for them."""
        self.image_processor.save_pretrained(save_directory)
        return super().save_pretrained(save_directory, **kwargs)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **options) -> BatchFeature:
        """B texts and their images, in one flat list or a list for each text. Special tokens in a text are special, as
        everywhere in transformers.

        Raises ValueError when placeholders and images do not match, with both counts.
        """
        texts = [text] if isinstance(text, str) else text
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError("text is missing: a text, or a list of them, with an <image> placeholder for each image")
        if isinstance(images, list | tuple) and any(isinstance(some, list | tuple) for some in images):
            marks, given = [one.count(IMAGE_PLACEHOLDER) for one in texts], [len(flatten_images(some)) for some in images]
            if marks != given:
                raise ValueError(f"the texts have {marks} {IMAGE_PLACEHOLDER} placeholders, but {given} images")
        sheets = self.image_processor.sheets(flatten_images(images))
        grids = iter(self.image_processor.grids(sheets))
        batch = self._batch([render_text(self.renderer, mark_tiles(one, grids)) for one in texts], sheets, **options)
        del batch["labels"]
        return batch

    def apply_chat_template(
        self, conversation: list, *, images: Any = None, add_generation_prompt: bool = False,
        continue_final_message: bool = False, tokenize: bool = False, return_dict: bool = False,
        return_assistant_tokens_mask: bool = False, processor_kwargs: dict | None = None, **options,
    ) -> str | list[str] | torch.Tensor | BatchFeature:  # fmt: skip
        """One conversation or a list of them as text, or with `tokenize` as ids, with `return_dict` as model inputs.

        A message's content is a text with <image> placeholders, or a list of parts; images come with the parts, and those
        of placeholders and of parts without one from `images`, in reading order. `return_assistant_tokens_mask` adds
        `assistant_masks` [B, T], 1 for the supervised tokens of training.
        Raises ValueError for messages the model does not know, and when images and placeholders do not match.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("add_generation_prompt begins an answer, continue_final_message continues one: not both")
        if unknown := [name for name in ("chat_template", "tools", "documents") if options.pop(name, None) is not None]:
            raise ValueError(f"{', '.join(unknown)}: conversations with this model have the one layout it was trained with")
        many = isinstance(conversation[0], list | tuple)
        flat = [[flatten_message(message) for message in one] for one in (conversation if many else [conversation])]
        turns = [parse_turns([message for message, _ in one]) for one in flat]
        if not tokenize:
            messages = [[vars(turn) for turn in one] for one in turns]
            return self.tokenizer.apply_chat_template(
                messages if many else messages[0], tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )  # fmt: skip
        shown, given = [image for one in flat for _, some in one for image in some], flatten_images(images)
        waiting = sum(image is None for image in shown)
        if waiting != len(given):
            raise ValueError(f"{waiting} {IMAGE_PLACEHOLDER} placeholders and parts wait for an image from images=, which has {len(given)}")
        given = iter(given)
        sheets = self.image_processor.sheets([next(given) if image is None else image for image in shown])
        grids = iter(self.image_processor.grids(sheets))
        turns = [with_tiles(one, grids) for one in turns]
        if add_generation_prompt or continue_final_message:
            rows = [self.renderer.render_prompt(one, continue_final_message) for one in turns]
        else:
            rows = [self.renderer.render_turns(one) for one in turns]
        batch = self._batch(rows, sheets, **options, **(processor_kwargs or {}))
        labels = batch.pop("labels")
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = (labels != IGNORE_INDEX).long()
        return batch if return_dict else batch["input_ids"]

    def _batch(
        self, rows: list[Rendered], sheets: list[torch.Tensor], padding: bool | str = True, padding_side: str = "left",
        max_length: int | None = None, return_tensors: str | None = "pt",
    ) -> BatchFeature:  # fmt: skip
        """Model inputs, labels included."""
        marks, longest = sum(len(row.image_starts) for row in rows), max(map(len, rows))
        views = sum(1 + rows * columns for rows, columns in self.image_processor.grids(sheets))
        if marks != views:
            raise ValueError(f"{marks} {IMAGE_PLACEHOLDER} placeholders, but {views} images")
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors {return_tensors!r}: only PyTorch tensors ('pt') are made")
        if padding == "max_length" and (max_length is None or max_length < longest):
            raise ValueError(f"padding to max_length {max_length}, but there are {longest} tokens, and none is cut")
        if not padding and any(len(row) != longest for row in rows):
            raise ValueError("rows of different lengths need padding")
        length = max_length if padding == "max_length" else longest
        batch = pad_batch(rows, self.image_tokens, self.tokenizer.pad_token_id, padding_side, length)
        if sheets:
            batch |= self.image_processor.batch(sheets)
        else:
            del batch["image_positions"]
        return BatchFeature(batch)
