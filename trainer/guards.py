"""What ends a run before its last update: a signal, too many bad samples, or losses that are not finite."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from dataset.vlm_dataset import BadSample

from .distributed import Ranks

MOST_BAD = 0.01  # fraction of unusable samples past which a run stops
BAD_GRACE = 10  # so many bad samples of an epoch never stop a run, whatever their fraction
MOST_NON_FINITE = 3  # updates in a row


class TrainingFailed(Exception):
    """A run that cannot continue; the last good state is on disk. The scripts end with exit code 1."""


class BadData(TrainingFailed):
    """Too many samples that cannot be used. What was trained before is worth saving."""

    remedy = "Mend the data, a line for a line, and continue with --from_resume 1; more or fewer lines: --from_weight {weight} without it"


class Stopped(Exception):
    """A signal asked the run to save and end."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def stop_signals() -> tuple[signal.Signals, ...]:
    """Ctrl-C, SIGTERM, SIGUSR1 (Slurm's warning) and SIGHUP (the terminal was closed), where the system has them.

    Under nohup, which ignores SIGHUP, a closed terminal ends nothing; but torchrun ends its workers by that signal even then.
    """
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows lacks the last two
    ends_workers = "TORCHELASTIC_RUN_ID" in os.environ
    return tuple(s for s in signals if s.name != "SIGHUP" or ends_workers or signal.getsignal(s) != signal.SIG_IGN)


class StopRequest:
    """Installed while a run trains: `signum` is the signal that asked it to save and end, or 0. A second signal ends the
    process at once."""

    SIGNALS = stop_signals()

    def __init__(self):
        self.signum, self._previous = 0, {}

    def __enter__(self) -> "StopRequest":
        self._previous = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame) -> None:
        if not self.signum:
            self.signum = signum
        elif signal.Signals(signum).name != "SIGHUP":  # both the shell and the system send that
            os._exit(128 + signum)  # files are replaced atomically: the last saved state is whole


class BadSampleGuard:
    """Names each bad sample once, and ends the run when there are too many of them."""

    def __init__(self, ranks: Ranks, stops_at_first: bool):
        self.ranks, self.stops_at_first, self.reported = ranks, stops_at_first, set()

    def report(self, bad: list[BadSample], truncated: list[BadSample]) -> None:
        """Names this rank's bad samples and truncated images that were not named before."""
        kind = "bad sample: " if self.stops_at_first else "bad sample skipped: "
        named = [(sample, kind) for sample in (bad[:1] if self.stops_at_first else bad)] + [(sample, "") for sample in truncated]
        for sample, kind in named:
            if sample.index not in self.reported:
                self.reported.add(sample.index)
                self.ranks.warn(f"{kind}{sample.reason}")

    def judge(self, new: int, bad: int, read: int, done: bool) -> None:
        """Raises BadData. Of one pass over the data, `done` or still running: `read` samples of all ranks, `bad` ones among
        them, and the `new` ones among these."""
        if new and self.stops_at_first:
            raise BadData("stopped at the first bad sample (--on_bad_sample raise)")
        if bad > max(BAD_GRACE, MOST_BAD * read) or (done and bad == read):
            fraction = f"more than {BAD_GRACE} and {MOST_BAD:.0%}" if bad < read else "all of them"
            raise BadData(f"{bad} of {read} samples read were bad, {fraction}: something is wrong with the data as a whole"
                          " (the first are named above)")  # fmt: skip


class FiniteGuard:
    """Names the samples of updates that were not finite, and ends the run after several in a row.

    `where` gives file:line of a sample. Whether an update was finite is read from the device when `read` asks, not before.
    """

    def __init__(self, ranks: Ranks, where: Callable[[int], str], state_file: Path):
        self.ranks, self.where, self.state_file = ranks, where, state_file
        self.in_a_row = 0
        self.unread: list[tuple[torch.Tensor, list[int]]] = []  # of updates: 1 where it was not finite, its samples

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
                raise TrainingFailed(f"{MOST_NON_FINITE} updates in a row were not finite; {good}. Lower --learning_rate, look"
                                     " at the samples named, or try --dtype float32")  # fmt: skip
