"""Scoring: questions with reference answers, marks by several metrics, and how far to trust their means.

exact     the answer is the reference, but for white space around it
rouge_l   F1 of the longest common subsequence of words (Lin 2004); case and punctuation do not count, and each Chinese
          or Japanese character is a word
chrf      chrF2 of each answer (Popović 2015), averaged; by sacrebleu
bleu      BLEU of all answers together (Papineni et al. 2002, Post 2018); by sacrebleu

Intervals are percentile bootstraps (Efron 1979). What is drawn anew is pictures, with all their questions, and
conversations where there is no picture: questions about one picture are right or wrong together.

Legend: Q questions, G groups of questions about the same pictures, S statistics of a question.
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from dataset.images import open_images
from dataset.sources import Mixture, open_samples
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.errors import SampleError, UsageError
from model.inference.assistant import Assistant
from model.inference.generation import Sampling
from model.storage import check_output, hold, write_atomically
from model.weights import lock_of

RESAMPLES, LEVEL = 1000, 0.95
CJK = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # scripts without spaces between words
WORD = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")


@dataclass(frozen=True)
class Question:
    """One question with its history, pictures (by name, or what else tells them apart) and reference answer."""

    turns: tuple[Turn, ...]
    images: tuple[str | bytes, ...]
    answer: str
    kind: str
    where: str = ""  # "file:line"


def answer_in_batches(
    assistant: Assistant, questions: list[Question], load_pixels, batch_size: int, max_new_tokens: int
) -> Iterator[tuple[Question, str]]:
    """Greedy answers, in the order of the questions. `load_pixels(name)` gives uint8 [3, 224, 224].

    Questions about the same pictures share a batch; a picture is encoded once, and kept until nobody asks about it.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    names = {name: number for number, name in enumerate(dict.fromkeys(name for q in questions for name in q.images))}
    asked = Counter(name for question in questions for name in question.images)
    order = sorted(range(len(questions)), key=lambda at: ([names[name] for name in questions[at].images], at))
    features: dict[int, torch.Tensor] = {}
    ready: dict[int, str] = {}
    given = 0
    for start in range(0, len(order), batch_size):
        batch = [questions[at] for at in order[start : start + batch_size]]
        if new := [n for n in dict.fromkeys(n for q in batch for n in q.images) if names[n] not in features]:
            features |= zip((names[name] for name in new), assistant.encode([load_pixels(name) for name in new]), strict=True)
        prompts = [assistant.prompt(assistant.renderer.render_prompt(q.turns), [names[n] for n in q.images]) for q in batch]
        ready |= zip(order[start:], assistant.answer(prompts, features, sampling), strict=False)
        for name in (name for question in batch for name in question.images):
            asked[name] -= 1
            if not asked[name]:
                del features[names[name]]
        while given in ready:
            yield questions[given], ready.pop(given)
            given += 1


@dataclass(frozen=True)
class Metric:
    """`statistics(prediction, reference)` is a row of S numbers; `value` turns the sum of such rows into the figure."""

    statistics: Callable[[str, str], list[float]]
    value: Callable[[np.ndarray], float]
    signature: str = ""  # the settings, as the library that computes it writes them


def mean_of(mark: Callable[[str, str], float]) -> Metric:
    """The average of a mark that each answer has by itself."""
    return Metric(lambda prediction, reference: [mark(prediction, reference), 1], lambda total: total[0] / total[1])


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
    """Length of the longest common subsequence: a row of the usual table is one integer, whose zero bits mark where the
    length grows (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for bit, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << bit
    row = every = (1 << len(b)) - 1
    for word in a:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & every
    return len(b) - row.bit_count()


def make_metrics(names: str, references: list[str]) -> dict[str, Metric]:
    """The metrics named in "exact,rouge_l,...". Raises UsageError for an unknown name and for sacrebleu missing."""
    metrics = {}
    for name in dict.fromkeys(name.strip() for name in names.split(",") if name.strip()):
        if name in ("exact", "rouge_l"):
            metrics[name] = mean_of(exact_match if name == "exact" else rouge_l)
        elif name in ("chrf", "bleu"):
            metrics[name] = of_sacrebleu(name, any(re.search(f"[{CJK}]", text) for text in references))
        else:
            raise UsageError(f"--metrics {name}: known are exact, rouge_l, chrf, bleu")
    if not metrics:
        raise UsageError("--metrics is empty; known are exact, rouge_l, chrf, bleu")
    return metrics


def of_sacrebleu(name: str, has_chinese: bool) -> Metric:
    """chrF or BLEU; BLEU cuts Chinese into characters where there is some."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UsageError(f"--metrics {name} needs sacrebleu: pip install sacrebleu, or leave it out") from error
    if name == "chrf":
        metric = CHRF()
        mark = mean_of(lambda prediction, reference: metric.sentence_score(prediction, [reference]).score / 100)
        return Metric(mark.statistics, mark.value, "sentence mean of " + str(_signed(metric)))
    metric = BLEU(tokenize="zh" if has_chinese else "13a", effective_order=True)
    corpus = BLEU(tokenize="zh" if has_chinese else "13a")

    def statistics(prediction: str, reference: str) -> list[float]:
        score = metric.sentence_score(prediction, [reference])
        return [score.sys_len, score.ref_len, *score.counts, *score.totals]

    def value(total: np.ndarray) -> float:
        counts = [int(number) for number in total]
        return BLEU.compute_bleu(counts[2:6], counts[6:], counts[0], counts[1], smooth_method="exp").score / 100

    return Metric(statistics, value, str(_signed(corpus)))


def _signed(metric):
    """sacrebleu's signature, which exists once a score was computed."""
    metric.corpus_score(["a"], [["a"]])
    return metric.get_signature()


def summarize(statistics: dict[str, np.ndarray], groups: list, metrics: dict[str, Metric], seed: int) -> dict:
    """{"questions", "groups", metric: {"value", "low", "high"}} of each metric's statistics [Q, S] and the group of each
    question."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    rows = np.hstack([statistics[name] for name in metrics])
    sums = np.zeros((len(numbers), rows.shape[1]))  # [G, S of all metrics]
    np.add.at(sums, [numbers[group] for group in groups], rows)
    rng = np.random.default_rng(seed)
    draws = np.stack([np.bincount(rng.integers(len(sums), size=len(sums)), minlength=len(sums)) @ sums for _ in range(RESAMPLES)])
    summary, at = {"questions": len(rows), "groups": len(sums)}, 0
    for name, metric in metrics.items():
        columns = slice(at, at := at + statistics[name].shape[1])
        low, high = np.quantile([metric.value(draw) for draw in draws[:, columns]], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        summary[name] = {"value": float(metric.value(sums.sum(0)[columns])), "low": float(low), "high": float(high)}
    return summary


def read_questions(samples: Mixture) -> tuple[list[Question], dict[str | bytes, tuple[int, int]]]:
    """Every answer to a user's turn as a question, its history being the conversation before it; and of each image the sample
    and the place in it that show it first. An image that the data hold is called by a digest of its bytes.

    Raises SampleError for a conversation without one.
    """
    questions, places = [], {}
    for number in range(len(samples)):
        sample, before = samples[number], len(questions)
        images = tuple(ref if isinstance(ref, str) else hashlib.blake2b(ref, digest_size=16).digest() for ref in sample.images)
        for at, turn in enumerate(sample.turns):
            if turn.role == "assistant" and at and sample.turns[at - 1].role == "user":
                history = sample.turns[:at]
                shown = sum(t.content.count(IMAGE_PLACEHOLDER) for t in history if t.role == "user")
                kind = sample.kind or kind_of(turn.content)
                questions.append(Question(history, images[:shown], turn.content, kind, sample.where))
                for place, image in enumerate(images[:shown]):
                    places.setdefault(image, (number, place))
        if len(questions) == before:
            raise SampleError("no answer stands after a user's turn: nothing to score", sample.where)
    return questions, places


def kind_of(answer: str) -> str:
    """The usual three kinds of VQA answers (arXiv 1505.00468), for files that name none."""
    text = answer.strip().lower().rstrip(".")
    return "yes/no" if text in ("yes", "no") else "number" if text.replace(".", "", 1).isdigit() else "other"


@dataclass(frozen=True)
class ScoreJob:
    """What `score` needs: files, metrics by name, and how to answer."""

    data: str
    image_dir: str
    predictions: Path
    report: Path | None = None
    metrics: str = "exact,rouge_l"
    seed: int = 0  # of the bootstrap; answers are greedy
    batch_size: int = 64
    max_new_tokens: int = 512


def score(assistant: Assistant, job: ScoreJob) -> dict:
    """Answers every question greedily, writes predictions and report, prints the figures and returns them.

    Raises UsageError, DataError and SampleError for what the files lack, before the first answer where possible.
    """
    lock = claim_files(job)
    samples, images = open_samples(job.data), open_images(job.image_dir)
    questions, places = read_questions(samples)
    metrics = make_metrics(job.metrics, [question.answer for question in questions])
    for ref, (number, _) in places.items():
        if isinstance(ref, str):
            images.state(ref, samples.where(number))  # raises when there is no such picture

    def load(image: str | bytes) -> torch.Tensor:
        number, place = places[image]
        return images.pixels(image if isinstance(image, str) else samples[number].images[place], samples.where(number))

    answers = answer_in_batches(assistant, questions, load,
                                job.batch_size, job.max_new_tokens)  # fmt: skip
    answered = write_predictions(answers, len(questions), job.predictions)
    report = make_report(answered, metrics, job)
    print("\n".join(table(report, list(metrics))))
    print(f"[{LEVEL:.0%} intervals: bootstrap over {report['total']['groups']} pictures or conversations, seed {job.seed}]"
          f"  predictions: {job.predictions}")  # fmt: skip
    if "bleu" in metrics and np.mean([len(WORD.findall(question.answer)) < 4 for question in questions]) > 0.5:
        print("[bleu counts runs of four words, and most references here are shorter: go by another metric]")
    if job.report:
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_atomically(job.report, lambda file: file.write(text.encode(errors="backslashreplace")))
    lock.release()
    return report


def claim_files(job: ScoreJob) -> FileLock:
    """Before the first answer: the files can be written, and nobody else writes them. Raises UsageError and StorageError."""
    for flag, file in (("--predictions", job.predictions), ("--report", job.report)):
        if file is not None:
            check_output(flag, file, replaced=True)
    return hold(lock_of(job.predictions), "give this one another --predictions")


def write_predictions(answers: Iterable[tuple[Question, str]], count: int, target: Path) -> list[tuple[Question, str]]:
    """The answers, when all of them are in the file. Until then they are in NAME.partial: a stop loses neither these nor
    older predictions."""
    partial, answered = target.with_name(f"{target.name}.partial"), []
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            for question, prediction in tqdm(answers, total=count, unit="question", disable=not sys.stderr.isatty()):
                answered.append((question, prediction))
                file.write(json.dumps(prediction_row(question, prediction), ensure_ascii=False) + "\n")
    except KeyboardInterrupt:
        print(f"\nstopped after {len(answered)} of {count} questions; their answers: {partial}")
        raise
    os.replace(partial, target)
    return answered


def prediction_row(question: Question, prediction: str) -> dict:
    """One line of the file of predictions."""
    return {
        "images": [ref if isinstance(ref, str) else f"of {question.where}" for ref in question.images],
        "question": question.turns[-1].content.replace(f"{IMAGE_PLACEHOLDER}\n", ""), "answer": question.answer,
        "prediction": prediction, "kind": question.kind, "correct": bool(exact_match(prediction, question.answer)),
    }  # fmt: skip


def make_report(answered: list[tuple[Question, str]], metrics: dict[str, Metric], job: ScoreJob) -> dict:
    """All figures, in total and by kind, with what they depend on."""
    statistics = {name: np.array([metric.statistics(prediction, question.answer) for question, prediction in answered], float)
                  for name, metric in metrics.items()}  # fmt: skip
    groups = [question.images or question.where for question, _ in answered]
    kinds = np.array([question.kind for question, _ in answered])

    def of(chosen: np.ndarray) -> dict:
        rows = {name: row[chosen] for name, row in statistics.items()}
        return summarize(rows, [groups[number] for number in chosen], metrics, job.seed)

    return {
        "total": of(np.arange(len(answered))),
        "kinds": {str(kind): of(np.flatnonzero(kinds == kind)) for kind in np.unique(kinds)},
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": job.seed},
        "signatures": {name: metric.signature for name, metric in metrics.items() if metric.signature},
        "data": job.data, "max_new_tokens": job.max_new_tokens,
    }  # fmt: skip


def table(report: dict, names: Iterable[str]) -> list[str]:
    """The figures as lines of text."""
    rows = [("kind", "questions", *names)]
    for kind, summary in [*report["kinds"].items(), ("total", report["total"])]:
        cells = (f"{summary[name]['value']:.4f} [{summary[name]['low']:.4f}, {summary[name]['high']:.4f}]" for name in names)
        rows.append((kind, str(summary["questions"]), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]),
                       *(cell.ljust(width) for cell, width in zip(row[2:], widths[2:], strict=True))]).rstrip() for row in rows]  # fmt: skip
