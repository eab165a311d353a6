"""One visitor's conversation: what he asked, what he was answered, the pictures he is about to show."""

import contextlib
import io
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from chat.markdown import escape

from .engine import Engine, Job
from .models import Loading
from .pictures import MAX_PICTURES, Picture, PictureError
from .problems import explain


@dataclass
class Exchange:
    """A question with its pictures, and the answer as far as it has come."""

    question: str
    pictures: list[Picture]
    model: str = ""
    answer: str = ""
    problem: str | None = None
    stopped: bool = False
    remembered: bool = False  # whether the model's history holds it
    dropped: int = 0  # exchanges that this question pushed out of the history
    history: tuple[tuple, list] | None = None  # turns and pictures up to the answer, when there are pictures
    answered_by: Callable[[], object | None] = lambda: None  # the assistant, as long as it is in memory
    seen: object | None = None  # model.inference.attention_map.AnswerAttention, once somebody wanted to know
    first_seconds: float | None = None
    seconds: float = 0.0


@dataclass
class Visitor:
    """A conversation of one session, used by its script runs: one at a time, but for a moment after a lost connection has
    come back, when the old one is still on its way to its end. What changes the conversation holds the lock."""

    engine: Engine
    max_length: int
    present: Callable[[], bool] = lambda: False  # whether his browser is connected
    tray: list[Picture] = field(default_factory=list)  # shown with the next question
    notices: list[str] = field(default_factory=list)  # what was wrong with pictures he brought
    exchanges: list[Exchange] = field(default_factory=list)
    job: Job | None = None
    ahead: Job | None = None  # encodes pictures of the tray
    taken: set[str] = field(default_factory=set)  # ids of uploaded files that have been read
    _acts: dict[str, int] = field(default_factory=dict)  # how often each widget has acted
    _ahead_of: list = field(default_factory=list)  # what `ahead` is for: the chat, and the tray's pictures as it takes them
    _chat: object | None = None  # chat.chat.Chat
    _last_turn: object | None = None  # of the chat's history, before the job
    _loading: Loading | None = None  # of the chat's model: as long as somebody holds it, nobody loads that again
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _waiting: bool = False  # the last exchange waits for the model to be loaded

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return self._waiting or self.job is not None

    @property
    def waiting(self) -> bool:
        """Whether the last question waits for the model."""
        return self._waiting

    def once(self, key: str, action: Callable) -> Callable:
        """A callback for a widget that acts once for each time it was put on the page: Streamlit may call one again when
        another run cuts in, and people click twice. Notices about earlier acts go."""
        count = self._acts.get(key, 0)

        def callback(*args) -> None:
            with self._lock:
                if self._acts.get(key, 0) == count:
                    self._acts[key], self.notices = count + 1, []
                    action(*args)

        return callback

    def bring(self, picture: Picture) -> None:
        """Puts a picture into the tray; raises PictureError when that is full."""
        if len(self.tray) >= MAX_PICTURES:
            raise PictureError(f"picture {picture.name!r} is left out: a question can show {MAX_PICTURES} pictures")
        self.tray.append(picture)

    def remove(self, picture: Picture) -> None:
        """Takes a picture out of the tray, if it is still in there."""
        self.tray = [kept for kept in self.tray if kept is not picture]

    def ask(self, question: str) -> None:
        """A new question about the pictures of the tray; `begin` gets it answered."""
        self.end()
        self.exchanges.append(Exchange(question, self.tray))
        self.tray, self._waiting = [], True

    def again(self, question: str | None = None) -> None:
        """The last exchange anew, with another question when one is given."""
        self.end()
        last = self.exchanges[-1]
        if last.remembered:
            self._chat.undo()
        self.exchanges[-1] = Exchange(question or last.question, last.pictures)
        self._waiting = True

    def fail(self, problem: str) -> None:
        """The last question cannot be answered."""
        with self._lock:
            if self._waiting:
                self._waiting, self.exchanges[-1].problem = False, problem

    @property
    def at_once(self) -> bool:
        """Whether the last question waits for nothing but the model: its pictures are as that takes them."""
        return self._waiting and all(picture.converted for picture in self.exchanges[-1].pictures)

    def begin(self, loading: Loading, sampling) -> None:
        """Hands the last question to the engine, unless that has been done; the model has to be there."""
        with self._lock:
            if not self._waiting:
                return
            exchange = self.exchanges[-1]
            exchange.model = loading.choice.label
            try:
                chat = self._chat_with(loading, sampling)
                chat.waiting = [picture.pixels() for picture in exchange.pictures]
            except Exception as error:  # were the question left waiting, every run of the page would end here
                return self.fail(explain(error))
            self._last_turn = chat.turns[-1] if chat.turns else None
            self._look_no_further()  # what is not encoded yet, the question has encoded at once
            self.job = self.engine.submit(lambda: chat.stream(exchange.question), self.present)
            self._waiting = False

    def look_ahead(self, loading: Loading, sampling) -> None:
        """Has the pictures of the tray encoded while the question is being typed; the model has to be there."""
        with self._lock:
            old = self._chat
            if self.busy or (not self.tray and not self._ahead_of):
                return
            if old is not None and old.turns and old.assistant is not loading.assistant:
                return  # somebody who only looks at another model keeps what this one has read
            chat, pixels = self._chat_with(loading, sampling), []
            for picture in self.tray:
                with contextlib.suppress(PictureError, MemoryError):  # the question will say so
                    pixels.append(picture.pixels())
            sights = [chat, *pixels]
            if list(map(id, sights)) != list(map(id, self._ahead_of)):
                self._look_no_further()
                self._ahead_of = sights
                self.ahead = self.engine.submit(lambda: chat.encode_ahead(pixels), self.present)

    def _look_no_further(self) -> None:
        if self.ahead is not None:
            self.ahead.stop()
        self._ahead_of = []

    @property
    def jobs(self) -> int:
        """His jobs that are not done."""
        return sum(job is not None and not job.done for job in (self.job, self.ahead))

    def _chat_with(self, loading: Loading, sampling):
        """The chat; when the model has been changed, a new one with the same history."""
        from chat.chat import Chat

        old, assistant = self._chat, loading.assistant
        if old is None or old.assistant is not assistant:
            self._chat, self._loading = Chat(assistant, sampling, self.max_length), loading
            if old is not None:
                self._chat.turns, self._chat.pixels = old.turns, old.pixels
        self._chat.sampling = sampling
        return self._chat

    def settle(self, job: Job) -> None:
        """Writes a finished job's result into its exchange, unless that has been done."""
        with self._lock:
            if self.job is not job:
                return
            chat, exchange = self._chat, self.exchanges[-1]
            exchange.answer, exchange.problem, exchange.stopped = job.text, job.problem, job.stopped
            exchange.seconds = job.ended - job.submitted
            exchange.first_seconds = job.first - job.submitted if job.first else None
            exchange.remembered = bool(chat.turns) and chat.turns[-1] is not self._last_turn
            if exchange.remembered:
                exchange.dropped = chat.dropped
                exchange.history = (tuple(chat.turns), list(chat.pixels)) if chat.pixels else None
                exchange.answered_by = weakref.ref(chat.assistant)
            self.job = None

    def look(self, exchange: Exchange) -> str | None:
        """Finds out where an answer looked, in turn with everybody's answers; what went wrong, or None."""
        assistant = exchange.answered_by()

        def steps() -> Iterator:
            from model.inference.attention_map import look

            yield look(assistant, *exchange.history)

        job = self.engine.submit(steps, self.present)
        while not job.wait(len(job.values), 1.0):
            pass
        exchange.seen = job.values[0] if job.values else None
        return job.problem

    def end(self) -> None:
        """Stops what is on its way, at once, and keeps what was said."""
        with self._lock:
            if self._waiting:
                self._waiting, self.exchanges[-1].stopped = False, True
            if job := self.job:
                job.stop()
                while not job.wait(len(job.values), 1.0):
                    pass
                self.settle(job)

    def clear(self) -> None:
        """Forgets everything."""
        self.end()
        self._look_no_further()
        self.tray, self.exchanges, self.notices, self._chat, self._loading = [], [], [], None, None

    def markdown(self, title: str, you: str, model: str) -> str:
        """The conversation as a Markdown document; pictures by name, for their bytes stay the visitor's."""
        file = io.StringIO()
        file.write(f"# {title}\n\n{time.strftime('%Y-%m-%d %H:%M')}\n")
        for exchange in self.exchanges:
            names = "".join(f"[{escape(picture.name)}] " for picture in exchange.pictures)
            said = escape(exchange.answer) or "—"
            file.write(f"\n**{you}:** {names}{escape(exchange.question)}\n\n**{model} ({exchange.model}):** {said}\n")
        return file.getvalue()
