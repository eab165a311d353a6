"""Evaluation: answers alone and in batches, chat with memory, scoring, and the script as a person uses it."""

import io
import json
import os
import re

import pytest
from PIL import Image

from chat.chat import Chat
from eval_vlm import main
from model import convert
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.errors import UsageError
from model.hub.modeling import MiniMindVForConditionalGeneration
from model.inference.assistant import Assistant
from model.inference.generation import Sampling
from model.load import find_weights
from model.pixels import preprocess
from model.weights import fingerprints, load_weights, save_weights
from tests.conftest import DECODER, REPOSITORY, make_model, make_vision_encoder, write_jsonl
from tests.test_video import make_video

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def assistant(tokenizer) -> Assistant:
    return Assistant(make_model(encoder=make_vision_encoder(), hidden_size=32, num_attention_heads=8), tokenizer)


def plain_image(colour: str) -> Image.Image:
    return Image.new("RGB", (40, 40), colour)


def test_batches_give_the_answers_of_one_by_one(assistant):
    red, blue = preprocess(plain_image("red")), preprocess(plain_image("blue"))
    questions = [
        ((Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat?"),), [red]),
        ((Turn("user", "Just text, and a little longer than the others are"),), []),
        ((Turn("user", f"{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER} and?"), Turn("assistant", "so"), Turn("user", f"{IMAGE_PLACEHOLDER}?")), [red, blue, red]),
    ]
    alone = [assistant.generate([turns], pixels, GREEDY)[0] for turns, pixels in questions]
    together = assistant.generate([turns for turns, _ in questions], [p for _, pixels in questions for p in pixels], GREEDY)
    assert together == alone and len(set(alone)) > 1


def test_sampling_is_repeatable_by_seed(assistant):
    turns = (Turn("user", "hello"),)
    first, again, other = (assistant.generate([turns], [], Sampling(12, 1.5, 1.0, seed=seed))[0] for seed in (1, 1, 2))
    assert first == again != other


def test_a_chat_remembers_and_forgets_whole_exchanges(assistant):
    chat = Chat(assistant, GREEDY, max_length=700)
    chat.add_image(plain_image("red"))
    chat.ask("What is it?")
    chat.ask("And its colour?")
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 2 and len(chat.pixels) == 1
    for _ in range(3):
        chat.add_image(plain_image("blue"))
        chat.ask("And this?")
    marks = sum(turn.content.count(IMAGE_PLACEHOLDER) for turn in chat.turns)
    assert marks == len(chat.pixels) == 3 and chat.turns[0].role == "user", "the oldest image went with its turn"
    chat.reset()
    assert not chat.turns and not chat.pixels
    with pytest.raises(UsageError, match="too long"):
        chat.ask("word " * 2000)
    assert not chat.turns


def test_a_typed_mark_is_text(assistant):
    chat = Chat(assistant, GREEDY)
    chat.ask("what does <image> mean?")
    assert not chat.pixels and chat.turns[0].content.count(IMAGE_PLACEHOLDER) == 0


def test_images_stand_where_the_question_says(assistant):
    chat = Chat(assistant, GREEDY)
    for label in ("", "0:03"):
        chat.add_image(plain_image("red"), label)
    chat.ask("first <image> second <image>?")
    assert chat.turns[0].content == f"first {IMAGE_PLACEHOLDER} second 0:03 {IMAGE_PLACEHOLDER}?" and len(chat.pixels) == 2
    assert chat.undo() and len(chat.waiting) == 2
    chat.ask("one <image> for two")
    assert chat.turns[0].content.startswith(f"{IMAGE_PLACEHOLDER}\n0:03 {IMAGE_PLACEHOLDER}\none <") and len(chat.pixels) == 2
    assert chat.turns[0].content.count(IMAGE_PLACEHOLDER) == 2, "the typed mark is text"
    assert chat.undo()
    chat.waiting.pop()
    chat.add_image(plain_image("blue"), "a <image> in a label")
    chat.ask("What?")
    assert chat.turns[0].content.count(IMAGE_PLACEHOLDER) == 2


def test_labels_stay_with_their_images(assistant):
    chat = Chat(assistant, GREEDY, max_length=1000)
    for number in range(6):
        chat.add_image(plain_image("red"), f"0:0{number}")
        chat.ask(f"number {number}")
    assert 0 < len(chat.pixels) < 6 and chat.dropped
    for number in range(5, 5 - len(chat.pixels), -1):
        assert chat.turns[-2].content == f"0:0{number} {IMAGE_PLACEHOLDER}\nnumber {number}"
        assert chat.undo()
    assert not chat.turns and not chat.pixels
    del chat.waiting[2:]
    chat.ask("again")
    assert re.fullmatch(rf"0:0\d {IMAGE_PLACEHOLDER}\n0:0\d {IMAGE_PLACEHOLDER}\nagain", chat.turns[0].content)


def test_as_many_images_as_fit(assistant):
    assert Chat(assistant, Sampling()).room() == 8
    chat = Chat(assistant, Sampling(max_new_tokens=512, temperature=0.0), max_length=1024)
    for _ in range(chat.room() + 3):
        chat.add_image(plain_image("red"), "0:03")
    with pytest.raises(UsageError, match=r"too long.* more than 896; 6 images in it: 4 would fit"):
        chat.ask("What?")
    assert not chat.turns and len(chat.waiting) == 6, "they wait on"
    del chat.waiting[4:]
    answer = chat.ask("What?")
    prompt = assistant.renderer.render_prompt(tuple(chat.turns[:1]))
    assert len(chat.pixels) == 4 and len(assistant.tokenizer(answer).input_ids) <= 1024 - len(prompt)


def test_streaming_never_shows_half_a_character(assistant):
    text = "一隻黑貓🙂 sits 在沙發上🙂"
    ids = assistant.tokenizer(text).input_ids
    for end in range(1, len(ids) + 1):
        shown = list(assistant.pieces(iter(ids[:end])))
        assert text.startswith("".join(shown)) and "".join(shown) == assistant.text(ids[:end])
        assert len(shown) >= end // 4
    broken = [ids[0], *assistant.tokenizer("🙂").input_ids[:-1], *ids[3:9]]  # half a character in the middle
    assert "".join(assistant.pieces(broken)) == assistant.text(broken)


@pytest.fixture(scope="module")
def files(tmp_path_factory, encoder_folder, tokenizer):
    """Weights and a vision encoder on disk, images, and the flags that name them."""
    folder = tmp_path_factory.mktemp("eval")
    encoder = make_vision_encoder()
    model = make_model(encoder=encoder, kind=MiniMindVForConditionalGeneration, hidden_size=32, num_attention_heads=8)
    save_weights(folder / "sft_vlm_32.pth", model, {"fingerprints": fingerprints(model, tokenizer)})
    model.save_pretrained(folder / "hf")
    (folder / "images").mkdir()
    for colour in ("red", "blue"):
        plain_image(colour).save(folder / "images" / f"{colour}.png")
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    flags = [*DECODER, "--save_dir", folder, "--vision_model_path", encoder_folder, "--device", "cpu", "--max_new_tokens", "5",
             "--image_dir", folder / "images"]  # fmt: skip
    return folder, [str(flag) for flag in flags]


def test_without_a_terminal_the_folder_is_described(files, capsys, monkeypatch):
    folder, flags = files
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.chdir(folder)
    (folder / "images" / "._red.png").write_bytes(b"a companion")
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Describe the image.\n") and "._red" not in shown
    assert all(f"[{name}.png]" in shown for name in ("red", "blue", "broken")) and "cannot be read" in shown


def test_the_question_of_folder_mode_can_be_chosen(files, assistant, capsys):
    assert main([*files[1], "--temperature", "0", "--prompt", "What colour?"]) == 0
    shown = capsys.readouterr().out
    answer = assistant.generate([(Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat colour?"),)], [preprocess(plain_image("blue"))], Sampling(5, 0.0))[0]
    assert shown.startswith("What colour?\n") and f"[blue.png] {answer}\n" in shown


@pytest.fixture
def trained(tmp_path, tokenizer, monkeypatch):
    """Folders of weights, a repository with the vision encoder they were trained with, and what is said of it in sidecars."""
    repository = tmp_path / "repository"
    make_vision_encoder().save_pretrained(repository / "model" / "vision_model" / "mine")
    tokenizer.save_pretrained(repository / "model")
    monkeypatch.setattr("model.weights.OWN_TOKENIZER", repository / "model")
    monkeypatch.setattr("model.weights.REPOSITORY", repository)
    monkeypatch.setattr("model.weights.CLIP_FOLDER", repository / "model" / "vision_model" / "clip")
    plain_image("red").save(tmp_path / "a.png")

    def save(name: str, **training) -> None:
        model = make_model(encoder=make_vision_encoder(), hidden_size=32, num_attention_heads=8, use_moe=name.endswith("moe"))
        save_weights(tmp_path / "out" / f"{name}.pth", model, {"fingerprints": fingerprints(model, tokenizer), "training": training})

    return tmp_path, save


@pytest.mark.parametrize(
    "recorded",
    ["{repository}/model/vision_model/mine", "/gone/minimind-v/model/vision_model/mine", r"C:\Users\me\minimind-v\model\vision_model\mine"],
)
def test_weights_alone_are_enough(trained, recorded, capsys):
    """Their size is found by their name, vision encoder and tokenizer by their sidecar, also in a repository that moved."""
    folder, save = trained
    encoder = recorded.format(repository=folder / "repository")
    save("mine_32", vision_model_path=encoder, tokenizer_path="/gone/model")
    flags = ["--save_dir", str(folder / "out"), "--weight", "mine", "--image_dir", str(folder), "--device", "cpu", "--max_new_tokens", "2"]
    assert main(flags) == 0 and "[a.png]" in capsys.readouterr().out
    assert main([*flags, "--hidden_size", "32", "--use_moe", "0"]) == 0
    assert convert.main([str(folder / "out" / "mine_32.pth"), str(folder / "hf"), "--vision_model_path", "none"]) == 0
    assert main([*flags, "--load_from", str(folder / "hf")]) == 0, "its sidecar.json tells as much"
    assert convert.main([str(folder / "out" / "mine_32.pth"), str(folder / "whole")]) == 0
    assert (folder / "whole" / "vision_model" / "config.json").is_file()


@pytest.mark.parametrize("training", [{"vision_model_path": ["a"]}, {"vision_model_path": ""}, {"vision_model_path": "a\0b"}, {"vision_model_path": "a" * 5000}])
def test_what_a_sidecar_names_but_cannot_be_found_is_asked_for(trained, training, capsys):
    folder, save = trained
    save("mine_32", **training)
    flags = ["--save_dir", str(folder / "out"), "--weight", "mine", "--image_dir", str(folder), "--device", "cpu", "--max_new_tokens", "2"]
    assert main(flags) == 2
    assert "no vision encoder at" in (shown := capsys.readouterr().err) and "tiny-clip" in shown
    make_vision_encoder().save_pretrained(folder / "repository" / "model" / "vision_model" / "clip")
    assert main(flags) == 0, "of CLIP's usual place"


def test_of_several_weights_the_one_of_the_published_size_is_meant(tmp_path):
    for name in ("a_64", "a_256", "a_256_moe", "b_64", "a_best_512", "llm_512", "._a_512", ".a_512"):
        (tmp_path / f"{name}.pth").touch()
    (tmp_path / "b_512.pth").mkdir()

    def found(*wanted):
        return find_weights(tmp_path, *wanted).name

    assert found("b", None, None) == "b_64.pth" and found("a", 64, None) == "a_64.pth" and found("a", 256, None) == "a_256.pth"
    assert found("a", None, 1) == "a_256_moe.pth" and found("a", 256, 1) == "a_256_moe.pth" and found("a_best", None, None) == "a_best_512.pth"
    assert found("b", 512, None) == "b_512.pth" and found("c", None, None) == "c_512.pth" and found("c", 64, 1) == "c_64_moe.pth"
    with pytest.raises(UsageError, match=r"several in .*: a_256\.pth, a_256_moe\.pth, a_64\.pth; .*--hidden_size") as caught:
        found("a", None, None)
    assert "b_64" not in str(caught.value)
    (tmp_path / "a_512.pth").touch()
    assert found("a", None, None) == "a_512.pth", "as commands without a size have always meant"
    with pytest.raises(UsageError, match=r"(?s)no weights at .*c_512\.pth.*a_64\.pth.*hf download") as caught:
        load_weights(tmp_path / "c_512.pth", make_model())
    assert "._a" not in str(caught.value)


def test_a_transformers_folder_is_read_as_well(files, capsys):
    folder, flags = files
    assert main([*flags, "--load_from", str(folder / "hf"), "--tokenizer_path", str(REPOSITORY / "model")]) == 0
    shown = capsys.readouterr().out
    assert all(f"[{name}.png]" in shown for name in ("red", "blue", "broken"))


def test_scoring_from_the_command_line(files, assistant, capsys):
    folder, flags = files
    right = assistant.generate([(Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat?"),)], [preprocess(plain_image("red"))], Sampling(5, 0.0))[0]
    rows = [
        {"conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": right}], "image": "red.png", "kind": "a"},
        {"conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "surely not"}], "image": "blue.png", "kind": "a"},
        {"conversations": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "7"}]},
    ]  # fmt: skip
    test = write_jsonl(folder / "test.jsonl", rows)
    assert main([*flags, "--score", str(test), "--predictions", str(folder / "p.jsonl"), "--batch_size", "3",
                 "--report", str(folder / "r.json"), "--metrics", "exact, chrf", "--blind"]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert re.search(r"kind +questions +exact +chrf\n", shown), shown
    assert re.search(r"a +2  0\.5000 \[0\.0000, 1\.0000\]", shown) and re.search(r"total +4  0\.2500 \[", shown), shown
    assert "bootstrap over 3 images or conversations, seed 0" in shown
    lines = [json.loads(line) for line in (folder / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["kind"] for line in lines] == ["a", "a", "yes/no", "number"]
    assert lines[0]["prediction"] == right and [line["correct"] for line in lines] == [True, False, False, False]
    report = json.loads((folder / "r.json").read_text(encoding="utf-8"))
    assert report["total"]["exact"]["value"] == 0.25 and report["kinds"]["number"]["exact"]["value"] == 0.0
    assert report["total"]["questions"] == 4 and report["total"]["chrf"]["value"] < 1
    assert ["blind" in line for line in lines] == [True, True, False, False] and report["blind"]["chrf"]["kinds"]["a"]["questions"] == 2
    assert len(re.findall(r"(?m)^without seeing: 0\.\d\d of (?:exact|chrf); images are worth", shown)) == 2, shown
    assert main(["--compare", str(folder / "p.jsonl"), str(folder / "p.jsonl")]) == 0, "without any weights"
    assert re.search(r"total +4  0\.2500 .* 0\.0000 \[0\.0000, 0\.0000\]\n", capsys.readouterr().out)


def test_a_video_is_described(files, capsys):
    folder, flags = files
    video = make_video(folder / "v.mp4", [0, 1, 2])
    assert main([*flags, "--temperature", "0", "--video", str(video), "--video_frames", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"2 frames, at 0:00.0, 0:00.2, for the next question: {video}\n" in shown and shown.splitlines()[-1]


def test_questions_from_a_pipe(files, capsys, monkeypatch):
    """A chat without a terminal: answers, and nothing to be typed over."""
    folder, flags = files
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {folder}/images/red.png\nWhat?\n/undo\n/undo\n/dance\n/exit now\n/help\n"))
    assert main([*flags, "--mode", "chat", "--temperature", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("image 1") and lines[-1].startswith("no such command: /dance")
    assert [line.partition(":")[0] for line in lines[-3:-1]] == ["taken back", "taken back"]


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--weight", "other"], "no weights at"), (["--vision_model_path", "/nowhere"], "hf download openai"),
     (["--hidden_size", "64"], "no weights at"), (["--load_from", "/nowhere"], "has no config.json"),
     (["--load_from", __file__], "is a file, and a folder"), (["--load_from", "{save_dir}"], "native weights (sft_vlm_32.pth"), (["--prompt", "Hm?", "--mode", "chat"], "--prompt goes with folder mode"),
     (["--score", "/nowhere.jsonl"], "no data at /nowhere.jsonl. Fetch"), (["--image_dir", "/nowhere"], "no images there"),
     (["--top_p", "3"], "--top_p lies in (0, 1], not 3.0"), (["--temperature", "nan"], "--temperature is at least 0, not nan"),
     (["--seed", "-1"], "--seed lies in"), (["--video_frames", "0"], "--video_frames are at least 1"),
     (["--device", "foo"], "--device foo"), (["--device", "cuda:77"], "--device cuda:77"),
     (["--blind"], "--blind goes with --score"), (["--score", "x", "--compare", "a", "b"], "--compare without"),
     (["--compare", "/nowhere.jsonl", "/nowhere.jsonl"], "--compare /nowhere.jsonl: No such file"),
     (["--tokenizer_path", "/nowhere"], "no tokenizer.json"), (["--video", "/nowhere.mp4"], "No such file"),
     (["--video", __file__], "cannot be read")],
)  # fmt: skip
def test_mistakes_end_with_code_2_and_no_traceback(files, capsys, change, message):
    try:
        code = main([*files[1], *(word.format(save_dir=files[0]) for word in change)])
    except SystemExit as error:  # argparse's
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [("--predictions", "file/p.jsonl", "no file can be written there"), ("--predictions", "", "a folder"),
     ("--predictions", "pipe", "a folder"), ("--report", "", "a folder"),
     ("--report", "pipe", "a folder"), ("--report", "link", "a link"), ("--report", "file/r.json", "no file can be written there")],
)  # fmt: skip
def test_files_of_scoring_are_looked_at_before_the_first_answer(files, capsys, tmp_path, monkeypatch, flag, name, message):
    _, flags = files
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")  # as /dev/null it must not be replaced by a file, nor /dev/stdout
    (tmp_path / "link").symlink_to(tmp_path / "file")
    test = write_jsonl(tmp_path / "test.jsonl", [talk("Hm?", "yes")])
    monkeypatch.setattr("chat.scoring.answer_in_batches", None)
    assert main([*flags, "--score", str(test), "--predictions", str(tmp_path / "p.jsonl"), flag, str(tmp_path / name)]) == 2
    assert f"error: {flag} {tmp_path / name}" in (shown := capsys.readouterr().err) and message in shown


def talk(question: str, answer: str) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_another_encoder_is_refused(files, tmp_path, capsys):
    make_vision_encoder(seed=9).save_pretrained(tmp_path)
    assert main([*files[1], "--vision_model_path", str(tmp_path)]) == 2 and "another vision encoder" in capsys.readouterr().err
