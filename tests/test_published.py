"""Published weights: README's recipe as it stands, in a copy of the repository with files laid out as the downloads give them.

The weights are random and the stand-in for the published tokenizer is another one of 6,400 tokens, as the real one is.
"""

import io
import json
import random
import re
import shlex
import shutil
import subprocess

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch

from eval_vlm import main as eval_main
from model import convert, weights
from model.inference.assistant import load_assistant
from model.minimind3 import settings_for
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.recipes import train_tokenizer
from model.weights import half_weights, load_tokenizer, read_sidecar, tokenizer_fingerprint
from tests.conftest import REPOSITORY, make_model, make_vision_encoder
from tests.test_convert import publish
from tests.test_eval import plain_image
from tests.test_minimind3 import further_tokens, save_eye, standing_in
from tests.test_readme import commands, read, run


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder with another tokenizer of 6,400 tokens, of which "@" is number 34 as well."""
    folder, rng = tmp_path_factory.mktemp("published"), random.Random(0)
    words = ["".join(rng.choices("aeioubcdfghklmnprst", k=rng.randint(4, 9))) for _ in range(6000)]
    train_tokenizer.save(train_tokenizer.train(" ".join(rng.choices(words, k=40)) for _ in range(1000)), folder)
    return folder


@pytest.fixture(scope="session")
def clone(tmp_path_factory, published, tokenizer):
    """A copy of the repository after the downloads that README names; the decoders have the published width, but two layers."""
    folder = tmp_path_factory.mktemp("clone") / "minimind-v"
    for name in subprocess.run(["git", "ls-files", "*.py", "model", "dataset/eval_images"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    encoder = make_vision_encoder()
    encoder.save_pretrained(folder / "model" / "vision_model" / "clip-vit-base-patch16")
    sizes = {"hidden_size": 512, "num_hidden_layers": 2}
    (folder / "out").mkdir()
    torch.save(half_weights(MiniMindForCausalLM(MiniMindConfig(**sizes))), folder / "out" / "llm_512.pth")
    torch.save(half_weights(MiniMindVLM(VLMConfig(**sizes, vision_hidden_size=24))), folder / "out" / "sft_vlm_512.pth")
    shutil.copytree(published, folder / "model" / "published_tokenizer")
    wide = {**settings_for(768), "hidden_size": 768, "num_hidden_layers": 2}
    (folder / "out" / "minimind3").mkdir()
    standing_in(further_tokens(tokenizer)).save_pretrained(folder / "out" / "minimind3")
    wide["vocab_size"] = len(load_tokenizer(folder / "out" / "minimind3"))
    torch.save(half_weights(MiniMindForCausalLM(MiniMindConfig(**wide))), folder / "out" / "minimind3" / "llm_768.pth")
    save_eye(folder / "model" / "vision_model" / "siglip2", hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    seeing = MiniMindVLM(VLMConfig(**wide, image_tokens=64, vision_hidden_size=24))
    torch.save(half_weights(seeing), folder / "out" / "minimind3" / "sft_vlm_768.pth")
    plain_image("red").save(image := io.BytesIO(), "PNG")
    turns = [{"role": "user", "content": "What?\n<image>"}, {"role": "assistant", "content": "A red square."}]
    rows = {"conversations": [json.dumps(turns)] * 16, "image_bytes": [image.getvalue()] * 16}
    for stage in ("pretrain", "sft"):
        parquet.write_table(arrow.table(rows), folder / "dataset" / f"{stage}_i2t.parquet")
    return folder


def test_the_recipe_runs_as_written(clone, published):
    section = re.search(r"(?s)\n## The real thing.*?\n(.*?)\n## ", read("README.md"))[1]
    assert "--local-dir model/published_tokenizer" in section and "--tokenizer_path" not in section
    written = commands("\n".join(re.findall(r"(?s)```bash\n(.*?)```", section)))
    assert [program for program, _ in written] == ["eval_vlm.py", "train_pretrain_vlm.py", "train_sft_vlm.py"] + ["eval_vlm.py", "train_sft_vlm.py"]
    more = {"eval_vlm.py": ["--max_new_tokens", 2], "train_pretrain_vlm.py": ["--epochs", 1], "train_sft_vlm.py": ["--epochs", 1]}
    for program, arguments in written:
        small = [] if program == "eval_vlm.py" else ["--num_hidden_layers", 2]
        done = run(str(clone / program), *shlex.split(arguments), *more[program], *small, "--device", "cpu", cwd=clone)
        theirs = "out/minimind3" if "minimind3" in arguments else str(clone / "model" / "published_tokenizer")
        assert done.returncode == 0 and theirs in done.stderr, done.stderr
    theirs = tokenizer_fingerprint(load_tokenizer(published))
    for name in ("my_pretrain", "my_sft"):
        sidecar = read_sidecar(clone / "out" / f"{name}_512.pth")
        assert sidecar["fingerprints"]["tokenizer"] == theirs
        assert sidecar["training"]["tokenizer_path"] == str(clone / "model" / "published_tokenizer")
    # What was trained from them needs no flag, and no published tokenizer once it is known.
    done = run(str(clone / "eval_vlm.py"), "--weight", "my_sft", "--mode", "folder", "--image_dir", clone / "no", cwd=clone)
    assert done.returncode == 2 and "tokenizer" not in done.stderr


@pytest.fixture
def foreign(tmp_path, encoder_folder, monkeypatch):
    """Weights without a sidecar, where no published tokenizer was fetched."""
    monkeypatch.setattr(weights, "PUBLISHED_TOKENIZER", tmp_path / "published_tokenizer")
    model = make_model(0, make_vision_encoder(), hidden_size=32, num_attention_heads=8)
    (tmp_path / "out").mkdir()
    torch.save(half_weights(model), tmp_path / "out" / "sft_vlm_32.pth")
    plain_image("red").save(tmp_path / "a.png")
    return tmp_path


def ask(folder, encoder_folder, *flags) -> int:
    return eval_main(["--save_dir", str(folder / "out"), "--vision_model_path", str(encoder_folder), "--image_dir", str(folder),
                      "--max_new_tokens", "2", "--device", "cpu", *map(str, flags)])  # fmt: skip


def test_weights_whose_tokenizer_nobody_knows_are_refused(foreign, encoder_folder, capsys):
    target = foreign / "folder"
    for refuse in (lambda: ask(foreign, encoder_folder),
                   lambda: convert.main([str(foreign / "out" / "sft_vlm_32.pth"), str(target), "--vision_model_path", str(encoder_folder)])):  # fmt: skip
        assert refuse() == 2
        said = capsys.readouterr().err
        assert "hf download jingyaogong/MiniMind2-V tokenizer.json" in said and "--tokenizer_path" in said
    assert not target.exists()


def test_a_tokenizer_next_to_weights_or_published_or_given_is_taken(foreign, encoder_folder, published, capsys):
    assert ask(foreign, encoder_folder, "--tokenizer_path", REPOSITORY / "model") == 0
    shutil.copytree(published, foreign / "published_tokenizer")
    assert ask(foreign, encoder_folder) == 0 and str(foreign / "published_tokenizer") in capsys.readouterr().err
    shutil.copy(REPOSITORY / "model" / "tokenizer.json", foreign / "out")
    shutil.copy(REPOSITORY / "model" / "tokenizer_config.json", foreign / "out")
    assert ask(foreign, encoder_folder) == 0 and f"tokenizer: {foreign / 'out'}\n" in capsys.readouterr().err


def test_a_folder_read_with_another_tokenizer_keeps_it(published, tmp_path, capsys):
    """Otherwise its weights would be taken for ours, which have this project's."""
    encoder = make_vision_encoder(width=768)
    encoder.save_pretrained(tmp_path / "clip")
    model = make_model(encoder=encoder, hidden_size=32, num_attention_heads=8, vision_hidden_size=768)
    publish(tmp_path / "original", model, "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "original" / file).unlink()
    assert convert.main([str(tmp_path / "original"), str(tmp_path / "mine_32.pth"), "--tokenizer_path", str(published)]) == 0
    assert str(published) in capsys.readouterr().err
    assert read_sidecar(tmp_path / "mine_32.pth")["training"]["tokenizer_path"] == str(published)
    again = load_assistant("model", tmp_path / "mine_32.pth", "cpu", str(tmp_path / "clip"))
    assert tokenizer_fingerprint(again.tokenizer) == tokenizer_fingerprint(load_tokenizer(published))
