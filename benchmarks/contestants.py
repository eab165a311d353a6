"""What takes part in the benchmark: processes that train the plain way, the real way, or the real way less one measure.

Legend: T tokens of a sample, S supervised ones, D width, H heads, d size of a head, V vocabulary, P patches of width W.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from dataset.images import open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import Batch, VLMDataset, collate
from machine import peak_memory
from model import model_minimind
from model.conversation import Renderer, load_tokenizer
from model.model_minimind import IGNORE_INDEX
from model.model_vlm import MiniMindVLM
from model.storage import REPOSITORY
from trainer import build, distributed
from trainer.build import build_model, freeze, open_cache
from trainer.config import TrainConfig
from trainer.guards import StopRequest
from trainer.loop import Trainer
from trainer.plain import PlainDataset, plain_loss, plain_update

FLAGS = {  # the scripts' own
    "pretrain": {"batch_size": 16, "max_seq_len": 640, "freeze_llm": 1, "learning_rate": 4e-4},
    "sft": {"batch_size": 4, "max_seq_len": 1536, "freeze_llm": 0, "learning_rate": 1e-6},
}
ENCODES_ITSELF = ("bf16", "encoder_bf16")  # other features than all others: a cache of its own


def serve(spec: dict) -> None:
    """Answers each line of standard input (what to do in this turn) with a line of figures, until its end."""
    if way := spec.get("answers"):
        from . import inference as inference_suite

        turns = {"plain": inference_suite.plain_turns, "real": inference_suite.real_turns}[way]()
    else:
        turns = plain_turns(spec) if spec.get("plain") else real_turns(spec)
    next(turns)
    for line in sys.stdin:
        print(json.dumps(turns.send(line.strip())), flush=True)


def needed_flops(model: MiniMindVLM, lengths: list[int], supervised: int, pictures: int) -> float:
    """Arithmetic that the samples need, padding and encoder apart: products of real tokens, half of the attention
    square, the last block's output and the logits at supervised positions only."""
    config, tokens = model.config, sum(lengths)
    block = model.model.layers[0]
    attention = sum(p.weight.numel() for p in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj))
    late = block.self_attn.o_proj.weight.numel() + sum(p.weight.numel() for p in block.mlp.children())
    weights = config.num_hidden_layers * attention * tokens + late * ((config.num_hidden_layers - 1) * tokens + supervised)
    weights += config.vocab_size * config.hidden_size * supervised
    scores = config.num_hidden_layers * config.hidden_size * sum(length * (length + 1) for length in lengths)
    trained = block.mlp.gate_proj.weight.requires_grad
    projector = pictures * config.image_tokens * config.vision_hidden_size * config.hidden_size
    # Forward, the gradient of the inputs, and that of the weights where they learn. Two operations a product.
    return 2 * (weights * (3 if trained else 2) + projector * 2) + 2 * scores * 3


def figures(model: MiniMindVLM, device: torch.device, seconds: float, batches: list[dict]) -> dict:
    """What a turn comes to. `batches` hold lengths, cells (tokens with padding), supervised tokens and pictures."""
    lengths = [length for batch in batches for length in batch["lengths"]]
    cells = sum(batch["cells"] for batch in batches)
    flops = sum(needed_flops(model, b["lengths"], b["supervised"], b["pictures"]) for b in batches)
    on_cpu = device.type == "cpu"
    memory = peak_memory() if on_cpu else torch.accelerator.max_memory_allocated()
    return {
        "samples_per_second": len(lengths) / seconds, "tokens_per_second": sum(lengths) / seconds,
        "padding": 1 - sum(lengths) / cells, "peak_memory_mb": memory / 2**20, "flops_per_second": flops / seconds,
    }  # fmt: skip


def count(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, pictures: int) -> dict:
    """The entry of a batch for `figures`."""
    return {"lengths": mask.sum(1).long().tolist(), "cells": ids.numel(),
            "supervised": int((labels[:, 1:] != IGNORE_INDEX).sum()), "pictures": pictures}  # fmt: skip


def plain_turns(spec: dict) -> Iterator[dict]:
    """Each turn is one update of the plain way."""
    flags, device = FLAGS[spec["stage"]], torch.device(spec["device"])
    torch.manual_seed(42)
    tokenizer = load_tokenizer(str(REPOSITORY / "model"))
    model = build_model(512, 8, False, f"{spec['folder']}/tower", tokenizer)
    freeze(model, flags["freeze_llm"])
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=flags["learning_rate"],
                                  weight_decay=0.01)  # fmt: skip
    data = Path(spec["folder"]) / spec["stage"]
    dataset = PlainDataset(open_samples(data / f"{spec['stage']}.jsonl"), open_images(data / "pictures"),
                           Renderer(tokenizer), flags["max_seq_len"])  # fmt: skip
    loader = DataLoader(dataset, flags["batch_size"], shuffle=True, num_workers=1)
    batches = (batch for _ in iter(int, 1) for batch in loader)
    answer = None
    while True:
        yield answer
        begin = time.perf_counter()
        batch = next(batches)
        plain_update(model, batch, optimizer)
        seconds = time.perf_counter() - begin
        counted = count(batch["ids"], batch["mask"], batch["labels"], len(batch["pixel_values"]))
        answer = figures(model, device, seconds, [counted])


def real_turns(spec: dict) -> Iterator[dict]:
    """Each turn is one epoch of the real training loop, its first update (start of the loaders) apart.

    "first" empties the feature cache before, "cached" takes what is there.
    """
    off, folder, data = spec.get("off"), Path(spec["folder"]), Path(spec["folder"]) / spec["stage"]
    flags = FLAGS[spec["stage"]] | {
        "data_path": spec.get("data_path", str(data / f"{spec['stage']}.jsonl")), "images_path": str(data / "pictures"),
        "vision_model_path": str(folder / "tower"), "from_weight": "none", "epochs": 10**6, "log_interval": 10**9,
        "save_interval": 10**9, "num_workers": 1, "cache_features": 1, "use_compile": 1, "device": spec["device"],
        "save_dir": str(data / "out"), "checkpoint_dir": str(data / ("bf16_off" if off in ENCODES_ITSELF else "checkpoints")),
    } | spec.get("flags", {})  # fmt: skip
    flags |= {"bf16": {"dtype": "float32"}, "compile": {"use_compile": 0},
              "checkpointing": {"gradient_checkpointing": 1}}.get(off, {})  # fmt: skip
    begin = time.perf_counter()
    config = TrainConfig(**flags)
    run = build.build(config, distributed.start(config.device))
    start_seconds = time.perf_counter() - begin
    switch_off(off, run)
    answer = updates = None
    while True:
        what = yield answer
        if what == "first":
            shutil.rmtree(config.features_folder)
            run.dataset.cache = open_cache(config, run.ranks, run.model, run.dataset.samples, run.fingerprints["vision_encoder"])
        if what == "first" or updates is None:
            trainer = Trainer(run)
            counted = watch(trainer)
            updates = trainer.updates(StopRequest())
        next(updates)
        counted.clear()
        begin = time.perf_counter()
        for _ in range(min(run.sampler.updates_per_epoch, spec.get("updates", 10**9)) - 1):
            next(updates)
        if run.ranks.device.type != "cpu":
            torch.accelerator.synchronize()
        answer = figures(run.model, run.ranks.device, time.perf_counter() - begin, counted)
        answer["start_seconds"] = start_seconds


def watch(trainer: Trainer) -> list[dict]:
    """A list that gets an entry for every micro-batch trained on."""
    counted, update = [], trainer.update

    def counting(micro_batches: list[Batch], *arguments) -> None:
        counted.extend(count(b.ids, b.attention_mask, b.labels, len(b.image_index)) for b in micro_batches)
        update(micro_batches, *arguments)

    trainer.update = counting
    return counted


def pad_to(batch: Batch, length: int) -> Batch:
    """The batch with rows of `length` tokens."""
    T, more = batch.ids.shape[1], (0, length - batch.ids.shape[1])
    moved = {name: getattr(batch, name) // T * length + getattr(batch, name) % T for name in ("image_positions", "loss_positions")}
    return replace(batch, ids=F.pad(batch.ids, more), labels=F.pad(batch.labels, more, value=IGNORE_INDEX),
                   attention_mask=F.pad(batch.attention_mask, more), **moved)  # fmt: skip


def switch_off(name: str | None, run: build.Run) -> None:
    """Undoes one measure of the real path in this process."""
    if name == "own_length":
        build.collate = lambda *args, **kwargs: pad_to(collate(*args, **kwargs), run.config.max_seq_len)
    elif name == "like_lengths":
        run.sampler.lengths = None
    elif name == "attention":
        model_minimind.causal_attention = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    elif name == "last_block":
        forward = model_minimind.MiniMindModel.forward

        def everywhere(self, *args):
            out = forward(self, *args[:7])
            out.last_hidden_state = model_minimind.take_rows(out.last_hidden_state, args[7])
            return out

        model_minimind.MiniMindModel.forward = everywhere
    elif name == "supervised_logits":
        model, forward = run.model, run.model.forward

        def all_logits(ids, labels, loss_positions, **kwargs):
            out = forward(ids, **kwargs)
            out.loss = plain_loss(out.logits.float(), labels)
            return out

        model.forward = all_logits
    elif name == "fused_optimizer":
        group = run.optimizer.param_groups[0]
        run.optimizer = TensorByTensor(group["params"], lr=group["lr"], weight_decay=0.01, foreach=False)
    elif name == "encoder_bf16":
        run.model.vision_encoder.float()


class TensorByTensor(torch.optim.AdamW):
    """AdamW without fusion, which does not know of `found_inf`."""

    def step(self, closure=None):
        found_inf = self.__dict__.pop("found_inf")
        super().step(closure)
        self.found_inf = found_inf


def loaders(folder: Path) -> tuple[Callable, Callable]:
    """Two functions from sample numbers to a batch of captions: the plain way and the real one."""
    tokenizer = load_tokenizer(str(REPOSITORY / "model"))
    samples, images = open_samples(folder / "pretrain" / "pretrain.jsonl"), open_images(folder / "pretrain" / "pictures")
    plain = PlainDataset(samples, images, Renderer(tokenizer), 640)
    real = VLMDataset(samples, images, Renderer(tokenizer), 640)
    return (lambda numbers: torch.utils.data.default_collate([plain[number] for number in numbers]),
            lambda numbers: collate(real.__getitems__(list(numbers)), 0, 196))  # fmt: skip
