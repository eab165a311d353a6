"""Names on a hub, against a small hub of our own: the few routes that huggingface_hub asks for."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

from dataset.convert import main as convert_data
from model import convert
from model.hub_names import folder_of, is_hub_name
from model.weights import recorded
from tests.conftest import REPOSITORY, make_vision_encoder, run_script, training_flags, write_jsonl
from trainer.config import TrainConfig


class Hub(BaseHTTPRequestHandler):
    """Serves `root`/{models,datasets}/org/name/revision/files."""

    def __init__(self, root: Path, asked: list[str], *arguments):
        self.root, self.asked = root, asked
        super().__init__(*arguments)

    def log_message(self, *_) -> None:
        """Quiet."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_json(self, content) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(path)
        kind = "datasets" if "datasets" in path.split("/")[:2] else "models"
        parts = path.removeprefix("api/").removeprefix(f"{kind}/").split("/")
        repository, rest = self.root.joinpath(kind, *parts[:2]), parts[2:]
        if len(parts) < 2 or not repository.is_dir():
            return self.answer(401 if path.startswith("api/") else 404, X_Error_Code="RepoNotFound")
        word, rest = (rest or ["revision"])[0], rest[1:] or ["main"]
        names = [folder.relative_to(repository).as_posix() for folder in (*repository.iterdir(), *repository.glob("refs/pr/*"))]
        commits = {commit_of(repository / name): name for name in names}
        revision = next((name for name in (*names, *commits) if f"{'/'.join(rest)}/".startswith(f"{name}/")), None)
        if revision is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        folder = repository / commits.get(revision, revision)
        commit, files = commit_of(folder), sorted(file for file in folder.rglob("*") if file.is_file())
        if word == "revision":
            return self.answer_json({"id": "/".join(parts[:2]), "sha": commit, "siblings": []})
        if word == "tree":
            return self.answer_json([{"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size,
                                      "oid": digest(file.read_bytes())} for file in files])  # fmt: skip
        if repository.name == "gated":  # whose files can be listed, not read
            return self.answer(401, X_Error_Code="GatedRepo")
        file = folder / "/".join(rest).removeprefix(f"{revision}/")
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self.answer(200, file.read_bytes(), ETag=f'"{digest(file.read_bytes())}"', X_Repo_Commit=commit)

    do_HEAD = do_GET


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit_of(folder: Path) -> str:
    """40 digits that stand for a revision's content."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return digest("".join(f"{file} {digest(file.read_bytes())}" for file in files).encode())


@pytest.fixture(scope="module")
def hub(tmp_path_factory, data):
    """A hub with encoders, a tokenizer and data, and the address at which it can be reached."""
    root, asked = tmp_path_factory.mktemp("hub"), []
    models, talk = root / "models" / "org", root / "datasets" / "org" / "talk"
    for seed, place in enumerate(("clip/main", "clip/v2", "pickles/refs/pr/3", "gated/main")):
        make_vision_encoder(seed).save_pretrained(models / place)
    for name in ("clip", "pickles"):  # what must never be asked for
        (models / name / "main").mkdir(parents=True, exist_ok=True)
        (models / name / "main" / "config.json").write_bytes((models / "clip" / "v2" / "config.json").read_bytes())
        for file in ("pytorch_model.bin", "flax_model.msgpack", "modeling.py"):
            (models / name / "main" / file).write_text("no")
    (models / "words" / "main").mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "model" / file, models / "words" / "main")
    assert convert_data([str(data[0]), "--images_path", str(data[1]), "--out", str(talk / "main")]) == 0
    for number, place in enumerate(("small/text.jsonl", "small/more.jsonl", "small/deeper/text.jsonl")):
        (talk / place).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(talk / place, [{"conversations": [{"role": "user", "content": f"{number}{row}?"},
                                                      {"role": "assistant", "content": "Yes."}]} for row in range(3)])  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield SimpleNamespace(asked=asked, models=models, talk=talk, url=f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def ask(code: str, url: str, home: Path, cwd: Path, **environment: str) -> list:
    """What a program prints as json, each call in a line; its errors as text."""
    lines = ["import json", "from model.errors import DataError, UsageError", "def show(make, *arguments):",
             "    try: result = make(*arguments)", "    except (UsageError, DataError) as error: result = f'error: {error}'",
             "    print(json.dumps(result if isinstance(result, (int, list)) else str(result)))", code]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=cwd, text=True, capture_output=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_ENDPOINT": url, "HF_HOME": str(home), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('"', "[")) or line.isdigit()]


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory) -> SimpleNamespace:
    """A run of two processes whose parts all come from the hub."""
    out, home = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("home")
    data = "hf://datasets/org/talk/data.parquet:0.5,hf://datasets/org/talk@small/*.jsonl"
    flags = training_flags((data, "none"), "org/clip", out, eval_data_path="hf://datasets/org/talk@small/text.jsonl", num_workers=0)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    done = run_script("train_sft_vlm.py", *flags, "--tokenizer_path", "org/words", processes=2, cwd=out, **environment)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=out, home=home, flags=flags, text=done.stdout + done.stderr, offline={**environment, "HF_HUB_OFFLINE": "1"})


def test_training_takes_every_part_by_name(hub, trained):
    assert "data: 28 samples, 17 an epoch" in trained.text
    assert f"org/clip: from {hub.url}, commit {commit_of(hub.models / 'clip' / 'main')}" in trained.text
    record = json.loads((trained.out / "out" / "sft_vlm_32.json").read_text())["training"]
    assert (record["vision_model_path"], record["tokenizer_path"]) == ("org/clip", "org/words")
    assert record["data_path"].startswith("hf://datasets/org/talk/data.parquet:0.5,")
    assert not [path for path in hub.asked if path.endswith((".bin", ".msgpack", ".py")) or "deeper" in path]


def test_what_was_recorded_is_found_again_without_a_network(trained):
    resumed = run_script("train_sft_vlm.py", *trained.flags, "--from_resume", "1", "--epochs", "2", cwd=trained.out, **trained.offline)
    assert resumed.returncode == 0 and "tokenizer from org/words" in resumed.stderr, resumed.stderr
    assert json.loads((trained.out / "out" / "sft_vlm_32.json").read_text())["training"]["tokenizer_path"] == "org/words"


def test_a_whole_folder_by_name_gives_the_answers_of_its_weights(hub, trained):
    weights, whole = trained.out / "out" / "sft_vlm_32.pth", hub.models / "whole" / "main"
    parts = ["--vision_model_path", str(hub.models / "clip" / "main"), "--tokenizer_path", str(REPOSITORY / "model")]
    assert convert.main([str(weights), str(whole), *parts]) == 0
    answers = []
    for flags, offline in ((("--hidden_size", "32"), "1"), (("--load_from", "org/whole"), "0")):  # the first: by its record
        done = run_script("eval_vlm.py", "--save_dir", trained.out / "out", "--score", "hf://datasets/org/talk@small/text.jsonl", *flags,
                          "--device", "cpu", "--max_new_tokens", "4", "--predictions", trained.out / "answers.jsonl", cwd=trained.out,
                          **trained.offline | {"HF_HUB_OFFLINE": offline})  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers.append((trained.out / "answers.jsonl").read_text())
    assert answers[0] == answers[1] != ""
    code = ["from chat.web.models import find_models", "from chat.web.settings import parse_flags", "from model import convert",
            "flags = parse_flags(['--load_from', 'org/whole', '--tokenizer_path', 'org/words', '--save_dir', '.'])",
            "show(lambda: [choice.name for choice in find_models(flags)])",
            "from dataset.convert import main as convert_data",
            "show(convert_data, ['hf://datasets/org/talk@small/text.jsonl', '--out', 'shards'])",
            "show(lambda: convert.convert(convert.Path('org/whole'), convert.Path('copy_32.pth'), None, None))"]  # fmt: skip
    assert ask("\n".join(code), hub.url, trained.home, trained.out)[:2] == [["whole"], 0]
    assert (trained.out / "copy_32.pth").is_file()


CASES = {
    ("folder_of", "org/nobody"): "no file or folder of that name in {cwd}, and no repository could be fetched from {url}: there is no such",
    ("folder_of", "org/gated"): "access is granted to each user: ask for it",
    ("folder_of", "org/clip@v3"): "there is no such revision: check what follows the @",
    ("folder_of", "org/pickles"): "org/pickles on {url} has no model.safetensors, and pickles are not fetched",
    ("load_tokenizer", "org/clip"): "no tokenizer.json in org/clip",
    ("open_samples", "hf://datasets/org/nobody/a.jsonl"): "hf://datasets/org/nobody/a.jsonl cannot be fetched from {url}: there is no such",
    ("open_samples", "hf://datasets/org/talk/a.jsonl:2"): "a.jsonl: the repository has no such file; its files: {url}/datasets/org/talk/",
    ("open_samples", "hf://datasets/org/talk"): "It names no file of a data set. Data are named hf://datasets/ORG/NAME/FILE",
    ("open_samples", "hf://talk"): "Data are named hf://datasets/ORG/NAME/FILE",
}  # fmt: skip
FOLDER_OF = "from model.hub_names import folder_of\n"
CODE = FOLDER_OF + "from model.weights import load_tokenizer\nfrom dataset.sources import open_samples\n"


def test_each_mistake_is_named_with_its_remedy(hub, tmp_path):
    answers = ask(CODE + "\n".join(f"show({make}, {name!r})" for make, name in CASES), hub.url, tmp_path / "home", tmp_path)
    for answer, text in zip(answers, CASES.values(), strict=True):
        assert answer.startswith("error: ") and text.format(cwd=tmp_path, url=hub.url) in answer, answer


def test_revisions_and_the_cache(hub, tmp_path):
    names = ("org/clip", "org/clip@v2", f"org/clip@{commit_of(hub.models / 'clip' / 'v2')}", "org/pickles@refs/pr/3")
    code = CODE + "".join(f"show(folder_of, {name!r})\n" for name in names)
    code += "show(lambda: len(open_samples('hf://datasets/org/talk@small/**/*.jsonl')))"
    *folders, samples = ask(code, hub.url, tmp_path / "home", tmp_path)
    places = ("clip/main", "clip/v2", "clip/v2", "pickles/refs/pr/3")
    for folder, place in zip(folders, places, strict=True):
        assert {path.name for path in Path(folder).iterdir()} == {"config.json", "model.safetensors"}
        assert (Path(folder) / "model.safetensors").read_bytes() == (hub.models / place / "model.safetensors").read_bytes()
    assert samples == 9
    for url, offline in ((hub.url, "1"), ("http://127.0.0.1:9", "0")):  # no network by choice, or by accident
        assert ask(code, url, tmp_path / "home", tmp_path, HF_HUB_OFFLINE=offline) == [*folders, samples]


def test_without_network_and_cache_one_error_says_all(encoder_folder, tmp_path, data):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    done = run_script("train_sft_vlm.py", *training_flags(data, "model/foo", tmp_path), cwd=tmp_path, **environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"model/foo: no file or folder of that name in {tmp_path}, and no repository could be fetched from http" in done.stderr
    assert "refused" in done.stderr and "HF_ENDPOINT" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes what is sent and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        limited = ask(FOLDER_OF + "show(folder_of, 'org/clip')", url, tmp_path / "home", tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert "timed out" in limited[0]
    assert "HF_HUB_OFFLINE" in ask(FOLDER_OF + "show(folder_of, 'org/clip')", url, tmp_path / "home", tmp_path, HF_HUB_OFFLINE="1")[0]


def test_what_lies_here_is_meant_first(tmp_path, monkeypatch, encoder_folder):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("org/clip") and is_hub_name(Path("org/clip@v2"))
    (tmp_path / "org" / "clip").mkdir(parents=True)
    (tmp_path / "org" / "weights.pth").write_text("")
    assert folder_of("org/clip") == Path("org/clip") and not is_hub_name("org/weights.pth")


@pytest.mark.parametrize("name", ["clip", "/org/clip", "./org/clip", "../clip", "org/clip/", "a/b/c", "~/clip", "org/-clip", "org/a..b",
                                  "org/a--b", "org\\clip", "C:/clip", "", "org/", "org/clip@", "org /clip", "org/clip.", "org/clip.git",
                                  "hf://org/clip", f"org/{'a' * 97}"])  # fmt: skip
def test_other_names_are_folders(name):
    assert not is_hub_name(name) and folder_of(name) == Path(name)


def test_a_recorded_name_has_precedence_over_the_default(encoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {"training": {"vision_model_path": "org/clip"}}
    assert recorded(record, "vision_model_path", "config.json", encoder_folder) == "org/clip"
    assert recorded({"training": {"vision_model_path": "/gone/clip"}}, "vision_model_path", "config.json", encoder_folder) == encoder_folder


def test_the_feature_cache_of_fetched_data_has_one_place(tmp_path, monkeypatch):
    config = TrainConfig(data_path="hf://datasets/org/talk/data.parquet", images_path=str(tmp_path), checkpoint_dir=str(tmp_path))
    before = config.features_folder
    monkeypatch.chdir(tmp_path)
    assert config.features_folder == before
