"""Samples that bring along the images of others, to measure what a model owes to seeing its own."""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from itertools import cycle, islice

import numpy as np

from model.errors import SampleError

from .images import Ref, hash_of
from .sources import Permutation
from .vlm_dataset import BadSample, Example, ImageInput, VLMDataset

NEXT_IMAGE = 2  # in a key of random numbers: an order of images, neither an epoch's of samples nor a choice of them


class WithOthers(VLMDataset):
    """A data set whose examples hold in `others` as many images as their own, tiles included, and none of these.

    The different images that the samples `numbers` show stand in a circle, in an order chosen by `seed`. In place of an
    image comes the next in the circle that the sample does not show itself and that can be read. An example has no
    `others` where there is none.
    """

    def __init__(self, dataset: VLMDataset, numbers: Iterable[int], seed: int):
        super().__init__(dataset.samples, dataset.images, dataset.renderer, dataset.max_length, dataset.cache, dataset.settings)
        found: dict[int, tuple[int, int]] = {}  # by an image's hash a sample that shows it, and which of its images it is
        for number in numbers:
            with contextlib.suppress(SampleError):  # reported when it is read to be validated on
                for place, ref in enumerate(self.samples[number].images):
                    found.setdefault(int(hash_of(ref)), (int(number), place))
        order, images = Permutation(len(found), (seed, 0, 0, NEXT_IMAGE))(np.arange(len(found))), list(found.items())
        self.circle = [images[number] for number in order]
        self.places = {key: place for place, (key, _) in enumerate(self.circle)}

    def _item(self, index: int, images: dict[Ref, list[ImageInput]]) -> Example | BadSample:
        example = super()._item(index, images)
        if isinstance(example, BadSample) or not example.images:
            return example
        try:
            refs = self.samples[index].images
        except SampleError as error:  # a disk may fail at any time
            return BadSample(index, str(error))
        own, M, others = {int(hash_of(ref)) for ref in refs}, len(self.circle), []
        for ref in refs:
            start = self.places.get(int(hash_of(ref)), 0)  # an image that could not be read at the start is not in the circle
            following = (self.circle[(start + step) % M] for step in range(M))
            found = (views for key, at in following if key not in own and (views := self._read(*at, images)))
            others += islice(cycle(next(found, [])), len(images[ref]))
        return replace(example, others=tuple(others)) if len(others) == len(example.images) else example

    def _read(self, number: int, place: int, images: dict[Ref, list[ImageInput]]) -> list[ImageInput]:
        """An image and its tiles; nothing where it cannot be read, which its own sample reports."""
        with contextlib.suppress(SampleError):
            sample = self.samples[number]
            ref = sample.images[place]
            if ref not in images:
                images[ref] = self._views(ref, sample.where)
            return images[ref]
        return []
