"""The order of samples: a pure function of (seed, epoch), dealt to ranks and micro-batches, resumable anywhere.

Legend: n samples in the data set, R ranks, b samples a rank and micro-batch, a micro-batches an update; an update takes
G = b * R * a samples. The epoch's order is cut into updates, an update into global micro-batches of b * R samples, and
those are dealt to the ranks. So R ranks with b samples each do the same updates as one rank with b * R, and a run may go
on with another R: all it needs to know is how many samples of the epoch are done.

Samples of like lengths stand together, so that little of a batch is padding: the shuffled order is cut into windows of
WINDOW global micro-batches, a window is sorted by length (in steps of 8 tokens) and cut into micro-batches, and these are shuffled again.
"""

import math
from collections.abc import Iterator

import numpy as np

WINDOW = 64  # global micro-batches that are sorted together
STEP = 8  # tokens; finer differences stay shuffled: a batch is padded to a multiple of 8 anyway, and the length of a short
# text says much about its content, so that exactly sorted batches would be one-sided


class ResumableSampler:
    """Yields this rank's micro-batches of one epoch, as lists of sample numbers.

    `lengths` [n] are the samples' lengths, exact or not; None leaves the order shuffled alone. `grain` is the number of
    samples that the order keeps together: b * R of the run's start, also where a resumed run has another R.
    """

    def __init__(self, size: int, batch_size: int, accumulation_steps: int, seed: int, rank: int = 0, ranks: int = 1,
                 lengths: np.ndarray | None = None):  # fmt: skip
        self.size, self.batch_size, self.accumulation_steps = size, batch_size, accumulation_steps
        self.seed, self.rank, self.ranks, self.lengths = seed, rank, ranks, lengths
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

    def order(self, epoch: int) -> np.ndarray:
        """All n sample numbers, int64 [n], shuffled by (seed, epoch), like lengths together."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.size)
        if self.lengths is None:
            return order
        for start in range(0, self.size, WINDOW * self.grain):
            window = order[start : start + WINDOW * self.grain]
            window = window[np.argsort(self.lengths[window] // STEP, kind="stable")]
            whole = len(window) // self.grain * self.grain  # a last, smaller group stays last
            shuffled = rng.permutation(window[:whole].reshape(-1, self.grain)).flatten()
            order[start : start + len(window)] = np.concatenate([shuffled, window[whole:]])
        return order

    def deal(self, samples: np.ndarray) -> list[int]:
        """This rank's part of a global micro-batch: to and fro along the lengths, so that ranks have like loads."""
        if self.lengths is not None:
            samples = samples[np.argsort(self.lengths[samples], kind="stable")]
        turn, place = np.divmod(np.arange(len(samples)), self.ranks)
        return samples[np.where(turn % 2, self.ranks - 1 - place, place) == self.rank].tolist()

    def updates(self, epoch: int, skip: int = 0) -> Iterator[list[list[int]]]:
        """For each update left after `skip` samples of the epoch: this rank's micro-batches.

        All ranks get the same number of micro-batches; at the very end of an epoch one may be empty.
        """
        order = self.order(epoch)
        stride = self.batch_size * self.ranks
        for start in range(skip, self.size, self.samples_per_update):
            group = order[start : start + self.samples_per_update]
            yield [self.deal(group[at : at + stride]) for at in range(0, len(group), stride)]
