"""How a sampled answer is marked: `rewarder(answer, sample)` is a number in [0, 1]. What --reward names:

exact                the answer is a reference
vqa                  it is one but for case, articles, punctuation and spelt numbers (dataset/answers.py)
choice               it names the letter that a reference names: "B", "(b)", "B. a cat", "The answer is B."
format:PATTERN       the whole of it matches a regular expression
my_module:function   a function of one's own, from the current folder or an installed package
"""

import importlib
import os
import re
import sys
from collections.abc import Callable

from dataset.answers import exact_match, references, vqa_accuracy
from dataset.jsonl import Sample
from model.errors import UsageError, first_line

Rewarder = Callable[[str, Sample], float]
# A letter alone or set off from what follows ("A cat" names none), or one that is said to be the answer, if small then at an end.
LETTER = re.compile(r"[(*]*([A-Za-z])(?:[).:,*\n]| -|$)|.*\b[Aa]nswer(?: is)?:? \(?([A-Z]\b(?! \w)|[a-z](?=[).:,]|\s*$))"
                    r"|.*\b(?:[Oo]ption|[Cc]hoice) \(?([A-Z]\b|[a-z](?=[).:,]|\s*$))", re.DOTALL)  # fmt: skip


def exact(answer: str, sample: Sample) -> float:
    """1 for the text of a reference."""
    return exact_match(answer, references(sample))


def vqa(answer: str, sample: Sample) -> float:
    """VQA accuracy."""
    return vqa_accuracy(answer, references(sample))


def choice(answer: str, sample: Sample) -> float:
    """1 for the letter of a reference."""
    letter = letter_of(answer)
    return float(letter is not None and letter in map(letter_of, references(sample)))


def letter_of(answer: str) -> str | None:
    """The letter, in upper case, of the alternative that an answer chooses; None where it names none."""
    found = LETTER.match(answer.strip())
    return next(filter(None, found.groups())).upper() if found else None


def find_rewarder(name: str) -> Rewarder:
    """The rewarder that --reward names; raises UsageError."""
    if own := {"exact": exact, "vqa": vqa, "choice": choice}.get(name):
        return own
    kind, _, rest = name.partition(":")
    if kind == "format" and rest:
        try:
            pattern = re.compile(rest, re.DOTALL)
        except re.error as error:
            raise UsageError(f"--reward {name}: no regular expression: {error}") from error
        return lambda answer, sample: float(pattern.fullmatch(answer.strip()) is not None)
    if not (kind and rest):
        raise UsageError(f"--reward {name}: known are exact, vqa, choice, format:PATTERN and your_module:function")
    try:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        function = getattr(importlib.import_module(kind), rest)
    except Exception as error:  # of a user's module, all kinds
        raise UsageError(f"--reward {name}: {type(error).__name__}: {first_line(error)}") from error
    if not callable(function):
        raise UsageError(f"--reward {name}: {rest} is no function (answer, sample) -> mark")
    return function


def mark(rewarder: Rewarder, answer: str, sample: Sample) -> float:
    """A checked mark; raises ValueError for one that is no number in [0, 1]."""
    value = float(rewarder(answer, sample))
    if not 0 <= value <= 1:
        raise ValueError(f"its mark for {answer!r} is {value!r}; a number in [0, 1] is wanted")
    return value
