"""The chat in the terminal: commands, streamed answers that Ctrl-C breaks off, history, completion.

Colour only on a terminal and without NO_COLOR (no-color.org). With input from elsewhere than a terminal it reads one
question or command a line and prints nothing but the answers and what commands say.
"""

import dataclasses
import glob
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TextIO

from dataset.images import load_image
from machine import ran_out_of_memory
from model.errors import DataError, SampleError, UsageError
from model.inference.generation import Sampling
from model.storage import StorageError, write_atomically

from .chat import Chat
from .markdown import Exchange, Shown, markdown
from .video import labels, read_frames

COMMANDS = {
    "/image": ("PATH", "show an image with the next question; several: repeat it"),
    "/video": ("PATH", "show frames of a video with the next question"),
    "/params": ("NAME=VALUE ...", "how answers are sampled; alone: what is set"),
    "/undo": ("", "take back the last exchange, or the image or video that came after it"),
    "/retry": ("", "ask the last question again"),
    "/save": ("FILE.md", "the conversation as Markdown"),
    "/reset": ("", "forget the conversation"),
    "/help": ("", "this list"),
    "/exit": ("", "leave; Ctrl-D does, too"),
}
PARAMETERS = {field.name: field.type for field in dataclasses.fields(Sampling)}
STYLES = {"prompt": "1;36", "note": "2", "error": "31", "title": "1"}
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
    """The user's side of a Chat: reads lines, does what they say, remembers what was shown and said."""

    def __init__(self, chat: Chat, screen: Screen, video_frames: int = 8):
        self.chat, self.screen, self.video_frames = chat, screen, video_frames
        self.exchanges: list[Exchange] = []
        self.queue: list[Shown] = []  # for the next question
        self.unanswered: str | None = None  # the last question, when no answer came

    def run(self, title: str) -> None:
        """Until /exit or the end of input."""
        if not sys.stdin.isatty():
            return self.read_lines("")
        self.screen.say(title, "title")
        self.screen.say("/image PATH shows an image, /help lists the commands, /exit leaves.")
        save_history = start_readline(history_file(os.environ))
        # Readline counts what stands between \001 and \002 as no width.
        prompt = f"\n\001\x1b[{STYLES['prompt']}m\002>\001\x1b[0m\002 " if self.screen.colour else "\n> "
        try:
            self.read_lines(prompt)
        finally:
            save_history()

    def read_lines(self, prompt: str) -> None:
        """Obeys line after line. Ctrl-C at the prompt begins a new line; without a terminal it ends the chat."""
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
        except (UsageError, SampleError, DataError, StorageError, OSError, RuntimeError, MemoryError) as error:
            # RuntimeError: memory ran out, or a ~name that nobody has
            told = "memory ran out: ask with fewer images, or /reset the chat first" if ran_out_of_memory(error) else str(error)
            self.screen.say(told, "error")
        except KeyboardInterrupt:
            self.screen.say("\n(stopped)")

    def ask(self, question: str) -> None:
        """Streams the answer. Ctrl-C breaks it off; what was said until then stays in the conversation."""
        said, stopped, self.unanswered = [], False, question
        try:
            with closing(self.chat.stream(question)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    self.screen.write(piece)
        except KeyboardInterrupt:
            stopped = True
        finally:  # whatever ended it, the Chat has kept what was said
            if said:
                self.exchanges.append(Exchange(question, tuple(self.queue), "".join(said)))
                self.queue, self.unanswered = [], None
        self.screen.write("\n")
        if stopped or not said:
            self.screen.say(("(stopped" if stopped else "(no answer") + (")" if said else "; /retry asks again)"))
        if self.chat.dropped:
            self.screen.say(f"({self.chat.dropped} of the oldest exchanges no longer fit: the model has forgotten them)")

    def image(self, argument: str) -> None:
        """Queues one or several images."""
        for path in typed_paths(required("/image", argument)):
            self.chat.add_image(load_image(Path(path).expanduser(), path))
            self.queue.append(Shown(path))
            self.screen.say(f"image {len(self.chat.waiting)} for the next question: {path}")
        if len(self.chat.waiting) > (room := self.chat.room()):
            self.screen.say(f"more than fit beside a question: about {room} do; /undo takes the last one back", "error")

    def video(self, argument: str) -> None:
        """Queues frames of one or several videos: as many as asked for, or as fit.

        Raises UsageError when there is no room, and as `read_frames` does.
        """
        for path in typed_paths(required("/video", argument)):
            room = self.chat.room() - len(self.chat.waiting)
            if room < 1:
                raise UsageError(f"no room for a video beside the {len(self.chat.waiting)} images that wait: /undo takes them back,"
                                 " a larger --max_seq_len makes room")  # fmt: skip
            frames = read_frames(Path(path).expanduser(), min(self.video_frames, room))
            times = labels(frames)
            for frame, time in zip(frames, times, strict=True):
                self.chat.add_image(frame.image, time)
            self.queue.append(Shown(path, tuple(times)))
            fit = f" ({self.video_frames} do not fit: a larger --max_seq_len makes room)" if room < self.video_frames else ""
            self.screen.say(f"{len(frames)} frames for the next question, at {', '.join(times)}: {path}{fit}")

    def params(self, argument: str) -> None:
        """Changes how answers are sampled, or shows it."""
        self.chat.sampling = changed(self.chat.sampling, argument)
        values = dataclasses.asdict(self.chat.sampling).items()
        self.screen.say(" ".join(f"{name}={'none' if value is None else value}" for name, value in values))

    def undo(self, _argument: str) -> None:
        """Takes back what came last: a queued image or video, else an exchange, whose images are queued again."""
        if self.queue:
            shown = self.queue.pop()
            del self.chat.waiting[-(len(shown.times) or 1) :]
            self.screen.say(f"taken back: {shown.path}")
        elif self.take_back() is None:
            raise UsageError("nothing to take back")
        else:
            waiting = f"; with the next question: {', '.join(shown.path for shown in self.queue)}" if self.queue else ""
            self.screen.say(f"taken back: the last question and its answer{waiting}")

    def retry(self, _argument: str) -> None:
        """Asks the last question again."""
        question = self.unanswered if self.unanswered is not None else self.take_back()
        if question is None:
            raise UsageError("no question to ask again")
        if self.chat.sampling.temperature == 0 or self.chat.sampling.seed is not None:
            self.screen.say("(greedy, or with a seed: the same answer each time; /params temperature=0.8 seed=none changes that)")
        self.ask(question)

    def take_back(self) -> str | None:
        """The question of the last exchange, which is undone; None when the model remembers none."""
        if not self.chat.undo():
            return None
        exchange = self.exchanges.pop()
        self.queue = [*exchange.shown, *self.queue]
        return exchange.question

    def save(self, argument: str) -> None:
        """Writes the conversation as Markdown, into a new file."""
        name = required("/save", argument)
        target = Path(name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "'\"" else name).expanduser()
        if not self.exchanges:
            raise UsageError("nothing to save yet")
        if os.path.lexists(target):
            raise UsageError(f"not saved: {target} exists; give another name")
        text = markdown(self.exchanges, target.parent).encode(errors="backslashreplace")
        write_atomically(target, lambda file: file.write(text))
        self.screen.say(f"saved: {target}")

    def reset(self, _argument: str) -> None:
        """Forgets everything but the sampling."""
        self.chat.reset()
        self.exchanges, self.queue, self.unanswered = [], [], None
        self.screen.say("forgotten")

    def help(self, _argument: str) -> None:
        """Lists the commands."""
        for command, (argument, meaning) in COMMANDS.items():
            self.screen.say(f"{f'{command} {argument}':<24}{meaning}")
        self.screen.say("Anything else is a question. Images stand before it, or where it says <image>, once for each."
                        "\nCtrl-C breaks an answer off; what was said stays. Tab completes.")  # fmt: skip


def required(command: str, argument: str) -> str:
    """The argument; raises UsageError when there is none."""
    if not argument:
        raise UsageError(f"{command} needs a {COMMANDS[command][0]}")
    return argument


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


def history_file(environ: Mapping[str, str]) -> Path:
    """Where lines are kept between chats (XDG base directories)."""
    return Path(environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "minimind-v" / "history"


def start_readline(history: Path) -> Callable[[], None]:
    """Line editing with the history of earlier chats and completion by Tab. Returns what saves the history."""
    try:
        import readline
    except ImportError:  # not on every system
        return lambda: None
    with suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(1000)
    readline.set_completer_delims(" /")  # names are listed, not whole lines

    def completer(_text: str, state: int) -> str | None:
        found = complete(readline.get_line_buffer()[: readline.get_endidx()])
        return found[state][readline.get_begidx() :] if state < len(found) else None

    def save() -> None:
        with suppress(OSError):  # a home that cannot be written: the history is one of this chat only
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            readline.write_history_file(history)

    readline.set_completer(completer)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    return save


def complete(line: str) -> list[str]:
    """What a line may become by Tab: names of commands, and paths after those that take one."""
    command, space, typed = line.partition(" ")
    if not space:
        return [f"{name} " for name in COMMANDS if command and name.startswith(command)]
    if command not in ("/image", "/video", "/save"):
        return []
    start = os.path.expanduser(typed)
    return [f"{command} {typed}{path[len(start) :]}{'/' if os.path.isdir(path) else ''}"
            for path in sorted(glob.glob(glob.escape(start) + "*"))]  # fmt: skip
