"""Answers: loading a trained model, one chat with memory, and many questions in batches. Terminal and page share it.

Legend: B prompts of a batch, T tokens, P placeholders of a picture.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from model.conversation import IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER, Rendered, Turn
from model.errors import UsageError
from model.inference.assistant import Assistant
from model.inference.generation import Memory, Prompt, Sampling, generate_stream
from model.vision import preprocess


@dataclass
class Chat:
    """A conversation with memory: turns, the pictures they show, and what the model has read of them."""

    assistant: Assistant
    sampling: Sampling
    max_length: int = 2048  # tokens of history, question and answer together
    turns: list[Turn] = field(default_factory=list)
    pixels: list[torch.Tensor] = field(default_factory=list)
    waiting: list[torch.Tensor] = field(default_factory=list)  # pictures for the next question
    dropped: int = 0  # exchanges that the last question pushed out of the history
    _labels: dict[int, tuple[torch.Tensor, str]] = field(default_factory=dict, repr=False)  # by id, with the picture to keep it
    _memory: Memory = field(init=False, repr=False)
    _next: int = field(init=False, repr=False)
    _numbers: dict[int, int] = field(init=False, repr=False)  # id of a picture -> its number, never used again
    _shown: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(init=False, repr=False)  # number -> pixels, patch vectors

    def __post_init__(self):
        self._next = 0
        self._memory = Memory(self.assistant.decoder.new_cache())
        self._forget()

    def add_image(self, picture: Image.Image, label: str = "") -> None:
        """The next question is about this picture, too; `label` (a time, say) stands as text before it."""
        self.waiting.append(pixels := preprocess(picture))
        if label:
            self._labels[id(pixels)] = pixels, label.replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER)

    def room(self) -> int:
        """How many pictures with short labels a question of a hundred tokens can show."""
        alone = len(self.assistant.renderer.render_prompt((Turn("user", ""),)))
        return (self._limit(1) - alone - 100) // (self.assistant.model.config.image_tokens + 8)

    def reset(self) -> None:
        """Forgets everything."""
        self.turns, self.pixels, self.waiting, self.dropped, self._labels = [], [], [], 0, {}
        self._forget()

    def undo(self) -> str | None:
        """Takes back the last exchange: its pictures wait again, its question is returned. None when there is none."""
        if not self.turns:
            return None
        *self.turns, question, _ = self.turns
        kept = len(self.pixels) - question.content.count(IMAGE_PLACEHOLDER)
        marks, text = self._marks(self.pixels[kept:]), question.content
        self.pixels, self.waiting = self.pixels[:kept], self.pixels[kept:] + self.waiting
        if text.startswith(before := "".join(f"{mark}\n" for mark in marks)):
            return text.removeprefix(before).replace(TYPED_PLACEHOLDER, IMAGE_PLACEHOLDER)
        for mark in marks:
            text = text.replace(mark, IMAGE_PLACEHOLDER, 1)
        return text

    def ask(self, question: str) -> str:
        """The whole answer; see `stream`."""
        return "".join(self.stream(question))

    def stream(self, question: str) -> Iterator[str]:
        """The answer in pieces of whole characters, as it grows; question and answer become part of the history.

        Pictures come from `add_image`. They stand before the question, or where it says <image> if it does so once for
        each; otherwise an <image> in it is text. When the history grows too long for the model, its oldest exchanges
        are dropped whole, with their pictures (`dropped`); the answer gets at least an eighth of `max_length`.
        Closing the iterator (contextlib.closing) ends the work at once; what was said until then, or until an exception,
        stays in the history. An answer without any text leaves the history as it was, and pictures waiting.
        Raises UsageError when the question alone is too long.
        """
        turns, pixels, prompt, self.dropped = self._make_room([*self.turns, self._turn(question)], [*self.pixels, *self.waiting])
        said = []
        try:
            room = self.max_length - len(prompt)
            sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))
            prompt = self._read(prompt, pixels)
            features = {number: features for number, (_, features) in self._shown.items()}
            tokens = generate_stream(self.assistant.decoder, self._memory, prompt, features, sampling,
                                     self.assistant.renderer.im_end)  # fmt: skip
            for piece in self.assistant.pieces(tokens):
                said.append(piece)
                yield piece
        finally:
            if said:
                self.turns, self.pixels, self.waiting = [*turns, Turn("assistant", "".join(said))], pixels, []
            else:
                self.dropped = 0

    def encode_ahead(self, pixels: list[torch.Tensor]) -> Iterator[None]:
        """Encodes pictures, one a step, before a question shows them. Those that neither they nor the history show are
        forgotten."""
        self._keep([*self.pixels, *pixels])
        for picture in pixels if self.assistant.vision_encoder is not None else ():
            self._encode([picture])
            yield

    def _turn(self, question: str) -> Turn:
        """The question with a mark for each waiting picture."""
        marks = self._marks(self.waiting)
        first, *others = question.split(IMAGE_PLACEHOLDER)
        if len(others) == len(marks):
            return Turn("user", first + "".join(mark + text for mark, text in zip(marks, others, strict=True)))
        return Turn("user", "".join(f"{mark}\n" for mark in marks) + question.replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER))

    def _marks(self, pixels: list[torch.Tensor]) -> list[str]:
        """What stands in a turn for each picture: a mark, after its label if it has one."""
        return [f"{self._labels[id(p)][1]} {IMAGE_PLACEHOLDER}" if id(p) in self._labels else IMAGE_PLACEHOLDER for p in pixels]

    def _limit(self, turns: int) -> int:
        """The longest prompt. As part of a history it leaves a whole answer room; a single question may leave less."""
        return self.max_length - min(self.sampling.max_new_tokens, self.max_length // (8 if turns == 1 else 2))

    def _make_room(self, turns: list[Turn], pixels: list[torch.Tensor]) -> tuple[list[Turn], list[torch.Tensor], Rendered, int]:
        """The newest exchanges that fit, their pictures and rendering, and how many others were dropped."""
        dropped = 0
        while (length := len(prompt := self.assistant.renderer.render_prompt(tuple(turns)))) > (limit := self._limit(len(turns))):
            if len(turns) == 1:
                fit = len(pixels) - math.ceil((length - limit) / self.assistant.model.config.image_tokens)
                shown = f"{len(pixels)} pictures in it: {fit} would fit" if fit > 0 else "shorten it"
                raise UsageError(f"the question is too long: {length} tokens, more than {limit}; {shown}, or raise --max_seq_len")
            pixels = pixels[turns[0].content.count(IMAGE_PLACEHOLDER) :]
            turns, dropped = turns[2:], dropped + 1  # a question and its answer
        return turns, pixels, prompt, dropped

    def _read(self, prompt: Rendered, pixels: list[torch.Tensor]) -> Prompt:
        """The prompt with its pictures by number; those not seen before are encoded."""
        self._encode(pixels)
        self._keep(pixels)
        return self.assistant.prompt(prompt, [self._numbers[id(picture)] for picture in pixels])

    def _encode(self, pixels: list[torch.Tensor]) -> None:
        """Gives pictures not seen before a number and patch vectors."""
        new = list({id(picture): picture for picture in pixels if id(picture) not in self._numbers}.values())
        for picture, features in zip(new, self.assistant.encode(new) if new else (), strict=True):
            self._numbers[id(picture)] = self._next
            self._shown[self._next] = picture, features
            self._next += 1

    def _keep(self, pixels: list[torch.Tensor]) -> None:
        """Forgets what was seen of all pictures but these."""
        kept = {id(picture) for picture in pixels}
        self._shown = {number: seen for number, seen in self._shown.items() if id(seen[0]) in kept}
        self._numbers = {id(picture): number for number, (picture, _) in self._shown.items()}

    def _forget(self) -> None:
        self._memory.keep(0)
        self._numbers, self._shown = {}, {}
