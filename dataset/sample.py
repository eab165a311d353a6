"""One sample: a conversation and its pictures, checked. How it becomes tokens is model/conversation.py's business."""

from dataclasses import dataclass
from typing import Any

from model.conversation import DEFAULT_SYSTEM, IMAGE_PLACEHOLDER, Rendered, Renderer, Turn, is_text, parse_turns
from model.errors import SampleError
from model.model_minimind import IGNORE_INDEX

from .errors import shown
from .foreign import remedy

__all__ = ["DEFAULT_SYSTEM", "IGNORE_INDEX", "IMAGE_PLACEHOLDER", "Rendered", "Renderer", "Sample", "Turn", "is_text",
           "parse_images", "parse_sample", "parse_turns"]  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A checked sample: turns, and the pictures they show in reading order, by name or as the bytes of a picture file.
    `where` is "file:line"."""

    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...] = ()
    where: str = ""
    kind: str = ""  # of the answers, for scoring; optional


def parse_sample(row: Any, where: str = "", pictures: tuple[str | bytes, ...] | None = None) -> Sample:
    """A decoded json line as a Sample; `pictures` replace its field `image` where a format holds them itself.

    Raises SampleError for missing keys, wrong types, unknown roles, no answer to learn from, and <image> marks that do
    not match the pictures; of a format that convert knows it names the command.
    """
    try:
        return _parse(row, where, pictures)
    except SampleError as error:
        raise SampleError(error.problem + remedy(row, where), where) from error


def _parse(row: Any, where: str, pictures: tuple[str | bytes, ...] | None) -> Sample:
    if not isinstance(row, dict):
        raise SampleError(f"a sample is an object with 'conversations', not {type(row).__name__}", where)
    turns = parse_turns(row.get("conversations"), where)
    images = parse_images(row.get("image"), where) if pictures is None else pictures
    marks = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
    if marks != len(images):
        raise SampleError(f"{marks} {IMAGE_PLACEHOLDER} marks in the user's turns, but {len(images)} pictures", where)
    if not any(turn.role == "assistant" for turn in turns):
        raise SampleError("no assistant turn: nothing to learn from", where)
    return Sample(turns, images, where, "" if row.get("kind") is None else str(row["kind"]))


def parse_images(value: Any, where: str = "") -> tuple[str, ...]:
    """The `image` field: absent, "a.jpg", "a.jpg, b.jpg" or a list."""
    if value is None or value == "":
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise SampleError(f"'image' must be a file name, several with commas between, or a list: {shown(value)}", where)
    return tuple(name.strip() for name in names)
