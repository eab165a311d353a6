"""What a run tells: the metrics file, and SwanLab, which may be absent, fail or hang at any moment."""

import io
import json
import os
import re
import shlex
import signal
import socket
from dataclasses import replace

import pytest
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader

from tests.conftest import read_metrics, run_script, training_flags
from tests.test_training import NAME, assert_same, make_trainer, train, weights
from trainer import distributed, tracking
from trainer.build import build
from trainer.config import TrainConfig, parse_config
from trainer.loop import Trainer
from trainer.tracking import MetricsFile, SwanLab

GOOD = """
import json, os
class Config(dict):
    def update(self, values): say("summary", values)
def say(kind, values):
    with open(os.environ["SAID"], "a") as file: file.write(json.dumps([kind, values]) + "\\n")
class Run:
    config = Config()
    def log(self, values, step): say("log", [step, values])
    def finish(self, state="success", error=None): say("finish", state)
def init(**arguments):
    print("a greeting " * 20000)
    say("init", arguments)
    return Run()
"""
RAISES, EXITS, HANGS = "raise ValueError('no such\\nluck')", "import sys; sys.exit('log in first')", "import time; time.sleep(1000)"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Gives a SwanLab of which the package is replaced by `code`, and what that package was told."""
    said = tmp_path / "said"

    def make(code: str, run_id: str | None = None) -> SwanLab:
        (tmp_path / "swanlab.py").write_text(code)
        return SwanLab(TrainConfig(save_dir=str(tmp_path / "out")), run_id)

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SAID", str(said))
    make.said = lambda: [json.loads(line) for line in said.read_text().splitlines()]
    return make


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


def test_a_full_disk_is_told_once_and_asked_again(tmp_path, capsys):
    metrics = MetricsFile(tmp_path / "m.jsonl", 0)
    good = metrics._file
    with open("/dev/full", "ab", buffering=0) as full:
        metrics._file = full
        metrics.log({"update": 1})
        metrics.log({"update": 2})
    assert capsys.readouterr().err.count("training goes on") == 1
    metrics._file = good
    metrics.log({"update": 3})
    metrics.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"update": 3}\n'


def test_a_resumed_metrics_file_goes_on_where_the_state_left_off(tmp_path):
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


def test_a_bar_shows_the_figures_of_now_and_the_run_is_the_same(data, encoder_folder, tmp_path, monkeypatch):
    """On a terminal, between two log lines; neither weights nor what is logged change by being looked at."""
    monkeypatch.setattr(tracking, "STALE_SECONDS", -1.0)
    for name, screen in (("plain", io.StringIO()), ("bar", Terminal())):
        monkeypatch.setattr("sys.stderr", screen)
        trainer = make_trainer(data, encoder_folder, tmp_path / name, save_weight="sft_vlm", log_interval=100)
        assert trainer.train() == 0
        losses = re.findall(r"loss (\d\.\d{4}) lr", screen.getvalue())
        assert len(set(losses)) == {"plain": 2, "bar": 11}[name], losses
    assert_same(weights(tmp_path / "plain"), weights(tmp_path / "bar"))
    plain, bar = ([(line["update"], line["loss"]) for line in read_metrics(tmp_path / name, NAME)] for name in ("plain", "bar"))
    assert plain == bar and [update for update, _ in bar] == [1, 11]


def test_lines_say_the_first_loss_and_a_time_that_exists(data, encoder_folder, tmp_path, capsys):
    trainer = make_trainer(data, encoder_folder, tmp_path, save_weight="sft_vlm", log_interval=100)
    trainer.train()
    said = capsys.readouterr().err
    loss = read_metrics(tmp_path, NAME)[0]["loss"]
    assert f"first loss {loss:.2f}; a model that knows nothing has ln(6400) = 8.76" in said
    values = {"update": 3, "epoch": 0.5, "loss": None, "aux_loss": None, "learning_rate": 1e-3, "tokens_per_second": 7.0}
    for seconds, clock in ((119.7, "0:02:00"), (3599.6, "1:00:00"), (0.4, "0:00:00"), (90061, "1 day, 1:01:01")):
        trainer.tracker.show({**values, "seconds_left": seconds})
        assert capsys.readouterr().err == f"epoch 0.500 update 3/11 nothing trained lr 1.000e-03 7 tokens/s left {clock}\n"


def test_what_a_run_says_at_its_end_is_what_to_do_next(data, encoder_folder, tmp_path):
    """Pretraining leads to fine-tuning, that to asking, each by the command as it is printed."""
    said = train(data, encoder_folder, tmp_path, script="train_pretrain_vlm.py", save_weight="pretrain_vlm", freeze_llm=1).stderr
    words = shlex.split(said.splitlines()[-1])
    assert f"The weights are in {tmp_path / 'out' / 'pretrain_vlm_32.pth'}. Next:" in said and words[0] == "python"
    done = run_script(*words[1:], "--data_path", data[0], "--images_path", data[1], "--checkpoint_dir", tmp_path, "--device", "cpu",
                      "--num_workers", 1, "--eval_data_path", 0.2, "--epochs", 1, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and "weights from" in done.stderr, done.stderr
    assert f"those of the lowest validation loss in {tmp_path / 'out' / 'sft_vlm_best_32.pth'}. Next:" in done.stderr
    words = shlex.split(done.stderr.splitlines()[-1])
    assert words[2:4] == ["--weight", "sft_vlm_best"]
    done = run_script(*words[1:], "--image_dir", data[1], "--max_new_tokens", 1, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and "[0_0.png]" in done.stdout, done.stderr


# --- SwanLab ----------------------------------------------------------------------------------------------------------


def test_a_run_tells_swanlab_its_settings_points_and_summary(start, tmp_path, capfd):
    tracker = start(GOOD, "an-id")
    for update in range(1, 4):
        tracker.log({"loss": 3.0 / update}, update)
    tracker.close({"loss": 1.0, "update": 3})
    (_, init), *points, (_, summary), end = start.said()
    assert init["config"]["epochs"] == 4 and init["config"]["command"] and init["project"] == "MiniMind-V-Pretrain"
    assert (init["id"], init["resume"]) == ("an-id", "allow") and init["name"] == "pretrain_vlm_512-e4-b16-lr0.0004"
    assert points == [["log", [update, {"loss": 3.0 / update}]] for update in (1, 2, 3)]
    assert summary == {"summary": {"loss": 1.0, "update": 3}} and end == ["finish", "success"]
    assert "warning" not in capfd.readouterr().err


def test_training_that_dies_leaves_a_crashed_run(start):
    tracker = start(GOOD)
    tracker.log({"loss": 1.0}, 1)
    process = tracker._process
    process.stdin.close()
    assert process.wait(60) == 0 and start.said()[-1] == ["finish", "crashed"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(RAISES, "ValueError: no such luck"), ("import not_there", "ModuleNotFoundError"), (EXITS, "SystemExit: log in first"),
     (f"{GOOD}\ndef init(**_): {EXITS}", "SystemExit"), (f"{GOOD}\ndef init(**_): os._exit(7)", "code 7"),
     (f"{GOOD}\ndef log(*_, **__): {RAISES}\nRun.log = log", "ValueError"),
     (f"{GOOD}\ndef finish(*_, **__): {RAISES}\nRun.finish = finish", "ValueError")],
)  # fmt: skip
def test_a_failing_swanlab_is_one_warning(start, capfd, code, reason):
    tracker = start(code)
    for update in range(1, 50):
        tracker.log({"loss": 1.0}, update)
    tracker.close({})
    error = capfd.readouterr().err
    assert error.count("warning:") == 1 and "SwanLab is off, training goes on" in error and reason in error, error
    tracker.log({"loss": 1.0}, 50)
    tracker.close({})
    assert not capfd.readouterr().err


@pytest.mark.parametrize("code", [HANGS, f"{GOOD}\ndef init(**_): {HANGS}", f"{GOOD}\ndef log(*_, **__): {HANGS}\nRun.log = log"])
def test_a_hanging_swanlab_is_not_waited_for(start, capfd, monkeypatch, code):
    """More points than the pipe holds are taken at once: would one wait, this would never end."""
    tracker = start(code)
    for update in range(1, 5000):
        tracker.log({"loss": 1.0, "learning_rate": 1e-3}, update)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    tracker.close({})
    error = capfd.readouterr().err
    assert error.count("warning:") == 1 and "SwanLab does not keep up" in error
    assert tracker._process.wait(60) == -signal.SIGKILL


def test_a_finish_that_hangs_is_cut_short(start, capfd, monkeypatch):
    tracker = start(f"{GOOD}\ndef finish(*_, **__): {HANGS}\nRun.finish = finish")
    tracker.log({"loss": 1.0}, 1)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    tracker.close({})
    assert "did not finish within" in capfd.readouterr().err and tracker._process.wait(60) == -signal.SIGKILL


def train_here(data, encoder_folder, out, **flags) -> int:
    """A run with --use_wandb in this process."""
    config = parse_config("", {}, training_flags(data, encoder_folder, out, num_workers=0, save_weight="sft_vlm", **flags))
    return Trainer(build(replace(config, use_wandb=True), distributed.start("cpu"))).train()


def test_the_real_package_offline(data, encoder_folder, tmp_path, monkeypatch, capfd):
    """Two starts of one run: its folder is in save_dir, its points, settings and summary are complete, its id is one."""
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 300.0)  # on a busy machine
    monkeypatch.chdir(tmp_path)
    for resume, epochs in ((0, 1), (1, 2)):
        assert train_here(data, encoder_folder, tmp_path, from_resume=resume, epochs=epochs, eval_data_path=0.3) == 0
    assert "warning" not in capfd.readouterr().err
    assert not (tmp_path / "swanlog").exists()
    lines, runs = read_metrics(tmp_path, NAME), offline_runs(tmp_path / "out" / "swanlog")
    logged = [(r.scalar.step, r.scalar.value.number) for run in runs for r in run if r.HasField("scalar") and r.scalar.key == "loss"]
    assert logged == [(line["update"], pytest.approx(line["loss"])) for line in lines if "loss" in line] and len(logged) == 16
    validated = [(r.scalar.step, r.scalar.value.number) for run in runs for r in run if r.HasField("scalar") and r.scalar.key == "eval_loss"]
    assert validated == [(line["update"], pytest.approx(line["eval_loss"])) for line in lines if "eval_loss" in line]
    ids = {r.start.id for run in runs for r in run if r.HasField("start")}
    sidecar = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())
    assert len(runs) == 2 and ids == {sidecar["progress"]["tracker_id"]}
    settings = sorted((tmp_path / "out" / "swanlog").glob("run-*/files/config.yaml"))[-1].read_text()
    assert "eval_data_path" in settings and "summary" in settings and str(lines[-1]["eval_loss"])[:8] in settings


def test_a_run_ends_well_though_swanlab_does_not(data, encoder_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SWANLAB_MODE", "nonsense")
    assert train_here(data, encoder_folder, tmp_path) == 0 and len(read_metrics(tmp_path, NAME)) == 11
    assert capfd.readouterr().err.count("warning: SwanLab is off") == 1


def test_the_real_package_without_a_network(data, encoder_folder, tmp_path, monkeypatch, capfd):
    """Not logged in; then a server that takes the call and never answers."""
    config = TrainConfig(save_dir=str(tmp_path / "out"))
    monkeypatch.setenv("SWANLAB_MODE", "cloud")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    tracker = SwanLab(config, None)
    assert tracker._process.wait(120) == 1
    tracker.close({})
    assert "SwanLab is off, training goes on (RuntimeError: Failed to initialize SwanLab in online mode" in capfd.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("SWANLAB_API_KEY", "k" * 21)
        monkeypatch.setenv("SWANLAB_API_HOST", f"http://127.0.0.1:{server.getsockname()[1]}")
        tracker = SwanLab(config, None)
        server.settimeout(120)
        connection, _ = server.accept()
        for update in range(1, 5000):
            tracker.log({"loss": 1.0, "learning_rate": 1e-3}, update)
        monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
        tracker.close({})
        connection.close()
    assert capfd.readouterr().err.count("warning:") == 1
    assert tracker._process.wait(60) == -signal.SIGKILL
    assert "swanlog" not in os.listdir(tmp_path)
