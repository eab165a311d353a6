"""Where the answers of a trained model looked: a row an image, a map a token."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image

from dataset.images import load_image
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.inference.assistant import Assistant
from model.inference.attention_map import look, pixels_to_image
from model.inference.generation import Sampling

from .style import save

TOKENS = 5  # shown of an answer
# From no attention to the most: black, violet, red, orange, pale yellow; brighter all the way, so it reads without colour.
HEAT = np.array([(0, 0, 0), (70, 15, 110), (185, 40, 90), (245, 125, 25), (255, 245, 170)], dtype=np.float32)


def draw_attention(path: Path, assistant: Assistant, files: list[Path], question: str, layer: int | None = None, head: int | None = None) -> None:
    """Asks about each image, greedily, and draws the attention of the answer's first tokens: of a layer and a head, or
    the mean of all.

    Raises SampleError for a file that is no image, UsageError for a layer or head that is not there.
    """
    rows = []
    for file in files:
        pixels = assistant.preprocess(load_image(file, str(file)))
        asked = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}"),)
        answer = assistant.generate([asked], [pixels], Sampling(max_new_tokens=64, temperature=0.0))[0]
        seen = look(assistant, (*asked, Turn("assistant", answer)), [pixels], layer, head)
        rows.append((pixels_to_image(seen.views[0]), answer, seen))
    columns = 2 + min(TOKENS, max(len(seen.tokens) for _, _, seen in rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.5 * columns, 1.9 * len(rows)), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for (words, shown, *maps), (image, answer, seen) in zip(axes, rows, strict=True):
        wrapped = "\n\n".join("\n".join(textwrap.wrap(text, 18, max_lines=5, placeholder=" …")) for text in (question, answer))
        words.text(0, 0.5, wrapped, va="center", fontsize=9, parse_math=False)
        shown.imshow(image)
        for axis, token, heat in zip(maps, seen.tokens, seen.maps, strict=False):  # heat [N, s, s]: of the image, and its tiles
            axis.imshow(overlay(image, heat[0]))
            word = textwrap.shorten(token, 14, placeholder="…") or "…"
            axis.set_title(f"{word}\n{float(heat.sum()):.0%} on the image", fontsize=8, parse_math=False)
    save(figure, path)


def overlay(image: Image.Image, heat: torch.Tensor, top: float | None = None) -> Image.Image:
    """The image in grey under the colours of `heat` [s, s], RGB of the same size.

    `top` is the weight with the brightest colour, by default the largest of `heat`: give the same one to all images
    that are compared. Each patch is one flat square, because that is all the model knows.
    """
    top = float(heat.max()) if top is None else top
    strength = heat.float().cpu().numpy() / max(top, 1e-12)
    strength = np.asarray(Image.fromarray(strength.clip(0, 1)).resize(image.size, Image.Resampling.NEAREST))
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(strength, stops, channel) for channel in HEAT.T], axis=-1)
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((0.3 * grey + 0.7 * colours).round().clip(0, 255).astype(np.uint8))
