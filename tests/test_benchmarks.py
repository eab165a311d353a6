"""The benchmark: a run of a few seconds gives all its figures, and answers that are compared are the same answers."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import __main__ as benchmark
from benchmarks.inference import QUESTION, Real, ask_plain
from docs import minimal_vlm
from model.inference.assistant import Assistant
from tests.conftest import REPOSITORY, make_model, make_vision_encoder


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    return benchmark.main()


def test_a_tiny_run_gives_the_figures_of_the_rows_asked_for(tmp_path, monkeypatch, capsys):
    names = ["sft_first_epoch", "sft_cached", "decode_single", "decode_batch32", "jsonl_later_start"]
    assert run(monkeypatch, "--tiny", "--rounds", 1, "--rows", ",".join(names), "--json", tmp_path / "a.json", "--against", REPOSITORY) == 0
    rows = {row.pop("name"): row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert list(rows) == names
    for name in names[:2]:
        for contestant in ("", "plain_", "against_"):
            assert rows[name][f"{contestant}samples_per_second"] > 0 and rows[name][f"{contestant}peak_memory_mb"] > 100
        assert rows[name]["plain_ratio"] == pytest.approx(rows[name]["samples_per_second"] / rows[name]["plain_samples_per_second"])
    assert rows["decode_batch32"]["tokens_per_second"] > 0 and rows["jsonl_later_start"]["seconds"] > 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(names))] == names


def test_both_contestants_answer_the_same(renderer, tmp_path):
    encoder = make_vision_encoder()
    real = Real(Assistant(make_model(0, encoder, hidden_size=64, initializer_range=0.3), renderer.tokenizer))
    config = minimal_vlm.Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vision_hidden_size=24)
    plain = minimal_vlm.MiniVLM(config)
    plain.load_state_dict(real.assistant.model.state_dict())
    plain.vision_encoder = encoder
    Image.new("RGB", (300, 224), "red").save(tmp_path / "red.png")
    tokens = ask_plain(plain, minimal_vlm.load_tokenizer(), [QUESTION], tmp_path / "red.png", 6)
    assert real.ask([QUESTION], tmp_path / "red.png", 6) == tokens == real.ask_all([tmp_path / "red.png"] * 2, 6)[1]


@pytest.mark.parametrize(("flags", "message"), [
    (["--json", "."], "--json .: "), (["--json", "file/x.json"], "--json file/x.json: no file can be written there"),
    (["trian"], "no suite or row of it: trian"), (["data", "--rows", "sft_cached"], "no suite or row of it: sft_cached"),
])  # fmt: skip
def test_mistakes_are_told_before_the_work(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(benchmark.tempfile, "TemporaryDirectory", lambda **_: pytest.fail("work before the look"))
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *flags)
    assert f"error: {message}" in capsys.readouterr().err


def test_the_device_suite_compares_trains_resumes_and_says_what_it_cannot(tmp_path, monkeypatch, capsys):
    """On a CPU and tiny, so that the program is sound where there is a GPU."""
    names = ["equal_fp32", "equal_bf16", "equal_attention", "equal_experts", "equal_cache", "equal_answers", "sft_768x16", "batches_a_core", "host_waits",
             "memory_768x16", "resume", "decode_32", "torchrun"]
    assert run(monkeypatch, "gpu", "--tiny", "--rows", ",".join(names), "--device", "cpu", "--json", tmp_path / "a.json") == 0
    rows = {row.pop("name"): row for row in json.loads((tmp_path / "a.json").read_text())["rows"]}
    assert [*rows] == [name for name in names if name != "host_waits"]
    assert "host_waits" in (said := capsys.readouterr().out) and "only CUDA tells" in said
    assert max(rows["equal_fp32"].values()) < 1e-4 and rows["equal_fp32"]["gradients"] < rows["equal_bf16"]["gradients"] < 0.2
    assert rows["equal_cache"]["difference"] < 1e-4 and max(rows["equal_attention"].values()) < 0.02 and rows["batches_a_core"]["samples_per_second"] > 0
    assert max(rows["equal_attention"][f"{kind}_fp32"] for kind in ("causal", "masked")) < 1e-5
    assert rows["equal_answers"]["same_tokens"] == rows["equal_answers"]["of"] and rows["equal_experts"]["difference"] < 0.02
    assert rows["resume"]["difference"] == 0 and rows["memory_768x16"]["batch_24gb"] > rows["memory_768x16"]["batch_8gb"]
    assert all(value > 0 for value in (*rows["sft_768x16"].values(), *rows["decode_32"].values(), *rows["torchrun"].values()))
    assert run(monkeypatch, "gpu", "--tiny", "--rows", "equal_fp32", "--minutes", 0) == 0
    assert "--minutes 0 are over" in capsys.readouterr().out
