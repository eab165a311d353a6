"""Marks of answers against their definitions, with one reference and with several."""

import subprocess
import sys
from difflib import SequenceMatcher
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import convert
from dataset.answers import anls, common_subsequence, edit_distance, exact_match, references, rouge_l, vqa_accuracy
from dataset.jsonl import Sample
from dataset.sources import open_samples
from model.conversation import Turn
from model.errors import SampleError
from tests.conftest import REPOSITORY, write_jsonl

MARKS = (exact_match, vqa_accuracy, anls, rouge_l)
TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "2"}]


def test_common_subsequences():
    for a, b, length in (("", "abc", 0), ("abcbdab", "bdcaba", 4), ("aaaa", "aa", 2), ("abc", "cba", 1), ("abc", "abc", 3)):
        assert common_subsequence(list(a), list(b)) == common_subsequence(list(b), list(a)) == length


def test_rouge_l():
    assert rouge_l("A cat.", ["a cat"]) == 1 and rouge_l("", ["a cat"]) == rouge_l("dog", ["a cat"]) == 0
    assert rouge_l("the cat sits", ["the big cat"]) == pytest.approx(2 * 2 / 6), "precision and recall 2 of 3"
    assert rouge_l("一隻黑貓", ["一隻白貓。"]) == pytest.approx(2 * 3 / 8), "a character is a word"
    assert rouge_l("+", ["+"]) == 1 and rouge_l("+", ["-"]) == 0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("Yes.", "yes"), (" yes ", "yes"), ("２", "2"), ("two", "2"), ("Two!", "2"), ("none", "0"), ("The cat", "a cat"), ("dont", "don't"),
     ("don’t", "don't"), ("1,000", "1000"), ("t-shirt", "T shirt"), ("red,blue", "red, blue"), ("U.S.", "us"), ("是。", "是"),
     ("Ａ　ｃａｔ", "cat"), ("\u22123", "-3"), ("A", "a"), ("", ""), ("in the\nair", "in air")],
)  # fmt: skip
def test_answers_that_are_the_same_to_vqa(prediction, reference):
    assert vqa_accuracy(prediction, [reference]) == vqa_accuracy(reference, [prediction]) == 1


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("²", "2"), ("", "yes"), ("", "a"), ("the", "a"), ("B", "A"), ("3.5", "35"), ("35", "3.5"), ("10:30", "1030"), ("1,2", "12"),
     ("-3", "3"), (".5", "5"), ("50%", "50"), ("+", "-"), ("", "?"), ("yes, it is", "yes"), ("2.0", "20")],
)  # fmt: skip
def test_answers_that_are_not(prediction, reference):
    assert vqa_accuracy(prediction, [reference]) == vqa_accuracy(reference, [prediction]) == 0


@given(st.lists(st.sampled_from(["yes", "no", "maybe", "Yes."]), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_accuracy_over_several_references(given):
    """min(1, agreeing / 3) of every choice of all but one; up to three references, any."""
    agree = [text in ("yes", "Yes.") for text in given]
    left = [min(1, sum(some) / 3) for some in combinations(agree, len(agree) - 1)]
    assert vqa_accuracy("YES", given) == pytest.approx(sum(left) / len(left) if len(given) > 3 else float(any(agree)))


def test_the_challenges_ten_references():
    for count, accuracy in ((0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)):
        assert vqa_accuracy("yes", ["yes"] * count + ["no"] * (10 - count)) == pytest.approx(accuracy)


def test_edit_distance_and_anls():
    for a, b, distance in (("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)):
        assert edit_distance(a, b) == edit_distance(b, a) == distance
    assert anls("Kitten", ["sitting"]) == pytest.approx(1 - 3 / 7) and anls("  Hello\tworld", ["hello World"]) == 1
    assert anls("abcd", ["abxy"]) == 0, "half of it is too little"
    assert anls("", ["a"]) == anls("a", [""]) == 0 and anls("", [""]) == 1
    assert anls("kitten", ["dog", "mitten", "sitting"]) == pytest.approx(5 / 6)


@given(st.text("ab c", max_size=8), st.text("ab c", max_size=8))
@settings(max_examples=100, deadline=None)
def test_edit_distance_is_between_its_bounds(a, b):
    kept = sum(block.size for block in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= len(a) + len(b) - 2 * kept


@given(st.text("yes2². a", max_size=6), st.lists(st.text("yes2². a", max_size=6), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_up_to_three_references_count_as_the_best_of_them(prediction, several):
    for mark in MARKS:
        assert mark(prediction, several) == max(mark(prediction, [one]) for one in several), mark.__name__
        assert 0 <= mark(prediction, several) <= 1 and mark(prediction, [prediction]) == 1


def test_references_of_a_sample(tmp_path):
    """Those of its field, through jsonl, parquet and its own; without it, the last answer."""
    rows = [{"conversations": TURNS, "answers": ["2", "two"]}, {"conversations": TURNS}, {"conversations": TURNS, "answers": None}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert convert.main([str(path), "--out", str(tmp_path / "shards")]) == 0
    for place in (path, tmp_path / "shards"):
        assert [references(sample) for sample in map(open_samples(place).__getitem__, range(3))] == [("2", "two"), ("2",), ("2",)]
    turns = (Turn("user", "?"), Turn("assistant", "a"), Turn("user", "?"), Turn("assistant", "b"), Turn("user", "bye"))
    assert references(Sample(turns)) == ("b",) and references(Sample(turns, answers=("c",))) == ("c",)


@pytest.mark.parametrize("answers", [[], "2", 2, ["2", 2], [None], {"a": "b"}, [{"answer": "2"}], False])
def test_answers_that_are_no_references(tmp_path, answers):
    """Told to whoever asks for them; training, which does not, takes the sample."""
    sample = open_samples(write_jsonl(tmp_path / "a.jsonl", [{"conversations": TURNS, "answers": answers}]))[0]
    with pytest.raises(SampleError, match=r"a\.jsonl:1: 'answers' must be a list of one or more texts"):
        references(sample)


def test_marking_loads_no_torch():
    code = "import sys, dataset.answers; sys.exit('torch' in sys.modules or any(name.startswith('chat') for name in sys.modules))"
    assert not subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode
