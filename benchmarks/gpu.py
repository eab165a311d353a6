"""Suite `gpu`: does a device compute the same, and how fast? `python -m benchmarks gpu --minutes 8`, most important rows first.

Compared are docs/minimal_vlm.py in fp32 and the real way in each number format, with the same random weights; then the scripts
run as users run them. A row that no time is left for, or that the device cannot do, says so.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import CLIPVisionModel

from dataset.images import open_images
from dataset.sources import open_samples
from dataset.vlm_dataset import VLMDataset, collate
from docs import minimal_vlm
from model.conversation import Renderer
from model.device import check_compile
from model.errors import UsageError
from model.inference.assistant import Assistant
from model.layers import attend, causal_attention
from model.load import read_native
from model.model_minimind import MiniMindConfig
from model.model_vlm import MiniMindVLM, VLMConfig
from model.moe import MOEFeedForward
from model.storage import REPOSITORY
from model.vision import patches_per_image
from model.weights import load_tokenizer
from trainer import distributed
from trainer.build import build
from trainer.config import TrainConfig
from trainer.guards import StopRequest
from trainer.loop import Trainer

from .inference import QUESTION, Real, ask_plain, seconds_of
from .synthetic import Size, make_encoder, write_data
from .train import STAGES, measure_loader, product_speed, run_script

SIZES = {"512x8": (512, 8), "768x16": (768, 16)}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES = (1, 32, 256)  # of questions
CARDS = (8, 12, 16, 24, 48, 80)  # GB
ROWS = (*(f"equal_{name}" for name in FORMATS), "equal_attention", "equal_experts", "equal_cache", "equal_answers",
        *(f"{stage}_{size}" for size in SIZES for stage in STAGES), "batches_a_core", "host_waits", "memory_768x16", "compiled_sft", "resume",
        *(f"decode_{count}" for count in BATCHES), "torchrun")  # fmt: skip


class Skip(Exception):
    """Why a row cannot be measured here."""


def measure(wanted: list[str], folder: Path, size: Size, args: argparse.Namespace) -> Iterator[dict]:
    """The rows, each as soon as it is known."""
    began, bench = time.monotonic(), Bench(folder, size, args.device)
    for name in wanted:
        try:
            if time.monotonic() - began > 60 * args.minutes:
                raise Skip(f"--minutes {args.minutes:g} are over")
            kind, _, which = name.partition("_")
            yield {"name": name} | getattr(bench, f"{kind}_{which}", partial(getattr(bench, kind, bench.train), name))()
        except (Skip, RuntimeError, UsageError) as error:  # the next row may work
            print(f"{name:22}  not measured: {str(error).strip().splitlines()[-1]}", flush=True)


class Bench:
    """What the rows share: data, an encoder, random weights."""

    def __init__(self, folder: Path, size: Size, device: str):
        self.folder, self.size, self.device = folder, size, torch.device(device)
        self.tokenizer, self.encoder = load_tokenizer(REPOSITORY / "model"), make_encoder(folder / "encoder", size)
        self.vision = CLIPVisionModel.from_pretrained(self.encoder)
        sizes = minimal_vlm.Config(size.hidden_size, size.num_hidden_layers, vision_hidden_size=self.vision.config.hidden_size)
        torch.manual_seed(0)
        self.plain = minimal_vlm.MiniVLM(sizes, self.vision)
        minimal_vlm.save_weights(folder / "random.pth", self.plain)
        self.plain = minimal_vlm.load_weights(folder / "random.pth", self.vision).to(self.device)
        self.data = {stage: write_data(folder / stage, stage, size.samples[stage], self.tokenizer, size.samples[stage]) for stage in STAGES}

    def real(self):
        """The same weights, for the real way."""
        return read_native(self.folder / "random.pth", REPOSITORY / "model", self.encoder).model.to(self.device)

    def equal(self, name: str) -> dict:
        """Largest differences of logits, loss and gradients, relative to the spread of logits, the loss, a gradient's norm."""
        (path, images), dtype, device = self.data["sft"], FORMATS[name.removeprefix("equal_")], self.device.type
        samples = VLMDataset(open_samples(path), open_images(images), Renderer(self.tokenizer), 1536)
        batch, real = collate(samples.__getitems__(list(range(4))), 0, 196).to(self.device), self.real().train()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            features = real.encode_images(batch.pixels)[batch.image_index]
            out = real(batch.ids, labels=batch.labels, loss_positions=batch.loss_positions, token_mask=batch.attention_mask,
                       image_features=features, image_positions=batch.image_positions)  # fmt: skip
        out.loss.backward()
        own = minimal_vlm.Conversations(path, images, minimal_vlm.load_tokenizer())
        own = minimal_vlm.collate([own[number] for number in range(4)], device=str(self.device))
        own = replace(own, pixels=batch.pixels[batch.image_index])  # not how images are resized, which differs by a level
        self.plain.zero_grad()
        loss = minimal_vlm.train_loss(self.plain, own)
        loss.backward()
        with torch.no_grad():
            hidden = self.plain(self.plain.embed(own.ids, own.pixels, own.image_positions))[:, :-1]
            logits = self.plain.lm_head(hidden[own.labels[:, 1:] != minimal_vlm.IGNORE])
        theirs = {key: one.grad for key, one in self.plain.named_parameters() if one.grad is not None}
        gradients = max(float((one.grad - theirs[key]).norm() / theirs[key].norm()) for key, one in real.named_parameters() if key in theirs)
        return {"logits": float((out.logits.detach().float() - logits).abs().max() / logits.std()), "loss": abs(float(out.loss.detach() / loss.detach()) - 1),
                "gradients": gradients}  # fmt: skip

    def equal_attention(self) -> dict:
        """Attention, causal and under a mask, by number format: the largest difference from the formula in fp32, relative."""
        q, k, v = (torch.randn(2, heads, 96, 64, device=self.device) for heads in (8, 2, 2))
        keys, values = (x.repeat_interleave(4, dim=1) for x in (k, v))
        causal = torch.ones(96, 96, dtype=torch.bool, device=self.device).tril()
        masks = {"causal": causal, "masked": causal & (torch.arange(96, device=self.device) % 7 > 0) | torch.eye(96, device=self.device).bool()}
        found = {}
        for name, dtype in FORMATS.items():
            for kind, mask in masks.items():
                plain = ((q @ keys.mT / 8).masked_fill(~mask, -torch.inf)).softmax(-1) @ values
                theirs = (x.to(dtype) for x in (q, k, v))
                own = causal_attention(*theirs) if kind == "causal" else attend(*theirs, mask[None, None].expand(2, -1, -1, -1))
                found[f"{kind}_{name}"] = float((own.float() - plain).abs().max() / plain.abs().max())
        return found

    def equal_cache(self) -> dict:
        """Logits in fp32 of tokens read one by one, after a cache, relative to those read at once."""
        model, ids = self.real().eval(), torch.randint(100, 6000, (2, 24), generator=torch.Generator().manual_seed(0)).to(self.device)
        with torch.no_grad():
            whole, out, parts = model(ids, use_cache=False).logits, None, []
            for token in ids.split(1, dim=1):
                out = model(token, past_key_values=out and out.past_key_values, use_cache=True)
                parts.append(out.logits)
        return {"difference": float((torch.cat(parts, dim=1) - whole).abs().max() / whole.std())}

    def batches_a_core(self) -> dict:
        """Captions a second that one core prepares: as many as the device takes in a first epoch, or it waits."""
        return {"samples_per_second": measure_loader(self.folder, self.tokenizer)["samples_per_second"]}

    def equal_experts(self) -> dict:
        """A Mixture-of-Experts layer in bf16, its experts in one product and one by one: the largest relative difference."""
        config = MiniMindConfig(hidden_size=self.size.hidden_size, use_moe=True)
        layer = MOEFeedForward(config).to(self.device, torch.bfloat16).eval()
        x = torch.randn(2, 64, config.hidden_size, device=self.device, dtype=torch.bfloat16)
        counts = torch.tensor([40, 0, 60, 28], device=self.device)
        grouped, apart = layer.run_grouped(x.flatten(0, 1), counts), layer.run_apart(x.flatten(0, 1), counts)
        return {"difference": float((grouped - apart).detach().abs().max() / apart.detach().abs().max())}

    def equal_answers(self) -> dict:
        """Greedy tokens in fp32 of the packed decoder that are those of docs/minimal_vlm.py."""
        image = self.data["sft"][1] / "0.jpg"
        real = Real(Assistant(self.real(), self.tokenizer))
        ours = real.ask([QUESTION], image, self.size.new_tokens)
        theirs = ask_plain(self.plain, minimal_vlm.load_tokenizer(), [QUESTION], image, self.size.new_tokens)
        same = next((place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        return {"same_tokens": same, "of": len(ours)}

    def shape(self, shape: str) -> dict:
        """Width and blocks of a decoder; of the tiny one where a tiny run was asked for."""
        tiny = self.size.hidden_size < 512
        hidden_size, layers = (self.size.hidden_size, self.size.num_hidden_layers) if tiny else SIZES[shape]
        return {"hidden_size": hidden_size, "num_hidden_layers": layers}

    def script(self, stage: str, shape: str = "512x8", **flags) -> dict[str, dict]:
        """The figures of a script's run."""
        size = replace(self.size, compile=0, **self.shape(shape))
        return run_script(stage, self.folder, self.encoder, size, str(self.device), REPOSITORY, **flags)

    def train(self, name: str) -> dict:
        """Samples and tokens a second, and the part of the measured bf16 peak that the model's products alone would take."""
        stage, _, shape = name.partition("_")
        figures = self.script(stage, shape)
        first, cached = figures["first_epoch"], figures["cached"]
        # 2 FLOPs a parameter and token forward, as many for gradients of inputs, as many for those of weights.
        with torch.device("meta"):
            parameters = MiniMindVLM(VLMConfig(**self.shape(shape), vision_hidden_size=self.vision.config.hidden_size)).num_parameters()
        flops, peak = 2 * (3 if stage == "sft" else 2) * parameters * cached["tokens_per_second"], product_speed(self.device, torch.bfloat16)
        encoding = 2 * self.vision.num_parameters() * patches_per_image(self.vision)  # an image, forward alone
        first_flops = first["samples_per_second"] * (flops / cached["samples_per_second"] + encoding)
        return {"first_of_peak": first_flops / peak, "first_samples_per_second": first["samples_per_second"], "cached_samples_per_second": cached["samples_per_second"],
                "tokens_per_second": cached["tokens_per_second"], "of_peak": flops / peak, "memory_mb": cached["peak_memory_mb"]}  # fmt: skip

    def host_waits(self) -> dict:
        """How often the host waited for the device in ten updates between two log lines, which should be never."""
        if self.device.type != "cuda":
            raise Skip("only CUDA tells when the host waits")
        path, images = self.data["sft"]
        out = str(self.folder / "waits")
        trainer = Trainer(build(TrainConfig(
            data_path=str(path), images_path=str(images), vision_model_path=str(self.encoder), save_dir=out, checkpoint_dir=out,
            from_weight="none", batch_size=4, max_seq_len=1536, freeze_llm=0, device=str(self.device), log_interval=10**9,
            save_interval=10**9, epochs=1, num_workers=0,
        ), distributed.start(str(self.device))))  # fmt: skip
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                trainer.train_epochs(0, StopRequest())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"waits": sum("synchronizing" in str(one.message) for one in heard), "updates": trainer.state.update}

    def memory_768x16(self) -> dict:
        """SFT's memory at two batch sizes, and the batches that cards of so many GB take by that (nine tenths of them)."""
        small, large = (self.script("sft", "768x16", batch_size=count)["cached"]["peak_memory_mb"] for count in (4, 8))
        sample = max((large - small) / 4, 1e-3)
        return {f"batch_{card}gb": max(0, int((0.9 * 1024 * card - small) / sample) + 4) for card in CARDS} | {"sample_mb": sample}

    def compiled_sft(self) -> dict:
        """--use_compile 1 against without."""
        check_compile(self.device)
        plain, compiled = (self.script("sft", use_compile=flag)["cached"]["samples_per_second"] for flag in (0, 1))
        return {"samples_per_second": compiled, "ratio": compiled / plain}

    def resume(self, _: str) -> dict:
        """The largest difference of a weight between a run and its resumption from the save before its last."""
        states = self.folder / "out"
        self.script("sft", save_interval=2)
        (path,) = states.glob("*_resume.pth")
        (weights,) = (file for file in states.glob("sft_vlm_*.pth") if "resume" not in file.name)
        expected = torch.load(weights, weights_only=True)
        path.with_name(f"{path.stem}_previous.pth").replace(path)
        self.script("sft", save_interval=2, from_resume=1)
        found = torch.load(weights, weights_only=True)
        return {"difference": max(float((found[key].float() - value.float()).abs().max()) for key, value in expected.items())}

    def decode(self, name: str) -> dict:
        """Tokens a second of so many answers at once, reading the questions included."""
        count = int(name.removeprefix("decode_"))
        real = Real(Assistant(self.real().to(torch.bfloat16 if self.device.type != "cpu" else torch.float32), self.tokenizer))
        images = sorted(self.data["sft"][1].glob("*.jpg"))
        images = [images[number % len(images)] for number in range(count)]
        real.ask_all(images, 2)
        return {"tokens_per_second": count * self.size.new_tokens / seconds_of(real.ask_all, images, self.size.new_tokens)}

    def torchrun(self, _: str) -> dict:
        """The SFT script under torchrun, with one process (NCCL on CUDA)."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        return self.script("sft", launcher=launcher)["cached"]
