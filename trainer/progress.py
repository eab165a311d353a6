"""How far a run has come: finished things, figures since the last log line, place on the learning rate's curve."""

import math
from dataclasses import dataclass

import torch

from .distributed import Ranks


@dataclass
class TrainState:
    """How far a run has come. All counts are of finished things."""

    epoch: int = 0  # finished epochs
    update: int = 0  # finished updates, over all epochs
    samples: int = 0  # samples of the running epoch that are trained on, over all ranks
    read: int = 0  # samples read so far, bad ones included
    bad: int = 0  # bad ones among them
    epoch_bad: int = 0  # those of the running epoch
    truncated: int = 0  # used ones with a picture that is cut short
    seconds: float = 0.0  # spent training, over all interruptions
    tracker_id: str | None = None
    validated: int = 0  # the update of the last validation
    best_loss: float | None = None  # the lowest validation loss, and its update
    best_update: int = 0


class Interval:
    """Sums over the updates since the last log line. They stay on the device until somebody reads them.

    `sums` [4]: cross-entropy over supervised tokens and auxiliary loss, of this rank; supervised tokens and updates, of
    all. `tokens` are those of all ranks, padding apart.
    """

    def __init__(self, device: torch.device, sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0), tokens: float = 0.0):
        self.sums, self.tokens = torch.tensor(sums, device=device), tokens

    def read(self, ranks: Ranks) -> list[float]:
        """The sums over all ranks; waits for the device."""
        loss, aux_loss, supervised, updates = self.sums.tolist()
        return [*ranks.sum([loss, aux_loss]), supervised, updates]

    def clear(self) -> None:
        """Begins anew."""
        self.sums, self.tokens = torch.zeros_like(self.sums), 0.0


@dataclass(frozen=True)
class Schedule:
    """How far along the learning rate's curve an update is, unbroken when a resumed run has other updates to do.

    Straight from `begin` at update `first` to 1 at update `total`.
    """

    total: int
    first: int = 0
    begin: float = 0.0

    def progress(self, update: int) -> float:
        """In [0, 1], of `update` finished updates."""
        return self.begin + (1 - self.begin) * ((update - self.first) / (self.total - self.first))

    def continued(self, update: int, total: int) -> "Schedule":
        """From where `update` updates are done towards another total."""
        return Schedule(total, update, self.progress(update)) if total > update else Schedule(total)


def cosine(progress: float, peak: float) -> float:
    """Learning rate at a share of the run in [0, 1]: from the peak to a tenth of it (arXiv 1608.03983)."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
