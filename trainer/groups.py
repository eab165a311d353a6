"""What GRPO learns from: questions with room for an answer, answers drawn by given numbers, and groups of them as rows of a batch.

Legend: G answers of a question, Q tokens of a question, S tokens of the answers in a batch, P patch vectors of an image of width W,
V vocabulary, B rows of T' tokens.
"""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from dataset.answers import last_answer, references
from dataset.vlm_dataset import Batch, Example, ImageInput, collate
from model.conversation import Conversation, Rendered, Renderer, count_images
from model.errors import SampleError
from model.inference.generation import Prompt
from model.model_minimind import IGNORE_INDEX

from .build import Run
from .loop import encode


class QuestionRenderer(Renderer):
    """Renders a sample up to where its last answer begins; <|im_end|> in that place is the one supervised token."""

    def __init__(self, renderer: Renderer, room: int):
        super().__init__(renderer.tokenizer, renderer.image_tokens)
        self.room = room  # tokens that an answer may take

    def render(self, sample: Conversation, max_length: int | None = None) -> Rendered:
        """Raises SampleError for a sample whose last answer follows no question, and for a question that leaves no room."""
        at = last_answer(sample.turns)
        if not at or sample.turns[at - 1].role != "user" or count_images(sample.turns[at:]):
            raise SampleError("the last answer follows no question, or images follow it: nothing to sample answers to", sample.where)
        references(sample)  # malformed ones are found here
        prompt = self.render_prompt(sample.turns[:at])
        if max_length is not None and len(prompt) + self.room > max_length:
            raise SampleError(f"the question takes {len(prompt)} tokens, which leaves no --max_new_tokens {self.room} of --max_seq_len"
                              f" {max_length}", sample.where)  # fmt: skip
        ids = np.append(prompt.ids, self.im_end)
        return Rendered(ids, np.append(prompt.labels, self.im_end), prompt.image_starts)


class TokenSampler:
    """Chooses tokens by uniform numbers [answers, tokens] in [0, 1): a token where the probabilities of those before it add up
    to no more. Keeps log-probability and entropy of each choice, in nats."""

    def __init__(self, uniforms: torch.Tensor, temperature: float):
        self.uniforms, self.temperature = uniforms, temperature
        self.chosen: list[list[tuple[float, float]]] = [[] for _ in uniforms]

    def __call__(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """logits [B, V] of the answers `rows` -> tokens int64 [B]."""
        log_p = (logits.float() / self.temperature).log_softmax(-1)
        sums = log_p.exp().cumsum(-1)
        wanted = self.uniforms[rows, len(self.chosen[rows[0]])] * sums[:, -1]  # rows go on together; sums end near 1
        tokens = torch.searchsorted(sums, wanted[:, None], right=True).clamp(max=logits.shape[1] - 1)
        figures = torch.cat([log_p.gather(1, tokens), -(log_p.exp() * log_p).sum(-1, keepdim=True)], dim=1)
        for row, pair in zip(rows, figures.tolist(), strict=True):
            self.chosen[row].append(tuple(pair))
        return tokens.squeeze(1)


@dataclass
class Group:
    """A question and different answers to it, all unless they are long, ready to learn from."""

    prompt: Prompt
    images: tuple[ImageInput, ...]
    answers: list[tuple[int, ...]]  # with <|im_end|> where they ended
    sampled: list[float]  # log-probabilities of all their tokens when they were sampled
    advantages: list[float]
    counts: list[int]  # how often each was sampled
    before: torch.Tensor | None = None  # log-probabilities [S] before the first of several steps


@dataclass(frozen=True)
class Packed:
    """Groups as rows: a question, read once, and after it its answers, each of which sees the question and itself alone."""

    batch: Batch  # of B rows with T' tokens
    positions: torch.Tensor  # int64 [B, T'], each answer's continuing the question's
    mask: torch.Tensor  # bool [B, 1, T', T'], True where attention looks
    predictors: torch.Tensor  # int64 [S], indices into B * T' of what predicts each answer token
    targets: torch.Tensor  # int64 [S], these tokens


def pack(groups: list[Group], pad_id: int, image_tokens: int, device: torch.device) -> Packed:
    """The rows of some groups, on the device."""
    examples, rows, predictors = [], [], []
    for group in groups:
        Q, lengths = len(group.prompt.ids), list(map(len, group.answers))
        ids = np.concatenate([group.prompt.ids, *group.answers])
        examples.append(Example(0, ids, np.full_like(ids, IGNORE_INDEX), group.prompt.image_starts, group.images))
        number = np.repeat(np.arange(1 + len(lengths)), [Q, *lengths])  # 0: the question
        position = np.concatenate([np.arange(Q), *(np.arange(Q, Q + length) for length in lengths)])
        rows.append((position, number))
        predictors.append(np.where(position == Q, Q - 1, np.arange(len(ids)) - 1)[Q:])  # the question's end predicts every first token
    batch = collate(examples, pad_id, image_tokens)
    B, T = batch.ids.shape
    positions, numbers = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)  # padding sees some, to be no division by zero
    for row, (position, number) in enumerate(rows):
        positions[row, : len(position)], numbers[row, : len(number)] = torch.from_numpy(position), torch.from_numpy(number)
    mask = ((numbers[:, None] == 0) | (numbers[:, None] == numbers[:, :, None])).tril()
    predictors = [torch.from_numpy(places) + row * T for row, places in enumerate(predictors)]
    targets = [token for group in groups for answer in group.answers for token in answer]
    tensors = positions, mask[:, None], torch.cat(predictors or [batch.image_index]), torch.tensor(targets, dtype=torch.int64)
    return Packed(batch.to(device), *(tensor.to(device) for tensor in tensors))


def read_questions(run: Run, batch: Batch) -> tuple[list[Prompt], dict[int, torch.Tensor]]:
    """The questions of a batch, and the patch vectors [P, W] of their images by number."""
    P, T, numbers = run.model.config.image_tokens, batch.ids.shape[1], batch.image_index.tolist()
    features = dict(zip(numbers, encode(run, batch.to(run.ranks.device)), strict=True))
    starts, left, prompts = batch.image_positions[::P], iter(numbers), []
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()[: len(batch.indices)]):
        own = (starts[starts // T == row] - row * T).tolist()
        prompts.append(Prompt(batch.ids[row, : length - 1].numpy(), tuple(own), tuple(islice(left, len(own))), P))
    return prompts, features
