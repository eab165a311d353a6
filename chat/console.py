"""What a terminal can do: colour, previews of pictures, line editing with completion and history."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image

HISTORY_LINES = 1000
STYLES = {"prompt": "1;36", "note": "2", "error": "31", "title": "1"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Text to a terminal, in colour where it can, or to a file."""

    def __init__(self, file: TextIO, environ: Mapping[str, str] = os.environ):
        self.file = file
        self.colour = file.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"
        self.truecolour = self.colour and environ.get("COLORTERM") in ("truecolor", "24bit")

    def styled(self, text: str, style: str) -> str:
        """The text with the codes of its style around it."""
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self.colour else text

    def write(self, text: str) -> None:
        """Shows a piece of an answer at once. Control characters do not reach the terminal: it would obey them."""
        self.file.write(CONTROL.sub("\ufffd", text))
        self.file.flush()

    def say(self, text: str, style: str = "note") -> None:
        """Shows a line of ours."""
        self.file.write(self.styled(CONTROL.sub("\ufffd", text), style) + "\n")
        self.file.flush()

    def preview(self, pixels: list[torch.Tensor]) -> None:
        """Shows pictures [3, H, W] side by side, small, where the terminal has the colours."""
        if self.truecolour and pixels:
            self.file.write("\n".join(half_blocks(pixels, shutil.get_terminal_size().columns)) + "\n")


def half_blocks(pixels: list[torch.Tensor], columns: int) -> list[str]:
    """Lines of text that show uint8 pictures [3, H, W]: each character is two pixels, one above the other."""
    side = max(12, min(24, columns // len(pixels) - 1)) // 2 * 2
    in_a_row = max(1, (columns + 1) // (side + 1))
    small = [Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side)) for picture in pixels]
    lines = []
    for start in range(0, len(small), in_a_row):
        for y in range(0, side, 2):
            cells = (
                "".join("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*picture.getpixel((x, y)), *picture.getpixel((x, y + 1)))
                        for x in range(side)) + "\x1b[0m" for picture in small[start : start + in_a_row]
            )  # fmt: skip
            lines.append(" ".join(cells))
    return lines


def complete_path(typed: str, suffixes: set[str]) -> list[str]:
    """Folders and files with one of the suffixes whose paths begin as typed."""
    if typed == "~":
        return ["~/"]
    start = typed.rpartition("/")[2]
    folder = typed[: len(typed) - len(start)]
    try:
        entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(os.path.expanduser(folder) or "."))
    except OSError:
        return []
    return [f"{folder}{name}{'/' if is_folder else ''}" for name, is_folder in entries
            if name.startswith(start) and (start or not name.startswith("."))
            and (is_folder or Path(name).suffix.lower() in suffixes)]  # fmt: skip


def history_file(environ: Mapping[str, str]) -> Path | None:
    """Where lines are kept between chats (XDG base directories), None where a person has no home."""
    state = environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "minimind-v" / "history"


def use_readline(history: Path | None, complete: Callable[[str], list[str]]) -> Callable[[str], None]:
    """Line editing with the history of earlier chats; Tab offers what `complete` makes of a line. Returns what adds a line
    to the history.

    A history that cannot be read or written is one of this chat only.
    """
    try:
        import readline
    except ImportError:  # not on every system
        return lambda line: None
    readline.set_auto_history(False)  # what is answered to a question of ours is no line of the chat
    readline.set_completer_delims(" /")  # what is listed are names, not whole lines

    def completer(_text: str, state: int) -> str | None:
        found = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[state][readline.get_begidx() :] if state < len(found) else None

    readline.set_completer(completer)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    writable = False
    if history:
        with suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            readline.read_history_file(history)
            readline.set_history_length(HISTORY_LINES)  # to which every line appended cuts the file
            writable = True

    def remember(line: str) -> None:
        if line != readline.get_history_item(readline.get_current_history_length()):
            readline.add_history(line)
            if writable:
                with suppress(OSError):
                    readline.append_history_file(1, history)

    return remember


def half_typed() -> str:
    """The line that Ctrl-C left unfinished, as far as readline knows."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""
