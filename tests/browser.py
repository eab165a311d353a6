"""Headless Chromium on the real page: the server's process, a browser, and what a user does and sees."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPOSITORY

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # fmt: skip
PATIENCE = 150_000  # ms for anything to appear on a busy machine


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serve(*flags, command: tuple[str, ...] = (), port: int | None = None, log: Path | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """A page's server as a user starts it; gives its address once it is up, and its process."""
    port = port or free_port()
    words = command or (sys.executable, str(REPOSITORY / "web_demo_vlm.py"), "--port", str(port), *map(str, flags))
    with open(log or os.devnull, "wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text() if log else "the server did not start"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def chromium(profile: Path):
    """A browser with an empty profile; ends the program where there is none."""
    if CHROMIUM is None:
        sys.exit("error: no Chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright  # not above: not every test needs it

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, env={**os.environ, "HOME": str(profile)})
        yield browser
        browser.close()


class User:
    """One session in a browser context of its own; `strangers` are requests that left for another host."""

    def __init__(self, browser, url: str, path: str = "", **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB"} | options)
        self.page, self.strangers, self.url = self.context.new_page(), [], url
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self._watch(request.url))
        self.page.goto(url + path)

    def _watch(self, address: str) -> None:
        if not address.startswith((self.url, self.url.replace("http", "ws"), "data:", "blob:")):
            self.strangers.append(address)

    def __enter__(self) -> "User":
        return self

    def __exit__(self, *_) -> None:
        self.context.close()

    @property
    def line(self):
        """Where questions are typed."""
        return self.page.get_by_test_id("stChatInputTextArea")

    def button(self, name: str):
        """A button by its label."""
        return self.page.get_by_role("button", name=name, exact=False).first

    def sees(self, text: str) -> None:
        """Waits until a text is in sight. Tables keep one for screen readers, which nobody sees."""
        self.page.get_by_text(text).filter(visible=True).first.wait_for()

    def messages(self):
        """The bubbles of the conversation, questions and answers in turn."""
        return self.page.get_by_test_id("stChatMessage")

    def answer(self):
        """The text of the last answer."""
        return self.page.get_by_label("Chat message from assistant").last.get_by_test_id("stText")

    def attach(self, *files: tuple[str, bytes]) -> None:
        """Attaches files (name, content) to the next question."""
        place = self.page.get_by_test_id("stChatInput").locator("input[type=file]")
        place.set_input_files([{"name": name, "mimeType": "image/png", "buffer": data} for name, data in files])
        for name, _ in files:
            self.page.get_by_test_id("stChatInput").get_by_text(name).wait_for()

    def ask(self, question: str, *files: tuple[str, bytes]) -> None:
        """Types a question and sends it, with files if there are any."""
        if files:
            self.attach(*files)
        self.line.fill(question)
        self.page.get_by_test_id("stChatInputSubmitButton").click()  # which waits for the end of the uploads

    def tray(self) -> int:
        """Images that wait for the next question."""
        return self.page.locator(".st-key-tray [class*='st-key-remove_']").count()

    def until_answered(self, count: int, regenerate: str = "Regenerate") -> str:
        """Waits for the end of the `count`th answer and gives its text."""
        bubble = self.page.get_by_label("Chat message from assistant").nth(count - 1)
        bubble.get_by_role("button", name=regenerate).wait_for()
        return bubble.get_by_test_id("stText").inner_text()

    def until(self, condition) -> None:
        """Waits for something that Playwright has no word for."""
        deadline = time.monotonic() + PATIENCE / 1000
        while not condition():
            assert time.monotonic() < deadline, f"it never came true; the page reads\n{self.page.inner_text('body')}"
            self.page.wait_for_timeout(100)

    def in_view(self, element) -> bool:
        """Whether an element lies whole between the top of the window and the line for questions."""
        return element.evaluate("""element => {
            const box = element.getBoundingClientRect();
            const bottom = document.querySelector('[data-testid=stBottom]').getBoundingClientRect();
            return box.height > 0 && box.top >= 0 && box.bottom <= bottom.top + 1;
        }""")

    def pick(self, label: str, option: str) -> None:
        """Picks an option of a list."""
        listed = self.page.get_by_role("option", name=option).first

        def opened() -> bool:
            if not listed.is_visible():  # a list closes when the page is drawn again
                self.page.get_by_role("combobox", name=label).click()
                self.page.wait_for_timeout(500)
            return listed.is_visible()

        self.until(opened)
        listed.click()

    def greedy(self) -> None:
        """Turns the temperature down to 0."""
        slider = self.page.get_by_role("slider", name="Temperature")
        slider.press("Home")
        self.until(lambda: slider.get_attribute("aria-valuetext") == "0.00")
