"""Interrupted, corrupt, refused, resized: whatever happens, what was done is not lost."""

import contextlib
import errno
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model import storage
from model.errors import UsageError
from model.storage import StorageError, hold, write_atomically
from model.weights import half_weights, load_weights, read_sidecar, read_tensors, save_weights, write_weights
from tests.conftest import (
    REPOSITORY,
    children,
    kill_tree,
    make_data,
    make_model,
    read_metrics,
    read_until,
    run_script,
    start_on_disk,
    training_flags,
    write_jsonl,
)
from tests.storm import Storm
from tests.test_training import NAME, assert_same, make_trainer, run_training, train, weights
from trainer import checkpoint, distributed, resume
from trainer.checkpoint import TrainState
from trainer.config import parse_config
from trainer.guards import TrainingFailed
from trainer.loop import cosine
from trainer.main import claim_outputs
from trainer.sampler import ResumableSampler

STATE = f"{NAME}_resume.pth"


def put(text: str):
    return lambda file: file.write(text.encode())


# --- files --------------------------------------------------------------------------------------------------------------


class Died(BaseException):
    """Stands for the end of the process."""


def dying_at(step: int, monkeypatch) -> None:
    """The process dies at the n-th call that changes the disk, and cleans nothing up."""
    calls = 0

    def dying(function):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls > step:
                raise Died
            return function(*arguments, **keywords)

        return call

    for name in ("fsync", "replace", "link"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(storage.Path, "unlink", dying(storage.Path.unlink))


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("step", range(9))
def test_a_file_is_old_or_new_wherever_its_writer_dies(tmp_path, monkeypatch, step, links):
    path, before = tmp_path / "a", tmp_path / "before"
    for text in ("1", "2"):
        write_atomically(path, put(text), before)
    with monkeypatch.context() as patch:
        if not links:
            patch.setattr(os, "link", refuse_link)
        dying_at(step, patch)
        with contextlib.suppress(Died):
            write_atomically(path, put("3"), before)
    assert (path.read_text(), before.read_text()) in [("2", "1"), ("2", "2"), ("3", "2")]
    for file in (path, before):
        storage.remove_temporaries(file)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "before"]


def refuse_link(*_):
    raise PermissionError(errno.EPERM, "no hard links here")


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.EIO, "check the disk"),
                                                (errno.EROFS, "read-only"), (errno.EACCES, "permissions")])  # fmt: skip
def test_a_disk_that_refuses_changes_nothing_and_leaves_nothing(tmp_path, number, remedy):
    path = tmp_path / "a"
    write_atomically(path, put("1"))

    def refuse(file):
        file.write(b"half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageError, match=remedy):
        write_atomically(path, refuse)
    assert path.read_text() == "1" and len(list(tmp_path.iterdir())) == 1


def test_a_file_too_large_for_the_disk_changes_nothing_and_leaves_nothing(tmp_path):
    """The system's own refusal, in the middle of torch.save."""
    path = tmp_path / "w.pth"
    script = f"""
import resource, signal, sys, torch
from pathlib import Path
from model.storage import StorageError, write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    write_atomically(Path({str(path)!r}), lambda file: torch.save(torch.ones(10**6), file))
except StorageError as error:
    sys.exit(f"refused: {{error}}")
"""
    write_atomically(path, lambda file: torch.save(torch.ones(3), file))
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "refused: cannot write in" in done.stderr and "File too large" in done.stderr, done.stderr
    assert [item.name for item in tmp_path.iterdir()] == ["w.pth"]
    assert torch.equal(torch.load(path, weights_only=True), torch.ones(3))


@pytest.mark.parametrize("step", range(7))
def test_weights_and_sidecar_belong_together_wherever_their_writer_dies(tmp_path, monkeypatch, step):
    """Always readable by the strict reader, and it is one of the two saves that is read."""
    path, models = tmp_path / "w_32.pth", [make_model(seed) for seed in (1, 2)]
    before = write_weights(path, half_weights(models[0]), models[0].config.to_diff_dict(), {})
    with monkeypatch.context() as patch:
        dying_at(step, patch)
        with contextlib.suppress(Died):
            write_weights(path, half_weights(models[1]), models[1].config.to_diff_dict(), {}, before)
    read = make_model(3)
    load_weights(path, read)
    name = "model.embed_tokens.weight"
    assert any(torch.equal(read.state_dict()[name], model.state_dict()[name].half().float()) for model in models)


def test_a_sidecar_of_other_weights_is_refused(tmp_path):
    """Exchanged by hand; cut short at the first save over the weights of another run; and a sidecar as older versions wrote."""
    paths = [tmp_path / f"{name}_32.pth" for name in "ab"]
    for seed, path in enumerate(paths):
        save_weights(path, make_model(seed), {})
    sidecars = [path.with_suffix(".json") for path in paths]
    texts = [sidecar.read_text() for sidecar in sidecars]
    sidecars[0].write_text(texts[1])
    with pytest.raises(UsageError, match=r"a_32\.json belongs to other weights .*--from_resume 1"):
        load_weights(paths[0], make_model())
    content = json.loads(texts[0])
    del content["weights"]
    sidecars[0].write_text(json.dumps(content))
    load_weights(paths[0], make_model())
    sidecars[0].write_text(json.dumps(content | {"weights": 3}))
    with pytest.raises(UsageError, match=r"a_32\.json is broken"):
        load_weights(paths[0], make_model())


def test_names_that_are_no_utf_8_are_saved_and_read(data, encoder_folder, tmp_path):
    """A folder's name may be any bytes; it stands in the sidecar and in the state."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9"))
    odd.mkdir()
    (odd / "data.jsonl").write_bytes(data[0].read_bytes())
    train((odd / "data.jsonl", data[1]), encoder_folder, odd)
    sidecar = read_sidecar(odd / "out" / f"{NAME}.pth")
    assert sidecar["training"]["data_path"] == str(odd / "data.jsonl")
    done = train((odd / "data.jsonl", data[1]), encoder_folder, odd, from_resume=1, epochs=2)
    assert "11 updates done" in done.stderr and "does not hold" not in done.stderr


@pytest.mark.parametrize("place", ["weights", "sidecar", "metrics", "state", "previous"])
def test_a_folder_in_the_place_of_a_file_is_named_before_the_first_update(data, encoder_folder, tmp_path, place):
    names = {"weights": f"out/{NAME}.pth", "sidecar": f"out/{NAME}.json", "metrics": f"out/{NAME}.metrics.jsonl",
             "state": f"checkpoints/{STATE}", "previous": f"checkpoints/{NAME}_resume_previous.pth"}  # fmt: skip
    config = parse_config("", {"save_weight": "sft_vlm"}, training_flags(data, encoder_folder, tmp_path))
    (tmp_path / names[place]).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"{names[place]}: a folder"):
        claim_outputs(config, distributed.start("cpu"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 524])
def test_a_file_system_without_locks_is_warned_of(data, encoder_folder, tmp_path, monkeypatch, capsys, number):
    """NFS, Lustre: training, the feature cache and indices continue."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    trainer = make_trainer(data, encoder_folder, tmp_path, cache_features=1)
    locks = claim_outputs(trainer.config, trainer.ranks)
    assert trainer.train() == 0
    for lock in locks:
        lock.release()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "without locks" in line]
    assert len(set(warnings)) == len(warnings) >= 2 and all("nothing keeps a second run" in line for line in warnings)


def test_a_checkpoint_folder_that_refuses_is_named_and_costs_no_weights(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    saver = checkpoint.Saver(resumed=False)
    saver.save(tmp_path / "out" / f"{NAME}.pth", make_model(), {}, tmp_path / "checkpoints" / STATE, {})
    with pytest.raises(StorageError, match=re.escape(f"cannot write in {tmp_path / 'checkpoints'}")):
        saver.wait()
    load_weights(tmp_path / "out" / f"{NAME}.pth", make_model())


def test_outputs_that_were_moved_are_resumed_in_their_new_place(data, encoder_folder, tmp_path):
    """Killed between state and weights; then both folders go elsewhere, and nothing is looked for in the old place."""
    old, new = tmp_path / "old", tmp_path / "new"
    train(data, encoder_folder, tmp_path / "whole", epochs=2)
    train(data, encoder_folder, old)
    for name in (f"{NAME}.pth", f"{NAME}.json"):
        (old / "out" / name).unlink()
    old.rename(new)
    train(data, encoder_folder, new, from_resume=1)
    load_weights(new / "out" / f"{NAME}.pth", make_trainer(data, encoder_folder, tmp_path / "other").run.model)
    assert not old.exists()
    train(data, encoder_folder, new, from_resume=1, epochs=2)
    assert weights(new).keys() == weights(tmp_path / "whole").keys()


def test_a_resume_with_nothing_to_do_writes_weights_that_are_older_than_the_state(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path)
    expected, update = weights(tmp_path), read_sidecar(tmp_path / "out" / f"{NAME}.pth")["progress"]["update"]
    save_weights(tmp_path / "out" / f"{NAME}.pth", make_trainer(data, encoder_folder, tmp_path / "other").run.model, {"progress": {"update": 1}})
    train(data, encoder_folder, tmp_path, from_resume=1)
    assert_same(expected, weights(tmp_path))
    assert read_sidecar(tmp_path / "out" / f"{NAME}.pth")["progress"]["update"] == update


def test_data_that_let_a_run_down_cost_none_of_it(encoder_folder, tmp_path):
    data = make_data(tmp_path, 22)
    train(data, encoder_folder, tmp_path / "whole")
    order = list(make_trainer(data, encoder_folder, tmp_path / "order").run.sampler.updates(0))
    at, sample = next((at, number) for at, ((*numbers,),) in enumerate(order) if at > 3 for number in numbers
                      if (data[1] / f"{number}_0.png").exists())  # fmt: skip
    image = data[1] / f"{sample}_0.png"
    content = image.read_bytes()
    image.write_bytes(b"no image")
    done = run_training(data, encoder_folder, tmp_path / "part", on_bad_sample="raise")
    assert done.returncode == 1 and f"until update {at} is saved" in done.stderr and "Traceback" not in done.stderr
    image.write_bytes(content)
    train(data, encoder_folder, tmp_path / "part", from_resume=1)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "part"))


def test_mended_data_continue_and_others_start_from_the_saved_weights(data, encoder_folder, tmp_path, capsys):
    """What a run says that stopped for its data is what works."""
    rows, bad = data[0].read_text().splitlines(), '{"conversations": 3}'

    def trainer(lines, **flags):
        return make_trainer((write_jsonl(tmp_path / "data.jsonl", lines), data[1]), encoder_folder, tmp_path, save_weight="sft_vlm", **flags)

    def stopped():
        with pytest.raises(TrainingFailed, match=r"a line for a line, and continue with --from_resume 1; .*--from_weight sft_vlm without"):
            trainer([*rows, *[bad] * 11]).train()

    stopped()
    mended = trainer([*rows, *rows[:11]], from_resume=1)
    assert mended.state.epoch_bad == 0 < mended.state.update < 17 and mended.train() == 0 and mended.state.update == 17
    stopped()
    with pytest.raises(UsageError, match=r"33 training samples, .* has 22: .*--from_weight sft_vlm without --from_resume"):
        trainer(rows, from_resume=1)
    assert trainer(rows, from_weight="sft_vlm").train() == 0
    assert "weights from" in capsys.readouterr().err


# --- a log that cannot be written, a terminal that is gone ---------------------------------------------------------------


@pytest.mark.parametrize(("shell", "processes"), [("2>/dev/full", 0), (">&- 2>&- <&-", 0), ("2>&1 | true", 2)])
def test_a_log_that_cannot_be_written_costs_nothing(encoder_folder, tmp_path, shell, processes):
    """Nor one that cannot spell: a bad sample names a file in Chinese."""
    data = make_data(tmp_path / "圖", 22)
    rows = [*data[0].read_text().splitlines(), '{"conversations": 3}']
    flags = training_flags((write_jsonl(data[0], rows), data[1]), encoder_folder, tmp_path, eval_data_path=0.2)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes else []
    command = shlex.join([sys.executable, *launcher, str(REPOSITORY / "train_sft_vlm.py"), *flags])
    subprocess.run(["bash", "-c", f"({command}; echo $? >{tmp_path}/code) {shell}"], timeout=300, check=False, stderr=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii:strict"})  # fmt: skip
    assert (tmp_path / "code").read_text() == "0\n"
    assert read_metrics(tmp_path, NAME)[-1]["eval_loss"] > 0 and len(weights(tmp_path)) > 3
    assert resume.load_training_state(tmp_path / "checkpoints" / STATE)[0]["state"]["epoch"] == 1


def test_a_full_pipe_loses_a_message_and_a_slow_one_does_not(tmp_path):
    """A pipe that does not wait raises BlockingIOError in Python's own stream."""
    code = "import os, sys; from trainer.main import keep_talking; os.set_blocking(2, False); keep_talking()\n" \
           "for n in range(9999): print(n, 'x' * 100, file=sys.stderr)\nprint('the end')"  # fmt: skip
    reader, writer = os.pipe()
    done = subprocess.run([sys.executable, "-c", code], stderr=writer, capture_output=False, stdout=subprocess.PIPE, text=True,
                          cwd=REPOSITORY, timeout=120, check=False)  # fmt: skip
    os.close(reader)
    os.close(writer)
    assert (done.returncode, done.stdout) == (0, "the end\n")


@pytest.mark.parametrize(("launcher", "code"), [([], 129), (["nohup"], 0), (["nohup", "torchrun"], None)])
def test_a_closed_terminal_saves_but_not_under_nohup(data, encoder_folder, tmp_path, launcher, code):
    """The signal comes twice, by the shell and by the system, and to all processes. torchrun ends its workers even under nohup."""
    grouped, epochs = "torchrun" in launcher, 400 if code != 0 else 4
    command = [*launcher[:1], sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] * grouped),
               str(REPOSITORY / "train_sft_vlm.py"), *training_flags(data, encoder_folder, tmp_path, epochs=epochs, save_interval=10_000)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    read_until(process, "update 3/")
    os.killpg(process.pid, signal.SIGHUP)
    if not grouped:
        os.killpg(process.pid, signal.SIGHUP)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == code or grouped, rest
    assert ("stopped by SIGHUP" in rest) == (code != 0), rest
    state = resume.load_training_state(tmp_path / "checkpoints" / STATE)[0]["state"]
    assert state["update"] >= 3 and (code != 0 or state["epoch"] == 4)


# --- one writer at a time ---------------------------------------------------------------------------------------------


def test_a_second_process_on_the_same_output_is_refused(data, encoder_folder, tmp_path):
    flags = training_flags(data, encoder_folder, tmp_path, epochs=500)
    command = [sys.executable, str(REPOSITORY / "train_sft_vlm.py"), *flags]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for line in first.stderr:
            if "update 2/" in line:
                break
        second = run_script("train_sft_vlm.py", *flags)
        assert second.returncode == 2 and "Traceback" not in second.stderr
        assert "another run writes the same files" in second.stderr and f"process {first.pid}" in second.stderr
    finally:
        os.kill(first.pid, signal.SIGKILL)  # its loader process lives on for a while: the lock must not
        first.wait()
    done = run_script("train_sft_vlm.py", *training_flags(data, encoder_folder, tmp_path))
    assert done.returncode == 0, done.stderr
    first.stderr.close()


def test_a_lock_left_behind_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    hold(tmp_path / ".lock").release()


# --- resume -----------------------------------------------------------------------------------------------------------


def test_a_corrupt_newest_state_is_reported_and_the_previous_used(data, encoder_folder, tmp_path):
    flags = {"epochs": 2, "save_interval": 1}
    train(data, encoder_folder, tmp_path / "whole", **flags)
    part = tmp_path / "part"
    train(data, encoder_folder, part, **{**flags, "epochs": 1})
    state = part / "checkpoints" / STATE
    blob = bytearray(state.read_bytes())
    blob[len(blob) // 2] ^= 1  # one bit
    state.write_bytes(blob)
    done = run_training(data, encoder_folder, part, from_resume=1, **{**flags, "epochs": 1})
    assert done.returncode == 0 and "corrupt" in done.stderr and "10 updates done" in done.stderr, done.stderr
    one_epoch = tmp_path / "one"
    train(data, encoder_folder, one_epoch, **{**flags, "epochs": 1})
    assert_same(weights(part), weights(one_epoch))
    for file in (state, checkpoint.previous_state(state)):
        read_tensors(file, "training state")
    for file in (state, checkpoint.previous_state(state)):
        file.write_bytes(b"")
    done = run_training(data, encoder_folder, part, from_resume=1, **flags)
    assert done.returncode == 2 and "no training state can be read" in done.stderr and "Traceback" not in done.stderr


def test_after_a_corrupt_state_weights_and_state_are_of_one_update_again(data, encoder_folder, tmp_path):
    """Resumed with nothing left to do: still the corrupt update's weights must not stay next to the previous checkpoint."""
    train(data, encoder_folder, tmp_path, save_interval=5, epochs=2)
    state = tmp_path / "checkpoints" / STATE
    state.write_bytes(state.read_bytes()[:-100])
    process = start_on_disk(data, encoder_folder, tmp_path, from_resume=1, epochs=500, save_interval=10**6)
    read_until(process, "update 30/")
    deadline = time.monotonic() + 120
    while resume.load_training_state(state)[1] is not None:  # the save at the start is on its way
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    content, problem = resume.load_training_state(state)
    sidecar = read_sidecar(tmp_path / "out" / f"{NAME}.pth")
    assert problem is None and content["state"]["update"] == sidecar["progress"]["update"] == 20
    assert all(torch.equal(content["model"][name].half(), tensor) for name, tensor in weights(tmp_path).items())


def test_a_full_disk_is_reported_and_later_saves_make_up_for_it(data, encoder_folder, tmp_path):
    flags, full = {"epochs": 3, "save_interval": 1}, tmp_path / "full"
    train(data, encoder_folder, tmp_path / "whole", **flags)
    process = start_on_disk(data, encoder_folder, tmp_path / "part", {"DISK_FULL": str(full), "DISK_DELAY": "0.03"}, **flags)
    read_until(process, "update 10/")
    full.touch()
    read_until(process, "a save failed, training continues: cannot write in")
    full.unlink()
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "part"))


def test_a_disk_that_stays_full_ends_with_code_1_and_the_last_whole_state(data, encoder_folder, tmp_path):
    flags, full = {"epochs": 3, "save_interval": 1}, tmp_path / "full"
    train(data, encoder_folder, tmp_path / "whole", **flags)
    part = tmp_path / "part"
    process = start_on_disk(data, encoder_folder, part, {"DISK_FULL": str(full), "DISK_DELAY": "0.03"}, **flags)
    read_until(process, "update 10/")
    full.touch()
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "error: cannot write in" in error and "make room" in error, error
    assert "Traceback" not in error and not list(part.glob("*/.*.tmp"))
    full.unlink()
    train(data, encoder_folder, part, from_resume=1, **flags)
    assert_same(weights(tmp_path / "whole"), weights(part))


def test_a_second_signal_ends_at_once_and_the_last_state_is_whole(data, encoder_folder, tmp_path):
    flags = {"epochs": 4, "save_interval": 10}
    train(data, encoder_folder, tmp_path / "whole", **flags)
    part = tmp_path / "part"
    process = start_on_disk(data, encoder_folder, part, {"DISK_DELAY": "0.3"}, **flags)
    read_until(process, "update 22/")  # the state of update 10 is on disk, the one of update 20 on its way
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # now it saves, for some seconds more
    while process.poll() is None:  # two signals that come at once to a process that waits for a processor are one
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.wait() == 128 + signal.SIGINT
    process.stderr.close()
    done = train(data, encoder_folder, part, from_resume=1, **flags)
    assert "resumed from" in done.stderr
    assert_same(weights(tmp_path / "whole"), weights(part))


@pytest.mark.slow
def test_memory_and_open_files_stay_flat_over_ten_thousand_updates(encoder_folder, tmp_path):
    """Resident memory of its own (files mapped apart) within 2% from update 1,000 on, open files no more than then."""
    process = start_on_disk(make_data(tmp_path, 2000), encoder_folder, tmp_path, epochs=10, save_interval=100, log_interval=100)
    memory, files = [], []
    for line in process.stderr:
        if " update " in line and "00/" in line:
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(int(re.search(r"RssAnon:\s+(\d+)", status)[1]))
            files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
    assert process.wait(timeout=60) == 0 and len(memory) == 100
    print(f"RssAnon in KiB at updates 100, 1,000 ... 10,000: {[memory[0], *memory[9::10]]}; open files {files[0]} ... {max(files)}")
    assert max(memory[9:]) <= 1.02 * memory[9]
    assert statistics.median(files[-10:]) <= statistics.median(files[:10])  # a save that is running has some open


def test_read_only_folder_is_said_at_the_start(data, encoder_folder, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    done = run_training(data, encoder_folder, tmp_path)
    assert done.returncode == 2 and "cannot write in" in done.stderr and "Traceback" not in done.stderr


def test_stale_temporary_files_are_cleaned_at_the_start(data, encoder_folder, tmp_path):
    for folder, name in (("out", f".{NAME}.pth.abc.tmp"), ("out", f".{NAME}.json.abc.tmp"), ("checkpoints", f".{STATE}.abc.tmp")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("half")
    (tmp_path / "out" / ".other_32.pth.abc.tmp").write_text("somebody else's")
    train(data, encoder_folder, tmp_path)
    assert [path.name for path in tmp_path.glob("*/.*.tmp")] == [".other_32.pth.abc.tmp"]


def test_changed_flags_are_named(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path)
    done = train(data, encoder_folder, tmp_path, from_resume=1, epochs=2, learning_rate=5e-4)
    assert "--epochs 1 -> 2" in done.stderr and "--learning_rate 0.001 -> 0.0005" in done.stderr
    assert "--seed" not in done.stderr and "does not hold" not in done.stderr
    rows = data[0].read_text().replace("nothing", "anything")
    (tmp_path / "other.jsonl").write_text(rows)
    done = train((tmp_path / "other.jsonl", data[1]), encoder_folder, tmp_path, from_resume=1, epochs=3)
    assert "other.jsonl does not hold what was trained on before" in done.stderr


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_another_number_of_processes_takes_every_sample_once_and_keeps_the_schedule(data, encoder_folder, tmp_path, before, after):
    """Stopped in the middle of an epoch, resumed with other processes; the global batch stays where it can."""
    storm = Storm(tmp_path / "storm", 0, [before])
    out = tmp_path / "run"
    process = storm.start(out, False, before)
    for line in process.stderr:
        if "update 5/" in line:
            kill_tree(process)
            break
    process.communicate()
    assert storm.check_files(out)
    process = storm.start(out, True, after)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    storm.check_samples(out)
    assert storm.counts["repeated"] == storm.counts["skipped"] == 0
    rates = [line["learning_rate"] for line in read_metrics(out, NAME)]
    steps = np.diff(rates)
    assert (steps <= 0).all() and abs(rates[-1]) < 1.01e-4 and np.abs(steps).max() < 6e-5, "no jump"
    if (before, after) == (2, 1):
        assert "micro-batches an update, so that it takes 4 samples as before" in error
    if (before, after) != (2, 1):
        assert "samples now, not" in error


def test_torchrun_restarts_a_killed_worker_and_the_group_continues(data, encoder_folder, tmp_path):
    flags = {"epochs": 3, "save_interval": 1}
    train(data, encoder_folder, tmp_path / "whole", processes=2, **flags)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "2",
               str(REPOSITORY / "train_sft_vlm.py"), *training_flags(data, encoder_folder, tmp_path / "part", **flags)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seen, killed = [], False
    for line in process.stderr:
        seen.append(line)
        if "update 8/" in line and not killed:
            os.kill(children(process.pid)[-1], signal.SIGKILL)
            killed = True
    assert process.wait(timeout=300) == 0, "".join(seen[-30:])
    assert killed and any("resumed from" in line for line in seen)
    assert not any("forcefully" in line for line in seen), "the other worker heard of it, and ended by itself"
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "part"))


def test_a_restart_does_not_take_up_a_finished_run_of_the_same_name(data, encoder_folder, tmp_path):
    """A worker dies before the first save: the group starts again from scratch, and its result is that of the new run."""
    flags = {"epochs": 2, "save_interval": 10**6}
    train(data, encoder_folder, tmp_path / "whole", processes=2, **flags)
    train(data, encoder_folder, tmp_path / "part", epochs=1, seed=7)
    old = (tmp_path / "part" / "checkpoints" / STATE).read_bytes()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "2",
               str(REPOSITORY / "train_sft_vlm.py"), *training_flags(data, encoder_folder, tmp_path / "part", **flags)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    seen, killed = [], False
    for line in process.stderr:
        seen.append(line)
        if "update 2/" in line and not killed:
            assert (tmp_path / "part" / "checkpoints" / f"{NAME}_resume_previous.pth").read_bytes() == old, "kept"
            os.kill(children(process.pid)[-1], signal.SIGKILL)
            killed = True
    assert process.wait(timeout=300) == 0, "".join(seen[-30:])
    assert killed and not any("resumed from" in line for line in seen)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "part"))


def test_a_worker_that_dies_before_it_looks_is_no_reason_to_take_up_an_older_run(data, encoder_folder, tmp_path):
    train(data, encoder_folder, tmp_path / "whole", processes=1)
    train(data, encoder_folder, tmp_path / "part", processes=1, seed=7)
    script = tmp_path / "dies_at_first.py"
    script.write_text("import os, runpy, sys\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n    os._exit(9)\n"
                      f"sys.path.insert(0, {str(REPOSITORY)!r})\nrunpy.run_path({str(REPOSITORY / 'train_sft_vlm.py')!r}, run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "--max_restarts", "1",
                           str(script), *training_flags(data, encoder_folder, tmp_path / "part")],
                          capture_output=True, text=True, timeout=300, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert "resumed from" not in done.stderr
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "part"))


def test_the_learning_rate_continues_without_a_jump():
    """Of 100 updates 40 are done when it turns out that there are 70."""
    state, sampler, progress = TrainState(), ResumableSampler(100, 1, 1, seed=0), []
    for update in range(70):
        progress.append(state.progress)
        state.advance(sampler, 100 if update < 40 else 70)
    assert progress[:40] == pytest.approx(np.arange(40) / 100)
    assert [*progress[40:], state.progress] == pytest.approx(np.linspace(0.4, 1, 31))
    assert cosine(0, 2.0) == 2.0 and cosine(state.progress, 1.0) == pytest.approx(0.1)


# --- the storm --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1800)  # a slow machine may need more for it than for any other test
def test_a_storm_of_kills_changes_nothing(tmp_path):
    """20 kills -9 at random instants, saves included; the long one is `make storm`."""
    counts = Storm(tmp_path, seed=1, processes=[1]).rage(20)
    assert counts["kills"] == 20
    assert not any(counts[name] for name in ("unreadable", "differing", "repeated", "skipped")), counts


@pytest.mark.parametrize("foreign", [torch.eye(3).to_sparse(), torch.ones(3, device="meta"), torch.ones(3).to(torch.float8_e5m2), 3])
def test_a_resume_replaces_weights_that_are_none_of_its_own(tmp_path, foreign):
    path, model, saver = tmp_path / "w_32.pth", make_model(), checkpoint.Saver(resumed=True)
    torch.save({**model.state_dict(), "x": foreign}, path)
    saver.save(path, model, {})
    saver.wait()
    load_weights(path, make_model(1))


def test_states_of_another_version_are_refused(tmp_path):
    torch.save({"version": 1}, tmp_path / "s.pth")
    with pytest.raises(UsageError, match="no training state of version"):
        resume.load_training_state(tmp_path / "s.pth")


def test_a_run_ends_though_something_still_holds_its_loader(data, encoder_folder, tmp_path):
    """As the traceback of a failed save may: loader processes do not answer the signal by which Python's exit ends them."""
    code = ("import sys; from trainer import loop, main; kept, train = [], loop.Trainer.train;"
            " loop.Trainer.train = lambda self: (kept.append(self), train(self))[1]; sys.exit(main.main('', {}, sys.argv[1:]))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *training_flags(data, encoder_folder, tmp_path)], cwd=REPOSITORY,
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0 and "done. The weights are in" in done.stderr
