"""Learning from marks: what no mark tells changes nothing, the gradient is that of the formula, a run can be resumed and spread."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset.images import open_images
from dataset.jsonl import Sample
from dataset.vlm_dataset import collate
from model.conversation import Turn
from model.errors import SampleError, UsageError
from model.inference.assistant import load_assistant
from tests.conftest import (
    REPOSITORY,
    kill_tree,
    make_data,
    read_metrics,
    read_until,
    run_script,
    training_flags,
    write_jsonl,
)
from tests.test_training import assert_same, weights
from train_grpo_vlm import DEFAULTS
from trainer import distributed
from trainer.build import build
from trainer.config import parse_config
from trainer.groups import TokenSampler, pack
from trainer.grpo import GRPOConfig, GRPOTrainer
from trainer.guards import TrainingFailed
from trainer.main import main
from trainer.resume import load_training_state
from trainer.rewards import choice, find_rewarder, mark

NAME = "grpo_vlm_32"
RIGHT = [Turn("user", "Which?"), Turn("assistant", "B")]


@pytest.fixture(autouse=True)
def rewarders(tmp_path, monkeypatch):
    """A user's module in the current folder."""
    (tmp_path / "marks.py").write_text(
        "def same(answer, sample): return 1\n"
        "def varied(answer, sample): return len(answer) % 7 / 6\n"
        "def too_much(answer, sample): return 2.0\n"
        "def broken(answer, sample): return answer.no_such_thing\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "marks", raising=False)


def flags_of(data, encoder_folder, out, **flags) -> list[str]:
    settings = {"group_size": 4, "max_new_tokens": 6, "reward": "marks:varied", "num_workers": 0, "learning_rate": 1e-2}
    return training_flags(data, encoder_folder, out, **{**settings, **flags})


def make_trainer(data, encoder_folder, out, **flags) -> GRPOTrainer:
    config = parse_config("", DEFAULTS, flags_of(data, encoder_folder, out, **flags), GRPOConfig)
    return GRPOTrainer(build(config, distributed.start("cpu")))


def run(data, encoder_folder, out, **flags) -> types.SimpleNamespace:
    """The script in this process: its exit code and what it said."""
    threads, said = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stderr(said):
            code = main("", DEFAULTS, flags_of(data, encoder_folder, out, **flags), GRPOConfig, GRPOTrainer)
    finally:
        torch.set_num_threads(threads)
    return types.SimpleNamespace(returncode=code, stderr=said.getvalue())


def train(*arguments, **flags) -> types.SimpleNamespace:
    done = run(*arguments, **flags)
    assert done.returncode == 0, done.stderr
    return done


def first_batch(trainer: GRPOTrainer, count: int = 4):
    config = trainer.run.model.config
    return collate(trainer.run.dataset.__getitems__(list(range(count))), config.pad_token_id, config.image_tokens)


def state_of(trainer: GRPOTrainer) -> dict:
    return {name: tensor.clone() for name, tensor in trainer.run.model.state_dict().items()}


# --- the step ---------------------------------------------------------------------------------------------------------


def test_equal_marks_change_nothing(data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path, reward="marks:same")
    before = state_of(trainer)
    trainer.train()
    assert_same(before, state_of(trainer))
    lines = read_metrics(tmp_path, NAME)
    assert lines[-1]["useless_groups"] == 1 and lines[-1]["reward"] == 1 and len(lines) == 11


@pytest.mark.parametrize("flags", [{}, {"use_moe": 1}, {"temperature": 0.7, "normalize": 1}, {"max_new_tokens": 250, "max_seq_len": 800}],
                         ids=["dense", "moe", "tempered", "long"])  # fmt: skip
def test_the_gradient_is_that_of_cross_entropy_weighted_by_hand(data, encoder_folder, tmp_path, flags, monkeypatch):
    """Two answers, one marked 1: advantages +1/2 and -1/2, and 1 and -1 as parts of their standard deviation."""
    trainer = make_trainer(data, encoder_folder, tmp_path, group_size=2, accumulation_steps=2, **flags)
    firsts, batches = {}, [first_batch(trainer), first_batch(trainer, 1)]
    trainer.rewarder = lambda answer, sample: float(firsts.setdefault(sample.where, answer) == answer)
    for module in trainer.run.model.modules():
        if hasattr(module, "alpha"):  # the routers' own loss is another for other rows
            module.alpha = 0
    monkeypatch.setattr(trainer, "step", lambda loss: torch.zeros(()))
    trainer.update(batches, 1e-3, 5, 0)
    model, temperature = trainer.run.model, trainer.settings.temperature
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    assert found
    firsts.clear()
    groups = [group for batch in batches for group in trainer.sample(trainer.decoder(), batch)]
    assert {abs(advantage) for group in groups for advantage in group.advantages} == {1.0 if "normalize" in flags else 0.5}
    tokens, loss = sum(len(group.sampled) for group in groups), 0
    assert sum(sum(group.advantages) for group in groups) == pytest.approx(0) and sum(len(group.answers) for group in groups) == 10
    assert ({len(group.answers) for group in groups} == {2}) != ("max_new_tokens" in flags)
    for group in groups:  # each answer in a row of its own
        for answer, advantage in zip(group.answers, group.advantages, strict=True):
            ids = torch.tensor([[*group.prompt.ids, *answer]])
            features = torch.stack([image.features for image in group.images]) if group.images else None
            starts = torch.tensor(group.prompt.image_starts, dtype=torch.int64)
            places = (starts[:, None] + torch.arange(196)).flatten()
            logits = model(ids, image_features=features, image_positions=places).logits[0, -len(answer) - 1 : -1] / temperature
            loss = loss + advantage * F.cross_entropy(logits, torch.tensor(answer), reduction="sum") / tokens
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_equal_answers_of_a_group_count_as_often_as_they_were_sampled(data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path, group_size=32, max_new_tokens=1)
    with torch.no_grad():  # a model of few words
        trainer.run.model.lm_head.weight.mul_(6)
    groups = trainer.sample(trainer.decoder(), first_batch(trainer))
    assert groups and any(count > 1 for group in groups for count in group.counts)
    for group in groups:
        assert sum(group.counts) == 32 and np.dot(group.counts, group.advantages) == pytest.approx(0, abs=1e-9)
    singly = [types.SimpleNamespace(**vars(group)) for group in groups]
    for group in singly:
        for name in ("answers", "sampled", "advantages"):  # of one token each
            setattr(group, name, [value for value, count in zip(getattr(group, name), group.counts, strict=True) for _ in range(count)])
        group.counts = [1] * 32
    head = trainer.run.model.lm_head.weight
    together, apart = (torch.autograd.grad(trainer.loss(chunk)[0], head)[0] for chunk in (groups, singly))
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [{}, {"use_moe": 1}, {"temperature": 1.3}, {"freeze_llm": 1}], ids=["dense", "moe", "tempered", "frozen"])
def test_sampling_and_training_agree_about_log_probabilities(data, encoder_folder, tmp_path, flags):
    trainer = make_trainer(data, encoder_folder, tmp_path, **flags)
    for _ in range(2):  # also after the weights have moved
        groups = trainer.sample(trainer.decoder(), first_batch(trainer, 16))
        assert {len(group.images) for group in groups} >= {0, 1, 2}
        loss, _ = trainer.loss(groups)
        for group in groups:
            torch.testing.assert_close(group.before, torch.tensor(group.sampled), rtol=0, atol=1e-5)
        (loss / 100).backward()
        trainer.step(loss)


def test_in_bf16_the_difference_is_told(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path, dtype="bfloat16")
    differences = [line["logp_difference"] for line in read_metrics(tmp_path, NAME) if line["logp_difference"] is not None]
    assert differences and 0 < max(differences) < 0.1


def test_several_steps_are_clipped_as_in_ppo(data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path, clip=0.2)
    groups = trainer.sample(trainer.decoder(), first_batch(trainer))
    trainer.loss(groups)
    now = [group.before for group in groups]
    for shift, kept in ((0.1, lambda a: np.exp(0.1) * a), (1.0, lambda a: 1.2 * a if a > 0 else np.e * a), (-1.0, lambda a: np.exp(-1) * a if a > 0 else 0.8 * a)):  # fmt: skip
        for group, own in zip(groups, now, strict=True):
            group.before = own - shift  # as if the tokens' probabilities had grown by this since
        loss, _ = trainer.loss(groups)
        expected = -sum(kept(advantage) * count * len(answer) for group in groups
                        for answer, advantage, count in zip(group.answers, group.advantages, group.counts, strict=True))  # fmt: skip
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_several_steps_go_further_than_one(data, encoder_folder, tmp_path):
    for steps in (1, 2):
        train(data, encoder_folder, tmp_path / str(steps), updates_per_batch=steps)
    one, two = (read_metrics(tmp_path / str(steps), NAME) for steps in (1, 2))
    assert one[0]["reward"] == two[0]["reward"]
    gains = []
    for steps in (1, 2):  # of the answers of the first update, by its formula, whose value before any step is 0
        trainer = make_trainer(data, encoder_folder, tmp_path / "again", updates_per_batch=steps, learning_rate=1e-3)
        batch = first_batch(trainer)
        groups = trainer.sample(trainer.decoder(), batch)
        trainer.loss(groups)
        trainer.update([batch], 1e-3, 4, 0)
        gains.append(-trainer.loss(groups)[0].item())
    assert gains[1] > gains[0] > 0


def test_the_distance_to_the_start_is_none_at_first_and_then_that_of_the_formula(data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path, kl=0.5)
    groups = trainer.sample(trainer.decoder(), first_batch(trainer))
    loss, _ = trainer.loss(groups)
    assert trainer.sums["kl"] == 0
    (loss / 10).backward()
    trainer.step(loss)
    for group in groups:
        group.before = None
    packed = pack(groups, 0, 196, torch.device("cpu"))
    own, start = (trainer.log_probabilities(model, packed)[0].detach().numpy() for model in (trainer.model, trainer.reference))
    counts = [count for group in groups for answer, count in zip(group.answers, group.counts, strict=True) for _ in answer]
    distance = float(((np.exp(start - own) - (start - own) - 1) * counts).sum())
    gain = sum(advantage * count * len(answer) for group in groups
               for answer, advantage, count in zip(group.answers, group.advantages, group.counts, strict=True))  # fmt: skip
    assert distance > 0 and trainer.loss(groups)[0].item() == pytest.approx(0.5 * distance - gain, rel=1e-3, abs=1e-4)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_tokens_come_as_often_as_their_probabilities_say():
    torch.manual_seed(0)
    logits, count = torch.randn(1, 7) * 2, 20_000
    chooser = TokenSampler(torch.from_numpy(np.random.default_rng(0).random((count, 1), np.float32)), 1.3)
    tokens = chooser(logits.expand(count, -1), list(range(count)))
    expected = (logits[0] / 1.3).softmax(-1)
    found = tokens.bincount(minlength=7) / count
    assert (found - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    chances = torch.tensor([pairs[0][0] for pairs in chooser.chosen])
    torch.testing.assert_close(chances, expected.log()[tokens])
    assert chooser.chosen[0][0][1] == pytest.approx(float(-(expected * expected.log()).sum()), rel=1e-4)


def test_answers_do_not_depend_on_who_shares_the_batch(data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path)
    def answers(batch) -> list[list[tuple]]:
        return [group.answers for group in trainer.sample(trainer.decoder(), batch)]

    together = answers(first_batch(trainer))
    assert together == [own for index in range(4) for own in answers(collate([trainer.run.dataset[index]], 0, 196))]
    trainer.state.update += 1
    assert answers(first_batch(trainer)) != together


def test_the_question_is_rendered_as_it_is_asked(data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path)
    for index in range(5):
        sample, example = trainer.run.dataset.samples[index], trainer.run.dataset[index]
        assert example.ids[:-1].tolist() == trainer.renderer.render_prompt(sample.turns[:-1]).ids.tolist()


@pytest.mark.parametrize("turns", [[("assistant", "Hello.")], [("user", "A?"), ("assistant", "B"), ("user", "<image>C?")],
                                   [("user", "word " * 700), ("assistant", "B")]])  # fmt: skip
def test_a_sample_without_a_question_is_a_bad_one(turns, data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path)
    with pytest.raises(SampleError):
        trainer.renderer.render(Sample(tuple(Turn(*turn) for turn in turns)), 640)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"kl": 0.1, "updates_per_batch": 2, "cache_features": 1}], ids=["plain", "all"])
def test_resumed_equals_uninterrupted_bit_for_bit_after_a_kill(data, encoder_folder, tmp_path, flags):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(data, encoder_folder, whole, epochs=3, save_interval=1, **flags)
    command = [sys.executable, str(REPOSITORY / "train_grpo_vlm.py"), *flags_of(data, encoder_folder, part, epochs=3, save_interval=1, **flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    read_until(process, " update 7/")
    kill_tree(process)
    process.wait()
    process.stderr.close()
    done = train(data, encoder_folder, part, epochs=3, save_interval=1, from_resume=1, **flags)
    assert int(re.search(r"(\d+) updates done", done.stderr)[1]) >= 6 and "not what an uninterrupted run" not in done.stderr
    assert_same(weights(whole, NAME), weights(part, NAME))
    assert [line["reward"] for line in read_metrics(whole, NAME)][7:-1] == [line["reward"] for line in read_metrics(part, NAME)][7:-1]


def test_two_processes_do_what_one_does_with_twice_the_batch(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path / "one", batch_size=4)
    command = flags_of(data, encoder_folder, tmp_path / "two", batch_size=2)
    done = run_script("train_grpo_vlm.py", *command, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / name, NAME) for name in ("one", "two"))
    for name in ("reward", "length", "useless_groups"):
        assert [line[name] for line in one] == pytest.approx([line[name] for line in two], abs=1e-6)
    for name, tensor in weights(tmp_path / "one", NAME).items():
        torch.testing.assert_close(weights(tmp_path / "two", NAME)[name].float(), tensor.float(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("reward", ["marks:too_much", "marks:broken"])
def test_a_rewarder_that_fails_ends_the_run_and_keeps_what_was_done(reward, data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path)
    failing = find_rewarder(reward)
    trainer.rewarder = lambda answer, sample: (failing if trainer.state.update > 2 else find_rewarder("marks:varied"))(answer, sample)
    with pytest.raises(TrainingFailed, match=r"--reward marks:varied failed at .*data.jsonl:\d+.* until update 3 is saved. Mend it"):
        trainer.train()
    assert train(data, encoder_folder, tmp_path, from_resume=1).stderr.count("3 updates done") == 1
    train(data, encoder_folder, tmp_path / "whole")
    states = [load_training_state(out / "checkpoints" / f"{NAME}_resume.pth")[0]["state"] for out in (tmp_path, tmp_path / "whole")]
    assert states[0]["read"] == states[1]["read"] == 22


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_rewarder_that_fails_on_one_rank_ends_both_and_what_was_done_is_saved(where, data, encoder_folder, tmp_path):
    (tmp_path / "marks.py").write_text(
        "def picky(answer, sample):\n    if '21' in sample.turns[-2].content: raise KeyError('not this one')\n    return len(answer) % 7 / 6\n")
    flags = {"eval_data_path": data[0], "eval_interval": 2} if where == "validation" else {}
    if where == "validation":
        path = write_jsonl(tmp_path / "some.jsonl", data[0].read_text().splitlines()[:20])
    command = flags_of((path, data[1]) if flags else data, encoder_folder, tmp_path, reward="marks:picky", **flags)
    done = run_script("train_grpo_vlm.py", *command, processes=2, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode and "--reward marks:picky failed at" in done.stderr and "Traceback" not in done.stderr.replace("Traceback (most recent call last):\n  File \"<frozen runpy>\"", "")
    assert (tmp_path / "checkpoints" / f"{NAME}_resume.pth").is_file()


def test_a_file_that_changes_ends_the_run_and_malformed_answers_are_a_bad_sample(data, encoder_folder, tmp_path):
    rows = [json.loads(line) for line in data[0].read_text().splitlines()]
    path = write_jsonl(tmp_path / "rows.jsonl", [row | ({"answers": []} if number == 3 else {}) for number, row in enumerate(rows)])
    trainer = make_trainer((path, data[1]), encoder_folder, tmp_path)
    sample = trainer.sample

    def changed(decoder, batch):
        if trainer.state.update == 4:
            write_jsonl(path, rows[::-1])
        return sample(decoder, batch)

    trainer.sample = changed
    with pytest.raises(TrainingFailed, match=r"the file has changed.* until update 4 is saved"):
        trainer.train()
    path = write_jsonl(tmp_path / "again.jsonl", [row | ({"answers": []} if number == 3 else {}) for number, row in enumerate(rows)])
    assert "'answers' must be a list" in train((path, data[1]), encoder_folder, tmp_path / "again").stderr


def test_a_rewarder_that_fails_at_once_leaves_what_was_trained_before(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path)
    before = weights(tmp_path, NAME)
    done = run(data, encoder_folder, tmp_path, reward="marks:broken")
    assert done.returncode == 1 and "error: --reward marks:broken failed at" in done.stderr and "Nothing was trained" in done.stderr
    assert_same(weights(tmp_path, NAME), before)


def test_weights_that_are_not_finite_end_the_run(data, encoder_folder, tmp_path):
    trainer = make_trainer(data, encoder_folder, tmp_path)
    trainer.step, step = lambda loss: step(loss * float("nan")), trainer.step
    with pytest.raises(TrainingFailed, match="3 updates in a row were not finite"):
        trainer.train()
    trainer = make_trainer(data, encoder_folder, tmp_path)
    trainer.run.model.model.norm.weight.data[:] = float("nan")
    with pytest.raises(TrainingFailed, match="probabilities of tokens are not finite"):
        trainer.train()


def test_ctrl_c_saves_and_validation_is_by_marks(data, encoder_folder, tmp_path):
    """The mark of greedy answers on held-out data is the score of the saved weights there."""
    path, pictures = make_data(tmp_path / "held", 9, seed=5)
    command = flags_of(data, encoder_folder, tmp_path, eval_data_path=path, eval_images_path=pictures, eval_interval=4, reward="format:.*[aeiou].*",
                       learning_rate=3e-2, epochs=4)  # fmt: skip
    process = subprocess.Popen([sys.executable, str(REPOSITORY / "train_grpo_vlm.py"), *command], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    read_until(process, " update 9/")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "stopped by SIGINT" in said
    lines = [line for line in read_metrics(tmp_path, NAME) if "eval_reward" in line]
    assert [line["update"] for line in lines] == [4, 8] and not any("eval_loss" in line for line in lines)
    assert all(len(line["samples"]) == 3 for line in lines)
    best = max(lines, key=lambda line: line["eval_reward"])
    assistant = load_assistant("model", tmp_path / "out" / f"{NAME.replace('_32', '_best_32')}.pth", "cpu", str(encoder_folder))
    images = open_images(pictures)
    for sample in best["samples"]:
        turns = (Turn("user", "<image>\n" * bool(sample["image"]) + sample["question"]),)
        if sample["image"].count(",") == 0:
            shown = [images.pixels(name, "") for name in filter(None, [sample["image"]])]
            assert assistant.generate([turns], shown, types.SimpleNamespace(**GREEDY)) == [sample["answer"]]


GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "seed": 0}


def test_a_state_of_another_script_is_refused(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path)
    done = run_script("train_sft_vlm.py", *training_flags(data, encoder_folder, tmp_path, save_weight="grpo_vlm", from_resume=1))
    assert done.returncode == 2 and "saved by another training script" in done.stderr
    done = run(data, encoder_folder, tmp_path, kl=0.1, from_resume=1)
    assert done.returncode == 2 and "without the weights at the start" in done.stderr


@pytest.mark.parametrize(("flags", "told"), [
    ({"group_size": 1}, "at least 2"), ({"kl": -1}, "--kl -1.0"), ({"temperature": 0}, "--temperature 0.0"), ({"reward": "nothing"}, "known are"),
    ({"reward": "marks:missing"}, "AttributeError"), ({"reward": "no_module:f"}, "ModuleNotFoundError"), ({"reward": "format:["}, "expression"),
    ({"eval_blind": 1}, "measures losses"),
])  # fmt: skip
def test_wrong_settings_are_named(flags, told, data, encoder_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config("", DEFAULTS, flags_of(data, encoder_folder, tmp_path, **flags), GRPOConfig)
    assert ended.value.code == 2 and told in capsys.readouterr().err


# --- rewarders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "right"), [
    ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("B) a cat", 1), ("B: a cat", 1), ("The answer is B.", 1), ("Answer: b", 1), ("", 0), ("C", 0),
    ("A cat", 0), ("Because", 0), ("Option (b)", 1), ("I choose option C, not B", 0), ("B, a cat", 1), ("B - a cat", 1), ("B\nbecause", 1), ("**B**", 1),
    ("The answer is b. a cat", 1), ("The answer is b", 1), ("The answer is a cat", 0), ("the choice a person makes", 0), ("The answer is A cat", 0),
])  # fmt: skip
def test_a_choice_is_its_letter(answer, right):
    assert choice(answer, Sample(tuple(RIGHT))) == right == choice(answer, Sample((RIGHT[0], Turn("assistant", "B. a cat"))))


def test_rewarders_by_name():
    sample = Sample((RIGHT[0], Turn("assistant", "two")), answers=["two", "2"])
    assert [find_rewarder(name)("2", sample) for name in ("exact", "vqa", r"format:\d", "format:x", "marks:same")] == [1, 1, 1, 0, 1]
    assert find_rewarder("exact")("Two.", sample) == 0 and find_rewarder("vqa")("Two.", sample) == 1
    assert mark(find_rewarder("marks:same"), "", sample) == 1
    with pytest.raises(ValueError, match="0, 1"):
        mark(find_rewarder("marks:too_much"), "", sample)
    with pytest.raises(UsageError, match="no function"):
        find_rewarder("marks:__name__")
