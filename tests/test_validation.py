"""Validation: held-out samples are never trained on, the loss is the plain one, and training does not notice."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from dataset.images import ImageSource, open_images
from dataset.others import WithOthers
from dataset.sources import Mixture, open_samples
from dataset.vlm_dataset import Example, VLMDataset, collate
from model.conversation import Renderer
from model.errors import UsageError
from model.pixels import CLIP, CLIP_MEAN, normalize
from model.weights import load_weights, save_weights
from tests.conftest import REPOSITORY, make_data, make_model, read_metrics, run_script, training_flags, write_jsonl
from tests.test_training import NAME, assert_same, make_trainer, train, weights
from trainer import distributed, resume
from trainer.build import build
from trainer.config import parse_config
from trainer.guards import StopRequest, TrainingFailed
from trainer.loop import Trainer
from trainer.main import claim_outputs

BEST = "sft_vlm_best_32"
LOSSES = ("eval_loss", "eval_loss_seen", "eval_loss_blank", "eval_loss_shuffled")
EVERY = {"save_weight": "sft_vlm", "eval_data_path": "0.3", "eval_interval": 3, "epochs": 3}


@pytest.fixture(scope="module")
def held_out_data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("held_out"), 9, seed=5)


def validations(out) -> list[dict]:
    return [line for line in read_metrics(out, NAME) if "eval_loss" in line]


def plain_mean(trainer, numbers) -> float:
    """Mean cross-entropy over the supervised tokens of these samples, one at a time, all logits computed."""
    dataset, model = trainer.validation.run.dataset, trainer.run.model.eval()
    total, supervised = 0.0, 0
    with torch.no_grad():
        for number in numbers:
            batch = collate([dataset[number]], 0, 196)
            features = model.encode_images(normalize(batch.pixels)).bfloat16().float()[batch.image_index] if len(batch.pixels) else None
            logits = model(batch.ids, image_features=features, image_positions=batch.image_positions).logits
            total += F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).item() * batch.supervised
            supervised += batch.supervised
    model.train()
    return total / supervised


# --- what is held out -------------------------------------------------------------------------------------------------


class Numbers:
    """A source of `size` samples, of which only the numbers matter."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.floats(0.01, 0.99), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_an_epoch_takes_every_sample_that_is_not_held_out_and_no_other(sources, part, seed):
    samples = Mixture([Numbers(size) for size in sources], [1.0] * len(sources))
    held = samples.hold_out(part, seed)
    bounds = samples.bounds
    counts = [int(((begin <= held) & (held < end)).sum()) for begin, end in itertools.pairwise(bounds)]
    assert counts == [min(round(size * part), size - 1) for size in sources]
    for epoch in range(3):
        order = samples.order(seed, epoch)(np.arange(samples.epoch_size))
        assert sorted([*order.tolist(), *held.tolist()]) == list(range(len(samples)))


def test_what_is_held_out_depends_on_the_seed_alone_and_weights_leave_it_out():
    make = lambda: Mixture([Numbers(50), Numbers(40)], [0.5, 2.0])  # noqa: E731
    samples, again, other = make(), make(), make()
    held = samples.hold_out(0.2, 1)
    assert np.array_equal(held, again.hold_out(0.2, 1)) and not np.array_equal(held, other.hold_out(0.2, 2))
    assert samples.epoch_size == 20 + 64
    both = np.concatenate([samples.order(1, epoch)(np.arange(84)) for epoch in range(2)])
    assert set(both) == set(range(90)) - set(held), "two epochs of half are one of all"


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--eval_data_path", "1.5"], "between 0 and 1"), (["--eval_data_path", "0"], "between 0 and 1"),
     (["--eval_data_path", "nan"], "between 0 and 1"), (["--eval_interval", "5"], "needs --eval_data_path"),
     (["--eval_data_path", "0.1", "--eval_interval", "-1"], "negative"),
     (["--eval_data_path", "0.1", "--eval_images_path", "x"], "--images_path"), (["--save_weight", "x_best"], "best weights")],
)  # fmt: skip
def test_flags_that_make_no_sense_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_config("", {}, flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_data_that_cannot_be_validated_on_are_refused(data, encoder_folder, tmp_path):
    for value, message in ((tmp_path / "no.jsonl", "--eval_data_path: no data at"), (0.01, "holds out none of 22 samples")):
        with pytest.raises(UsageError, match=message):
            make_trainer(data, encoder_folder, tmp_path, eval_data_path=value)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [0, 1])
def test_the_loss_is_the_plain_mean_over_the_held_out_samples(data, encoder_folder, tmp_path, moe):
    trainer = make_trainer(data, encoder_folder, tmp_path, eval_data_path=0.3, use_moe=moe, batch_size=3)
    trained = set()
    update = trainer.update
    trainer.update = lambda batches, *rest: (trained.update(i for b in batches for i in b.indices), update(batches, *rest))
    trainer.train_epochs(1, StopRequest())
    held = set(range(22)) - trained
    assert len(held) == 7
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    loss = trainer.validation.measure(StopRequest())[0]["eval_loss"]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert abs(loss - plain_mean(trainer, held)) < 1e-5
    assert trainer.run.model.training and not trainer.run.model.vision_encoder.training


def test_answers_are_what_the_model_says_to_held_out_questions(data, encoder_folder, tmp_path):
    """Against transformers' generate, one question at a time."""
    trainer = make_trainer(data, encoder_folder, tmp_path, eval_data_path=0.3)
    trainer.train_epochs(1, StopRequest())
    (_, said, *_), rows = trainer.validation.measure(StopRequest()), data[0].read_text().splitlines()
    assert len(said) == 3
    model, dataset = trainer.run.model.eval(), trainer.run.dataset
    for answer in said:
        number = int(answer["where"].rpartition(":")[2]) - 1
        (question, reference), image = json.loads(rows[number])["conversations"], json.loads(rows[number]).get("image", "")
        assert number in dataset.samples.held_out
        assert question["content"].replace("<image>", "").strip() == answer["question"]
        assert (reference["content"], image) == (answer["reference"], answer["image"])
        prompt = dataset.renderer.render_prompt(dataset.samples[number].turns[:1])
        pixels = [image.pixels for image in dataset[number].images]
        images = {"image_features": model.encode_images(normalize(torch.stack(pixels))).bfloat16().float(),
                  "image_positions": torch.cat([torch.arange(196) + start for start in prompt.image_starts])} if pixels else {}  # fmt: skip
        ids = model.generate(inputs_embeds=model.embed(torch.from_numpy(prompt.ids)[None], **images), max_new_tokens=32,
                             do_sample=False, pad_token_id=0, eos_token_id=dataset.renderer.im_end)[0]  # fmt: skip
        assert dataset.renderer.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd") == answer["answer"]


def test_two_processes_measure_the_loss_of_one(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path / "one", batch_size=4, **EVERY)
    train(data, encoder_folder, tmp_path / "two", batch_size=2, processes=2, **EVERY)
    one, two = ([[line[name] for name in ("update", *LOSSES)] for line in validations(tmp_path / name)] for name in ("one", "two"))
    assert [update for update, *_ in one] == [update for update, *_ in two] == [3, 6, 9, 12]
    assert np.abs(np.array(one) - two).max() < 1e-4


# --- what seeing is worth ---------------------------------------------------------------------------------------------


def losses_of(data, encoder_folder, out, rows=None, folder=None, **flags) -> dict[str, float]:
    """Validation losses of the same random weights on these rows and images."""
    held = data[0] if rows is None else write_jsonl(out / "held.jsonl", rows)
    trainer = make_trainer(data, encoder_folder, out, eval_data_path=held, eval_images_path=folder or data[1], **flags)
    return trainer.validation.losses(StopRequest())


def read_rows(data) -> list[dict]:
    return [json.loads(line) for line in data[0].read_text().splitlines()]


def with_others(data, tiles: int = 0, rows=None) -> WithOthers:
    """The samples of a file with others' images."""
    samples = open_samples(data[0])
    renderer = Renderer(AutoTokenizer.from_pretrained(REPOSITORY / "model"))
    dataset = VLMDataset(samples, open_images(data[1]), renderer, 4000, None, replace(CLIP, tiles=tiles))
    return WithOthers(dataset, range(len(samples)), 42)


@pytest.fixture(scope="module")
def noise_data(tmp_path_factory):
    """As `data`, with a colour of its own in every image, by which it is known; they have different shapes."""
    folder = tmp_path_factory.mktemp("noise")
    path, pictures = make_data(folder, 12, seed=3)
    for number, file in enumerate(sorted(pictures.iterdir())):
        Image.new("RGB", (60 + 25 * number, 60), (10 * number, 255 - 10 * number, 100)).save(file)
    return path, pictures


def test_blank_images_are_images_of_the_mean_colour(data, encoder_folder, tmp_path):
    losses = losses_of(data, encoder_folder, tmp_path)
    for name in os.listdir(data[1]):
        (tmp_path / "blank").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), tuple(round(255 * mean) for mean in CLIP_MEAN)).save(tmp_path / "blank" / name)
    blank = losses_of(data, encoder_folder, tmp_path, folder=tmp_path / "blank")
    assert losses["eval_loss_blank"] == pytest.approx(blank["eval_loss_seen"], abs=1e-5)
    assert abs(losses["eval_loss_blank"] - losses["eval_loss_seen"]) > 1e-3, "else the test tells nothing"
    assert blank["eval_loss_blank"] == pytest.approx(blank["eval_loss_seen"], abs=1e-5)


@pytest.mark.parametrize("tiles", [0, 4])
def test_others_are_as_many_and_none_of_a_samples_own(noise_data, tiles):
    rows, files = read_rows(noise_data), {}
    for file in noise_data[1].iterdir():
        with Image.open(file) as image:
            files[image.getpixel((0, 0))] = file.name
    dataset, shown, swapped = with_others(noise_data, tiles), [], []
    views = {image.pixels[:, 0, 0].numpy().tobytes() for example in map(dataset.__getitem__, range(len(rows))) for image in example.images}
    assert len(views) == len(files)
    for number, row in enumerate(rows):
        example, own = dataset[number], row["image"].split(", ") if row.get("image") else []
        names = [files[tuple(image.pixels[:, 0, 0].tolist())] for image in example.others]
        assert len(names) == len(example.images) == len(example.image_starts) and not set(names) & set(own), row
        shown, swapped = shown + own, swapped + names
    if not tiles:  # then each image has one view, and is the next of one or two others
        assert len(set(swapped)) > len(set(shown)) / 2


def test_the_loss_with_others_images_is_that_of_data_in_which_they_are_swapped(noise_data, encoder_folder, tmp_path):
    rows, dataset, swapped = read_rows(noise_data), with_others(noise_data), []
    files = {tuple(dataset.images.pixels(file.name, "")[:, 0, 0].tolist()): file.name for file in noise_data[1].iterdir()}
    for number, row in enumerate(rows):
        names = [files[tuple(image.pixels[:, 0, 0].tolist())] for image in dataset[number].others]
        swapped.append(row | ({"image": names} if names else {}))
    losses = losses_of(noise_data, encoder_folder, tmp_path)
    other = losses_of(noise_data, encoder_folder, tmp_path, rows=swapped)
    assert losses["eval_loss_shuffled"] == pytest.approx(other["eval_loss_seen"], abs=1e-5)
    assert abs(losses["eval_loss_shuffled"] - losses["eval_loss_seen"]) > 1e-4 and losses.keys() == set(LOSSES)


def test_samples_without_images_are_left_out(data, encoder_folder, tmp_path):
    """And with images in all samples, what is seen is the whole loss."""
    losses = losses_of(data, encoder_folder, tmp_path)
    alone = losses_of(data, encoder_folder, tmp_path, rows=[row for row in read_rows(data) if row.get("image")])
    assert alone.keys() == set(LOSSES) - {"eval_loss_seen"} and losses["eval_loss"] != losses["eval_loss_seen"]
    assert alone["eval_loss"] == pytest.approx(losses["eval_loss_seen"], abs=1e-5)
    for name in ("eval_loss_blank", "eval_loss_shuffled"):
        assert alone[name] == pytest.approx(losses[name], abs=1e-5)


def test_batches_and_the_feature_cache_change_nothing(data, encoder_folder, tmp_path):
    losses = losses_of(data, encoder_folder, tmp_path, batch_size=1)
    for flags in ({"batch_size": 5}, {"cache_features": 1}, {"cache_features": 1, "batch_size": 3}):
        assert losses_of(data, encoder_folder, tmp_path, **flags) == pytest.approx(losses, abs=1e-5)


def test_where_there_is_nothing_to_compare_with(data, encoder_folder, tmp_path):
    rows = read_rows(data)
    assert losses_of(data, encoder_folder, tmp_path, rows=[row for row in rows if not row.get("image")]).keys() == {"eval_loss"}
    one = [row | {"image": "1_0.png"} for row in rows if row.get("image", "").count(",") == 0 and row.get("image")]
    assert losses_of(data, encoder_folder, tmp_path, rows=one).keys() == {"eval_loss", "eval_loss_blank"}, "the same image everywhere"
    assert losses_of(data, encoder_folder, tmp_path, eval_blind=0).keys() == {"eval_loss"}


def test_an_image_that_cannot_be_read_is_no_others(noise_data, tmp_path):
    """Nor one of a sample that cannot be read; those who would get it get the next."""
    shutil.copytree(noise_data[1], tmp_path / "pictures")
    broken = {name for row in read_rows(noise_data)[:5] for name in row.get("image", "").split(", ") if name}
    for name in broken:
        (tmp_path / "pictures" / name).write_bytes(b"no image")
    path = write_jsonl(tmp_path / "data.jsonl", ["{", *read_rows(noise_data)])
    examples = [item for item in map(with_others((path, tmp_path / "pictures")).__getitem__, range(13)) if isinstance(item, Example)]
    assert len(examples) < 12 and broken
    assert all(len(example.others) == len(example.images) for example in examples) and any(example.others for example in examples)


def test_training_does_not_notice_the_blind_losses(data, encoder_folder, tmp_path, capsys):
    """Bit for bit; and the loss of which the best weights are chosen is the same."""
    for blind in (0, 1):
        run_here(data, encoder_folder, tmp_path / str(blind), eval_blind=blind)
    assert_same(weights(tmp_path / "0"), weights(tmp_path / "1"))
    assert_same(weights(tmp_path / "0", BEST), weights(tmp_path / "1", BEST))
    off, on = (validations(tmp_path / name) for name in "01")
    assert [line["eval_loss"] for line in off] == [line["eval_loss"] for line in on]
    assert not set(LOSSES[1:]) & set(off[-1]) and all(line[name] > 0 for line in on for name in LOSSES)
    seen, unseen, swapped = (on[-1][name] for name in LOSSES[1:])
    assert (f"update 24/24 validation loss {on[-1]['eval_loss']:.4f} (of samples with images {seen:.4f}, blank images {unseen:.4f},"
            f" others' images {swapped:.4f}: images lower the loss by {unseen - seen:.2f} nats a token)") in capsys.readouterr().err


# --- training does not notice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [0, 1])
def test_training_with_validation_is_training_without_it(data, held_out_data, encoder_folder, tmp_path, cached):
    """Bit for bit: losses, weights, optimizer, random states."""
    flags = {"save_weight": "sft_vlm", "epochs": 2, "cache_features": cached, "accumulation_steps": 2}
    make_trainer(data, encoder_folder, tmp_path / "plain", **flags).train()
    make_trainer(data, encoder_folder, tmp_path / "watched", eval_data_path=held_out_data[0], eval_images_path=held_out_data[1],
                 eval_interval=2, **flags).train()  # fmt: skip
    figures = ("update", "epoch", "loss", "aux_loss", "learning_rate", "bad_samples")
    plain, watched = ([[line[name] for name in figures] for line in read_metrics(tmp_path / name, NAME) if "loss" in line]
                      for name in ("plain", "watched"))  # fmt: skip
    assert plain == watched and len(plain) == 12 and len(validations(tmp_path / "watched")) == 6
    a, b = (resume.load_training_state(tmp_path / name / "checkpoints" / f"{NAME}_resume.pth")[0] for name in ("plain", "watched"))
    assert_same(a["model"], b["model"])
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "watched"))
    assert torch.equal(a["rng"], b["rng"])
    for one, other in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert_same(one, other)


def test_cached_images_of_the_validation_are_encoded_once(data, held_out_data, encoder_folder, tmp_path, monkeypatch):
    trainer = make_trainer(data, encoder_folder, tmp_path, eval_data_path=held_out_data[0], eval_images_path=held_out_data[1],
                           cache_features=1)  # fmt: skip
    first = trainer.validation.losses(StopRequest())

    def forbidden(*_):
        raise AssertionError("an image was read or encoded again")

    monkeypatch.setattr(trainer.run.model, "encode_images", forbidden)
    monkeypatch.setattr(ImageSource, "load", forbidden)
    assert trainer.validation.losses(StopRequest()) == first


# --- resume -----------------------------------------------------------------------------------------------------------


def run_here(data, encoder_folder, out, before_validation=None, after_update: int = 0, **flags) -> int:
    """A whole run in this process. `after_update`: a SIGINT comes then; `before_validation`: or in the n-th validation."""
    trainer = make_trainer(data, encoder_folder, out, **{**EVERY, **flags})
    log, measure, count = trainer.log_if_due, trainer.validation.measure, 0

    def logging(learning_rate):
        log(learning_rate)
        if trainer.state.update == after_update:
            os.kill(os.getpid(), signal.SIGINT)

    def measuring(stop):
        nonlocal count
        count += 1
        if count == before_validation:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(stop)

    trainer.log_if_due, trainer.validation.measure = logging, measuring
    trainer.train()
    return trainer.state.update


def strip(out) -> list[dict]:
    return [{name: line.get(name) for name in ("update", "loss", "eval_loss", "best", "samples")} for line in read_metrics(out, NAME)]


def test_a_resumed_run_validates_as_an_uninterrupted_one(data, encoder_folder, tmp_path):
    """Stopped between two validations, in the middle of one, and in the middle of the last, after the last update."""
    flags = {"learning_rate": 1.0}  # too high: a loss is not always the lowest so far
    total = run_here(data, encoder_folder, tmp_path / "whole", **flags)
    part = tmp_path / "part"
    assert run_here(data, encoder_folder, part, after_update=7, **flags) == 7
    assert run_here(data, encoder_folder, part, before_validation=2, from_resume=1, **flags) == 12
    assert [line["update"] for line in validations(part)] == [3, 6, 9]
    assert run_here(data, encoder_folder, part, before_validation=5, from_resume=1, **flags) == total == 24
    assert [line["update"] for line in validations(part)] == [3, 6, 9, 12, 15, 18, 21]
    assert run_here(data, encoder_folder, part, from_resume=1, **flags) == total
    assert run_here(data, encoder_folder, part, from_resume=1, **flags) == total, "nothing left to do"
    assert strip(tmp_path / "whole") == strip(part) and len(validations(part)) == 8
    assert {line["best"] for line in validations(part)} == {True, False}
    assert_same(weights(tmp_path / "whole"), weights(part))
    assert_same(weights(tmp_path / "whole", BEST), weights(part, BEST))


def test_a_resume_with_another_fraction_is_refused(data, encoder_folder, tmp_path):
    run_here(data, encoder_folder, tmp_path, after_update=2)
    for value in ("0.31", data[0]):
        with pytest.raises(UsageError, match="samples would be held out and trained on"):
            make_trainer(data, encoder_folder, tmp_path, **{**EVERY, "eval_data_path": value, "from_resume": 1})


def run_by_default(data, encoder_folder, out, **flags) -> Trainer:
    """A whole run in this process without --dtype; `after_update`: up to a SIGINT."""
    after_update = flags.pop("after_update", 0)
    settings = {"save_weight": "sft_vlm", "epochs": 2} | flags
    config = parse_config("", {}, training_flags(data, encoder_folder, out, num_workers=0, **settings))
    trainer = Trainer(build(replace(config, dtype=None), distributed.start("cpu")))
    log = trainer.log_if_due

    def logging(learning_rate):
        log(learning_rate)
        if trainer.state.update == after_update:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.log_if_due = logging
    trainer.train()
    return trainer


@pytest.mark.parametrize("fast", [True, False])
def test_a_resume_keeps_the_number_format_whatever_the_machine_measures(data, encoder_folder, tmp_path, monkeypatch, capsys, fast):
    """Bit for bit, and the feature cache stays: also of a new run, unless --dtype asks for another format."""
    part, name = tmp_path / "part", "bfloat16" if fast else "float32"
    monkeypatch.setattr("trainer.build.bf16_is_fast", lambda *_: fast)
    run_by_default(data, encoder_folder, tmp_path / "whole", cache_features=1)
    run_by_default(data, encoder_folder, part, cache_features=1, after_update=5)
    assert json.loads((part / "out" / f"{NAME}.json").read_text())["training"]["dtype"] == name
    monkeypatch.setattr("trainer.build.bf16_is_fast", lambda *_: not fast)
    capsys.readouterr()
    resumed = run_by_default(data, encoder_folder, part, cache_features=1, from_resume=1)
    assert resumed.run.config.dtype == name and resumed.run.cache.key.dtype == name
    assert_same(weights(tmp_path / "whole"), weights(part))
    assert [line["loss"] for line in read_metrics(part, NAME)] == [line["loss"] for line in read_metrics(tmp_path / "whole", NAME)]
    filled = resumed.run.cache.filled()
    again = run_by_default(data, encoder_folder, part, cache_features=1, after_update=1)
    told = capsys.readouterr().err
    assert again.run.config.dtype == name and again.run.cache.filled() == filled > 0
    assert f"notice: {name}, as the images in the feature cache" in told and "from scratch:" not in told and "not what" not in told
    other = "float32" if fast else "bfloat16"
    assert make_trainer(data, encoder_folder, part, dtype=other, cache_features=1).run.cache.filled() == 0
    assert "starts from scratch: it was made with another encoder or format: {'encoder'" in (told := capsys.readouterr().err) and name in told
    assert make_trainer(data, encoder_folder, part, dtype=other, from_resume=1, save_weight="sft_vlm").run.config.dtype == other
    assert f"--dtype {name} -> {other}" in capsys.readouterr().err


def test_a_resume_on_another_number_of_threads_says_so(data, encoder_folder, tmp_path, capsys):
    """By others, sums are rounded otherwise."""
    try:
        for threads, flags in ((2, {"after_update": 5}), (1, {"from_resume": 1})):
            torch.set_num_threads(threads)
            run_here(data, encoder_folder, tmp_path, **flags)
        assert "notice: not what an uninterrupted run would do: 2 -> 1 threads" in capsys.readouterr().err
    finally:
        torch.set_num_threads(2)


# --- the best weights -------------------------------------------------------------------------------------------------


def test_the_weights_of_the_lowest_loss_are_kept_apart(data, encoder_folder, tmp_path):
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Quite another matter, told at some length."}]
    other = write_jsonl(tmp_path / "other.jsonl", [{"conversations": turns}] * 2)
    flags = {"eval_data_path": other, "eval_interval": 2, "epochs": 2, "learning_rate": 0.03}
    run_here(data, encoder_folder, tmp_path, **flags)
    losses = {line["update"]: line["eval_loss"] for line in validations(tmp_path)}
    best = min(losses, key=losses.get)
    assert best != max(losses), "training went on to worse"
    assert [line["best"] for line in validations(tmp_path)] == [
        loss == min(list(losses.values())[: number + 1]) for number, loss in enumerate(losses.values())]  # fmt: skip
    sidecar = json.loads((tmp_path / "out" / f"{BEST}.json").read_text())
    assert sidecar["progress"]["update"] == sidecar["progress"]["best_update"] == best
    assert sidecar["progress"]["best_loss"] == losses[best]
    last = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())["progress"]
    assert (last["update"], last["best_update"], last["best_loss"]) == (22, best, losses[best])
    trainer = make_trainer(data, encoder_folder, tmp_path, **EVERY | flags)
    load_weights(tmp_path / "out" / f"{BEST}.pth", trainer.run.model)
    assert abs(trainer.validation.losses(StopRequest())["eval_loss"] - losses[best]) < 1e-2, "but for fp16"
    done = run_script("eval_vlm.py", "--save_dir", tmp_path / "out", "--weight", "sft_vlm_best", "--hidden_size", 32,
                      "--num_hidden_layers", 2, "--vision_model_path", encoder_folder, "--image_dir", data[1],
                      "--score", data[0], "--max_new_tokens", 2, "--device", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "sft_vlm_best_32_predictions.jsonl").read_text().splitlines()) == 22


def test_what_a_killed_writer_of_the_best_weights_left_is_removed(data, encoder_folder, tmp_path):
    out = tmp_path / "out"
    config = parse_config("", {}, training_flags(data, encoder_folder, tmp_path, **EVERY))
    save_weights(config.best_file, make_model(), {"progress": 1})
    for ending in ("pth", "json"):
        (out / f".{BEST}.{ending}.abc.tmp").write_text("half")
    locks = claim_outputs(config, distributed.start("cpu"))
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]
    assert {os.path.basename(lock.lock_file) for lock in locks} >= {f".{BEST}.lock", f".{NAME}.lock"}
    for lock in locks:
        lock.release()


def test_bad_samples_of_the_validation_are_named_and_too_many_end_the_run(data, encoder_folder, tmp_path, capsys):
    rows = data[0].read_text().splitlines()
    for good, bad, told in ((6, 10, None), (6, 11, "11 of 17 samples read were bad"), (0, 2, "2 of 2 samples read were bad, all of them")):
        held = write_jsonl(tmp_path / "bad.jsonl", [*rows[:good], *['{"conversations": 3}'] * bad])
        trainer = make_trainer(data, encoder_folder, tmp_path, eval_data_path=held)
        with pytest.raises(TrainingFailed, match=told) if told else contextlib.nullcontext():
            assert np.isfinite(list(trainer.validation.losses(StopRequest()).values())).all()
        assert f"bad.jsonl:{good + 1}: 'conversations' is missing" in capsys.readouterr().err
