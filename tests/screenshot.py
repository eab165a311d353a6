"""Screenshots of the page, for the README and for looking at them.

    python -m tests.screenshot               # images/page.png, on what `make demo` left in out/
    python -m tests.screenshot --all FOLDER  # both pages, wide and narrow, light and dark, English and Chinese

Needs Chromium.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.browser import Guest, chromium, serve
from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "dataset" / "eval_images"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WORDS = {"en-GB": ("Regenerate", "Where did it look?", "Training loss"), "zh-TW": ("重新產生", "它看了哪裡？", "訓練損失")}


def chat(guest: Guest, locale: str) -> None:
    """A question about an example, its answer, and the map of that."""
    regenerate, look, _ = WORDS[locale]
    guest.button("easy_vqa_33.png").click()
    guest.until(lambda: guest.tray() == 1)
    guest.ask("Describe the image.")
    guest.button(regenerate).wait_for()
    guest.page.get_by_text(look).click()
    guest.page.get_by_role("img", name=look).wait_for()
    guest.page.wait_for_timeout(1500)


def readme(guest: Guest, path: Path) -> None:
    """The chat with the map of the answer's last token."""
    guest.line.wait_for()
    guest.greedy()
    chat(guest, "en-GB")
    guest.page.get_by_role("slider", name="Token of the answer").press("End")
    guest.page.locator(".stMarkdownColoredBackground").wait_for()  # marks that token; its map follows
    guest.page.get_by_text("of its attention").wait_for()
    guest.until(lambda: guest.page.get_by_role("img", name=WORDS["en-GB"][1]).evaluate("image => image.complete && image.naturalWidth > 0"))
    guest.page.mouse.move(0, 0)
    guest.page.wait_for_timeout(1500)
    path.parent.mkdir(parents=True, exist_ok=True)
    guest.page.screenshot(path=path)


def everything(browser, url: str, folder: Path) -> None:
    """Both pages as many visitors see them."""
    folder.mkdir(parents=True, exist_ok=True)
    for size in (WIDE, NARROW):
        for scheme in ("light", "dark"):
            locale = "en-GB" if scheme == "light" else "zh-TW"
            name = f"{size['width']}_{scheme}"
            with Guest(browser, url, viewport=size, color_scheme=scheme, locale=locale) as guest:
                guest.button("easy_vqa_33.png").wait_for()
                guest.page.wait_for_timeout(1500)
                guest.page.screenshot(path=folder / f"{name}_first.png")
                chat(guest, locale)
                guest.page.screenshot(path=folder / f"{name}_chat.png")
                guest.page.goto(f"{url}/training")
                guest.sees(WORDS[locale][2])
                guest.until(lambda guest=guest: guest.page.get_by_test_id("stVegaLiteChart").locator("canvas, svg").count() >= 4)
                guest.page.wait_for_timeout(1500)
                guest.page.screenshot(path=folder / f"{name}_training.png")
                guest.page.get_by_test_id("stMain").evaluate("main => main.scrollTo(0, 900)")
                guest.page.wait_for_timeout(1500)
                guest.page.screenshot(path=folder / f"{name}_training_below.png")


def main() -> int:
    """Writes the pictures; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="every view, into this folder")
    parser.add_argument("--save_dir", type=Path, default=REPOSITORY / "out", help="folder of weights and metrics files")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "images" / "page.png", help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, chromium(Path(folder)) as browser, serve("--save_dir", args.save_dir) as (url, _):
        if args.all:
            everything(browser, url, args.all)
        else:
            with Guest(browser, url, viewport={"width": 1200, "height": 1180}, device_scale_factor=1.5) as guest:
                readme(guest, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
