"""The repository as a text: how much of it training loads, how long the reading path is, and which room may know which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

READING_PATH = ["train_sft_vlm.py", "trainer/loop.py", "dataset/vlm_dataset.py", "model/conversation.py", "model/vision.py",
                "model/model_vlm.py", "model/model_minimind.py", "model/layers.py"]  # fmt: skip
# What each room may import from; the scripts at the top may import from all of these.
ROOMS = {"model": {"machine"}, "dataset": {"model", "machine"}, "trainer": {"dataset", "model", "machine"},
         "chat": {"dataset", "model", "machine"}, "machine": set()}  # fmt: skip
OUTER = {"benchmarks", "docs", "tests"}  # which nothing else imports
FILES = sorted(file for file in REPOSITORY.rglob("*.py") if not {".venv", "node_modules"} & set(file.parts))


def loaded_by(statement: str) -> list[Path]:
    """The repository's files that are loaded after a line of Python in a process of its own."""
    code = f"import sys\n{statement}\nprint(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    paths = {Path(line) for line in done.stdout.splitlines()}
    return sorted(path for path in paths if path.is_relative_to(REPOSITORY) and ".venv" not in path.parts)


def lines(files: list[Path]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def room(file: Path) -> str:
    """The room that a file lies in: a folder at the top, or the stem of a file there."""
    return file.relative_to(REPOSITORY).with_suffix("").parts[0]


def module(file: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> list[tuple[str, str | None]]:
    """(module, name) for every import of the repository's in a file, wherever it stands; None for a module itself."""
    package = module(file).split(".")[: None if file.name == "__init__.py" else -1]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found += [(".".join([*base, *filter(None, [node.module])]), alias.name) for alias in node.names]
    return [(source, name) for source, name in found if source.split(".")[0] in {room(other) for other in FILES}]


def test_training_loads_few_files():
    files = loaded_by("import train_sft_vlm")
    names = [str(file.relative_to(REPOSITORY)) for file in files]
    assert not [name for name in names if name.startswith(("chat", "model/inference", "model/hub", "benchmarks", "docs", "tests"))]
    assert len(files) <= 29 and lines(files) <= 4370, f"{len(files)} files, {lines(files)} lines: {names}"


def test_the_reading_path_is_short():
    files = [REPOSITORY / name for name in READING_PATH]
    assert len(files) <= 8 and lines(files) <= 1500, {file.name: lines([file]) for file in files}


def test_an_error_class_does_not_load_torch():
    assert not subprocess.run([sys.executable, "-c", "import sys, model.errors; sys.exit('torch' in sys.modules)"], cwd=REPOSITORY,
                              check=False).returncode  # fmt: skip


@pytest.mark.parametrize("file", [file for file in FILES if room(file) in ROOMS], ids=module)
def test_rooms_are_imported_in_one_direction(file):
    assert {source.split(".")[0] for source, _ in imports(file)} - {room(file)} <= ROOMS[room(file)]


def test_nothing_imports_what_only_looks_on():
    """Benchmarks, docs and tests may import everything; nobody imports them."""
    wrong = [(module(file), source) for file in FILES if room(file) not in OUTER
             for source, _ in imports(file) if source.split(".")[0] in OUTER]  # fmt: skip
    assert not wrong


def test_names_are_imported_from_where_they_are_defined():
    """`from X import n`: X defines n, or is a package of which n is a module."""
    defined = {}
    for file in FILES:
        names = defined.setdefault(module(file), set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    wrong = [f"{module(file)}: from {source} import {name}" for file in FILES if room(file) != "tests" for source, name in imports(file)
             if name and name not in defined.get(source, ()) and f"{source}.{name}" not in defined]  # fmt: skip
    assert not wrong
