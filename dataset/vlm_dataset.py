"""Samples to tensors, and tensors to batches.

Legend: B rows, T' tokens of a row of the batch, S supervised tokens, N images of the whole batch, H pixels a side, P
placeholders and patch vectors of an image, W width of the vision encoder. A tile is an image like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from model.conversation import Renderer, with_tiles
from model.errors import SampleError
from model.model_minimind import IGNORE_INDEX, find_loss_positions
from model.pixels import CLIP, PixelSettings, grid_of, views_of

from .images import ImageSource, Ref
from .jsonl import Sample

if TYPE_CHECKING:
    from .features import FeatureCache  # which only --cache_features loads

MULTIPLE = 8  # of tokens, the length of a batch: fewer shapes to compile for, and what matrix units like
NO_PIXELS = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
NO_FEATURES = torch.empty(0, 0, 0, dtype=torch.bfloat16)


@dataclass(frozen=True, eq=False)
class ImageInput:
    """One image of a sample: its pixels, or what the encoder made of them earlier."""

    pixels: torch.Tensor | None = None  # uint8 [3, H, H]
    features: torch.Tensor | None = None  # bf16 [P, W]
    entry: tuple[int, int] = (-1, 0)  # in the feature cache, if there is one: slot, and signature of the image's file
    note: str = ""  # that it is truncated
    grid: tuple[int, int] = (0, 1)  # rows and columns of the tiles that follow it


@dataclass(frozen=True)
class Example:
    """One sample, ready to be collated. `index` is its number in the data set."""

    index: int
    ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # int64 [T]
    image_starts: tuple[int, ...]
    images: tuple[ImageInput, ...]  # the same object where the same image is shown again in a batch
    others: tuple[ImageInput, ...] = ()  # of other samples, as many (others.py)


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on, and why."""

    index: int
    reason: str


class VLMDataset(Dataset):
    """Item i is an Example, or a BadSample: what to do about those is the trainer's decision."""

    def __init__(self, samples: Sequence[Sample], images: ImageSource, renderer: Renderer, max_length: int,
                 cache: "FeatureCache | None" = None, settings: PixelSettings = CLIP):  # fmt: skip
        self.samples, self.images, self.renderer, self.max_length = samples, images, renderer, max_length
        self.cache, self.settings = cache, settings

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example | BadSample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Example | BadSample]:
        """The items of a batch, an image that stands there several times being read once. DataLoader calls this."""
        images: dict[Ref, list[ImageInput]] = {}
        return [self._item(index, images) for index in indices]

    def _item(self, index: int, images: dict[Ref, list[ImageInput]]) -> Example | BadSample:
        try:
            sample = self.samples[index]
            for ref in sample.images:
                if ref not in images:
                    images[ref] = self._views(ref, sample.where)
            turns = with_tiles(sample.turns, [images[ref][0].grid for ref in sample.images])
            rendered = self.renderer.render(replace(sample, turns=turns), self.max_length)
        except SampleError as error:
            return BadSample(index, str(error))
        shown = tuple(view for ref in sample.images for view in images[ref])
        return Example(index, rendered.ids, rendered.labels, rendered.image_starts, shown)

    def _views(self, ref: Ref, where: str) -> list[ImageInput]:
        """An image and its tiles."""
        notes: list[str] = []
        if self.cache is not None:
            slot, signature = self.cache.slot_of(ref), self.images.signature(ref, where)
            rows, columns = self.images.grid(ref, where, self.settings.tiles) if self.settings.tiles else (0, 1)
            entries = [(slot + number, signature) for number in range(1 + rows * columns)]
            features = [self.cache.read(*entry) for entry in entries]
            if all(one is not None for one in features):
                return [ImageInput(None, one, entry, "", (rows, columns)) for one, entry in zip(features, entries, strict=True)]
        pixels = self.images.pixels(ref, where, notes, self.settings)
        grid, views = grid_of(pixels, self.settings.size), views_of(pixels, self.settings.size)
        if self.cache is None:
            entries = [ImageInput.entry] * len(views)
        elif grid != (rows, columns):
            raise SampleError("an image's EXIF block does not say how it is turned", where)
        return [ImageInput(view, None, entry, "".join(notes), grid) for view, entry in zip(views, entries, strict=True)]


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Rows are padded on the right to the longest of them, rounded up to a multiple of 8.

    Its images are U different ones that the encoder has yet to see and K that come from the feature cache. N are shown, flat
    in reading order: image i is number `image_index[i]` of those U + K.
    """

    ids: torch.Tensor  # int64 [B, T']
    labels: torch.Tensor  # int64 [B, T'], -100 where there is no loss
    attention_mask: torch.Tensor  # int64 [B, T'], 0 for padding
    loss_positions: torch.Tensor  # int64 [S], indices into B * T' of the positions that predict a supervised token
    pixels: torch.Tensor  # uint8 [U, 3, H, H]
    features: torch.Tensor  # bf16 [K, P, W]
    image_index: torch.Tensor  # int64 [N]
    other_index: torch.Tensor  # int64 [N] likewise, of other samples' images in the places of these; else [0]
    image_positions: torch.Tensor  # int64 [N * P], indices into B * T'
    entries: tuple[tuple[int, int], ...] = ()  # of the U images, in the feature cache
    indices: tuple[int, ...] = ()  # the samples' numbers in the data set
    tokens: int = 0  # real ones, padding apart
    supervised: int = 0  # tokens that carry loss
    bad: tuple[BadSample, ...] = ()
    truncated: tuple[BadSample, ...] = ()  # good ones, with a truncated image of which nearly all is there

    def _map(self, function) -> "Batch":
        return replace(self, **{name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)})

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
    others = [image for example in examples for image in example.others]
    different = dict.fromkeys(shown + others)
    new = [image for image in different if image.features is None]
    cached = [image for image in different if image.features is not None]
    number = {image: number for number, image in enumerate(new + cached)}
    loss_positions = find_loss_positions(labels)
    return Batch(
        ids=ids, labels=labels, attention_mask=mask, loss_positions=loss_positions,
        pixels=torch.stack([image.pixels for image in new]) if new else NO_PIXELS,
        features=torch.stack([image.features for image in cached]) if cached else NO_FEATURES,
        image_index=torch.tensor([number[image] for image in shown], dtype=torch.int64),
        other_index=torch.tensor([number[image] for image in others], dtype=torch.int64),
        entries=tuple(image.entry for image in new),
        image_positions=torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64),
        indices=tuple(example.index for example in examples),
        tokens=int(mask.sum()), supervised=len(loss_positions), bad=bad,
        truncated=tuple(BadSample(own.index, image.note) for own in examples for image in own.images if image.note),
    )  # fmt: skip
