"""Which models there are, what they were trained on, and loading them."""

import functools
import itertools
import json
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from model.device import default_device
from model.hub_names import folder_of
from model.inference.assistant import Assistant, load_assistant

QUESTIONS = 3  # that the page offers
LONGEST_QUESTION = 80  # characters


@dataclass(frozen=True)
class ModelChoice:
    """Weights that can be loaded: a native file, with or without a sidecar, or a transformers folder."""

    path: Path
    changed: int  # modification time in ns: weights that training has replaced are another model
    data_path: str = ""  # what it was trained on; empty where no sidecar tells
    updates: int = 0

    @property
    def name(self) -> str:
        """A name for people: sft_vlm_512."""
        return self.path.stem if self.path.suffix == ".pth" else self.path.name

    @property
    def is_demo(self) -> bool:
        """Whether it was trained on the embedded demo's data."""
        return Path(self.data_path).parent.parts[-2:] == ("dataset", "demo")


def find_models(settings: Namespace) -> list[ModelChoice]:
    """What can be loaded, best first: --load_from, weights that --weight names, then newest first."""
    folder = settings.save_dir
    paths = [*folder.glob("[!.]*.pth"), *(config.parent for config in folder.glob("[!.]*/config.json"))]
    named = re.compile(re.escape(settings.weight) + r"(_\d+)?(_moe)?")
    found = [choice for path in paths if (choice := read_choice(path))]
    found.sort(key=lambda choice: (not named.fullmatch(choice.name), -choice.changed))
    first = read_choice(settings.load_from) if settings.load_from else None
    return [first, *found] if first else found


def read_choice(path: Path) -> ModelChoice | None:
    """The model at `path`: {weight}_{hidden}{_moe}.pth or a transformers folder. None for anything else."""
    is_native = re.fullmatch(r".+_\d+(_moe)?\.pth", path.name)
    weights = path if is_native else folder_of(path) / "config.json"
    record = read_json(path.with_suffix(".json") if is_native else weights)
    exported = record.get("model_type") == "llava" and weights.with_name("sidecar.json").is_file()
    if not weights.is_file() or not (is_native or exported or record.get("model_type") == "minimind-v"):
        return None
    changed = weights.stat().st_mtime_ns
    try:
        return ModelChoice(path, changed, str(record["training"]["data_path"]), int(record["progress"]["update"]))
    except (LookupError, TypeError, ValueError):  # published weights have no sidecar, and one may hold anything
        return ModelChoice(path, changed)


def read_json(path: Path) -> dict:
    """The object in a json file; empty when there is none that can be read: what it adds is optional."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@functools.lru_cache(32)
def training_questions(data_path: str) -> list[str]:
    """A few short questions that a model was asked in training, each beginning with another word; none where its file
    is gone or holds other data."""
    path, found = Path(data_path.partition(",")[0]), {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in itertools.islice(file, 500) if path.suffix == ".jsonl" else ():
                question = json.loads(line)["conversations"][0]["content"].replace("<image>", "").strip()
                if len(question) <= LONGEST_QUESTION and "\n" not in question:
                    found.setdefault(question.partition(" ")[0], question)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    return list(found.values())[:QUESTIONS]


@st.cache_resource(max_entries=3, show_spinner=False)
def load(choice: ModelChoice, _settings: Namespace) -> Assistant:
    """The model, once for all sessions; raises UsageError when it cannot be loaded."""
    load_from = "model" if choice.path.suffix == ".pth" else str(choice.path)
    return load_assistant(load_from, choice.path, _settings.device or default_device(), _settings.vision_model_path,
                          _settings.tokenizer_path)  # fmt: skip
