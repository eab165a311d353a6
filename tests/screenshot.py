"""Screenshots of the page, for the README and for looking at them.

    python -m tests.screenshot               # images/page.png, on what `make demo` left in out/
    python -m tests.screenshot --all FOLDER  # both pages, wide and narrow, light and dark, English and Chinese

Needs Chromium.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from tests.browser import User, chromium, serve
from tests.conftest import REPOSITORY

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WORDS = {"en-GB": ("Regenerate", "Where did it look?", "Training loss"), "zh-TW": ("重新產生", "它看了哪裡？", "訓練損失")}


def chat(user: User, locale: str) -> None:
    """A question about an example, its answer, and where its last token looked."""
    regenerate, look, _ = WORDS[locale]
    user.button("easy_vqa_33.png").click()
    user.until(lambda: user.tray() == 1)
    user.ask("Describe the image.")
    user.until_answered(1, regenerate)
    user.page.get_by_text(look).click()
    user.page.locator(".looked .token").last.click()
    user.page.wait_for_timeout(1500)


def readme(user: User, path: Path) -> None:
    """The chat of a greedy model."""
    user.line.wait_for()
    user.greedy()
    chat(user, "en-GB")
    path.parent.mkdir(parents=True, exist_ok=True)
    user.page.screenshot(path=path)


def everything(browser, url: str, folder: Path) -> None:
    """Both pages as many sessions see them."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, (scheme, locale) in itertools.product((WIDE, NARROW), (("light", "en-GB"), ("dark", "zh-TW"))):
        name = f"{size['width']}_{locale}"
        with User(browser, url, viewport=size, color_scheme=scheme, locale=locale) as user:
            user.button("easy_vqa_33.png").wait_for()
            user.page.wait_for_timeout(1500)
            user.page.screenshot(path=folder / f"{name}_first.png")
            chat(user, locale)
            user.page.screenshot(path=folder / f"{name}_chat.png")
            user.page.goto(f"{url}/training")
            user.sees(WORDS[locale][2])
            user.until(lambda user=user: user.page.get_by_test_id("stVegaLiteChart").locator("canvas, svg").count() >= 4)
            for number in range(3):
                user.page.wait_for_timeout(1500)
                user.page.screenshot(path=folder / f"{name}_training_{number}.png")
                user.page.mouse.move(size["width"] - 60, 600)
                user.page.mouse.wheel(0, 800)


def main() -> int:
    """Writes the screenshots; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="every view, into this folder")
    parser.add_argument("--save_dir", type=Path, default=REPOSITORY / "out", help="folder of weights and metrics files")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "images" / "page.png", help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser, serve("--save_dir", args.save_dir) as (url, _):
        if args.all:
            everything(browser, url, args.all)
        else:
            with User(browser, url, viewport={"width": 1200, "height": 1100}, device_scale_factor=1.5) as user:
                readme(user, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
