"""Flags and settings of training: one frozen dataclass, checked when it is made, and the names of a run's files.

A mistake here is a UsageError: the scripts print it and end with exit code 2.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from dataset.sources import split_entries
from model.errors import UsageError
from model.storage import REPOSITORY, home_for_tilde
from model.weights import weight_name

DTYPES = ("bfloat16", "float16", "float32")
POSITIVE = ("epochs", "batch_size", "learning_rate", "accumulation_steps", "grad_clip", "log_interval", "save_interval",
            "hidden_size", "num_hidden_layers", "max_seq_len", "temperature", "max_new_tokens", "updates_per_batch", "clip")  # fmt: skip


def setting(default, help_text: str, choices: tuple | None = None, several: bool = False):
    """A dataclass field that is also a command-line flag; of `several` values, it holds them with commas between."""
    return field(default=default, metadata={"help": help_text, "choices": choices, "several": several})


def inside(*parts: str) -> str:
    """A path in the repository, wherever a script is started."""
    return str(REPOSITORY.joinpath(*parts))


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run. Relative paths are relative to the current folder, default ones to the repository."""

    save_dir: str = setting(inside("out"), "folder for weights, sidecars and metrics")
    save_weight: str = setting("pretrain_vlm", "prefix of the weight files: {save_weight}_{hidden_size}{_moe}.pth")
    epochs: int = setting(4, "passes over the training data")
    batch_size: int = setting(16, "samples of a micro-batch, per process")
    learning_rate: float = setting(4e-4, "peak of the cosine, which falls to a tenth of it at the end")
    device: str | None = setting(None, "cuda:0, mps, cpu, ...; by default the best there is")
    dtype: str | None = setting(None, "number format; by default bfloat16, or float32 where the device is faster at it; a resume"
        " and the feature cache keep theirs", DTYPES)  # fmt: skip
    num_workers: int = setting(8, "loader processes, capped to the machine's cores; 0: none")
    accumulation_steps: int = setting(1, "micro-batches of an update: more, for a larger batch in the same memory")
    grad_clip: float = setting(1.0, "largest global norm of the gradient")
    log_interval: int = setting(100, "updates between two log lines")
    save_interval: int = setting(100, "updates between two saves")
    hidden_size: int = setting(512, "width of the decoder (512 with 8 layers: 26M parameters; 768 with 16: 104M)")
    num_hidden_layers: int = setting(8, "blocks of the decoder")
    max_seq_len: int = setting(640, "longest sample in tokens, 196 of them an image; longer text is cut, no image")
    use_moe: int = setting(0, "1: Mixture of Experts in the decoder's feed-forward layers", (0, 1))
    data_path: str = setting(inside("dataset", "pretrain_data.jsonl"), "training data: jsonl and parquet files, folders of them,"
        " patterns, hf://datasets/ORG/NAME/FILE; one or several, each with a weight if wanted (a.jsonl:0.3)", several=True)  # fmt: skip
    images_path: str = setting(inside("dataset", "pretrain_images"), "folder, .zip or .tar of the images that the data name, one"
        " or several; unused with parquet files that hold their images", several=True)  # fmt: skip
    eval_data_path: str | None = setting(None, "validation data: files as for --data_path, or a fraction of the training samples"
        " to hold out (0.01); by default no validation", several=True)  # fmt: skip
    eval_images_path: str | None = setting(None, "images of these files; by default --images_path", several=True)
    eval_interval: int = setting(0, "updates between two validations; 0: one after every epoch")
    eval_blind: int = setting(1, "1: also the validation loss with blank images, and with other samples' images", (0, 1))
    from_weight: str = setting("llm", "prefix of the weights in save_dir to start from; none: random weights")
    from_resume: int = setting(0, "1: resume from the last training state of the same save_weight", (0, 1))
    freeze_llm: int = setting(1, "what is trained: 0: projector and decoder, 1: projector, 2: projector and the decoder's last"
        " block", (0, 1, 2))  # fmt: skip
    use_wandb: bool = setting(False, "track the run with SwanLab, in the mode of its own settings (SWANLAB_MODE=cloud; local needs"
        " swanlab[dashboard]; offline needs no account)")  # fmt: skip
    wandb_project: str = setting("MiniMind-V-Pretrain", "project name for SwanLab")
    wandb_run_name: str | None = setting(None, "run name for SwanLab; by default made from the settings")
    vision_model_path: str | None = setting(None, "folder of a vision encoder in transformers format, or org/name on a hub: CLIP,"
        " SigLIP or SigLIP 2 of fixed size, DINOv2; by default that of the weights started from, or"
        " model/vision_model/clip-vit-base-patch16")  # fmt: skip
    family: str | None = setting(None, "the decoder's: that of the original's weights of 2025 (MiniMind2-V) or of 2026"
        " (minimind-3v); by default that of the weights started from, or minimind2", ("minimind2", "minimind3"))  # fmt: skip
    projector: str | None = setting(None, "between vision encoder and decoder: a linear layer, or two with a norm before; by"
        " default that of the weights started from, or the family's (linear, mlp)", ("linear", "mlp"))  # fmt: skip
    image_tokens: int | None = setting(None, "tokens of an image: fewer than the encoder's patches pool squares of these (196: 49"
        " or 4), for shorter sequences; by default those of the weights started from, or a token for every patch")  # fmt: skip
    tiles: int | None = setting(None, "show every image also in up to so many tiles of the encoder's size, each with its tokens:"
        " finer detail, longer sequences; by default as the weights started from, or none")  # fmt: skip
    tokenizer_path: str | None = setting(None, "folder of the tokenizer, or org/name on a hub; by default that of the weights"
        " trained from: their sidecar's, one next to them, or model/published_tokenizer; for random weights this project's,"
        " model")  # fmt: skip
    checkpoint_dir: str = setting(inside("checkpoints"), "folder for training states and feature caches")
    on_bad_sample: str = setting("skip", "skip: log a sample that cannot be used and continue, up to 10 an epoch or 1%% of what"
        " was read; raise: stop at the first", ("skip", "raise"))  # fmt: skip
    cache_features: int = setting(0, "1: keep every image's output of the vision encoder on disk, for later epochs", (0, 1))
    use_compile: int = setting(0, "1: compile the decoder's blocks (torch.compile)", (0, 1))
    gradient_checkpointing: int = setting(0, "1: less memory, a third more arithmetic", (0, 1))
    seed: int = setting(42, "of the order of samples, of random weights, and of what is held out")

    def __post_init__(self):
        def require(fine: bool, name: str, rule: str) -> None:
            if not fine:
                raise UsageError(f"--{name} {getattr(self, name)}: {rule}")

        for item in dataclasses.fields(self):
            choices, value = item.metadata["choices"], getattr(self, item.name)
            if choices and value is not None:
                require(value in choices, item.name, f"choose from {', '.join(map(str, choices))}")
        for name in filter(self.__dict__.__contains__, POSITIVE):  # the last ones are of a subclass
            require(getattr(self, name) > 0, name, "must be greater than 0")
        for name in ("num_workers", "eval_interval", "seed", "tiles"):
            require((getattr(self, name) or 0) >= 0, name, "must not be negative")
        require(self.image_tokens is None or self.image_tokens > 0, "image_tokens", "must be greater than 0")
        require(self.tiles != 1, "tiles", "a single tile would be the image once more; 2 or more, or 0")
        require(math.isfinite(self.learning_rate), "learning_rate", "must be finite")
        for name in ("save_weight", "from_weight"):
            value = getattr(self, name)
            require(bool(value) and os.sep not in value, name, "a name without folders; folders go to --save_dir")
        require(not self.save_weight.endswith("_best"), "save_weight", "_best is for the best weights of a validated run")
        fraction = fraction_of(self.eval_data_path)
        require(fraction is None or 0 < fraction < 1, "eval_data_path",
                f"a fraction lies between 0 and 1; a file of that name is ./{self.eval_data_path}")  # fmt: skip
        for name in ("eval_interval", "eval_images_path"):
            require(not getattr(self, name) or bool(self.eval_data_path), name, "needs --eval_data_path, data to validate on")
        require(not (fraction and self.eval_images_path), "eval_images_path",
                "goes with files in --eval_data_path; samples held out have their images in --images_path")  # fmt: skip

    def weights_of(self, prefix: str) -> Path:
        """{save_dir}/{prefix}_{hidden_size}{_moe}.pth."""
        return Path(self.save_dir) / f"{weight_name(prefix, self.hidden_size, bool(self.use_moe))}.pth"

    @property
    def weight_file(self) -> Path:
        return self.weights_of(self.save_weight)

    @property
    def best_file(self) -> Path:  # the weights of the lowest validation loss
        return self.weights_of(f"{self.save_weight}_best")

    @property
    def metrics_file(self) -> Path:
        return self.weight_file.with_suffix(".metrics.jsonl")

    @property
    def resume_file(self) -> Path:  # the training state
        return Path(self.checkpoint_dir) / f"{self.weight_file.stem}_resume.pth"

    @property
    def features_folder(self) -> Path:
        """Where the feature cache of the data goes: one for each choice of data files and folders of images."""
        flags = [path for path, _ in split_entries(self.data_path)], self.images_path.split(",")  # weights change nothing
        paths = [[path if "://" in path else os.path.realpath(path.strip()) for path in flag] for flag in flags]
        digest = hashlib.blake2b(json.dumps(paths).encode(), digest_size=4).hexdigest()
        stem = re.sub(r"\W+", "_", Path(paths[0][0]).stem)
        return Path(self.checkpoint_dir) / "features" / f"{stem}_{digest}"


def fraction_of(eval_data_path: str | None) -> float | None:
    """The fraction of the training samples to hold out; None where --eval_data_path names files or nothing."""
    try:
        return float(eval_data_path or "")
    except ValueError:
        return None


def parse_config(description: str, defaults: dict, argv: list[str] | None = None, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    """Command-line flags over `defaults` over those of the dataclass `kind`. Ends the process with code 2 for bad flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in dataclasses.fields(kind):
        default = defaults.get(item.name, item.default)
        shown = "" if default is None else f" (default: {default})"
        options = {"default": default, "help": item.metadata["help"] + shown}
        if item.type is bool:
            options["action"] = "store_true"
        else:
            kinds = (item.type, *get_args(item.type))  # of `int | None`, int
            options |= {"type": next((kind for kind in (int, float) if kind in kinds), str), "choices": item.metadata["choices"],
                        "nargs": "+" if item.metadata["several"] else None}  # fmt: skip
        parser.add_argument(f"--{item.name}", **options)
    values = vars(parser.parse_args(home_for_tilde(argv)))
    try:
        return kind(**{name: ",".join(value) if isinstance(value, list) else value for name, value in values.items()})
    except UsageError as error:
        parser.error(str(error))
