"""The chat in the terminal: commands, and streamed answers that Ctrl-C breaks off.

With input from elsewhere than a terminal it reads one question or command a line and prints nothing but the answers and
what commands say.
"""

import dataclasses
import glob
import os
import re
import shlex
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TextIO

from dataset.images import load_image
from machine import ran_out_of_memory
from model.errors import DataError, SampleError, UsageError, shown
from model.inference.generation import Sampling

from .chat import Chat, as_markdown
from .video import read_frames

COMMANDS = {
    "/image": ("PATH", "show an image with the next question; several: repeat it"),
    "/video": ("PATH", "show frames of a video with the next question"),
    "/params": ("NAME=VALUE ...", "how answers are sampled; alone: what is set"),
    "/retry": ("", "answer the last question again"),
    "/undo": ("", "take back the images that wait, else the last question; its images wait again"),
    "/reset": ("", "forget the conversation"),
    "/save": ("PATH", "write the conversation into a new file, as Markdown"),
    "/help": ("", "this list"),
    "/exit": ("", "leave; Ctrl-D does, too"),
}
PARAMETERS = {field.name: field.type for field in dataclasses.fields(Sampling)}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Text to a terminal or a file. Control characters, which a terminal obeys, are replaced."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        """Shows a piece of an answer at once."""
        self.file.write(CONTROL.sub("\ufffd", text))
        self.file.flush()

    def say(self, text: str) -> None:
        """Shows a line of the program."""
        self.write(f"{text}\n")


class TerminalChat:
    """The user's side of a Chat: reads lines, does what they say, and keeps what was shown and said."""

    def __init__(self, chat: Chat, screen: Screen, video_frames: int = 8):
        self.chat, self.screen, self.video_frames = chat, screen, video_frames
        self.exchanges: list[tuple[list[str], str, str]] = []  # paths shown, question, answer as far as it came
        self.shown: list[str] = []  # paths of what waits for the next question

    def run(self, title: str) -> None:
        """Until /exit or the end of input. Ctrl-C at the prompt begins a new line; without a terminal it ends all."""
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
            if line.partition(" ")[0] in ("/exit", "/quit"):
                return None
            self.obey(line)

    def obey(self, line: str) -> None:
        """Does what a line says. Mistakes and Ctrl-C end the command, not the chat."""
        command, _, argument = line.partition(" ")
        try:
            if command in COMMANDS:
                if COMMANDS[command][0] == "PATH" and not argument.strip():
                    raise UsageError(f"{command} needs a PATH")
                getattr(self, command.removeprefix("/"))(argument.strip())
            elif command.startswith("/"):
                self.screen.say(f"no such command: {command}; /help lists them, /image PATH shows an image")
            elif line:
                self.ask(line)
        except (UsageError, SampleError, DataError, OSError, RuntimeError, MemoryError) as error:
            # RuntimeError: memory ran out, or a ~name that nobody has
            memory = "memory ran out: ask with fewer images, or /reset the chat first"
            self.screen.say(memory if ran_out_of_memory(error) else str(error))
        except KeyboardInterrupt:
            self.screen.say("\n(stopped)")

    def ask(self, question: str) -> None:
        """Streams the answer. Ctrl-C breaks it off; what was said until then stays in the conversation."""
        said, stopped = [], False
        try:
            with closing(self.chat.stream(question)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    self.screen.write(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:  # without an answer the images wait on
            self.exchanges.append((self.shown if said else [], question, "".join(said)))
            self.shown = [] if said else self.shown
        self.screen.write("\n")
        if stopped or not said:
            self.screen.say("(stopped)" if stopped else "(no answer)")
        if self.chat.dropped:
            self.screen.say(f"({self.chat.dropped} of the oldest exchanges no longer fit and are forgotten)")

    def image(self, argument: str) -> None:
        """Shows one or several images with the next question."""
        for path in typed_paths(argument):
            self.chat.add_image(load_image(Path(path).expanduser(), path))
            self.wait(path, f"image {len(self.chat.waiting)}")

    def video(self, argument: str) -> None:
        """Shows frames of one or several videos: as many as asked for, or as fit."""
        for path in typed_paths(argument):
            room = max(self.chat.room() - len(self.chat.waiting), 1)
            frames = read_frames(Path(path).expanduser(), min(self.video_frames, room))
            for frame in frames:
                self.chat.add_image(frame.image, frame.time)
            self.wait(path, f"{len(frames)} frames, at {', '.join(frame.time for frame in frames)},")

    def wait(self, path: str, what: str) -> None:
        """Tells what waits for the next question."""
        self.shown.append(path)
        self.screen.say(f"{what} for the next question: {path}")

    def params(self, argument: str) -> None:
        """Changes how answers are sampled, or shows it."""
        self.chat.sampling = changed(self.chat.sampling, argument)
        values = dataclasses.asdict(self.chat.sampling).items()
        self.screen.say(" ".join(f"{name}={'none' if value is None else value}" for name, value in values))

    def take_back(self) -> str:
        """The last question, forgotten with its answer; its images wait again."""
        if not self.exchanges or (self.exchanges[-1][2] and not self.chat.undo()):
            raise UsageError("no question to take back")
        paths, question, _ = self.exchanges.pop()
        self.shown = paths + self.shown
        return question

    def retry(self, _argument: str) -> None:
        """Answers the last question again."""
        self.ask(self.take_back())

    def undo(self, _argument: str) -> None:
        """Takes back what came last."""
        if self.chat.waiting:
            self.screen.say(f"taken back: {len(self.chat.waiting)} images")
            self.chat.waiting, self.shown = [], []
        else:
            question = self.take_back()
            self.screen.say(f"taken back: {shown(question)}; images that wait: {len(self.chat.waiting)}")

    def reset(self, _argument: str) -> None:
        """Forgets everything but the sampling."""
        self.chat.reset()
        self.exchanges, self.shown = [], []
        self.screen.say("forgotten")

    def save(self, argument: str) -> None:
        """Writes the conversation as Markdown; a file that is there stays as it is."""
        path = Path(argument.strip("'\"")).expanduser()
        if os.path.lexists(path):
            raise UsageError(f"{path} exists; give another name")
        with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(as_markdown(self.exchanges))
        self.screen.say(f"saved: {path}")

    def help(self, _argument: str) -> None:
        """Lists the commands."""
        for command, (argument, meaning) in COMMANDS.items():
            self.screen.say(f"{f'{command} {argument}':<24}{meaning}")
        self.screen.say("Anything else is a question. Images stand before it, or where it says <image>, once for each."
                        "\nCtrl-C breaks an answer off; what was said stays. Tab completes.")  # fmt: skip


def typed_paths(text: str) -> list[str]:
    """Paths as people type or drag them: as they stand, or quoted, with escaped spaces, several."""
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
    """From now on input() has line editing, the lines before, and completion by Tab, where the system has readline."""
    with suppress(ImportError):
        import readline

        readline.set_completer_delims("")  # a line is completed as a whole
        readline.set_completer(lambda line, number: dict(enumerate(complete(line))).get(number))
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def complete(line: str) -> list[str]:
    """What a line may become by Tab: the name of a command, or one with a path."""
    command, space, typed = line.partition(" ")
    if not space:
        return [f"{name} " for name in COMMANDS if line and name.startswith(line)]
    found = sorted(glob.glob(glob.escape(os.path.expanduser(typed)) + "*")) if command in COMMANDS else []
    return [f"{command} {path}{'/' if os.path.isdir(path) else ''}" for path in found]
