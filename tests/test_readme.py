"""The READMEs keep their promises: flags, files and commands they name exist, and the two languages are in step."""

import dataclasses
import functools
import re
import shlex

import pytest
import torch

from model import convert
from model.vision import load_vision_encoder
from model.weights import fingerprints, save_weights
from tests.conftest import REPOSITORY, make_model, run_script
from trainer.config import TrainConfig

READMES = ["README.md", "README_zh.md"]


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@functools.cache
def help_of(script: str) -> str:
    """What --help prints."""
    done = run_script(script, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", READMES)
def test_every_training_flag_is_in_the_table(name):
    table = set(re.findall(r"--(\w+)", "".join(re.findall(r"(?m)^\|.*$", read(name)))))
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= table


@pytest.mark.parametrize("name", READMES)
def test_commands_name_scripts_and_flags_that_exist(name):
    commands = re.findall(r"(?m)^(?:torchrun .*?)?(?:python )?(\w+\.py)((?: .*(?:\\\n.*)?)?)$", "\n".join(re.findall(r"(?s)```bash\n(.*?)```", read(name))))
    assert len(commands) >= 6
    for script, arguments in commands:
        for flag in re.findall(r"--\w+", arguments):
            assert flag in help_of(script), f"{script} {flag}"


def test_both_languages_show_the_same_commands_and_links():
    english, chinese = ([re.sub(r"\s*#.*", "", block) for block in re.findall(r"(?s)```\w*\n.*?```", read(name))] for name in READMES)
    assert english == chinese
    for name in READMES:
        for target in re.findall(r"\]\(([^)#]+)\)", read(name)):
            assert (REPOSITORY / target).exists(), target


def test_the_demos_weights_travel_by_the_commands_named(tmp_path, tokenizer, monkeypatch, capsys):
    tower = load_vision_encoder(REPOSITORY / "model" / "vision_model" / "tiny-clip")
    model = make_model(tower=tower, hidden_size=256, vision_hidden_size=tower.config.hidden_size)
    record = {"fingerprints": fingerprints(model, tokenizer), "training": {"vision_model_path": "model/vision_model/tiny-clip"}}
    save_weights(tmp_path / "out" / "sft_vlm_256.pth", model, record)
    (tmp_path / "model").symlink_to(REPOSITORY / "model")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"(?m)^python -m model\.convert (.*(?:out/sft_vlm_256|out/copy_256).*)$", read("README.md"))
    assert len(commands) == 2
    for command in commands:
        assert convert.main(shlex.split(command, comments=True)) == 0, capsys.readouterr().err
    first, second = (torch.load(tmp_path / "out" / f"{name}_256.pth", weights_only=True) for name in ("sft_vlm", "copy"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_everything_compiles():
    files = [file for folder in ("model", "dataset", "trainer") for file in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 50
    for file in files:
        compile(file.read_text(encoding="utf-8"), file, "exec")


def test_groups_on_one_machine_need_no_port():
    """Without --standalone, a second run on the machine would collide with the first."""
    files = [*(REPOSITORY / name for name in READMES), *REPOSITORY.glob("train_*.py")]
    lines = [line for file in files for line in re.findall(r"torchrun .*nproc_per_node.*", file.read_text(encoding="utf-8"))]
    assert len(lines) >= 8 and all("--standalone" in line or "--nnodes 2" in line for line in lines)
