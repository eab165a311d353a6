"""Whatever machine it runs on: cores, threads, launchers, memory, loader processes, compilers and other systems' gaps."""

import os
import shutil
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import machine
from model.device import check_compile
from model.errors import UsageError
from tests.conftest import REPOSITORY, run_script, training_flags
from trainer import distributed, torchrun
from trainer.build import worker_count
from trainer.loop import compute_loss
from trainer.main import main

SCRIPTS = ["train_pretrain_vlm.py", "train_sft_vlm.py", "eval_vlm.py", "web_demo_vlm.py"]
TOOLS = ["dataset.demo", "dataset.validate", "dataset.convert", "model.convert", "model.recipes.train_tokenizer", "model.recipes.train_tiny_clip",
         "benchmarks", "docs.figures", "docs.flags"]  # fmt: skip

SPIN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*machine.LAUNCHER, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", *SPIN, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def enter(entry: str, before: str, **environment) -> subprocess.CompletedProcess:
    """`--help` of a script, or of a module by its dotted name, after some lines of Python in the same process."""
    way, target = ("run_path", str(REPOSITORY / entry)) if entry.endswith(".py") else ("run_module", entry)
    code = f"import os, runpy, sys\n{before}\nsys.argv = [{entry!r}, '--help']\nrunpy.{way}({target!r}, run_name='__main__')"
    names = {name: value for name, value in os.environ.items() if name not in (*SPIN, "OMP_NUM_THREADS")}
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env={**names, **environment}, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip


# --- cores and threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "files", "expected"), [
    ("0::/", {"cpu.max": "max 100000"}, 8),
    ("0::/", {"cpu.max": "300000 100000"}, 3),
    ("0::/", {"cpu.max": "150000 100000"}, 1),
    ("0::/", {"cpu.max": "20000 100000"}, 1),
    ("0::/", {"cpu.max": "6400000 100000"}, 8),
    ("0::/", {"cpu.max": "what is this"}, 8),
    ("0::/", {}, 8),
    ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2),
    ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "500000 100000"}, 4),
    ("0::/host/name/of/it", {"cpu.max": "200000 50000"}, 4),
    ("0::/../other", {"cpu.max": "200000 100000"}, 2),
    ("4:cpu,cpuacct:/docker/x\n3:memory:/y", {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "250000", "cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000"}, 2),
    ("4:cpuacct,cpu:/x", {"cpuacct,cpu/cpu.cfs_quota_us": "-1", "cpuacct,cpu/cpu.cfs_period_us": "100000"}, 8),
    ("3:memory:/x", {"memory/x/cpu.cfs_quota_us": "100000", "memory/x/cpu.cfs_period_us": "100000"}, 8),
    (None, {}, 8),
])  # fmt: skip
def test_cores_are_the_least_of_affinity_and_quota(tmp_path, monkeypatch, group, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in ({"proc/self/cgroup": group} if group else {}).items() | {f"sys/fs/cgroup/{k}": v for k, v in files.items()}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.cores(tmp_path) == expected
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cores(tmp_path) == 1


def test_threads_and_loader_processes_follow_the_cores(monkeypatch, capsys):
    monkeypatch.setattr(machine, "cores", lambda: 6)
    monkeypatch.setattr("trainer.build.cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # left in a shell: one process alone
    machine.settle_threads()
    assert "OMP_NUM_THREADS" not in os.environ
    for name in machine.LAUNCHER:
        monkeypatch.setenv(name, "1")
    for quota, local_size, expected in ((float("inf"), "", None), (6, "", "6"), (float("inf"), "2", "3"), (6, "4", "1"), (6, "9", "1"),
                                        (6, "x", "6"), (6, "0", "6"), (6, "-2", "6")):  # fmt: skip
        monkeypatch.setattr(machine, "cpu_quota", lambda quota=quota: quota)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_size)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        machine.settle_threads()
        assert os.environ.get("OMP_NUM_THREADS") == expected, (quota, local_size)
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        machine.settle_threads()
        assert os.environ["OMP_NUM_THREADS"] == "5"
    ranks = distributed.Ranks(0, 2, 2, torch.device("cpu"))
    assert worker_count(8, ranks) == 3 and "capped to 3" in capsys.readouterr().err and worker_count(2, ranks) == 2


@pytest.mark.parametrize(("given", "expected"), [(None, "4"), ("1", "1"), ("3", "3")])
def test_torchruns_single_thread_is_told_from_the_users(tmp_path, monkeypatch, given, expected):
    (tmp_path / "job.py").write_text(
        f"import os, sys\nos.sched_getaffinity = lambda _: set(range(8))\nsys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import machine\nos.write(1, os.environ['OMP_NUM_THREADS'].encode() + b' ')\n")  # fmt: skip
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "job.py")],
                          capture_output=True, text=True, timeout=300, check=True)  # fmt: skip
    assert done.stdout.split() == [expected] * 2, done.stderr


WATCH = """
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("first torch:", os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch)
import atexit
atexit.register(lambda: print("no torch:", os.environ.get("GOMP_SPINCOUNT")))
"""


@pytest.mark.parametrize("entry", [*SCRIPTS, *TOOLS, "tests.conftest", "chat.web.page", "tests.storm", "tests.slow_disk"])
def test_waiting_threads_sleep_soon_at_every_entry(entry):
    """What OpenMP reads stands there before torch brings it."""
    out = enter(entry, WATCH).stdout
    assert "torch: 10000" in out, out


def test_what_the_user_set_of_waiting_stays(monkeypatch):
    for name, value in (("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7")):
        for other in SPIN:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        machine.settle_threads()
        assert {other: os.environ[other] for other in SPIN if other in os.environ} == {name: value}


# --- launchers ----------------------------------------------------------------------------------------------------------

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("left", [
    {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": ""}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "x"}, {"LOCAL_WORLD_SIZE": "0"},
    {"MASTER_ADDR": "here"}, {"MASTER_PORT": "x"}, {"RANK": "-1"}, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    WHOLE | {"RANK": ""}, {name: value for name, value in WHOLE.items() if name != "LOCAL_RANK"},
])  # fmt: skip
def test_variables_left_behind_are_one_process_with_a_notice(left, monkeypatch, capsys):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert distributed.start("cpu") == distributed.Ranks(0, 1, 1, torch.device("cpu"))
    told = capsys.readouterr().err
    assert told.count("notice: one process alone") == 1 and all(name in told for name in left)


@pytest.mark.parametrize("left", [{"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}, {"OMPI_COMM_WORLD_RANK": "1"},
                                  {"TORCHELASTIC_RESTART_COUNT": ""}, {}])  # fmt: skip
def test_other_launchers_variables_say_nothing(left, monkeypatch, capsys):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert torchrun.launched() is None and capsys.readouterr().err == ""


def test_a_whole_set_is_a_group(monkeypatch):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert torchrun.launched() == (1, 4, 1, 2)


@pytest.mark.parametrize("wrong", [
    {"RANK": "4"}, {"RANK": "-1"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "1.5"}, {"LOCAL_RANK": "x"}, {"LOCAL_RANK": "2"},
    {"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "8"}, {"RANK": "0"}, {"MASTER_PORT": "99999"}, {"MASTER_PORT": "0"}, {"MASTER_PORT": "x"},
])  # fmt: skip
def test_a_whole_set_that_cannot_be_is_an_error(wrong, monkeypatch, capsys, data, encoder_folder, tmp_path):
    for name, value in (WHOLE | wrong).items():
        monkeypatch.setenv(name, value)
    assert main("", {}, training_flags(data, encoder_folder, tmp_path)) == 2
    told = capsys.readouterr().err
    assert "describe no group of processes" in told and all(f"{name}={value!r}" in told for name, value in wrong.items())


@pytest.mark.parametrize(("rank", "address", "busy"), [("1", "localhost", False), ("1", "no.such.host.invalid", False), ("0", "localhost", False),
                                                       ("0", "localhost", True)])  # fmt: skip
def test_a_group_that_does_not_meet_ends_in_time(rank, address, busy, monkeypatch, capsys, data, encoder_folder, tmp_path):
    """Nobody listens, nobody knows the name, nobody comes, or the port is another program's."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        if busy:
            listener.listen()
        port = str(listener.getsockname()[1])
        if not busy:
            listener.close()
        for name, value in {**WHOLE, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torchrun, "JOIN_SECONDS", 1)
        assert main("", {}, training_flags(data, encoder_folder, tmp_path)) == 1
    told = capsys.readouterr().err
    assert f"MASTER_ADDR {address}, MASTER_PORT {port}, within 1 s" in told and "--standalone" in told and "Traceback" not in told


def test_more_processes_than_gpus(monkeypatch, capsys, data, encoder_folder, tmp_path):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main("", {}, training_flags(data, encoder_folder, tmp_path, device="cuda")) == 2
    assert "--nproc_per_node 2: this machine has 1 GPUs" in capsys.readouterr().err


# --- memory -------------------------------------------------------------------------------------------------------------

SHORT = {
    "GPU": lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
    "torch": lambda: torch.empty(2**46), "NumPy": lambda: np.empty(2**46), "Python": lambda: bytearray(2**46),
    "cuBLAS": lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHORT)
def test_memory_that_runs_out_is_told_with_what_needs_less(kind, monkeypatch, capsys, data, encoder_folder, tmp_path):
    """At the first update, then after a save."""
    flags = training_flags(data, encoder_folder, tmp_path, num_workers=0, save_interval=1)
    calls = []

    def short(*arguments):
        calls.append(0)
        return SHORT[kind]() if len(calls) in (1, 5) else compute_loss(*arguments)

    monkeypatch.setattr("trainer.loop.compute_loss", short)
    for saved in (False, True):
        assert main("", {}, flags) == 1
        told = capsys.readouterr().err
        assert told.count("error: memory ran out") == 1 and "Traceback" not in told
        assert all(flag in told for flag in ("--batch_size", "--accumulation_steps", "--gradient_checkpointing", "--max_seq_len"))
        assert ("_resume.pth with --from_resume 1" in told) == saved and ("Nothing was saved yet" in told) != saved


def test_a_fault_of_the_program_is_no_shortage(monkeypatch, data, encoder_folder, tmp_path):
    monkeypatch.setattr("trainer.loop.compute_loss", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        main("", {}, training_flags(data, encoder_folder, tmp_path, num_workers=0))


@pytest.mark.parametrize("kind", SHORT)
def test_memory_that_runs_out_while_answering(kind, monkeypatch, capsys):
    import eval_vlm

    monkeypatch.setattr(eval_vlm, "load_assistant", lambda *_: SHORT[kind]())
    assert eval_vlm.main([]) == 1
    told = capsys.readouterr().err
    assert "error: memory ran out" in told and "--batch_size, --max_new_tokens and --max_seq_len" in told


# --- loader processes ---------------------------------------------------------------------------------------------------


def test_a_small_shared_memory_ends_the_run_with_the_remedies(data, encoder_folder, tmp_path):
    small = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*small, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespace of one's own")
    flags = training_flags(data, encoder_folder, tmp_path, batch_size=8, num_workers=2)
    done = subprocess.run([*small, sys.executable, str(REPOSITORY / "train_sft_vlm.py"), *flags], capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in ("/dev/shm", "--shm-size", "--ipc=host", "--num_workers 0"))


def test_too_few_open_files_end_the_run_with_the_remedy(data, encoder_folder, tmp_path):
    import resource

    done = subprocess.run([sys.executable, str(REPOSITORY / "train_sft_vlm.py"), *training_flags(data, encoder_folder, tmp_path, num_workers=2)],
                          capture_output=True, text=True, timeout=300, check=False,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)))  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "ulimit -n" in done.stderr and "--num_workers 0" in done.stderr


# --- compilers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["/no/such/g++", "false"])
def test_a_compiler_that_does_not_work_is_told_in_one_line(compiler, data, encoder_folder, tmp_path):
    done = run_script("train_sft_vlm.py", *training_flags(data, encoder_folder, tmp_path, use_compile=1), CXX=compiler)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    [told] = [line for line in done.stderr.splitlines() if "--use_compile 1" in line]
    assert compiler in told


def test_a_cache_folder_that_cannot_be_written_is_told_in_one_line(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/self")
    with pytest.raises(UsageError) as error:
        check_compile(torch.device("cpu"))
    assert "\n" not in str(error.value)


# --- other systems ------------------------------------------------------------------------------------------------------

ABSENT = ["resource", "fcntl"]  # modules that Windows has not
ABSENT_FOR_US = f"""
import builtins
plain = builtins.__import__
def without(name, globals=None, *more, **named):
    file = str((globals or {{}}).get("__file__"))
    if name in {ABSENT} and file.startswith({str(REPOSITORY)!r}) and "site-packages" not in file:
        raise ImportError(name)
    return plain(name, globals, *more, **named)
builtins.__import__ = without
"""


@pytest.mark.parametrize("entry", SCRIPTS)
def test_scripts_start_without_modules_of_unix(entry):
    done = enter(entry, ABSENT_FOR_US)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_all_modules_load_without_modules_of_unix():
    names = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for folder in ("model", "dataset", "trainer")
             for file in sorted((REPOSITORY / folder).rglob("*.py")) if file.name not in ("__init__.py", "page.py")]  # fmt: skip
    done = enter("benchmarks", f"{ABSENT_FOR_US}\nimport importlib\nfor name in {names}: importlib.import_module(name)")
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_limits_of_open_files_as_macos_has_them(monkeypatch):
    limits = []

    def set_limits(_, wanted):
        if wanted[0] > 10240:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(wanted)

    endless = 2**63 - 1
    fake = types.SimpleNamespace(RLIMIT_NOFILE=8, RUSAGE_SELF=0, getrlimit=lambda _: (256, endless), setrlimit=set_limits,
                                 getrusage=lambda _: types.SimpleNamespace(ru_maxrss=5 * 2**20))  # fmt: skip
    monkeypatch.setitem(sys.modules, "resource", fake)
    machine.allow_many_files()
    assert limits == [(10240, endless)]
    fake.getrlimit = lambda _: (20_000, endless)  # more already
    machine.allow_many_files()
    assert limits == [(10240, endless)]
    for system, expected in (("darwin", 5 * 2**20), ("linux", 5 * 2**30)):
        monkeypatch.setattr(sys, "platform", system)
        assert machine.peak_memory() == expected
    monkeypatch.setitem(sys.modules, "resource", None)
    machine.allow_many_files()
    assert machine.peak_memory() == 0
