"""Flags and settings of training: one frozen dataclass, checked when it is made, and the names of files.

A mistake here is a UsageError: the scripts print it and end with exit code 2.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from dataset.sources import split_entries
from model.errors import UsageError
from model.storage import REPOSITORY, home_for_tilde
from model.weights import weight_name


def setting(default, help_text: str, choices: tuple | None = None):
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a training run. Relative paths hang off the current folder, default ones off the repository."""

    save_dir: str = setting(str(REPOSITORY / "out"), "folder for weights")
    save_weight: str = setting("pretrain_vlm", "prefix of the weight files")
    epochs: int = setting(4, "passes over the data")
    batch_size: int = setting(16, "samples of a micro-batch, per process")
    learning_rate: float = setting(4e-4, "peak of the cosine")
    device: str | None = setting(None, "default: cuda:0, mps or cpu, the best there is")
    dtype: str | None = setting(
        None, "default: bfloat16, or float32 where the device multiplies that faster",
        ("bfloat16", "float16", "float32"),
    )  # fmt: skip
    num_workers: int = setting(8, "loader processes, capped to the machine's cores")
    accumulation_steps: int = setting(1, "micro-batches of an update")
    grad_clip: float = setting(1.0, "largest global norm of the gradient")
    log_interval: int = setting(100, "updates between two log lines")
    save_interval: int = setting(100, "updates between two saves")
    hidden_size: int = setting(512, "width of the decoder")
    num_hidden_layers: int = setting(8, "blocks of the decoder")
    max_seq_len: int = setting(640, "longest sample in tokens, picture placeholders included")
    use_moe: int = setting(0, "1: Mixture of Experts", (0, 1))
    data_path: str = setting(str(REPOSITORY / "dataset" / "pretrain_data.jsonl"), "training data: jsonl and parquet files, folders of them, patterns;"
                             " several with commas between, each with a weight if wanted (a.jsonl:0.3)")
    images_path: str = setting(str(REPOSITORY / "dataset" / "pretrain_images"), "folder or .zip of pictures; several with commas between")
    eval_data_path: str | None = setting(None, "validation data: files as for --data_path, or a fraction of the training samples to"
                                         " hold out (0.01); default: no validation")
    eval_images_path: str | None = setting(None, "pictures of the validation files; default: --images_path")
    eval_interval: int = setting(0, "updates between two validations; 0: one after every epoch")
    from_weight: str = setting("llm", "prefix of the weights in save_dir to start from; none: from scratch")
    from_resume: int = setting(0, "1: go on from the last training state", (0, 1))
    freeze_llm: int = setting(1, "0: train all, 1: the projector only, 2: projector and last block", (0, 1, 2))
    use_wandb: bool = setting(False, "track with SwanLab")
    wandb_project: str = setting("MiniMind-V-Pretrain", "project name for SwanLab")
    wandb_run_name: str | None = setting(None, "run name for SwanLab; default: made from the settings")
    vision_model_path: str = setting(
        str(REPOSITORY / "model" / "vision_model" / "clip-vit-base-patch16"), "CLIP folder in transformers format"
    )
    tokenizer_path: str = setting(str(REPOSITORY / "model"), "folder of the tokenizer")
    checkpoint_dir: str = setting(str(REPOSITORY / "checkpoints"), "folder for training states")
    on_bad_sample: str = setting(
        "skip", "skip: log it and go on, up to 10 an epoch or 1%% of what was read; raise: stop at the first", ("skip", "raise")
    )
    cache_features: int = setting(
        0, "1: keep the vision encoder's output of every picture on disk, in --checkpoint_dir", (0, 1)
    )
    use_compile: int = setting(0, "1: compile the decoder's blocks (torch.compile)", (0, 1))
    gradient_checkpointing: int = setting(0, "1: less memory, a third more arithmetic", (0, 1))
    seed: int = setting(42, "of the order of samples and of fresh weights")

    def __post_init__(self):
        for item in dataclasses.fields(self):
            choices, value = item.metadata["choices"], getattr(self, item.name)
            if choices and value is not None and value not in choices:
                raise UsageError(f"--{item.name} {value}: choose from {', '.join(map(str, choices))}")
        for name in ("epochs", "batch_size", "accumulation_steps", "log_interval", "save_interval", "hidden_size",
                     "num_hidden_layers", "max_seq_len", "learning_rate", "grad_clip"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} {getattr(self, name)}: must be greater than 0")
        if math.isinf(self.learning_rate):
            raise UsageError(f"--learning_rate {self.learning_rate}: must be finite")
        for name in ("num_workers", "seed", "eval_interval"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.seed >= 2**63:
            raise UsageError(f"--seed {self.seed}: must be below 2^63")
        if self.batch_size * self.accumulation_steps > 2**31:
            raise UsageError(f"--batch_size {self.batch_size} times --accumulation_steps {self.accumulation_steps}: an update takes"
                             " at most 2^31 samples")  # fmt: skip
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise UsageError(f"--eval_data_path {self.eval_data_path}: a fraction lies between 0 and 1; a file of that name is ./{self.eval_data_path}")
        if self.eval_data_path is None and (self.eval_interval or self.eval_images_path):
            raise UsageError("--eval_interval and --eval_images_path need --eval_data_path, the data to validate on")
        if self.eval_fraction and self.eval_images_path:
            raise UsageError("--eval_images_path goes with files in --eval_data_path; samples held out have their pictures in --images_path")
        for name in ("save_weight", "from_weight"):
            if not getattr(self, name) or os.sep in getattr(self, name):
                raise UsageError(f"--{name} {getattr(self, name)!r}: a name without folders; folders go to --save_dir")

    @property
    def run_name(self) -> str:
        """{weight}_{hidden}{_moe}: the stem of every file of the run."""
        return weight_name(self.save_weight, self.hidden_size, bool(self.use_moe))

    @property
    def weight_file(self) -> Path:
        """Where the weights go."""
        return Path(self.save_dir) / f"{self.run_name}.pth"

    @property
    def best_file(self) -> Path:
        """Where the weights of the lowest validation loss go."""
        return Path(self.save_dir) / f"{weight_name(f'{self.save_weight}_best', self.hidden_size, bool(self.use_moe))}.pth"

    @property
    def eval_fraction(self) -> float | None:
        """The fraction of the training samples to hold out; None where --eval_data_path names files or nothing."""
        return fraction_of(self.eval_data_path)

    @property
    def metrics_file(self) -> Path:
        """One json line a log interval, and one a validation."""
        return Path(self.save_dir) / f"{self.run_name}.metrics.jsonl"

    @property
    def resume_file(self) -> Path:
        """Where the training state goes."""
        return Path(self.checkpoint_dir) / f"{self.run_name}_resume.pth"

    @property
    def features_folder(self) -> Path:
        """Where the feature cache of the data goes: one for each data file and folder of pictures."""
        data = [path for path, _ in split_entries(self.data_path)]  # weights change nothing
        paths = [[str(Path(path.strip()).resolve()) for path in flag] for flag in (data, self.images_path.split(","))]
        digest = hashlib.blake2b(json.dumps(paths).encode(), digest_size=4).hexdigest()
        stem = re.sub(r"\W+", "_", Path(paths[0][0]).stem)
        return Path(self.checkpoint_dir) / "features" / f"{stem}_{digest}"

    @property
    def start_file(self) -> Path | None:
        """The weights to start from; None for a start from scratch."""
        if self.from_weight == "none":
            return None
        return Path(self.save_dir) / f"{weight_name(self.from_weight, self.hidden_size, bool(self.use_moe))}.pth"

    def next_command(self, weight: str) -> str:
        """What a user does with the finished weights of that name: fine-tuning where the projector alone has learned, else
        asking."""
        script, *words = ("train_sft_vlm.py", "--from_weight") if self.freeze_llm == 1 else ("eval_vlm.py", "--weight")
        words = ["python", script if Path.cwd() == REPOSITORY else str(REPOSITORY / script), *words, weight]
        for item in dataclasses.fields(self):
            shared = item.name in ("save_dir", "hidden_size", "num_hidden_layers", "use_moe", "vision_model_path", "tokenizer_path")
            if shared and (value := getattr(self, item.name)) != item.default:
                words += [f"--{item.name}", str(value)]
        return shlex.join(words)


def fraction_of(eval_data_path: str | None) -> float | None:
    """The number that --eval_data_path is, if it is one."""
    try:
        return float(eval_data_path or "")
    except ValueError:
        return None


def parse_config(description: str, defaults: dict, argv: list[str] | None = None) -> TrainConfig:
    """Command-line flags over `defaults` over the dataclass's own. Ends the process with code 2 for bad flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in dataclasses.fields(TrainConfig):
        default = defaults.get(item.name, item.default)
        shown = "" if default is None else f" (default: {default})"
        options = {"default": default, "help": item.metadata["help"] + shown}
        if item.type is bool:
            options["action"] = "store_true"
        else:
            kinds = {int: int, float: float}
            options |= {"type": kinds.get(item.type, str), "choices": item.metadata["choices"]}
        parser.add_argument(f"--{item.name}", **options)
    try:
        return TrainConfig(**vars(parser.parse_args(home_for_tilde(argv))))
    except UsageError as error:
        parser.error(str(error))
