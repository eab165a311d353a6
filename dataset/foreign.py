"""Conversation formats of other projects, a row at a time; `python -m dataset.convert --from` turns whole files.

    llava, sharegpt   {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": ...}],
                       "image": "a.jpg"}
    openai            {"messages": [{"role": "user", "content": "What?", or [{"type": "text", "text": "What?"},
                          {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}]}, ...], "images": [...]}
    alpaca            {"instruction": "What?", "input": ..., "output": ..., "history": [["Hi", "Hello"]], "image": ...}
    cauldron          {"images": [...], "texts": [{"user": "What?", "assistant": ...}, ...]}, FineVision's as well

Images that no <image> placeholder places stand before the first question. What a tool returns is read like a user's
turn: without loss. A placeholder in an answer, or beside images that are parts of a message, is text (TYPED_PLACEHOLDER).
"""

import base64
import re
import shlex
from collections.abc import Iterator
from typing import Any

from model.conversation import IMAGE_PLACEHOLDER, ROLES, TYPED_PLACEHOLDER
from model.errors import SampleError, shown

RowImage = tuple[bytes | None, str | None]  # the bytes of an image's file, its name: one of them at least

FORMATS = ("llava", "sharegpt", "openai", "alpaca", "cauldron")
TEXT_COLUMNS = ("conversations", "messages", "texts")  # which may be json text in parquet
USED = {*TEXT_COLUMNS, "instruction", "input", "output", "history", "system", "image", "images"}
OUR_ROLE = {role: role for role in ROLES} | {
    theirs: role for role, names in {
        "user": ("human", "question", "tool", "function", "observation", "function_response"),
        "assistant": ("gpt", "bot", "chatgpt", "model", "answer", "ai", "function_call"), "system": ("developer",),
    }.items() for theirs in names
}  # fmt: skip


def detect(row: Any) -> str | None:
    """The format of a row; None for ours, and for what is none of these."""
    if not isinstance(row, dict):
        return None
    for form, keys in (("cauldron", {"texts"}), ("alpaca", {"instruction", "output"}), ("openai", {"messages"})):
        if keys <= row.keys() and "conversations" not in row:
            return form
    turns = row.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    if any("value" in turn for turn in turns):
        return "llava" if "image" in row else "sharegpt"
    roles = (turn["role"] for turn in turns if isinstance(turn.get("role"), str))
    parts = any(isinstance(turn.get("content"), list) for turn in turns)
    named = any(role not in ROLES and role.strip().lower() in OUR_ROLE for role in roles)
    plural = "images" in row and not row.keys() & {"image", "image_bytes"}
    return "openai" if turns and (named or parts or plural) else None


def remedy(row: Any, where: str) -> str:
    """What an error about a row of another format adds; empty for other rows."""
    form, path = detect(row), shlex.quote(re.sub(r":\d+$", "", where))
    command = f"python -m dataset.convert --from {form} {path} --out shards (--images_path as here)"
    return f"; it looks like {form}: {command}" if form else ""


def to_ours(row: Any, form: str, where: str) -> tuple[dict, tuple[str | bytes, ...]]:
    """A row of a format as one of ours, and its images by name or bytes. Raises SampleError."""
    turns, placed, seen = [], [], []
    try:
        images = as_list(row.get("images") or row.get("image"))
        for role, content in turns_of(row, form):
            role = OUR_ROLE.get(str(role).strip().lower(), role)
            if isinstance(content, list):
                content = "\n".join(part_of(part, images, placed, seen) for part in content)
            if role != "user" and isinstance(content, str):
                content = content.replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER)
            turns.append({"role": role, "content": content})
        if placed and set(seen) != set(range(len(images))):
            raise SampleError(f"the parts of messages show the images {sorted(set(seen))}, counted from 0,"
                              f" of a row that has {len(images)}")  # fmt: skip
        found = [image_of(value) for value in placed or images]
    except SampleError as error:
        raise SampleError(error.problem, where) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SampleError(f"no row of the format {form} ({type(error).__name__}: {error})", where) from error
    question = next((turn for turn in turns if turn["role"] == "user" and isinstance(turn["content"], str)), None)
    if question and not any(IMAGE_PLACEHOLDER in str(turn["content"]) for turn in turns):
        question["content"] = f"{IMAGE_PLACEHOLDER}\n" * len(found) + question["content"]
    rest = {key: value for key, value in row.items() if key not in USED}
    return with_images(rest | {"conversations": turns}, found)


def turns_of(row: dict, form: str) -> Iterator[tuple[Any, Any]]:
    """Roles and contents, as they stand there."""
    if row.get("system"):
        yield "system", row["system"]
    if form in ("llava", "sharegpt"):
        yield from ((turn["from"], turn["value"]) for turn in row["conversations"])
    elif form == "openai":
        for turn in row["messages" if "messages" in row else "conversations"]:
            lost = [name for name in ("tool_calls", "function_call", "refusal") if turn.get(name)]
            lost += ["weight: 0"] * (turn.get("weight") == 0)
            if lost:
                raise SampleError(f"a message has {lost[0]}, for which there is no place; --skip_bad leaves such rows out")
            yield turn["role"], turn["content"]
    elif form == "alpaca":
        question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
        for asked, answer in [*(row.get("history") or []), (question, row["output"])]:
            yield from (("user", asked), ("assistant", answer))
    else:
        for pair in row["texts"]:
            yield from (("user", pair["user"]), ("assistant", pair["assistant"]))


def part_of(part: Any, images: list, placed: list, seen: list[int]) -> str:
    """The text of a message's part. Of an image a placeholder: `placed` gets the image, and `seen` the number among the
    row's images of one that the part does not hold itself: the number it gives, or the next."""
    kind = "text" if isinstance(part, str) else part.get("type")
    if kind in ("text", "input_text", "output_text"):
        return (part if isinstance(part, str) else part["text"]).replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER)
    if kind not in ("image", "image_url", "input_image"):
        raise SampleError(f"a message has a part of type {shown(kind)}; known are text, image and image_url")
    held = (part.get(key) for key in ("image_url", "image", "url", "path", "bytes"))
    value = next((value for value in held if value is not None), None)
    if value is None:
        number = part.get("index")
        seen.append(number if isinstance(number, int) else seen[-1] + 1 if seen else 0)
        value = images[seen[-1]] if 0 <= seen[-1] < len(images) else None
    placed.append(value["url"] if isinstance(value, dict) and "url" in value else value)
    return IMAGE_PLACEHOLDER


def image_of(value: Any) -> RowImage:
    """An image from its bytes, a file name, a data URL, or a struct with `bytes` and `path` as the datasets library
    writes it. Raises SampleError."""
    blob, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(blob, str):
        blob, name = None, blob
    if blob is None and isinstance(name, str):
        if re.match(r"https?://", name, re.IGNORECASE):
            raise SampleError(f"image {shown(name)} lies on the web: download it to --images_path and name its file")
        if re.match(r"data:", name, re.IGNORECASE):
            try:
                blob, name = base64.b64decode(re.split(r";base64,", name, maxsplit=1)[1]), None
            except (IndexError, ValueError) as error:
                raise SampleError(f"image {shown(name)} is no data URL in base64") from error
        else:
            name = name.removeprefix("file://")
    if not isinstance(blob, bytes | None) or not isinstance(name, str | None) or (blob is None and not name):
        raise SampleError(f"an image is something other than bytes or a file name: {shown(value)}")
    return blob, name


def with_images(row: dict, found: list[RowImage]) -> tuple[dict, tuple[str | bytes, ...]]:
    """A row, with its images' names where it has none, and the images."""
    names = [name for _, name in found]
    named = {"image": names} if names and all(names) else {}
    return named | row, tuple(name if blob is None else blob for blob, name in found)


def as_list(value: Any) -> list:
    """A value, several, or none."""
    return value if isinstance(value, list) else [] if value in (None, "", {"bytes": None, "path": None}) else [value]
