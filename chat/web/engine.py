"""One thread that works for all visitors: a step of each job in turn, so that nobody waits for somebody's long answer.

A job is an iterator; a step is its next value. Only this thread touches a model, so models need no locks, and one pool of
arithmetic threads serves everybody.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from .problems import explain

ABANDONED = 20.0  # seconds after which a job is ended whose visitor is not there and has not come back


class Job:
    """Work for one visitor: the values it has given so far, and how it ended."""

    def __init__(self, begin: Callable[[], Iterator[Any]], present: Callable[[], bool]):
        self._begin, self._steps, self._present = begin, None, present
        self._changed = threading.Condition()
        self._stop = False
        self._seen = time.monotonic()
        self.values: list[Any] = []
        self.done, self.stopped = False, False
        self.problem: str | None = None  # what went wrong and what to do
        self.submitted, self.first, self.ended = time.monotonic(), None, None  # on the monotonic clock, seconds

    @property
    def text(self) -> str:
        """The values of an answer, joined."""
        return "".join(self.values)

    def stop(self) -> None:
        """Ends the job before its next step; what it has given stays."""
        self._stop = True

    def wait(self, known: int, timeout: float) -> bool:
        """Returns when there are more than `known` values, the job is done, or the time is over; then whether it is done."""
        with self._changed:
            self._seen = time.monotonic()
            self._changed.wait_for(lambda: self.done or len(self.values) > known, timeout)
            return self.done

    def step(self) -> bool:
        """For the engine: one step; whether there are more."""
        try:
            if self._present():
                self._seen = time.monotonic()
            if self._stop or time.monotonic() - self._seen > ABANDONED:
                self.stopped = True
                self._close()
            else:
                if self._steps is None:
                    self._steps = self._begin()
                self._give(next(self._steps))
                return True
        except StopIteration:
            pass
        except Exception as error:  # whatever happened to one visitor is told to him, and the others go on
            self.problem = explain(error)
        with self._changed:
            self.done, self.ended = True, time.monotonic()
            self._begin = self._steps = self._present = None  # and with them a chat's memory, once its visitor is gone
            self._changed.notify_all()
        return False

    def _close(self) -> None:
        if self._steps is not None:
            self._steps.close()

    def _give(self, value: Any) -> None:
        with self._changed:
            if self.first is None:
                self.first = time.monotonic()
            self.values.append(value)
            self._changed.notify_all()


class Engine:
    """Runs jobs, a step of each in turn, in the order in which they came."""

    def __init__(self):
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()
        self._running = 0
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    def submit(self, begin: Callable[[], Iterator[Any]], present: Callable[[], bool] = lambda: False) -> Job:
        """A job whose iterator `begin` makes, in the engine's thread; returns at once. It goes on as long as its visitor is
        `present` or somebody waits for it."""
        job = Job(begin, present)
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()
        return job

    @property
    def busy(self) -> int:
        """Jobs that are not done."""
        with self._wake:
            return len(self._jobs) + self._running

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs)
                job, self._running = self._jobs.popleft(), 1
            more = job.step()
            with self._wake:
                self._running = 0
                if more:
                    self._jobs.append(job)
            del job  # a thread that waits must not keep the last conversation alive
