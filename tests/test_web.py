"""The web page: its parts by themselves, and the whole of it in a browser, on a small model that was really trained."""

import errno
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chat.markdown import escape
from chat.web import engine as engine_module
from chat.web import pictures, tray
from chat.web.engine import Engine
from chat.web.models import Loading, ModelShelf
from chat.web.problems import explain
from chat.web.runs import Run, RunFolder, differing, smooth, thin
from chat.web.texts import TEXTS, Labels, preferred
from chat.web.training import state_table
from chat.web.visitor import Visitor
from model import vision
from model.inference.generation import Sampling
from model.weights import fingerprints, save_weights
from tests.browser import CHROMIUM, Guest, chromium, free_port, serve
from tests.conftest import COLOURS, REPOSITORY, make_model, make_vision_encoder, run_script, training_flags, write_jsonl


def picture_bytes(colour: str, size: tuple[int, int] = (64, 64), form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form, **options)
    return file.getvalue()


# The engine


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(job) -> None:
    until(lambda: job.wait(len(job.values), 0.1))


def test_everybody_gets_a_step_in_turn():
    order, gate = [], threading.Event()

    def steps(name, count):
        gate.wait()
        for number in range(count):
            order.append(name)
            yield str(number)

    engine = Engine()
    jobs = [engine.submit(lambda name=name, count=count: steps(name, count)) for name, count in [("a", 6), ("b", 2), ("c", 4)]]
    assert engine.busy == 3
    gate.set()
    for job in jobs:
        finish(job)
    assert "".join(order) == "abcabcacacaa" and jobs[2].text == "0123"
    until(lambda: engine.busy == 0)


def test_a_failure_ends_one_job_and_no_other(capsys):
    def broken():
        yield "so far"
        raise MemoryError

    def fine():
        for number in range(3):
            yield str(number)

    engine = Engine()
    jobs = [engine.submit(broken), engine.submit(fine)]
    for job in jobs:
        finish(job)
    assert jobs[0].text == "so far" and "fewer pictures" in jobs[0].problem and "MemoryError" in capsys.readouterr().err
    assert jobs[1].text == "012" and jobs[1].problem is None


@pytest.mark.parametrize("how", ["stopped", "abandoned"])
def test_a_job_that_is_stopped_or_that_nobody_watches_is_closed(how, monkeypatch):
    closed = threading.Event()

    def endless():
        try:
            while True:
                time.sleep(0.001)
                yield "x"
        finally:
            closed.set()

    present = threading.Event()
    present.set()
    job = Engine().submit(endless, present.is_set)
    job.wait(0, 60)
    if how == "stopped":
        job.stop()
    else:
        monkeypatch.setattr(engine_module, "ABANDONED", 0.2)
        assert not closed.wait(1), "its visitor is there, though on another page"
        present.clear()
    assert closed.wait(60)
    finish(job)
    assert job.stopped and job.text


def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch):
    def full(_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=full))
    engine = Engine()
    broken, fine = engine.submit(lambda: iter([1 / 0])), engine.submit(lambda: iter("fine"))
    finish(broken), finish(fine)
    assert "ZeroDivisionError" in broken.problem and fine.text == "fine"


# Pictures


def test_pictures_lose_everything_but_their_pixels():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8825] = 6, "a secret place", {1: "N", 2: (22.0, 18.0, 0.0)}  # turned; where it was taken
    left_red = Image.new("RGB", (60, 40), "blue")
    left_red.paste("red", (0, 0, 30, 40))
    file = io.BytesIO()
    left_red.save(file, "JPEG", exif=exif, comment=b"a secret comment", quality=95)
    taken = pictures.take(file.getvalue(), "../../etc/passwd")
    preview = Image.open(io.BytesIO(taken.preview))
    assert b"secret" in file.getvalue() and b"secret" not in taken.preview and not preview.info and not preview.getexif()
    assert preview.size == (40, 60) and preview.getpixel((20, 5))[0] > 200, "upright: what was left is on top"
    assert taken.pixels().shape == (3, 224, 224) and taken.pixels() is taken.pixels() and taken.data is None


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"no picture", "cannot be read"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PDF or PostScript document; save its pages as PNG"),
     (picture_bytes("red")[:60], "cannot be read"), (picture_bytes("red", (8001, 8000)), "8001 x 8000 pixels"),
     (picture_bytes("red", (20_000, 20_000)), r"64,000,000 pixels; save it smaller\.$"), (b"x" * (pictures.MAX_MEGABYTES * 2**20 + 1), "MB, more than")],
    ids=["text", "postscript", "cut off", "64 megapixels", "400 megapixels", "too long"],
)  # fmt: skip
def test_bad_pictures_are_refused_with_a_remedy(data, message):
    with pytest.raises(pictures.PictureError, match=message):
        pictures.take(data, "p.png")


@pytest.mark.parametrize(("form", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I")])
def test_a_picture_of_16_bits_is_shown_as_the_model_sees_it(form, mode):
    grey = np.linspace(0, 65535, 224, dtype=np.int32 if mode == "I" else np.uint16)
    file = io.BytesIO()
    Image.fromarray(np.tile(grey, (224, 1))).save(file, form)
    assert Image.open(file).mode == mode
    taken = pictures.take(file.getvalue(), "p")
    preview = Image.open(io.BytesIO(taken.preview))
    assert [preview.getpixel((x, 9)) for x in range(224)] == taken.pixels()[0, 9].tolist() and preview.getextrema() == (0, 255)


@pytest.mark.parametrize(("form", "options"), [("AVIF", {"quality": 100}), ("TGA", {}), ("JPEG2000", {}), ("ICO", {"sizes": [(64, 64)]}), ("PPM", {}), ("TIFF", {}), ("QOI", {}), ("PCX", {})])
def test_the_page_takes_what_training_takes(form, options):
    taken = pictures.take(picture_bytes("red", form=form, **options), "photo")
    assert Image.open(io.BytesIO(taken.preview)).convert("RGB").getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=4)
    assert taken.pixels()[:, 100, 100].tolist() == pytest.approx([255, 0, 0], abs=4)


def test_a_picture_short_of_a_few_bytes_is_taken():
    assert Image.open(io.BytesIO(pictures.take(picture_bytes("red", form="JPEG")[:-2], "p.jpg").preview)).getpixel((9, 60))[0] > 250


def test_a_picture_of_floats_is_shown_as_the_model_sees_it():
    file = io.BytesIO()
    Image.fromarray(np.tile(np.linspace(0, 1, 224, dtype=np.float32), (224, 1))).save(file, "TIFF")
    taken = pictures.take(file.getvalue(), "p.tif")
    preview = Image.open(io.BytesIO(taken.preview))
    assert [preview.getpixel((x, 9)) for x in range(224)] == taken.pixels()[0, 9].tolist() and preview.getextrema() == (0, 255)


def test_companions_are_no_examples(tmp_path):
    for name in ("a.png", "._a.png", ".b.png", "c.tga"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    assert [picture.name for picture in pictures.examples(tmp_path)] == ["a.png", "c.tga"]


def test_pictures_are_taken_without_torch():
    """The page is shown before torch is there; examples are on it."""
    code = ("import io, sys; from PIL import Image; from chat.web import pictures; file = io.BytesIO(); "
            "Image.new('RGBA', (9, 9)).save(file, 'PNG'); pictures.take(file.getvalue(), 'p'); print('torch' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, text=True, capture_output=True, check=True).stdout == "False\n"


def test_a_failure_of_the_program_is_told_in_whole_sentences():
    assert ".." not in explain(ValueError("no such thing.")) and "no such thing. The log" in explain(ValueError("no such thing."))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_can_be_shown(mode):
    file = io.BytesIO()
    Image.new("L", (30, 20), 90).convert("I" if mode == "I;16" else mode).save(file, "TIFF")
    taken = pictures.take(file.getvalue(), "p.tif")
    assert Image.open(io.BytesIO(taken.preview)).size == (30, 20) and taken.thumbnail.startswith("data:image/jpeg;base64,")


# Models and runs


def test_models_are_found_named_ones_first(tmp_path):
    for name in ("sft_vlm_512", "pretrain_vlm_512", "sft_vlm_768_moe", "notes", "._sft_vlm_512", ".a_512"):
        (tmp_path / f"{name}.pth").write_bytes(b"")
    (tmp_path / "folder_512.pth").mkdir()
    (tmp_path / "pretrain_vlm_512.json").write_text(json.dumps({"config": {"num_hidden_layers": 3}, "training": {"vision_model_path": "/eye"}}))
    for name, kind in (("mine", "minimind-v"), ("other", "llama"), (".mine.x", "minimind-v")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 64, "num_hidden_layers": 2}))
    shelf = ModelShelf(tmp_path, "sft_vlm", None, None, "model", "cpu")
    sizes = {choice.label: choice.size for choice in shelf.choices()}
    assert sizes == {"sft_vlm_512": "512 wide", "sft_vlm_768_moe": "768 wide MoE", "pretrain_vlm_512": "512x3", "mine": "64x2"}
    assert set(list(sizes)[:2]) == {"sft_vlm_512", "sft_vlm_768_moe"}
    loading = shelf.load(shelf.choices()[0])
    while loading.pending:
        time.sleep(0.05)
    assert "no vision encoder" in loading.problem or "no readable" in loading.problem
    assert shelf.load(loading.choice) is not loading, "a failed one is tried again"


SIDECARS = [
    {"config": [1]}, {"config": {"hidden_size": [1], "num_hidden_layers": "\ud800", "use_moe": {}}}, {"training": "x"},
    {"training": {"vision_model_path": ["/eye"]}}, {"progress": 7}, {"progress": {"update": "abc", "seconds": 3}},
    {"progress": {"update": [1], "seconds": None}}, {"progress": {"update": 1}}, {"progress": {"update": 1, "seconds": 10**400}}, [1],
]  # fmt: skip


def test_odd_files_are_no_trouble(tmp_path, browser):
    """Sidecars that hold anything, links to nothing, names that are no text: both pages show the rest."""
    for number, content in enumerate([*map(json.dumps, SIDECARS), "[" * 100_000]):
        (tmp_path / f"odd{number}_512.pth").write_bytes(b"")
        (tmp_path / f"odd{number}_512.json").write_text(content)
        (tmp_path / f"folder{number}").mkdir()
        (tmp_path / f"folder{number}" / "config.json").write_text(content.replace("{", '{"model_type": "minimind-v", ', 1))
    (tmp_path / "dangling_512.pth").symlink_to("nowhere")
    for name in (b"\xff_512.pth", b"\xff.metrics.jsonl"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    lines = ['{"update": NaN, "samples": []}', f'{{"update": 1, "loss": 1{"0" * 400}}}', '{"update": 2, "loss": 3.5, "seconds": 1e999, "samples": [{"answer": "half\\ud800"}]}', "[" * 100_000]
    (tmp_path / "odd.json").write_text('{"training": {"half\\ud800": "\\ud800"}}')
    (tmp_path / "odd.metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    choices = ModelShelf(tmp_path, "sft_vlm", None, None, "model", "cpu").choices()
    assert len(choices) == 2 * len(SIDECARS) and len(set(choices)) == len(choices) and not any(choice.trained for choice in choices)
    with serve("--save_dir", tmp_path) as (url, _), Guest(browser, url) as guest:
        guest.line.wait_for()
        guest.page.goto(f"{url}/training")
        guest.sees("3 lines of its metrics file cannot be read")
        guest.until(lambda: guest.page.get_by_test_id("stDataFrame").first.text_content().count("3.5000"))
        for number, text in ((1, "--half?"), (2, "half?")):
            guest.until(lambda number=number, text=text: text in guest.page.get_by_test_id("stDataFrame").nth(number).text_content())


def test_a_run_is_read_on_from_where_it_was_read(tmp_path):
    path = tmp_path / "sft_vlm_32.metrics.jsonl"
    path.write_text('{"update": 1, "loss": 4.0, "seconds": 1}\nnonsense\n{"update": 2, "lo')
    run = Run(path, "r").refresh()
    assert run.curve("loss", "update") == ([1.0], [4.0]) and run.bad == 1
    with open(path, "a") as file:
        file.write('ss": 3.0, "seconds": 2}\n{"update": 2, "eval_loss": 3.5, "samples": [{"answer": "red"}]}\n')
    run.refresh()
    assert run.curve("loss", "seconds") == ([1.0, 2.0], [4.0, 3.0]) and run.curve("eval_loss", "update") == ([2.0], [3.5])
    assert run.samples == [{"update": 2, "samples": [{"answer": "red"}]}] and run.last("loss") == 3.0 and run.is_live
    (tmp_path / "new").write_text('{"update": 1, "loss": 9.0}\n')
    (tmp_path / "new").replace(path)  # as a resumed run does
    assert run.refresh().curve("loss", "update") == ([1.0], [9.0])
    path.write_text('{"update": 1, "loss": 7.0}\n{"update": 2, "loss": 6.0}\n')  # another one under its number
    assert run.refresh().curve("loss", "update") == ([1.0, 2.0], [7.0, 6.0])
    path.unlink()
    assert run.refresh().curve("loss", "update") == ([], []) and RunFolder(tmp_path).runs() == {}


def test_a_run_can_be_drawn_while_another_page_reads_it(tmp_path):
    path = tmp_path / "sft_vlm_32.metrics.jsonl"
    path.write_text("".join(f'{{"update": {number}, "loss": 1.0}}\n' for number in range(20_000)))
    run, lengths = Run(path, "r"), [0]
    reader = threading.Thread(target=run.refresh)
    reader.start()
    while lengths[-1] < 20_000:
        xs, ys = run.curve("loss", "update")
        assert len(xs) == len(ys) >= lengths[-1]
        lengths.append(len(xs))
    reader.join()


@pytest.mark.parametrize("block", [b"XXXXgarbage", b"MM\0*\0\0"])
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_a_damaged_exif_block_keeps_no_picture_from_the_page(block, form):
    taken = pictures.take(picture_bytes("red", form=form, exif=block), "a.png")
    assert Image.open(io.BytesIO(taken.preview)).getpixel((5, 5))[0] > 250 and taken.pixels()[0].float().mean() > 250


def test_smoothing_and_thinning():
    assert smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0] * 3), "unbiased from the start"
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, 3.5 / 1.5]) and smooth([1.0, 5.0], 0.0) == [1.0, 5.0]
    points = list(range(10_001))
    thinned = thin(points, 1000)
    assert len(thinned) <= 1000 and thinned[-1] == 10_000 and thin(points[:7], 1000) == points[:7]


def test_arguments_that_differ():
    assert differing({"a": {"x": "1", "y": "2"}, "b": {"x": "1", "y": "3", "z": "0"}}) == ["y", "z"]


def test_headers_of_the_table_of_runs_begin_alike(tmp_path):
    (tmp_path / "a.metrics.jsonl").write_text('{"update": 1, "seconds": 61}\n')
    table = state_table([Run(tmp_path / "a.metrics.jsonl", "a").refresh()], Labels("en"))
    assert all(name[0].isupper() for name in table.column_names) and table["Time"].to_pylist() == ["0:01:01"]


def test_labels_are_whole_in_both_languages():
    source = "".join(path.read_text() for path in (REPOSITORY / "trainer" / "web").glob("*.py"))
    places = re.compile(r"{(\w+)")
    composed = ("axis_", "sample_", "loading_", "_help")
    for key, (english, chinese) in TEXTS.items():
        assert f'"{key}"' in source or any(part in key for part in composed), key
        assert set(places.findall(english)) == set(places.findall(chinese)), key
    assert set(re.findall(r'labels\("(\w+)"', source)) <= set(TEXTS)
    assert Labels("zh")("stop") == "停止" and preferred("zh-TW") == "zh" and preferred("de") == preferred(None) == "en"


@pytest.mark.parametrize(("url", "allowed"), [
    ("http://192.168.1.7:8501/chat", False), ("http://gpu.example.org", False), ("http://localhost.example.org", False), ("http://[2001:db8::1]:8501", False),
    ("http://localhost:8501", True), ("http://127.0.0.1:8501/chat", True), ("http://[::1]:8501", True), ("http://page.localhost", True),
    ("https://gpu.example.org", True), (None, True),
])  # fmt: skip
def test_the_camera_is_offered_where_browsers_give_it(url, allowed, monkeypatch):
    shown: dict = {}
    monkeypatch.setattr(tray.st, "context", types.SimpleNamespace(url=url))
    monkeypatch.setattr(tray.st, "toggle", lambda label, **options: shown.update(options))
    tray.camera(None, Labels("zh"))
    assert shown["disabled"] != allowed and ("https://" in (shown["help"] or "")) != allowed


def test_text_stays_itself_in_markdown():
    assert escape("a *b* <c> [d](e)") == r"a \*b\* \<c\> \[d\](e)"


# A small model, trained by the real script; one visitor's conversation with it


def conversation(turns: list[tuple[str, str]], image: str | None = None) -> dict:
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return {"conversations": messages, **({"image": image} if image else {})}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer) -> Path:
    """A folder with pictures/, tower/ and out/: weights, sidecar and metrics of a model that knows six colours; and in out/
    a large one with random weights, whose answers go on for half a minute."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "pictures").mkdir()
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(folder / "pictures" / f"{colour}.png")
        for other in COLOURS:  # a second picture, so that the newest counts
            turns = [("<image>\nWhat colour?", colour), ("Are you sure?", f"yes, {colour}"), ("<image>\nWhat colour?", other)]
            rows.append(conversation(turns, f"{colour}.png, {other}.png"))
    tower = make_vision_encoder()
    tower.save_pretrained(folder / "tower")
    data = write_jsonl(folder / "data.jsonl", rows * 25), folder / "pictures"
    done = run_script("train_sft_vlm.py", *training_flags(
        data, folder / "tower", folder, learning_rate=4e-3, batch_size=8, num_workers=0, max_seq_len=480, log_interval=10,
    ))  # fmt: skip
    assert done.returncode == 0, done.stderr
    babbler = make_model(tower=tower, hidden_size=768, num_hidden_layers=8, num_attention_heads=8)
    with torch.no_grad():  # it never ends by itself: special tokens are never among the likely ones
        babbler.model.embed_tokens.weight.mul_(4)[tokenizer.all_special_ids] = 0
    record = {"fingerprints": fingerprints(babbler, tokenizer), "training": {"vision_model_path": str(folder / "tower")}}
    save_weights(folder / "out" / "babbler_768.pth", babbler, record)
    return folder


@pytest.fixture(scope="module")
def loading(trained):
    shelf = ModelShelf(trained / "out", "sft_vlm", None, None, str(REPOSITORY / "model"), "cpu")
    loading = shelf.load(shelf.choices()[0])
    while loading.pending:
        time.sleep(0.05)
    assert loading.problem is None
    return loading


def converse(visitor: Visitor, loading, question: str | None = None) -> str:
    """The answer to a new question, or to the last one anew."""
    if question:
        visitor.ask(question)
    visitor.begin(loading, Sampling(max_new_tokens=40, temperature=0.0))
    if visitor.job:
        finish(visitor.job)
        visitor.settle(visitor.job)
    return visitor.exchanges[-1].answer


def show(visitor: Visitor, *colours: str) -> None:
    for colour in colours:
        visitor.bring(pictures.take(picture_bytes(colour), f"{colour}.png"))


def test_a_visitor_asks_repeats_edits_and_changes_the_model(loading, trained):
    visitor = Visitor(Engine(), 2048)
    show(visitor, "blue")
    assert converse(visitor, loading, "What colour?") == "blue" and converse(visitor, loading, "Are you sure?") == "yes, blue"
    visitor.again()
    assert converse(visitor, loading) == "yes, blue" and len(visitor.exchanges) == 2
    visitor.again("What colour?")
    edited = converse(visitor, loading)
    assert [exchange.question for exchange in visitor.exchanges] == ["What colour?", "What colour?"] and edited
    fresh = Visitor(Engine(), 2048)
    show(fresh, "blue")
    converse(fresh, loading, "What colour?")
    assert converse(fresh, loading, "What colour?") == edited, "an edited question is answered as if the first had never been asked"
    shelf = ModelShelf(trained / "out", "sft_vlm", None, None, str(REPOSITORY / "model"), "cpu")
    other = shelf.load(loading.choice)
    while other.pending:
        time.sleep(0.05)
    assert converse(visitor, other, "Are you sure?") == converse(fresh, loading, "Are you sure?"), "another model has the same history"
    (babbler,) = (choice for choice in shelf.choices() if choice.label == "babbler_768")
    del other
    shelf.load(babbler)
    assert shelf.load(loading.choice).assistant is visitor._chat.assistant, "what a visitor chats with is not loaded again"
    text = visitor.markdown("T", "You", "Model")
    assert text.count("**You:**") == 3 and "[blue.png] What colour?" in text and "**Model (sft\\_vlm_32):**" not in text
    visitor.clear()
    show(visitor, "red")
    assert converse(visitor, loading, "What colour?") == "red"


@pytest.fixture
def encoded(loading, monkeypatch) -> list:
    """Grows by every picture that is encoded."""
    encode, encoded = loading.assistant.encode, []
    monkeypatch.setattr(loading.assistant, "encode", lambda pixels: [encoded.extend(pixels), encode(pixels)][1])
    return encoded


def test_pictures_are_encoded_while_the_question_is_typed(loading, encoded):
    """Once each, the removed one in vain; the answer is the same."""
    visitor, sampling = Visitor(Engine(), 2048), Sampling(temperature=0.0)
    visitor.look_ahead(loading, sampling)
    assert visitor.ahead is None, "there is nothing to look at"
    show(visitor, "red", "blue")
    for _ in range(2):
        visitor.look_ahead(loading, sampling)
        finish(visitor.ahead)
    assert len(encoded) == 2 and visitor.ahead.problem is None
    visitor.remove(visitor.tray[0])
    visitor.look_ahead(loading, sampling)
    assert converse(visitor, loading, "What colour?") == "blue" and len(encoded) == 2
    visitor.again()
    assert converse(visitor, loading) == "blue" and len(encoded) == 2


def test_what_nobody_shows_any_more_is_not_encoded_and_not_kept(loading, encoded):
    visitor, sampling = Visitor(Engine(), 2048), Sampling(temperature=0.0)
    hold = threading.Event()
    first = visitor.engine.submit(lambda: iter([hold.wait(60)]))
    for colour in COLOURS:  # each takes the place of the one before, while the engine is at something else
        visitor.tray = []
        show(visitor, colour)
        visitor.look_ahead(loading, sampling)
    hold.set()
    finish(first)
    finish(visitor.ahead)
    assert len(encoded) == 1
    for colour in COLOURS:  # and while it has time
        visitor.tray = []
        show(visitor, colour)
        visitor.look_ahead(loading, sampling)
        finish(visitor.ahead)
        assert len(visitor._chat._shown) == 1
    visitor.tray = []
    visitor.look_ahead(loading, sampling)
    finish(visitor.ahead)
    assert not visitor._chat._shown and visitor.jobs == 0
    (example,) = (pictures.take(picture_bytes("red"), "red.png"),)
    for count in range(1, 4):  # cleared, the same picture is another chat's
        visitor.clear()
        encoded.clear()
        visitor.bring(example)
        visitor.look_ahead(loading, sampling)
        finish(visitor.ahead)
        assert len(encoded) == 1, count


def test_a_look_at_another_model_costs_nothing(loading, trained, encoded):
    """The conversation stays with what the first model has read of it, until a question is put to the other one."""
    visitor, sampling = Visitor(Engine(), 2048), Sampling(temperature=0.0)
    show(visitor, "red")
    converse(visitor, loading, "What colour?")
    chat = visitor._chat
    show(visitor, "blue")
    visitor.look_ahead(Loading(loading.choice, assistant=object()), sampling)
    assert visitor._chat is chat
    visitor.look_ahead(loading, sampling)
    assert converse(visitor, loading, "What colour?") == "blue" and len(encoded) == 2


@pytest.mark.parametrize(("trouble", "told"), [(ValueError("odd"), "'red.png' cannot be converted: odd"), (MemoryError(), "not enough memory")])
def test_a_picture_that_cannot_be_converted_is_told_with_the_question(loading, encoded, monkeypatch, trouble, told):
    tries = []

    def fail(picture):
        tries.append(picture)
        raise trouble

    visitor, sampling = Visitor(Engine(), 2048), Sampling(temperature=0.0)
    show(visitor, "red", "blue")
    visitor.tray[1].pixels()
    with monkeypatch.context() as patch:
        patch.setattr("model.vision.preprocess", fail)
        for _ in range(3):
            visitor.look_ahead(loading, sampling)
            finish(visitor.ahead)
        assert len(encoded) == 1 and len(tries) == (3 if isinstance(trouble, MemoryError) else 1), "the other one is seen"
        assert converse(visitor, loading, "What colour?") == "" and told in visitor.exchanges[0].problem
    show(visitor, "red")
    assert converse(visitor, loading, "What colour?") == "red"


def test_failures_are_told_and_leave_the_conversation_usable(loading, monkeypatch):
    visitor = Visitor(Engine(), 512)
    show(visitor, "red")
    with monkeypatch.context() as patch:
        patch.setattr("chat.chat.Chat", lambda *_: [][0])
        assert converse(visitor, loading, "What colour?") == "" and not visitor.busy
    assert "IndexError" in visitor.exchanges.pop().problem
    show(visitor, "red")
    assert converse(visitor, loading, "word " * 600) == "" and "too long" in visitor.exchanges[0].problem
    visitor.again("What colour?")
    assert converse(visitor, loading) == "red", "the pictures of the failed question are asked about again"
    show(visitor, *COLOURS[: pictures.MAX_PICTURES])
    with pytest.raises(pictures.PictureError, match="left out"):
        show(visitor, "red")


def test_a_question_that_never_began_leaves_nothing_behind(loading):
    visitor = Visitor(Engine(), 2048)
    show(visitor, "red")
    converse(visitor, loading, "What colour?")
    visitor.again()
    visitor.end()  # stopped while the model was loading
    assert visitor.exchanges[-1].stopped and not visitor.busy
    show(visitor, "green")
    assert converse(visitor, loading, "What colour?") == "green" and len(visitor._chat.pixels) == 1


def test_two_runs_of_one_visitor_take_turns(loading, monkeypatch):
    """When a lost connection comes back, the run before is still on its way to its end."""
    visitor, busy, go_on = Visitor(Engine(), 2048), threading.Event(), threading.Event()

    def bring_slowly() -> None:
        for colour in ("red", "blue"):
            show(visitor, colour)
            busy.set()
            go_on.wait(60)

    def in_the_meantime(slow, quick, then=lambda: None) -> None:
        busy.clear(), go_on.clear()
        threads = [threading.Thread(target=work, daemon=True) for work in (slow, quick)]
        threads[0].start()
        assert busy.wait(60)
        threads[1].start()
        time.sleep(0.1)
        go_on.set()
        then()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    ask = visitor.once("question", lambda: visitor.ask("What colour?"))
    in_the_meantime(visitor.once("upload", bring_slowly), ask)
    assert len(visitor.exchanges[0].pictures) == 2 and not visitor.tray, "a question goes with all of its pictures"
    visitor.remove(visitor.exchanges[0].pictures[0])
    assert len(visitor.exchanges[0].pictures) == 2, "what has been asked about stays"
    assert converse(visitor, loading) == "blue"
    older = visitor.engine.submit(lambda: iter("red"))
    finish(older)
    visitor.settle(older), visitor.begin(loading, Sampling())
    assert visitor.exchanges[0].answer == "blue" and visitor.job is None, "settled and begun once"

    def convert_slowly(picture):
        busy.set()
        go_on.wait(60)
        return preprocess(picture)

    preprocess = vision.preprocess
    monkeypatch.setattr(vision, "preprocess", convert_slowly)
    show(visitor, "green")
    visitor.ask("What colour?")
    hold = threading.Event()
    visitor.engine.submit(lambda: iter([hold.wait(60)]))  # the answer does not end before Stop is heard

    def until_stopped() -> None:
        until(lambda: visitor.job is not None and visitor.job._stop)
        hold.set()

    in_the_meantime(lambda: visitor.begin(loading, Sampling()), visitor.once("stop", visitor.end), until_stopped)
    assert visitor.exchanges[1].stopped and not visitor.busy, "Stop ends what was about to begin"


def test_a_picture_of_16_bits_and_a_model_are_awaited_at_once(trained, tmp_path):
    """Neither is given modules that the other has imported halfway."""
    program = """if True:
        import sys, time
        from pathlib import Path
        from chat.web import pictures
        from chat.web.models import ModelShelf

        shelf = ModelShelf(Path(sys.argv[1]), "sft_vlm", None, None, "model", "cpu")
        loading = shelf.load(shelf.choices()[0])
        time.sleep(0.5)
        print(pictures.take(Path(sys.argv[2]).read_bytes(), "deep.png").name)
        while loading.pending:
            time.sleep(0.1)
        print(loading.problem)
    """
    Image.new("I;16", (8, 8), 30_000).save(tmp_path / "deep.png")
    done = subprocess.run([sys.executable, "-c", program, trained / "out", tmp_path / "deep.png"], cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.stdout.splitlines() == ["deep.png", "None"], done.stdout + done.stderr


def test_a_callback_acts_once_for_each_time_it_is_shown():
    visitor, done = Visitor(Engine(), 2048), []
    first, other = visitor.once("a", done.append), visitor.once("b", done.append)
    first(1), first(2), other(3)
    visitor.once("a", done.append)(4)
    assert done == [1, 3, 4]


# The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here; .ci/run installs it")
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_a_page_that_is_drawn_leaves_the_path_of_imports_alone(tmp_path):
    """Else torch, imported in the background, misses modules that are there: an import reads the path while it changes."""
    program = """if True:
        import sys
        import web_demo_vlm
        from streamlit.testing.v1 import AppTest
        from chat.web.settings import start

        class Watched(list):
            def insert(self, index, entry):
                print("put in", entry)
                super().insert(index, entry)

            def remove(self, entry):
                print("taken out", entry)
                super().remove(entry)

        start(web_demo_vlm.settings)
        sys.path = Watched(sys.path)
        print(AppTest.from_file(str(web_demo_vlm.PAGE)).run(timeout=60).sidebar.selectbox[0].label)
    """
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", program, "--save_dir", tmp_path / "out"], cwd=REPOSITORY, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert done.stdout.splitlines() == ["Language"], done.stdout + done.stderr


@pytest.fixture(scope="module")
def page_of(trained, tmp_path_factory, browser):
    """The address of a page that serves the small model."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve("--save_dir", trained / "out", "--image_dir", trained / "pictures", "--device", "cpu", log=log) as (url, _):
        yield url
    assert "Traceback" not in log.read_text(), log.read_text()


def test_chat(page_of, browser, tmp_path):
    """From the first visit, while the model is still loading, to the conversation as a file."""
    with Guest(browser, page_of) as guest:
        guest.button("red.png").click()
        guest.until(lambda: guest.tray() == 1)
        guest.greedy()
        guest.ask("What colour?")
        assert guest.until_answered(1) == "red"
        guest.ask("Are you sure?")
        assert guest.until_answered(2) == "yes, red"
        guest.upload("b.png", picture_bytes("blue"))
        guest.ask("What shape?")
        guest.until_answered(3)
        guest.button("Edit").click()
        guest.page.get_by_role("textbox", name="Edit").fill("What colour?")
        guest.page.get_by_role("button", name="Ask", exact=True).click()
        guest.page.get_by_label("Chat message from user").nth(2).get_by_text("What colour?").wait_for()
        guest.until(lambda: guest.until_answered(3) == "blue")  # the buttons of the answer before stay for a moment
        guest.page.get_by_text("Where did it look?").last.click()
        guest.page.get_by_text("of its attention fell on the pictures").wait_for()
        guest.until(lambda: guest.page.get_by_role("img", name="Where did it look?").count() == 2)
        with guest.page.expect_download() as download:
            guest.button("Download").click()
        download.value.save_as(tmp_path / "c.md")
        text = (tmp_path / "c.md").read_text()
        assert text.count("**You:**") == 3 and "[red.png] What colour?" in text and "yes, red" in text
        guest.button("Clear").click()
        guest.until(lambda: guest.messages().count() == 0)
        assert not guest.strangers, "the page works offline"


def test_tokens_arrive_one_after_another_and_stop_stops(page_of, browser):
    with Guest(browser, page_of) as guest:
        guest.line.wait_for()
        guest.page.get_by_role("combobox", name="Model").click()
        guest.page.get_by_role("option", name="babbler_768").click()
        guest.page.get_by_role("slider", name="Longest answer").press("End")
        guest.page.get_by_role("slider", name="Temperature").press("End")
        guest.page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
            const texts = document.querySelectorAll('[data-testid=stChatMessage] [data-testid=stText]');
            const text = texts.length > 1 ? texts[texts.length - 1].innerText : '';
            if (text && text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}) }""")
        guest.ask("Go on.")
        guest.until(lambda: guest.page.evaluate("window.seen.length") >= 4)
        before = guest.answer().inner_text()
        guest.page.get_by_role("slider", name="Top-p").press("Home")
        guest.until(lambda: len(guest.answer().inner_text()) > len(before))  # a click elsewhere does not end the answer
        guest.button("Stop").click()
        guest.page.get_by_text("Stopped.").wait_for()
        seen = guest.page.evaluate("window.seen")
        assert len(seen) >= 4 and all(later.startswith(earlier.rstrip()) for earlier, later in itertools.pairwise(seen))
        kept = guest.answer().inner_text()
        guest.page.wait_for_timeout(500)
        assert guest.answer().inner_text() == kept
        guest.ask("Go on.")
        guest.page.get_by_label("Chat message from user").nth(1).wait_for()
        guest.button("Stop").click()  # before there is a word, perhaps
        guest.until(lambda: guest.page.get_by_text("Stopped.").count() == 2)


def test_visitors_have_conversations_of_their_own(page_of, browser):
    with Guest(browser, page_of) as first, Guest(browser, page_of) as second:
        for guest, colour in ((first, "green"), (second, "yellow")):
            guest.line.wait_for()
            guest.greedy()
            guest.upload(f"{colour}.png", picture_bytes(colour))
        first.ask("What colour?")
        second.ask("What colour?")
        assert first.until_answered(1) == "green" and second.until_answered(1) == "yellow"
        first.ask("Are you sure?")
        second.ask("Are you sure?")
        assert second.until_answered(2) == "yes, yellow" and first.until_answered(2) == "yes, green"
        first.page.reload()
        first.line.wait_for()
        first.until(lambda: first.messages().count() == 0)
        second.ask("Are you sure?")
        assert second.until_answered(3)


def test_failures_are_told_and_the_page_lives_on(page_of, browser, trained):
    """Weights that are none, files that are no pictures, pictures that are huge."""
    torn = trained / "out" / "torn_32.pth"
    torn.write_bytes(b"torn")
    with Guest(browser, page_of) as guest:
        for name, text in (("torn_32", "torn_32 cannot be loaded"), ("sft_vlm_32", "updates, ")):
            guest.page.get_by_role("combobox", name="Model").click()
            guest.page.get_by_role("option", name=name).click()
            guest.sees(text)
        guest.greedy()
        for name, data, message in [("broken.png", b"no picture", "cannot be read"),
                                    ("huge.png", picture_bytes("red", (8001, 8000)), "8001 x 8000 pixels")]:  # fmt: skip
            guest.drop(name, data)
            guest.page.get_by_text(message).wait_for()
        guest.page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(
            [{"name": f"bad{number}.png", "mimeType": "image/png", "buffer": b"no picture"} for number in range(25)]
        )
        guest.sees("and 22 more")
        assert guest.page.get_by_test_id("stAlert").count() == 3 and guest.line.is_visible()
        guest.upload("fifty.jpg", picture_bytes("white", (8660, 5780), "JPEG"))
        guest.ask("What colour?")
        assert guest.until_answered(1) == "white", "50 megapixels are taken, and the page lives on"
        guest.page.get_by_test_id("stChatInput").locator("input[type=file]").set_input_files(
            {"name": "broken.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"}
        )
        guest.page.get_by_test_id("stChatInput").get_by_text("broken.jpg").wait_for()
        guest.line.fill("What is it?")
        guest.page.get_by_test_id("stChatInputSubmitButton").click()  # which waits for the upload's end
        guest.page.get_by_text("'broken.jpg' cannot be read").wait_for()
        guest.until(lambda: guest.line.input_value() == "What is it?")
        assert guest.messages().count() == 2, "the question waits in its line for a better picture"


def test_a_question_asked_at_once_goes_with_all_of_its_pictures(page_of, browser):
    """Large ones, which the server is still looking at when the question comes."""
    with Guest(browser, page_of) as guest:
        uploads, sent = [], []
        guest.page.on("response", lambda response: uploads.append(response) if response.request.method == "PUT" else None)
        guest.page.on("websocket", lambda socket: socket.on("framesent", lambda frame: sent.append(frame)))
        guest.page.reload()
        guest.greedy()
        guest.page.wait_for_timeout(500)  # for the slider's own message
        before = len(sent)
        guest.page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(
            [{"name": f"{number}.png", "mimeType": "image/png", "buffer": picture_bytes("red", (4000, 3000))} for number in range(3)]
        )
        guest.until(lambda: len(uploads) == 3 and len(sent) > before)  # the server has been told of the files
        guest.page.wait_for_timeout(200)
        guest.ask("What colour?")
        guest.until_answered(1)
        assert guest.page.get_by_label("Chat message from user").get_by_role("img", name=".png").count() == 3 and not guest.tray()


WATCHED = """
import runpy, sys
from model.inference.assistant import Assistant
from chat.web import chat
from chat.web.engine import Engine

def watch(owner, name):
    plain = getattr(owner, name)
    def watched(*args, **options):
        print(name, file=sys.stderr, flush=True)
        return plain(*args, **options)
    setattr(owner, name, watched)

for owner, name in ((Assistant, "encode"), (Engine, "submit"), (chat, "toolbar")):
    watch(owner, name)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_page_looks_at_pictures_before_the_question_and_begins_to_answer_before_it_draws(trained, browser, tmp_path):
    log, port = tmp_path / "log", free_port()
    command = [sys.executable, "-c", WATCHED, REPOSITORY / "web_demo_vlm.py", "--port", port, "--save_dir", trained / "out", "--device", "cpu"]

    def done() -> list[str]:
        return [line for line in log.read_text().splitlines() if line in ("encode", "submit", "toolbar")]

    with serve(command=tuple(map(str, command)), port=port, log=log) as (url, _), Guest(browser, url) as guest:
        guest.greedy()
        guest.drop("red.png", picture_bytes("red"))
        guest.until(lambda: "encode" in done())
        before = len(done())
        guest.ask("What colour?")
        assert guest.until_answered(1) == "red"
        assert done()[before] == "submit" and "toolbar" in done()[before:] and done().count("encode") == 1


def test_training_page(page_of, browser, trained):
    """Two runs over each other, one of them still going on."""
    metrics = trained / "out" / "sft_vlm_32.metrics.jsonl"
    other = trained / "out" / "other_32.metrics.jsonl"
    shutil.copyfile(metrics, other)
    sidecar = json.loads(metrics.with_name("sft_vlm_32.json").read_text())
    sidecar["training"]["learning_rate"] = 0.123
    metrics.with_name("other_32.json").write_text(json.dumps(sidecar))
    try:
        with Guest(browser, page_of, "/training") as guest:
            for title in ("Training loss", "Learning rate", "Tokens per second", "Peak memory"):
                guest.sees(title)
            guest.until(lambda: guest.page.get_by_test_id("stVegaLiteChart").locator("canvas, svg").count() >= 4)
            guest.until(lambda: "0.123" in guest.page.get_by_test_id("stDataFrame").nth(1).text_content())
            assert "--epochs" not in guest.page.get_by_test_id("stDataFrame").nth(1).text_content()
            line = json.loads(metrics.read_text().splitlines()[-1])
            line |= {"update": 77_777, "eval_loss": 0.5, "aux_loss": 0.25, "samples": [{"question": "What colour?", "answer": "mauve"}]}
            with open(other, "a") as file:
                file.write(json.dumps(line) + "\n")
            guest.until(lambda: "77,777" in guest.page.get_by_test_id("stDataFrame").first.text_content())
            guest.page.get_by_text("MoE auxiliary loss").wait_for()
            guest.until(lambda: "mauve" in guest.page.get_by_test_id("stDataFrame").nth(2).text_content())
            guest.page.get_by_role("radio", name="time").click()
            guest.until(lambda: guest.page.get_by_text("minutes").count() > 0)
            assert not guest.strangers
    finally:
        for path in trained.glob("out/other_32*"):
            path.unlink()


@pytest.mark.parametrize("width", [1280, 1024, 390])
def test_charts_are_read_to_their_edges(browser, tmp_path, width):
    """Figures as people write them, and nothing cut off, with long names of runs as well."""
    for name in ("sft_vlm_512", "pretrain_vlm_768_moe_of_a_long_night"):
        lines = [{"update": 100 * step, "loss": 9.8 - step / 10, "eval_loss": 9.9 - step / 10, "learning_rate": 1e-6 * (1 - step / 100),
                  "tokens_per_second": 12_000 + 40 * step} for step in range(90)]  # fmt: skip
        (tmp_path / f"{name}.metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with serve("--save_dir", tmp_path) as (url, _), Guest(browser, url, "/training", viewport={"width": width, "height": 844}) as guest:
        charts = guest.page.get_by_test_id("stVegaLiteChart")
        guest.until(lambda: charts.locator("svg").count() == 3)

        def drawn() -> str:
            return charts.first.locator("svg").inner_html()

        figures = set(charts.locator(".role-axis-label text").all_text_contents())
        assert {"10", "1e-6", "12,000", "0"} <= figures and not {"1e+1", "0e+0"} & figures
        before = ""
        for control in ("", "Logarithmic loss", "Smoothing"):
            if control == "Smoothing":
                guest.page.get_by_role("slider", name=control).press("End")
            elif control:
                guest.page.get_by_text(control).click()
            guest.until(lambda before=before: drawn() != before)
            before = drawn()
            assert charts.first.locator(".role-legend-label text").all_text_contents()[-2:] == ["Training loss", "Validation loss"]
            cut = charts.evaluate_all("""charts => charts.flatMap(chart => {
                const box = chart.querySelector('svg').getBoundingClientRect()
                return [...chart.querySelectorAll('text')].filter(text => {
                    const own = text.getBoundingClientRect()
                    return own.left < box.left - 2 || own.right > box.right + 2 || own.bottom > box.bottom + 2
                }).map(text => text.textContent)
            })""")
            assert not cut


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_the_screen(page_of, browser, width, scheme):
    with Guest(browser, page_of, viewport={"width": width, "height": 844}, color_scheme=scheme, locale="zh-TW") as guest:
        guest.page.get_by_text("給模型看一張圖片").wait_for()
        guest.button("red.png").click()
        guest.until(lambda: guest.tray() == 1)
        guest.ask("What colour?")
        guest.button("重新產生").wait_for()
        for path in ("", "/training"):
            if path:
                guest.page.goto(page_of + path)
                guest.sees("訓練損失")
            wide = guest.page.evaluate("""() => [...document.querySelectorAll('[data-testid=stMain] *, [data-testid=stBottom] *')].filter(e => {
                const box = e.getBoundingClientRect();
                return box.width && (box.right > innerWidth + 1 || box.left < -1) && !e.closest('[data-testid=stDataFrame]') && !e.closest('[role=tooltip]')
            }).map(e => e.outerHTML.slice(0, 200))""")
            assert not wide, f"out of sight at {width} pixels: {wide[:3]}"


# Starting it


def test_both_commands_open_the_page_on_this_machine_alone(trained):
    port = free_port()
    flags = ["--save_dir", str(trained / "out"), "--device", "cpu"]
    streamlit = (sys.executable, "-m", "streamlit", "run", str(REPOSITORY / "web_demo_vlm.py"), "--server.port", str(port), "--", *flags)
    for command in (streamlit, ()):
        with serve(*flags, command=command, port=port):
            listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
            assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
        port = free_port()


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--save_dir", "/nowhere"], "no such folder"), (["--port", "99999"], "from 1 to 65535"), (["--max_seq_len", "9"], "no room")],
)
def test_bad_flags_end_with_code_2(flags, message):
    done = run_script("web_demo_vlm.py", *flags)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-m", "streamlit", "run", str(REPOSITORY / "web_demo_vlm.py"), "--", *flags],
                          text=True, capture_output=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
