"""A whole model from its files, ready to use: native weights with their sidecar, or a folder in transformers format."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, CLIPVisionModel, PreTrainedTokenizerBase

import model.hub  # noqa: F401 - AutoConfig then knows the family

from .conversation import load_tokenizer
from .errors import UsageError, check_fetched, first_line
from .model_vlm import MiniMindVLM, VLMConfig
from .vision import CLIP_FOLDER, load_vision_encoder
from .weights import (
    check_fingerprints,
    fingerprints,
    listed,
    load_weights,
    parse_sidecar,
    read_sidecar,
    read_state,
    refuse_non_finite,
    refuse_untied,
    sizes_of,
)

MODEL_FOLDER = Path(__file__).resolve().parent
SIDECAR = "sidecar.json"  # of a folder: what stands in the sidecar beside native weights, but for the configuration


@dataclass
class Loaded:
    """A model in fp32 around its tower, its tokenizer, and the sidecar but for the configuration."""

    model: MiniMindVLM
    tokenizer: PreTrainedTokenizerBase
    record: dict


def find_vision_encoder(path: str | Path | None, record: dict) -> CLIPVisionModel | None:
    """The vision encoder in the folder at `path`; None: the one that the weights were trained with; "none": none. Raises
    UsageError."""
    folder = path or recorded(record, "vision_model_path", "config.json", CLIP_FOLDER)
    return None if str(folder) == "none" else load_vision_encoder(folder)


def recorded(record: dict, name: str, file: str, default: Path) -> Path:
    """The folder that the weights were trained with, by the setting `name` in their record; it holds `file`. Where another
    machine's folder is recorded, the same one of this repository; `default` where none is."""
    training = record.get("training")
    path = training.get(name) if isinstance(training, dict) else None
    if not path or not isinstance(path, str):
        return default
    parts = Path(path.replace("\\", "/")).parts  # also of Windows
    places = [Path(path), *(MODEL_FOLDER.parent.joinpath(*parts[start:]) for start in range(len(parts))), default]
    return next((place for place in places if os.path.isfile(place / file)), Path(path))


def find_tokenizer(path: str | Path | None, record: dict) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder at `path`; None: the one that the weights were trained with. Raises UsageError."""
    return load_tokenizer(path or recorded(record, "tokenizer_path", "tokenizer.json", MODEL_FOLDER))


def check_made_for(path: Path, model: MiniMindVLM, tokenizer: PreTrainedTokenizerBase, record: dict) -> dict[str, str]:
    """The fingerprints of `tokenizer` and the model's tower; raises UsageError when one of them is not that which the
    weights at `path` were made with."""
    used = fingerprints(model, tokenizer)
    check_fingerprints(path, used, record.get("fingerprints", {}))
    ours, theirs = ((model.config.vocab_size, model.config.image_token_id),
                    (len(tokenizer), tokenizer.convert_tokens_to_ids("@")))  # fmt: skip
    if ours != theirs:
        raise UsageError(
            f"{path} was trained with another tokenizer, one with {ours[0]} tokens and '@' as number {ours[1]}; this one has"
            f" {theirs[0]} and '@' as number {theirs[1]}. Give the one it was trained with by --tokenizer_path."
        )
    return used


def attach(path: Path, model: MiniMindVLM, tower: CLIPVisionModel | None) -> None:
    """Gives the model its tower; raises UsageError when it does not fit the model of `path`."""
    try:
        model.attach_vision_encoder(tower)
    except ValueError as error:
        raise UsageError(f"{path}: {error}. Give the right one by --vision_model_path.") from error


def native_model(path: Path, sidecar: dict) -> MiniMindVLM:
    """A fresh model of the configuration in the sidecar, or of what the names and shapes of published weights tell."""
    if "config" in sidecar:
        source, settings = path.with_suffix(".json"), sidecar["config"]
    else:
        state = read_state(path)[0] if path.is_file() else {}  # load_weights says that it is missing
        source, sizes = path, sizes_of(state)
        names = {"vocabulary": "vocab_size", "--hidden_size": "hidden_size", "encoder width": "vision_hidden_size",
                 "--num_hidden_layers": "num_hidden_layers"}  # fmt: skip
        settings = {names[size]: value for size, value in sizes.items() if size in names}
        if sizes.get("--use_moe"):
            experts = {match[1] for name in state if (match := re.match(r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.", name))}
            settings |= {"use_moe": True, "n_routed_experts": len(experts)}
    try:
        return MiniMindVLM(VLMConfig(**settings))
    except Exception as error:  # a damaged configuration fails anywhere, in all kinds of ways
        raise UsageError(f"{source} is no configuration of a model: {type(error).__name__}: {first_line(error)}") from error


def read_native(path: Path, tokenizer_path: str | Path | None = None, vision_model_path: str | Path | None = None) -> Loaded:
    """Native weights at `path`; with no sidecar beside them, the published number of heads is taken for granted. Where no
    tokenizer or vision encoder is given, it is that of the training, as the sidecar tells.

    Raises UsageError for anything missing or not fitting.
    """
    sidecar = read_sidecar(path) or {}
    model = native_model(path, sidecar)
    if fresh := load_weights(path, model):
        raise UsageError(f"{path} holds a language model without projector ({', '.join(fresh)} missing)")
    tokenizer = find_tokenizer(tokenizer_path, sidecar)
    attach(path, model, find_vision_encoder(vision_model_path, sidecar))
    record = {key: value for key, value in sidecar.items() if key not in ("config", "weights")}
    check_made_for(path, model, tokenizer, record)
    return Loaded(model, tokenizer, record)


def read_folder(folder: Path, tokenizer_path: str | Path | None = None, vision_model_path: str | Path | None = None) -> Loaded:
    """A folder in transformers format, also one that the original project published: code in it is not executed.

    The paths serve for what the folder does not bring along. Raises UsageError for anything missing or not fitting.
    """
    config = read_config(folder)
    record, brings = read_record(folder / SIDECAR), {"tokenizer": (folder / "tokenizer.json").is_file()}
    tokenizer = load_tokenizer(folder) if brings["tokenizer"] else find_tokenizer(tokenizer_path, record)
    check_weight_files(folder)
    try:
        model = MiniMindVLM.from_pretrained(folder, config=config, dtype=torch.float32)
    except UsageError:
        raise
    except Exception as error:  # what is damaged fails anywhere, in all kinds of ways
        check_fetched(folder)
        raise UsageError(f"cannot load {folder}: {type(error).__name__}: {first_line(error)}") from error
    refuse_untied(folder, model, model.state_dict())
    refuse_non_finite(folder, model.state_dict())
    brings["vision_encoder"] = model.vision_encoder is not None
    if not brings["vision_encoder"]:
        attach(folder, model, find_vision_encoder(vision_model_path, record))
    used = check_made_for(folder, model, tokenizer, record)
    return Loaded(model, tokenizer, {"fingerprints": {kind: value for kind, value in used.items() if brings[kind]}, **record})


def read_config(folder: Path) -> VLMConfig:
    """The configuration in a folder; raises UsageError."""
    if folder.is_file():
        raise UsageError(f"{folder} is a file, and a folder in transformers format is wanted; native weights (NAME_512.pth) are"
                         f" taken by --save_dir {folder.parent} --weight NAME")  # fmt: skip
    if not (folder / "config.json").is_file():
        there = listed(folder)
        raise UsageError(f"{folder}: no config.json there; give a folder in transformers format"
                         + (f". Native weights there are taken by --save_dir {folder} and, as --weight:{there}" if there else ""))  # fmt: skip
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as above
        check_fetched(folder)
        raise UsageError(f"{folder / 'config.json'} is no configuration of this model: {type(error).__name__}:"
                         f" {first_line(error)}") from error  # fmt: skip
    if config.model_type != VLMConfig.model_type:
        raise UsageError(f"{folder} holds a model of type {config.model_type!r}, not {VLMConfig.model_type!r}")
    return config


def check_weight_files(folder: Path) -> None:
    """Raises UsageError for a pickle that wants to do more than hold tensors, and for quantized weights, of which
    transformers would make numbers without a word."""
    for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        read_state(file)


def read_record(path: Path) -> dict:
    """A folder's sidecar.json; nothing when there is none."""
    try:
        return parse_sidecar(path) if path.is_file() else {}
    except ValueError as error:
        check_fetched(path)
        raise UsageError(f"{path} is broken ({error}). Fetch the folder again, or make it again by python -m model.convert") from error
