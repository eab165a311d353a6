"""Kills a small training run again and again, resumes it, and compares what it ends with.

    python -m tests.storm --kills 500                # one process
    python -m tests.storm --kills 100 --processes 1,2,3    # another number of processes after each kill

Prints last how many kills there were, states that could not be read, ends other than the uninterrupted run's, and
samples repeated or skipped; ends with code 1 unless the last four are 0. `make storm` runs both.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from model.model_vlm import MiniMindVLM, VLMConfig
from model.weights import load_weights, read_sidecar, tensors_fingerprint
from tests.conftest import kill_tree, make_data, make_vision_encoder, training_flags
from trainer.resume import load_training_state

SAMPLES, EPOCHS, NAME = 22, 12, "sft_vlm_32"


class Storm:
    """One sequence of kills in `folder`."""

    def __init__(self, folder: Path, seed: int, processes: list[int]):
        self.folder, self.rng, self.processes = folder, random.Random(seed), processes
        self.counts = Counter(kills=0, unreadable=0, differing=0, repeated=0, skipped=0)
        self.launches = 0
        self.data = make_data(folder / "data", SAMPLES)
        make_vision_encoder().save_pretrained(folder / "encoder")

    def start(self, out: Path, resume: bool, processes: int) -> subprocess.Popen:
        """The training run in processes of its own."""
        flags = {"epochs": EPOCHS, "save_interval": 1, "from_resume": int(resume), "cache_features": 1, "num_workers": 1}
        launcher = [sys.executable] if processes == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]  # fmt: skip
        command = [*launcher, str(Path(__file__).with_name("slow_disk.py")), *training_flags(self.data, self.folder / "encoder", out, **flags)]
        self.launches += 1
        log = out / f"trained_{self.launches:05}"
        out.mkdir(exist_ok=True)
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1", "DISK_DELAY": "0.01", "TRAINED": str(log)})  # fmt: skip

    def run_to_end(self, out: Path, resume: bool) -> None:
        """A run that nobody kills; raises RuntimeError when it fails."""
        process = self.start(out, resume, 1)
        _, error = process.communicate(timeout=300)
        if process.returncode:
            raise RuntimeError(error[-3000:])

    def run_and_kill(self, out: Path, resume: bool) -> bool:
        """Kills the run at a random instant after its first update; False when it ended before that."""
        process = self.start(out, resume, self.rng.choice(self.processes))
        for line in process.stderr:
            if " update " in line:
                break
        time.sleep(self.rng.random() * 0.8)
        killed = process.poll() is None
        if killed:
            kill_tree(process)
        rest = process.stderr.read()
        process.wait()
        if not killed and process.returncode:
            raise RuntimeError(rest[-3000:])
        self.counts["kills"] += killed
        return killed

    def check_files(self, out: Path) -> bool:
        """Whether there is a state; counts it when it or the weights cannot be read, or when weights and sidecar are of
        another update than the state without being of an earlier one."""
        weight_file, state_file = out / "out" / f"{NAME}.pth", out / "checkpoints" / f"{NAME}_resume.pth"
        if not state_file.exists():
            self.counts["unreadable"] += weight_file.exists()  # the state comes first
            return False
        content, problem = load_training_state(state_file)
        self.counts["unreadable"] += bool(problem)
        if not weight_file.exists():
            return True
        sidecar, weights = read_sidecar(weight_file), torch.load(weight_file, weights_only=True)
        load_weights(weight_file, MiniMindVLM(VLMConfig(**sidecar["config"])))  # they belong together
        same = all(torch.equal(content["model"][name].half(), tensor) for name, tensor in weights.items())
        newest = sidecar["weights"][0] == tensors_fingerprint(weights)  # otherwise killed between sidecar and weights
        lag = content["state"]["update"] - sidecar["progress"]["update"]
        self.counts["unreadable"] += not (same if newest and lag == 0 else not same and lag >= 0)
        return True

    def check_samples(self, out: Path) -> None:
        """Counts samples of an epoch that were trained on twice or never, in what is left of the run's history."""
        history: dict[int, list[int]] = {}
        launches: dict[str, list[Path]] = {}
        for path in sorted(out.glob("trained_*")):
            launches.setdefault(path.stem, []).append(path)  # one file a rank
        for paths in launches.values():
            lines = [list(map(int, line.split())) for path in paths for line in path.read_text().splitlines()]
            first = min(line[0] for line in lines)
            history = {update: samples for update, samples in history.items() if update < first}  # the rest was lost
            for update, *samples in lines:
                history.setdefault(update, []).extend(samples)
        trained = Counter(number for samples in history.values() for number in samples)
        self.counts["repeated"] += sum(max(0, trained[number] - EPOCHS) for number in range(SAMPLES))
        self.counts["skipped"] += sum(max(0, EPOCHS - trained[number]) for number in range(SAMPLES))

    def rage(self, kills: int) -> Counter:
        """Runs until so many kills have happened."""
        expected = None
        if self.processes == [1]:
            self.run_to_end(self.folder / "whole", resume=False)
            expected = torch.load(self.folder / "whole" / "out" / f"{NAME}.pth", weights_only=True)
        number = 0
        while self.counts["kills"] < kills:
            out, resume = self.folder / f"run_{number}", False
            number += 1
            while self.counts["kills"] < kills and self.run_and_kill(out, resume):
                resume = self.check_files(out)
            self.run_to_end(out, self.check_files(out))
            self.check_samples(out)
            if expected is not None:
                ended = torch.load(out / "out" / f"{NAME}.pth", weights_only=True)
                self.counts["differing"] += not all(torch.equal(ended[name], tensor) for name, tensor in expected.items())
            print(f"run {number}: {dict(self.counts)}", flush=True)
        return self.counts


def main() -> int:
    """Runs the storm and prints its counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--processes", default="1", help="numbers of processes to choose from, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="storm_") as folder:
        counts = Storm(Path(folder), args.seed, [int(number) for number in args.processes.split(",")]).rage(args.kills)
    print("storm: " + ", ".join(f"{counts[name]} {name}" for name in ("kills", "unreadable", "differing", "repeated", "skipped")))
    return int(any(counts[name] for name in ("unreadable", "differing", "repeated", "skipped")))


if __name__ == "__main__":
    sys.exit(main())
