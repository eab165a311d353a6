"""Orders of samples that need no memory: a place in an epoch tells its sample, for any number of samples.

An order is a function from places, int64 [k], to samples' numbers, int64 [k].
"""

import math
from collections.abc import Callable

import numpy as np

Order = Callable[[np.ndarray], np.ndarray]

ROUNDS = 6


class Permutation:
    """A bijection of [0, size) chosen by `key`, a tuple of integers; time and memory do not depend on `size`.

    A Feistel network (Luby and Rackoff, SIAM J. Comput. 17, 1988) over the smallest even number of bits that holds
    `size`; what falls outside goes through again until it falls inside (cycle walking; Black and Rogaway, CT-RSA 2002),
    which takes less than four rounds on average, but for the smallest sizes.
    """

    def __init__(self, size: int, key: tuple[int, ...]):
        self.size = size
        self.half = np.uint64(max(3, math.ceil((size - 1).bit_length() / 2)))
        self.mask = np.uint64(2 ** int(self.half) - 1)
        self.keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        numbers = self._mix(np.asarray(places).astype(np.uint64))
        while (outside := np.flatnonzero(numbers >= self.size)).size:
            numbers[outside] = self._mix(numbers[outside])
        return numbers.astype(np.int64)

    def _mix(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self.half, numbers & self.mask
        for key in self.keys:
            left, right = right, left ^ (scramble(right ^ key) & self.mask)
        return left << self.half | right


def scramble(bits: np.ndarray) -> np.ndarray:
    """A hash of uint64: the last steps of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)


class ShuffledBlocks:
    """Whole blocks in a shuffled order, the samples of each in their own.

    `starts` int64 [blocks + 1]: where the blocks begin, and the end of the last.
    """

    def __init__(self, starts: np.ndarray, key: tuple[int, ...]):
        blocks = Permutation(len(starts) - 1, key)(np.arange(len(starts) - 1))
        self.begins, sizes = starts[blocks], np.diff(starts)[blocks]
        self.bounds = np.concatenate([[0], np.cumsum(sizes)])  # of the shuffled blocks, in places

    def __call__(self, places: np.ndarray) -> np.ndarray:
        block = np.searchsorted(self.bounds, places, side="right") - 1
        return self.begins[block] + places - self.bounds[block]


class BlockOrder:
    """An order for samples that are read in blocks, such as parquet's row groups: blocks are shuffled, and the samples
    of `window` blocks that follow each other. So a loader process reads each block once, and keeps few at a time."""

    def __init__(self, starts: np.ndarray, key: tuple[int, ...], window: int):
        self.key, self.blocks = key, ShuffledBlocks(starts, key)
        bounds = self.blocks.bounds
        self.windows = np.unique(np.concatenate([bounds[::window], bounds[-1:]]))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        window = np.searchsorted(self.windows, places, side="right") - 1
        shuffled = np.empty_like(places)
        for number in np.unique(window):
            begin, end = self.windows[number : number + 2].tolist()
            own = window == number
            shuffled[own] = Permutation(end - begin, (*self.key, int(number)))(places[own] - begin) + begin
        return self.blocks(shuffled)


class EpochOrder:
    """The order of one epoch over several sources, source s taking part with `weights[s]` times its samples.

    `starts` holds the bounds of each source's blocks, and `blocked` whether it is read in blocks at all. With a weight other
    than 1 a source goes on where it stopped the epoch before: no sample comes again until all have come.
    Sources with blocks are mixed with the others in stretches of a block's size; samples are shuffled within `window`
    blocks or stretches.
    """

    def __init__(self, starts: list[np.ndarray], blocked: list[bool], weights: list[float], seed: int, epoch: int, window: int = 1):
        self.starts, self.blocked, self.weights, self.seed, self.epoch = starts, blocked, weights, seed, epoch
        self.sizes = [int(own[-1]) for own in starts]
        self.shares = [share(size, weight) for size, weight in zip(self.sizes, weights, strict=True)]
        self.bounds = np.concatenate([[0], np.cumsum(self.shares)])
        self.begins = np.concatenate([[0], np.cumsum(self.sizes)])  # of the sources, in samples' numbers
        if not any(blocked):
            self.outer = Permutation(int(self.bounds[-1]), (seed, epoch))
        else:
            self.outer = BlockOrder(self._stretches(), (seed, epoch), window)

    def _stretches(self) -> np.ndarray:
        steps = [max(1, size // (len(own) - 1)) for size, own in zip(self.sizes, self.starts, strict=True)]
        usual = max(step for step, blocked in zip(steps, self.blocked, strict=True) if blocked)
        parts = []
        for s, own in enumerate(self.starts):
            step = steps[s] if self.blocked[s] else usual
            whole = self.weights[s] == 1 and self.blocked[s]
            parts.append(self.bounds[s] + (own[:-1] if whole else np.arange(0, self.shares[s], step)))
        return np.concatenate([*parts, self.bounds[-1:]])

    def __call__(self, places: np.ndarray) -> np.ndarray:
        mixed = self.outer(places)
        if len(self.starts) == 1 and self.weights[0] == 1:
            return mixed
        source, numbers = np.searchsorted(self.bounds, mixed, side="right") - 1, np.empty_like(mixed)
        for s in np.unique(source):
            own = source == s
            numbers[own] = self.begins[s] + self._inside(int(s), mixed[own] - self.bounds[s])
        return numbers

    def _inside(self, s: int, places: np.ndarray) -> np.ndarray:
        """Places of a source's share of the epoch to its samples."""
        if self.weights[s] == 1:
            return places
        running, numbers = places + self.epoch * self.shares[s], np.empty_like(places)
        passes = running // self.sizes[s]
        for number in np.unique(passes):
            own, key = passes == number, (self.seed, s, int(number))
            order = ShuffledBlocks(self.starts[s], key) if self.blocked[s] else Permutation(self.sizes[s], key)
            numbers[own] = order(running[own] % self.sizes[s])
        return numbers


def share(size: int, weight: float) -> int:
    """Samples that a source of `size` with `weight` gives to each epoch; at least one."""
    return max(1, round(size * weight))
