"""SwanLab, for --use_wandb: in a thread behind a queue, so that a tracker that fails or hangs costs a warning and no more."""

import contextlib
import dataclasses
import importlib
import os
import queue
import shlex
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from model.errors import first_line

from .config import TrainConfig

MOST_QUEUED = 1000  # points that wait for SwanLab; one that finds the queue full is dropped
THREAD = "swanlab"
FINISH_SECONDS = 30.0  # that SwanLab gets for its last points, once training has ended


class SwanLab:
    """One run, in the mode of SwanLab's own settings (SWANLAB_MODE: cloud, local, offline, disabled).

    `run_id` is chosen here, so that a resumed run continues under the same one.
    """

    def __init__(self, config: TrainConfig, run_id: str | None):
        self.run_id, self._warned = run_id or uuid.uuid4().hex, False
        self._queue: queue.Queue = queue.Queue(MOST_QUEUED)
        name = config.wandb_run_name or (
            f"{config.weight_file.stem}-e{config.epochs}-b{config.batch_size}-lr{config.learning_rate:g}"
        )
        settings = {**dataclasses.asdict(config), "command": shlex.join(sys.argv)}
        start = {"project": config.wandb_project, "name": name, "config": settings, "id": self.run_id, "resume": "allow"}
        # The lowest in rank of SwanLab's ways to choose a folder: the user's own setting wins.
        os.environ.setdefault("SWANLAB_LOGDIR", str(Path(config.save_dir).resolve() / "swanlog"))
        with contextlib.suppress(Exception, SystemExit):  # the thread says what is wrong
            importlib.import_module("swanlab")  # loader processes, forked meanwhile, would inherit half an import
        self._thread = threading.Thread(target=self._send, args=(start,), name=THREAD, daemon=True)
        self._thread.start()

    def log(self, values: dict[str, Any], update: int) -> None:
        """Hands on one point, and does not wait for it to arrive."""
        try:
            self._queue.put_nowait((values, update))
        except queue.Full:
            self._warn("does not keep up, points are missing; training continues")

    def close(self, error: str | None = None) -> None:
        """Ends the SwanLab run, as a crashed one if there was an error; waits FINISH_SECONDS at most."""
        deadline = time.monotonic() + FINISH_SECONDS
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put((None, error), timeout=FINISH_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"did not finish within {FINISH_SECONDS:.0f} s, points may be missing")

    def _send(self, start: dict[str, Any]) -> None:
        """The thread: everything that SwanLab does, until the end of the run."""
        try:
            import swanlab

            run = swanlab.init(**start)
            while True:
                values, update = self._queue.get()
                if values is None:  # the end, and in place of the update the error
                    return run.finish(state="crashed" if update else "success", error=update)
                run.log(values, step=update)
        except BaseException as error:  # its login exits the process, its settings raise all kinds
            self._warn(f"is off, training continues ({type(error).__name__}: {first_line(error)})")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            print(f"warning: SwanLab {text}", file=sys.stderr, flush=True)


def end_process_if_stuck(code: int) -> None:
    """Ends the process where SwanLab hangs: its exit handlers would wait without end."""
    if any(thread.name == THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
