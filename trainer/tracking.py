"""What a run reports: a json line file always, a progress bar or plain lines, SwanLab when asked.

Whatever fails here is told in one warning, and training continues.
"""

import contextlib
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.errors import first_line
from model.storage import write_atomically

from .config import TrainConfig


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


class Tracker:
    """All of the above behind one `log`; on every rank but the first it does nothing. A context that ends with the run."""

    def __init__(self, config: TrainConfig, is_main: bool, resume_update: int, total: int, run_id: str | None):
        self._is_main, self._total = is_main, total
        self._on_terminal = is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=resume_update, unit="update", disable=not self._on_terminal,
                         dynamic_ncols=True)  # fmt: skip
        self._metrics = MetricsFile(config.metrics_file, resume_update) if is_main else None
        self._swanlab = None
        if is_main and config.use_wandb:
            from .swanlab_thread import SwanLab

            self._swanlab = SwanLab(config, run_id)
        self.run_id = self._swanlab.run_id if self._swanlab else None  # a resumed run continues under the same one

    def advance(self) -> None:
        """One update is done."""
        self._bar.update()

    def log(self, values: dict[str, Any], text: str) -> None:
        """Writes the figures of an update everywhere, answers to the file alone; `text` for the person watching, on the bar if any."""
        self._record(values)
        text += f" lr {values['learning_rate']:.3e} {values['tokens_per_second']:,.0f} tokens/s"
        if self._on_terminal:
            self._bar.set_postfix_str(text)
        else:
            self.message(f"epoch {values['epoch']:.3f} update {values['update']}/{self._total} {text}"
                         f" left {timedelta(seconds=round(values['seconds_left']))}")  # fmt: skip

    def log_validation(self, values: dict[str, Any], text: str) -> None:
        """Writes a validation everywhere, the answers among it to the file alone; its `text` for the person watching."""
        best = ", the best so far: weights kept" if values["best"] else ""
        self.message(f"update {values['update']}/{self._total} {text}{best}")
        self._record(values)

    def message(self, text: str) -> None:
        """A line for the person watching, above the bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._bar.close()
        if self._metrics:
            self._metrics.close()
        if self._swanlab:
            self._swanlab.close(first_line(error) if error else None)

    def _record(self, values: dict[str, Any]) -> None:
        if self._metrics:
            self._metrics.log(values)
        if self._swanlab:
            points = {name: value for name, value in values.items() if name not in ("update", "best", "samples") and value is not None}
            self._swanlab.log(points, values["update"])
