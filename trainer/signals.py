"""Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) ask a run to save and end; a second signal ends it at once."""

import os
import signal


class StopRequest:
    """Installed while a run trains; `signum` is the signal that came, or 0."""

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

    def __init__(self):
        self.signum = 0
        self._previous = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _frame) -> None:
        if self.signum:
            os._exit(128 + signum)  # files are replaced atomically: the last saved state is whole
        self.signum = signum
