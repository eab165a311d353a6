"""The READMEs keep their promises: flags, files and commands they name exist, and the two languages are in step."""

import compileall
import dataclasses
import functools
import re

import pytest

from tests.conftest import REPOSITORY, run_script
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


def test_everything_compiles():
    assert all(compileall.compile_dir(REPOSITORY / folder, quiet=1) for folder in ("model", "dataset", "trainer"))
