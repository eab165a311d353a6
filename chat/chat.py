"""One conversation with memory: its turns, the images they show, and what the model has read of them.

Legend: T tokens, P placeholders of an image, W width of the vision encoder.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image

from model.conversation import IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER, Rendered, Turn, count_images
from model.errors import UsageError
from model.inference.assistant import Assistant
from model.inference.generation import Memory, Prompt, Sampling, generate_stream


@dataclass
class Chat:
    """A conversation with a model. An image is its pixels, as the model's encoder sees them, and is encoded once."""

    assistant: Assistant
    sampling: Sampling
    max_length: int = 2048  # tokens of history, question and answer together
    turns: list[Turn] = field(default_factory=list)
    pixels: list[torch.Tensor] = field(default_factory=list)  # the images of `turns`, in reading order
    waiting: list[torch.Tensor] = field(default_factory=list)  # images for the next question
    dropped: int = 0  # exchanges that the last question pushed out of the history
    _labels: dict[torch.Tensor, str] = field(default_factory=dict, repr=False)
    _features: dict[torch.Tensor, dict[int, torch.Tensor]] = field(default_factory=dict, repr=False)  # of its views: number, [P, W]
    _memory: Memory = field(init=False, repr=False)
    _encoded: int = field(default=0, repr=False)  # views so far; their numbers are never used twice

    def __post_init__(self):
        self._memory = Memory(self.assistant.decoder.new_cache())

    def add_image(self, image: Image.Image, label: str = "") -> None:
        """The next question shows this image, too, after its `label` (a time, say) as text."""
        self.waiting.append(pixels := self.assistant.preprocess(image))
        if label:
            self._labels[pixels] = label.replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER)

    def room(self) -> int:
        """How many images with short labels fit into a question of a hundred tokens."""
        alone = len(self.assistant.renderer.render_prompt((Turn("user", ""),)))
        config = self.assistant.model.config
        return (self._limit(1) - alone - 100) // ((config.image_tokens + 8) * (1 + config.tiles))

    def reset(self) -> None:
        """Forgets everything."""
        self.turns, self.pixels, self.waiting, self.dropped = [], [], [], 0
        self._labels, self._features = {}, {}
        self._memory.keep(0)

    def undo(self) -> bool:
        """Takes back the last exchange; its images wait again. False when there is none."""
        if not self.turns:
            return False
        *self.turns, question, _ = self.turns
        kept = len(self.pixels) - count_images([question])
        self.pixels, self.waiting = self.pixels[:kept], self.pixels[kept:] + self.waiting
        return True

    def ask(self, question: str) -> str:
        """The whole answer; see `stream`."""
        return "".join(self.stream(question))

    def stream(self, question: str) -> Iterator[str]:
        """The answer in pieces of whole characters, as it grows; question and answer become part of the history.

        The waiting images stand before the question, or where it says <image> if it does so once for each; otherwise an
        <image> in it is text. When the history grows too long for the model, its oldest exchanges are dropped whole,
        with their images (`dropped`); the answer gets at least an eighth of `max_length`.
        Closing the iterator (contextlib.closing) ends the work at once; what was said until then, or until an
        exception, stays in the history. An answer without any text leaves the history as it was, and images waiting.
        Raises UsageError when the question alone is too long.
        """
        turns, pixels = [*self.turns, self._turn(question)], [*self.pixels, *self.waiting]
        turns, pixels, rendered, dropped = self._make_room(turns, pixels)
        room = self.max_length - len(rendered)
        sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))
        said, self.dropped = [], 0
        try:
            prompt, features = self._prompt(rendered, pixels)
            stop = self.assistant.renderer.im_end
            tokens = generate_stream(self.assistant.decoder, self._memory, prompt, features, sampling, stop)
            for piece in filter(None, self.assistant.pieces(tokens)):
                said.append(piece)
                yield piece
        finally:
            if said:
                self.turns, self.pixels, self.waiting = [*turns, Turn("assistant", "".join(said))], pixels, []
                self.dropped = dropped

    def _prompt(self, rendered: Rendered, pixels: list[torch.Tensor]) -> tuple[Prompt, dict[int, torch.Tensor]]:
        """The prompt with its images by number, and the features of each number. New images are encoded; those no
        longer shown are forgotten."""
        new = list(dict.fromkeys(image for image in pixels if image not in self._features))
        for image, views in zip(new, self.assistant.encode(new) if new else (), strict=True):
            self._features[image] = dict(enumerate(views, start=self._encoded))
            self._encoded += len(views)
        self._features = {image: self._features[image] for image in pixels}
        prompt = self.assistant.prompt(rendered, [number for image in pixels for number in self._features[image]])
        return prompt, {number: view for views in self._features.values() for number, view in views.items()}

    def _turn(self, question: str) -> Turn:
        """The question with a placeholder for each waiting image, after its label if it has one. Bytes that are no
        text, as a terminal may pass on, become question marks."""
        question = question.encode(errors="replace").decode()
        shown = [f"{self._labels.get(image, '')} {IMAGE_PLACEHOLDER}".lstrip() for image in self.waiting]
        first, *others = question.split(IMAGE_PLACEHOLDER)
        if len(others) == len(shown):
            return Turn("user", first + "".join(image + text for image, text in zip(shown, others, strict=True)))
        typed = question.replace(IMAGE_PLACEHOLDER, TYPED_PLACEHOLDER)
        return Turn("user", "".join(f"{image}\n" for image in shown) + typed)

    def _limit(self, turns: int) -> int:
        """The longest prompt. With a history it leaves room for a whole answer; a single question may leave less."""
        return self.max_length - min(self.sampling.max_new_tokens, self.max_length // (8 if turns == 1 else 2))

    def _make_room(
        self, turns: list[Turn], pixels: list[torch.Tensor]
    ) -> tuple[list[Turn], list[torch.Tensor], Rendered, int]:
        """The newest exchanges that fit, their images and rendering, and how many others were dropped."""
        dropped = 0
        def render() -> Rendered:
            return self.assistant.renderer.render_prompt(self.assistant.tiled(tuple(turns), pixels))

        while len(prompt := render()) > (limit := self._limit(len(turns))):
            if len(turns) == 1:
                views = len(prompt.image_starts) or 1
                fit = len(pixels) - math.ceil((len(prompt) - limit) / self.assistant.model.config.image_tokens * len(pixels) / views)
                remedy = f"{len(pixels)} images in it: {fit} would fit" if fit > 0 else "shorten it"
                raise UsageError(f"the question is too long: {len(prompt)} tokens, more than {limit}; {remedy},"
                                 " or raise --max_seq_len")  # fmt: skip
            pixels = pixels[count_images(turns[:1]) :]
            turns, dropped = turns[2:], dropped + 1  # a question and its answer
        return turns, pixels, prompt, dropped


def as_markdown(exchanges: Iterable[tuple[Sequence[str], str, str]]) -> str:
    """A conversation as a Markdown file: of each exchange the names of what was shown, the question, and the answer."""
    parts = []
    for names, question, answer in exchanges:
        asked = "".join(f"`{name}`\n" for name in names) + question
        parts += ["\n".join(f"> {line}" for line in asked.splitlines()), answer.strip() or "(no answer)"]
    return "\n\n".join(parts) + "\n"
