"""READMEs and docs keep their promises: commands, flags, files and links they name exist, what they tell a reader to run
runs, the reading path is as short as they say, and the two languages are in step."""

import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import convert
from model.model_vlm import MiniMindVLM, VLMConfig
from model.weights import fingerprints, load_vision_encoder, save_weights
from tests.conftest import REPOSITORY
from tests.test_reading_path import READING_PATH

READMES = ["README.md", "README_zh.md"]
TUTORIALS = ["docs/how-it-works.md", "docs/how-it-works_zh.md"]
TEXTS = [*READMES, *sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").glob("*.md"))]
PROGRAM = re.compile(r"^(?:torchrun .*?|srun torchrun .*?|nice )?(?:python )?(-m [\w.]+|[\w/]+\.py)(?=\s|$)(.*)$")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a text in one language."""
    return re.findall(rf"(?s)```{language}\n(.*?)```", read(name))


def commands(text: str) -> list[tuple[str, str]]:
    """(program, arguments) of every line of shell that starts one of the project's programs; long lines are joined."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [PROGRAM.match(line.strip()) for line in lines]
    ours = [match.groups() for match in found if match and "torch.distributed" not in match[1]]
    return [(program, arguments.split("  #")[0]) for program, arguments in ours]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def run(program: str, *arguments, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """One of the project's programs, as a reader would start it."""
    start = program.split() if program.startswith("-m") else [str(REPOSITORY / program)]
    return subprocess.run([sys.executable, *start, *map(str, arguments)], cwd=cwd, text=True, capture_output=True, timeout=300,
                          check=False, env=environment())  # fmt: skip


def printed_by(program: str, *arguments: str) -> str:
    """What one of the project's programs prints, run in this process: to load torch again for each would take minutes."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", [program, *arguments])
        if program.startswith("-m "):
            runpy.run_module(program.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(REPOSITORY / program), run_name="__main__")
    return out.getvalue()


help_of = functools.cache(lambda program: printed_by(program, "--help"))


@pytest.mark.parametrize("name", TEXTS)
def test_commands_name_programs_and_flags_that_exist(name):
    for program, arguments in commands("\n".join(blocks(name, "bash"))):
        file = program.removeprefix("-m ").replace(".", "/") if program.startswith("-m") else program
        paths = [REPOSITORY / file, REPOSITORY / f"{file}.py", REPOSITORY / file / "__main__.py"]
        assert any(path.is_file() for path in paths), program
        for flag in re.findall(r"(?<=\s)--\w+", arguments):
            assert re.search(rf"{flag}\b", help_of(program)), f"{program} {flag}"


@pytest.mark.parametrize("name", READMES)
def test_the_readme_shows_the_commands_of_every_script(name):
    used = {program for program, _ in commands("\n".join(blocks(name, "bash")))}
    assert used >= {"train_pretrain_vlm.py", "train_sft_vlm.py", "eval_vlm.py", "web_demo_vlm.py", "-m dataset.validate", "-m model.convert"}


def test_the_flags_page_is_what_the_command_prints():
    table = printed_by("-m docs.flags")
    assert table.startswith("| flag") and table.strip() in read("docs/flags.md")


def slugs(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?s)```.*?```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name):
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?s)```.*?```", "", read(name)))
    for link in links:
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (REPOSITORY / name).parent / file if file else REPOSITORY / name
        assert target.exists(), link
        assert not anchor or anchor in slugs(target.read_text(encoding="utf-8")), link
    assert links or name not in (*READMES, *TUTORIALS)


@pytest.mark.parametrize("name", TEXTS)
def test_no_figure_is_left_to_fill_in(name):
    assert "TODO" not in read(name)


@pytest.mark.parametrize("pair", [READMES, TUTORIALS], ids=["README", "how-it-works"])
def test_both_languages_show_the_same_commands_images_and_sections(pair):
    english, chinese = ([re.sub(r"[ \t]*#.*", "", block) for block in re.findall(r"(?s)```\w*\n.*?```", read(name))] for name in pair)
    assert english == chinese
    for pattern in (r"!\[[^]]*\]\(([^)]*)\)", r"(?m)^(#+) ", r"\((https?://[^)]*)\)", r"(?m)^\|[-|]+\|$"):
        first, second = (re.findall(pattern, read(name)) for name in pair)
        assert first == second, pattern
    first, second = (re.findall(r"(?m)^\|(?=.*\d)", read(name)) for name in pair)
    assert len(first) == len(second)  # rows with figures


@pytest.mark.parametrize("name", READMES)
def test_the_readme_is_short(name):
    assert len(read(name).splitlines()) <= 250


@pytest.mark.parametrize("name", READMES)
def test_the_readme_shows_the_reading_path(name):
    assert re.findall(r"(?m)^\| \[([\w/]+\.py)\]", read(name)) == READING_PATH


@pytest.fixture
def after_the_demo(tmp_path, tokenizer, monkeypatch) -> Path:
    """A folder in which things lie where they lie in the repository after `make demo`, the model untrained and the data small."""
    (tmp_path / "model").symlink_to(REPOSITORY / "model")
    encoder = load_vision_encoder(REPOSITORY / "model" / "vision_model" / "tiny-clip")
    for weight in ("llm", "pretrain_vlm", "sft_vlm", "short_vlm"):
        config = VLMConfig(hidden_size=256, num_hidden_layers=1, vision_hidden_size=encoder.config.hidden_size)
        model = MiniMindVLM(config, encoder)
        record = {"fingerprints": fingerprints(model, tokenizer), "training": {"vision_model_path": "model/vision_model/tiny-clip"}}
        save_weights(tmp_path / "out" / f"{weight}_256.pth", model, record)
    demo = tmp_path / "dataset" / "demo"
    (demo / "images" / "test").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(demo / "images" / "test" / "0.png")
    for file, count in (("test", 8), ("captions", 8), ("marks", 25)):
        turns = [{"role": "user", "content": "<image>\nwhat color is the shape?"}, {"role": "assistant", "content": "red"}]
        row = {"conversations": turns, "image": "test/0.png", "kind": "colour"}
        (demo / f"{file}.jsonl").write_text(count * (json.dumps(row) + "\n"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_training_on_ones_own_images_runs_as_written(after_the_demo, capsys):
    section = re.search(r"(?s)\n## Train on your own images\n(.*?)\n## ", read("README.md"))[1]
    drawing = re.search(r"(?s)```python\n(.*?)```", section)[1]
    exec(compile(re.sub(r'"red green .*"', '"red green blue yellow"', drawing), "README.md", "exec"), {})
    written = commands(re.findall(r"(?s)```bash\n(.*?)```", section)[0])
    assert [program for program, _ in written] == ["-m dataset.validate", "train_sft_vlm.py", "eval_vlm.py"]
    folders = ["--save_dir", after_the_demo / "out"]
    more = {"-m dataset.validate": [], "eval_vlm.py": [*folders, "--max_new_tokens", 2],
            "train_sft_vlm.py": [*folders, "--checkpoint_dir", after_the_demo / "checkpoints", "--num_hidden_layers", 1, "--epochs", 1]}  # fmt: skip
    for program, arguments in written:
        done = run(program, *shlex.split(arguments), *more[program], cwd=after_the_demo)
        assert done.returncode == 0, done.stderr
    assert (after_the_demo / "out" / "mine_best_256.pth").is_file()
    assert [len((after_the_demo / "my" / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "test")] == [20, 4]
    assert "exact" in done.stdout and len((after_the_demo / "out" / "mine_256_predictions.jsonl").read_text().splitlines()) == 4


def test_the_experiments_run_as_written(after_the_demo, capsys):
    scope: dict = {}
    for block in blocks("docs/how-it-works.md", "python"):
        if "get_peft_model" in block:
            continue  # tests/test_processing.py
        compiled = compile(block.replace("min(200,", "min(25," if "learn(" in block else "min(8,"), "how-it-works.md", "exec")
        exec(compiled, scope)
    printed = capsys.readouterr().out
    assert len(re.findall(r"(?m)^[\w' ]+ \{'all': \d", printed)) >= 6, printed
    assert re.search(r"mean mark of the last 25 questions 0\.", printed), printed
    assert scope["rows"] and (after_the_demo / "dataset" / "demo" / "pairs.jsonl").stat().st_size


def test_the_demos_weights_travel_by_the_commands_named(after_the_demo, capsys):
    written = [arguments for program, arguments in commands("\n".join(blocks("README.md", "bash"))) if program == "-m model.convert"]
    assert len(written) == 2
    for arguments in written:
        assert convert.main(shlex.split(arguments, comments=True)) == 0, capsys.readouterr().err
    first, second = (torch.load(after_the_demo / "out" / f"{name}_256.pth", weights_only=True) for name in ("sft_vlm", "copy"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_everything_compiles():
    files = [file for folder in ("model", "dataset", "trainer", "chat", "benchmarks", "docs") for file in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 50
    for file in files:
        compile(file.read_text(encoding="utf-8"), file, "exec")


def test_groups_on_one_machine_need_no_port():
    """Without --standalone, a second run on the machine would collide with the first."""
    files = [*(REPOSITORY / name for name in TEXTS), *REPOSITORY.glob("train_*.py")]
    lines = [line for file in files for line in re.findall(r"torchrun .*nproc_per_node.*", file.read_text(encoding="utf-8"))]
    assert len(lines) >= 7 and all("--standalone" in line or "--nnodes 2" in line for line in lines)
