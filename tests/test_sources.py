"""Data at scale: indices, zips, parquet, mixtures, and orders that need no memory."""

import base64
import bz2
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

import train_pretrain_vlm
import train_sft_vlm
from dataset import archive, convert, foreign, validate
from dataset.images import load_image, open_images
from dataset.jsonl import JsonlSamples, parse_sample
from dataset.parquet import ParquetSamples
from dataset.sources import Mixture, Permutation, open_samples
from dataset.vlm_dataset import VLMDataset, collate
from model import storage
from model.conversation import Renderer
from model.errors import DataError, SampleError
from model.pixels import preprocess
from tests.conftest import REPOSITORY, make_data, write_jsonl
from tests.test_training import assert_same, make_trainer
from trainer.config import TrainConfig
from trainer.guards import StopRequest
from trainer.sampler import ResumableSampler


def row(text: str, image: str | None = None) -> dict:
    mark = "<image>\n" if image else ""
    turns = [{"role": "user", "content": f"{mark}{text}"}, {"role": "assistant", "content": "yes"}]
    return {"conversations": turns} | ({"image": image} if image else {})


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- orders -----------------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), key=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_a_permutation_is_a_bijection(size, key):
    numbers = Permutation(size, (key,))(np.arange(size))
    assert sorted(numbers.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [3, 10, 100])
def test_a_permutation_is_uniform(size):
    """Chi-square over 1,000 keys: where each place goes, and where two neighbours go together."""
    orders = np.array([Permutation(size, (key, 7))(np.arange(size)) for key in range(1000)])
    places = np.array([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size**2)[~np.eye(size, dtype=bool).flatten()]
    for counts, freedom in ((places, (size - 1) ** 2), (pairs, size * (size - 1) - 1)):
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_trillion_samples_need_no_memory():
    size = 10**12
    tracemalloc.start()
    sampler = ResumableSampler(size, 16, 1, seed=1, lengths=lambda indices: indices % 500)
    updates = [update for (update,) in itertools.islice(sampler.updates(3, skip=size // 3 * 1), 200)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seen = [number for update in updates for number in update]
    assert peak < 2_000_000 and len(set(seen)) == 3200 and max(seen) > size * 0.99 and min(seen) < size * 0.01
    assert ResumableSampler(size, 16, 1, seed=1).updates_per_epoch == size // 16


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_mixture_takes_its_fractions_and_repeats_nothing_before_its_time(data):
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    weights = [data.draw(st.sampled_from([0.3, 0.5, 1, 1, 2, 2.5])) for _ in sizes]
    begins, taken = np.cumsum([0, *sizes]), Counter()
    for epoch in range(6):
        mixture = Mixture([range(size) for size in sizes], weights)
        order, count = mixture.order(5, epoch), mixture.epoch_size
        numbers = order(np.arange(count))
        taken.update(numbers.tolist())
        shuffled = np.random.default_rng(0).permutation(count)
        assert (order(shuffled) == numbers[shuffled]).all(), "a function of the place alone"
        for begin, size, weight in zip(begins, sizes, weights, strict=False):
            assert ((numbers >= begin) & (numbers < begin + size)).sum() == max(1, round(size * weight))
    for begin, size in zip(begins, sizes, strict=False):
        counts = [taken[number] for number in range(begin, begin + size)]
        assert max(counts) - min(counts) <= 1


# --- jsonl by index ---------------------------------------------------------------------------------------------------


def refuse(*_):
    raise AssertionError("read again")


def test_the_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [row(str(number)) for number in range(5)])
    first = JsonlSamples(path)
    with monkeypatch.context() as patch:
        patch.setattr(JsonlSamples, "_write_index", refuse)
        assert JsonlSamples(path).fingerprint() == first.fingerprint() and len(JsonlSamples(path)) == 5
    write_jsonl(path, [row(str(number)) for number in range(7)])
    assert len(JsonlSamples(path)) == 7 and JsonlSamples(path)[6].turns[0].content == "6"
    seen, lines = path.stat(), path.read_text().replace("6", "8")
    path.write_text(lines)  # of the same size
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
    assert JsonlSamples(path)[6].turns[0].content == "8" and JsonlSamples(path).fingerprint() != first.fingerprint()


def test_where_the_folder_is_read_only_the_index_goes_to_the_cache(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data" / "a.jsonl", [row("x")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    blocked = path.with_name(".a.jsonl.index")
    blocked.mkdir()  # also for root, who may write anywhere
    assert len(JsonlSamples(path)) == 1
    (index,) = (tmp_path / "cache" / "minimind-v").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(JsonlSamples, "_write_index", refuse)
        assert len(JsonlSamples(path)) == 1
    index.unlink()
    (tmp_path / "cache" / "minimind-v").rmdir()
    (tmp_path / "cache" / "minimind-v").write_text("no folder")
    with pytest.raises(DataError, match=r"neither the folder of .*a\.jsonl nor ~/\.cache has room .* XDG_CACHE_HOME"):
        JsonlSamples(path)


def run_forked(*functions) -> list[int]:
    """Exit codes of processes that do this at the same time."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_processes_that_start_together_make_one_index(tmp_path, monkeypatch):
    path, log, write_index = write_jsonl(tmp_path / "a.jsonl", [row("x")] * 9), tmp_path / "log", JsonlSamples._write_index

    def slow(*arguments):
        with open(log, "a") as told:
            told.write("read\n")
        time.sleep(0.5)
        write_index(*arguments)

    monkeypatch.setattr(JsonlSamples, "_write_index", slow)
    assert run_forked(*[lambda: JsonlSamples(path)[8]] * 4) == [0] * 4
    assert log.read_text() == "read\n"


def test_a_kill_while_the_index_is_written_leaves_nothing_behind(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row("x")] * 9)

    def killed():
        storage.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        JsonlSamples(path)

    assert run_forked(killed) == [-signal.SIGKILL]
    assert not (tmp_path / ".a.jsonl.index").exists()
    assert len(JsonlSamples(path)) == 9 and len(list(tmp_path.iterdir())) == 2


def test_a_file_that_changes_says_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(str(number)) for number in range(20)])
    samples = JsonlSamples(path)
    with open(path, "a") as file:
        file.write(json.dumps(row("more")) + "\n")
    assert samples[19].turns[0].content == "19", "what is appended changes nothing"
    path.write_text("".join(json.dumps(row("longer " * (number % 2))) + "\n" for number in range(30)))
    with pytest.raises(SampleError, match=r"a\.jsonl:9: the file has changed since the start"):
        samples[8]
    path.write_text("")
    with pytest.raises(SampleError, match="the file has changed"):
        samples[0]
    path.unlink()
    with pytest.raises(SampleError, match=r"a\.jsonl:1: the line cannot be read"):
        samples[0]


def test_more_files_than_may_be_open(tmp_path):
    for number in range(40):
        write_jsonl(tmp_path / f"{number:02}.jsonl", [row(f"{number} {line}") for line in range(3)])
    before = len(os.listdir("/proc/self/fd"))
    samples = open_samples(tmp_path)
    for number in samples.order(0, 0)(np.arange(120)):
        assert samples[int(number)].turns[0].content == f"{number // 3} {number % 3}"
    assert len(os.listdir("/proc/self/fd")) - before <= 3


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"%s\r\n\r\n%s\r\n", [None, None]),
        (b"\xef\xbb\xbf%s\n\xef\xbb\xbf%s\n", [None, None]),  # one file with a mark appended to another
        (b"%s\n" + bytes(50) + b"\n%s", [None, "not json", None]),
        (b"%s\r%s\r", ["not json .*Extra data"]),
        (b"%s\n\xff\xfe%s", [None, "not UTF-8"]),
        (b"%s\n" + b"[" * 100_000 + b"\n%s", [None, "not json", None]),
        (b"\xef\xbb\xbf\n%s\n\xef\xbb\xbf\n \n", [None]),
        (b"%s,\n%s", ["not json .*Extra data", None]),
        (b'{"score": NaN, "more": [-Infinity, 1e999], %s\n'.replace(b"%s", json.dumps(row("x")).encode()[1:]) + b"%s", [None, None]),
        ("%s\n%s".replace("%s", "%s\u2028").encode(), ["not json .*Extra data"] * 2),
    ],
    ids=["crlf", "byte order marks", "nul", "cr", "bytes", "deep", "only marks", "commas", "nan", "line separators"],
)
def test_odd_lines(tmp_path, content, found):
    (tmp_path / "a.jsonl").write_bytes(content.replace(b"%s", json.dumps(row("x")).encode()))
    samples = JsonlSamples(tmp_path / "a.jsonl")
    assert len(samples) == len(found)
    for number, problem in enumerate(found):
        if problem is None:
            assert samples[number].turns[0].content == "x"
        else:
            with pytest.raises(SampleError, match=problem):
                samples[number]


def test_long_lines(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row("word " * 2_000_000), row("x")])
    assert [len(JsonlSamples(path)[number].turns[0].content) for number in (0, 1)] == [10_000_000, 1]


def sample_texts(samples) -> list[str]:
    return [samples[number].turns[0].content for number in range(len(samples))]


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == "bz2":
        return bz2.compress(data)
    return arrow.compress(data, codec={"gz": "gzip", "zst": "zstd"}[suffix], asbytes=True) if suffix else data


ROWS = [row(text) for text in ("one", "\u732b", "half \U0001f600")]
LINES = "".join(f"{json.dumps(own, ensure_ascii=False)}\n" for own in ROWS)
DOCUMENTS = {
    "lines.jsonl": LINES, "lines.ndjson": LINES, "lines.json": LINES, "blanks.json": f"\n\n{LINES}\n", "array.json": json.dumps(ROWS),
    "array of lines.json": "[" + LINES.replace("\n", ",\n")[:-2] + "\n]\n", "indented.json": json.dumps(ROWS, indent=2),
    "with a head.json": json.dumps({"version": "1", "data": ROWS}), "head, indented.json": json.dumps({"data": ROWS}, indent=1),
    "of windows.json": "\ufeff" + json.dumps(ROWS, indent=1).replace("\n", "\r\n"), "UPPER.JSON": json.dumps(ROWS),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["", "gz", "zst", "bz2"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_json_by_other_names(tmp_path, capsys, name, suffix):
    path = tmp_path / (f"{name}.{suffix}" if suffix else name)
    path.write_bytes(packed(DOCUMENTS[name].encode(), suffix))
    first = open_samples(path)
    assert sample_texts(first) == [own["conversations"][0]["content"] for own in ROWS] == sample_texts(pickle.loads(pickle.dumps(first)))
    copied = capsys.readouterr().err.count("copied to")
    assert copied == bool(suffix or name.lower().endswith(".json"))
    assert first[2].where.startswith(f"{path}:") and open_samples(path).fingerprint() == first.fingerprint()
    assert capsys.readouterr().err == "", "the copy is made once"
    path.write_bytes(packed(json.dumps(ROWS[0]).encode(), suffix))
    assert sample_texts(open_samples(path)) == ["one"], "and again when the file changes"
    seen = path.stat()
    path.write_bytes(packed(json.dumps(ROWS[1]).encode(), suffix))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # as tar and rsync restore times
    assert seen.st_size == path.stat().st_size or sample_texts(open_samples(path)) == [ROWS[1]["conversations"][0]["content"]]


def test_one_sample_that_is_a_document(tmp_path):
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(ROWS[0] | {"more": [1]}, indent=indent))
        assert sample_texts(open_samples(tmp_path / "a.json")) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'[{"a": 1}, ', "cannot read .*a.json: Expecting"),
        ("a.json", b'{\n"a": 1,\n}', "cannot read .*a.json: .*quotes"),
        ("a.json", b"[" * 100_000, "cannot read .*a.json"),
        ("a.json", b"[]", "holds no samples"),
        ("a.json", "[{}]".encode("utf-16"), "cannot read .*a.json: 'utf-8' codec"),
        ("a.jsonl.gz", b"no gzip", "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", b"", "holds no samples"),
        ("a.jsonl.zst", b"no zstd", "cannot read .*a.jsonl.zst"),
        ("a.jsonl.gz", packed(LINES.encode(), "gz")[:-12], "cannot read .*a.jsonl.gz: .*Truncated"),
        ("a.jsonl.gz", packed(LINES.encode() * 9, "gz")[:-4] + b"size", "cannot read .*a.jsonl.gz"),
        ("a.jsonl.zst", packed(np.random.default_rng(0).bytes(10**6), "zst")[:-9], "cannot read .*a.jsonl.zst"),
        ("a.jsonl.xz", b"x", r"is no \.jsonl and no \.parquet file"),
        ("a.parquet.gz", b"x", r"is no \.jsonl and no \.parquet file"),
        ("a.csv", b"x", r"is no \.jsonl and no \.parquet file"),
    ],
)
def test_documents_that_cannot_be_read(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem):
        open_samples(tmp_path / name)
    assert not list(tmp_path.glob("*.tmp"))


def test_no_room_for_a_copy_names_what_to_do(data, tmp_path, monkeypatch):
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    (tmp_path / "a.jsonl.zst").write_bytes(packed(LINES.encode(), "zst"))
    for path, kind in ((tmp_path / "a.jsonl.zst", "lines"), (write_parquet(tmp_path / "a.parquet", read_rows(data[0]), data[1]), "rows")):
        path.with_name(f".{path.name}.{kind}").mkdir()
        with pytest.raises(DataError, match=rf"has room for its {kind}, .* XDG_CACHE_HOME"):
            open_samples(path)


COMPANIONS = ["._data.jsonl", "._a.parquet", ".data-checkpoint.jsonl", ".ipynb_checkpoints/data-checkpoint.jsonl", "_SUCCESS", "._SUCCESS.crc",
              "_metadata", "README.md", ".DS_Store", "part-0001.jsonl", "part-0002.jsonl.gz", "dataset_info.json.lock", "images/a.png"]  # fmt: skip


@pytest.mark.parametrize("way", ["folder", "pattern", "deep pattern", "parts"])
def test_companions_of_data(tmp_path, way):
    """What systems, editors and Spark leave beside the data is none, unless it is named."""
    folder = tmp_path / "d"
    for name in COMPANIONS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"" if name.startswith("part") else b"\0\5\x16\7 no data")
    write_jsonl(folder / "part-0000.jsonl", ROWS)
    parquet.write_table(arrow.table({"conversations": arrow.array([], arrow.string())}), folder / "part-0003.parquet")
    parquet.write_table(arrow.table({"conversations": [json.dumps(row("p")["conversations"])]}), folder / "part-0004.parquet")
    entry = {"folder": folder, "pattern": folder / "*", "deep pattern": tmp_path / "**" / "*", "parts": folder / "part-*"}[way]
    assert sample_texts(open_samples(entry)) == ["one", "\u732b", "half \U0001f600", "p"]
    write_jsonl(folder / ".data-checkpoint.jsonl", ROWS)
    assert len(open_samples(folder / ".data-checkpoint.jsonl")) == 3, "what is named is taken"
    for name in ("part-0001.jsonl", "part-0003.parquet"):
        with pytest.raises(DataError, match=f"{name} holds no samples"):
            open_samples(folder / name)


def test_folders_without_data(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("._a.jsonl", "notes.txt", "a.json"):
        (tmp_path / "empty" / name).write_text("x")
    for entry in (tmp_path / "empty", tmp_path / "empty" / "*.txt"):
        with pytest.raises(DataError, match=r"holds no \.jsonl and no \.parquet files \(\.json files are named"):
            open_samples(entry)
    (tmp_path / "empty" / "b.jsonl").touch()
    with pytest.raises(DataError, match=r"b\.jsonl holds no samples"):
        open_samples(tmp_path / "empty")
    (tmp_path / "empty" / "a.json").write_text(LINES)
    assert len(open_samples(tmp_path / "empty" / "*")) == 3
    (tmp_path / "empty" / "b.jsonl").write_text(LINES)
    (tmp_path / "empty" / "b.jsonl.gz").write_bytes(packed(LINES.encode(), "gz"))
    assert len(open_samples(tmp_path / "empty")) == 3, "what is there unpacked and packed counts once"
    assert len(open_samples(tmp_path / "empty" / "b*")) == 3
    (tmp_path / "empty" / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(DataError, match=r"cannot read .*loop\.jsonl"):
        open_samples(tmp_path / "empty")


# --- zip --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zipped(data, tmp_path_factory) -> Path:
    """The images of `data` in a zip, in one folder, packed and not."""
    path = tmp_path_factory.mktemp("zip") / "pictures.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.mkdir("pictures")
        for number, picture in enumerate(sorted(data[1].iterdir())):
            file.write(picture, f"pictures/{picture.name}", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2])
    return path


def _load_all(images, names) -> list:
    return [images.load(name).tobytes() for name in names]


def test_images_in_a_zip_are_those_of_the_folder(data, zipped):
    names = sorted(path.name for path in data[1].iterdir())
    expected, images = _load_all(open_images(data[1]), names), open_images(zipped)
    assert _load_all(images, names) == expected == _load_all(pickle.loads(pickle.dumps(images)), names)
    assert images.load(f"pictures/{names[0]}").tobytes() == expected[0]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(_load_all, [(images, names), (images, names[::-1])])
    assert found == [expected, expected[::-1]]
    assert len({images.signature(name) for name in names}) == len(names)
    for name in ("none.png", "../data.jsonl", "pictures"):
        with pytest.raises(SampleError, match=r"is not in .*zip"):
            images.load(name)


def test_zips_that_are_broken_say_so(data, zipped, tmp_path, monkeypatch):
    (tmp_path / "no.zip").write_bytes(b"no zip at all")
    with pytest.raises(DataError, match="no readable zip"):
        open_images(tmp_path / "no.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(DataError, match="holds no files"):
        open_images(tmp_path / "empty.zip")
    with zipfile.ZipFile(zipped) as file:
        entries = [entry for entry in file.infolist() if not entry.is_dir()]
    for entry in entries[:2]:  # one stored, one packed
        blob = bytearray(zipped.read_bytes())
        name_size, extra_size = struct.unpack_from("<HH", blob, entry.header_offset + 26)
        blob[entry.header_offset + 30 + name_size + extra_size + entry.compress_size // 2] ^= 0x55
        (tmp_path / "torn.zip").write_bytes(blob)
        with pytest.raises(SampleError, match=r"cannot be read: .*(its checksum in .* is wrong|is corrupt there)"):
            open_images(tmp_path / "torn.zip").load(entry.filename)
    monkeypatch.setattr(archive, "MAX_BYTES", 10)
    with pytest.raises(SampleError, match="unfolds to"):
        open_images(zipped).load(entries[0].filename)


def test_several_places_of_images(data, zipped, tmp_path):
    (tmp_path / "more").mkdir()
    shutil.copy(data[1] / "1_0.png" if (data[1] / "1_0.png").exists() else next(data[1].iterdir()), tmp_path / "more" / "other.png")
    images = open_images(f"{tmp_path / 'more'}, {zipped}")
    name = next(data[1].iterdir()).name
    assert images.load("other.png").size == images.load(name).size == (40, 30)
    shutil.copy(data[1] / name, tmp_path / "more" / name)
    with pytest.raises(SampleError, match="could be any of 2 files"):
        images.load(name)
    with pytest.raises(SampleError, match="is not in"):
        images.load("nowhere.png")
    images = open_images(f"{tmp_path / 'more'}, {data[1]}")
    assert images.load(str(data[1] / next(path.name for path in data[1].iterdir() if path.name != name))).size == (40, 30)
    with pytest.raises(SampleError, match="leads out of"):
        images.load(str(data[0]))
    with pytest.raises(DataError, match="does not exist"):
        open_images(f"{tmp_path / 'more'},{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"no folder of images, no \.zip and no \.tar"):
        open_images(data[0])


SPELLINGS = {  # (in the data, on the disk)
    "composed, decomposed": ("caf\u00e9/\u00fc.png", "cafe\u0301/u\u0308.png"),
    "decomposed, composed": ("u\u0308.png", "\u00fc.png"),
    "one part each": ("caf\u00e9/u\u0308.png", "cafe\u0301/\u00fc.png"),
    "hangul": ("\ud55c.png", "\u1112\u1161\u11ab.png"),
    "backslashes": ("sub\\a.png", "sub/a.png"),
    "backslashes and more": (".\\Sub\\\u00dc.png", "sub/u\u0308.PNG"),
    "capitals": ("a.png", "A.PNG"),
    "small letters": ("IMG_1.JPG", "img_1.jpg"),
    "capitals of a folder": ("train/a.png", "Train/a.png"),
}


def pack(folder: Path, kind: str) -> Path:
    """The folder itself, or a zip or tar of it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if kind == "zip":
        with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as file:
            for path in files:
                file.write(path, path.relative_to(folder))
    elif kind == "tar":
        with tarfile.open(folder.with_suffix(".tar"), "w") as file:
            file.add(folder, ".")
    return folder if kind == "folder" else folder.with_suffix(f".{kind}")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("case", SPELLINGS)
def test_names_in_another_spelling(tmp_path, kind, case):
    asked, there = SPELLINGS[case]
    folder = tmp_path / "p"
    for number, name in enumerate((there, "other.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"%d" % number)
    images = open_images(pack(folder, kind))
    assert images.read(there) == images.read(f"./{there}") == b"0" and images.read("other.png") == b"1"
    assert images.read(asked) == images.read(asked) == b"0" and images.signature(asked) == pickle.loads(pickle.dumps(images)).signature(asked)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.png").write_bytes(b"x")
    assert open_images(f"{tmp_path / 'more'},{images.path}").read(asked) == b"0"
    with pytest.raises(SampleError, match="is not in"):
        images.read(asked.replace(".", "_."))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_name_that_could_be_either_of_two(tmp_path, kind):
    (tmp_path / "p").mkdir()
    for name in ("a.png", "A.png"):
        (tmp_path / "p" / name).write_text(name)
    images = open_images(pack(tmp_path / "p", kind))
    assert images.read("a.png") == b"a.png" and images.read("A.png") == b"A.png", "the exact name comes first"
    with pytest.raises(SampleError, match=r"'a\.PNG' could be any of 2 files"):
        images.read("a.PNG")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "a.PNG").write_text("q")
    both = open_images(f"{images.path},{tmp_path / 'q'}")
    assert both.read("a.PNG") == b"q" and both.read("a.png") == b"a.png"
    with pytest.raises(SampleError, match="could be any of 3 files"):
        both.read("A.PNG")


def test_links_lead_where_they_lead(data, tmp_path):
    """A snapshot of the Hugging Face cache: every file is a link to ../../blobs; and folders that are links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    names = sorted(path.name for path in data[1].iterdir())
    for number, path in enumerate([*(data[1] / name for name in names), data[0]]):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshots" / "1" / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    (tmp_path / "latest").symlink_to(tmp_path / "snapshots" / "1")
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "coco").symlink_to(data[1])
    expected = _load_all(open_images(data[1]), names)
    for folder in (tmp_path / "snapshots" / "1", tmp_path / "latest"):
        images = open_images(folder)
        assert _load_all(images, names) == expected
        assert images.load(str(folder / names[0])).tobytes() == images.load(str(folder.resolve() / names[0])).tobytes() == expected[0]
        assert open_samples(folder)[21] == open_samples(folder / "data.jsonl")[21]
    above = open_images(tmp_path / "above")
    assert _load_all(above, [f"coco/{name}" for name in names]) == expected
    for name in ("coco/../../above/coco/x.png", f"../latest/{names[0]}", str(data[1] / names[0]), str(data[0])):
        with pytest.raises(SampleError, match=r"leads out of|is not in"):
            above.load(name)
    (tmp_path / "above" / "data.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"cannot read .*data\.jsonl: .*No such file"):
        open_samples(tmp_path / "above")


@pytest.mark.parametrize("companion", [".DS_Store", "._.DS_Store", "README.md", "LICENSE", ".ipynb_checkpoints/a-checkpoint.png", "labels/a.txt", "__MACOSX/pets/._a.png"])
def test_companions_of_images_in_a_zip(tmp_path, companion):
    for number, order in enumerate((1, -1)):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as file:
            for name in (companion, "pets/cats/a.png", "pets/dogs/b.png")[::order]:
                file.writestr(name, name)
        images = open_images(tmp_path / f"{number}.zip")
        assert images.read("cats/a.png") == images.read("pets/cats/a.png") == b"pets/cats/a.png"
        assert images.read(companion) == companion.encode(), "what is named is there"


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_stored_and_packed(data, tmp_path, kind, method):
    shutil.copytree(data[1], tmp_path / "p")
    names = sorted(path.name for path in data[1].iterdir())
    path = tmp_path / f"q.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", method) as file:
            for name in names:
                file.write(data[1] / name, name)
            file.writestr("zeros", bytes(10**6))
    else:
        with tarfile.open(path, "w", format=(tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[method == zipfile.ZIP_STORED]) as file:
            file.add(data[1], "pictures")
    images = open_images(path)
    assert _load_all(images, names) == _load_all(open_images(data[1]), names) == _load_all(pickle.loads(pickle.dumps(images)), names)
    if kind == "zip":
        assert images.read("zeros") == bytes(10**6)
        blob = bytearray(path.read_bytes())
        blob[60:90] = bytes(30)
        path.write_bytes(blob)
        with pytest.raises(SampleError, match=r"checksum in .* is wrong|is corrupt there"):
            open_images(path).read(names[0])


def test_an_image_of_a_tar_has_another_signature_in_another_tar(tmp_path):
    """Of the same name, size and place: the feature cache knows an image by it."""
    seen = set()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (9, 7), colour).save(tmp_path / "a.bmp")
        os.utime(tmp_path / "a.bmp", (0, 0))
        with tarfile.open(tmp_path / "p.tar", "w") as file:
            file.add(tmp_path / "a.bmp", "a.bmp")
        os.utime(tmp_path / "p.tar", (number, number))
        seen.add(open_images(tmp_path / "p.tar").signature("a.bmp"))
    assert len(seen) == 2


def test_hard_links_in_a_tar_and_names_from_here_in_a_zip(tmp_path):
    (tmp_path / "a.png").write_bytes(pixel())
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    with tarfile.open(tmp_path / "p.tar", "w") as file:
        for name in ("a.png", "b.png"):
            file.add(tmp_path / name, f"./p/{name}")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as file:
        file.writestr("./p/b.png", pixel())
    for kind in ("tar", "zip"):
        images = open_images(tmp_path / f"p.{kind}")
        assert images.read("b.png") == images.read("p/b.png") == images.read("./p/b.png") == pixel()


def test_packed_images_that_cannot_be_read_name_what_to_do(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"mkdir images && tar -xf '.*a\.tar\.gz' -C images"):
        open_images(tmp_path / "a.tar.gz")
    shutil.copy(tmp_path / "a.tar.gz", tmp_path / "b.tar")
    with pytest.raises(DataError, match="no readable tar of images"):
        open_images(tmp_path / "b.tar")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.png", b"x")
    whole = (tmp_path / "a.zip").read_bytes()
    for flag, method, problem in ((1, 0, "it is encrypted; unpack"), (0, 9, "it is packed by method 9; unpack")):
        at = whole.index(b"PK\x01\x02")
        (tmp_path / "b.zip").write_bytes(whole[: at + 8] + struct.pack("<HH", flag, method) + whole[at + 12 :])
        with pytest.raises(SampleError, match=problem):
            open_images(tmp_path / "b.zip").read("a.png")


def test_data_in_a_folder_whose_name_is_not_utf8(data, tmp_path, monkeypatch):
    folder = tmp_path / "\udcff \u732b"
    folder.mkdir()
    shutil.copytree(data[1], folder / "p\udcfe")
    source, images = shutil.copy(data[0], folder / "a\udcff.jsonl"), folder / "p\udcfe"
    expected = [sample.turns for sample in (open_samples(source)[number] for number in range(22))]
    assert convert.main([str(source), "--images_path", str(images), "--out", str(folder / "shards")]) == 0
    assert convert.main([str(folder / "shards"), "--out", str(folder / "back")]) == 0
    assert read_rows(folder / "back" / "data.jsonl") == read_rows(data[0])
    samples = open_samples(folder / "shards")
    assert [samples[number].turns for number in range(22)] == expected
    images = open_images(pack(images, "zip"))
    assert images.read("1_0.png" if (data[1] / "1_0.png").exists() else next(data[1].iterdir()).name)


def test_names_that_are_not_utf8_and_names_in_a_poor_locale(data, tmp_path):
    """A name in the data is UTF-8 whatever the locale; a file whose name is not can be named by halves of characters, as
    Python prints them."""
    (tmp_path / "p").mkdir()
    shutil.copy(next(data[1].iterdir()), tmp_path / "p" / "\udcff.png")
    shutil.copy(next(data[1].iterdir()), tmp_path / "p" / "\u732b.png")
    shutil.copy(next(data[1].iterdir()), tmp_path / "p" / "cafe\u0301.png")
    write_jsonl(tmp_path / "\u8cc7\u6599.jsonl", [json.dumps(row("x", name)) for name in ("\udcff.png", "\u732b.png", "caf\u00e9.png", "\u72d7.png")])
    command = [sys.executable, "-m", "dataset.validate", str(tmp_path / "\u8cc7\u6599.jsonl"), "--images_path", str(tmp_path / "p"), "--processes", "1"]
    poor = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, cwd=REPOSITORY, env=poor, capture_output=True, timeout=300, check=False)
    assert b"4 samples, 3 images; 1 bad" in done.stdout and b"is not in" in done.stdout and done.returncode == 1, done.stderr
    assert b"Traceback" not in done.stderr


# --- parquet ----------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict], folder: Path, structs: bool = False, group: int = 1000) -> Path:
    """Rows of jsonl as the published parquet has them."""
    names = [[name.strip() for name in row.get("image", "").split(",") if name.strip()] for row in rows]
    blobs = [[(folder / name).read_bytes() for name in own] for own in names]
    several = any(len(own) > 1 for own in blobs)
    table = arrow.table({
        "conversations": [row["conversations"] if structs else json.dumps(row["conversations"]) for row in rows],
        "image_bytes": blobs if several else [own[0] if own else None for own in blobs],
    })  # fmt: skip
    parquet.write_table(table, path, row_group_size=group)
    return path


@pytest.mark.parametrize("structs", [False, True])
@pytest.mark.parametrize("most", [1, 2])
def test_parquet_gives_the_samples_of_the_jsonl(data, tmp_path, structs, most):
    rows = [row for row in read_rows(data[0]) if len(row.get("image", "").split(",")) <= most]
    plain = JsonlSamples(write_jsonl(tmp_path / "a.jsonl", rows))
    samples = ParquetSamples(write_parquet(tmp_path / "a.parquet", rows, data[1], structs, group=5))
    assert len(samples) == len(rows)
    images = open_images(tmp_path / "no folder needed")
    for number in range(len(rows)):
        assert samples[number].turns == plain[number].turns
        found = [images.load(ref).tobytes() for ref in samples[number].images]
        assert found == [open_images(data[1]).load(name).tobytes() for name in plain[number].images]
        assert samples.where(number) == f"{tmp_path / 'a.parquet'}:{number + 1}" == samples[number].where
    several = np.arange(len(rows))
    assert np.corrcoef(samples.lengths(several, 196), plain.lengths(several, 196))[0, 1] > 0.99
    assert pickle.loads(pickle.dumps(samples))[3].turns == plain[3].turns


@pytest.mark.parametrize("kind", ["text", "structs", "dictionary"])
@pytest.mark.parametrize("group", [3, 1000])
def test_rows_are_copied_once_and_again_when_the_file_changes(data, tmp_path, monkeypatch, kind, group):
    """By any row groups: one of a whole file, too, as pyarrow and pandas write them by default."""
    path = write_parquet(tmp_path / "a.parquet", read_rows(data[0]), data[1], kind == "structs", group)
    if kind == "dictionary":
        table = parquet.read_table(path)
        parquet.write_table(table.set_column(0, "conversations", table.column(0).dictionary_encode()), path)
    expected = [row["conversations"] for row in read_rows(data[0])]
    samples, copy = open_samples(path), tmp_path / ".a.parquet.rows"
    assert [[vars(turn) for turn in samples[number].turns] for number in range(22)] == expected
    made = copy.stat()
    with monkeypatch.context() as patch:
        patch.setattr(ParquetSamples, "_write_copy", refuse)
        again = pickle.loads(pickle.dumps(open_samples(path)))
        assert [again[number] for number in range(22)] == [samples[number] for number in range(22)]
        assert again.fingerprint() == samples.fingerprint()
    assert copy.stat().st_mtime_ns == made.st_mtime_ns and len(list(tmp_path.iterdir())) == 2
    write_parquet(path, read_rows(data[0])[3:], data[1])
    assert [[vars(turn) for turn in open_samples(path)[number].turns] for number in range(19)] == expected[3:]
    assert open_samples(path).fingerprint() != samples.fingerprint()


def test_loader_processes_get_everything_by_pickle(data, zipped, renderer, tmp_path):
    """As those that are spawned, on a Mac, do."""
    table = write_parquet(tmp_path / "a.parquet", read_rows(data[0]), data[1], group=7)
    dataset = VLMDataset(open_samples(f"{data[0]},{table}"), open_images(zipped), renderer, 640)
    again = pickle.loads(pickle.dumps(dataset))
    for start in range(0, len(dataset), 11):
        found, expected = (collate(own.__getitems__(list(range(start, start + 11))), 0, 196) for own in (again, dataset))
        assert not found.bad and found.indices == expected.indices
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.pixels, expected.pixels)


def test_parquet_that_is_no_data_says_why(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="no readable parquet"):
        open_samples(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="columns text; wanted are one 'conversations'"):
        open_samples(tmp_path / "a.parquet")
    for name, cells, problem in (("conversations", [1], "missing, empty, or no list"), ("conversations", [["x"]], "turn 1 is no object"),
                                 ("image_bytes", [[3]], "other than bytes")):  # fmt: skip
        parquet.write_table(arrow.table({"conversations": [json.dumps(TALK)]} | {name: cells}), tmp_path / "a.parquet")
        with pytest.raises(SampleError, match=rf"a\.parquet:1: .*{problem}"):
            open_samples(tmp_path / "a.parquet")[0]
    parquet.write_table(arrow.table({"conversations": ["word"] * 999}), tmp_path / "a.parquet")
    blob = (tmp_path / "a.parquet").read_bytes()
    for torn in (b"", blob[: len(blob) // 2], blob[:4] + bytes(40) + blob[44:]):
        (tmp_path / "a.parquet").write_bytes(torn)
        with pytest.raises(DataError, match=r"a\.parquet (is no readable parquet file|cannot be read)"):
            open_samples(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"conversations": arrow.array([], arrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds no samples"):
        open_samples(tmp_path / "a.parquet")
    good = json.dumps(row("x", "a")["conversations"])
    rows = {"conversations": ["{", good, good, None, "3"], "image_bytes": [None, None, b"no picture", None, None]}
    parquet.write_table(arrow.table(rows), tmp_path / "a.parquet")
    samples = open_samples(tmp_path / "a.parquet")
    for number, problem in enumerate(("not json", "1 <image> placeholders .* 0 images", None, "missing", "missing")):
        if problem:
            with pytest.raises(SampleError, match=rf"a\.parquet:{number + 1}: .*{problem}"):
                samples[number]
    with pytest.raises(SampleError, match="image 'of 10 bytes' cannot be read"):
        open_images(tmp_path / "x").load(samples[2].images[0])
    parquet.write_table(arrow.table({"conversations": [good], "image_bytes": [[b"x", None]]}), tmp_path / "b.parquet")
    with pytest.raises(SampleError, match="other than bytes"):
        open_samples(tmp_path / "b.parquet")[0]


def test_the_published_layouts(data, tmp_path):
    """As `hf download` leaves them: jsonl with a zip of a folder; parquet whose text-only rows hold a placeholder."""
    rows = [row for row in read_rows(data[0]) if row.get("image", "").count(",") == 0]
    write_jsonl(tmp_path / "pretrain_data.jsonl", rows)
    shutil.make_archive(str(tmp_path / "pretrain_images"), "zip", data[1].parent, data[1].name)
    blobs = [(data[1] / row.get("image", sorted(os.listdir(data[1]))[0])).read_bytes() for row in rows]
    texts = [json.dumps(row["conversations"], ensure_ascii=False) for row in rows]
    parquet.write_table(arrow.table({"conversations": texts, "image_bytes": blobs}), tmp_path / "pretrain_i2t.parquet")
    zipped, table = open_samples(tmp_path / "pretrain_data.jsonl"), open_samples(tmp_path / "pretrain_i2t.parquet")
    pictures = open_images(tmp_path / "pretrain_images.zip"), open_images(tmp_path / "pretrain_images")
    for number in range(len(rows)):
        assert zipped[number].turns == table[number].turns
        assert [len(own[number].images) for own in (zipped, table)] == [int("image" in rows[number])] * 2
        assert _load_all(pictures[0], zipped[number].images) == _load_all(pictures[1], table[number].images)
    assert convert.main([str(tmp_path / "pretrain_i2t.parquet"), "--out", str(tmp_path / "back")]) == 0
    assert [row["conversations"] for row in read_rows(tmp_path / "back" / "data.jsonl")] == [row["conversations"] for row in rows]


# --- several files ----------------------------------------------------------------------------------------------------


def test_files_patterns_folders_and_weights(data, tmp_path):
    rows = read_rows(data[0])
    shards = tmp_path / "shards"
    shards.mkdir()
    write_jsonl(shards / "a.jsonl", rows[:5])
    write_parquet(shards / "b.parquet", rows[5:12], data[1])
    (shards / "notes.txt").write_text("no data")
    one = write_jsonl(tmp_path / "one.jsonl", rows[12:])
    for entry in (f"{shards}, {one}", f"{shards}/*.*l,{shards}/b.parquet,{one}"):
        samples = open_samples(entry)
        assert len(samples) == samples.epoch_size == len(rows)
        assert [samples[number].turns[0].content for number in range(len(rows))] == [r["conversations"][0]["content"] for r in rows]
        assert samples.where(5) == f"{shards / 'b.parquet'}:1" and samples.where(12) == f"{one}:1"
        assert sorted(samples.order(0, 0)(np.arange(len(rows))).tolist()) == list(range(len(rows)))
    weighted = open_samples(f"{one}:0.5,{shards / 'a.jsonl'}:3")
    assert weighted.epoch_size == round((len(rows) - 12) * 0.5) + 15 and len(weighted) == len(rows) - 7
    for wrong, message in ((f"{one}:0", "greater than 0"), (f"{one}:1e300", "at most 1000"), (f"{one},{one}:2", "twice"), (f"{one},", "no data at an empty name"),
                           (f"{tmp_path}/none*", "no data"), (f"{shards}/notes.txt", r"no \.jsonl and no \.parquet")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            open_samples(wrong)


def test_training_is_the_same_wherever_the_data_lies(data, zipped, encoder_folder, tmp_path):
    """Folder and zip: one order, one end. Parquet has an order of its own, and trains on every sample, too."""
    trained = {}
    for name, places in {"folder": data, "zip": (data[0], zipped), "parquet": (write_parquet(tmp_path / "a.parquet", read_rows(data[0]), data[1]), "no")}.items():
        trainer = make_trainer(places, encoder_folder, tmp_path / name)
        trainer.train_epochs(1, StopRequest())
        trained[name] = trainer.run.model.state_dict()
        assert (trainer.state.read, trainer.state.bad, trainer.state.epoch) == (22, 0, 1)
    assert_same(trained["folder"], trained["zip"])


def test_a_mixture_resumes_anywhere(tmp_path):
    """Parquet with row groups and jsonl, weighted: what is left of the second epoch after any number of samples."""
    first, second = make_data(tmp_path / "a", 22), make_data(tmp_path / "b", 30, seed=1)
    table = write_parquet(tmp_path / "b.parquet", read_rows(second[0]), second[1], group=4)
    samples = open_samples(f"{first[0]}:0.5,{table}:1.4")
    sampler = ResumableSampler(samples.epoch_size, 2, 1, 7, lengths=partial(samples.lengths, image_tokens=196), order=partial(samples.order, 7))
    whole = list(sampler.updates(1))
    assert len(whole) == sampler.updates_per_epoch == (11 + 42 + 1) // 2
    for done in (1, 10, 26):
        assert list(sampler.updates(1, skip=2 * done)) == whole[done:]


# --- tools ------------------------------------------------------------------------------------------------------------


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("packed", [False, True])
def test_to_parquet_and_back_loses_nothing(data, zipped, tmp_path, capsys, packed):
    rows = [row | {"kind": "x", "more": {"a": [1]}} for row in read_rows(data[0])]
    rows[0].setdefault("image", None)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    places = ["--images_path", str(zipped if packed else data[1])]
    assert convert.main([str(path), *places, "--out", str(tmp_path / "shards")]) == 0
    assert list(files_in(tmp_path / "shards")) == ["data.parquet"]
    assert convert.main([str(tmp_path / "shards"), "--out", str(tmp_path / "back")]) == 0
    assert read_rows(tmp_path / "back" / "data.jsonl") == rows and files_in(tmp_path / "back" / "images") == files_in(data[1])
    samples, plain = open_samples(tmp_path / "shards"), open_samples(path)
    assert [samples[number].turns for number in range(22)] == [plain[number].turns for number in range(22)]
    assert convert.main([str(path), *places, "--out", str(tmp_path / "shards")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert convert.main([f"{path}:0.5", *places, "--out", str(tmp_path / "half")]) == 2
    assert "a weight means nothing here" in capsys.readouterr().err


def test_names_beside_the_bytes_are_kept(data, tmp_path):
    """As the datasets library writes images."""
    blob = next(data[1].iterdir()).read_bytes()
    cells = [[{"bytes": blob, "path": "my/a.png"}], [{"bytes": blob, "path": None}]]
    texts = [json.dumps(row("x", "a")["conversations"])] * 2
    parquet.write_table(arrow.table({"conversations": texts, "image_bytes": cells}), tmp_path / "a.parquet")
    assert convert.main([str(tmp_path / "a.parquet"), "--out", str(tmp_path / "back")]) == 0
    first, second = (own["image"] for own in read_rows(tmp_path / "back" / "data.jsonl"))
    assert first == ["my/a.png"] and files_in(tmp_path / "back" / "images") == {first[0]: blob, second[0]: blob}


def test_converting_bad_samples_names_them(data, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [row("x"), row("y", "missing.png"), row("z")])
    flags = [str(path), "--images_path", str(data[1]), "--out"]
    assert convert.main([*flags, str(tmp_path / "a")]) == 2
    assert f"{path}:2: image 'missing.png' is not in" in capsys.readouterr().err
    assert list((tmp_path / "a").iterdir()) == [], "what is half done is removed"
    assert convert.main([*flags, str(tmp_path / "b"), "--skip_bad"]) == 0
    assert "2 samples" in (said := capsys.readouterr().out) and "1 bad left out" in said
    assert len(open_samples(tmp_path / "b")) == 2
    escaping = json.dumps(row("x", "a")["conversations"])
    blob = next(data[1].iterdir()).read_bytes()
    parquet.write_table(arrow.table({"conversations": [escaping], "image_bytes": [[blob]], "image": [["../../evil.png"]]}), tmp_path / "e.parquet")
    assert convert.main([str(tmp_path / "e.parquet"), "--out", str(tmp_path / "c" / "d")]) == 0  # by a name of its content
    assert not list(tmp_path.rglob("evil.png")) and open_images(tmp_path / "c" / "d" / "images").read(read_rows(tmp_path / "c" / "d" / "data.jsonl")[0]["image"][0]) == blob
    path = write_jsonl(tmp_path / "none.jsonl", [row("y", "missing.png")])
    assert convert.main([str(path), "--images_path", str(data[1]), "--out", str(tmp_path / "none"), "--skip_bad"]) == 2, "nothing was good"


def test_images_are_made_smaller_only_when_asked(tmp_path):
    large = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    (tmp_path / "p").mkdir()
    large.save(tmp_path / "p" / "a.png")
    path = write_jsonl(tmp_path / "a.jsonl", [row("x", "a.png")])
    assert convert.main([str(path), "--images_path", str(tmp_path / "p"), "--out", str(tmp_path / "s"), "--resize", "100"]) == 0
    (ref,) = open_samples(tmp_path / "s")[0].images
    assert open_images(tmp_path / "none").load(ref).size == (150, 100)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_a_smaller_image_shows_what_the_larger_one_did(tmp_path, mode):
    large = Image.new("RGBA", (300, 200), (255, 0, 0, 0))  # seen on white
    if mode == "I;16":
        large = Image.fromarray(np.full((200, 300), 40_000, np.uint16))
    file = io.BytesIO()
    (large if mode == "I;16" else large.convert(mode)).save(file, "PNG")
    large, small = (preprocess(load_image(blob, mode)).int() for blob in (file.getvalue(), convert.resized(file.getvalue(), 100)))
    assert (large - small).abs().max() <= 2


def test_a_folder_takes_one_conversion(data, tmp_path, capsys):
    arguments = [str(data[0]), "--images_path", str(data[1]), "--out", str(tmp_path / "out")]
    for place in (data[0], data[0] / "below"):
        assert convert.main([*arguments[:-1], str(place)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: --out {place}: no folder can be written there (") and said.count("\n") == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.tmp").touch()
    assert convert.main(arguments) == 2 and "half done" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        convert.main([*arguments, "--resize", "-5"])


@pytest.mark.parametrize(("flags", "message"), [(["--batch_size", "0"], "greater than 0"), (["--tokens_per_second", "-1"], "greater than 0")])
def test_flags_of_validation_are_looked_at_first(data, capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        validate.main([str(data[0]), "--images_path", str(data[1]), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [(["--plot", "x.xyz"], "ends in .png"), (["--plot", f"{__file__}/x.png"], f"--plot {__file__}/x.png: no file can be written there"), (["--tokenizer_path", "nowhere"], "no tokenizer.json")])
def test_files_of_validation_are_looked_at_first(data, capsys, flags, message):
    assert validate.main([str(data[0]), "--images_path", str(data[1]), *flags]) == 2
    told = capsys.readouterr()
    assert message in told.err and not told.out


def test_validation_whose_reader_went_away_ends_quietly(data):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "dataset.validate", str(data[0]), "--images_path", str(data[1]), "--processes", "1"],
                          stdout=writer, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, timeout=300, check=False)  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_killed_process_of_validation_is_one_line(data, monkeypatch, capsys):
    monkeypatch.setattr(validate.Checker, "__getitems__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert validate.main([str(data[0]), "--images_path", str(data[1]), "--processes", "2"]) == 2
    assert "--processes" in (said := capsys.readouterr().err) and len(said.splitlines()) == 1


def test_kinds_of_trouble_and_small_numbers_are_told_as_people_read_them(tmp_path, capsys):
    pictures = tmp_path / "take 2" / "pics 3"
    pictures.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(pictures / "a.png")
    path = write_jsonl(tmp_path / "a.jsonl", [row("x", "a.png"), row("x", "7.png"), row("x", "8" * 5000)])
    assert validate.main([str(path), "--images_path", str(pictures), "--processes", "1"]) == 1
    said = capsys.readouterr().out
    assert f"  2 x image ... is not in {pictures}\n"[:100] in said
    assert max(map(len, said.splitlines())) < 400
    path = write_jsonl(tmp_path / "b.jsonl", [row("x", "a.png")])
    assert validate.main([str(path), "--images_path", str(pictures), "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "1 sample, 1 image; 0 bad" in said and "an epoch: 1 sample, 1 update of 4" in said and "with 1 process\n" in said
    assert convert.main([str(path), "--images_path", str(pictures), "--out", str(tmp_path / "shards")]) == 0
    assert capsys.readouterr().out.startswith("1 sample in ")


def test_validation_knows_the_limits_of_both_stages(tmp_path, capsys):
    defaults = {script: {"max_seq_len": TrainConfig().max_seq_len} | module.DEFAULTS
                for script, module in (("train_pretrain_vlm.py", train_pretrain_vlm), ("train_sft_vlm.py", train_sft_vlm))}  # fmt: skip
    talks = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "word " * words}] for words in (1, 700, 1700)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": talk} for talk in talks])
    for flags, limits in ([], 2), (["--max_seq_len", "100"], 3):
        assert validate.main([str(path), "--processes", "1", *flags]) == 0
        said = re.findall(r"--max_seq_len (\d+) cuts (\d) of them \(\S+\)(?:, the default of (.*))?\n", capsys.readouterr().out)
        found = {script: (int(limit), int(count)) for limit, count, script in said}
        assert {script: limit for script, (limit, _) in found.items() if script} == {script: own["max_seq_len"] for script, own in defaults.items()}
        assert [count for _, count in found.values()] == [2, 2, 1][-limits:]


def test_data_and_images_that_are_not_there_are_told_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [row("x", "nope.png")])
    for wrong in ("nope.jsonl", "nope.parquet", f"{path}:0", f"{path},./a.jsonl"):
        for program, flags in ((validate, []), (convert, ["--out", "out"])):
            assert program.main([wrong, *flags]) == 2
            assert "--data_path" not in (said := capsys.readouterr().err) and said.startswith(("error: no data at nope.", f"error: {path}", "error: ./a.jsonl", "error: a.jsonl")), said
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "nope.png")
    assert validate.main([str(path), "--processes", "1"]) == 1 and convert.main([str(path), "--out", "out"]) == 2
    told = capsys.readouterr()
    for said in (told.out, told.err):
        assert f"{path}:1: image 'nope.png'" in said and f" {REPOSITORY / 'dataset' / 'sft_images'}\n" in said


def test_validation_reports_what_training_would_meet(data, tmp_path, capsys):
    rows = read_rows(data[0])
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0], "{", row("y", "missing.png"), row("z", "gone.png")])
    flags = [str(path), "--images_path", str(data[1]), "--max_seq_len", "240", "--plot", str(tmp_path / "plot.png")]
    said = {}
    for processes in ("1", "2"):
        assert validate.main([*flags, "--processes", processes, "--tokens_per_second", "1"]) == 1
        said[processes] = capsys.readouterr().out
    assert said["1"].partition("  to read")[0] == said["2"].partition("  to read")[0]
    renderer = Renderer(AutoTokenizer.from_pretrained(REPOSITORY / "model"))
    lengths = [len(renderer.render(parse_sample(own))) for own in rows if own.get("image", "").count(",") == 0]
    too_many = len(rows) - len(lengths)  # two pictures do not fit
    for expected in ("26 samples", "2 x image ... is not in", f"{path}:25: image 'missing.png'", "1 x not json",
                     f"{too_many + (rows[0].get('image', '').count(',') == 1)} x N images of N tokens do not fit in N tokens",
                     f"longest {max(lengths)}", f"cuts {sum(length > 240 for length in lengths)} of them",
                     "an epoch: 26 samples, 7 updates of 4\n  to read: ", f" with 1 process; to train at 1 tokens/s: {np.mean(lengths) * 26 / 60:.1f} minutes"):  # fmt: skip
        assert expected in said["1"], said["1"]
    assert Image.open(tmp_path / "plot.png").size == (840, 480)
    capsys.readouterr()
    assert validate.main([str(path), "--images_path", str(data[1])]) == 1
    assert f"1 duplicate\n      {path}:23 is {path}:1" in capsys.readouterr().out
    assert validate.main([str(write_jsonl(tmp_path / "b.jsonl", rows)), *flags[1:3]]) == 0
    assert "0 bad" in capsys.readouterr().out
    assert validate.main([str(tmp_path / "none.jsonl")]) == 2


# --- what people's files are like -------------------------------------------------------------------------------------


def test_parquet_whose_text_cannot_be_read_says_so(data, tmp_path):
    good = json.dumps(row("x", "a")["conversations"]).replace("<image>", "\\u003cimage\\u003e").encode()
    cells = arrow.array([b"\xff\xfe", good], arrow.binary()).view(arrow.string())
    blob = next(data[1].iterdir()).read_bytes()
    parquet.write_table(arrow.table({"conversations": cells, "image_bytes": [None, blob]}), tmp_path / "b.parquet")
    samples = open_samples(tmp_path / "b.parquet")
    with pytest.raises(SampleError, match=r"b\.parquet:1: not UTF-8"):
        samples[0]
    assert samples[1].images == (blob,)
    assert convert.main([str(tmp_path / "b.parquet"), "--out", str(tmp_path / "b"), "--skip_bad"]) == 0


def test_zips_as_people_make_them(tmp_path):
    blobs = {}
    for colour in ("red", "blue"):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{colour}.png")
        blobs[colour] = (tmp_path / f"{colour}.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as file:
        file.writestr("__MACOSX/my/p/._a.png", b"x")
        file.writestr("my/p/a.png", blobs["red"])
        file.writestr("my/p/more/b.png", blobs["blue"])
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "mac.zip", "a") as file:
        file.writestr("my/p/a.png", blobs["blue"])
    images = open_images(tmp_path / "mac.zip")
    assert images.read("a.png") == images.read("more/b.png") == images.read("my/p/a.png") == blobs["blue"], "the last of a name counts"
    with pytest.raises(SampleError, match="is not in"):
        images.load("\ud800.png")
    assert images.read("./my//p/a.png") == images.read("./a.png") == blobs["blue"]
    with zipfile.ZipFile(tmp_path / "finder.zip", "w") as file:
        file.writestr("1111111.png", blobs["red"])
    content = (tmp_path / "finder.zip").read_bytes().replace(b"1111111", "圖/片".encode())  # in UTF-8, and does not say so
    (tmp_path / "finder.zip").write_bytes(content)
    assert open_images(tmp_path / "finder.zip").read("圖/片.png") == blobs["red"]
    for nowhere in ("", ","):
        with pytest.raises(SampleError, match="there is no folder"):
            open_images(nowhere).load("a.png")


def test_names_with_commas_and_colons(data, tmp_path, monkeypatch):
    rows = read_rows(data[0])
    (tmp_path / "run:3").mkdir()
    odd = write_jsonl(tmp_path / "run:3" / "a,b.jsonl", rows)
    assert len(open_samples(odd)) == len(open_samples(tmp_path / "run:3")) == open_samples(f"{tmp_path / 'run:3'}").epoch_size == 22
    (tmp_path / "b, with a comma").mkdir()
    pictures = shutil.copytree(data[1], tmp_path / "b, with a comma" / "p,q")
    other = write_jsonl(tmp_path / "b, with a comma" / "UPPER.JSONL", rows[:5])
    for names, weighted in ((f"{odd}, {other}", 27), (f"{other},{odd}:2", 49), (f"{odd.parent}/a,*.jsonl:0.5, {other}", 16)):
        assert open_samples(names).epoch_size == weighted
    name = next(data[1].iterdir()).name
    for places in (f"{pictures}", f"{pictures}, {tmp_path / 'run:3'}", f"{tmp_path / 'run:3'},{pictures}"):
        assert open_images(places).load(name).size == (40, 30)
    many = [write_jsonl(tmp_path / f"{number:03}.jsonl", rows[:1]) for number in range(60)]
    monkeypatch.chdir(tmp_path)  # then they are longer together than a name may be
    assert len(open_samples(",".join(path.name for path in many))) == 60
    with pytest.raises(DataError, match=r"no data at 999\.jsonl\."):
        open_samples(",".join([*(path.name for path in many), "999.jsonl", *(path.name for path in many)]))


def test_links_in_a_circle(data, tmp_path):
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", read_rows(data[0]))
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    assert len(open_samples(f"{tmp_path}/in/**/*.jsonl")) == 22
    for entry in ("self.jsonl", "*.jsonl"):
        with pytest.raises(DataError, match=r"symbolic links|no data"):
            open_samples(tmp_path / entry)


TALK = [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize(
    ("columns", "fields"),
    [({"more": 7}, {"more": 7}), ({"more": "a note"}, {"more": "a note"}), ({"more": '{"conversations": []}'}, {}),
     ({"more": '{"image": "b.png", "kind": 7}'}, {"image": "b.png", "kind": 7}),
     ({"more": '{"image": "b.png"}', "image": ["a.png"]}, {"image": "b.png"}), ({"image": ["a.png", "b.png"]}, {}),
     ({"url": "u", "when": datetime(2024, 1, 2), "score": 0.5, "tags": ["a"]}, {"url": "u", "when": "2024-01-02 00:00:00", "score": 0.5, "tags": ["a"]}),
     ({"thumbnail": b"..."}, {}), ({"image": 7}, {}), ({"messages": "m", "texts": ["t"]}, {"messages": "m", "texts": ["t"]}), ({"images": 3}, {"images": 3}), ({"images": ["c.png"]}, {"images": ["c.png"]})],
)  # fmt: skip
def test_further_columns_of_parquet_become_fields(data, tmp_path, columns, fields, capsys):
    blob = next(data[1].iterdir()).read_bytes()
    cells = {"conversations": json.dumps(TALK), "image_bytes": blob, **columns}
    parquet.write_table(arrow.table({name: [cell] for name, cell in cells.items()}), tmp_path / "a.parquet")
    assert open_samples(tmp_path / "a.parquet")[0].images == (blob,)
    assert convert.main([str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]) == 0
    (found,) = read_rows(tmp_path / "out" / "data.jsonl")
    (name,) = (path.name for path in (tmp_path / "out" / "images").iterdir())
    assert found == {"conversations": TALK, "image": [name]} | fields
    assert ("left out are the columns thumbnail" in capsys.readouterr().err) == ("thumbnail" in columns)
    assert open_samples(tmp_path / "out")[0].kind == str(fields.get("kind", ""))


def test_different_images_of_one_name_are_both_kept(data, tmp_path):
    one, other = (path.read_bytes() for path in sorted(data[1].iterdir())[:2])
    cells = [{"bytes": blob, "path": "image.png"} for blob in (one, other, one)]
    table = {"conversations": [json.dumps(TALK)] * 3, "image": cells}
    parquet.write_table(arrow.table(table), tmp_path / "a.parquet")
    assert convert.main([str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]) == 0
    images = open_images(tmp_path / "out" / "images")
    assert [images.read(sample.images[0]) for sample in map(open_samples(tmp_path / "out").__getitem__, range(3))] == [one, other, one]
    table["image"] = [[{"bytes": one, "path": "a\0.png"}]] * 3
    parquet.write_table(arrow.table(table), tmp_path / "b.parquet")
    assert convert.main([str(tmp_path / "b.parquet"), "--out", str(tmp_path / "other")]) == 0
    assert files_in(tmp_path / "other" / "images").keys() == {open_samples(tmp_path / "other")[0].images[0]}


def test_conversion_keeps_odd_names(tmp_path, data):
    (tmp_path / "p").mkdir()
    shutil.copy(next(data[1].iterdir()), tmp_path / "p" / "a,b.png")
    odd = row("half \\ud83d", None) | {"note": "\ud83d"}
    rows = [row("x") | {"image": ["a,b.png"]}, odd]
    rows[0]["conversations"][0]["content"] = "<image>x"
    path = write_jsonl(tmp_path / "a.jsonl", [json.dumps(own) for own in rows])
    assert convert.main([str(path), "--images_path", str(tmp_path / "p"), "--out", str(tmp_path / "s")]) == 0
    assert convert.main([str(tmp_path / "s"), "--out", str(tmp_path / "back")]) == 0
    assert read_rows(tmp_path / "back" / "data.jsonl") == rows


# --- parquet as others write it -----------------------------------------------------------------------------------------

CODED, PAIR = arrow.dictionary(arrow.int32(), arrow.binary()), arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
TURN = arrow.struct([("role", arrow.large_string()), ("content", arrow.string())])
IMAGE_TYPES = [
    arrow.binary(), arrow.large_binary(), arrow.binary_view(), "fixed", CODED, PAIR, arrow.struct([("path", arrow.string()), ("bytes", CODED)]),
]  # fmt: skip
LISTS = [lambda kind: kind, arrow.list_, arrow.large_list, arrow.list_view, lambda kind: arrow.list_(kind, 1)]


def column_of(cells: list, kind: arrow.DataType) -> arrow.Array:
    try:
        return arrow.array(cells, kind)
    except (arrow.ArrowException, TypeError):
        try:  # arrow makes some by a cast alone
            return arrow.array(cells).cast(kind)
        except (arrow.ArrowException, TypeError):
            pytest.skip("arrow itself makes no such column")


@pytest.mark.parametrize("lists", LISTS, ids=["one", "list", "large_list", "list_view", "fixed_size_list"])
@pytest.mark.parametrize("kind", IMAGE_TYPES, ids=str)
def test_every_type_of_bytes_holds_images(data, tmp_path, kind, lists):
    blob = next(data[1].iterdir()).read_bytes()
    kind = arrow.binary(len(blob)) if kind == "fixed" else kind
    cells = [blob] * 3 if not arrow.types.is_struct(kind) else [{"bytes": blob, "path": "a.png"}] * 3
    column = column_of(cells if lists is LISTS[0] else [[cell] for cell in cells], lists(kind))
    for name in ("image_bytes", "images", "image"):
        parquet.write_table(arrow.table({"conversations": [json.dumps(TALK)] * 3, name: column}), tmp_path / f"{name}.parquet")
        samples = open_samples(tmp_path / f"{name}.parquet")
        assert [samples[number].images for number in range(3)] == [(blob,)] * 3
    assert convert.main([str(tmp_path / "images.parquet"), "--out", str(tmp_path / "out")]) == 0
    assert [path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()] == [blob]


@pytest.mark.parametrize("kind", [arrow.string(), arrow.large_string(), arrow.string_view(), arrow.binary(), arrow.binary_view(),
                                  arrow.dictionary(arrow.int32(), arrow.string()), CODED, arrow.large_list(TURN), arrow.list_view(TURN)], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_every_type_of_text_holds_conversations(tmp_path, name, kind):
    column = column_of([TALK] * 2 if hasattr(kind, "value_field") else [json.dumps(TALK)] * 2, kind)
    parquet.write_table(arrow.table({name: column, "image": ["a.png", "b.png"], "id": [1, 2]}), tmp_path / "a.parquet")
    samples = open_samples(tmp_path / "a.parquet")
    assert [[turn.content for turn in samples[number].turns] for number in range(2)] == [["<image>x", "y"]] * 2
    assert samples[1].images == ("b.png",), "a name in --images_path"
    assert samples.lengths(np.arange(2), 196).min() >= 196


def test_images_by_path_alone_and_others(data, tmp_path):
    first, second = sorted(path.name for path in data[1].iterdir())[:2]
    blob = (data[1] / second).read_bytes()
    cells = [[{"bytes": None, "path": first}], [{"bytes": blob, "path": None}], [{"bytes": None, "path": None}], [{"bytes": None, "path": "http://x/a.png"}], []]
    parquet.write_table(arrow.table({"conversations": [json.dumps(TALK)] * 5, "images": arrow.array(cells, arrow.list_(PAIR))}), tmp_path / "a.parquet")
    samples, places = open_samples(tmp_path / "a.parquet"), ["--images_path", str(data[1]), "--out", str(tmp_path / "out"), "--skip_bad"]
    assert [samples[number].images for number in (0, 1)] == [(first,), (blob,)]
    for number, problem in ((2, "something other than bytes or a file name"), (3, "lies on the web: download it"), (4, "1 <image> placeholders .* 0 images")):
        with pytest.raises(SampleError, match=problem):
            samples[number]
    assert convert.main([str(tmp_path / "a.parquet"), *places]) == 0
    assert sorted(path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()) == sorted([blob, (data[1] / first).read_bytes()])
    texts = [json.dumps(TALK).replace("<image>", "")] * 3
    for none in ([None] * 3, [{"bytes": None, "path": None}] * 3):
        parquet.write_table(arrow.table({"conversations": texts, "image": arrow.array(none, PAIR)}), tmp_path / "b.parquet")
        assert open_samples(tmp_path / "b.parquet")[0].images == ()
    parquet.write_table(arrow.table({"conversations": texts, "image": [first, None, ""]}), tmp_path / "b.parquet")
    assert open_samples(tmp_path / "b.parquet")[1].images == open_samples(tmp_path / "b.parquet")[2].images == ()
    with pytest.raises(SampleError, match=r"0 <image> placeholders .* 1 images"):  # only `image_bytes` has placeholders
        open_samples(tmp_path / "b.parquet")[0]


# --- other projects' formats ----------------------------------------------------------------------------------------------

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}
SEEN = [("user", "<image>\nWhat?"), ("assistant", "A cat.")]
TEXT, ANSWER = {"type": "text", "text": "What?"}, {"role": "assistant", "content": "A cat."}


def pixel(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(file, "PNG")
    return file.getvalue()


DATA_URL = f"data:image/png;base64,{base64.b64encode(pixel()).decode()}"
FOREIGN = {  # format, row, turns, images
    "llava": ("llava", {"id": 1, "image": "a.png", "conversations": [HUMAN, GPT]}, SEEN, ("a.png",)),
    "llava, mark at the end": ("llava", {"image": "a.png", "conversations": [{"from": "human", "value": "What?\n<image>"}, GPT]},
                               [("user", "What?\n<image>"), SEEN[1]], ("a.png",)),
    "llava without image": ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, GPT]}, [("user", "Hi"), SEEN[1]], ()),
    "llava with a comma": ("llava", {"image": "a, b.png", "conversations": [HUMAN, GPT]}, SEEN, ("a, b.png",)),
    "llava, mark in an answer": ("llava", {"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": "<image> is a mark"}]},
                                 [SEEN[0], ("assistant", "<\u200bimage> is a mark")], ("a.png",)),
    "sharegpt": ("sharegpt", {"system": "Be kind.", "images": ["a.png"], "conversations": [
        HUMAN, {"from": "function_call", "value": "f()"}, {"from": "observation", "value": "7"}, GPT]},
        [("system", "Be kind."), SEEN[0], ("assistant", "f()"), ("user", "7"), SEEN[1]], ("a.png",)),
    "sharegpt, roles": ("sharegpt", {"conversations": [{"from": "system", "value": "S"}, {"from": "User", "value": "Hi"}, {"from": "Bot", "value": "Yo"}]},
                        [("system", "S"), ("user", "Hi"), ("assistant", "Yo")], ()),
    "openai": ("openai", {"messages": [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": DATA_URL}}]}, ANSWER]},
               [("user", "What?\n<image>"), SEEN[1]], (pixel(),)),
    "openai, a name": ("openai", {"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": [
        {"type": "image_url", "image_url": "a.png"}, {"type": "input_image", "image_url": {"url": "b.png", "detail": "low"}}, TEXT]}, ANSWER]},
        [("system", "S"), ("user", "<image>\n<image>\nWhat?"), SEEN[1]], ("a.png", "b.png")),
    "openai, text": ("openai", {"messages": [{"role": "user", "content": "Hi"}, ANSWER]}, [("user", "Hi"), SEEN[1]], ()),
    "openai, a typed mark": ("openai", {"messages": [{"role": "user", "content": [{"type": "image", "image": "file://a.png"}, {"type": "text", "text": "<image>?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}, "B"]}]}, [("user", "<image>\n<\u200bimage>?"), ("assistant", "A\nB")], ("a.png",)),
    "qwen": ("openai", {"messages": [{"role": "user", "content": [{"type": "image", "image": DATA_URL}, TEXT]}, ANSWER]}, SEEN, (pixel(),)),
    "chat template": ("openai", {"images": ["a.png", "b.png"], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What?", "index": None}, {"type": "image", "text": None, "index": 0}]}, ANSWER,
        {"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        [("user", "What?\n<image>"), SEEN[1], ("user", "<image>"), SEEN[1]], ("a.png", "b.png")),
    "by number": ("openai", {"images": [DATA_URL, "a.png"], "messages": [
        {"role": "user", "content": [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "image", "index": 1}]}, ANSWER]},
        [("user", "<image>\n<image>\n<image>"), SEEN[1]], ("a.png", pixel(), "a.png")),
    "llama-factory": ("openai", {"messages": [{"role": "user", "content": "<image>\nWhat?"}, ANSWER], "images": ["a.png"]}, SEEN, ("a.png",)),
    "our turns, others' roles": ("openai", {"conversations": [{"role": "Human", "content": "<image>\nWhat?"}, {"role": "ASSISTANT", "content": "A cat."}],
                                            "image": "a.png"}, SEEN, ("a.png",)),
    "our turns, others' images": ("openai", {"conversations": [{"role": "user", "content": "What?"}, ANSWER], "images": ["a.png"]}, SEEN, ("a.png",)),
    "alpaca": ("alpaca", {"instruction": "What?", "input": "", "output": "A cat.", "image": "a.png"}, SEEN, ("a.png",)),
    "alpaca, all": ("alpaca", {"system": "S", "instruction": "Add", "input": "1, 2", "output": "3", "history": [["Hi", "Yo"]], "images": ["a.png"]},
                    [("system", "S"), ("user", "<image>\nHi"), ("assistant", "Yo"), ("user", "Add\n1, 2"), ("assistant", "3")], ("a.png",)),
    "cauldron": ("cauldron", {"images": [{"bytes": pixel(), "path": None}, {"bytes": pixel("blue"), "path": None}],
                              "texts": [{"user": "What?", "assistant": "A cat.", "source": "x"}, {"user": "And?", "assistant": ""}]},
                 [("user", "<image>\n<image>\nWhat?"), SEEN[1], ("user", "And?"), ("assistant", "")], (pixel(), pixel("blue"))),
    "cauldron, text": ("cauldron", {"images": [], "texts": [{"user": "Hi", "assistant": "Yo"}]}, [("user", "Hi"), ("assistant", "Yo")], ()),
}  # fmt: skip


@pytest.fixture
def coloured(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "a, b.png"):
        (tmp_path / "images" / name).write_bytes(pixel())
    return tmp_path / "images"


@pytest.mark.parametrize("name", FOREIGN)
def test_rows_of_other_formats(name, coloured, tmp_path, capsys):
    """Found out or named, to parquet and to jsonl; and the error of training gives the command."""
    form, own, turns, images = FOREIGN[name]
    if name == "cauldron":
        kind = {"images": arrow.list_(PAIR), "texts": arrow.list_(arrow.struct([(key, arrow.string()) for key in ("user", "assistant", "source")]))}
        path = tmp_path / "a.parquet"
        parquet.write_table(arrow.Table.from_pylist([own], arrow.schema(kind)), path)
    else:
        path = write_jsonl(tmp_path / "a.jsonl", [own])
    blobs = [image if isinstance(image, bytes) else (coloured / image).read_bytes() for image in images]
    for number, flags in enumerate(([], ["--from", form], ["--to", "jsonl"], ["--from", form, "--to", "jsonl"])):
        out = tmp_path / f"out{number}"
        assert convert.main([str(path), "--images_path", str(coloured), "--out", str(out), *flags]) == 0, capsys.readouterr().err
        (sample,) = map(open_samples(out).__getitem__, range(1))
        assert [(turn.role, turn.content) for turn in sample.turns] == turns
        assert [image if isinstance(image, bytes) else (out / "images" / image).read_bytes() for image in sample.images] == blobs
    if name != "our turns, others' images":  # which are text without image, to training
        command = f"python -m dataset.convert --from {form} {path} --out shards"
        with pytest.raises((SampleError, DataError), match=re.escape(command)):
            open_samples(path)[0]


@pytest.mark.parametrize(
    ("form", "own", "problem"),
    [("llava", {"conversations": [HUMAN, GPT]}, "1 <image> placeholders .* 0 images"),
     ("llava", {"image": ["a.png", "b.png"], "conversations": [HUMAN, GPT]}, "1 <image> placeholders .* 2 images"),
     ("llava", {"image": "none.png", "conversations": [HUMAN, GPT]}, "is not in"),
     ("llava", {"image": "a.png", "conversations": "Hi"}, "no row of the format llava"),
     ("llava", {"image": "a.png", "conversations": [HUMAN, {"from": "gpt"}]}, "no row of the format llava .*value"),
     ("llava", {"image": "a.png", "conversations": [{"from": "narrator", "value": "Hi"}, GPT]}, "role 'narrator'"),
     ("llava", {"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": None}]}, "content of type NoneType"),
     ("llava", [HUMAN, GPT], "no row of the format llava"),
     ("openai", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/a.png"}}]}, ANSWER]}, "lies on the web: download"),
     ("openai", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,x"}}]}, ANSWER]}, "is no data URL"),
     ("openai", {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:image/svg+xml,<svg/>"}]}, ANSWER]}, "no data URL in base64"),
     ("openai", {"messages": []}, "'conversations' is missing, empty"),
     ("openai", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}, ANSWER]}, "has tool_calls, .*--skip_bad"),
     ("openai", {"messages": [{"role": "user", "content": "Hi"}, ANSWER | {"weight": 0}, ANSWER]}, "has weight: 0, .*--skip_bad"),
     ("openai", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER]}, "a part of type 'input_audio'"),
     ("openai", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, r"show the images \[0\], .* has 0"),
     ("openai", {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, r"show the images \[0\], .* has 2"),
     ("openai", {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image", "image": DATA_URL}]}, ANSWER]}, r"show the images \[\], .* has 1"),
     ("openai", {"images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image", "index": 1}]}, ANSWER]}, r"show the images \[1\], .* has 1"),
     ("openai", {"messages": [{"role": "user", "content": [{"type": "image", "image": {"url": 7}}]}, ANSWER]}, "something other than bytes"),
     ("openai", {"messages": [{"role": "user", "content": [7]}, ANSWER]}, "no row of the format openai"),
     ("alpaca", {"instruction": "What?", "output": "A cat.", "history": ["Hi"], "input": 7}, "no row of the format alpaca"),
     ("cauldron", {"images": [], "texts": None}, "no row of the format cauldron"),
     ("cauldron", {"images": [], "texts": []}, "'conversations' is missing, empty")],
)  # fmt: skip
def test_rows_of_other_formats_that_cannot_be_used_say_why(form, own, problem, coloured, tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"image": "a.png", "conversations": [HUMAN, GPT]} if form == "llava" else FOREIGN[form][1] if form != "cauldron" else FOREIGN["cauldron, text"][1], own])
    flags = [str(path), "--from", form, "--images_path", str(coloured), "--out", str(tmp_path / "out")]
    assert convert.main(flags) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}:2: ") and re.search(problem, said) and "Traceback" not in said
    assert convert.main([*flags[:-1], str(tmp_path / "rest"), "--skip_bad"]) == 0 and "1 bad left out" in capsys.readouterr().out
    assert len(open_samples(tmp_path / "rest")) == 1


def test_parquet_and_fields_of_other_formats(tmp_path, capsys):
    """Llava's turns as structs and as json text; OpenAI's parts as structs; and fields that nobody knows stay."""
    turn = arrow.struct([("role", arrow.string()), ("content", arrow.list_(arrow.struct([("type", arrow.string()), ("text", arrow.string()), ("image", PAIR)])))])
    parts = [{"role": "user", "content": [{"type": "image", "text": None, "image": {"bytes": pixel(), "path": None}}, TEXT]},
             {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]  # fmt: skip
    images = arrow.array([[{"bytes": pixel(), "path": "a.png"}]], arrow.list_(PAIR))
    for number, columns in enumerate([{"messages": arrow.array([parts], arrow.list_(turn))}, {"conversations": [[HUMAN, GPT]], "images": images},
                                      {"conversations": [json.dumps([HUMAN, GPT])], "images": images}]):  # fmt: skip
        path, out = tmp_path / f"{number}.parquet", tmp_path / f"out{number}"
        parquet.write_table(arrow.table(columns | {"id": [7]}), path)
        with pytest.raises(SampleError, match=r"python -m dataset\.convert --from (openai|llava|sharegpt)"):
            open_samples(path)[0]
        assert convert.main([str(path), "--out", str(out)]) == 0, capsys.readouterr().err
        (found,) = read_rows(out / "data.jsonl")
        assert [tuple(turn.values()) for turn in found["conversations"]] == SEEN and found["id"] == 7
        assert [path.read_bytes() for path in (out / "images").iterdir()] == [pixel()]


def test_rows_that_are_ours_are_no_other_format(data):
    assert {foreign.detect(own) for own in [*read_rows(data[0]), None, [], {}, {"conversations": 1}, {"conversations": [7]}, row("x", "a.png")]} == {None}


def test_parquet_without_rows_is_no_data_alone_and_no_error_beside_others(data, tmp_path, capsys):
    parts = tmp_path / "parts"
    parts.mkdir()
    table = parquet.read_table(write_parquet(parts / "b.parquet", read_rows(data[0])[:4], data[1]))
    parquet.write_table(table.slice(0, 0), parts / "a.parquet")
    assert convert.main([str(parts), "--out", str(tmp_path / "out")]) == 0 and len(open_samples(tmp_path / "out")) == len(open_samples(parts)) == 4
    assert convert.main([str(parts / "a.parquet"), "--out", str(tmp_path / "none")]) == 2
    assert "a.parquet holds no samples" in capsys.readouterr().err
