"""What a run tells: the metrics file, and SwanLab, which may be absent, fail or hang at any moment."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader

from tests.conftest import REPOSITORY, read_metrics, training_flags
from tests.test_training import NAME, assert_same, make_trainer, train, weights
from trainer import distributed, swanlab_thread
from trainer.build import build
from trainer.config import TrainConfig, parse_config
from trainer.loop import Trainer
from trainer.swanlab_thread import SwanLab
from trainer.tracking import MetricsFile, Tracker

GOOD = """
import json, os, time
def say(kind, values):
    with open(os.environ["SAID"], "a") as file: file.write(json.dumps([kind, values]) + "\\n")
def hang(*_, **__):
    while not os.path.exists(os.environ["SAID"] + ".release"): time.sleep(0.05)
def fail(*_, **__):
    raise ValueError("no such\\nluck")
class Run:
    def log(self, values, step): say("log", [step, values])
    def finish(self, state="success", error=None): say("finish", [state, error])
def init(**arguments):
    print("a greeting " * 20000)
    say("init", arguments)
    return Run()
"""
EXITS = "import sys; sys.exit('log in first')"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Gives a SwanLab of which the package is replaced by `code`, and what that package was told. What hangs ends with the test."""
    said, trackers = tmp_path / "said", []

    def make(code: str, run_id: str | None = None) -> SwanLab:
        (tmp_path / "swanlab.py").write_text(code)
        trackers.append(SwanLab(TrainConfig(save_dir=str(tmp_path / "out")), run_id))
        return trackers[-1]

    monkeypatch.delitem(sys.modules, "swanlab", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SAID", str(said))
    make.said = lambda: [json.loads(line) for line in said.read_text().splitlines()]
    yield make
    (tmp_path / "said.release").touch()
    for tracker in trackers:
        tracker._thread.join(60)


@pytest.fixture(autouse=True)
def folder_of_swanlab(monkeypatch):
    """A run sets it for its own process."""
    monkeypatch.setenv("SWANLAB_LOGDIR", "")
    monkeypatch.delenv("SWANLAB_LOGDIR")


def offline_runs(folder) -> list[list[Record]]:
    """What the real package left on disk: the records of each run, the oldest first."""
    runs = []
    for path in sorted(folder.glob("run-*/*.swanlab")):
        reader, records = DataStoreReader(), []
        reader.open(path)
        for blob in reader:
            records.append(Record.FromString(blob))
        runs.append(records)
    return runs


# --- the metrics file -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_reported_once_and_asked_again(tmp_path, capsys):
    metrics = MetricsFile(tmp_path / "m.jsonl", 0)
    good = metrics._file
    with open("/dev/full", "ab", buffering=0) as full:
        metrics._file = full
        metrics.log({"update": 1})
        metrics.log({"update": 2})
    assert capsys.readouterr().err.count("training continues") == 1
    metrics._file = good
    metrics.log({"update": 3})
    metrics.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"update": 3}\n'


def test_a_resumed_metrics_file_continues_where_the_state_left_off(tmp_path):
    path = tmp_path / "m.jsonl"
    first = MetricsFile(path, 0)
    for update in (1, 2, 3):
        first.log({"update": update, "loss": 1.0})
        first.log({"update": update, "eval_loss": 2.0, "samples": [{"answer": "一隻\u2028貓\x85"}]})
    first.close()
    path.write_bytes(path.read_bytes() + b'{"update": 4, "lo')
    second = MetricsFile(path, 2)
    second.log({"update": 3, "loss": 0.5})
    second.close()
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [(line["update"], line.get("loss"), line.get("eval_loss")) for line in lines] == [
        (1, 1.0, None), (1, None, 2.0), (2, 1.0, None), (2, None, 2.0), (3, 0.5, None)]  # fmt: skip
    assert lines[1]["samples"][0]["answer"] == "一隻\u2028貓\x85"
    MetricsFile(path, 0).close()
    assert path.read_text() == "", "a run from the start leaves nothing of the one before"


# --- what a person sees -------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_the_figures_and_the_run_is_the_same(data, encoder_folder, tmp_path, monkeypatch):
    for name, screen in (("plain", io.StringIO()), ("bar", Terminal())):
        monkeypatch.setattr("sys.stderr", screen)
        assert make_trainer(data, encoder_folder, tmp_path / name, save_weight="sft_vlm", log_interval=4).train() == 0
        assert ("epoch 1.000 update 11/11" in screen.getvalue()) == (name == "plain")
        assert len(set(re.findall(r"loss (\d\.\d{4}) lr", screen.getvalue()))) == 4
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "bar"))


def test_lines_say_the_first_loss_and_a_time_that_exists(data, encoder_folder, tmp_path, capsys):
    trainer = make_trainer(data, encoder_folder, tmp_path, save_weight="sft_vlm", log_interval=100)
    trainer.train()
    said = capsys.readouterr().err
    loss = read_metrics(tmp_path, NAME)[0]["loss"]
    assert f"first loss {loss:.2f}; a model that knows nothing has ln(6400) = 8.76" in said
    values = {"update": 3, "epoch": 0.5, "loss": None, "aux_loss": None, "learning_rate": 1e-3, "tokens_per_second": 7.0}
    for seconds, clock in ((119.7, "0:02:00"), (3599.6, "1:00:00"), (0.4, "0:00:00"), (90061, "1 day, 1:01:01")):
        with Tracker(trainer.config, True, 3, 11, None) as tracker:
            tracker.log({**values, "seconds_left": seconds}, "nothing trained")
        assert capsys.readouterr().err == f"epoch 0.500 update 3/11 nothing trained lr 1.000e-03 7 tokens/s left {clock}\n"


def test_a_run_says_at_its_end_where_its_weights_are(data, encoder_folder, tmp_path):
    said = train(data, encoder_folder, tmp_path, eval_data_path=0.2).stderr.splitlines()[-1]
    assert said == f"done. The weights are in {tmp_path}/out/{NAME}.pth, those of the best validation in {tmp_path}/out/sft_vlm_best_32.pth"


# --- SwanLab ----------------------------------------------------------------------------------------------------------


def test_a_run_tells_swanlab_its_settings_and_points(start, tmp_path, capfd):
    tracker = start(GOOD, "an-id")
    for update in range(1, 4):
        tracker.log({"loss": 3.0 / update}, update)
    tracker.close()
    (_, init), *points, end = start.said()
    assert init["config"]["epochs"] == 4 and init["config"]["command"] and init["project"] == "MiniMind-V-Pretrain"
    assert (init["id"], init["resume"]) == ("an-id", "allow") and init["name"] == "pretrain_vlm_512-e4-b16-lr0.0004"
    assert points == [["log", [update, {"loss": 3.0 / update}]] for update in (1, 2, 3)]
    assert end == ["finish", ["success", None]]
    assert "warning" not in capfd.readouterr().err


def test_training_that_fails_leaves_a_crashed_run(start):
    tracker = start(GOOD)
    tracker.log({"loss": 1.0}, 1)
    tracker.close("memory ran out")
    assert start.said()[-1] == ["finish", ["crashed", "memory ran out"]]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(f"{GOOD}\nfail()", "ValueError: no such"), ("import not_there", "ModuleNotFoundError"), (EXITS, "SystemExit: log in first"),
     (f"{GOOD}\ndef init(**_): {EXITS}", "SystemExit"), (f"{GOOD}\nRun.log = fail", "ValueError"), (f"{GOOD}\nRun.finish = fail", "ValueError")],
)  # fmt: skip
def test_a_failing_swanlab_is_one_warning(start, capfd, code, reason):
    tracker = start(code)
    for update in range(1, 3000):
        tracker.log({"loss": 1.0}, update)
    tracker.close()
    error = capfd.readouterr().err
    assert (error.count("warning:") == 1 and reason in error) or "does not keep up" in error, error
    tracker.log({"loss": 1.0}, 50)
    tracker.close()
    assert not capfd.readouterr().err


@pytest.mark.parametrize("code", [f"{GOOD}\ninit = hang", f"{GOOD}\nRun.log = hang", f"{GOOD}\nRun.finish = hang"])
def test_a_hanging_swanlab_is_not_waited_for(start, capfd, monkeypatch, code):
    """More points than the queue holds are taken at once: would one wait, this would never end."""
    tracker = start(code)
    for update in range(1, 5000 if "finish" not in code.splitlines()[-1] else 2):
        tracker.log({"loss": 1.0, "learning_rate": 1e-3}, update)
    monkeypatch.setattr(swanlab_thread, "FINISH_SECONDS", 0.1)
    tracker.close()
    error = capfd.readouterr().err
    assert error.count("warning:") == 1 and ("does not keep up" in error or "did not finish within" in error)


def train_here(data, encoder_folder, out, **flags) -> int:
    """A run with --use_wandb in this process."""
    config = parse_config("", {}, training_flags(data, encoder_folder, out, num_workers=0, save_weight="sft_vlm", **flags))
    return Trainer(build(replace(config, use_wandb=True), distributed.start("cpu"))).train()


def train_apart(data, encoder_folder, out, **environment) -> subprocess.CompletedProcess:
    """A run with --use_wandb in a process of its own, which waits for SwanLab's end for a second."""
    code = "import sys; from trainer import swanlab_thread; from trainer.main import main; swanlab_thread.FINISH_SECONDS = 1; sys.exit(main('', {}, sys.argv[1:]))"
    flags = training_flags(data, encoder_folder, out, num_workers=0, save_weight="sft_vlm")
    return subprocess.run([sys.executable, "-c", code, *flags, "--use_wandb"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
                          check=False, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip


def test_a_hanging_swanlab_does_not_keep_the_process(data, encoder_folder, tmp_path):
    """Nor does what it left to be done at exit."""
    (tmp_path / "swanlab.py").write_text(f"{GOOD}\nimport atexit\natexit.register(hang)\ninit = hang")
    done = train_apart(data, encoder_folder, tmp_path, PYTHONPATH=str(tmp_path), SAID=str(tmp_path / "said"))
    assert done.returncode == 0 and "warning: SwanLab did not finish within 1 s" in done.stderr, done.stderr
    assert "done. The weights are in" in done.stderr and len(read_metrics(tmp_path, NAME)) == 11


def test_the_real_package_offline(data, encoder_folder, tmp_path, monkeypatch, capfd):
    """Two starts of one run: its folder is in save_dir, its points and settings are complete, its id is one."""
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setattr(swanlab_thread, "FINISH_SECONDS", 300.0)  # on a busy machine
    monkeypatch.chdir(tmp_path)
    for resume, epochs in ((0, 1), (1, 2)):
        assert train_here(data, encoder_folder, tmp_path, from_resume=resume, epochs=epochs, eval_data_path=0.3) == 0
    assert "warning" not in capfd.readouterr().err
    assert not (tmp_path / "swanlog").exists()
    lines, runs = read_metrics(tmp_path, NAME), offline_runs(tmp_path / "out" / "swanlog")
    logged = [(r.scalar.step, r.scalar.value.number) for run in runs for r in run if r.HasField("scalar") and r.scalar.key == "loss"]
    assert logged == [(line["update"], pytest.approx(line["loss"])) for line in lines if "loss" in line] and len(logged) == 16
    for name in ("eval_loss", "eval_loss_blank"):
        validated = [(r.scalar.step, r.scalar.value.number) for run in runs for r in run if r.HasField("scalar") and r.scalar.key == name]
        assert validated == [(line["update"], pytest.approx(line[name])) for line in lines if name in line] and validated
    ids = {r.start.id for run in runs for r in run if r.HasField("start")}
    sidecar = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())
    assert len(runs) == 2 and ids == {sidecar["progress"]["tracker_id"]}
    settings = sorted((tmp_path / "out" / "swanlog").glob("run-*/files/config.yaml"))[-1].read_text()
    assert "eval_data_path" in settings


def test_a_run_ends_well_though_swanlab_does_not(data, encoder_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SWANLAB_MODE", "nonsense")
    assert train_here(data, encoder_folder, tmp_path) == 0 and len(read_metrics(tmp_path, NAME)) == 11
    assert capfd.readouterr().err.count("warning: SwanLab is off") == 1


def test_the_real_package_without_a_network(data, encoder_folder, tmp_path, monkeypatch):
    """Not logged in; then a server that takes the call and never answers."""
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    offline = {"SWANLAB_MODE": "cloud", "HOME": str(tmp_path), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    done = train_apart(data, encoder_folder, tmp_path, **offline)
    assert done.returncode == 0 and "SwanLab is off, training continues (RuntimeError: Failed to initialize SwanLab" in done.stderr, done.stderr
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = train_apart(data, encoder_folder, tmp_path, **offline, SWANLAB_API_KEY="k" * 21, SWANLAB_API_HOST=host)
    assert done.returncode == 0 and done.stderr.count("warning: SwanLab did not finish within") == 1, done.stderr
    assert len(read_metrics(tmp_path, NAME)) == 11 and "swanlog" not in os.listdir(tmp_path)
