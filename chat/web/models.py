"""Which models there are, and loading them in the background. A model stays while somebody chats with it."""

import json
import re
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from .problems import explain

# Held by whoever imports torch or the package `model`: of two threads that import modules which import each other, one is
# given a module that is only half there.
importing = threading.Lock()


@dataclass(frozen=True)
class ModelChoice:
    """Weights that can be loaded: a native file with or without sidecar, or a transformers folder."""

    path: Path
    changed: int  # modification time in ns: weights that training has replaced are another model
    size: str = ""  # like 512x8 MoE, as far as it is known before loading
    trained: str = ""  # what the sidecar tells of its training

    @property
    def label(self) -> str:
        """A name for people: sft_vlm_512."""
        return self.path.stem if self.path.suffix == ".pth" else self.path.name


def native_choice(path: Path) -> ModelChoice | None:
    """The choice behind {weight}_{hidden}{_moe}.pth, or None when the name is another or the file has gone."""
    match, changed = re.fullmatch(r"[^.].*_(\d+)(_moe)?", path.stem), changed_at(path)
    if not match or changed is None or not path.is_file():
        return None
    sidecar = read_json(path.with_suffix(".json"))
    config, progress = (part if isinstance(part := sidecar.get(key), dict) else {} for key in ("config", "progress"))
    return ModelChoice(path, changed, size_of({"hidden_size": int(match[1]), "use_moe": match[2]} | config), trained_for(progress))


def folder_choice(folder: Path) -> ModelChoice | None:
    """The choice behind a transformers folder of this model type, or None for any other folder."""
    config, changed = read_json(folder / "config.json"), changed_at(folder / "config.json")
    if config.get("model_type") != "minimind-v" or changed is None:
        return None
    return ModelChoice(folder, changed, size_of(config))


def changed_at(path: Path) -> int | None:
    """A file's modification time in ns; None when it has gone, or its name is no text that a browser can be sent."""
    try:
        str(path).encode()
        return path.stat().st_mtime_ns
    except (OSError, UnicodeEncodeError):
        return None


def size_of(config: dict) -> str:
    """Like 512x8 MoE; without what the configuration does not tell."""
    width, layers = (value if isinstance(value := config.get(key), int) else None for key in ("hidden_size", "num_hidden_layers"))
    return f"{width or '?'}{f'x{layers}' if layers else ' wide'}{' MoE' if config.get('use_moe') else ''}"


def trained_for(progress: dict) -> str:
    """Like 1,200 updates, 35 min; empty when that is not told."""
    try:
        return f"{progress['update']:,} updates, {progress['seconds'] / 60:.0f} min"
    except (KeyError, TypeError, ValueError, OverflowError):  # an odd file may hold anything
        return ""


def read_json(path: Path) -> dict:
    """The object in a json file; empty when there is none that can be read: what it adds is optional."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass
class Loading:
    """A model on its way: `assistant` when it is there, `problem` when it cannot be."""

    choice: ModelChoice
    assistant: object | None = None
    problem: str | None = None
    stage: str = "libraries"  # then "weights"
    began: float = field(default_factory=time.monotonic)

    @property
    def pending(self) -> bool:
        """Whether there is still something to wait for."""
        return self.assistant is None and self.problem is None


class ModelShelf:
    """Finds models and loads each once. The last one asked for stays; others stay while a visitor holds them.

    Nothing is loaded within the first `head_start` seconds, unless `page_shown` comes earlier: importing torch keeps the
    interpreter busy, and the first visitor's page is slower by half when it has to share it.
    """

    def __init__(self, save_dir: Path, weight: str, load_from: Path | None, vision_model_path: str | None,
                 tokenizer_path: str | None, device: str | None, head_start: float = 0.0):  # fmt: skip
        self.save_dir, self.weight, self.load_from = save_dir, weight, load_from
        self.vision_model_path, self.tokenizer_path, self.device = vision_model_path, tokenizer_path, device
        self._lock, self._one_at_a_time = threading.Lock(), threading.Lock()
        self._known: weakref.WeakValueDictionary[ModelChoice, Loading] = weakref.WeakValueDictionary()
        self._last: Loading | None = None
        self._begin_at = time.monotonic() + head_start

    def choices(self) -> list[ModelChoice]:
        """What can be loaded, best first: --load_from, weights that --weight names, then newest first."""
        found = [folder_choice(self.load_from)] if self.load_from else []
        natives, folders = [], []
        if self.save_dir.is_dir():
            natives = [native_choice(path) for path in self.save_dir.glob("*.pth")]
            folders = [folder_choice(path.parent) for path in self.save_dir.glob("[!.]*/config.json")]
        others = [choice for choice in natives + folders if choice]
        named = re.compile(re.escape(self.weight) + r"(_\d+)?(_moe)?")
        others.sort(key=lambda choice: (not named.fullmatch(choice.label), -choice.changed))
        return [choice for choice in found if choice] + others

    def page_shown(self) -> None:
        """A visitor's first page is on its way to him; his browser gets a moment for it."""
        self._begin_at = min(self._begin_at, time.monotonic() + 0.5)

    def load(self, choice: ModelChoice) -> Loading:
        """The model, ready or on its way; returns at once."""
        with self._lock:
            loading = self._known.get(choice)
            if loading is None or loading.problem:
                loading = self._known[choice] = Loading(choice)
                threading.Thread(target=self._load, args=(loading,), name="loading", daemon=True).start()
            self._last = loading
            return loading

    def _load(self, loading: Loading) -> None:
        try:
            with self._one_at_a_time:
                while time.monotonic() < self._begin_at:
                    time.sleep(0.05)
                with importing:
                    from model.device import default_device
                    from model.inference.assistant import load_assistant

                loading.stage, choice = "weights", loading.choice
                native = choice.path.suffix == ".pth"
                loading.assistant = load_assistant(
                    "model" if native else str(choice.path), choice.path, self.device or default_device(),
                    self.vision_model_path, self.tokenizer_path,
                )  # fmt: skip
        except Exception as error:  # the page lives on and tells what happened
            loading.problem = explain(error)
