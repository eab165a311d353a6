"""What the drawings share: a sheet with boxes, arrows and words, and colours. Needs matplotlib (requirements-dev.txt)."""

import functools
import io
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

matplotlib.use("Agg")
FONT = "DejaVu Sans"  # comes with matplotlib
INK, PAPER = "#1c2733", "white"
TEXT, PICTURE, FROZEN, EXPERT, PLAIN, LOSS = (  # (face, edge) of boxes
    ("#dce9f8", "#2a63a5"), ("#fde6cd", "#c4670f"), ("#eceef0", "#6b7683"), ("#dff0df", "#3a8044"),
    ("#f7f8fa", "#8a94a0"), ("#fadcdc", "#b23a3a"),
)  # fmt: skip
UNIT, DOTS = 1 / 92, 166  # inches of a unit of length, and dots an inch: 1,000 units are 1,800 pixels


@functools.cache
def font_of(character: str) -> str | None:
    """The family of an installed font that has the character, the usual one if it does."""
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name != FONT, font.name)):
        if not font.name.startswith("Last Resort") and ord(character) in charmap(font.fname):  # that one has boxes for all
            return font.name
    return None


@functools.cache
def charmap(file: str) -> dict[int, int]:
    """The characters of a font."""
    return font_manager.get_font(file).get_charmap()


def drawable(words: str) -> tuple[str, list[str]]:
    """Words that come out as they are rather than as boxes, and the fonts for it: what no font has is written as its code."""
    fonts = {character: FONT if character.isspace() else font_of(character) for character in words}
    words = "".join(character if fonts[character] else character.encode("unicode_escape").decode() for character in words)
    return words, list(dict.fromkeys([FONT, *filter(None, fonts.values())]))


class Canvas:
    """A white sheet, `width` x `height` units with the origin at the lower left, and the few shapes that diagrams need."""

    def __init__(self, width: float, height: float):
        self.figure = plt.figure(figsize=(width * UNIT, height * UNIT), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 10, **style) -> None:
        """Words centred at (x, y)."""
        words, fonts = drawable(words)
        style = {"ha": "center", "va": "center", "color": INK, "family": fonts} | style
        self.axes.text(x, y, words, fontsize=size, parse_math=False, **style)

    def line(self, x: float, y: float, words: str, width: float, size: float = 10, **style) -> None:
        """Words from x on, in one line, without the last ones where they would take more than `width` units."""
        words = " ".join(words.split())
        self.text(x, y, words, size, ha="left", **style)
        text = self.axes.texts[-1]
        words = text.get_text()
        while words and text.get_window_extent(self.figure.canvas.get_renderer()).width > width * UNIT * self.figure.dpi:
            words = words[:-1]
            text.set_text(f"{words}…")

    def box(self, x: float, y: float, w: float, h: float, words: str = "", kind=PLAIN, size: float = 10, **style) -> None:
        """A rounded box with its lower left corner at (x, y); **style is the outline's."""
        style = {"facecolor": kind[0], "edgecolor": kind[1], "linewidth": 1.2} | style
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=5", **style))
        self.text(x + w / 2, y + h / 2, words, size, linespacing=1.35)

    def arrow(self, *points: tuple[float, float], head: bool = True) -> None:
        """A line through the points, with a head at the last."""
        for start, end in pairwise(points[:-1]):
            self.axes.plot(*zip(start, end, strict=True), color=INK, linewidth=1.2, solid_capstyle="round")
        style = "-|>,head_width=2.6,head_length=5" if head else "-"
        self.axes.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle=style, color=INK, linewidth=1.2,
                                            shrinkA=0, shrinkB=0, joinstyle="miter"))  # fmt: skip

    def plus(self, x: float, y: float) -> None:
        """The sum of a branch and its residual."""
        self.axes.plot(x, y, "o", markersize=13, markerfacecolor=PAPER, markeredgecolor=INK, markeredgewidth=1.2)
        self.axes.plot(x, y, "+", markersize=8, color=INK, markeredgewidth=1.2)

    def picture(self, image: Image.Image, x: float, y: float, height: float, grid: int = 0) -> None:
        """A picture, with the lines of its `grid` x `grid` patches."""
        width = height * image.width / image.height
        self.axes.imshow(np.asarray(image), extent=(x, x + width, y, y + height), aspect="auto", zorder=2)
        for part in range(1, grid):
            across, up = x + width * part / grid, y + height * part / grid
            self.axes.plot([across] * 2, [y, y + height], [x, x + width], [up] * 2, color="white", linewidth=0.5, zorder=3)

    def save(self, path: Path) -> None:
        """Writes the sheet, see `save_figure`."""
        save_figure(self.figure, path)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """An opaque PNG of twice the size a README shows."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DOTS)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(buffer).convert("RGB").save(path, optimize=True)  # half the bytes of what matplotlib writes
