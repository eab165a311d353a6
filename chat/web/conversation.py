"""One session's conversation with a model: questions, answers as they grow, the images of the next question."""

import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from chat.chat import Chat, as_markdown
from machine import ran_out_of_memory
from model.conversation import Turn
from model.errors import SampleError, UsageError
from model.inference.assistant import Assistant
from model.inference.attention_map import AnswerAttention, look
from model.inference.generation import Sampling
from model.pixels import CLIP, PixelSettings

from .images import SessionImage
from .models import ModelChoice

model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")


def in_turn(step: Callable, *args) -> Any:
    """What the step returns, once its turn has come: one thread does the steps of all sessions, a token each, in the
    order in which they come. Nobody waits for another's long answer, and models need no locks."""
    return model_thread.submit(step, *args).result()


def explain(error: Exception) -> str:
    """What went wrong and what to do, for the session. A fault of the program goes to the log as well."""
    if isinstance(error, (UsageError, SampleError)):
        return str(error)
    traceback.print_exception(error)
    if ran_out_of_memory(error):
        return "not enough memory; ask again with fewer images or fewer new tokens, or clear the conversation"
    return f"{type(error).__name__}: {error}. The server's log has the details; ask again, or clear the conversation"


@dataclass
class Exchange:
    """A question with its images, and the answer as far as it has come."""

    question: str
    images: list[SessionImage]
    model: ModelChoice | None = None  # which answers, once it does
    answer: str = ""
    done: bool = False
    stopped: bool = False
    problem: str = ""
    dropped: int = 0  # exchanges that this question pushed out of the history
    history: tuple[list[Turn], list[torch.Tensor]] | None = None  # turns and images up to the answer, if it has images
    attention: AnswerAttention | None = None  # once somebody wanted to see it
    asked: float = field(default_factory=time.monotonic)
    seconds: float = 0.0


@dataclass
class Conversation:
    """A conversation of one session. Whatever changes it runs by `in_turn`, so nothing happens amid a step."""

    max_length: int  # tokens that are remembered
    tray: list[SessionImage] = field(default_factory=list)  # shown with the next question
    notices: list[str] = field(default_factory=list)  # what was wrong with the images of the last try
    exchanges: list[Exchange] = field(default_factory=list)
    assistant: Assistant | None = None
    model: ModelChoice | None = None  # of the assistant
    sampling: Sampling = field(default_factory=Sampling)
    _chat: Chat | None = None
    _answer: Iterator[str] | None = None  # the answer on its way

    @property
    def pixel_settings(self) -> PixelSettings:
        """How images are prepared for the present model."""
        return self.assistant.model.pixel_settings if self.assistant else CLIP

    @property
    def busy(self) -> bool:
        """Whether the last question has no whole answer yet."""
        return bool(self.exchanges) and not self.exchanges[-1].done

    def ask(self, question: str, images: list[SessionImage]) -> None:
        """A new question about the images; `step` gets it answered."""
        self.stop()
        self.tray = []
        self.exchanges.append(Exchange(question, images))

    def again(self, question: str | None = None) -> None:
        """The last question again, or another one in its place."""
        self.stop()
        last = self.exchanges.pop()
        if last.answer:
            self._chat.undo()
        self.exchanges.append(Exchange(question or last.question, last.images))

    def step(self) -> None:
        """The next piece of the last exchange's answer."""
        if not self.busy:
            return
        exchange = self.exchanges[-1]
        try:
            if self._answer is None:
                self._answer = self._begin(exchange)
            exchange.answer += next(self._answer)
        except StopIteration:
            self._finish()
        except Exception as error:  # whatever happened is told in the session it happened to
            exchange.problem = explain(error)
            self._finish()

    def _begin(self, exchange: Exchange) -> Iterator[str]:
        """The answer's pieces. A model that was changed meanwhile gets the same history."""
        old, exchange.model, settings = self._chat, self.model, self.pixel_settings
        if old is None or old.assistant is not self.assistant:
            self._chat = Chat(self.assistant, self.sampling, self.max_length)
            if old is not None:
                before, brought = old.assistant.model.pixel_settings, [image for each in self.exchanges for image in each.images]
                again = {image.pixels(before): image.pixels(settings) for image in brought}
                self._chat.turns, self._chat.pixels = old.turns, [again[pixels] for pixels in old.pixels]
        self._chat.sampling = self.sampling
        self._chat.waiting = [image.pixels(settings) for image in exchange.images]
        return self._chat.stream(exchange.question)

    def _finish(self) -> None:
        exchange, chat, self._answer = self.exchanges[-1], self._chat, None
        exchange.done, exchange.seconds = True, time.monotonic() - exchange.asked
        if exchange.answer:
            exchange.dropped = chat.dropped
            exchange.history = (list(chat.turns), list(chat.pixels)) if chat.pixels else None

    def stop(self) -> None:
        """Ends the answer on its way and keeps what was said."""
        if self.busy:
            if self._answer is not None:
                self._answer.close()
            self.exchanges[-1].stopped = True
            self._finish()

    def look(self, exchange: Exchange) -> AnswerAttention:
        """Where an answer of the present model looked."""
        if exchange.attention is None:
            exchange.attention = look(self.assistant, *exchange.history)
        return exchange.attention

    def as_markdown(self) -> str:
        """The conversation as a file."""
        said = [([image.name for image in each.images], each.question, each.answer) for each in self.exchanges]
        return as_markdown(said)

    def clear(self) -> None:
        """Forgets everything but the model."""
        self.stop()
        self.tray, self.exchanges, self.notices, self._chat = [], [], [], None
