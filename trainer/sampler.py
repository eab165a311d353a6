"""The order of samples: a pure function of (seed, epoch), dealt to ranks and micro-batches, resumable anywhere.

Legend: n samples in the data set, R ranks, b samples a rank and micro-batch, a micro-batches an update; an update takes
G = b * R * a samples. The epoch's order is cut into updates, an update into global micro-batches of b * R samples, and
rank r takes every R-th sample of those. So R ranks with b samples each do the same updates as one rank with b * R, and
a run may go on with another R: all it needs to know is how many samples of the epoch are done.
"""

import math
from collections.abc import Iterator

import numpy as np


class ResumableSampler:
    """Yields this rank's micro-batches of one epoch, as lists of sample numbers."""

    def __init__(self, size: int, batch_size: int, accumulation_steps: int, seed: int, rank: int = 0, ranks: int = 1):
        self.size, self.batch_size, self.accumulation_steps = size, batch_size, accumulation_steps
        self.seed, self.rank, self.ranks = seed, rank, ranks

    @property
    def samples_per_update(self) -> int:
        """G; the last update of an epoch may take fewer."""
        return self.batch_size * self.ranks * self.accumulation_steps

    @property
    def updates_per_epoch(self) -> int:
        """Updates of a whole epoch; the last, smaller group is one of its own."""
        return math.ceil(self.size / self.samples_per_update)

    def order(self, epoch: int) -> np.ndarray:
        """All n sample numbers, int64 [n], shuffled by (seed, epoch) alone."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.size)

    def updates(self, epoch: int, skip: int = 0) -> Iterator[list[list[int]]]:
        """For each update left after `skip` samples of the epoch: this rank's micro-batches.

        All ranks get the same number of micro-batches; at the very end of an epoch one may be empty.
        """
        order = self.order(epoch)
        stride = self.batch_size * self.ranks
        for start in range(skip, self.size, self.samples_per_update):
            group = order[start : start + self.samples_per_update]
            yield [group[at : at + stride][self.rank :: self.ranks].tolist() for at in range(0, len(group), stride)]
