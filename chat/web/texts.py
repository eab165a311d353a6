"""Labels and errors of the page, in English and Traditional Chinese."""

import json
import re
import tomllib
from pathlib import Path

import streamlit as st

from .models import ModelChoice

FOLDER = Path(__file__).resolve().parent

LANGUAGES = {"en": "English", "zh": "繁體中文"}

TABLES = tomllib.loads((FOLDER / "texts.toml").read_text(encoding="utf-8"))
TEXTS: dict[str, list[str]] = TABLES["labels"]  # [English, Chinese]


class Labels:
    """The labels of one language: `labels("stop")`, with values for those that have places."""

    def __init__(self, language: str):
        self.language, self._column = language, list(LANGUAGES).index(language)

    def __call__(self, key: str, **values) -> str:
        return TEXTS[key][self._column].format(**values)

    def error(self, text: str) -> str:
        """An error as Markdown. File names and commands in it are no Markdown."""
        if self.language == "zh":
            text = in_chinese(text)
        return escape(text).replace("\n", "  \n")

    def describe(self, model: ModelChoice) -> str:
        """What a model is and what it was trained on."""
        key = "untold" if not model.data_path else "demo" if model.is_demo else "trained"
        return self(key, name=escape(model.name), data=escape(Path(model.data_path).name), updates=f"{model.updates:,}")

    def install(self) -> None:
        """Styles, and what only a browser can do."""
        st.html(FOLDER / "page.css")
        words, script = TABLES["chinese"]["browser"] if self.language == "zh" else [], (FOLDER / "page.js").read_text()
        script = f"<script>window.pageWords = {json.dumps(words)};\n(() => {{ {script} }})()</script>"
        st.html(script, unsafe_allow_javascript=True)


def escape(text: str) -> str:
    """Text as itself in Markdown: characters with a meaning there get a backslash."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~$" else c for c in text)


def in_chinese(text: str) -> str:
    """An error in Chinese, by the first pattern that fits."""
    for pattern, chinese in TABLES["chinese"]["errors"]:
        if found := re.search(pattern, text, re.DOTALL):
            said = found.expand(chinese)
            return f"{said}\n{text}" if said.endswith("：") else said
    return text


def preferred(locale: str | None) -> str:
    """The language to begin with, by the browser's locale."""
    return "zh" if (locale or "").lower().startswith("zh") else "en"
