"""A conversation as tokens: checked, and rendered to ids, labels and image positions. Training, answers and the
processor for transformers share it.

Legend: T tokens, P placeholder tokens of an image (196). The layout is ChatML:

    <|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n
    <|im_start|>user\\nWhat is this? @@@...@<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n          <- "A cat.<|im_end|>\\n" carries the loss, nothing else

A user's <image> becomes P times the token "@". Its embedding is never used: the model replaces it by a patch vector.

The tokenizer of the minimind-3 family has a token of its own for that, <|image_pad|>. Conversations in its layout have no
system turn of themselves, and every answer begins with what was thought, mostly nothing: <think>\\n\\n</think>\\n\\n
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from .errors import SampleError
from .model_minimind import IGNORE_INDEX

IMAGE_PLACEHOLDER = "<image>"
TYPED_PLACEHOLDER = "<\u200bimage>"  # of somebody who typed it: with a zero-width space it is text
IMAGE_PAD = "<|image_pad|>"
DEFAULT_SYSTEM = "You are a helpful assistant"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


DEFAULT_TURN = Turn("system", DEFAULT_SYSTEM)


class Conversation(Protocol):
    """What is rendered: turns, and "file:line" for messages."""

    turns: tuple[Turn, ...]
    where: str


def parse_turns(conversations: Any, where: str = "") -> tuple[Turn, ...]:
    """`[{"role": ..., "content": ...}, ...]` as turns; raises SampleError naming the turn at fault."""
    if not isinstance(conversations, list) or not conversations:
        raise SampleError("'conversations' is missing, empty, or no list", where)
    turns = []
    for number, message in enumerate(conversations, start=1):
        if not isinstance(message, dict):
            raise SampleError(f"turn {number} is no object with 'role' and 'content'", where)
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise SampleError(f"turn {number} has role {role!r}; known are {', '.join(ROLES)}", where)
        if not isinstance(content, str):
            raise SampleError(f"turn {number} has content of type {type(content).__name__}, not text", where)
        if not is_text(content):
            raise SampleError(f"turn {number} holds half of a surrogate pair: no text", where)
        if role == "system" and number > 1:
            raise SampleError(f"turn {number} is a system turn; only the first may be", where)
        if role != "user" and IMAGE_PLACEHOLDER in content:
            raise SampleError(f"turn {number} has an {IMAGE_PLACEHOLDER}; only a user's turn shows images", where)
        turns.append(Turn(role, content))
    return tuple(turns)


def is_text(content: str) -> bool:
    """Whether a string is Unicode text; json can spell strings that are not."""
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True


def image_token_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that stands for an image in conversations of this tokenizer's family."""
    return IMAGE_PAD if IMAGE_PAD in tokenizer.get_vocab() else "@"


def split_thought(content: str) -> tuple[str, str]:
    """An answer as what was thought, between <think> and </think>, and what was said, as the published template does it."""
    thought = content.split("</think>")[0].split("<think>")[-1].strip("\n") if "</think>" in content else ""
    return thought, content.split("</think>")[-1].lstrip("\n")


def count_images(turns: Iterable[Turn]) -> int:
    """How many images the turns show."""
    return sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")


def with_tiles(turns: tuple[Turn, ...], grids: Iterable[tuple[int, int]]) -> tuple[Turn, ...]:
    """The turns with a placeholder for every tile of an image after the image's own, each after its place as text. `grids`
    are rows and columns of the tiles of each image in reading order."""
    grids = iter(grids)
    return tuple(replace(turn, content=mark_tiles(turn.content, grids)) if turn.role == "user" else turn for turn in turns)


def mark_tiles(text: str, grids: Iterator[tuple[int, int]]) -> str:
    """A user's text with the tiles of its images, whose grids are taken from `grids`."""
    first, *others = text.split(IMAGE_PLACEHOLDER)
    for other in others:
        rows, columns = next(grids, (0, 1))
        tiles = "".join(f"\nrow {row + 1} column {column + 1}: {IMAGE_PLACEHOLDER}" for row in range(rows) for column in range(columns))
        first += IMAGE_PLACEHOLDER + tiles + other
    return first


@dataclass(frozen=True)
class Rendered:
    """ids int64 [T]; labels int64 [T], equal to the ids of supervised tokens and -100 elsewhere; for each image the
    index of its first placeholder token."""

    ids: np.ndarray
    labels: np.ndarray
    image_starts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


class Renderer:
    """Turns conversations into ids, with the special tokens placed by this code alone.

    Text is text: "<|im_end|>" or "@" in somebody's message become ordinary tokens, never a boundary or an image.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_tokens: int = 196, empty_thoughts: bool = True):
        self.tokenizer, self.image_tokens, self.image_token = tokenizer, image_tokens, image_token_of(tokenizer)
        self.thinks = self.image_token == IMAGE_PAD
        # A copy of its own, in which special tokens inside text are split like any other text.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", self.image_token)]
        if None in ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"the tokenizer lacks one of <|im_start|>, <|im_end|>, {self.image_token!r}")
        self.im_start, self.im_end, self.image_token_id = ids
        self._newline, self._header = (self.encode(text)[0] for text in ("\n", "assistant\n"))
        self._no_thought = self.encode("<think>\n\n</think>\n\n")[0] if self.thinks and empty_thoughts else []

    def render(self, sample: Conversation, max_length: int | None = None) -> Rendered:
        """The whole conversation, cut to `max_length` tokens at the end.

        Raises SampleError when the cut would touch an image or leave no supervised token.
        """
        rendered = self.render_turns(sample.turns, sample.where)
        if max_length is not None and len(rendered) > max_length:
            starts = rendered.image_starts
            if starts and starts[-1] + self.image_tokens > max_length:
                raise SampleError(f"{len(starts)} images of {self.image_tokens} tokens do not fit in {max_length} tokens"
                                  f" (the last ends at {starts[-1] + self.image_tokens}); raise --max_seq_len",
                                  sample.where)  # fmt: skip
            # What is cut is the end of an answer, or whole turns after the last image.
            rendered = Rendered(rendered.ids[:max_length], rendered.labels[:max_length], starts)
        # The first token is never predicted, so a label there would teach nothing.
        if not (rendered.labels[1:] != IGNORE_INDEX).any():
            problem = f"no token of an answer is left within {max_length} tokens; raise --max_seq_len"
            raise SampleError(problem, sample.where)
        return rendered

    def render_prompt(self, turns: tuple[Turn, ...], continue_last: bool = False) -> Rendered:
        """The conversation so far and the opening of the assistant's answer, or with `continue_last` the last turn as
        that opening; no labels."""
        rendered = self.render_turns(turns)
        if continue_last:
            ids = rendered.ids[: -1 - len(self._newline)]  # without <|im_end|> and the newline after it
        else:
            ids = np.concatenate([rendered.ids, [self.im_start, *self._header, *self._no_thought]])
        return Rendered(ids, np.full_like(ids, IGNORE_INDEX), rendered.image_starts)

    def render_turns(self, turns: tuple[Turn, ...], where: str = "") -> Rendered:
        """The whole conversation, whatever its length and its last turn."""
        if turns[0].role != "system" and not self.thinks:
            turns = (DEFAULT_TURN, *turns)
        ids: list[int] = []
        labels: list[int] = []
        starts: list[int] = []  # of images, in reading order
        for turn in turns:
            if turn.role == "assistant":
                # Header and answer are tokenized apart, as at inference, where the header ends the prompt.
                turn_ids = [self.im_start, *self._header, *self._answer(turn.content), self.im_end, *self._newline]
                unsupervised = 1 + len(self._header)  # the rest is learned, with the end of the turn
            else:
                text_ids, turn_starts = self.encode(f"{turn.role}\n{turn.content}", turn.role == "user", where)
                starts += [len(ids) + 1 + start for start in turn_starts]  # 1 for <|im_start|>
                turn_ids = [self.im_start, *text_ids, self.im_end, *self._newline]
                unsupervised = len(turn_ids)  # nobody has to learn to ask
            ids += turn_ids
            labels += [IGNORE_INDEX] * unsupervised + turn_ids[unsupervised:]
        return Rendered(np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64), tuple(starts))

    def _answer(self, content: str) -> list[int]:
        if not self.thinks:
            return self.encode(content)[0]
        thought, said = split_thought(content)
        if thought:
            return self.encode(f"<think>\n{thought}\n</think>\n\n{said}")[0]
        return self._no_thought + self.encode(said)[0]

    def encode(self, text: str, show_images: bool = False, where: str = "") -> tuple[list[int], list[int]]:
        """ids of `text` with every <image> as P placeholder tokens, and the index of each run's first token.

        The text is tokenized with the placeholders in place, as the published code does, and the runs are found by
        their character offsets: a literal "@" next to an <image> moves nothing.
        """
        if not show_images or IMAGE_PLACEHOLDER not in text:
            return self._backend.encode(text, add_special_tokens=False).ids, []
        parts, P = text.split(IMAGE_PLACEHOLDER), self.image_tokens
        if self.image_token == IMAGE_PAD:  # a special token: what stands next to it is tokenized by itself
            pieces, starts = [self.encode(part)[0] for part in parts], []
            ids = pieces[0]
            for piece in pieces[1:]:
                starts.append(len(ids))
                ids += [self.image_token_id] * P + piece
            return ids, starts
        # "<image>\nWhat?" -> "@@...@\nWhat?": no merge of the vocabulary contains "@", so P of them are P tokens.
        encoding = self._backend.encode((self.image_token * P).join(parts), add_special_tokens=False)
        begins = [begin for begin, _ in encoding.offsets]  # the first character of each token
        starts, at = [], 0
        for part in parts[:-1]:
            at += len(part)  # the first character of the run
            start = bisect_left(begins, at)
            if encoding.ids[start : start + P] != [self.image_token_id] * P or begins[start] != at:
                raise SampleError(f"the tokenizer does not keep {P} {self.image_token!r} apart", where)
            starts.append(start)
            at += P
        return encoding.ids, starts
