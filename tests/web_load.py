"""Several sessions at once, for minutes: is every answer complete and right for its image, and memory given back?

    python -m tests.web_load                              # 8 sessions, 120 s, on what `make demo` left
    python -m tests.web_load --sessions 4 --seconds 30

Reads   out/ and dataset/demo/ (--demo names another clone that has them). Needs Chromium.
Prints  answers, how many were as the terminal gave them (out/demo_predictions.jsonl), waiting times, and the server's memory.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from tests.browser import User, chromium, serve
from tests.conftest import REPOSITORY

SESSION_SECONDS = "5"  # that Streamlit keeps the session of a closed page; its default is 120


@dataclass(frozen=True)
class Case:
    """An image, a question about it, and the answer."""

    image: Path
    question: str
    answer: str


@dataclass(frozen=True)
class Report:
    """What came of it; memory of the server in MB after one round of all sessions, and after the load, all pages closed."""

    answers: int
    wrong: list[str]
    first_words: list[float]  # seconds from Enter to the first text of each answer, as the browser shows it
    memory_before: float
    memory_after: float


class Asker:
    """One session, which asks about one image after the other, each in a conversation of its own."""

    def __init__(self, user: User, cases: Sequence[Case], rng: random.Random):
        self.user, self.cases, self.rng = user, cases, rng
        self.case: Case | None = None
        self.asked, self.first, self.busy = 0.0, None, False

    def begin(self) -> None:
        """Asks a new question, without waiting for the answer."""
        user, self.case = self.user, self.rng.choice(self.cases)
        if user.messages().count():
            user.button("Clear").click()
            user.until(lambda: user.messages().count() == 0)
        user.attach((self.case.image.name, self.case.image.read_bytes()))
        self.asked, self.first, self.busy = time.monotonic(), None, True
        user.ask(self.case.question)

    def look(self) -> str | None:
        """The answer when it is complete."""
        text = self.user.answer()
        if self.first is None and text.count():
            self.first = time.monotonic() - self.asked
        if self.user.page.get_by_role("button", name="Regenerate").count() == 0:
            return None
        self.busy = False
        return text.inner_text()


def rounds(askers: Sequence[Asker], seconds: float) -> tuple[int, list[str], list[float]]:
    """All ask, again and again until the time is over: answers, wrong ones in words, seconds to the first words."""
    deadline, answers, wrong, first = time.monotonic() + seconds, 0, [], []
    while True:
        for asker in askers:
            if not asker.busy and time.monotonic() < deadline:
                asker.begin()
            elif asker.busy and (answer := asker.look()) is not None:
                answers, first = answers + 1, [*first, asker.first or time.monotonic() - asker.asked]
                if answer.strip() != asker.case.answer:
                    wrong.append(f"{asker.case.image.name}: {asker.case.question} -> {answer!r}, not {asker.case.answer!r}")
        if time.monotonic() >= deadline and not any(asker.busy for asker in askers):
            return answers, wrong, first
        askers[0].user.page.wait_for_timeout(20)


def load(url: str, pid: int, browser, cases: Sequence[Case], sessions: int, seconds: float) -> Report:
    """Loads a page's server, whose process is `pid`, started with SESSION_SECONDS."""
    def run(how_long: float) -> tuple[int, list[str], list[float]]:
        users = [User(browser, url) for _ in range(sessions)]
        try:
            for user in users:
                user.line.wait_for()
                user.greedy()
            return rounds([Asker(user, cases, random.Random(number)) for number, user in enumerate(users)], how_long)
        finally:
            for user in users:
                user.context.close()

    def memory() -> float:
        time.sleep(3 * float(SESSION_SECONDS))  # sessions end, and with them all that belongs to them
        return psutil.Process(pid).memory_info().rss / 2**20

    run(0.1)
    before = memory()
    answers, wrong, first = run(seconds)
    return Report(answers, wrong, first, before, memory())


def demo_cases(demo: Path) -> list[Case]:
    """The demo's test questions with the answers that eval_vlm.py gave."""
    rows = map(json.loads, (demo / "out" / "demo_predictions.jsonl").read_bytes().splitlines())
    return [Case(demo / "dataset" / "demo" / "images" / row["images"][0], row["question"], row["prediction"]) for row in rows]


def main() -> int:
    """Returns 0 when all answers were right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--demo", type=Path, default=REPOSITORY, help="a clone in which make demo has run")
    args = parser.parse_args()
    os.environ["STREAMLIT_SERVER_DISCONNECTED_SESSION_TTL"] = SESSION_SECONDS
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser, serve(
        "--save_dir", args.demo / "out", log=Path(folder) / "server.log"
    ) as (url, process):
        report = load(url, process.pid, browser, demo_cases(args.demo), args.sessions, args.seconds)
    print(f"{args.sessions} sessions, {args.seconds:.0f} s: {report.answers} answers, {len(report.wrong)} not as in the terminal")
    print(*report.wrong, sep="\n")
    print(f"first words after {median(report.first_words):.2f} s (median), {max(report.first_words):.2f} s at most")
    print(f"server's memory: {report.memory_before:.0f} MB after a first round, {report.memory_after:.0f} MB afterwards")
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
