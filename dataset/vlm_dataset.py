"""Samples to tensors, and tensors to batches.

Legend: B rows, T' tokens of a row of the batch, S supervised tokens, N images of the whole batch, P
placeholders and patch vectors of an image, W width of the vision encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from model.conversation import IMAGE_PLACEHOLDER, Renderer, Turn, parse_turns
from model.errors import SampleError, shown
from model.model_minimind import IGNORE_INDEX, find_loss_positions

from .features import FeatureCache
from .images import ImageSource, Ref

MULTIPLE = 8  # of tokens, the length of a batch: fewer shapes to compile for, and what matrix units like
NO_PIXELS = torch.empty(0, 3, 224, 224, dtype=torch.uint8)
NO_FEATURES = torch.empty(0, 0, 0, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Sample:
    """A checked sample: turns, and the images they show in reading order, by name or as the bytes of an image file.
    `where` is "file:line"."""

    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    where: str = ""
    kind: str = ""  # of the answers, for scoring; optional


def parse_sample(row: Any, where: str = "", images: tuple[str | bytes, ...] | None = None) -> Sample:
    """A decoded json line as a Sample; `images` replace its field `image` where a format holds them itself.

    Raises SampleError for missing keys, wrong types, unknown roles, no answer to learn from, and <image> placeholders that do
    not match the images; of a format that convert knows it names the command.
    """
    try:
        return _parse(row, where, images)
    except SampleError as error:
        from .foreign import remedy  # for an error alone

        raise SampleError(error.problem + remedy(row, where), where) from error


def _parse(row: Any, where: str, images: tuple[str | bytes, ...] | None) -> Sample:
    if not isinstance(row, dict):
        raise SampleError(f"a sample is an object with 'conversations', not {type(row).__name__}", where)
    turns = parse_turns(row.get("conversations"), where)
    images = parse_images(row.get("image"), where) if images is None else images
    placeholders = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if placeholders != len(images):
        raise SampleError(f"{placeholders} {IMAGE_PLACEHOLDER} placeholders in the user's turns, but {len(images)} images", where)
    if not any(turn.role == "assistant" for turn in turns):
        raise SampleError("no assistant turn: nothing to learn from", where)
    return Sample(turns, images, where, "" if row.get("kind") is None else str(row["kind"]))


def parse_images(value: Any, where: str = "") -> tuple[str, ...]:
    """The `image` field: absent, "a.jpg", "a.jpg, b.jpg" or a list."""
    if value is None or value == "":
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise SampleError(f"'image' must be a file name, several with commas between, or a list: {shown(value)}", where)
    return tuple(name.strip() for name in names)


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image of a sample: its pixels, or what the encoder made of them earlier."""

    pixels: torch.Tensor | None = None  # uint8 [3, 224, 224]
    features: torch.Tensor | None = None  # bf16 [P, W]
    slot: int = -1  # place in the feature cache; -1 without one
    signature: int = 0  # of the image's file, for the cache
    note: str = ""  # of a file that ends early, and that is used


@dataclass(frozen=True)
class Example:
    """One sample, ready to be collated. `index` is its number in the data set."""

    index: int
    ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # int64 [T]
    image_starts: tuple[int, ...]
    images: tuple[ImageInput, ...]  # the same object where the same image is shown again in a batch


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on, or not on the whole of it, and why."""

    index: int
    reason: str


class VLMDataset(Dataset):
    """Item i is an Example, or a BadSample: what to do about those is the trainer's decision."""

    def __init__(self, samples: Sequence[Sample], images: ImageSource, renderer: Renderer, max_length: int,
                 cache: FeatureCache | None = None):  # fmt: skip
        self.samples, self.images, self.renderer, self.max_length = samples, images, renderer, max_length
        self.cache = cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example | BadSample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Example | BadSample]:
        """The items of a batch, an image that stands there several times being read once. DataLoader calls this."""
        images: dict[Ref, ImageInput] = {}
        return [self._item(index, images) for index in indices]

    def _item(self, index: int, images: dict[Ref, ImageInput]) -> Example | BadSample:
        try:
            sample = self.samples[index]
            rendered = self.renderer.render(sample, self.max_length)
            slots = self.cache.slots_of(index) if self.cache else [-1] * len(sample.images)
            if len(slots) != len(sample.images):
                raise SampleError("other images than at the start: the file has changed; start again", sample.where)
            for ref, slot in zip(sample.images, slots, strict=True):
                if ref not in images:
                    images[ref] = self._image(ref, slot, sample.where)
        except SampleError as error:
            return BadSample(index, str(error))
        shown = tuple(images[ref] for ref in sample.images)
        return Example(index, rendered.ids, rendered.labels, rendered.image_starts, shown)

    def _image(self, ref: Ref, slot: int, where: str) -> ImageInput:
        signature = self.images.signature(ref, where) if self.cache else 0
        features = self.cache.read(slot, signature) if self.cache else None
        if features is not None:
            return ImageInput(features=features, slot=slot, signature=signature)
        notes: list[SampleError] = []
        return ImageInput(pixels=self.images.pixels(ref, where, notes), slot=slot, signature=signature, note="".join(map(str, notes)))


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Rows are padded on the right to the longest of them, rounded up to a multiple of 8.

    Its N images, flat in reading order, are U different ones that the encoder has yet to see and K that come from the
    feature cache: image i is number `image_index[i]` of those U + K.
    """

    ids: torch.Tensor  # int64 [B, T']
    labels: torch.Tensor  # int64 [B, T'], -100 where there is no loss
    attention_mask: torch.Tensor  # int64 [B, T'], 0 for padding
    loss_positions: torch.Tensor  # int64 [S], indices into B * T' of the positions that predict a supervised token
    pixels: torch.Tensor  # uint8 [U, 3, 224, 224]
    features: torch.Tensor  # bf16 [K, P, W]
    image_index: torch.Tensor  # int64 [N]
    image_positions: torch.Tensor  # int64 [N * P], indices into B * T'
    slots: tuple[int, ...] = ()  # of the U images, in the feature cache
    signatures: tuple[int, ...] = ()  # likewise
    indices: tuple[int, ...] = ()  # the samples' numbers in the data set
    tokens: int = 0  # real ones, padding apart
    supervised: int = 0  # tokens that carry loss
    bad: tuple[BadSample, ...] = field(default=())
    truncated: tuple[BadSample, ...] = ()  # good ones, of which an image's file ends early

    def _map(self, function) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in tensors.items() if isinstance(v, torch.Tensor)})

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`; the transfer does not wait when the batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """What DataLoader(pin_memory=True) calls."""
        return self._map(lambda tensor: tensor.pin_memory())


def collate(items: list[Example | BadSample], pad_id: int, image_tokens: int) -> Batch:
    """Examples as one Batch; bad samples are carried along and take no row.

    A batch without any good sample becomes one row of padding that carries no loss, so that every rank of a
    distributed run does the same number of steps.
    """
    examples = [item for item in items if isinstance(item, Example)]
    bad = tuple(item for item in items if isinstance(item, BadSample))
    rows, longest = max(1, len(examples)), max((len(example.ids) for example in examples), default=1)
    longest = -(-longest // MULTIPLE) * MULTIPLE
    ids = torch.full((rows, longest), pad_id, dtype=torch.int64)
    labels = torch.full((rows, longest), IGNORE_INDEX, dtype=torch.int64)
    mask = torch.zeros((rows, longest), dtype=torch.int64)
    positions = []
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.from_numpy(example.ids)
        labels[row, :length] = torch.from_numpy(example.labels)
        mask[row, :length] = 1
        positions += [torch.arange(image_tokens) + start + row * longest for start in example.image_starts]
    shown = [image for example in examples for image in example.images]
    different = dict.fromkeys(shown)
    new = [image for image in different if image.features is None]
    cached = [image for image in different if image.features is not None]
    number = {image: number for number, image in enumerate(new + cached)}
    loss_positions = find_loss_positions(labels)
    return Batch(
        ids=ids, labels=labels, attention_mask=mask, loss_positions=loss_positions,
        pixels=torch.stack([image.pixels for image in new]) if new else NO_PIXELS,
        features=torch.stack([image.features for image in cached]) if cached else NO_FEATURES,
        image_index=torch.tensor([number[image] for image in shown], dtype=torch.int64),
        slots=tuple(image.slot for image in new), signatures=tuple(image.signature for image in new),
        image_positions=torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64),
        indices=tuple(example.index for example in examples),
        tokens=int(mask.sum()), supervised=len(loss_positions), bad=bad,
        truncated=tuple(BadSample(example.index, note) for example in examples if (note := "; ".join(p.note for p in example.images if p.note))),
    )  # fmt: skip
