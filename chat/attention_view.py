"""From a conversation to heat maps over its pictures: the tokens of an answer, their attention, and the drawing.

Legend of shapes: A tokens of the answer, N pictures, s x s patches of a picture. Page and `docs.figures` share it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from dataset.sample import Sample
from model.conversation import IMAGE_MARK, Turn
from model.errors import UsageError
from model.inference.assistant import Assistant
from model.inference.attention_map import attention_to_pictures

# From no attention to the most: black, violet, red, orange, pale yellow; brighter all the way, so it reads without colour.
HEAT = np.array([(0, 0, 0), (70, 15, 110), (185, 40, 90), (245, 125, 25), (255, 245, 170)], dtype=np.float32)


@dataclass(frozen=True)
class AnswerAttention:
    """Where the tokens of an answer looked.

    `tokens` are the texts of its A tokens, which join to the answer: a character spread over several tokens stands with
    the last of them, the others have "". `maps` fp32 [A, N, s, s] are the weights, see `attention_to_pictures`.
    """

    tokens: list[str]
    maps: torch.Tensor


def look(
    assistant: Assistant, turns: Sequence[Turn], pixels: Sequence[torch.Tensor],
    layer: int | None = None, head: int | None = None,
) -> AnswerAttention:  # fmt: skip
    """Where the answer that ends `turns` looked. `pixels` uint8 [3, 224, 224] are the conversation's pictures in reading
    order; those that only later turns show may follow.

    The answer's text is cut into tokens anew, as every later question about it sees it.
    Raises UsageError when the last turn is no answer, is empty, or no picture stands before it, and for a layer or head
    that is not there.
    """
    if not turns or turns[-1].role != "assistant" or not turns[-1].content:
        raise UsageError("only an answer that says something can be looked into")
    shown = sum(turn.content.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    if not 0 < shown <= len(pixels):
        raise UsageError(f"the conversation shows {shown} pictures up to this answer, and {len(pixels)} were given")
    renderer = assistant.renderer
    prompt = renderer.render_prompt(tuple(turns[:-1]))
    answer = renderer.render(Sample(tuple(turns))).ids[len(prompt) :].tolist()
    answer = answer[: answer.index(renderer.im_end)]
    try:
        maps = attention_to_pictures(assistant.model, torch.from_numpy(prompt.ids), prompt.image_starts, torch.tensor(answer),
                                     assistant.encode(list(pixels[:shown])), layer, head)  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error
    return AnswerAttention(split_text(assistant.tokenizer, answer), maps.cpu())


def split_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; bytes of an unfinished character wait for the token that finishes it."""
    decoder = DecodeStream()
    texts = [decoder.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    texts[-1] += tokenizer.decode(ids)[sum(map(len, texts)) :]  # a character that never became whole
    return texts


def picture_of(pixels: torch.Tensor) -> Image.Image:
    """What the model saw, uint8 [3, H, W], as a picture."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def overlay(picture: Image.Image, heat: torch.Tensor, top: float | None = None) -> Image.Image:
    """The picture in grey under the colours of `heat` [s, s], an RGB picture of the same size.

    `top` is the weight with the brightest colour, by default the largest of `heat`: give the same one to all pictures
    that are compared. Each patch is one flat square, for that is all the model knows.
    """
    top = float(heat.max()) if top is None else top
    share = heat.float().cpu().numpy() / max(top, 1e-12)
    strength = np.asarray(Image.fromarray(share.clip(0, 1)).resize(picture.size, Image.Resampling.NEAREST))
    at = strength * (len(HEAT) - 1)
    low = np.minimum(at.astype(np.int64), len(HEAT) - 2)
    part = (at - low)[..., None]
    colours = HEAT[low] * (1 - part) + HEAT[low + 1] * part
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((0.3 * grey + 0.7 * colours).round().clip(0, 255).astype(np.uint8))
