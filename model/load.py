"""A whole model from its files, ready to use: native weights with their sidecar, or a folder in transformers format."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversation import image_token_of
from .errors import UsageError, check_fetched, first_line
from .hub_names import folder_of
from .minimind3 import settings_for
from .model_vlm import MiniMindVLM, VLMConfig
from .vision import patches_per_image
from .weights import (
    VISION_FOLDER,
    check_fingerprints,
    find_vision_encoder,
    fingerprints,
    load_state,
    load_tokenizer,
    load_weights,
    read_sidecar,
    read_state,
    tokenizer_folder,
    weight_files,
    weight_name,
)

SIDECAR = "sidecar.json"  # of a folder: the sidecar of native weights without the configuration


@dataclass
class Loaded:
    """A model in fp32 with its vision encoder, its tokenizer, and its sidecar without the configuration."""

    model: MiniMindVLM
    tokenizer: PreTrainedTokenizerBase
    record: dict


def find_weights(folder: Path, weight: str, hidden_size: int | None, use_moe: int | None) -> Path:
    """The weight file of that name and, where they are given, size and kind. Among several the published size, 512, dense,
    is meant; raises UsageError when it is none of them. Whether the file returned exists is for its reader to say."""
    size, kind = hidden_size or r"\d+", {None: "(_moe)?", 0: "", 1: "_moe"}[use_moe]
    fitting = [path for path in weight_files(folder) if re.fullmatch(f"{re.escape(weight)}_{size}{kind}", path.stem)]
    published = folder / f"{weight_name(weight, hidden_size or 512, bool(use_moe))}.pth"
    if len(fitting) > 1 and published not in fitting:
        raise UsageError(f"--weight {weight}: there are several in {folder}: {', '.join(path.name for path in fitting)};"
                         " choose one by --hidden_size and --use_moe")  # fmt: skip
    return fitting[0] if len(fitting) == 1 else published


def build_model(source: Path, settings: Any) -> MiniMindVLM:
    """A randomly initialized model of the configuration that was read from `source`; raises UsageError when it is none."""
    try:
        return MiniMindVLM(VLMConfig.from_dict(settings))
    except Exception as error:  # a damaged configuration raises errors of all kinds
        raise UsageError(f"{source} is no configuration of this model: {type(error).__name__}: {first_line(error)}") from error


def settings_of(state: dict[str, torch.Tensor]) -> dict:
    """The configuration that names and shapes of published weights tell; the numbers of heads are the published ones."""
    settings = {}
    if (head_norm := state.get("model.layers.0.self_attn.q_norm.weight")) is not None:
        D = state["model.norm.weight"].numel()
        settings |= {**settings_for(D), "num_attention_heads": D // head_norm.numel(), "image_token_id": 12}
    if (embedding := state.get("model.embed_tokens.weight")) is not None and embedding.dim() == 2:
        settings |= {"vocab_size": embedding.shape[0], "hidden_size": embedding.shape[1]}
    if (projector := state.get("vision_proj.vision_proj.0.weight")) is not None and projector.dim() == 2:
        settings["vision_hidden_size"] = projector.shape[1]
    if (projector := state.get("vision_proj.mlp.1.weight")) is not None and projector.dim() == 2:
        settings |= {"projector": "mlp", "vision_hidden_size": projector.shape[1], "image_tokens": 64 if head_norm is not None else 196}
    if layers := {name.split(".")[2] for name in state if name.startswith("model.layers.")}:
        settings["num_hidden_layers"] = len(layers)
    if experts := {match[1] for name in state if (match := re.search(r"\.mlp\.experts\.(\d+)\.", name))}:
        settings |= {"use_moe": True, "n_routed_experts": len(experts)}
    return settings


def assemble(
    path: Path, model: MiniMindVLM, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel | None, record: dict
) -> Loaded:
    """The model with its parts; raises UsageError when one of them is not what the weights at `path` were made with."""
    try:
        model.attach_vision_encoder(encoder)
    except ValueError as error:
        raise UsageError(f"{path}: {error}. Give the right one by --vision_model_path.") from error
    check_fingerprints(path, fingerprints(model, tokenizer), record.get("fingerprints", {}))
    ours = (model.config.vocab_size, model.config.image_token_id)
    token = image_token_of(tokenizer)
    theirs = (len(tokenizer), tokenizer.convert_tokens_to_ids(token))
    if ours != theirs:
        raise UsageError(
            f"{path} was trained with another tokenizer, one with {ours[0]} tokens and number {ours[1]} for images; this one has"
            f" {theirs[0]} and {token!r} as number {theirs[1]}. Give the one it was trained with by --tokenizer_path."
        )
    return Loaded(model, tokenizer, record)


def read_native(path: Path, tokenizer_path: str | Path | None = None, vision_model_path: str | Path | None = None) -> Loaded:
    """Native weights at `path`, with the tokenizer and vision encoder of the training, as the sidecar tells, where none are
    given. Raises UsageError for anything missing or not fitting."""
    sidecar, encoder = read_sidecar(path), None
    if "config" in sidecar:
        model = build_model(path.with_suffix(".json"), sidecar["config"])
    else:
        settings = settings_of(read_state(path)) if path.is_file() else {}  # load_weights says it is missing
        if "vision_hidden_size" in settings and (encoder := find_vision_encoder(vision_model_path, sidecar)):
            settings["image_tokens"] = patches_per_image(encoder) * encoder.config.hidden_size // settings["vision_hidden_size"]
        model = build_model(path, settings)
    if missing := load_weights(path, model):
        raise UsageError(f"{path} holds a language model without projector ({', '.join(missing)} missing)")
    record = {key: value for key, value in sidecar.items() if key not in ("config", "weights")}
    folder = tokenizer_folder(path, sidecar, tokenizer_path)
    if not sidecar:
        print(f"{path} has no sidecar; its tokenizer: {folder}", file=sys.stderr)
    return assemble(path, model, load_tokenizer(folder), encoder or find_vision_encoder(vision_model_path, record), record)


def read_folder(source: str | Path, tokenizer_path: str | Path | None = None, vision_model_path: str | Path | None = None) -> Loaded:
    """A folder in transformers format, also a published one or a LLaVA of ours: code in it is not executed.

    The paths serve for what the folder does not bring along. Raises UsageError for anything missing or not fitting.
    """
    folder = folder_of(source)
    settings, record = read_config(folder), read_sidecar(folder / SIDECAR)
    if settings["model_type"] == "llava":
        from .hub.llava import read_llava

        return read_llava(folder, settings, record)
    model = build_model(folder / "config.json", settings)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UsageError(f"{folder}: no model.safetensors and no pytorch_model.bin there; fetch the folder again")
    state = {name: tensor for file in files for name, tensor in read_state(file).items()}
    if missing := load_state(folder, model, state):
        raise UsageError(f"{folder} holds a language model without projector ({', '.join(missing)} missing)")
    brings = {"tokenizer": (folder / "tokenizer.json").is_file(),
              "vision_encoder": (folder / VISION_FOLDER / "model.safetensors").is_file()}  # fmt: skip
    tokenizer = load_tokenizer(folder if brings["tokenizer"] else tokenizer_folder(folder, record, tokenizer_path))
    encoder = find_vision_encoder(folder / VISION_FOLDER if brings["vision_encoder"] else vision_model_path, record)
    loaded = assemble(folder, model, tokenizer, encoder, record)
    if "fingerprints" not in record:  # published: what it is read with now is what it was made with
        record |= {"fingerprints": fingerprints(model, tokenizer), "training": {"tokenizer_path": tokenizer.name_or_path}}
        if vision_model_path and not brings["vision_encoder"]:
            record["training"]["vision_model_path"] = str(vision_model_path)
        if not brings["tokenizer"]:
            print(f"{folder} brings no tokenizer; its tokenizer: {tokenizer.name_or_path}", file=sys.stderr)
    return loaded


def read_config(folder: Path) -> dict:
    """The settings in a folder's config.json; raises UsageError."""
    file = folder / "config.json"
    if not file.is_file():
        kind = "is a file, and a folder in transformers format is wanted" if folder.is_file() else "has no config.json"
        there = ", ".join(path.name for path in weight_files(folder)[:12])
        raise UsageError(f"{folder} {kind}; native weights ({there or 'NAME_512.pth'}) are taken by --save_dir FOLDER"
                         " --weight NAME")  # fmt: skip
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = settings["model_type"]
    except (ValueError, TypeError, KeyError) as error:
        check_fetched(file)
        raise UsageError(f"{file} is no configuration of this model: {type(error).__name__}: {first_line(error)}") from error
    if kind not in (VLMConfig.model_type, "llava"):
        raise UsageError(f"{folder} holds a model of type {kind!r}, not {VLMConfig.model_type!r}")
    return settings
