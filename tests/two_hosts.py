"""Two machines in one: trains across two network namespaces, kills one "machine", brings it back, compares the end.

    sudo python -m tests.two_hosts        # needs root and iproute2

Each host is a namespace with its own address on a veth pair, and runs `torchrun --nnodes 2 --nproc_per_node 1` with the
c10d rendezvous, gloo, and one shared folder for the output. The second host is killed in the middle; the first waits for
it; after its return both continue from the last state. Prints last "two hosts: same" or what differs; ends with code 0 or 1.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.conftest import REPOSITORY, make_data, make_vision_encoder, run_script, training_flags

NAMES, ADDRESSES, PORT = ("host_a", "host_b"), ("10.213.0.1", "10.213.0.2"), 29511
WEIGHTS = Path("out") / "sft_vlm_32.pth"


def ip(*arguments: str) -> None:
    """Runs iproute2's ip; raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True)


def make_hosts() -> None:
    """Two namespaces that see each other and nothing else."""
    for name in NAMES:
        ip("netns", "add", name)
    ip("link", "add", "veth_a", "netns", NAMES[0], "type", "veth", "peer", "name", "veth_b", "netns", NAMES[1])
    for name, link, address in zip(NAMES, ("veth_a", "veth_b"), ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", link)
        ip("-n", name, "link", "set", link, "up")
        ip("-n", name, "link", "set", "lo", "up")


def remove_hosts() -> None:
    """Takes the namespaces away; what does not exist is no error."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def start_host(number: int, flags: list[str], log: Path) -> subprocess.Popen:
    """torchrun's agent on one of the hosts."""
    command = ["ip", "netns", "exec", NAMES[number], sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
               "--nproc_per_node", "1", "--max_restarts", "3", "--rdzv_backend", "c10d", "--rdzv_id", "two",
               "--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv_conf", f"is_host={int(number == 0)},join_timeout=120",
               "--local_addr", ADDRESSES[number], str(REPOSITORY / "train_sft_vlm.py"), *flags]  # fmt: skip
    # Without the first setting torch 2.13 never tells a node that comes back where the store of keys is (see README).
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1",
                   "GLOO_SOCKET_IFNAME": ("veth_a", "veth_b")[number]}
    with open(log, "a") as file:
        return subprocess.Popen(command, stderr=file, stdout=file, start_new_session=True, env=environment)


def kill_host(number: int) -> None:
    """kill -9 for everything that runs on the host, as when its power goes."""
    pids = subprocess.run(["ip", "netns", "pids", NAMES[number]], capture_output=True, text=True, check=True).stdout
    for pid in map(int, pids.split()):
        os.kill(pid, signal.SIGKILL)


def wait_for_text(log: Path, text: str, seconds: float) -> None:
    """Returns when `text` stands in the log; raises TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.1)
    raise TimeoutError(f"{text!r} never came:\n{log.read_text()[-3000:]}")


def main() -> int:
    """The whole play."""
    with tempfile.TemporaryDirectory(prefix="two_hosts_") as name:
        folder = Path(name)
        data = make_data(folder / "data", 22)
        make_vision_encoder().save_pretrained(folder / "encoder")
        settings = {"epochs": 40, "save_interval": 1}
        whole = run_script("train_sft_vlm.py", *training_flags(data, folder / "encoder", folder / "whole", **settings), processes=2)
        if whole.returncode:
            raise RuntimeError(whole.stderr)
        flags, hosts = training_flags(data, folder / "encoder", folder / "two", **settings), []
        logs = [folder / f"{name}.log" for name in NAMES]
        remove_hosts()
        try:
            make_hosts()
            hosts = [start_host(number, flags, logs[number]) for number in range(2)]
            wait_for_text(logs[0], "update 20/", 120)
            kill_host(1)
            hosts[1].wait()
            print("second host killed", flush=True)
            time.sleep(3)
            hosts[1] = start_host(1, flags, logs[1])
            wait_for_text(logs[0], "resumed from", 180)
            print("second host is back, training continues", flush=True)
            codes = [host.wait(timeout=300) for host in hosts]
            if any(codes):
                raise RuntimeError(f"exit codes {codes}:\n{logs[0].read_text()[-3000:]}")
        finally:
            for number, host in enumerate(hosts):
                kill_host(number)
                host.wait()
            remove_hosts()
        one, two = (torch.load(folder / run / WEIGHTS, weights_only=True) for run in ("whole", "two"))
        different = [name for name in one if not torch.equal(one[name], two[name])]
        print("two hosts: " + (f"{len(different)} weights differ" if different else "same"))
        return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
