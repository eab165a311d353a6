"""The chat in the terminal: commands, streamed answers that Ctrl-C may break off, completion, history, previews.

Colour only on a terminal and without NO_COLOR (no-color.org). With input from elsewhere than a terminal it reads one
question or command a line and prints nothing but the answers and what commands say.
"""

import dataclasses
import os
import shlex
import sys
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from dataset.images import IMAGE_SUFFIXES, load_image
from machine import ran_out_of_memory
from model.errors import DataError, SampleError, UsageError
from model.inference.generation import Sampling
from model.storage import StorageError, write_atomically

from .chat import Chat
from .console import STYLES, Screen, complete_path, half_typed, history_file, use_readline
from .markdown import escape
from .video import ANIMATED_SUFFIXES, VIDEO_SUFFIXES, labels, read_frames

COMMANDS = {
    "/image": ("PATH", "show a picture with the next question; several: repeat it"),
    "/video": ("PATH", "show frames of a video with the next question"),
    "/params": ("NAME=VALUE ...", "how answers are sampled; alone: what is set"),
    "/undo": ("", "take back the last exchange, or the picture or video that came after it"),
    "/retry": ("", "ask the last question again"),
    "/save": ("FILE.md", "the conversation as Markdown"),
    "/reset": ("", "forget the conversation"),
    "/help": ("", "this list"),
    "/exit": ("", "leave; Ctrl-D does, too"),
}
FOLLOWED_BY = {"/image": IMAGE_SUFFIXES, "/video": VIDEO_SUFFIXES | ANIMATED_SUFFIXES, "/save": {".md"}}  # files to complete
PARAMETERS = {field.name: field.type for field in dataclasses.fields(Sampling)}


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture or a video that a question is about; `times` are those of the frames."""

    path: str
    times: tuple[str, ...] = ()

    @property
    def pictures(self) -> int:
        return len(self.times) or 1


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A question, what it is about, and the answer as far as it came."""

    question: str
    shown: tuple[Shown, ...]
    answer: str


class TerminalChat:
    """A person's side of a Chat: reads lines, does what they say, remembers what was shown and said."""

    def __init__(self, chat: Chat, screen: Screen, video_frames: int = 8):
        self.chat, self.screen, self.video_frames = chat, screen, video_frames
        self.exchanges: list[Exchange] = []
        self.queue: list[Shown] = []  # for the next question
        self.unanswered: str | None = None  # the last question, when no answer came

    def run(self, title: str = "") -> None:
        """Until /exit, the end of input, or Ctrl-C twice in a row at an empty prompt."""
        prompt, remember = "", None
        if interactive := sys.stdin.isatty():
            prompt, remember = self._prompt(), use_readline(history_file(os.environ), complete)
            self.screen.say(title, "title")
            self.screen.say("/image PATH shows a picture, /help lists the commands, /exit leaves.")
        interrupted = False
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                self.screen.write("\n" if interactive else "")
                return
            except KeyboardInterrupt:
                if not interactive or (interrupted and not half_typed()):
                    self.screen.write("\n")
                    return
                interrupted = not half_typed()
                self.screen.say("\n(Ctrl-C again, Ctrl-D or /exit leaves)" if interrupted else "")
                continue
            interrupted = False
            if line and remember:
                remember(line)
            if not self.obey(line):
                return

    def obey(self, line: str) -> bool:
        """Does what a line says; False when it says to leave. Mistakes and Ctrl-C end the command, not the chat."""
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        try:
            if command in COMMANDS:
                getattr(self, command.removeprefix("/"))(argument.strip())
            elif command.startswith("/"):
                shown = " (to show a picture: /image PATH)" if os.path.isfile(typed_paths(line)[0]) else ""
                self.screen.say(f"no such command: {command}; /help lists them{shown}", "error")
            elif line:
                self.ask(line)
        except (UsageError, SampleError, DataError, StorageError, OSError, RuntimeError, MemoryError) as error:
            # RuntimeError: memory ran out, or a ~name nobody has
            told = "memory ran out: ask with fewer pictures, or /reset the chat first" if ran_out_of_memory(error) else str(error)
            self.screen.say(told, "error")
        except KeyboardInterrupt:
            self.screen.say("\n(stopped)")
        return True

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
        if stopped:
            self.screen.say("(stopped)" if said else "(stopped before the first word; /retry asks again)")
        elif not said:
            self.screen.say("(no answer; /retry asks again)")
        if said and self.chat.dropped:
            self.screen.say(f"({self.chat.dropped} of the oldest exchanges no longer fit: the model has forgotten them)")

    def image(self, argument: str) -> None:
        """Queues one or several pictures."""
        for path in typed_paths(required("/image", argument)):
            notes: list[SampleError] = []
            self.chat.add_image(load_image(Path(path).expanduser(), path, "", notes))
            self.queue.append(Shown(path))
            self.screen.preview(self.chat.waiting[-1:])
            self.screen.say(f"picture {len(self.chat.waiting)} for the next question: {path}{' (truncated)' if notes else ''}")
        if len(self.chat.waiting) > (room := self.chat.room()):
            self.screen.say(f"more than fit beside a question: about {room} do; /undo takes the last one back", "error")

    def video(self, argument: str) -> None:
        """Queues frames of one or several videos."""
        for path in typed_paths(required("/video", argument)):
            self.queue_video(path)

    def queue_video(self, path: str) -> None:
        """As many frames as asked for, or as fit. Raises UsageError when there is no room, and as `read_frames` does."""
        room = self.chat.room() - len(self.chat.waiting)
        if room < 1:
            raise UsageError(f"no room for a video beside the {len(self.chat.waiting)} pictures that wait:"
                             f" /undo takes them back, --max_seq_len {2 * self.chat.max_length} makes room")  # fmt: skip
        frames = read_frames(Path(path).expanduser(), min(self.video_frames, room))
        times = labels(frames)
        for frame, time in zip(frames, times, strict=True):
            self.chat.add_image(frame.picture, time)
        self.queue.append(Shown(path, tuple(times)))
        self.screen.preview(self.chat.waiting[-len(frames) :])
        self.screen.say(f"{len(frames)} frames for the next question, at {', '.join(times)}: {path}")
        if room < self.video_frames:
            self.screen.say(f"({self.video_frames} frames do not fit in {self.chat.max_length} tokens: at most {room};"
                            f" --max_seq_len {2 * self.chat.max_length} makes room)")  # fmt: skip

    def params(self, argument: str) -> None:
        """Changes how answers are sampled, or shows it."""
        self.chat.sampling = changed(self.chat.sampling, argument)
        values = dataclasses.asdict(self.chat.sampling).items()
        self.screen.say(" ".join(f"{name}={'none' if value is None else value}" for name, value in values))

    def undo(self, _argument: str) -> None:
        """Takes back what came last: a queued picture or video, else an exchange, whose pictures are queued again."""
        if self.queue:
            shown = self.queue.pop()
            del self.chat.waiting[len(self.chat.waiting) - shown.pictures :]
            self.screen.say(f"taken back: {shown.path}")
        elif self.take_back() is None:
            raise UsageError("nothing to take back")
        else:
            waits = f"; with the next question: {', '.join(shown.path for shown in self.queue)}" if self.queue else ""
            self.screen.say(f"taken back: the last question and its answer{waits}")

    def retry(self, _argument: str) -> None:
        """Asks the last question again."""
        question = self.unanswered if self.unanswered is not None else self.take_back()
        if question is None:
            raise UsageError("no question to ask again")
        if self.chat.sampling.temperature == 0 or self.chat.sampling.seed is not None:
            self.screen.say("(greedy, or with a seed: the same answer each time; /params temperature=0.8 seed=none changes that)")
        self.ask(question)

    def take_back(self) -> str | None:
        """The question of the last exchange, which is undone; None when there is none in the model's memory."""
        question = self.chat.undo()
        if question is not None:
            self.queue = [*self.exchanges.pop().shown, *self.queue]
        return question

    def save(self, argument: str) -> None:
        """Writes the conversation as Markdown; asks before it replaces a file."""
        target = Path(typed_name(required("/save", argument))).expanduser()
        if not self.exchanges:
            raise UsageError("nothing to save yet")
        if os.path.isdir(target):
            raise UsageError(f"{target} is a folder; /save needs a file name")
        if os.path.exists(target) and not (sys.stdin.isatty() and confirmed(f"{target} exists. Replace it? [y/N] ")):
            raise UsageError(f"not saved: {target} exists")
        write_atomically(target, lambda file: file.write(markdown(self.exchanges, target.parent).encode(errors="backslashreplace")))
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
        self.screen.say("Anything else is a question. Pictures stand before it, or where it says <image>, once for each."
                        "\nCtrl-C breaks an answer off; what was said stays. Tab completes.")  # fmt: skip

    def _prompt(self) -> str:
        # Readline counts what stands between \001 and \002 as no width.
        return f"\n\001\x1b[{STYLES['prompt']}m\002>\001\x1b[0m\002 " if self.screen.colour else "\n> "


def required(command: str, argument: str) -> str:
    """The argument; raises UsageError when there is none."""
    if not argument:
        raise UsageError(f"{command} needs a {COMMANDS[command][0]}")
    return argument


def confirmed(question: str) -> bool:
    """Whether the person says yes."""
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def typed_paths(text: str) -> list[str]:
    """Paths as people type or drag them: as they stand, or quoted, with escaped spaces, several."""
    if not os.path.exists(Path(text).expanduser()):
        with suppress(ValueError):  # an open quote
            return shlex.split(text) or [text]
    return [text]


def typed_name(text: str) -> str:
    """The one name that a file will have, spaces and all; quotes around it are none of it."""
    return text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "'\"" else text


def changed(sampling: Sampling, text: str) -> Sampling:
    """`sampling` with "name=value name=value" applied; raises UsageError and changes nothing for anything wrong."""
    values = {}
    for word in text.replace(",", " ").split():
        name, _, value = word.partition("=")
        if name not in PARAMETERS:
            raise UsageError(f"no parameter {name!r}; there are {', '.join(PARAMETERS)}")
        try:
            optional = value.lower() == "none" and PARAMETERS[name] == int | None
            values[name] = None if optional else (float if PARAMETERS[name] is float else int)(value)
        except ValueError as error:
            raise UsageError(f"{name}={value}: not {'a number' if PARAMETERS[name] is float else 'a whole number'}") from error
    try:
        return dataclasses.replace(sampling, **values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def markdown(exchanges: list[Exchange], folder: Path) -> str:
    """The conversation, with links to what was shown as seen from `folder`."""
    parts = ["# A conversation with MiniMind-V"]
    for exchange in exchanges:
        for shown in exchange.shown:
            path = os.path.relpath(Path(shown.path).expanduser(), folder)
            link = f"[{escape(Path(path).name)}]({quote(path)})"
            parts.append(f"{link}, frames at {', '.join(shown.times)}" if shown.times else f"!{link}")
        parts += ["\n".join(f"> {escape(line)}".rstrip() for line in exchange.question.splitlines()), escape(exchange.answer.strip())]
    return "\n\n".join(parts) + "\n"


def complete(line: str) -> list[str]:
    """What a line may become by Tab: names of commands and parameters, paths of files that fit the command."""
    command, space, argument = line.partition(" ")
    if not space:
        return [f"{name} " for name in COMMANDS if command and name.startswith(command)]
    if command == "/params":
        start = argument.rpartition(" ")[2]
        return [f"{line[: len(line) - len(start)]}{name}=" for name in PARAMETERS if name.startswith(start)]
    if command in FOLLOWED_BY:
        return [f"{command} {path}" for path in complete_path(argument, FOLLOWED_BY[command])]
    return []
