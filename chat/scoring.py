"""Scoring: questions with reference answers, several metrics, and how far to trust their means.

exact, rouge_l, vqa, anls   averages of what each answer scores: dataset/answers.py
chrf                        chrF2 of each answer (Popović 2015), averaged; by sacrebleu
bleu                        BLEU of all answers together (Papineni et al. 2002, Post 2018); by sacrebleu

Intervals are percentile bootstraps (Efron 1979). What is resampled is images, with all their questions, and
conversations where there is no image: questions about one image are right or wrong together. Two sets of answers are
compared on the same draws.

Legend: Q questions, G groups of questions about the same images, S statistics of a question.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dataset.answers import CJK, anls, exact_match, last_answer, references, rouge_l, vqa_accuracy
from dataset.images import ImageSource, hash_of, open_images
from dataset.jsonl import parse_json
from dataset.sources import Mixture, open_samples
from model.conversation import IMAGE_PLACEHOLDER, Turn, count_images
from model.errors import SampleError, UsageError, reason, shown
from model.inference.assistant import Assistant
from model.inference.generation import Sampling
from model.outputs import check_output
from model.pixels import blank
from model.storage import write_atomically

RESAMPLES, LEVEL = 1000, 0.95
DIFFERENCE = "difference"  # name of a column
OWN = {"exact": exact_match, "rouge_l": rouge_l, "vqa": vqa_accuracy, "anls": anls}
METRICS = (*OWN, "chrf", "bleu")


def score(
    assistant: Assistant, data: str, image_dir: str, predictions: Path, report: Path | None = None,
    metrics: str = "exact,rouge_l", seed: int = 0, batch_size: int = 64, max_new_tokens: int = 512, blind: bool = False,
) -> dict:  # fmt: skip
    """Answers every question greedily, writes predictions and report, prints the figures and returns them; `seed` is
    that of the bootstrap. `blind`: questions with images are answered without seeing as well, each image being a blank one.

    Raises UsageError, DataError and SampleError for what the files lack, before the first answer where possible.
    """
    for flag, file in (("--predictions", predictions), ("--report", report)):
        if file is not None:
            check_output(flag, file)
    samples, images, settings = open_samples(data), open_images(image_dir), assistant.model.pixel_settings
    questions = read_questions(samples, images)
    chosen = make_metrics(metrics, chain.from_iterable(question.references for question in questions))
    about_images = [question for question in questions if question.images] if blind else []
    if blind and not about_images:
        raise UsageError(f"--blind: no question in {data} shows an image; leave it out")

    def load(question: Question, place: int) -> torch.Tensor:
        return images.pixels(samples[question.sample].images[place], question.where, None, settings)

    blanks: dict[torch.Size, torch.Tensor] = {}  # one for all images of a shape is encoded once

    def load_blank(question: Question, place: int) -> torch.Tensor:
        shape = load(question, place).shape  # as many tiles
        return blanks.setdefault(shape, blank(shape, settings))

    answers = answer_in_batches(assistant, questions, load, batch_size, max_new_tokens)
    unseen = answer_in_batches(assistant, about_images, load_blank, batch_size, max_new_tokens)
    pairs = ((answer, next(unseen) if blind and question.images else None)
             for question, answer in zip(questions, answers, strict=True))  # fmt: skip
    pairs = write_predictions(questions, pairs, predictions)
    figures = make_report(questions, [answer for answer, _ in pairs], chosen, seed)
    figures |= {"data": data, "max_new_tokens": max_new_tokens}
    print("\n".join(table(figures, list(chosen))))
    if blind:
        seeing, unseeing = zip(*[pair for question, pair in zip(questions, pairs, strict=True) if question.images], strict=True)
        figures["blind"] = compare(about_images, {"blind": unseeing, "seeing": seeing}, chosen, seed)
        print_comparison(figures["blind"])
        for name, compared in figures["blind"].items():
            without, worth = (compared["total"][column]["value"] for column in ("blind", DIFFERENCE))
            print(f"without seeing: {without:.2f} of {name}; images are worth {worth:.2f}")
    print(f"[{LEVEL:.0%} intervals: bootstrap over {figures['total']['groups']} images or conversations, seed {seed}]"
          f"  predictions: {predictions}")  # fmt: skip
    write_report(report, figures)
    return figures


def compare_files(files: Sequence[str], metrics: str, seed: int = 0, report: Path | None = None) -> dict:
    """Compares two files of predictions, as `score` writes them, of the same questions; prints the figures and returns them.

    Raises UsageError and SampleError for files that cannot be read or do not answer the same questions.
    """
    if report is not None:
        check_output("--report", report)
    (questions, ours), (others, theirs) = map(read_predictions, files)
    for number, pair in enumerate(zip_longest(questions, others), start=1):
        first, second = (question and (question.turns[0].content, *question.images, *question.references) for question in pair)
        if first != second:
            raise UsageError(f"--compare: question {number} of {files[0]} is {shown(first)}, of {files[1]} {shown(second)}; score"
                             " both on the same file")  # fmt: skip
    chosen = make_metrics(metrics, chain.from_iterable(question.references for question in questions))
    figures = compare(questions, {"a": ours, "b": theirs}, chosen, seed)
    print(f"a: {files[0]}\nb: {files[1]}")
    print_comparison(figures)
    print(f"[difference: b - a; {LEVEL:.0%} intervals: bootstrap over images, the same draws for both, seed {seed}]")
    write_report(report, figures)
    return figures


def write_report(report: Path | None, figures: dict) -> None:
    """The figures as json, where a file is named."""
    if report:
        text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
        write_atomically(report, lambda file: file.write(text.encode(errors="backslashreplace")))


# --- questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One question with its history, its images by name or by the hash of their bytes, and the reference answer; or several
    references, which then count alone."""

    turns: tuple[Turn, ...]
    images: tuple[str | int, ...]
    answer: str
    kind: str
    sample: int = 0  # whose first images these are
    where: str = ""  # "file:line"
    answers: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """What a prediction is compared with."""
        return self.answers or (self.answer,)


def read_questions(samples: Mixture, images: ImageSource) -> list[Question]:
    """Every answer to a user's turn as a question, its history being the conversation before it. Bytes of images that
    the data hold are left where they are.

    Raises SampleError for a conversation without one, for an image that is not there and for `answers` that are no references.
    """
    questions = []
    for number in range(len(samples)):
        sample, before = samples[number], len(questions)
        several = references(sample) if sample.answers not in (None, ()) else ()
        last = last_answer(sample.turns) if several else -1
        names = tuple(ref if isinstance(ref, str) else int(hash_of(ref)) for ref in sample.images)
        for name in filter(lambda name: isinstance(name, str), names):
            images.find(name, sample.where)
        for at, turn in enumerate(sample.turns):
            if turn.role == "assistant" and at and sample.turns[at - 1].role == "user":
                history = sample.turns[:at]
                own = names[: count_images(history)]
                kind = sample.kind or kind_of(turn.content)
                questions.append(Question(history, own, turn.content, kind, number, sample.where, several if at == last else ()))
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
        places = {name: (question, place) for question in batch for place, name in enumerate(question.images)}
        pixels = {name: load(question, place) for name, (question, place) in places.items()}
        images = [pixels[name] for question in batch for name in question.images]
        yield from assistant.generate([question.turns for question in batch], images, sampling)


def write_predictions(questions: list[Question], answers: Iterable[tuple[str, str | None]],
                      target: Path) -> list[tuple[str, str | None]]:  # fmt: skip
    """The answers, each with that of the blind, if any, when all of them are in the file. Until then they are in
    NAME.partial: a stop loses neither these nor older predictions."""
    partial, predictions = target.with_name(f"{target.name}.partial"), []
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            pairs = zip(questions, tqdm(answers, total=len(questions), unit="question", disable=None), strict=True)
            for question, (prediction, unseen) in pairs:
                predictions.append((prediction, unseen))
                row = {
                    "where": question.where, "images": [name if isinstance(name, str) else f"of {question.where}" for name in question.images],
                    "question": question.turns[-1].content.replace(f"{IMAGE_PLACEHOLDER}\n", ""),
                    "answer": question.answer, **({"answers": question.answers} if question.answers else {}),
                    "prediction": prediction, **({} if unseen is None else {"blind": unseen}), "kind": question.kind,
                    "correct": bool(exact_match(prediction, question.references)),
                }  # fmt: skip
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except KeyboardInterrupt:
        print(f"\nstopped after {len(predictions)} of {len(questions)} questions; their answers: {partial}")
        raise
    os.replace(partial, target)
    return predictions


def read_predictions(path: str) -> tuple[list[Question], list[str]]:
    """The questions of a file of predictions, and what was answered; raises UsageError and SampleError."""
    questions, predictions = [], []
    try:
        lines = Path(path).read_bytes().split(b"\n")  # answers hold all else that ends a line
    except OSError as error:
        raise UsageError(f"--compare {path}: {reason(error)}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = parse_json(line, where := f"{path}:{number}")
        row = {"images": [], "kind": "", "answers": []} | row if isinstance(row, dict) else {}
        texts, lists = [row.get(name) for name in ("question", "answer", "prediction")], [row.get(name) for name in ("images", "answers")]
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(one, list) for one in lists):
            raise SampleError("no line of --predictions: wanted are texts 'question', 'answer' and 'prediction' (an empty one where"
                              f" nothing was said) and lists 'images' and 'answers': {shown(row)}", where)  # fmt: skip
        turn, images, answers = Turn("user", texts[0]), *(tuple(map(str, one)) for one in lists)
        questions.append(Question((turn,), images, texts[1], str(row["kind"]), where=str(row.get("where", number)), answers=answers))
        predictions.append(texts[2])
    if not questions:
        raise UsageError(f"--compare {path}: it holds no predictions")
    return questions, predictions


# --- metrics ----------------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """`statistics(prediction, references)` is a row of S numbers; `value` turns the sum of such rows into the figure."""

    statistics: Callable[[str, Sequence[str]], list[float]]
    value: Callable[[np.ndarray], float]


def mean_of(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    """The average of what each answer scores alone."""
    return Metric(lambda *pair: [metric(*pair), 1], lambda total: total[0] / total[1])


def difference(metric: Metric) -> Metric:
    """The second figure minus the first, of rows that hold the statistics of two predictions side by side."""
    return Metric(metric.statistics, lambda total: metric.value(total[len(total) // 2 :]) - metric.value(total[: len(total) // 2]))


def make_metrics(names: str, references: Iterable[str]) -> dict[str, Metric]:
    """The metrics named in "exact,rouge_l,...", for these references. Raises UsageError for an unknown name and for sacrebleu missing."""
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen or set(chosen) - set(METRICS):
        raise UsageError(f"--metrics {names!r}: known are {', '.join(METRICS)}, with commas between")
    has_chinese = any(re.search(f"[{CJK}]", text) for text in references)
    return {name: mean_of(OWN[name]) if name in OWN else of_sacrebleu(name, has_chinese) for name in chosen}


def of_sacrebleu(name: str, has_chinese: bool) -> Metric:
    """chrF or BLEU; BLEU cuts Chinese into characters where there is some."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UsageError(f"--metrics {name} needs sacrebleu: pip install sacrebleu, or leave it out") from error
    if name == "chrf":
        return mean_of(lambda prediction, references: CHRF().sentence_score(prediction, references).score / 100)
    bleu = BLEU(tokenize="zh" if has_chinese else "13a", effective_order=True)

    def statistics(prediction: str, references: Sequence[str]) -> list[float]:
        found = bleu.sentence_score(prediction, references)
        return [found.sys_len, found.ref_len, *found.counts, *found.totals]

    def value(total: np.ndarray) -> float:
        sys_len, ref_len, *counts = [int(number) for number in total]
        return BLEU.compute_bleu(counts[:4], counts[4:], sys_len, ref_len, smooth_method="exp").score / 100

    return Metric(statistics, value)


# --- report -----------------------------------------------------------------------------------------------------------


def make_report(questions: list[Question], predictions: Sequence[str], metrics: dict[str, Metric], seed: int) -> dict:
    """All figures, in total and by kind."""
    return report_of(questions, mark(questions, predictions, metrics), metrics, seed)


def compare(questions: list[Question], answers: dict[str, Sequence[str]], metrics: dict[str, Metric], seed: int) -> dict[str, dict]:
    """A report for each metric: both of two predictions by their names, and the second minus the first, whose interval is
    that of a paired bootstrap."""
    first, second = (mark(questions, predictions, metrics) for predictions in answers.values())
    reports = {}
    for name, metric in metrics.items():
        columns = (*answers, DIFFERENCE)
        statistics = first[name], second[name], np.hstack([first[name], second[name]])
        reports[name] = report_of(questions, dict(zip(columns, statistics, strict=True)),
                                  dict(zip(columns, (metric, metric, difference(metric)), strict=True)), seed)  # fmt: skip
    return reports


def mark(questions: list[Question], predictions: Sequence[str], metrics: dict[str, Metric]) -> dict[str, np.ndarray]:
    """Statistics [Q, S] of each metric."""
    pairs = [(prediction, question.references) for prediction, question in zip(predictions, questions, strict=True)]
    return {name: np.array([metric.statistics(*pair) for pair in pairs], float) for name, metric in metrics.items()}


def report_of(questions: list[Question], statistics: dict[str, np.ndarray], metrics: dict[str, Metric], seed: int) -> dict:
    """The figures of these statistics."""
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


def print_comparison(reports: dict[str, dict]) -> None:
    """A table for each metric."""
    for name, report in reports.items():
        columns = [column for column in report["total"] if column not in ("questions", "groups")]
        print("\n".join([f"\n{name}", *table(report, columns)]))
