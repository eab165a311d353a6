"""What a run tells: a json line file always, a progress bar or plain lines, SwanLab when asked.

A tracker that fails is dropped with one warning; training goes on.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.storage import write_atomically

from .config import TrainConfig


class MetricsFile:
    """One json object a line, {"update": ..., "loss": ...}; a resumed run goes on where its state left off."""

    def __init__(self, path: Path, resume_update: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_update and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["update"] <= resume_update:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line torn by a sudden end
        write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  (closed in close)

    def log(self, values: dict[str, Any]) -> None:
        """Appends one line."""
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class SwanLab:
    """SwanLab, in the mode of its own settings (SWANLAB_MODE: cloud, local, offline, disabled)."""

    def __init__(self, config: TrainConfig, run_id: str | None):
        self._run, self.run_id = None, run_id
        try:
            import swanlab

            name = config.wandb_run_name or (
                f"{config.run_name}-e{config.epochs}-b{config.batch_size}-lr{config.learning_rate:g}"
            )
            resume = {"resume": "allow", "id": run_id} if run_id else {}
            self._run = swanlab.init(
                project=config.wandb_project, experiment_name=name, config=json.loads(config.to_json()), **resume
            )
            self.run_id = getattr(self._run, "id", None) or getattr(getattr(self._run, "public", None), "run_id", None)
        except BaseException as error:  # its login exits the process, its settings raise all kinds
            if isinstance(error, KeyboardInterrupt):
                raise
            self._drop(error)

    def log(self, values: dict[str, Any]) -> None:
        """Sends one point; gives up for good when that fails."""
        if self._run is None:
            return
        try:
            self._run.log(values, step=values["update"])
        except Exception as error:
            self._drop(error)

    def close(self) -> None:
        """Ends the SwanLab run."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._drop(error)

    def _drop(self, error: BaseException) -> None:
        self._run = None
        print(f"warning: SwanLab is off, training goes on ({type(error).__name__}: {error})", file=sys.stderr)


class Tracker:
    """All of the above behind one `log`; on every rank but the first it does nothing."""

    def __init__(self, config: TrainConfig, is_main: bool, resume_update: int, total: int, run_id: str | None):
        self._is_main = is_main
        if not is_main:
            return
        self._metrics = MetricsFile(config.metrics_file, resume_update)
        self._swanlab = SwanLab(config, run_id) if config.use_wandb else None
        self._total, self._on_terminal = total, sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=resume_update, unit="update", disable=not self._on_terminal,
                         dynamic_ncols=True)  # fmt: skip

    @property
    def run_id(self) -> str | None:
        """SwanLab's id of this run, to go on with it after a resume."""
        return self._swanlab.run_id if self._is_main and self._swanlab else None

    def advance(self) -> None:
        """One update is done."""
        if self._is_main:
            self._bar.update()

    def log(self, values: dict[str, Any]) -> None:
        """Writes the figures of an update everywhere."""
        if not self._is_main:
            return
        self._metrics.log(values)
        if self._swanlab:
            self._swanlab.log(values)
        left = values["seconds_left"]
        text = (f"loss {values['loss']:.4f}" + (f" aux {values['aux_loss']:.4f}" if values["aux_loss"] else "")
                + f" lr {values['learning_rate']:.3e} {values['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
        if self._on_terminal:
            self._bar.set_postfix_str(text)
        else:
            clock = f"{left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f}"
            print(f"epoch {values['epoch']} update {values['update']}/{self._total} {text} left {clock}",
                  file=sys.stderr, flush=True)  # fmt: skip

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
            self._swanlab.close()
