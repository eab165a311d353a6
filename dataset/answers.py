"""How an answer is marked: an answer and its references to a number in [0, 1], for scoring and for rewards.

exact     the answer is a reference, but for white space around it
vqa       accuracy of the VQA challenge (Antol et al., arXiv 1505.00468): of texts without case, articles and punctuation
anls      1 - edit distance / length of the longer text, and 0 below a half (Biten et al., arXiv 1905.13648)
rouge_l   F1 of the longest common subsequence of words (Lin 2004); case and punctuation do not count, and each Chinese
          or Japanese character is a word

Of several references the nearest counts, but in `vqa`, where it is how many of them agree.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.errors import SampleError, shown

if TYPE_CHECKING:  # both load torch
    from model.conversation import Turn

    from .jsonl import Sample

CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # scripts without spaces between words
WORD = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")
ARTICLES = {"a", "an", "the"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
# Full-width forms are ASCII written wide. The rest of NFKC would go too far: it takes the square of a number for two digits.
NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x2212: "-", 0x3000: " "}  # a minus, a wide space
DROPPED = re.compile(r"['’]|(?<=\d),(?=\d{3}\b)|\.(?!\d)")  # don't, 1,000, U.S.
# 3.5, 10:30, -3, 50% and $5 stay as they are.
SPACED = re.compile(r"[^\w\s.:%°$€£¥-]|_|:(?!\d)|(?<!\d):|-(?!\d)|(?<=\w)-")
LEAST = 3  # references that must agree with an answer of accuracy 1
ANLS_THRESHOLD = 0.5


def last_answer(turns: "Sequence[Turn]") -> int:
    """The place of the last answer among the turns."""
    return max(place for place, turn in enumerate(turns) if turn.role == "assistant")


def references(sample: "Sample") -> tuple[str, ...]:
    """What the last answer of a sample is compared with: its `answers`, or without them that answer itself.

    Raises SampleError for `answers` that are no list of texts.
    """
    if sample.answers in (None, ()):
        said = sample.turns[last_answer(sample.turns)].content
        return (said.split("</think>")[-1].lstrip("\n") if "</think>" in said else said,)  # what was thought is no part of it
    given = sample.answers
    if not isinstance(given, list | tuple) or not given or not all(isinstance(text, str) for text in given):
        raise SampleError(f"'answers' must be a list of one or more texts, references for the last answer: {shown(given)}", sample.where)
    return tuple(given)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer is the same text as a reference, else 0."""
    return float(prediction.strip() in [reference.strip() for reference in references])


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """min(1, references that agree / 3), averaged over all ways of leaving one of them out; of fewer than four references
    one that agrees is enough."""
    ours = normalize(prediction)
    agree = [ours == normalize(reference) for reference in references]
    if len(agree) <= LEAST:
        return float(any(agree))
    return sum(min(1.0, (sum(agree) - own) / LEAST) for own in agree) / len(agree)


def normalize(text: str) -> str:
    """A text as `vqa` compares it: lower case, full-width characters as ASCII, numbers up to ten as digits, no articles, no
    punctuation but within numbers. One of nothing else stays as it is."""
    plain = " ".join(text.translate(NARROW).lower().split())
    words = [DIGITS.get(word, word) for word in SPACED.sub(" ", DROPPED.sub("", plain)).split()]
    return " ".join([word for word in words if word not in ARTICLES] or words) or plain


def anls(prediction: str, references: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity; case and the kind of white space do not count."""
    ours, best = " ".join(prediction.lower().split()), 0.0
    for reference in references:
        theirs = " ".join(reference.lower().split())
        if 2 * min(len(ours), len(theirs)) < max(len(ours), len(theirs)):  # so many letters to insert
            continue
        best = max(best, 1 - edit_distance(ours, theirs) / max(1, len(ours), len(theirs)))
    return best if best > ANLS_THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Characters to insert, delete or replace (Levenshtein 1966): row i, entry j of the table is that of a[:i] and b[:j]."""
    row = list(range(len(b) + 1))
    for i, character in enumerate(a, start=1):
        above, row = row, [i]
        for j, other in enumerate(b):
            row.append(min(above[j] + (character != other), above[j + 1] + 1, row[j] + 1))
    return row[-1]


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """2 * LCS / (words of both); texts without a word are compared as they are."""
    ours, marks = WORD.findall(prediction.lower()), []
    for reference in references:
        theirs = WORD.findall(reference.lower())
        both = len(ours) + len(theirs)
        marks.append(2 * common_subsequence(ours, theirs) / both if both else exact_match(prediction, [reference]))
    return max(marks)


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence: row i, entry j of the table is that of a[:i] and b[:j]."""
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
    return row[-1]
