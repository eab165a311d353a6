"""The chat in the terminal: commands, and streamed answers that Ctrl-C breaks off.

Colour only on a terminal and without NO_COLOR (no-color.org). With input from elsewhere than a terminal it reads one
question or command a line and prints nothing but the answers and what commands say.
"""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TextIO

from dataset.images import load_image
from machine import ran_out_of_memory
from model.errors import DataError, SampleError, UsageError
from model.inference.generation import Sampling

from .chat import Chat
from .video import labels, read_frames

COMMANDS = {
    "/image": ("PATH", "show an image with the next question; several: repeat it"),
    "/video": ("PATH", "show frames of a video with the next question"),
    "/params": ("NAME=VALUE ...", "how answers are sampled; alone: what is set"),
    "/undo": ("", "take back the images that wait, else the last question; its images wait again"),
    "/reset": ("", "forget the conversation"),
    "/help": ("", "this list"),
    "/exit": ("", "leave; Ctrl-D does, too"),
}
PARAMETERS = {field.name: field.type for field in dataclasses.fields(Sampling)}
STYLES = {"note": "2", "error": "31"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Text to a terminal, in colour where it can, or to a file. Control characters, which a terminal obeys, are replaced."""

    def __init__(self, file: TextIO, environ: Mapping[str, str] = os.environ):
        self.file = file
        self.colour = file.isatty() and not environ.get("NO_COLOR") and environ.get("TERM", "dumb") != "dumb"

    def write(self, text: str) -> None:
        """Shows a piece of an answer at once."""
        self.file.write(CONTROL.sub("\ufffd", text))
        self.file.flush()

    def say(self, text: str, style: str = "note") -> None:
        """Shows a line of the program."""
        text = CONTROL.sub("\ufffd", text)
        self.file.write((f"\x1b[{STYLES[style]}m{text}\x1b[0m" if self.colour else text) + "\n")
        self.file.flush()


class TerminalChat:
    """The user's side of a Chat: reads lines and does what they say."""

    def __init__(self, chat: Chat, screen: Screen, video_frames: int = 8):
        self.chat, self.screen, self.video_frames = chat, screen, video_frames

    def run(self, title: str) -> None:
        """Until /exit or the end of input. Ctrl-C at the prompt begins a new line; without a terminal it ends the chat."""
        prompt = "\n> " if sys.stdin.isatty() else ""
        if prompt:
            edit_lines()
            self.screen.say(title)
            self.screen.say("/image PATH shows an image, /help lists the commands, /exit leaves.")
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                return self.screen.write("\n" if prompt else "")
            except KeyboardInterrupt:
                if not prompt:
                    return None
                self.screen.say("\n(Ctrl-D or /exit leaves)")
                continue
            if line in ("/exit", "/quit"):
                return None
            self.obey(line)

    def obey(self, line: str) -> None:
        """Does what a line says. Mistakes and Ctrl-C end the command, not the chat."""
        command, _, argument = line.partition(" ")
        try:
            if command in COMMANDS:
                getattr(self, command.removeprefix("/"))(argument.strip())
            elif command.startswith("/"):
                self.screen.say(f"no such command: {command}; /help lists them, /image PATH shows an image", "error")
            elif line:
                self.ask(line)
        except (UsageError, SampleError, DataError, OSError, RuntimeError, MemoryError) as error:
            # RuntimeError: memory ran out, or a ~name that nobody has
            memory = "memory ran out: ask with fewer images, or /reset the chat first"
            self.screen.say(memory if ran_out_of_memory(error) else str(error), "error")
        except KeyboardInterrupt:
            self.screen.say("\n(stopped)")

    def ask(self, question: str) -> None:
        """Streams the answer. Ctrl-C breaks it off; what was said until then stays in the conversation."""
        said = stopped = False
        try:
            with closing(self.chat.stream(question)) as pieces:
                for piece in pieces:
                    said = True
                    self.screen.write(piece)
        except KeyboardInterrupt:
            stopped = True
        self.screen.write("\n")
        if stopped or not said:
            self.screen.say("(stopped)" if stopped else "(no answer)")
        if self.chat.dropped:
            self.screen.say(f"({self.chat.dropped} of the oldest exchanges no longer fit: the model has forgotten them)")

    def image(self, argument: str) -> None:
        """Shows one or several images with the next question."""
        for path in typed_paths("/image", argument):
            self.chat.add_image(load_image(Path(path).expanduser(), path))
            self.screen.say(f"image {len(self.chat.waiting)} for the next question: {path}")
        if len(self.chat.waiting) > (room := self.chat.room()):
            self.screen.say(f"more than fit beside a question: about {room} do; /undo takes them back", "error")

    def video(self, argument: str) -> None:
        """Shows frames of one or several videos: as many as asked for, or as fit.

        Raises UsageError when there is no room, and as `read_frames` does.
        """
        for path in typed_paths("/video", argument):
            room = self.chat.room() - len(self.chat.waiting)
            if room < 1:
                raise UsageError(f"no room for a video beside the {len(self.chat.waiting)} images that wait: /undo takes them"
                                 " back, a larger --max_seq_len makes room")  # fmt: skip
            frames = read_frames(Path(path).expanduser(), min(self.video_frames, room))
            times = labels(frames)
            for frame, time in zip(frames, times, strict=True):
                self.chat.add_image(frame.image, time)
            fit = f" ({self.video_frames} do not fit: a larger --max_seq_len makes room)" if room < self.video_frames else ""
            self.screen.say(f"{len(frames)} frames for the next question, at {', '.join(times)}: {path}{fit}")

    def params(self, argument: str) -> None:
        """Changes how answers are sampled, or shows it."""
        self.chat.sampling = changed(self.chat.sampling, argument)
        values = dataclasses.asdict(self.chat.sampling).items()
        self.screen.say(" ".join(f"{name}={'none' if value is None else value}" for name, value in values))

    def undo(self, _argument: str) -> None:
        """Takes back what came last."""
        if self.chat.waiting:
            self.screen.say(f"taken back: {len(self.chat.waiting)} images")
            self.chat.waiting = []
        elif self.chat.undo():
            self.screen.say(f"taken back: the last question and its answer; images that wait: {len(self.chat.waiting)}")
        else:
            raise UsageError("nothing to take back")

    def reset(self, _argument: str) -> None:
        """Forgets everything but the sampling."""
        self.chat.reset()
        self.screen.say("forgotten")

    def help(self, _argument: str) -> None:
        """Lists the commands."""
        for command, (argument, meaning) in COMMANDS.items():
            self.screen.say(f"{f'{command} {argument}':<24}{meaning}")
        self.screen.say("Anything else is a question. Images stand before it, or where it says <image>, once for each."
                        "\nCtrl-C breaks an answer off; what was said stays. Tab completes paths.")  # fmt: skip


def typed_paths(command: str, text: str) -> list[str]:
    """Paths as people type or drag them: as they stand, or quoted, with escaped spaces, several.

    Raises UsageError when there is none.
    """
    if not text:
        raise UsageError(f"{command} needs a PATH")
    if not os.path.exists(Path(text).expanduser()):
        with suppress(ValueError):  # an open quote
            return shlex.split(text) or [text]
    return [text]


def changed(sampling: Sampling, text: str) -> Sampling:
    """`sampling` with "name=value name=value" applied; raises UsageError and changes nothing for anything wrong."""
    values = {}
    for name, _, value in (word.partition("=") for word in text.replace(",", " ").split()):
        if name not in PARAMETERS:
            raise UsageError(f"no parameter {name!r}; there are {', '.join(PARAMETERS)}")
        number = float if PARAMETERS[name] is float else int
        try:
            values[name] = None if (name, value.lower()) == ("seed", "none") else number(value)
        except ValueError as error:
            raise UsageError(f"{name}={value}: not {'a number' if number is float else 'a whole number'}") from error
    try:
        return dataclasses.replace(sampling, **values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def edit_lines() -> None:
    """From now on input() has line editing, the lines before, and paths completed by Tab, where the system has readline."""
    with suppress(ImportError):
        import readline

        readline.set_completer_delims(" ")
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
