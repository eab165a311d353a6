"""How fast training is on this machine: the plain way against the real one, side by side in one run.

    python -m benchmarks train --json FILE    # the plain way, the real one, and each measure switched off alone
    python -m benchmarks growth --json FILE --plot images/growth.png    # samples/s as things grow
    python -m benchmarks data --json FILE     # starting on and reading from large data
    python -m benchmarks inference --json FILE    # answers

Decoder 512x8, a vision tower of ViT-B/16's shape with random weights, synthetic data of the real data's lengths. Every
contestant is a process of its own, with its own loader and peak memory; they take turns, so that a machine that slows
down slows all of them. Figures are medians over turns, ratios those of medians. `make bench` runs the first.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from model.conversation import load_tokenizer
from model.device import default_device
from model.errors import UsageError, print_anything
from model.moe import MOEFeedForward
from model.storage import REPOSITORY, check_output, check_plot, home_for_tilde

from .contestants import ENCODES_ITSELF, loaders, serve
from .synthetic import write_data

STAGES = {"pretrain": {"count": 96, "rounds": 3}, "sft": {"count": 48, "rounds": 3}}
# Measures that can be switched off (or, for the last, an option switched on) alone: stage, epoch, what it is.
ABLATIONS = {
    "own_length": ("sft", "cached", "batches padded to max_seq_len"),
    "like_lengths": ("sft", "cached", "batches of any lengths"),
    "bf16": ("sft", "cached", "--dtype float32"),
    "attention": ("sft", "cached", "scaled_dot_product_attention on the CPU"),
    "last_block": ("sft", "cached", "the last block at every position"),
    "supervised_logits": ("sft", "cached", "logits at every position"),
    "fused_optimizer": ("sft", "cached", "AdamW tensor by tensor"),
    "kept_memory": ("sft", "cached", "malloc's own settings"),
    "encoder_bf16": ("pretrain", "first", "the encoder in fp32"),
    "compile": ("sft", "cached", "without --use_compile 1"),
    "checkpointing": ("sft", "cached", "with --gradient_checkpointing 1"),
}

ENVIRONMENT = dict(os.environ)  # before `main` changes it for the measurements of its own


class Contestant:
    """One way to train or to answer, in a process that waits for its turn."""

    def __init__(self, **spec):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in end)
        command = [sys.executable, "-m", "benchmarks.train", "--contestant", json.dumps(spec)]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, env=ENVIRONMENT)  # fmt: skip

    def turn(self, what: str) -> dict:
        """Trains for a while: "first" (nothing cached), "cached" or "plain"; or answers: "chat", "batch". Returns what
        `contestants.serve` measured."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise RuntimeError(f"a contestant died:\n{self.log.read()[-3000:]}")
        return json.loads(answer)

    def end(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def best_seconds(function, device: torch.device, times: int) -> float:
    """Seconds of the quickest of several calls."""
    seconds = []
    for _ in range(times):
        wait_for(device)
        begin = time.perf_counter()
        function()
        wait_for(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def gemm_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product of this device, at a size that suits it."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: a @ a, device, 4)


def make_folder(folder: Path, counts: dict[str, int]) -> None:
    """Data of both stages and a tower of ViT-B/16's shape."""
    tokenizer = load_tokenizer(str(REPOSITORY / "model"))
    for stage, count in counts.items():
        write_data(folder / stage, stage, count, tokenizer, pictures=count)
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(folder / "tower")


def median(turns: list[dict], name: str = "samples_per_second") -> float:
    """The median of one figure over turns."""
    return statistics.median(turn[name] for turn in turns)


def show(name: str, turns: list[dict], gemm: dict[str, float]) -> None:
    """One line of the table."""
    flops = median(turns, "flops_per_second")
    print(f"{name:28} {median(turns):10.2f} {median(turns, 'tokens_per_second'):10.0f}"
          f" {median(turns, 'padding'):8.1%} {median(turns, 'peak_memory_mb'):10.0f}"
          f" {flops / gemm['bfloat16']:8.2f} {flops / gemm['float32']:8.2f}", flush=True)  # fmt: skip


def race(folder: Path, device: str, stage: str, gemm: dict[str, list[float]]) -> dict[str, list[dict]]:
    """Plain and real in turns: lists of turns by "plain", "first" and "cached"."""
    plain = Contestant(stage=stage, folder=str(folder), device=device, plain=True)
    real = Contestant(stage=stage, folder=str(folder), device=device)
    turns = {"plain": [], "first": [], "cached": []}
    plain.turn("plain")  # warms up
    for _ in range(STAGES[stage]["rounds"]):
        for dtype in gemm:
            gemm[dtype].append(gemm_speed(torch.device(device), getattr(torch, dtype)))
        for what in turns:
            turns[what].append((plain if what == "plain" else real).turn(what))
    plain.end()
    real.end()
    return turns


def ablate(folder: Path, device: str) -> list[dict]:
    """Each measure switched off alone, against everything on."""
    print(f"\n{'one thing changed':42} {'':15} {'samples/s':>9} {'all on':>8} {'factor':>8}")
    rows = []
    for stage in STAGES:
        base = Contestant(stage=stage, folder=str(folder), device=device)
        base.turn("first")
        for name, (_, what, words) in [item for item in ABLATIONS.items() if item[1][0] == stage]:
            other = Contestant(stage=stage, folder=str(folder), device=device, off=name)
            other.turn("first" if name in ENCODES_ITSELF else "cached")
            turns = [[], []]
            for _ in range(2):
                for contestant, own in ((base, turns[0]), (other, turns[1])):
                    own.append(contestant.turn(what))
            other.end()
            on, off = map(median, turns)
            memory = median(turns[1], "peak_memory_mb") / median(turns[0], "peak_memory_mb")
            rows.append({"name": f"without_{name}", "ratio": on / off, "what": words, "stage": stage, "epoch": what,
                         "samples_per_second": off, "samples_per_second_all_on": on, "memory_ratio": memory})  # fmt: skip
            print(f"{words:42} {stage:8} {what:6} {off:9.2f} {on:8.2f} {on / off:7.2f}x  memory {memory:.2f}x", flush=True)
        base.end()
    return rows


def measure_loader(folder: Path) -> dict:
    """Seconds of a batch of 16 captions with pictures on one core: transformers' processor against ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain, real = loaders(folder)
    turns = {"plain": [], "real": []}
    for start in [0, *range(0, 96, 16), *range(0, 96, 16)]:  # the first pair warms up
        for name, load in (("plain", plain), ("real", real)):
            begin = time.perf_counter()
            load(range(start, start + 16))
            turns[name].append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    seconds = {name: statistics.median(values[1:]) for name, values in turns.items()}
    return {"name": "loader", "ratio": seconds["plain"] / seconds["real"], "samples_per_second": 16 / seconds["real"],
            "plain_samples_per_second": 16 / seconds["plain"]}  # fmt: skip


def measure_moe(device: torch.device) -> list[dict]:
    """Forward and backward of one Mixture-of-Experts layer on 1,424 tokens: the loop over masks in fp32, as the plain
    way has it, the same loop in bf16, and ours."""
    from model.model_minimind import FeedForward, MiniMindConfig
    from trainer.plain import mix_experts

    torch.manual_seed(0)
    layer = MOEFeedForward(MiniMindConfig(use_moe=True), FeedForward).to(device).train()
    x = torch.randn(4, 356, 512, device=device, requires_grad=True)

    def run(forward, bf16: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out, aux_loss = forward()
        (out.float().square().mean() + aux_loss).backward()
        layer.zero_grad()

    ways = {"plain": lambda: run(lambda: mix_experts(layer, x, None), False),
            "plain_bf16": lambda: run(lambda: mix_experts(layer, x, None), True),
            "real": lambda: run(lambda: layer(x), True)}  # fmt: skip
    seconds = {name: [] for name in ways}
    for _ in range(6):
        for name, way in ways.items():
            seconds[name].append(best_seconds(way, device, 1))
    plain, plain_bf16, real = (statistics.median(values[1:]) for values in seconds.values())
    return [{"name": "moe", "ratio": plain / real, "milliseconds": real * 1e3},
            {"name": "moe_same_format", "ratio": plain_bf16 / real, "milliseconds": real * 1e3}]  # fmt: skip


def train_suite(folder: Path, device: str, save: Callable[[list[dict]], None]) -> list[dict]:
    """The rows of suite `train`; `save` gets those that are done before the long rest."""
    make_folder(folder, {stage: settings["count"] for stage, settings in STAGES.items()})
    gemm: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    turns = {stage: race(folder, device, stage, gemm) for stage in STAGES}
    speed = {dtype: statistics.median(values) for dtype, values in gemm.items()}
    print(f"matrix products on {device}: bf16 {speed['bfloat16'] / 1e9:.0f}, fp32 {speed['float32'] / 1e9:.0f} GFLOP/s\n")
    print(f"{'':28} {'samples/s':>10} {'tokens/s':>10} {'padding':>8} {'memory MB':>10} {'of bf16':>8} {'of fp32':>8}")
    rows = []
    for stage in STAGES:
        for what, own in turns[stage].items():
            show(f"{stage} {what}", own, speed)
            if what != "plain":
                name = f"{stage}_first_epoch" if what == "first" else f"{stage}_cached"
                figures = {key: median(own, key) for key in own[0]}
                plain = {f"plain_{key}": median(turns[stage]["plain"], key) for key in turns[stage]["plain"][0]}
                rows.append({"name": name, "ratio": median(own) / median(turns[stage]["plain"]), **figures, **plain})
    by_name = {row["name"]: row for row in rows}
    share = by_name["sft_cached"]["flops_per_second"] / speed["bfloat16"]
    memory = by_name["pretrain_cached"]["peak_memory_mb"] / by_name["pretrain_cached"]["plain_peak_memory_mb"]
    rows += [{"name": "sft_gemm_share", "ratio": share, "gemm_flops_per_second": speed},
             {"name": "pretrain_memory", "ratio": memory}, measure_loader(folder),
             *measure_moe(torch.device(device))]  # fmt: skip
    print()
    for row in rows:
        print(f"{row['name']:28} {row['ratio']:8.2f}", flush=True)
    save(rows)
    return rows + ablate(folder, device)


def main() -> int:
    """Runs a suite and writes its rows."""
    print_anything()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("suite", nargs="?", choices=("train", "growth", "data", "inference"), default="train")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--plot", help="growth: file for the picture")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args(home_for_tilde())
    if args.contestant:
        serve(json.loads(args.contestant))
        return 0
    try:
        if args.json:
            check_output("--json", Path(args.json))
        check_plot(args.plot)
    except UsageError as error:
        parser.error(str(error))

    def save(rows: list[dict]) -> None:
        if args.json:
            Path(args.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n")

    folder = Path(tempfile.mkdtemp(prefix="benchmark_"))
    try:
        if args.suite == "train":
            save(train_suite(folder, args.device, save))
        elif args.suite == "data":
            from .data import data_suite

            save(data_suite(folder))
        elif args.suite == "inference":
            from .inference import inference_suite

            save(inference_suite())
        else:
            from .growth import growth_suite

            save(growth_suite(folder, args.device, args.plot))
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
