"""Where the answers of a trained model looked: a row a picture, a map a token."""

from pathlib import Path

from PIL import Image

from dataset.images import load_image
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.inference.assistant import Assistant
from model.inference.attention_map import look, overlay, pixels_to_image
from model.inference.generation import Sampling
from model.vision import preprocess

from .canvas import INK, Canvas

TOKENS = 5  # shown of an answer
WORDS = 210  # units for question and answer at the left of a row
HEAD = 50  # units of a row above its pictures


def draw_attention(
    path: Path, assistant: Assistant, files: list[Path], question: str, layer: int | None = None, head: int | None = None
) -> None:
    """Asks about each picture, greedily, and draws the attention of the answer's first tokens: of a layer and a head, or
    the mean of all.

    Raises SampleError for a file that is no picture, UsageError for a layer or head that is not there.
    """
    rows = []
    for file in files:
        pixels = preprocess(load_image(file, str(file)))
        asked = (Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}"),)
        answer = assistant.generate([asked], [pixels], Sampling(max_new_tokens=64, temperature=0.0))[0]
        seen = look(assistant, (*asked, Turn("assistant", answer)), [pixels], layer, head)
        rows.append((pixels_to_image(pixels), answer, seen))
    columns = 1 + min(TOKENS, max(len(seen.tokens) for _, _, seen in rows))
    side = min(170, (980 - WORDS) / columns - 10)
    canvas = Canvas(WORDS + columns * (side + 10) + 10, len(rows) * (side + HEAD) + 10)
    for number, (picture, answer, seen) in enumerate(rows):
        y = (len(rows) - 1 - number) * (side + HEAD) + 10
        canvas.line(16, y + side / 2 + 14, question, WORDS - 26, 10.5)
        canvas.line(16, y + side / 2 - 14, answer, WORDS - 26, 10.5, weight="bold")
        canvas.picture(picture, WORDS, y, side)
        for column, (text, maps) in enumerate(zip(seen.tokens[:TOKENS], seen.maps, strict=False), start=1):
            _draw_map(canvas, WORDS + column * (side + 10), y, side, picture, text, maps)
    canvas.save(path)


def _draw_map(canvas: Canvas, x: float, y: float, side: float, picture: Image.Image, text: str, maps) -> None:
    """One token's map [1, s, s] with the share of its attention that the picture got."""
    canvas.picture(overlay(picture, maps[0]), x, y, side)
    canvas.line(x, y + side + 27, text.strip() or "…", side, 10.5, weight="bold", color=INK)
    canvas.line(x, y + side + 10, f"{float(maps.sum()):.0%} on the picture", side, 8.5, color="#5a6672")
