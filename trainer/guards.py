"""When a run that goes wrong has to end: too many bad samples, or losses that are not finite."""

from collections.abc import Callable
from pathlib import Path

import torch

from dataset.vlm_dataset import BadSample

from .distributed import Ranks

MOST_BAD = 0.01  # share of unusable samples past which a run stops
BAD_GRACE = 10  # so many bad samples of an epoch never stop a run, whatever their share
MOST_NON_FINITE = 3  # updates in a row


class TrainingFailed(Exception):
    """A run that cannot go on; the last good state is on disk. The scripts end with exit code 1."""


class BadData(TrainingFailed):
    """Too many samples that cannot be used. What was trained before is worth saving."""


class BadSampleGuard:
    """Says once what is wrong with a sample, and ends the run when there are too many of them."""

    def __init__(self, ranks: Ranks, stops_at_first: bool):
        self.ranks, self.stops_at_first, self.reported = ranks, stops_at_first, set()

    def report(self, bad: list[BadSample], truncated: list[BadSample]) -> None:
        """Names this rank's samples that were not named before."""
        for sample in truncated:
            if sample.index not in self.reported:
                self.reported.add(sample.index)
                self.ranks.warn(f"notice: {sample.reason}")
        for sample in bad[:1] if self.stops_at_first else bad:
            if sample.index not in self.reported:
                self.reported.add(sample.index)
                self.ranks.warn(f"bad sample{'' if self.stops_at_first else ' skipped'}: {sample.reason}")

    def judge(self, new: int, bad: int, read: int, done: bool) -> None:
        """Raises BadData. Of one pass over the data, `done` or still running: `read` samples of all ranks, `bad` ones among
        them, and the `new` ones among these."""
        if new and self.stops_at_first:
            raise BadData("stopped at the first bad sample (--on_bad_sample raise)")
        if bad > max(BAD_GRACE, MOST_BAD * read) or (done and bad == read):
            share = f"more than {BAD_GRACE} and {MOST_BAD:.0%}" if bad < read else "all of them"
            raise BadData(f"{bad} of {read} samples read were bad, {share}: something is wrong with the data as a whole"
                          " (the first are named above)")  # fmt: skip


class FiniteGuard:
    """Names the samples of updates that were not finite, and ends the run after several in a row.

    `where` gives file:line of a sample. What an update came to is read from the device when `read` asks, not before.
    """

    def __init__(self, ranks: Ranks, where: Callable[[int], str], state_file: Path):
        self.ranks, self.where, self.state_file = ranks, where, state_file
        self.in_a_row = 0
        self.unread: list[tuple[torch.Tensor, list[int]]] = []  # of updates: 1 where it was broken, its samples

    def add(self, broken: torch.Tensor, indices: list[int]) -> None:
        """Another update, of these samples of this rank."""
        self.unread.append((broken, indices))

    def read(self) -> None:
        """Waits for the device; raises TrainingFailed."""
        unread, self.unread = self.unread, []
        flags = torch.stack([broken for broken, _ in unread]).tolist() if unread else []
        for broken, (_, indices) in zip(flags, unread, strict=True):
            self.in_a_row = self.in_a_row + 1 if broken else 0
            if broken:
                samples = ", ".join(self.where(index) for index in indices)
                self.ranks.warn(f"loss or gradient is not finite: no update. Samples: {samples}")
            if self.in_a_row == MOST_NON_FINITE:
                good = f"the last good state is {self.state_file}" if self.state_file.exists() else "nothing was saved yet"
                raise TrainingFailed(
                    f"{MOST_NON_FINITE} updates in a row were not finite; {good}. Lower --learning_rate, look at the samples named, or try --dtype float32"
                )
