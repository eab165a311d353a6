"""The loop, as users run it: resumed equals uninterrupted, two processes equal one, nothing twice, nothing lost."""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chat.web.runs import read_run
from docs.figures.loss import read_curves
from model import storage
from model.errors import UsageError
from model.model_vlm import MiniMindVLM, VLMConfig
from model.storage import home_for_tilde
from model.weights import load_weights, save_weights, weight_name
from tests.conftest import (
    REPOSITORY,
    children,
    make_data,
    make_model,
    make_vision_encoder,
    read_metrics,
    read_until,
    run_script,
    start_on_disk,
    training_flags,
    write_jsonl,
)
from train_pretrain_vlm import DEFAULTS as PRETRAIN
from train_sft_vlm import DEFAULTS as SFT
from trainer import distributed, resume
from trainer.build import build, freeze, warn_of_small_steps
from trainer.config import TrainConfig, parse_config
from trainer.grpo import GRPOConfig
from trainer.guards import StopRequest, TrainingFailed
from trainer.loop import Trainer, cosine
from trainer.main import main
from trainer.sampler import ResumableSampler

NAME = "sft_vlm_32"
BATCHES = torch.utils.data.DataLoader.__iter__


def weights(out, name: str = NAME) -> dict:
    return torch.load(out / "out" / f"{name}.pth", weights_only=True)


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def make_trainer(data, encoder_folder, out, **flags) -> Trainer:
    """A run in this process."""
    return Trainer(build(parse_config("", {}, training_flags(data, encoder_folder, out, num_workers=0, **flags)), distributed.start("cpu")))


def run_training(data, encoder_folder, out, script: str = "train_sft_vlm.py", **flags) -> types.SimpleNamespace:
    """A script's run in this process, with a process's one thread: its exit code and what it said."""
    threads, said = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stderr(said):
            defaults = SFT if script == "train_sft_vlm.py" else PRETRAIN
            code = main("", defaults, training_flags(data, encoder_folder, out, **{"num_workers": 0, **flags}))
    finally:
        torch.set_num_threads(threads)
    return types.SimpleNamespace(returncode=code, stderr=said.getvalue())


def train(data, encoder_folder, out, processes: int = 0, **flags):
    """A run that ends well, in this process, or in several under torchrun."""
    if processes:
        done = run_script("train_sft_vlm.py", *training_flags(data, encoder_folder, out, **flags), processes=processes)
    else:
        done = run_training(data, encoder_folder, out, **flags)
    assert done.returncode == 0, done.stderr
    return done


# --- order of samples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch", "accumulation", "ranks"), [(23, 2, 1, 1), (23, 3, 2, 2), (5, 4, 3, 3), (64, 4, 4, 4), (1, 2, 1, 2)])
def test_every_sample_once_on_some_rank_and_same_updates_for_any_number_of_ranks(size, batch, accumulation, ranks):
    samplers = [ResumableSampler(size, batch, accumulation, 7, rank, ranks) for rank in range(ranks)]
    alone = ResumableSampler(size, batch * ranks, accumulation, 7)
    updates = [list(sampler.updates(3)) for sampler in samplers]
    assert [len(update) for update in updates[0]] == [len(update) for update in updates[-1]]
    assert len(updates[0]) == alone.updates_per_epoch == samplers[0].updates_per_epoch
    for number, expected in enumerate(alone.updates(3)):
        for micro, wanted in enumerate(expected):
            got = [index for rank in range(ranks) for index in updates[rank][number][micro]]
            assert sorted(got) == sorted(wanted)
    everything = list(itertools.chain.from_iterable(itertools.chain.from_iterable(itertools.chain.from_iterable(updates))))
    assert sorted(everything) == list(range(size))


def test_order_depends_on_seed_and_epoch_alone():
    def order(epoch: int, *settings: int, **more: int) -> list[int]:
        return np.concatenate(list(ResumableSampler(50, *settings, **more).samples(epoch))).tolist()

    assert order(0, 4, 1, seed=1) == order(0, 9, 3, seed=1, rank=1, ranks=2)
    assert order(0, 4, 1, seed=1) != order(1, 4, 1, seed=1) and order(0, 4, 1, seed=1) != order(0, 4, 1, seed=2)
    assert order(0, 4, 1, seed=1) != list(range(50))


def test_the_rest_after_any_number_of_samples_is_the_uninterrupted_rest():
    sampler = ResumableSampler(23, 2, 2, seed=1)
    whole = list(sampler.updates(0))
    for done in range(len(whole)):
        assert list(sampler.updates(0, skip=done * 4)) == whole[done:]


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_every_sample_once_whatever_the_sizes_and_wherever_the_processes_change(data):
    """Stopped after some updates of an epoch, resumed with another number of ranks."""
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    size, batch, accumulation, seed, epoch = number(1, 90), number(1, 4), number(1, 3), number(0, 5), number(0, 3)
    lengths = np.array(data.draw(st.lists(st.integers(1, 60), min_size=size, max_size=size))).take if number(0, 1) else None
    before, after = number(1, 4), number(1, 4)
    first = [ResumableSampler(size, batch, accumulation, seed, rank, before, lengths) for rank in range(before)]
    stop = number(0, first[0].updates_per_epoch)
    trained = [index for sampler in first for update in itertools.islice(sampler.updates(epoch), stop)
               for micro in update for index in micro]  # fmt: skip
    done = min(size, stop * first[0].samples_per_update)
    assert len(trained) == done
    second = [ResumableSampler(size, batch, number(1, 3), seed, rank, after, lengths) for rank in range(after)]
    for sampler in second:
        sampler.grain, sampler.accumulation_steps = first[0].grain, second[0].accumulation_steps
    updates = [list(sampler.updates(epoch, done)) for sampler in second]
    assert {len(own) for own in updates} == {second[0].count_updates(epoch + 1, epoch, done)}
    assert {tuple(map(len, own)) for own in updates} == {tuple(map(len, updates[0]))}, "as many micro-batches on all ranks"
    trained += [index for own in updates for update in own for micro in update for index in micro]
    assert sorted(trained) == list(range(size))


def test_learning_rate_goes_from_the_peak_to_a_tenth():
    assert cosine(0.0, 4e-4) == pytest.approx(4e-4) and cosine(1.0, 4e-4) == pytest.approx(4e-5)
    assert cosine(0.5, 1.0) == pytest.approx(0.55)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones():
    pretrain, sft = parse_config("", {}, []), parse_config("", SFT, [])
    expected = {
        "save_weight": ("pretrain_vlm", "sft_vlm"), "epochs": (4, 2), "batch_size": (16, 4),
        "learning_rate": (4e-4, 1e-6), "num_workers": (8, 8), "accumulation_steps": (1, 1), "grad_clip": (1.0, 1.0),
        "log_interval": (100, 100), "save_interval": (100, 100), "hidden_size": (512, 512),
        "num_hidden_layers": (8, 8), "max_seq_len": (640, 1536), "use_moe": (0, 0),
        "from_weight": ("llm", "pretrain_vlm"), "from_resume": (0, 0), "freeze_llm": (1, 0), "use_wandb": (False, False),
        "wandb_project": ("MiniMind-V-Pretrain", "MiniMind-V-SFT"), "seed": (42, 42),
        "save_dir": (str(REPOSITORY / "out"),) * 2, "tokenizer_path": (None, None),
        "data_path": (str(REPOSITORY / "dataset/pretrain_data.jsonl"), str(REPOSITORY / "dataset/sft_data.jsonl")),
        "images_path": (str(REPOSITORY / "dataset/pretrain_images"), str(REPOSITORY / "dataset/sft_images")),
        "vision_model_path": (None,) * 2,  # of the weights started from, or model/vision_model/clip-vit-base-patch16
    }  # fmt: skip
    for name, values in expected.items():
        assert (getattr(pretrain, name), getattr(sft, name)) == values, name
    assert weight_name("sft_vlm", 512, True) == "sft_vlm_512_moe"


@pytest.mark.parametrize(
    "flags", [["--use_moe", "False"], ["--freeze_llm", "3"], ["--epochs", "0"], ["--batch_size", "-1"], ["--dtype", "int8"],
              ["--learning_rate", "nan"], ["--from_weight", "a/b"], ["--no_such_flag"]],
)  # fmt: skip
def test_bad_flags_end_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as end:
        parse_config("", {}, flags)
    assert end.value.code == 2 and flags[0].lstrip("-") in capsys.readouterr().err


def test_several_files_may_be_given_apart_or_with_commas_between():
    apart = parse_config("", {}, ["--data_path", "a.jsonl", "b.jsonl:0.3", "--images_path", "a", "b.zip", "--eval_data_path", "0.1"])
    assert apart == parse_config("", {}, ["--data_path", "a.jsonl,b.jsonl:0.3", "--images_path", "a,b.zip", "--eval_data_path=0.1"])


@pytest.mark.parametrize(("samples", "batch_size", "rate", "epochs", "told"), [
    (84, 4, 1e-6, 2, True), (84, 4, 5e-4, 20, False),  # a few images of one's own, by the defaults and as it should be
    (595_000, 16, 4e-4, 4, False), (300_000, 4, 1e-6, 2, False),  # the published data and defaults
    (4_000, 16, 4e-3, 1, False), (4_000, 16, 5e-4, 1, False),  # the demo
])  # fmt: skip
def test_too_few_updates_to_learn_are_told_at_the_start(samples, batch_size, rate, epochs, told, capsys):
    config = TrainConfig(batch_size=batch_size, learning_rate=rate, epochs=epochs)
    warn_of_small_steps(config, distributed.Ranks(0, 1, 1, torch.device("cpu")), epochs * -(-samples // batch_size))
    assert ("too little to learn" in capsys.readouterr().err) == told


def test_the_tables_of_flags_are_printed_with_the_defaults_of_both_scripts():
    done = subprocess.run([sys.executable, "-m", "docs.flags"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    rows = dict(line.strip("| ").split(" | ", 1) for line in done.stdout.splitlines() if line.startswith("| --"))
    assert set(rows) == {f"--{item.name}" for item in dataclasses.fields(GRPOConfig)}
    assert rows["--epochs"].startswith("4 (2) | ") and rows["--data_path"].startswith("dataset/pretrain_data.jsonl (dataset/sft_data.jsonl) | ")
    assert str(REPOSITORY) not in done.stdout


def test_a_tilde_is_the_home_folder_in_every_command(tmp_path, monkeypatch, capsys):
    """Where a shell does not see to it: after =, and after a comma."""
    import eval_vlm
    from chat.web import settings
    from dataset import convert, validate
    from model import convert as convert_model

    monkeypatch.setenv("HOME", str(tmp_path))
    assert home_for_tilde(["~", "~/a", "--x=~/b", "c,~/d:0.3,e~/f", "--q", "~nobody-of-that-name/g", "a~b"]) == [
        str(tmp_path), f"{tmp_path}/a", f"--x={tmp_path}/b", f"c,{tmp_path}/d:0.3,e~/f", "--q", "~nobody-of-that-name/g", "a~b"]  # fmt: skip
    config = parse_config("", {}, ["--save_dir=~/x", "--data_path", "~/a.jsonl,~/b.jsonl:2"])
    assert (config.save_dir, config.data_path) == (f"{tmp_path}/x", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl:2")
    assert eval_vlm.parse_flags(["--score=~/t.jsonl"]).score == f"{tmp_path}/t.jsonl"
    assert settings.parse_flags(["--save_dir=~"], "").save_dir == tmp_path
    for command, flags in ((validate.main, ["~/no.jsonl"]), (convert.main, ["~/no.jsonl", "--out=~/o"]), (convert_model.main, ["~/no.pth", "~/o"])):
        assert command(flags) == 2 and f"{tmp_path}/no." in capsys.readouterr().err
    assert not (REPOSITORY / "~").exists()


def test_moe_zero_means_dense():
    assert not parse_config("", {}, ["--use_moe", "0"]).use_moe and parse_config("", {}, ["--use_moe", "1"]).use_moe


def test_freezing_modes():
    model = make_model(encoder=make_vision_encoder())
    names = {name for name, _ in model.named_parameters()}
    projector = {name for name in names if name.startswith("vision_proj.")}
    last = {name for name in names if name.startswith("model.layers.1.")}
    for mode, expected in ((0, names), (1, projector), (2, projector | last)):
        freeze(model, mode)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
        assert not any(p.requires_grad for p in model.vision_encoder.parameters())


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_everything_missing_is_named_with_the_commands_that_fetch_it(tmp_path):
    done = run_script("train_pretrain_vlm.py", "--epochs", 4, "--from_weight", "llm", "--save_dir", tmp_path,
                      "--data_path", tmp_path / "no.jsonl", "--vision_model_path", tmp_path / "clip",
                      "--checkpoint_dir", tmp_path, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("hf download") == 3 and "openai/clip-vit-base-patch16" in done.stderr


@pytest.mark.parametrize("accumulation", [4])  # 1: the storm of test_never_lose_work.py
def test_resumed_equals_uninterrupted_bit_for_bit(data, encoder_folder, tmp_path, accumulation):
    """Stopped by a signal in the middle of the second epoch, with a state saved at every update."""
    flags = {"accumulation_steps": accumulation, "epochs": 2, "save_interval": 1}
    train(data, encoder_folder, tmp_path / "whole", **flags)
    part = tmp_path / "part"
    total = 2 * -(-22 // (2 * accumulation))
    process = start_on_disk(data, encoder_folder, part, {"DISK_DELAY": "0.1"}, **flags)  # no end before the signal
    read_until(process, f"update {total // 2 + 1}/")
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 0, rest
    assert "stopped by SIGINT" in rest and "--from_resume 1" in rest
    done_then = resume.load_training_state(part / "checkpoints" / f"{NAME}_resume.pth")[0]["state"]["update"]
    assert total // 2 < done_then < total, "it stopped in the middle of an epoch"
    done = train(data, encoder_folder, part, from_resume=1, **flags)
    assert f"{done_then} updates done" in done.stderr
    assert_same(weights(tmp_path / "whole"), weights(part))
    strip = [{k: line[k] for k in ("update", "epoch", "loss", "learning_rate")} for line in read_metrics(part, NAME)]
    whole = [{k: line[k] for k in ("update", "epoch", "loss", "learning_rate")} for line in read_metrics(tmp_path / "whole", NAME)]
    assert strip == whole and [line["update"] for line in whole] == list(range(1, total + 1))


def test_sigterm_saves_and_ends_with_143_even_when_all_processes_get_it(data, encoder_folder, tmp_path):
    command = [sys.executable, str(REPOSITORY / "train_sft_vlm.py"),
               *training_flags(data, encoder_folder, tmp_path, epochs=200, save_interval=10_000)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stderr:
        if "update 3/" in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 143, rest
    assert "Traceback" not in rest and "stopped by SIGTERM" in rest
    state, _ = resume.load_training_state(tmp_path / "checkpoints" / f"{NAME}_resume.pth")
    assert state["state"]["update"] >= 3


@pytest.mark.parametrize("accumulation", [3])  # 1: test_validation.py and the feature cache of test_speed.py
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(data, encoder_folder, tmp_path, accumulation):
    flags = {"accumulation_steps": accumulation, "epochs": 2, "dtype": "float32"}
    train(data, encoder_folder, tmp_path / "one", batch_size=4, **flags)
    train(data, encoder_folder, tmp_path / "two", batch_size=2, processes=2, **flags)
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name, NAME)] for name in ("one", "two"))
    assert len(one) == len(two) > 3 and np.abs(np.array(one) - two).max() < 1e-4
    for name, tensor in weights(tmp_path / "one").items():
        assert (tensor.float() - weights(tmp_path / "two")[name].float()).abs().max() < 2e-3, name


def test_a_rank_without_images_does_not_hang(encoder_folder, tmp_path):
    """Of two samples in each update one has an image: one of two ranks never sees any at a time."""
    make_data(tmp_path, 12)
    rows = []
    for number in range(8):
        shown = number % 2 == 0
        rows.append({"conversations": [{"role": "user", "content": "<image>" * shown + "What?"},
                                       {"role": "assistant", "content": "This."}], **({"image": "p.png"} if shown else {})})  # fmt: skip

    Image.new("RGB", (30, 30), "red").save(tmp_path / "pictures" / "p.png")
    data = write_jsonl(tmp_path / "mixed.jsonl", rows), tmp_path / "pictures"
    for freeze_llm in (0, 1):
        train(data, encoder_folder, tmp_path / str(freeze_llm), batch_size=1, processes=2, freeze_llm=freeze_llm)


def test_accumulation_takes_the_leftover_group_as_an_update(data, encoder_folder, tmp_path):
    """22 samples by 2 are 11 micro-batches: with 4 an update, updates end after 4, 8 and 11."""
    train(data, encoder_folder, tmp_path, accumulation_steps=4)
    metrics = read_metrics(tmp_path, NAME)
    assert [line["update"] for line in metrics] == [1, 2, 3]
    assert [round(line["epoch"] * 22) for line in metrics] == [8, 16, 22]
    state, _ = resume.load_training_state(tmp_path / "checkpoints" / f"{NAME}_resume.pth")
    assert state["state"]["update"] == 3, "the last update is saved though save_interval is 100"


def test_pretraining_moves_the_projector_alone(data, encoder_folder, tmp_path):
    start = make_model(hidden_size=32, num_attention_heads=8)
    (tmp_path / "out").mkdir()
    save_weights(tmp_path / "out" / "llm_32.pth", start, {})
    train(data, encoder_folder, tmp_path, script="train_pretrain_vlm.py", from_weight="llm", freeze_llm=1)
    before, after = weights(tmp_path, "llm_32"), weights(tmp_path, "pretrain_vlm_32")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"}
    assert not any(name.startswith("vision_encoder") for name in after)
    sidecar = json.loads((tmp_path / "out" / "pretrain_vlm_32.json").read_text())
    assert VLMConfig(**sidecar["config"]).hidden_size == 32 and set(sidecar["fingerprints"]) == {"tokenizer", "vision_encoder"}
    state, _ = resume.load_training_state(tmp_path / "checkpoints" / "pretrain_vlm_32_resume.pth")
    assert not any("vision_encoder" in name for name in state["model"])


@pytest.mark.parametrize(("dtype", "moe"), [("bfloat16", 0), ("bfloat16", 1), ("float16", 0)])
def test_number_formats_and_experts_learn(data, encoder_folder, tmp_path, dtype, moe):
    train(data, encoder_folder, tmp_path, dtype=dtype, use_moe=moe, epochs=6, batch_size=4, learning_rate=3e-3)
    name = weight_name("sft_vlm", 32, bool(moe))
    losses = [line["loss"] for line in read_metrics(tmp_path, name)]
    assert np.isfinite(losses).all() and losses[-1] < 0.7 * losses[0]
    auxiliary = [line["aux_loss"] for line in read_metrics(tmp_path, name)]
    assert all(value > 0 for value in auxiliary) if moe else not any(auxiliary)


def test_a_bad_sample_is_skipped_named_and_counted(data, encoder_folder, tmp_path):
    rows = data[0].read_text().splitlines()
    rows[4:4] = ['{"conversations": 3}']
    few = write_jsonl(tmp_path / "few.jsonl", rows * 11)  # 11 of 253
    done = run_training((few, data[1]), encoder_folder, tmp_path / "a")
    assert done.returncode == 1 and "bad, more than 10 and 1%" in done.stderr and "Traceback" not in done.stderr
    assert "few.jsonl:5: 'conversations' is missing" in done.stderr
    done = run_training((few, data[1]), encoder_folder, tmp_path / "b", on_bad_sample="raise")
    assert done.returncode == 1 and done.stderr.count("bad sample: ") == 1
    plain = write_jsonl(tmp_path / "plain.jsonl", ['{"conversations": 3}', *(
        [{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 130)])  # fmt: skip
    done = train((plain, data[1]), encoder_folder, tmp_path / "c", batch_size=16)
    assert "plain.jsonl:1" in done.stderr and read_metrics(tmp_path / "c", NAME)[-1]["bad_samples"] == 1


def test_a_truncated_image_is_used_named_once_and_counted(encoder_folder, tmp_path):
    for name in ("whole.jpg", "cut.jpg"):
        Image.effect_noise((90, 60), 40).save(tmp_path / name)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-5])
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "noise"}]
    rows = write_jsonl(tmp_path / "data.jsonl", [{"conversations": turns, "image": name} for name in ("whole.jpg", "cut.jpg")])
    done = train((rows, tmp_path), encoder_folder, tmp_path / "a", epochs=2, on_bad_sample="raise")
    assert done.stderr.count("data.jsonl:2: image 'cut.jpg' is truncated, used") == 1
    line = read_metrics(tmp_path / "a", NAME)[-1]
    assert (line["update"], line["truncated_images"], line["bad_samples"]) == (2, 2, 0)


BAD = '{"conversations": 3}'


def texts(count: int) -> list[dict]:
    return [{"conversations": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "word " * (n % 5 + 1)}]}
            for n in range(count)]  # fmt: skip


def test_ten_bad_samples_of_an_epoch_never_stop_a_run(data, encoder_folder, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", [*texts(5), *[BAD] * 10]), data[1]
    train(few, encoder_folder, tmp_path, epochs=3)
    assert read_metrics(tmp_path, NAME)[-1]["bad_samples"] == 30, "they are counted, over all epochs"
    none = write_jsonl(tmp_path / "none.jsonl", [BAD] * 3), data[1]
    with pytest.raises(TrainingFailed, match=r"3 of 3 samples read were bad, all of them.*Nothing was trained"):
        make_trainer(none, encoder_folder, tmp_path / "none").train()


@pytest.mark.parametrize(("dtype", "moe"), [("float32", 0), ("float16", 0), ("float32", 1)])
def test_an_update_whose_samples_are_all_bad_moves_nothing(data, encoder_folder, tmp_path, dtype, moe):
    rows = write_jsonl(tmp_path / "some.jsonl", [*texts(8), BAD, BAD]), data[1]
    trainer = make_trainer(rows, encoder_folder, tmp_path, save_weight="sft_vlm", epochs=2, batch_size=1, dtype=dtype, use_moe=moe)

    def now() -> dict:
        optimizer = trainer.run.optimizer.state_dict()["state"]
        return {**trainer.run.model.state_dict(), **{(n, name): value for n, values in optimizer.items() for name, value in values.items()}}

    before, bad, unmoved = copy.deepcopy(now()), 0, 0
    log = trainer.log_if_due

    def compare(learning_rate: float) -> None:
        nonlocal before, bad, unmoved
        log(learning_rate)
        after = copy.deepcopy(now())
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        if trainer.state.bad > bad:
            assert same
            unmoved += 1
        else:
            assert not same or dtype == "float16", "there, the scaler leaves out some"
        before, bad = after, trainer.state.bad

    trainer.log_if_due = compare
    trainer.train_epochs(2, StopRequest())
    losses = [line["loss"] for line in read_metrics(tmp_path, weight_name("sft_vlm", 32, bool(moe)))]
    assert unmoved == losses.count(None) == 4 and len(losses) == trainer.state.update == 20


def test_an_update_whose_samples_are_all_bad_is_none_on_every_rank(data, encoder_folder, tmp_path):
    """By two processes as by one with twice the batch; some updates have bad samples on one of them."""
    rows = write_jsonl(tmp_path / "some.jsonl", [*texts(6), *[BAD] * 7]), data[1]
    train(rows, encoder_folder, tmp_path / "one", batch_size=2, epochs=2, seed=3)
    said = train(rows, encoder_folder, tmp_path / "two", batch_size=1, epochs=2, seed=3, processes=2).stderr
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name, NAME)] for name in ("one", "two"))
    assert [loss is None for loss in one] == [loss is None for loss in two] and 0 < one.count(None) < len(one)
    assert all(abs(a - b) < 1e-4 for a, b in zip(one, two, strict=True) if a is not None)
    assert "nothing trained" in said and "loss 0.0000" not in said
    file, known = tmp_path / "one" / "out" / f"{NAME}.metrics.jsonl", [loss for loss in one if loss is not None]
    page = read_run(file)
    assert page.bad == 0 and page.frame["loss"].dropna().tolist() == known == [loss for _, loss in read_curves(file)["loss"]]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(data, encoder_folder, tmp_path, capsys):
    for good in ("nothing was saved yet", "the last good state is .*_resume.pth"):
        run = build(parse_config("", {}, training_flags(data, encoder_folder, tmp_path, save_weight="sft_vlm")), distributed.start("cpu"))
        run.model.model.norm.weight.data[:] = float("nan")
        with pytest.raises(TrainingFailed, match=f"not finite; {good}"):
            Trainer(run).train()
        assert "data.jsonl:" in capsys.readouterr().err
        if good.startswith("nothing"):
            train(data, encoder_folder, tmp_path)
            before = weights(tmp_path)
    assert_same(weights(tmp_path), before)


def test_weights_that_are_not_finite_are_refused(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path)
    broken = weights(tmp_path)
    broken["model.norm.weight"][3] = float("nan")
    torch.save(broken, tmp_path / "out" / "broken_32.pth")
    done = run_training(data, encoder_folder, tmp_path, from_weight="broken", tokenizer_path=REPOSITORY / "model")
    assert done.returncode == 2 and "broken_32.pth holds weights that are not finite" in done.stderr


@pytest.mark.parametrize(("flags", "told"), [({"images_path": "typo"}, "--images_path typo: there is no such folder"),
                                             ({"max_seq_len": 10}, "Nothing was trained")])  # fmt: skip
def test_a_run_that_trains_nothing_leaves_what_was_trained_before(data, encoder_folder, tmp_path, flags, told):
    train(data, encoder_folder, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*_32*") if path.suffix in (".pth", ".json")}
    done = run_training(data, encoder_folder, tmp_path, save_interval=1, batch_size=2, **flags)
    assert done.returncode in (1, 2) and told in done.stderr and "Traceback" not in done.stderr
    assert len(before) == 3 and all(path.read_bytes() == content for path, content in before.items())


def test_a_bad_sample_in_the_first_update_leaves_what_was_trained_before(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*_32*") if path.suffix in (".pth", ".json")}
    rows = write_jsonl(tmp_path / "rows.jsonl", [*texts(1), BAD]), data[1]  # a good one beside it
    with pytest.raises(TrainingFailed, match="Nothing was trained"):
        make_trainer(rows, encoder_folder, tmp_path, save_weight="sft_vlm", batch_size=2, on_bad_sample="raise").train()
    assert len(before) == 3 and all(path.read_bytes() == content for path, content in before.items())


def test_workers_are_capped_with_a_notice(data, encoder_folder, tmp_path):
    assert "capped to" in train(data, encoder_folder, tmp_path, num_workers=4096).stderr


def test_scripts_run_from_any_folder(data, encoder_folder, tmp_path):
    done = run_script("train_sft_vlm.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and str(REPOSITORY / "dataset" / "sft_data.jsonl") in "".join(done.stdout.split())  # wrapped at hyphens, too


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_killed_loader_process_is_one_line(data, encoder_folder, tmp_path):
    flags = training_flags(data, encoder_folder, tmp_path, epochs=500, save_interval=1)
    process = subprocess.Popen([sys.executable, str(REPOSITORY / "train_sft_vlm.py"), *flags], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    while "update 3/" not in process.stderr.readline():
        assert process.poll() is None
    os.kill(children(process.pid)[0], signal.SIGKILL)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "Traceback" not in rest
    assert "error: a loader process died" in rest and "--from_resume 1" in rest


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer"), ConnectionRefusedError(111, "refused"),
                                   RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. Out of shared memory, perhaps")])  # fmt: skip
def test_a_loader_process_whose_connection_broke_is_told_as_dead(error, data, encoder_folder, tmp_path, monkeypatch, capsys):
    """Before the loader hears of the death, what it reads from the process ends in the middle."""
    def broken(_):
        yield next(BATCHES(_))
        raise error

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    assert main("", {}, training_flags(data, encoder_folder, tmp_path, num_workers=0)) == 1
    told = capsys.readouterr().err
    assert "error: a loader process died" in told and ("--shm-size" in told) == ("shared memory" in str(error))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("a fault of the program")])
def test_what_fails_in_a_loader_process_is_no_death_of_it(error, data, encoder_folder, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise error

    monkeypatch.setattr("dataset.vlm_dataset.VLMDataset.__getitems__", broken)
    flags = training_flags(data, encoder_folder, tmp_path)
    with pytest.raises(RuntimeError, match="Original Traceback") if isinstance(error, RuntimeError) else contextlib.nullcontext():
        assert main("", {}, flags) == 1
    assert capsys.readouterr().err.endswith("error: OSError: [Errno 5] Input/output error\n") == isinstance(error, OSError)


def test_weights_load_strictly(tmp_path):
    model = make_model()
    path = tmp_path / "w_32.pth"
    save_weights(path, model, {"fingerprints": {"tokenizer": "abc"}})
    other = make_model(seed=5)
    assert load_weights(path, other, {"tokenizer": "abc"}) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.half().float())
    with pytest.raises(UsageError, match="another tokenizer"):
        load_weights(path, other, {"tokenizer": "xyz"})
    for wrong, message in [
        ({"hidden_size": 64}, r"embed_tokens.weight \(6400, 32\), the model has \(6400, 64\).*--hidden_size"),
        ({"num_hidden_layers": 3}, r"missing \(first: model\.layers\.2\..*--num_hidden_layers"),
        ({"num_hidden_layers": 1}, r"unexpected \(first: model\.layers\.1\."),
        ({"use_moe": True}, r"missing \(first: .*experts.*--use_moe"),
        ({"vision_hidden_size": 16}, r"vision_proj.* \(32, 24\), the model has \(32, 16\).*--vision_model_path"),
        ({"vocab_size": 100}, r"\(6400, 32\), the model has \(100, 32\).*--tokenizer_path"),
        ({"intermediate_size": 48}, "another shape .*fetch or make it again"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_weights(path, make_model(**wrong))
    with pytest.raises(UsageError, match="hf download"):
        load_weights(tmp_path / "none.pth", model)


def test_published_weights_load(tmp_path):
    """A language model alone leaves the projector fresh; a full checkpoint's encoder keys are passed over."""
    model, path = make_model(), tmp_path / "llm_32.pth"
    state = model.state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "vision_proj" not in name}, path)
    assert load_weights(path, make_model(seed=1)) == ["vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"]
    torch.save({**state, "vision_encoder.embeddings.x": torch.ones(2)}, path)
    assert load_weights(path, make_model(seed=1)) == []
    del state["model.norm.weight"]
    torch.save(state, path)
    with pytest.raises(UsageError, match=r"model\.norm\.weight"):
        load_weights(path, make_model(seed=1))


class Evil:
    """Would run a command when unpickled."""

    def __reduce__(self):
        return os.system, ("touch /tmp/minimind_v_was_here",)


def test_corrupt_and_malicious_files_are_refused(tmp_path):
    model, path = make_model(), tmp_path / "w.pth"
    save_weights(path, model, {})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UsageError, match="no readable weight file"):
        load_weights(path, model)
    torch.save({"model.norm.weight": Evil()}, path)
    with pytest.raises(UsageError, match="more than tensors and plain values"):
        load_weights(path, model)
    assert not os.path.exists("/tmp/minimind_v_was_here")
    with pytest.raises(UsageError, match="no training state at"):
        resume.load_training_state(tmp_path / "none.pth")


def test_values_beyond_fp16_are_not_saved_as_infinity(tmp_path):
    model = make_model()
    model.model.norm.weight.data[3] = 1e6
    with pytest.raises(FloatingPointError, match=r"model\.norm\.weight"):
        save_weights(tmp_path / "w.pth", model, {})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    storage.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(storage.StorageError, match="disk full"):
        storage.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_resume_with_other_settings_is_refused_by_name(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path)
    for flag, value in (("seed", 7), ("freeze_llm", 2)):
        done = run_training(data, encoder_folder, tmp_path, from_resume=1, **{flag: value})
        assert done.returncode == 2 and f"--{flag}" in done.stderr, done.stderr
    state = tmp_path / "checkpoints" / f"{NAME}_resume.pth"
    content = torch.load(state, weights_only=True)
    for flag, value in (("tiles", 4), ("projector", "mlp"), ("image_tokens", 49), ("family", "minimind3")):
        content["config"].pop(flag)  # as in a state from before there was a choice
        torch.save(content, state)
        done = run_training(data, encoder_folder, tmp_path, from_resume=1, **{flag: value})
        assert done.returncode == 2 and f"--{flag}" in done.stderr, done.stderr
    done = train(data, encoder_folder, tmp_path, from_resume=1)  # a finished run has nothing left to do
    assert "11 updates done" in done.stderr


def test_model_from_files_alone(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path)
    sidecar = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())
    MiniMindVLM(VLMConfig(**sidecar["config"])).load_state_dict(weights(tmp_path))
    assert time.time() - (tmp_path / "out" / f"{NAME}.pth").stat().st_mtime < 300
