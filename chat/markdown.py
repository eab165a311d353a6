"""Conversations as Markdown: the terminal's /save; the web page's download escapes its text likewise."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote


@dataclass(frozen=True)
class Shown:
    """An image, or the frames of a video at these `times`, that a question is about."""

    path: str
    times: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """A question, what it is about, and the answer as far as it came."""

    question: str
    shown: tuple[Shown, ...]
    answer: str


def escape(text: str) -> str:
    """Text as itself in Markdown: characters with a meaning there get a backslash."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~$" else c for c in text)


def markdown(exchanges: list[Exchange], folder: Path) -> str:
    """The conversation, with links to what was shown as seen from `folder`."""
    parts = ["# A conversation with MiniMind-V"]
    for exchange in exchanges:
        for shown in exchange.shown:
            path = os.path.relpath(Path(shown.path).expanduser(), folder)
            link = f"[{escape(Path(path).name)}]({quote(path)})"
            parts.append(f"{link}, frames at {', '.join(shown.times)}" if shown.times else f"!{link}")
        parts += ["\n".join(f"> {escape(line)}".rstrip() for line in exchange.question.splitlines())]
        parts += [escape(exchange.answer.strip())]
    return "\n\n".join(parts) + "\n"
