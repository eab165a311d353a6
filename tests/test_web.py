"""The web page: its parts by themselves, and the whole of it in a browser, on a small model that was really trained."""

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
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from chat.web import images
from chat.web.attention import attention_html
from chat.web.charts import COLOURS as RUN_COLOURS
from chat.web.charts import give_colours, spans_decades
from chat.web.conversation import Conversation, explain, in_turn, model_thread
from chat.web.models import ModelChoice, find_models, load, training_questions
from chat.web.runs import curve, find_runs, read_run
from chat.web.settings import parse_flags
from chat.web.texts import TEXTS, Labels, escape, in_chinese, preferred
from chat.web.training_page import state_table
from model.errors import SampleError, UsageError
from model.inference.attention_map import AnswerAttention
from model.inference.generation import Sampling
from model.pixels import CLIP
from model.weights import fingerprints, save_weights
from tests.browser import CHROMIUM, User, chromium, free_port, serve
from tests.conftest import COLOURS, REPOSITORY, make_model, make_vision_encoder, write_jsonl
from tests.test_training import train


def image_bytes(colour: str, size: tuple[int, int] = (64, 64), form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, form, **options)
    return file.getvalue()


# Turns


def test_sessions_take_turns_in_the_order_in_which_they_ask():
    order, held, gate, threads = [], threading.Event(), threading.Event(), []
    holder = model_thread.submit(lambda: (held.set(), gate.wait(60)))  # keeps the model until the others wait
    held.wait(60)
    for number, name in enumerate("ab"):
        threads.append(threading.Thread(target=lambda name=name: [in_turn(order.append, name) for _ in range(3)]))
        threads[-1].start()
        while model_thread._work_queue.qsize() == number:
            time.sleep(0.01)
    gate.set()
    for waiting in (holder.result, *(thread.join for thread in threads)):
        waiting(60)
    assert sorted(order) == list("aaabbb") and order[:2] == ["a", "b"]


def test_a_failure_reaches_the_session_it_happened_to_and_no_other():
    with pytest.raises(ZeroDivisionError):
        in_turn(lambda: 1 / 0)
    assert in_turn(lambda: "fine") == "fine"


# Images


def test_images_lose_everything_but_their_pixels():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8825] = 6, "a secret place", {1: "N", 2: (22.0, 18.0, 0.0)}  # turned; where it was taken
    left_red = Image.new("RGB", (60, 40), "blue")
    left_red.paste("red", (0, 0, 30, 40))
    file = io.BytesIO()
    left_red.save(file, "JPEG", exif=exif, comment=b"a secret comment", quality=95)
    taken = images.take(file.getvalue(), "../../etc/passwd")
    preview = Image.open(io.BytesIO(taken.preview))
    assert b"secret" in file.getvalue() and b"secret" not in taken.preview and not preview.info and not preview.getexif()
    assert preview.size == (40, 60) and preview.getpixel((20, 5))[0] > 200, "upright: what was left is on top"
    assert taken.pixels(CLIP).shape == (3, 224, 224) and taken.thumbnail.startswith("data:image/png;base64,")


BAD_IMAGES = {
    "text": (b"no image", "cannot be read"), "empty": (b"", "cannot be read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PDF or PostScript document; save its pages as PNG"),
    "cut off": (image_bytes("red")[:60], "cannot be read"), "64 megapixels": (image_bytes("red", (8001, 8000)), "8001 x 8000 pixels"),
    "400 megapixels": (image_bytes("red", (20_000, 20_000)), "64,000,000 pixels; save it smaller"),
    "too long": (b"x" * (images.MAX_MEGABYTES * 2**20 + 1), "MB, more than"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_refused_with_a_remedy_in_both_languages(kind):
    data, message = BAD_IMAGES[kind]
    with pytest.raises(SampleError, match=message) as error:
        images.take(data, "p_1.png")
    chinese = Labels("zh").error(str(error.value))
    assert "p\\_1.png" in chinese and "發生錯誤" not in chinese and "cannot" not in chinese


@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_an_image_is_shown_as_the_model_sees_it(mode):
    if mode == "RGBA":
        image = Image.new("RGBA", (224, 224), (255, 0, 0, 128))
    else:
        image = Image.fromarray(np.tile(np.linspace(0, 65535, 224).astype(np.uint16), (224, 1)))
    file = io.BytesIO()
    image.save(file, "PNG")
    taken = images.take(file.getvalue(), "p")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(taken.preview))), taken.pixels(CLIP).permute(1, 2, 0).numpy())


def test_companions_are_no_examples(tmp_path):
    for name in ("a.png", "._a.png", ".b.png", "c.webp"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert [image.name for image in images.examples(tmp_path)] == ["a.png", "c.webp"]


# Models and runs


def choices_in(folder: Path) -> list[ModelChoice]:
    return find_models(parse_flags(["--save_dir", str(folder)]))


def test_models_are_found_named_ones_first_and_described(tmp_path):
    for name in ("sft_vlm_512", "pretrain_vlm_512", "sft_vlm_768_moe", "notes", "._sft_vlm_512", ".a_512"):
        (tmp_path / f"{name}.pth").write_bytes(b"")
    record = {"training": {"data_path": "/x/dataset/demo/captions.jsonl"}, "progress": {"update": 1234}}
    (tmp_path / "pretrain_vlm_512.json").write_text(json.dumps(record))
    for name, kind in (("mine", "minimind-v"), ("other", "llama"), (".mine.x", "minimind-v")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    choices = {choice.name: choice for choice in choices_in(tmp_path)}
    assert set(list(choices)[:2]) == {"sft_vlm_512", "sft_vlm_768_moe"} and set(list(choices)[2:]) == {"pretrain_vlm_512", "mine"}
    said = Labels("en").describe(choices["pretrain_vlm_512"])
    assert "pretrain\\_vlm\\_512" in said and "one coloured shape" in said and "1,234 updates" in said
    assert "no record" in Labels("en").describe(choices["sft_vlm_512"]) and "1,234" in Labels("zh").describe(choices["pretrain_vlm_512"])


ODD_RECORDS = [{"training": "x"}, {"training": {"data_path": ["/x"]}}, {"progress": 7}, {"progress": {"update": "abc"}}, [1]]


def test_odd_files_are_no_trouble(tmp_path):
    """Sidecars that hold anything, links to nothing, metrics files with damaged lines: the rest is shown."""
    for number, content in enumerate([*map(json.dumps, ODD_RECORDS), "[" * 100_000]):
        (tmp_path / f"odd{number}_512.pth").write_bytes(b"")
        (tmp_path / f"odd{number}_512.json").write_text(content)
    (tmp_path / "dangling_512.pth").symlink_to("nowhere")
    choices = choices_in(tmp_path)
    assert len(choices) == len(ODD_RECORDS) + 1 and all(Labels("zh").describe(choice) for choice in choices)
    lines = ['{"update": 1, "loss": "high"}', "nonsense", "[1]", '{"update": 2, "loss": 3.5, "seconds": NaN, "samples": [{"answer": "a"}]}']
    path = tmp_path / "odd.metrics.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines) + '{"update": 3, "lo')  # which is still being written
    run = read_run(path)
    assert run.bad == 2 and run.last("update") == 2 and run.last("loss") == 3.5 and [sample["update"] for sample in run.samples] == [2]
    assert list(curve(run, "loss", "update", 0.0)["y"]) == [3.5] and curve(run, "loss", "seconds", 0.0).empty


def test_questions_come_from_the_training_data(tmp_path):
    questions = ["<image>\nWhat shape?", "what colour?", "What colour?", "Is it red?", "x" * 99]
    rows = [{"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]} for question in questions]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert training_questions(f"{path},{tmp_path / 'b.jsonl'}:0.5") == ["What shape?", "what colour?", "Is it red?"]
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    assert training_questions(str(tmp_path / "bad.jsonl")) == training_questions("") == training_questions("/nowhere.jsonl") == []


def test_curves_are_smoothed_without_bias_and_thinned(tmp_path):
    path = tmp_path / "sft_vlm_32.metrics.jsonl"
    path.write_text("".join(f'{{"update": {number}, "loss": {2.0 + number % 2}, "seconds": {61 * number}}}\n' for number in range(10_001)))
    run = read_run(path)
    thinned = curve(run, "loss", "update", 0.5)
    assert len(thinned) <= 1500 and thinned["x"].iloc[-1] == 10_000
    path.write_text('{"update": 1, "loss": 1}\n{"update": 2, "loss": 3}\n')
    assert list(curve(read_run(path), "loss", "update", 0.5)["y"]) == pytest.approx([1.0, 3.5 / 1.5])
    (_, changed), = find_runs(tmp_path).values()
    assert changed and run.is_live and state_table({"a": run}, Labels("en"))["Update"].tolist() == ["10,000"]


def test_colours_are_distinct_and_stay_with_a_run():
    known: dict[str, str] = {}
    give_colours(known, ["a", "b"])
    before = dict(known)
    give_colours(known, ["c", "b"])
    assert before.items() <= known.items() and known["c"] != known["b"]
    many = [str(number) for number in range(len(RUN_COLOURS))]
    give_colours(known, many)
    assert len({known[name] for name in many}) == len(many)
    assert spans_decades(pd.Series([8.7, 0.2])) and not spans_decades(pd.Series([3.0, 2.0])) and not spans_decades(pd.Series([]))


# Labels


def test_labels_are_whole_in_both_languages():
    source = "".join(path.read_text() for path in (REPOSITORY / "chat" / "web").glob("*.py"))
    places, composed = re.compile(r"{(\w+)"), ("_help", *("temperature", "top_", "max_new"))
    for key, (english, chinese) in TEXTS.items():
        assert re.search(rf"['\"]{key}['\"]", source) or any(part in key for part in composed), f"{key} is not used"
        assert set(places.findall(english)) == set(places.findall(chinese)), key
    assert set(re.findall(r"labels\(['\"](\w+)['\"]", source)) <= set(TEXTS)
    assert Labels("zh")("stop") == "停止" and preferred("zh-TW") == "zh" and preferred("de") == preferred(None) == "en"


def test_a_failure_of_the_program_is_told_and_logged(capsys):
    assert "ValueError: odd. The server's log" in explain(ValueError("odd")) and "ValueError: odd" in capsys.readouterr().err
    assert "fewer images" in explain(MemoryError()) and in_chinese(explain(MemoryError())).startswith("記憶體不足")
    assert in_chinese("something new").startswith("發生錯誤") and "something new" in in_chinese("something new")


def test_text_stays_itself_in_markdown():
    assert escape("a *b* <c> [d](e)") == r"a \*b\* \<c\> \[d\](e)"


def test_every_token_has_a_veil_for_every_image():
    maps = torch.rand(3, 2, 14, 14)
    html = attention_html(AnswerAttention(["<b>", "", "\n"], torch.zeros(2, 3, 224, 224, dtype=torch.uint8), maps), Labels("en"))
    veils = re.findall(r'data-veils="([^"]*)"', html)
    assert len(veils) == 4 and all(len(urls.split()) == 2 for urls in veils) and "&lt;b&gt;" in html and "<b>" not in html.split("hint")[1]
    assert html.count('class="veil"') == 2 and f"{float(maps[0].sum()):.0%}" in html


# A small model, trained by the real script; one session's conversation with it


def conversation(turns: list[tuple[str, str]], image: str | None = None) -> dict:
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return {"conversations": messages, **({"image": image} if image else {})}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer) -> Path:
    """A folder with images/, encoder/ and out/: weights, sidecar and metrics of a model that knows six colours; and in out/
    a large one with random weights, whose answers take long."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "images").mkdir()
    rows = []
    for colour in COLOURS:
        Image.new("RGB", (64, 64), colour).save(folder / "images" / f"{colour}.png")
        for other in COLOURS:  # a second image, so that the newest counts
            turns = [("<image>\nWhat colour?", colour), ("Are you sure?", f"yes, {colour}"), ("<image>\nWhat colour?", other)]
            rows.append(conversation(turns, f"{colour}.png, {other}.png"))
    encoder = make_vision_encoder()
    encoder.save_pretrained(folder / "encoder")
    data = write_jsonl(folder / "data.jsonl", rows * 20), folder / "images"
    train(data, folder / "encoder", folder, learning_rate=4e-3, batch_size=8, max_seq_len=480, log_interval=10)
    babbler = make_model(0, encoder, hidden_size=768, num_hidden_layers=4, num_attention_heads=8)
    with torch.no_grad():  # it never ends by itself: special tokens are never among the likely ones
        babbler.model.embed_tokens.weight.mul_(4)[tokenizer.all_special_ids] = 0
    record = {"fingerprints": fingerprints(babbler, tokenizer), "training": {"vision_model_path": str(folder / "encoder")}}
    save_weights(folder / "out" / "babbler_768.pth", babbler, record)
    return folder


@pytest.fixture
def new_session(trained):
    """Makes conversations with the small model."""
    settings = parse_flags(["--save_dir", str(trained / "out"), "--device", "cpu"])
    choice = find_models(settings)[0]
    sampling = Sampling(max_new_tokens=40, temperature=0.0)

    def make(max_length: int = 2048) -> Conversation:
        return Conversation(max_length, assistant=load(choice, settings), model=choice, sampling=sampling)

    return make


def shown(*colours: str) -> list[images.SessionImage]:
    return [images.take(image_bytes(colour), f"{colour}.png") for colour in colours]


def converse(session: Conversation, question: str | None = None, *colours: str) -> str:
    """The answer to a new question, or to the last one."""
    if question:
        session.ask(question, shown(*colours))
    while session.busy:
        session.step()
    return session.exchanges[-1].answer


def test_a_session_asks_repeats_edits_and_changes_the_model(new_session):
    session = new_session()
    assert converse(session, "What colour?", "blue") == "blue" and converse(session, "Are you sure?") == "yes, blue"
    session.again()
    assert converse(session) == "yes, blue" and len(session.exchanges) == 2
    session.again("What colour?")
    edited = converse(session)
    fresh = new_session()
    converse(fresh, "What colour?", "blue")
    assert edited and converse(fresh, "What colour?") == edited, "an edited question is answered as if the first had never been asked"
    load.clear()
    session.assistant = new_session().assistant
    assert session.assistant is not fresh.assistant
    assert converse(session, "Are you sure?") == converse(fresh, "Are you sure?"), "another model has the same history"
    session.clear()
    assert converse(session, "What colour?", "red") == "red"


def test_sessions_that_take_turns_answer_as_each_alone(new_session):
    sessions = [new_session() for _ in COLOURS]
    for session, colour in zip(sessions, COLOURS, strict=True):
        session.ask("What colour?", shown(colour))
    for question in ("What colour?", "Are you sure?"):
        for session in sessions if question != "What colour?" else ():
            session.ask(question, [])
        while any(session.busy for session in sessions):
            for session in sessions:
                session.step()
    assert [[exchange.answer for exchange in session.exchanges] for session in sessions] == [[colour, f"yes, {colour}"] for colour in COLOURS]


def test_an_answer_can_be_stopped_at_any_time(new_session):
    session = new_session()
    session.ask("What colour?", shown("red"))
    session.stop()
    assert session.exchanges[0].stopped and not session.busy, "before it began"
    session.ask("Are you sure?", shown("green"))
    session.step()
    session.step()
    session.stop()
    said = session.exchanges[-1].answer
    session.step()
    assert said and session.exchanges[-1].answer == said and session.exchanges[-1].stopped
    session.again("What colour?")
    assert converse(session) == "green", "with the image of the question that it takes the place of"


def test_failures_are_told_and_leave_the_conversation_usable(new_session, monkeypatch):
    session = new_session(512)
    with monkeypatch.context() as patch:
        patch.setattr("chat.web.conversation.Chat", lambda *_: [][0])
        assert converse(session, "What colour?", "red") == "" and "IndexError" in session.exchanges[0].problem
    assert converse(session, "word " * 600, "red") == "" and "too long" in session.exchanges[1].problem
    assert "太長" in in_chinese(session.exchanges[1].problem)
    session.again("What colour?")
    assert converse(session) == "red", "the images of the failed question are asked about again"
    model = session.assistant.model
    model.vision_encoder, encoder = None, model.vision_encoder
    assert "cannot see" in (converse(session, "What colour?", "blue") or session.exchanges[-1].problem)
    model.vision_encoder = encoder
    assert converse(session, "What colour?", "blue") == "blue"


def test_an_image_is_encoded_once(new_session, monkeypatch):
    session = new_session()
    encode, encoded = session.assistant.encode, []
    monkeypatch.setattr(session.assistant, "encode", lambda pixels: [encoded.extend(pixels), encode(pixels)][1])
    assert converse(session, "What colour?", "red") == "red" and converse(session, "Are you sure?") == "yes, red"
    session.again()
    assert converse(session) == "yes, red" and len(encoded) == 1


@pytest.mark.parametrize(("content", "told"), [(b"corrupt", "權重檔無法讀取"), (None, "找不到視覺編碼器")])
def test_a_model_that_cannot_be_loaded_is_told_in_both_languages(trained, tmp_path, content, told):
    for suffix in (".pth", ".json"):
        shutil.copyfile(trained / "out" / f"sft_vlm_32{suffix}", tmp_path / f"sft_vlm_32{suffix}")
    if content:
        (tmp_path / "sft_vlm_32.pth").write_bytes(content)
    settings = parse_flags(["--save_dir", str(tmp_path), "--device", "cpu", *([] if content else ["--vision_model_path", "/nowhere"])])
    with pytest.raises(UsageError) as error:
        load(find_models(settings)[0], settings)
    assert told in in_chinese(explain(error.value))


# The page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here; .ci/run installs it")
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page_of(trained, tmp_path_factory, browser):
    """The address of a page that serves the small model."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve("--save_dir", trained / "out", "--image_dir", trained / "images", "--device", "cpu", log=log) as (url, _):
        assert listens_on_this_machine_alone(int(url.rpartition(":")[2]))
        yield url
    assert "Traceback" not in log.read_text(), log.read_text()


def listens_on_this_machine_alone(port: int) -> bool:
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    return [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_chat(page_of, browser):
    """From the first visit, while the model is being loaded, to where an answer looked, a file of it, and the camera."""
    with User(browser, page_of) as user:
        user.sees("trained on data.jsonl")
        user.greedy()
        user.button("red.png").click()
        user.until(lambda: user.tray() == 1)
        user.page.locator(".st-key-suggested_0 button").click()  # a question of the training data
        assert user.until_answered(1) == "red"
        user.ask("Are you sure?")
        assert user.until_answered(2) == "yes, red"
        user.ask("What shape?", ("b.png", image_bytes("blue")))
        user.until_answered(3)
        user.button("Edit").click()
        user.page.get_by_role("textbox", name="Edit").fill("What colour?")
        user.page.get_by_role("button", name="Ask", exact=True).click()
        user.page.get_by_label("Chat message from user").nth(2).get_by_text("What colour?").wait_for()
        user.until(lambda: user.until_answered(3) == "blue")  # the buttons of the answer before stay for a moment
        user.until(lambda: user.in_view(user.answer()))
        user.page.get_by_text("Where did it look?").last.click()
        user.page.locator(".looked").wait_for()
        user.until(lambda: user.in_view(user.page.locator(".looked .images")))
        veil = user.page.locator(".looked .veil").first
        mean = veil.get_attribute("src")
        user.page.locator(".looked .token").last.hover()
        user.until(lambda: veil.get_attribute("src") != mean)
        assert user.page.locator(".looked .seen").count() == 2 and "%" in user.page.locator(".looked .part").inner_text()
        with user.page.expect_download() as download:
            user.button("Download").click()
        text = Path(download.value.path()).read_text()
        assert text.startswith("> `red.png`\n") and text.endswith("\n\n> `b.png`\n> What colour?\n\nblue\n")
        user.button("Clear").click()
        user.until(lambda: user.messages().count() == 0)
        user.page.get_by_text("Camera").click()
        user.page.wait_for_function("[...document.querySelectorAll('video')].some(video => video.videoWidth > 0)")
        shot = user.page.get_by_role("button", name="Take Photo")

        def photographed() -> bool:  # a camera that has just begun may give no image: one presses again
            if user.tray() == 0 and shot.is_visible():
                shot.click()
                user.page.wait_for_timeout(2000)
            return user.tray() == 1

        user.until(photographed)
        assert not user.strangers, "the page works offline"


def test_tokens_arrive_one_after_another_and_stop_stops(page_of, browser):
    with User(browser, page_of) as user:
        user.line.wait_for()
        user.pick("Model", "babbler_768")
        user.page.get_by_role("slider", name="Longest answer").press("End")
        user.page.get_by_role("slider", name="Temperature").press("End")
        user.page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
            const texts = document.querySelectorAll('[data-testid=stChatMessage] [data-testid=stText]');
            const text = texts.length > 1 ? texts[texts.length - 1].innerText : '';
            if (text && text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}) }""")
        user.ask("Go on.")
        user.until(lambda: user.page.evaluate("window.seen.length") >= 4)
        before = user.answer().inner_text()
        user.page.get_by_role("slider", name="Top-p").press("Home")
        user.until(lambda: len(user.answer().inner_text()) > len(before))  # a click elsewhere does not end the answer
        user.button("Stop").click()
        user.page.get_by_text("Stopped.").wait_for()
        seen = user.page.evaluate("window.seen")
        assert len(seen) >= 4 and all(later.startswith(earlier.rstrip()) for earlier, later in itertools.pairwise(seen))
        kept = user.answer().inner_text()
        user.page.wait_for_timeout(500)
        assert user.answer().inner_text() == kept


def test_sessions_have_conversations_of_their_own(page_of, browser, trained):
    with User(browser, page_of) as first, User(browser, page_of) as second:
        for user in (first, second):
            user.line.wait_for()
            user.greedy()
        first.ask("What colour?", ("green.png", image_bytes("green")))
        second.ask("What colour?", ("yellow.png", image_bytes("yellow", (4000, 3000))))
        assert first.until_answered(1) == "green" and second.until_answered(1) == "yellow"
        first.ask("Are you sure?")
        second.ask("Are you sure?")
        assert second.until_answered(2) == "yes, yellow" and first.until_answered(2) == "yes, green"
        first.page.reload()
        first.until(lambda: first.line.count() and first.messages().count() == 0)
        os.utime(trained / "out" / "sft_vlm_32.pth")  # as if training had saved again
        second.ask("Are you sure?")
        assert second.until_answered(3)
        second.button("Take the newer weights").click()
        second.until(lambda: second.page.get_by_text("Take the newer weights").count() == 0)
        second.ask("Are you sure?")
        assert second.until_answered(4) == "yes, yellow"


def nothing_out_of_sight(user: User) -> None:
    wide = user.page.evaluate("""() => [...document.querySelectorAll('[data-testid=stMain] *, [data-testid=stBottom] *')].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width && (box.right > innerWidth + 1 || box.left < -1) && !e.closest('[data-testid=stDataFrame]') && !e.closest('[role=tooltip]')
    }).map(e => e.outerHTML.slice(0, 200))""")
    assert not wide, wide[:3]


def test_a_phone_in_chinese(page_of, browser, trained):
    """Files that are no images, one that is very tall, weights that are none: told in words, and the page lives on."""
    corrupt = trained / "out" / "corrupt_32.pth"
    corrupt.write_bytes(b"corrupt")
    try:
        with User(browser, page_of, viewport={"width": 390, "height": 844}, locale="zh-TW", color_scheme="dark") as user:
            user.sees("給模型看一張圖片")
            sidebar = user.page.get_by_test_id("stSidebar")
            for name, text in (("corrupt_32", "權重檔無法讀取"), ("sft_vlm_32", "次更新")):
                user.page.get_by_test_id("stExpandSidebarButton").click()
                user.pick("模型", name)
                user.until(lambda: sidebar.get_attribute("data-collapsed") == "true")  # it closes once a model is picked
                user.sees(text)
            user.ask("What colour?", ("notes.png", b"no image"), ("tall.png", image_bytes("white", (10, 3000))))
            user.sees("無法讀取圖片「notes.png」")
            user.until(lambda: user.line.input_value() == "What colour?")
            assert user.messages().count() == 0 and user.tray() == 1, "the question waits in its line, with the image that is good"
            user.ask("What colour?")
            user.until_answered(1, "重新產生")
            image = user.page.get_by_label("Chat message from user").get_by_role("img", name="tall.png")
            assert 100 < image.bounding_box()["height"] < 300
            user.page.get_by_text("它看了哪裡？").click()
            user.page.locator(".looked").wait_for()
            user.until(lambda: user.in_view(user.page.locator(".looked .images")))
            nothing_out_of_sight(user)
            user.page.goto(f"{page_of}/training")
            user.sees("訓練損失")
            nothing_out_of_sight(user)
    finally:
        corrupt.unlink()


def test_training_page(page_of, browser, trained):
    """Two runs over each other, one of them still going on."""
    metrics, other = trained / "out" / "sft_vlm_32.metrics.jsonl", trained / "out" / "other_32.metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_bytes().splitlines()]
    slower = "".join(json.dumps({**line, "learning_rate": line["learning_rate"] / 4000, "loss": 10 * line["loss"]}) + "\n" for line in lines)
    other.write_text(slower)
    sidecar = json.loads(metrics.with_name("sft_vlm_32.json").read_text())
    sidecar["training"]["learning_rate"] = 0.123
    metrics.with_name("other_32.json").write_text(json.dumps(sidecar))
    try:
        with User(browser, page_of, "/training") as user:
            charts, tables = user.page.get_by_test_id("stVegaLiteChart"), user.page.get_by_test_id("stDataFrame")
            user.until(lambda: charts.locator("svg").count() >= 4)
            user.until(lambda: "0.123" in tables.nth(1).text_content())
            assert "--epochs" not in tables.nth(1).text_content(), "only what differs"
            figures = set(charts.first.locator(".role-axis-label text").all_text_contents())
            assert {"0.1", "1", "10"} <= figures, "a loss that spans decades is drawn on a logarithmic axis"
            legend = user.page.locator(".legend")
            assert "sft_vlm_32" in legend.inner_text() and charts.locator(".role-legend").count() == 0
            colour = legend.get_by_text("sft_vlm_32").get_attribute("style")
            drawn = charts.first.locator("svg").inner_html()
            charts.first.hover()
            user.page.mouse.wheel(0, 400)
            user.until(lambda: charts.first.bounding_box()["y"] < 300)  # the page has scrolled
            assert charts.first.locator("svg").inner_html() == drawn, "and the chart is as it was"
            sample = {"question": "What colour?", "answer": "mauve", "reference": "red", "image": "red.png", "where": "x:1"}
            with open(other, "a") as file:
                file.write(json.dumps(lines[-1] | {"update": 77_777, "eval_loss": 0.5, "eval_loss_blank": 0.9, "aux_loss": 0.25, "samples": [sample]}) + "\n")
            user.until(lambda: "77,777" in tables.first.text_content())
            user.page.get_by_text("MoE auxiliary loss").wait_for()
            user.sees("with blank images")
            assert user.page.get_by_text("with others' images").count() == 0, "only what there is"
            user.sees("Update 77,777: mauve")
            user.page.get_by_role("img", name="red.png").wait_for()
            user.page.get_by_role("radio", name="time").click()
            user.until(lambda: user.page.get_by_text("minutes").count() > 0)
            assert legend.get_by_text("sft_vlm_32").get_attribute("style") == colour and not user.strangers
            nothing_out_of_sight(user)
    finally:
        for path in trained.glob("out/other_32*"):
            path.unlink()


# Starting it


def test_streamlit_run_opens_the_page_on_this_machine_alone(trained):
    port = free_port()
    flags = ["--save_dir", str(trained / "out"), "--device", "cpu"]
    command = (sys.executable, "-m", "streamlit", "run", str(REPOSITORY / "web_demo_vlm.py"), "--server.port", str(port), "--", *flags)
    with serve(command=command, port=port):
        assert listens_on_this_machine_alone(port)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--save_dir", "/nowhere"], "no such folder"), (["--port", "99999"], "from 1 to 65535"), (["--max_seq_len", "9"], "no room")],
)
def test_bad_flags_end_with_code_2(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_flags(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_both_commands_end_with_code_2_for_a_bad_flag():
    for command in ([], ["-m", "streamlit", "run"]):
        flags = [*(["--"] if command else []), "--save_dir", "/nowhere"]
        done = subprocess.run([sys.executable, *command, str(REPOSITORY / "web_demo_vlm.py"), *flags],
                              text=True, capture_output=True, timeout=120, check=False)  # fmt: skip
        assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr, done.stderr
