"""Whose mistake it is: a UsageError is the user's, a SampleError one sample's, a DataError a data set's. Scripts end with exit
code 2 for each."""

import contextlib
import io
import re
import sys
from itertools import takewhile
from pathlib import Path


class UsageError(Exception):
    """The user asked for something that cannot be; the message says what, where and what to do instead."""


def first_line(error: Exception) -> str:
    """An error in one line without its full stop, up to a library's advice to trust a file and run what it holds; its kind
    where it has no words."""
    line = next(iter(str(error).strip().splitlines()), "")
    return ". ".join(takewhile(lambda part: not re.search("weights_only|trust", part), line.split(". "))).rstrip(".") or type(error).__name__


def print_anything() -> None:
    """From now on standard output spells out what its encoding lacks, as standard error does: no message ends a command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def placeholder(begin: bytes) -> str:
    """What a file with these first bytes (64 suffice) is when it merely stands for one that was not fetched; else empty."""
    if begin.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer, not the file itself: fetch that with git lfs pull or hf download"
    if begin.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page saved in place of the file: download the file itself (hf download)"
    return ""


def check_fetched(path: str | Path) -> None:
    """Raises UsageError when the file at `path`, or one of a model's files in the folder there, is a placeholder. In a
    folder that serves, some may be (weights for other libraries): ask when one does not."""
    path = Path(path)
    with contextlib.suppress(OSError):  # whoever reads the files says so
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if not file.is_file() or (path.is_dir() and file.suffix not in (".json", ".safetensors", ".bin", ".txt")):
                continue  # a pipe would be waited for
            with file.open("rb") as opened:
                kind = placeholder(opened.read(64))
            if kind:
                raise UsageError(f"{file} is {kind}")


class SampleError(ValueError):
    """A sample that cannot be trained on as it stands.

    `problem` says what is wrong with which value; `where` is "file:line" (or a file); the text has both.
    """

    def __init__(self, problem: str, where: str = ""):
        super().__init__(f"{where}: {problem}" if where else problem)
        self.problem, self.where = problem, where


class DataError(Exception):
    """A data set as a whole is missing or unusable; the message says what to do."""


class NoSamples(DataError):
    """A file holds no samples, which does no harm where other files do."""


def shown(value: object) -> str:
    """A value as messages show it: of a long one the beginning and the end."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}"


def reason(error: Exception) -> str:
    """What went wrong, in the system's own words for a system's error, whose whole message would name the file once more."""
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".removesuffix(": ")
