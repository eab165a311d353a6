"""Scoring: questions with reference answers, several metrics, and how far to trust their means.

exact     the answer is the reference, but for white space around it
rouge_l   F1 of the longest common subsequence of words (Lin 2004); case and punctuation do not count, and each Chinese
          or Japanese character is a word
chrf      chrF2 of each answer (Popović 2015), averaged; by sacrebleu
bleu      BLEU of all answers together (Papineni et al. 2002, Post 2018); by sacrebleu

Intervals are percentile bootstraps (Efron 1979). What is resampled is images, with all their questions, and
conversations where there is no image: questions about one image are right or wrong together.

Legend: Q questions, G groups of questions about the same images, S statistics of a question.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset.images import ImageSource, hash_of, open_images
from dataset.sources import Mixture, open_samples
from model.conversation import IMAGE_PLACEHOLDER, Turn, count_images
from model.errors import SampleError, UsageError
from model.inference.assistant import Assistant
from model.inference.generation import Sampling
from model.outputs import check_output
from model.storage import write_atomically

RESAMPLES, LEVEL = 1000, 0.95
CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # scripts without spaces between words
WORD = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")
METRICS = ("exact", "rouge_l", "chrf", "bleu")


def score(
    assistant: Assistant, data: str, image_dir: str, predictions: Path, report: Path | None = None,
    metrics: str = "exact,rouge_l", seed: int = 0, batch_size: int = 64, max_new_tokens: int = 512,
) -> dict:  # fmt: skip
    """Answers every question greedily, writes predictions and report, prints the figures and returns them; `seed` is
    that of the bootstrap.

    Raises UsageError, DataError and SampleError for what the files lack, before the first answer where possible.
    """
    for flag, file in (("--predictions", predictions), ("--report", report)):
        if file is not None:
            check_output(flag, file)
    samples, images = open_samples(data), open_images(image_dir)
    questions = read_questions(samples, images)
    chosen = make_metrics(metrics, [question.answer for question in questions])

    def load(question: Question, place: int) -> torch.Tensor:
        return images.pixels(samples[question.sample].images[place], question.where, None, assistant.model.pixel_settings)

    answers = answer_in_batches(assistant, questions, load, batch_size, max_new_tokens)
    figures = make_report(questions, write_predictions(questions, answers, predictions), chosen, seed)
    figures |= {"data": data, "max_new_tokens": max_new_tokens}
    print("\n".join(table(figures, list(chosen))))
    print(f"[{LEVEL:.0%} intervals: bootstrap over {figures['total']['groups']} images or conversations, seed {seed}]"
          f"  predictions: {predictions}")  # fmt: skip
    if report:
        text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
        write_atomically(report, lambda file: file.write(text.encode(errors="backslashreplace")))
    return figures


# --- questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One question with its history, its images by name or by the hash of their bytes, and the reference answer."""

    turns: tuple[Turn, ...]
    images: tuple[str | int, ...]
    answer: str
    kind: str
    sample: int = 0  # whose first images these are
    where: str = ""  # "file:line"


def read_questions(samples: Mixture, images: ImageSource) -> list[Question]:
    """Every answer to a user's turn as a question, its history being the conversation before it. Bytes of images that
    the data hold are left where they are.

    Raises SampleError for a conversation without one, and for an image that is not there.
    """
    questions = []
    for number in range(len(samples)):
        sample, before = samples[number], len(questions)
        names = tuple(ref if isinstance(ref, str) else int(hash_of(ref)) for ref in sample.images)
        for name in filter(lambda name: isinstance(name, str), names):
            images.find(name, sample.where)
        for at, turn in enumerate(sample.turns):
            if turn.role == "assistant" and at and sample.turns[at - 1].role == "user":
                history = sample.turns[:at]
                shown = names[: count_images(history)]
                kind = sample.kind or kind_of(turn.content)
                questions.append(Question(history, shown, turn.content, kind, number, sample.where))
        if len(questions) == before:
            raise SampleError("no answer stands after a user's turn: nothing to score", sample.where)
    return questions


def kind_of(answer: str) -> str:
    """The usual three kinds of VQA answers (arXiv 1505.00468), for files that name none."""
    text = answer.strip().lower().rstrip(".")
    return "yes/no" if text in ("yes", "no") else "number" if text.replace(".", "", 1).isdigit() else "other"


def answer_in_batches(
    assistant: Assistant, questions: list[Question], load: Callable[[Question, int], torch.Tensor], batch_size: int,
    max_new_tokens: int,
) -> Iterator[str]:  # fmt: skip
    """Greedy answers, in the order of the questions; `load(question, place)` gives its image, preprocessed.
    Questions of a batch about the same image share it."""
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        shown = {name: (question, place) for question in batch for place, name in enumerate(question.images)}
        pixels = {name: load(question, place) for name, (question, place) in shown.items()}
        images = [pixels[name] for question in batch for name in question.images]
        yield from assistant.generate([question.turns for question in batch], images, sampling)


def write_predictions(questions: list[Question], answers: Iterable[str], target: Path) -> list[str]:
    """The answers, when all of them are in the file. Until then they are in NAME.partial: a stop loses neither these
    nor older predictions."""
    partial, predictions = target.with_name(f"{target.name}.partial"), []
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            pairs = zip(questions, tqdm(answers, total=len(questions), unit="question", disable=None), strict=True)
            for question, prediction in pairs:
                predictions.append(prediction)
                row = {
                    "images": [name if isinstance(name, str) else f"of {question.where}" for name in question.images],
                    "question": question.turns[-1].content.replace(f"{IMAGE_PLACEHOLDER}\n", ""),
                    "answer": question.answer, "prediction": prediction, "kind": question.kind,
                    "correct": bool(exact_match(prediction, question.answer)),
                }  # fmt: skip
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except KeyboardInterrupt:
        print(f"\nstopped after {len(predictions)} of {len(questions)} questions; their answers: {partial}")
        raise
    os.replace(partial, target)
    return predictions


# --- metrics ----------------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """`statistics(prediction, reference)` is a row of S numbers; `value` turns the sum of such rows into the figure."""

    statistics: Callable[[str, str], list[float]]
    value: Callable[[np.ndarray], float]


def mean_of(metric: Callable[[str, str], float]) -> Metric:
    """The average of what each answer scores alone."""
    return Metric(lambda *pair: [metric(*pair), 1], lambda total: total[0] / total[1])


def make_metrics(names: str, references: list[str]) -> dict[str, Metric]:
    """The metrics named in "exact,rouge_l,...". Raises UsageError for an unknown name and for sacrebleu missing."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen or set(chosen) - set(METRICS):
        raise UsageError(f"--metrics {names!r}: known are {', '.join(METRICS)}, with commas between")
    has_chinese = any(re.search(f"[{CJK}]", text) for text in references)
    own = {"exact": mean_of(exact_match), "rouge_l": mean_of(rouge_l)}
    return {name: own[name] if name in own else of_sacrebleu(name, has_chinese) for name in chosen}


def exact_match(prediction: str, reference: str) -> float:
    """1 where the two are the same text, else 0."""
    return float(prediction.strip() == reference.strip())


def rouge_l(prediction: str, reference: str) -> float:
    """2 * LCS / (words of both), in [0, 1]; texts without a word are compared as they are."""
    ours, theirs = WORD.findall(prediction.lower()), WORD.findall(reference.lower())
    if not ours and not theirs:
        return exact_match(prediction, reference)
    return 2 * common_subsequence(ours, theirs) / (len(ours) + len(theirs))


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence: row i, entry j of the table is that of a[:i] and b[:j]."""
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(row[j], above[j + 1]))
    return row[-1]


def of_sacrebleu(name: str, has_chinese: bool) -> Metric:
    """chrF or BLEU; BLEU cuts Chinese into characters where there is some."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UsageError(f"--metrics {name} needs sacrebleu: pip install sacrebleu, or leave it out") from error
    if name == "chrf":
        return mean_of(lambda prediction, reference: CHRF().sentence_score(prediction, [reference]).score / 100)
    bleu = BLEU(tokenize="zh" if has_chinese else "13a", effective_order=True)

    def statistics(prediction: str, reference: str) -> list[float]:
        found = bleu.sentence_score(prediction, [reference])
        return [found.sys_len, found.ref_len, *found.counts, *found.totals]

    def value(total: np.ndarray) -> float:
        sys_len, ref_len, *counts = [int(number) for number in total]
        return BLEU.compute_bleu(counts[:4], counts[4:], sys_len, ref_len, smooth_method="exp").score / 100

    return Metric(statistics, value)


# --- report -----------------------------------------------------------------------------------------------------------


def make_report(questions: list[Question], predictions: list[str], metrics: dict[str, Metric], seed: int) -> dict:
    """All figures, in total and by kind."""
    pairs = [(prediction, question.answer) for prediction, question in zip(predictions, questions, strict=True)]
    statistics = {name: np.array([metric.statistics(*pair) for pair in pairs], float)
                  for name, metric in metrics.items()}  # fmt: skip
    groups = [question.images or question.where for question in questions]
    kinds = np.array([question.kind for question in questions])

    def summary(chosen: np.ndarray) -> dict:
        rows = {name: row[chosen] for name, row in statistics.items()}
        return summarize(rows, [groups[number] for number in chosen], metrics, seed)

    return {
        "total": summary(np.arange(len(questions))),
        "kinds": {str(kind): summary(np.flatnonzero(kinds == kind)) for kind in np.unique(kinds)},
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": seed},
    }


def summarize(statistics: dict[str, np.ndarray], groups: list, metrics: dict[str, Metric], seed: int) -> dict:
    """{"questions", "groups", metric: {"value", "low", "high"}} of each metric's statistics [Q, S] and the group of
    each question."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    G, group_of = len(numbers), [numbers[group] for group in groups]
    summary = {"questions": len(groups), "groups": G}
    for name, metric in metrics.items():
        sums = np.zeros((G, statistics[name].shape[1]))  # [G, S]
        np.add.at(sums, group_of, statistics[name])
        rng = np.random.default_rng(seed)
        draws = (np.bincount(rng.integers(G, size=G), minlength=G) for _ in range(RESAMPLES))  # how often each group
        low, high = np.quantile([metric.value(draw @ sums) for draw in draws], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        summary[name] = {"value": float(metric.value(sums.sum(0))), "low": float(low), "high": float(high)}
    return summary


def table(report: dict, names: Iterable[str]) -> list[str]:
    """The figures as lines of text."""
    lines = [f"{'kind':<16} {'questions':>9}" + "".join(f"  {name:<23}" for name in names)]
    for kind, row in [*report["kinds"].items(), ("total", report["total"])]:
        figures = (f"  {row[name]['value']:.4f} [{row[name]['low']:.4f}, {row[name]['high']:.4f}]" for name in names)
        lines.append(f"{kind:<16} {row['questions']:>9}" + "".join(figures))
    return [line.rstrip() for line in lines]
