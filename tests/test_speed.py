"""Every optimization of training computes what the baseline computes."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.synthetic import write_data
from dataset.features import CacheKey, FeatureCache
from dataset.images import ImageSource, open_images
from dataset.jsonl import JsonlSamples
from dataset.vlm_dataset import VLMDataset, collate
from model.errors import DataError
from model.layers import attention_in_blocks
from model.model_minimind import MiniMindConfig, find_loss_positions
from model.moe import MOEFeedForward
from model.pixels import CLIP_MEAN, CLIP_STD, normalize
from tests.conftest import (
    REPOSITORY,
    make_data,
    make_model,
    make_vision_encoder,
    read_metrics,
    training_flags,
    write_jsonl,
)
from tests.test_minimal import PlainExperts
from tests.test_training import NAME, assert_same, make_trainer, train, weights
from trainer.guards import StopRequest
from trainer.sampler import ResumableSampler


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= tolerance * max(1e-3, b[name].norm()), name


@pytest.fixture
def batch(data, renderer):
    """Eight samples, with none, one or two images each, some rows padded."""
    dataset = VLMDataset(JsonlSamples(data[0]), open_images(data[1]), renderer, 640)
    return collate(dataset.__getitems__(list(range(8))), 0, 196)


def forward(model, batch, **more):
    features = model.encode_images(normalize(batch.pixels))[batch.image_index]
    return model(batch.ids, labels=batch.labels, loss_positions=batch.loss_positions, image_features=features,
                 image_positions=batch.image_positions, token_mask=batch.attention_mask, **more)  # fmt: skip


# --- the decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 7, 128, 129, 300])
def test_attention_in_blocks_is_scaled_dot_product_attention(T):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16, requires_grad=True) for heads in (8, 2, 2))
    ours, expected = attention_in_blocks(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(ours, expected, atol=1e-5)
    weight = torch.randn_like(ours)
    for mine, right in zip(torch.autograd.grad((ours * weight).sum(), (q, k, v)),
                           torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):  # fmt: skip
        assert torch.allclose(mine, right, atol=1e-5)


def test_labels_may_be_searched_or_given(batch):
    model = make_model(encoder=make_vision_encoder()).eval()
    with torch.no_grad():
        given, searched = forward(model, batch), forward(model, replace(batch, loss_positions=None))
    assert torch.equal(find_loss_positions(batch.labels), batch.loss_positions)
    assert torch.equal(given.logits, searched.logits.flatten(0, 1)[batch.loss_positions])
    assert given.loss.item() == pytest.approx(searched.loss.item(), rel=1e-6)


@pytest.mark.parametrize("moe", [False, True])
def test_gradient_checkpointing_changes_nothing(batch, moe):
    model = make_model(encoder=make_vision_encoder(), use_moe=moe).train()
    found = []
    for _ in range(2):
        out = forward(model, batch)
        (out.loss + (out.aux_loss if moe else 0)).backward()
        found.append((out.loss.detach(), gradients(model)))
        model.zero_grad()
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[1][1], found[0][1], 1e-6)


@pytest.mark.parametrize("tokens", [30, 1])  # one token: two of the four experts get none
def test_experts_sorted_looped_and_grouped_agree(tokens):
    torch.manual_seed(0)
    layer = MOEFeedForward(MiniMindConfig(hidden_size=64, use_moe=True)).train()
    layer.token_mask = None
    x, weight = torch.randn(1, tokens, 64), torch.randn(1, tokens, 64)
    found = []
    for way in (lambda: layer(x), lambda: (PlainExperts.forward(layer, x), layer.aux_loss), "grouped"):
        if way == "grouped":
            layer.run_apart, way = layer.run_grouped, lambda: layer(x)
        out, aux_loss = way()
        ((out * weight).sum() + aux_loss).backward()
        found.append((out.detach(), {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}))
        layer.zero_grad()
    for out, grads in found[1:]:
        assert torch.allclose(out, found[0][0], atol=1e-5)
        for name, grad in grads.items():
            assert torch.allclose(grad, found[0][1][name], atol=1e-5), name
    assert all(p.grad is not None for p in layer.parameters()) or len(found[0][1]) == len(list(layer.parameters()))


@pytest.mark.slow
def test_compiled_training_is_the_same_and_does_not_compile_again_and_again(data, encoder_folder, tmp_path):
    """Batches of all lengths, in a run that is stopped and resumed; needs a C++ compiler."""
    train(data, encoder_folder, tmp_path / "plain", epochs=2)
    done = train(data, encoder_folder, tmp_path / "compiled", epochs=1, use_compile=1)
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train_sft_vlm.py"),
         *training_flags(data, encoder_folder, tmp_path / "again", epochs=2, use_compile=1)],
        env={**os.environ, "TORCH_LOGS": "recompiles", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.count("Recompiling function") <= 8  # far fewer than lengths and blocks
    a, b = (read_metrics(tmp_path / name, NAME) for name in ("plain", "again"))
    assert np.abs(np.array([line["loss"] for line in a]) - [line["loss"] for line in b]).max() < 1e-4
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "again").keys()


# --- the order of samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "batch_size"), [("pretrain", 16), ("sft", 4)])
def test_padding_is_at_most_a_twentieth(tmp_path, tokenizer, renderer, stage, batch_size):
    path, images = write_data(tmp_path, stage, 1500, tokenizer, images=2)
    samples = JsonlSamples(path)
    dataset = VLMDataset(samples, open_images(images), renderer, 1536)
    sampler = ResumableSampler(1500, batch_size, 1, seed=0, lengths=lambda indices: samples.lengths(indices, 196))
    real = cells = 0
    for (micro_batch,) in list(sampler.updates(0))[:60]:
        batch = collate(dataset.__getitems__(micro_batch), 0, 196)
        real, cells = real + batch.tokens, cells + batch.ids.numel()
    assert 1 - real / cells < 0.05
    unsorted = ResumableSampler(1500, batch_size, 1, seed=0)
    sorted_order, order = (np.concatenate(list(own.samples(0))).tolist() for own in (sampler, unsorted))
    assert sorted_order != order and sorted(sorted_order) == list(range(1500))


def test_ranks_get_like_loads():
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 900, 4096)
    ranks = [ResumableSampler(4096, 4, 1, 0, rank, 4, lengths.take) for rank in range(4)]
    loads = np.array([[lengths[micro_batch].sum() for (micro_batch,) in sampler.updates(1)] for sampler in ranks])
    assert (loads.max(0) / loads.mean(0)).mean() < 1.02


def test_another_number_of_ranks_takes_up_the_same_order():
    """What one rank leaves of an epoch, three ranks finish: the grain of the order stays that of the start."""
    lengths = np.random.default_rng(0).integers(10, 99, 500)
    first = ResumableSampler(500, 4, 2, 3, lengths=lengths.take)
    done = [number for update in list(first.updates(0))[:20] for micro_batch in update for number in micro_batch]
    rest = []
    for rank in range(3):
        sampler = ResumableSampler(500, 4, 2, 3, rank, 3, lengths.take)
        sampler.grain = first.grain
        rest += [number for update in sampler.updates(0, len(done)) for micro_batch in update for number in micro_batch]
    assert sorted(done + rest) == list(range(500))


# --- the encoder and its cache ----------------------------------------------------------------------------------------


def test_pixels_are_normalised_as_by_the_formula():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    assert torch.allclose(normalize(pixels), (pixels / 255 - mean) / std, atol=1e-6)


def test_an_image_shown_twice_in_a_batch_is_encoded_once(tmp_path, renderer):
    make_data(tmp_path, 4)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "pictures" / "a.png")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "pictures" / "b.png")
    rows = [{"conversations": [{"role": "user", "content": "<image>" * len(shown) + "?"}, {"role": "assistant", "content": "x"}],
             "image": shown} for shown in (["a.png"], ["b.png", "a.png"], ["a.png"])]  # fmt: skip
    dataset = VLMDataset(JsonlSamples(write_jsonl(tmp_path / "d.jsonl", rows)), open_images(tmp_path / "pictures"), renderer, 640)
    batch = collate(dataset.__getitems__([0, 1, 2]), 0, 196)
    assert len(batch.pixels) == 2 and batch.image_index.tolist() == [0, 1, 0, 0]
    apart = collate([dataset[number] for number in range(3)], 0, 196)
    assert len(apart.pixels) == 4
    model = make_model(encoder=make_vision_encoder()).eval()
    with torch.no_grad():
        assert torch.allclose(forward(model, batch).loss, forward(model, apart).loss, atol=1e-6)


def test_a_run_with_the_cache_is_the_run_without_it(data, encoder_folder, tmp_path):
    """Bit for bit, over three epochs, by two ways: without a cache, and with one."""
    for cached in (0, 1):
        train(data, encoder_folder, tmp_path / str(cached), epochs=3, cache_features=cached)
    assert_same(weights(tmp_path / "0"), weights(tmp_path / "1"))
    a, b = ([line["loss"] for line in read_metrics(tmp_path / name, NAME)] for name in "01")
    assert a == b and len(a) == 33


def test_later_epochs_neither_encode_nor_decode(data, encoder_folder, tmp_path, monkeypatch):
    trainer = make_trainer(data, encoder_folder, tmp_path, epochs=3, cache_features=1)
    trainer.train_epochs(1, StopRequest())

    def forbidden(*_):
        raise AssertionError("an image was read or encoded again")

    trainer.run.cache.flush()
    monkeypatch.setattr(trainer.run.model, "encode_images", forbidden)
    monkeypatch.setattr(ImageSource, "load", forbidden)
    trainer.train_epochs(3, StopRequest())
    assert trainer.state.update == 33
    assert trainer.run.cache.filled() == trainer.run.cache.count > 15


def test_a_killed_run_keeps_what_it_encoded_and_ends_the_same(data, encoder_folder, tmp_path):
    flags = {"epochs": 2, "save_interval": 3, "cache_features": 1}
    train(data, encoder_folder, tmp_path / "whole", **flags)
    part = tmp_path / "part"
    command = [sys.executable, str(REPOSITORY / "train_sft_vlm.py"), *training_flags(data, encoder_folder, part, **flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    for line in process.stderr:
        if "update 7/" in line:  # saving update 6 has waited for the state of update 3 to be on disk
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    done = train(data, encoder_folder, part, from_resume=1, **flags)
    assert "; 0 filled" not in done.stderr and "feature cache" in done.stderr
    assert_same(weights(tmp_path / "whole"), weights(part))


def test_two_processes_share_one_cache(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path / "one", batch_size=4, epochs=3, cache_features=1)
    train(data, encoder_folder, tmp_path / "two", batch_size=2, epochs=3, cache_features=1, processes=2)
    one, two = (np.array([line["loss"] for line in read_metrics(tmp_path / name, NAME)]) for name in ("one", "two"))
    assert np.abs(one - two).max() < 1e-4
    assert len(list((tmp_path / "two" / "checkpoints" / "features").iterdir())) == 1


KEY = CacheKey(encoder="t", dtype="float32", patches=4, width=8)


def open_small(folder, data, **key) -> FeatureCache:
    return FeatureCache(folder, CacheKey(**{**vars(KEY), **key}), JsonlSamples(data[0]))


def test_cache_gives_back_what_it_got_and_only_for_the_same_file(data, tmp_path):
    cache = open_small(tmp_path / "c", data)
    features = torch.randn(3, 4, 8).bfloat16()
    cache.write(((2, 7), (0, 8), (5, 9)), features)
    cache.flush()
    again = open_small(tmp_path / "c", data)
    for reader in (cache, again):
        assert torch.equal(reader.read(0, 8), features[1]) and torch.equal(reader.read(5, 9), features[2])
        assert reader.read(0, 7) is None, "the file looks otherwise now"
        assert reader.read(1, 8) is None, "never filled"
    assert again.filled() == 3 and again.rebuilt_because is None
    with open(tmp_path / "c" / "features.bin", "r+b") as file:  # corrupted by a power cut
        file.seek(5 * cache.image_bytes + 3)
        file.write(b"\0\1\2")
    assert again.read(5, 9) is None and again.read(2, 7) is not None


@pytest.mark.parametrize("name", ["features.bin", "filled.bin", "names.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "junk"])
def test_a_damaged_cache_is_made_again(data, tmp_path, name, damage):
    cache, path = open_small(tmp_path / "c", data), tmp_path / "c" / name
    names = [image.name for image in data[1].iterdir()]
    expected = [cache.slot_of(name) for name in names]
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "junk": b"[]"}[damage])
    again = open_small(tmp_path / "c", data)
    assert [again.slot_of(name) for name in names] == expected and sorted(expected) == list(range(again.count))
    again.write(((0, 1),), torch.ones(1, 4, 8).bfloat16())
    again.flush()
    assert torch.equal(again.read(0, 1), torch.ones(4, 8).bfloat16())


def test_cache_starts_again_when_anything_in_its_key_changes(data, tmp_path):
    cache = open_small(tmp_path / "c", data)
    cache.write(((0, 1),), torch.ones(1, 4, 8).bfloat16())
    cache.flush()
    rows = data[0].read_text().splitlines()
    same_images = write_jsonl(tmp_path / "other.jsonl", [*rows, rows[0]])
    kept = open_small(tmp_path / "c", (same_images, data[1]))
    assert kept.filled() == 1 and kept.count == cache.count and kept.rebuilt_because is None
    for change in ({"encoder": "u"}, {"dtype": "bfloat16"}, {"preprocessing": 99}):
        made = open_small(tmp_path / "c", data, **change)
        assert made.filled() == 0 and "another encoder" in made.rebuilt_because
        made.write(((0, 1),), torch.ones(1, 4, 8).bfloat16())
        made.flush()
    fewer = write_jsonl(tmp_path / "fewer.jsonl", rows[:9])
    made = open_small(tmp_path / "c", (fewer, data[1]), preprocessing=99)
    assert made.filled() == 0 and "images" in made.rebuilt_because


def test_a_changed_image_is_encoded_again(encoder_folder, tmp_path):
    data = make_data(tmp_path, 6)
    flags = {"epochs": 1, "cache_features": 1}
    make_trainer(data, encoder_folder, tmp_path, **flags).train_epochs(1, StopRequest())
    changed = next(iter(sorted(data[1].iterdir())))
    Image.new("RGB", (9, 9), "purple").save(changed)
    trainer = make_trainer(data, encoder_folder, tmp_path, **flags)
    seen = []
    encode = trainer.run.model.encode_images
    trainer.run.model.encode_images = lambda pixels: seen.append(len(pixels)) or encode(pixels)
    trainer.train_epochs(1, StopRequest())
    assert sum(seen) == 1


def test_cache_refuses_a_disk_too_small(data, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match=r"GB free\. Name a larger disk with --checkpoint_dir"):
        open_small(tmp_path / "c", data)


def test_training_continues_when_the_cache_cannot_be_written(data, encoder_folder, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(data, encoder_folder, tmp_path, epochs=2, cache_features=1)
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(trainer.run.cache, "_files", [full, full])
    trainer.train_epochs(2, StopRequest())
    assert trainer.state.update == 22
    assert capsys.readouterr().err.count("keeps no more") == 1
