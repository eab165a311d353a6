"""What tests share: tiny encoders, tiny data, and a way to run the scripts as a user does."""

import contextlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load as load_safetensors
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from model.conversation import Renderer
from model.model_vlm import MiniMindVLM, VLMConfig

REPOSITORY = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
DECODER = ["--hidden_size", "32", "--num_hidden_layers", "2"]

os.environ.setdefault("SWANLAB_MODE", "offline")
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def reference() -> dict:
    """The recorded figures of the original implementation, and the configurations behind them."""
    return load_reference("reference")


def load_reference(name: str) -> dict:
    """A file of recorded figures, with the texts of its header as json."""
    blob = lzma.decompress((FIXTURES / f"{name}.safetensors.xz").read_bytes())
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    tensors = {key: json.loads(text) for key, text in header.items()}
    for key, value in load_safetensors(blob).items():
        if key.endswith("#f32"):  # floats lie there as four planes of bytes, which pack better
            key = key.removesuffix("#f32")
            value = value.T.flatten().view(torch.float32).view(json.loads(header[key]))
        tensors[key] = value
    return tensors


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(REPOSITORY / "model")


@pytest.fixture(scope="session")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


def make_vision_encoder(seed: int = 0, width: int = 24) -> CLIPVisionModel:
    """A random encoder of the real geometry: 196 patches of 224 pixels."""
    torch.manual_seed(seed)
    return CLIPVisionModel(CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2, patch_size=16,
        image_size=224,
    )).eval()  # fmt: skip


def make_model(seed: int = 0, encoder: CLIPVisionModel | None = None, kind: type = MiniMindVLM, **config) -> MiniMindVLM:
    """A small VLM of that class with random weights; `config` overrides its sizes."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vision_hidden_size": 24} | config  # fmt: skip
    return kind(VLMConfig(**sizes), encoder)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory) -> Path:
    """An encoder saved as a user would have it."""
    folder = tmp_path_factory.mktemp("encoder")
    make_vision_encoder().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    """Rows as json lines; a str row is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def make_data(folder: Path, count: int, seed: int = 0) -> tuple[Path, Path]:
    """`count` samples with 0, 1 or 2 images each and answers of different lengths: a jsonl file and its folder."""
    rng, pictures = random.Random(seed), folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colours = [rng.choice(COLOURS) for _ in range(rng.choice((0, 1, 1, 2)))]
        for place, colour in enumerate(colours):
            picture = Image.new("RGB", (40, 30), "gray")
            ImageDraw.Draw(picture).rectangle((5, 5, 20 + number % 7, 22), fill=colour)
            picture.save(pictures / f"{number}_{place}.png")
        marks = "".join("<image>\n" for _ in colours)
        answer = " and ".join(colours) or "nothing" * rng.randint(1, 3)
        turns = [{"role": "user", "content": f"{marks}What is shown in {number}?"}, {"role": "assistant", "content": answer}]
        row = {"conversations": turns}
        if colours:
            row["image"] = ", ".join(f"{number}_{place}.png" for place in range(len(colours)))
        rows.append(row)
    return write_jsonl(folder / "data.jsonl", rows), pictures


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple[Path, Path]:
    return make_data(tmp_path_factory.mktemp("data"), 22)


def run_script(*arguments, processes: int = 0, cwd: Path | None = None, text_in: str = "", **environment) -> subprocess.CompletedProcess:
    """A script of the project in a process of its own, as users run it; under torchrun when `processes` is given."""
    script = str(REPOSITORY / arguments[0])
    command = [sys.executable, script]
    if processes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), script]
    return subprocess.run(
        [*command, *map(str, arguments[1:])], cwd=cwd, input=text_in, text=True, capture_output=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that still live, in the order of their numbers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            found += [int(path.parent.name)] if parent == pid else []
    return sorted(found)


def kill_tree(process: subprocess.Popen) -> None:
    """kill -9 for a process and all that descends from it: torchrun's workers are in sessions of their own."""
    found = [process.pid]
    for pid in found:  # grows while it is read
        found += children(pid)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def training_flags(data, encoder_folder, out: Path, **flags) -> list[str]:
    """Flags of a small, quick run that writes into `out`."""
    settings = {
        "data_path": data[0], "images_path": data[1], "vision_model_path": encoder_folder, "save_dir": out / "out",
        "checkpoint_dir": out / "checkpoints", "from_weight": "none", "batch_size": 2, "num_workers": 1,
        "dtype": "float32", "log_interval": 1, "epochs": 1, "learning_rate": 1e-3, "freeze_llm": 0, "device": "cpu",
    } | flags  # fmt: skip
    return [*DECODER, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def start_on_disk(data, encoder_folder, out, environment: dict | None = None, **flags) -> subprocess.Popen:
    """A run in a process of its own, on the disk of tests/slow_disk.py."""
    command = [sys.executable, str(REPOSITORY / "tests" / "slow_disk.py"), *training_flags(data, encoder_folder, out, **flags)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})})  # fmt: skip


def read_until(process: subprocess.Popen, text: str) -> None:
    """Reads the process's messages up to a line with `text`."""
    assert any(text in line for line in process.stderr), f"{text!r} never came"


def read_metrics(out: Path, name: str) -> list[dict]:
    """The lines of a run's metrics file."""
    return [json.loads(line) for line in (out / "out" / f"{name}.metrics.jsonl").read_bytes().splitlines()]
