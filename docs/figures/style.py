"""What both plots share: the fonts that are installed here, Chinese ones among them, and how a figure is saved."""

from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib import pyplot as plt

matplotlib.use("Agg")
FONTS = ("DejaVu Sans", "Noto Sans CJK TC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang TC", "Microsoft JhengHei")
installed = font_manager.get_font_names()
matplotlib.rcParams["font.family"] = [font for font in FONTS if font in installed]  # a character is drawn by the first that has it


def save(figure: plt.Figure, path: Path) -> None:
    """Writes a figure of twice the size that a README shows."""
    figure.savefig(path, dpi=180)
    plt.close(figure)
