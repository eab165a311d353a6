"""What a run reports: a json line file always, a progress bar or plain lines, SwanLab when asked.

A tracker that fails is dropped with one warning; training continues.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import queue
import shlex
import sys
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.errors import first_line
from model.storage import write_atomically

from .config import TrainConfig

MOST_QUEUED = 1000  # points that wait for SwanLab; one that finds the queue full is dropped
FINISH_SECONDS = 30.0  # that SwanLab gets for its last points, once training has ended
THREAD = "swanlab"


class MetricsFile:
    """One json object a line: {"update", "loss", ...} of training, {"update", "eval_loss", "samples", ...} of a validation.

    A resumed run continues where its state left off.
    """

    def __init__(self, path: Path, resume_update: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_update and path.is_file():
            for line in path.read_bytes().splitlines():  # of text it would cut at more than newlines: answers hold anything
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line truncated by a sudden end
                    if json.loads(line)["update"] <= resume_update:
                        kept.append(line + b"\n")
        write_atomically(path, lambda file: file.write(b"".join(kept)))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed in close)
        self._warned = False

    def log(self, values: dict[str, Any]) -> None:
        """Appends one line. A disk that refuses is reported once, and asked again for the next line."""
        try:
            self._file.write((json.dumps(values, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
        except OSError as error:
            if not self._warned:
                print(f"warning: {self._file.name} misses lines ({error.strerror}); training continues", file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class SwanLab:
    """SwanLab, in the mode of its own settings (SWANLAB_MODE: cloud, local, offline, disabled), in a thread behind a queue:
    nothing here waits for it until `close`. Whatever goes wrong, one warning is all.

    `run_id` is chosen here, so that a resumed run continues under the same one.
    """

    def __init__(self, config: TrainConfig, run_id: str | None):
        self.run_id, self._warned = run_id or uuid.uuid4().hex, False
        self._queue: queue.Queue = queue.Queue(MOST_QUEUED)
        self._end: tuple[dict, str | None] = ({}, None)  # the run's summary and error, set before None is queued
        name = config.wandb_run_name or (
            f"{config.run_name}-e{config.epochs}-b{config.batch_size}-lr{config.learning_rate:g}"
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

    def close(self, summary: dict[str, Any], error: str | None = None) -> None:
        """Ends the SwanLab run, as a crashed one if there was an error; waits FINISH_SECONDS at most."""
        self._end, deadline = (summary, error), time.monotonic() + FINISH_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.1)
                self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"did not finish within {FINISH_SECONDS:.0f} s, points may be missing")

    def _send(self, start: dict[str, Any]) -> None:
        """The thread: everything that SwanLab does, until the end of the run."""
        try:
            import swanlab

            run = swanlab.init(**start)
            while (point := self._queue.get()) is not None:
                values, update = point
                run.log(values, step=update)
            summary, error = self._end
            run.config.update({"summary": summary})
            run.finish(state="crashed" if error else "success", error=error)
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


class Tracker:
    """All of the above behind one `log`; on every rank but the first it does nothing. A context that ends with the run."""

    def __init__(self, config: TrainConfig, is_main: bool, resume_update: int, total: int, run_id: str | None):
        self._is_main, self._total = is_main, total
        self._on_terminal = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=resume_update, unit="update", disable=not self._on_terminal,
                         dynamic_ncols=True)  # fmt: skip
        self._metrics = MetricsFile(config.metrics_file, resume_update) if is_main else None
        self._swanlab = SwanLab(config, run_id) if is_main and config.use_wandb else None
        self._summary: dict[str, Any] = {}

    @property
    def run_id(self) -> str | None:
        """SwanLab's id of this run, to continue with it after a resume."""
        return self._swanlab.run_id if self._swanlab else None

    def advance(self) -> None:
        """One update is done."""
        self._bar.update()

    def log(self, values: dict[str, Any]) -> None:
        """Writes the figures of an update everywhere; for the person watching, on the bar or as a line."""
        self._record(values, values)
        loss, aux_loss = values["loss"], values["aux_loss"]
        text = (("nothing trained" if loss is None else f"loss {loss:.4f}") + (f" aux {aux_loss:.4f}" if aux_loss else "")
                + f" lr {values['learning_rate']:.3e} {values['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
        if self._on_terminal:
            self._bar.set_postfix_str(text)
        else:
            self.message(f"epoch {values['epoch']:.3f} update {values['update']}/{self._total} {text}"
                         f" left {timedelta(seconds=round(values['seconds_left']))}")  # fmt: skip

    def log_validation(self, values: dict[str, Any]) -> None:
        """Writes a validation everywhere, the answers among it to the file alone."""
        best = ", the lowest so far: weights kept" if values["best"] else ""
        self.message(f"update {values['update']}/{self._total} validation loss {values['eval_loss']:.4f}{best}")
        if not math.isfinite(values["eval_loss"]):
            values = {**values, "eval_loss": None}  # json knows no infinity
        self._record(values, {name: values[name] for name in ("update", "epoch", "seconds", "eval_loss")})

    def message(self, text: str) -> None:
        """A line for the person watching, above the bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Closes everything; an error makes a crashed run of it."""
        self._bar.close()
        if self._metrics:
            self._metrics.close()
        if self._swanlab:
            self._swanlab.close(self._summary, first_line(error) if error else None)

    def _record(self, values: dict[str, Any], figures: dict[str, Any]) -> None:
        if self._metrics:
            self._metrics.log(values)
        self._summary |= {name: value for name, value in figures.items() if value is not None}
        if self._swanlab:
            points = {name: value for name, value in figures.items() if name != "update" and value is not None}
            self._swanlab.log(points, values["update"])
