"""The order of samples: a pure function of (seed, epoch), dealt to ranks and micro-batches, resumable anywhere.

Legend: n samples in the data set, R ranks, b samples a rank and micro-batch, a micro-batches an update; an update takes
G = b * R * a samples. The epoch's order is cut into updates, an update into global micro-batches of b * R samples, and
those are dealt to the ranks. So R ranks with b samples each do the same updates as one rank with b * R, and a run may
continue with another R: all it needs to know is how many samples of the epoch are done.

Samples of like lengths stand together, so that little of a batch is padding: the shuffled order is cut into windows of
WINDOW global micro-batches, a window is sorted by length (in steps of 8 tokens) and cut into micro-batches, and these are
shuffled again.

Nothing here grows with n: a window is computed when its turn comes.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from dataset.sources import Order, Permutation

WINDOW = 64  # global micro-batches that are sorted together
STEP = 8  # tokens; finer differences stay shuffled: a batch is padded to a multiple of 8 anyway, and the length of a short
# text says much about its content, so that exactly sorted batches would be one-sided


class ResumableSampler:
    """Yields this rank's micro-batches of one epoch, as lists of sample numbers.

    `size` is n; `lengths` gives the lengths of samples by number, exact or not, and None leaves the order as it is.
    `order` gives an epoch's shuffled order. `grain` is the number of samples that the order keeps together: b * R of the
    run's start, also where a resumed run has another R.
    """

    def __init__(self, size: int, batch_size: int, accumulation_steps: int, seed: int, rank: int = 0, ranks: int = 1,
                 lengths: Callable[[np.ndarray], np.ndarray] | None = None,
                 order: Callable[[int], Order] | None = None):  # fmt: skip
        self.size, self.batch_size, self.accumulation_steps = size, batch_size, accumulation_steps
        self.seed, self.rank, self.ranks, self.lengths = seed, rank, ranks, lengths
        self.order = order or (lambda epoch: Permutation(size, (seed, epoch)))
        self.grain = batch_size * ranks

    @property
    def samples_per_update(self) -> int:
        """G; the last update of an epoch may take fewer."""
        return self.batch_size * self.ranks * self.accumulation_steps

    @property
    def updates_per_epoch(self) -> int:
        """Updates of a whole epoch; the last, smaller group is one of its own."""
        return math.ceil(self.size / self.samples_per_update)

    def count_updates(self, epochs: int, epoch: int, skip: int) -> int:
        """Updates left until the end of `epochs` when `epoch` of them and `skip` samples of the next are done."""
        if epoch >= epochs:
            return 0
        running = math.ceil((self.size - skip) / self.samples_per_update)
        return running + (epochs - epoch - 1) * self.updates_per_epoch

    def samples(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """The epoch's sample numbers from place `start` on, all ranks', a window at a time."""
        order, step = self.order(epoch), WINDOW * self.grain
        for number in range(start // step, math.ceil(self.size / step)):
            window = order(np.arange(number * step, min(self.size, (number + 1) * step)))
            if self.lengths is not None:
                window = self.like_lengths_together(window, (self.seed, epoch, number))
            yield window[max(0, start - number * step) :]

    def like_lengths_together(self, window: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
        """The samples of a window in groups of like lengths, the groups in a random order."""
        window = window[np.argsort(self.lengths(window) // STEP, kind="stable")]
        whole = len(window) // self.grain * self.grain  # a last, smaller group stays last
        groups = np.random.default_rng(key).permutation(window[:whole].reshape(-1, self.grain))
        return np.concatenate([groups.flatten(), window[whole:]])

    def deal(self, samples: np.ndarray) -> list[int]:
        """This rank's part of a global micro-batch: to and fro along the lengths, so that ranks have like loads."""
        if self.lengths is not None:
            samples = samples[np.argsort(self.lengths(samples), kind="stable")]
        turn, place = np.divmod(np.arange(len(samples)), self.ranks)
        return samples[np.where(turn % 2, self.ranks - 1 - place, place) == self.rank].tolist()

    def updates(self, epoch: int, skip: int = 0) -> Iterator[list[list[int]]]:
        """For each update left after `skip` samples of the epoch: this rank's micro-batches.

        All ranks get the same number of micro-batches; at the very end of an epoch one may be empty.
        """
        stride, rest, windows = self.batch_size * self.ranks, np.empty(0, dtype=np.int64), self.samples(epoch, skip)
        for start in range(skip, self.size, self.samples_per_update):
            wanted = min(self.samples_per_update, self.size - start)
            while len(rest) < wanted:
                rest = np.concatenate([rest, next(windows)])
            group, rest = rest[:wanted], rest[wanted:]
            yield [self.deal(group[at : at + stride]) for at in range(0, len(group), stride)]
