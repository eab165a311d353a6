"""The chat in the terminal: what lines do, what survives Ctrl-C, what is completed and shown."""

import codecs
import fcntl
import io
import os
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from PIL import Image

from chat import terminal
from chat.chat import Chat
from chat.terminal import Screen, TerminalChat, changed, complete, typed_paths
from model.conversation import IMAGE_PLACEHOLDER
from model.errors import UsageError
from model.inference.assistant import Assistant
from model.inference.generation import Sampling
from model.weights import fingerprints, save_weights
from tests.conftest import DECODER, REPOSITORY, make_model, make_vision_encoder
from tests.test_video import make_video

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def assistant(tokenizer) -> Assistant:
    return Assistant(make_model(encoder=make_vision_encoder(), hidden_size=32, num_attention_heads=8), tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, colour in [("red.png", "red"), ("my blue.png", "blue")]:
        Image.new("RGB", (40, 40), colour).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    os.mkfifo(folder / "pipe")
    make_video(folder / "v.mp4", list(range(80)))
    return folder


@pytest.fixture
def talk(assistant, folder, monkeypatch):
    """A chat in `folder`, and what it showed since it was last asked."""
    monkeypatch.chdir(folder)
    chat = TerminalChat(Chat(assistant, GREEDY), Screen(io.StringIO()))

    def say(line: str) -> str:
        before = len(chat.screen.file.getvalue())
        chat.obey(line)
        return chat.screen.file.getvalue()[before:]

    say.chat = chat
    return say


def test_questions_and_images_are_those_of_a_chat(talk, assistant, folder):
    assert talk("/image red.png") == "image 1 for the next question: red.png\n"
    assert "image 2" in talk("/image my blue.png")
    first, second = talk("What are these?"), talk("And?")
    chat = Chat(assistant, GREEDY)
    for name in ("red.png", "my blue.png"):
        chat.add_image(Image.open(folder / name))
    assert (first, second) == (chat.ask("What are these?") + "\n", chat.ask("And?") + "\n")
    assert talk.chat.chat.turns == chat.turns


@pytest.mark.parametrize(
    ("line", "message"),
    [("/image", "/image needs a PATH"), ("/image nowhere.png", "'nowhere.png' cannot be read: No such file or directory\n"), ("/image broken.png", "cannot be read"),
     ("/image .", "it is a folder"), ("/image pipe", "it is a folder, a pipe or a device"), ("/video pipe", "a pipe or a device"),
     ("/image " + "a" * 5000, "cannot be read: File name too long"), ("/video", "needs a PATH"), ("/video broken.png", "cannot be read"), ("/dance", "no such command: /dance"),
     ("/undo", "no question to take back"), ("/retry", "no question to take back"), ("/save", "/save needs a PATH"), ("/params top_p=2", "top_p lies in (0, 1], not 2.0"), ("word " * 3000, "too long"),
     ("/image ~noone/x.png", "home directory"), ("/image 'red.png", "cannot be read"), ("/image a\0b", "cannot be read")],
)  # fmt: skip
def test_mistakes_are_told_and_change_nothing(talk, line, message):
    said = talk(line)
    assert message in said and "Traceback" not in said
    chat = talk.chat.chat
    assert not chat.turns and not chat.waiting and chat.sampling == GREEDY


def test_undo_goes_back_step_by_step(talk):
    talk("/image red.png")
    answer = talk("What?")
    talk("/video v.mp4")
    assert len(talk.chat.chat.waiting) == 8
    assert "taken back: 8 images" in talk("/undo") and not talk.chat.chat.waiting
    assert "images that wait: 1" in talk("/undo") and len(talk.chat.chat.waiting) == 1 and not talk.chat.chat.turns
    assert talk("What?") == answer, "asked again with its image"
    assert talk("/undo") and talk("/undo") and "no question" in talk("/undo") and not talk.chat.chat.waiting


def test_retry_answers_the_last_question_again(talk):
    talk("/image red.png")
    first = talk("What?")
    assert talk("/retry") == first and [turn.role for turn in talk.chat.chat.turns] == ["user", "assistant"]
    talk("/params temperature=2.0")
    assert any(talk("/retry") != first for _ in range(5)) and len(talk.chat.chat.pixels) == 1
    assert "too long" in talk("word " * 3000) and "too long" in talk("/retry"), "the question that failed is the last one"
    assert "taken back: 'word word" in talk("/undo") and len(talk.chat.chat.turns) == 2


def test_the_conversation_is_saved_as_markdown(talk, tmp_path):
    talk("/image my blue.png")
    answers = [talk("What\u2028is it?").strip(), talk("/video v.mp4") and talk("And?").strip()]
    talk("word " * 3000)
    talk("/undo")
    path = tmp_path / "talk 1.md"
    assert talk(f"/save '{path}'") == f"saved: {path}\n"
    text = path.read_text(encoding="utf-8")
    assert text == f"> `my blue.png`\n> What\n> is it?\n\n{answers[0]}\n\n> `v.mp4`\n> And?\n\n{answers[1]}\n"
    talk("/reset")
    assert "exists; give another name" in talk(f"/save {path}") and path.read_text(encoding="utf-8") == text, "it replaces nothing"
    assert "No such file" in talk(f"/save {tmp_path}/no/talk.md")


def test_tab_completes_commands_and_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert complete("/re") == ["/retry ", "/reset "] and complete("/sa") == ["/save "]
    assert complete("what") == complete("") == complete("what re") == complete("/image nowhere/") == []
    assert complete("/image my b") == ["/image my blue.png"] and complete(f"/video {folder}/v") == [f"/video {folder}/v.mp4"]
    assert complete(f"/image {folder.parent}/{folder.name[:-1]}")[0].endswith("/")
    monkeypatch.setenv("HOME", str(folder))
    assert complete("/image ~/re") == [f"/image {folder}/red.png"]


class CtrlC(io.StringIO):
    """Presses Ctrl-C when `after` pieces are shown."""

    after = 10**9

    def flush(self):
        self.after -= 1
        if self.after == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3])
def test_ctrl_c_keeps_what_was_said(assistant, folder, after, monkeypatch):
    monkeypatch.chdir(folder)
    chat = TerminalChat(Chat(assistant, GREEDY), Screen(file := CtrlC()))
    chat.obey("/image red.png")
    file.after = after
    chat.obey("What?")
    assert file.getvalue().endswith("(stopped)\n")
    question, said = (turn.content for turn in chat.chat.turns)
    assert question == f"{IMAGE_PLACEHOLDER}\nWhat?"
    chat.obey("And?")
    assert len(chat.chat.turns) == 4
    fresh = Chat(assistant, GREEDY)
    fresh.add_image(Image.open(folder / "red.png"))
    whole = fresh.ask("What?")
    assert whole.startswith(said) and len(said) < len(whole)
    fresh.turns[-1] = chat.chat.turns[1]
    assert fresh.ask("And?") == chat.chat.turns[3].content, "the model read what was said, no more"


def test_ctrl_c_before_the_first_word_keeps_the_image(talk, monkeypatch):
    talk("/image red.png")
    with monkeypatch.context() as patch:
        patch.setattr(talk.chat.chat, "_prompt", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "(stopped)" in talk("What?")
    assert not talk.chat.chat.turns and len(talk.chat.chat.waiting) == 1, "the image is asked about next"


def test_memory_that_runs_out_is_told_and_the_chat_lives_on(talk, monkeypatch):
    monkeypatch.setattr(terminal, "load_image", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert "memory ran out" in talk("/image red.png") and not talk.chat.chat.waiting


def test_ctrl_c_ends_a_command(talk, monkeypatch):
    monkeypatch.setattr(terminal, "load_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "(stopped)" in talk("/image red.png") and not talk.chat.chat.waiting


def test_an_answer_without_words_is_told(talk, monkeypatch):
    monkeypatch.setattr(talk.chat.chat, "stream", lambda question: (piece for piece in ()))
    assert "(no answer" in talk("What?") and not talk.chat.chat.turns


def test_what_the_model_forgets_is_told(talk):
    talk.chat.chat.max_length = 700
    said = [(talk("/image red.png"), talk(f"What is {number}?"))[1] for number in range(5)]
    assert "the model has forgotten" not in said[0] and "of the oldest exchanges no longer fit" in said[-1]
    while "taken back" in talk("/undo"):
        pass
    assert not talk.chat.chat.turns and not talk.chat.chat.waiting


def test_frames_of_a_video_stand_with_their_times(talk):
    said = talk("/video v.mp4")
    times = [f"0:0{second}.5" for second in range(8)]
    assert f"8 frames, at {', '.join(times)}, for the next question: v.mp4" in said
    reds = [int(image[0].float().mean()) for image in talk.chat.chat.waiting]
    assert reds == sorted(reds) and reds[0] < 30 and reds[-1] > 220
    talk("What happens?")
    shown = "".join(f"{time} {IMAGE_PLACEHOLDER}\n" for time in times)
    assert talk.chat.chat.turns[0].content == f"{shown}What happens?"


def test_as_many_frames_as_fit(talk):
    talk.chat.video_frames = 20
    room = talk.chat.chat.room()
    talk("/image red.png")
    assert f"{room - 1} frames, at" in talk("/video v.mp4") and len(talk.chat.chat.waiting) == room
    talk("/image red.png")
    talk("/image red.png")
    assert "too long: " in (said := talk("What?" * 90)) and f"{room} would fit, or raise --max_seq_len" in said


def test_parameters():
    sampling = changed(Sampling(), "temperature=0.2 top_p=0.9, top_k=5 seed=7 max_new_tokens=9 repetition_penalty=1.1")
    assert sampling == Sampling(9, 0.2, 0.9, 5, 1.1, 7)
    assert changed(sampling, "seed=none").seed is None and changed(sampling, "") == sampling
    for text in ("temperature", "temperature=", "temperature=warm", "temperature=-1", "temperature=nan", "temperature=inf", "top_p=0",
                 "top_k=1.5", "top_k=-1", "max_new_tokens=0", "max_new_tokens=none", "seed=-1", "seed=x", "repetition_penalty=0", "colour=1",
                 "top_k=4 top_p=7"):  # fmt: skip
        with pytest.raises(UsageError, match=text.partition("=")[0].split()[-1] if " " not in text else "top_p"):
            changed(sampling, text)


def test_parameters_are_shown(talk):
    assert "temperature=0.0" in talk("/params") and "seed=none" in talk("/params")
    assert "top_k=3" in talk("/params top_k=3") and talk.chat.chat.sampling.top_k == 3


def test_paths_as_people_type_them(talk, folder):
    for typed in ("my blue.png", "'my blue.png'", '"my blue.png"', r"my\ blue.png"):
        assert typed_paths(typed) == ["my blue.png"]
    assert typed_paths("red.png 'my blue.png'") == ["red.png", "my blue.png"]
    assert typed_paths("it's not there.png") == ["it's not there.png"]


def test_bytes_that_are_no_text_are_asked_all_the_same(talk):
    assert "Traceback" not in talk("What is \udcff?") and talk.chat.chat.turns[0].content == "What is ??"


def test_answers_do_not_steer_the_terminal():
    screen = Screen(file := io.StringIO())
    screen.write("a\x1b[2Jb\x07\x9b0m\r\n\tc 貓")
    assert file.getvalue() == "a\ufffd[2Jb\ufffd\ufffd0m\ufffd\n\tc 貓"


class Person:
    """A process on a terminal of its own, and what a person reads and types there."""

    def __init__(self, command: list[str], cwd: Path, **environment):
        self.screen, far = os.openpty()
        self.process = subprocess.Popen(
            command, cwd=cwd, stdin=far, stdout=far, stderr=far, start_new_session=True, env={**os.environ, **environment},
            preexec_fn=self.prepare,
        )  # fmt: skip
        os.close(far)
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")(errors="replace")

    @staticmethod
    def prepare() -> None:
        """Makes Ctrl-C a signal, also where the tests run in the background."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def reads(self, text: str, more: int = 0) -> str:
        """Waits for the text and so many characters more; what came before it."""
        deadline = time.monotonic() + 300
        while text not in self.seen or len(self.seen) - self.seen.index(text) - len(text) < more:
            assert select.select([self.screen], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            self.seen += self.decoder.decode(os.read(self.screen, 4096))
        before, _, self.seen = self.seen.partition(text)
        return before

    def types(self, text: str) -> None:
        os.write(self.screen, text.encode())


def test_a_person_at_the_terminal(folder, encoder_folder, tokenizer, tmp_path):
    model = make_model(encoder=make_vision_encoder(), hidden_size=32, num_attention_heads=8)
    model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 0  # it speaks for ever
    save_weights(tmp_path / "sft_vlm_32.pth", model, {"fingerprints": fingerprints(model, tokenizer)})
    flags = [*DECODER, "--save_dir", tmp_path, "--vision_model_path", encoder_folder, "--device", "cpu", "--temperature", "0",
             "--max_new_tokens", "20000", "--max_seq_len", "30000"]  # fmt: skip
    person = Person([sys.executable, str(REPOSITORY / "eval_vlm.py"), *map(str, flags)], folder, TERM="xterm-256color")
    person.reads("[1] chat:")
    person.types("1\n")
    person.reads("sft_vlm_32 on cpu")
    person.reads("\n> ")
    person.types("/im\tre\t\n")
    person.reads("image 1 for the next question: red.png")
    person.types("What is this?\n")
    person.reads("What is this?\r\n", more=100)
    person.types("\x03")
    person.reads("(stopped)")
    person.reads("\n> ")
    person.types("/params max_new_tokens=5\n")
    person.reads("seed=none")
    person.types("/ret\t\n")  # the chat continues
    person.reads("/retry \r\n", more=5)
    person.reads("\n> ")
    person.types("/save talk.md\n")
    person.reads("saved: talk.md")
    person.reads("\n> ")
    assert (folder / "talk.md").read_text(encoding="utf-8").startswith("> `red.png`\n> What is this?\n\n")
    person.types("half a line")
    person.reads("half a line")
    time.sleep(1)  # a signal between readline's last key and its wait for the next would be answered with that one only
    person.types("\x03")
    person.reads("(Ctrl-D or /exit leaves)")
    person.reads("\n> ")
    person.types("/exit\n")
    assert person.process.wait(timeout=60) == 0
    os.close(person.screen)
