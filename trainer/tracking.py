"""What a run tells: a json line file always, a progress bar or plain lines, SwanLab when asked.

A tracker that fails is dropped with one warning; training goes on.
"""

import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.storage import REPOSITORY, write_atomically

from .config import TrainConfig

FINISH_SECONDS = 30.0  # that SwanLab gets for its last points, once training has ended
STALE_SECONDS = 5.0  # until a bar's figures are brought up to date


class MetricsFile:
    """One json object a line: {"update", "loss", ...} of training, {"update", "eval_loss", "samples", ...} of a validation.

    A resumed run goes on where its state left off.
    """

    def __init__(self, path: Path, resume_update: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_update and path.is_file():
            for line in path.read_bytes().splitlines():  # of text it would cut at more than newlines: answers hold anything
                try:
                    if json.loads(line)["update"] <= resume_update:
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError):
                    continue  # a line torn by a sudden end
        write_atomically(path, lambda file: file.write(b"".join(kept)))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed in close)
        self._torn = self._warned = False

    def log(self, values: dict[str, Any]) -> None:
        """Appends one line. A disk that refuses is reported once, and asked again for the next line."""
        line = ("\n" * self._torn + json.dumps(values, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        problem = None
        try:
            self._torn = self._file.write(line) < len(line)
            problem = "the disk is full" if self._torn else None
        except OSError as error:
            problem = error.strerror
        if problem and not self._warned:
            self._warned = True
            print(f"warning: {self._file.name} misses lines ({problem}); training goes on", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class SwanLab:
    """SwanLab, in the mode of its own settings (SWANLAB_MODE: cloud, local, offline, disabled), by a process of its own
    (see swanlab_sender.py). The pipe to it is the queue: a point that finds it full is dropped.

    `run_id` is chosen here, so that a resumed run goes on under the same one. Whatever goes wrong, one warning is all.
    """

    def __init__(self, config: TrainConfig, run_id: str | None):
        self.run_id, self._warned = run_id or uuid.uuid4().hex, False
        self._process: subprocess.Popen | None = None
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer.swanlab_sender"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for training to answer
            )  # fmt: skip
        except OSError as error:
            self._warn(f"is off, training goes on ({error})")
            return
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        name = config.wandb_run_name or (
            f"{config.run_name}-e{config.epochs}-b{config.batch_size}-lr{config.learning_rate:g}"
        )
        settings = {**dataclasses.asdict(config), "command": shlex.join(sys.argv)}
        self._send({"folder": str(Path(config.save_dir).resolve() / "swanlog"), "init": {
            "project": config.wandb_project, "name": name, "config": settings, "id": self.run_id, "resume": "allow",
        }})  # fmt: skip

    def log(self, values: dict[str, Any], update: int) -> None:
        """Hands on one point, and does not wait for it to arrive."""
        self._send({"values": values, "step": update})

    def close(self, summary: dict[str, Any]) -> None:
        """Ends the SwanLab run; waits FINISH_SECONDS at most for what is still on its way."""
        self._send({"summary": summary})
        if self._process is None:
            return
        self._process.stdin.close()
        try:
            if self._process.wait(FINISH_SECONDS):
                self._give_up()
        except subprocess.TimeoutExpired:
            self._warn(f"did not finish within {FINISH_SECONDS:.0f} s, points may be missing")
            self._process.kill()

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None:
            return
        try:
            os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")  # whole, or not at all (pipe(7))
        except BlockingIOError:
            self._warn("does not keep up, points are missing; training goes on")
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        self._process.kill()  # it closes its end by ending; should it live on without, it shall not be waited for
        code = self._process.wait()
        reason = (self._process.stdout.read() or b"").decode(errors="replace").strip()
        self._warn(f"is off, training goes on ({reason or f'its process ended with code {code}'})")
        self._process = None

    def _warn(self, text: str) -> None:
        if not self._warned:
            print(f"warning: SwanLab {text}", file=sys.stderr, flush=True)
        self._warned = True


class Tracker:
    """All of the above behind one `log`; on every rank but the first it does nothing."""

    def __init__(self, config: TrainConfig, is_main: bool, resume_update: int, total: int, run_id: str | None):
        self._is_main = is_main
        if not is_main:
            return
        self._metrics = MetricsFile(config.metrics_file, resume_update)
        self._swanlab = SwanLab(config, run_id) if config.use_wandb else None
        self._summary: dict[str, Any] = {}
        self._total, self._on_terminal, self._shown = total, sys.stderr.isatty(), time.monotonic()
        self._bar = tqdm(total=total, initial=resume_update, unit="update", disable=not self._on_terminal,
                         dynamic_ncols=True)  # fmt: skip

    @property
    def run_id(self) -> str | None:
        """SwanLab's id of this run, to go on with it after a resume."""
        return self._swanlab.run_id if self._is_main and self._swanlab else None

    @property
    def is_stale(self) -> bool:
        """Whether a bar shows figures of some time ago."""
        return self._is_main and self._on_terminal and time.monotonic() > self._shown + STALE_SECONDS

    def advance(self) -> None:
        """One update is done."""
        if self._is_main:
            self._bar.update()

    def log(self, values: dict[str, Any]) -> None:
        """Writes the figures of an update everywhere."""
        if not self._is_main:
            return
        self._record(values, values)
        self.show(values)

    def show(self, values: dict[str, Any]) -> None:
        """Shows the figures of an update to the person watching, on the bar or as a line."""
        if not self._is_main:
            return
        loss, aux_loss = values["loss"], values["aux_loss"]
        text = (("nothing trained" if loss is None else f"loss {loss:.4f}") + (f" aux {aux_loss:.4f}" if aux_loss else "")
                + f" lr {values['learning_rate']:.3e} {values['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
        if self._on_terminal:
            self._bar.set_postfix_str(text)
            self._shown = time.monotonic()
        else:
            print(f"epoch {values['epoch']:.3f} update {values['update']}/{self._total} {text}"
                  f" left {timedelta(seconds=round(values['seconds_left']))}", file=sys.stderr, flush=True)  # fmt: skip

    def log_validation(self, values: dict[str, Any]) -> None:
        """Writes a validation everywhere, the answers among it to the file alone."""
        if not self._is_main:
            return
        best = ", the lowest so far: weights kept" if values["best"] else ""
        self.message(f"update {values['update']}/{self._total} validation loss {values['eval_loss']:.4f}{best}")
        if not math.isfinite(values["eval_loss"]):
            values = {**values, "eval_loss": None}  # json knows no infinity
        self._record(values, {name: values[name] for name in ("update", "epoch", "seconds", "eval_loss")})

    def message(self, text: str) -> None:
        """A line for the person watching, above the bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Closes everything."""
        if not self._is_main:
            return
        self._bar.close()
        self._metrics.close()
        if self._swanlab:
            self._swanlab.close(self._summary)

    def _record(self, values: dict[str, Any], figures: dict[str, Any]) -> None:
        self._metrics.log(values)
        self._summary |= {name: value for name, value in figures.items() if value is not None}
        if self._swanlab:
            points = {name: value for name, value in figures.items() if name != "update" and value is not None}
            self._swanlab.log(points, values["update"])
