"""Ctrl-C, SIGTERM, SIGHUP (the terminal was closed) and SIGUSR1 (Slurm's warning) ask a run to save and end; a second signal
ends it at once."""

import os
import signal


def answered() -> tuple[signal.Signals, ...]:
    """The signals of this system that ask a run to end.

    Under nohup, which ignores SIGHUP, a closed terminal ends nothing; but torchrun ends its workers by that signal even then.
    """
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows lacks the last two
    ends_workers = "TORCHELASTIC_RUN_ID" in os.environ
    return tuple(s for s in signals if s.name != "SIGHUP" or ends_workers or signal.getsignal(s) != signal.SIG_IGN)


class StopRequest:
    """Installed while a run trains; `signum` is the signal that came, or 0."""

    SIGNALS = answered()

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
        if not self.signum:
            self.signum = signum
        elif signal.Signals(signum).name != "SIGHUP":  # both the shell and the system send that
            os._exit(128 + signum)  # files are replaced atomically: the last saved state is whole
