"""Samples to tensors, and tensors to batches.

Legend: B rows, T' tokens of the longest row of the batch, N pictures of the whole batch, P placeholders of a picture.
"""

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from model.vision import preprocess

from .conversation import IGNORE_INDEX, Renderer
from .errors import SampleError
from .sources import ImageSource, SampleSource


@dataclass(frozen=True)
class Example:
    """One sample, ready to be collated. `index` is its number in the data set."""

    index: int
    ids: np.ndarray  # int64 [T]
    labels: np.ndarray  # int64 [T]
    image_starts: tuple[int, ...]
    pixels: tuple[torch.Tensor, ...]  # one uint8 [3, 224, 224] a picture


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be trained on, and why."""

    index: int
    reason: str


class VLMDataset(Dataset):
    """Item i is an Example, or a BadSample: what to do about those is the trainer's decision."""

    def __init__(self, samples: SampleSource, images: ImageSource, renderer: Renderer, max_length: int):
        self.samples, self.images, self.renderer, self.max_length = samples, images, renderer, max_length

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example | BadSample:
        try:
            sample = self.samples[index]
            rendered = self.renderer.render(sample, self.max_length)
            pixels = tuple(self._pixels(name, sample.where) for name in sample.images)
        except SampleError as error:
            return BadSample(index, str(error))
        return Example(index, rendered.ids, rendered.labels, rendered.image_starts, pixels)

    def _pixels(self, name: str, where: str) -> torch.Tensor:
        picture = self.images.load(name, where)
        try:
            return preprocess(picture)
        except (OSError, ValueError, MemoryError) as error:
            raise SampleError(f"picture {name!r} cannot be converted: {error}", where) from error


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Rows are padded on the right to the longest of them, pictures lie flat in reading order."""

    ids: torch.Tensor  # int64 [B, T']
    labels: torch.Tensor  # int64 [B, T'], -100 where there is no loss
    attention_mask: torch.Tensor  # int64 [B, T'], 0 for padding
    pixels: torch.Tensor  # uint8 [N, 3, 224, 224]
    image_positions: torch.Tensor  # int64 [N * P], indices into the flattened [B * T']
    indices: tuple[int, ...] = ()  # the samples' numbers in the data set
    tokens: int = 0  # real ones, padding apart
    supervised: int = 0  # tokens that carry loss
    bad: tuple[BadSample, ...] = field(default=())

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
    pixels = [picture for example in examples for picture in example.pixels]
    return Batch(
        ids=ids, labels=labels, attention_mask=mask,
        pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, 224, 224, dtype=torch.uint8),
        image_positions=torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64),
        indices=tuple(example.index for example in examples),
        tokens=int(mask.sum()), supervised=int((labels[:, 1:] != IGNORE_INDEX).sum()), bad=bad,
    )  # fmt: skip
