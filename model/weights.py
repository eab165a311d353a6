"""What a model is made of, on disk: weights in fp16 with their sidecar, vision encoder, tokenizer.

All of it is read strictly, and nothing that a file holds is executed.
"""

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import UsageError, check_fetched, first_line
from .pixels import PixelSettings
from .storage import REPOSITORY, write_atomically
from .vision import pixel_settings_of

CLIP_FOLDER = REPOSITORY / "model" / "vision_model" / "clip-vit-base-patch16"  # the default encoder's place
OWN_TOKENIZER = REPOSITORY / "model"
PUBLISHED_TOKENIZER = REPOSITORY / "model" / "published_tokenizer"
VISION_FOLDER = "vision_model"  # holds the vision encoder, inside a folder in transformers format
# transformers 4 wrote the encoder's weights under this prefix and finds no others; version 5 reads both.
CLASSIC_PREFIX = "vision_model."
# Classes of vision encoders by the model_type of their configuration; CLIP and SigLIP also come as halves of pairs.
ENCODERS = {"clip": "CLIPVisionModel", "clip_vision_model": "CLIPVisionModel", "siglip": "SiglipVisionModel",
            "siglip_vision_model": "SiglipVisionModel", "dinov2": "Dinov2Model",
            "dinov2_with_registers": "Dinov2WithRegistersModel"}  # fmt: skip


def read_tensors(path: Path, what: str) -> Any:
    """What torch.save or safetensors wrote, whatever the file is called: tensors and plain values only, every checksum
    compared. Raises UsageError for anything else."""
    check_fetched(path)
    try:
        with open(path, "rb") as file:
            if file.read(9)[8:] == b"{":  # after eight bytes of its length, the json header of safetensors
                return load_file(path)
        if zipfile.is_zipfile(path):  # not so in torch's format before 1.6
            with zipfile.ZipFile(path) as file:
                if broken := file.testzip():
                    raise ValueError(f"it is corrupt: the checksum of {broken} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and unpickling errors share no base class
        raise UsageError(f"{path} is no readable {what}: {type(error).__name__}: {first_line(error)}. It is corrupt, of"
                         " another kind, or holds more than tensors and plain values, of which nothing was run; fetch or"
                         " make it again") from error  # fmt: skip


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of everything that decides how text becomes ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def fingerprints(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What weights depend on without containing it; no vision encoder where the model has none."""
    prints = {"tokenizer": tokenizer_fingerprint(tokenizer)}
    if model.vision_encoder is not None:
        prints["vision_encoder"] = vision_encoder_fingerprint(model.vision_encoder)
    return prints


def half_weights(model: PreTrainedModel, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A copy of the state dict on the CPU, in fp16 unless told otherwise.

    Raises FloatingPointError when a weight does not fit into it, rather than giving infinity.
    """
    state = {name: tensor.detach().to("cpu", dtype, copy=True) for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise FloatingPointError(f"weights beyond fp16's range or not finite: {', '.join(broken[:3])}; not saved")
    return state


def weight_name(weight: str, hidden_size: int, use_moe: bool) -> str:
    """{weight}_{hidden}{_moe}, the published naming of weight files."""
    return f"{weight}_{hidden_size}{'_moe' if use_moe else ''}"


def tensors_fingerprint(state: dict[str, torch.Tensor]) -> str:
    """A short hash of names and fp16 values: the same weights give the same, however they were written."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def vision_encoder_fingerprint(encoder: PreTrainedModel) -> str:
    """The fingerprint of a vision encoder, whatever release of transformers loaded it, and of how it wants its images, if
    that is not as CLIP does."""
    weights = tensors_fingerprint({name.removeprefix(CLASSIC_PREFIX): tensor for name, tensor in encoder.state_dict().items()})
    settings = pixel_settings_of(encoder)
    if settings == PixelSettings(settings.size, settings.size):
        return weights
    return f"{weights}-{hashlib.sha256(json.dumps(settings.to_dict(), sort_keys=True).encode()).hexdigest()[:8]}"


def write_weights(path: Path, weights: dict[str, torch.Tensor], config: dict, sidecar: dict, before: str | None = None) -> str:
    """Writes the sidecar, which holds what a reader needs to rebuild the model, and then the weights; returns their
    fingerprint. `before` is that of the weights there until now, if the sidecar fits them as well: so the two files
    belong together at every instant. Raises StorageError."""
    # These two keys belong to transformers' folders alone.
    config = {key: value for key, value in config.items() if key not in ("architectures", "dtype")}
    fingerprint = tensors_fingerprint(weights)
    content = {"config": config, **sidecar, "weights": [fingerprint, *([before] if before else [])]}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Names of files may hold bytes that are no UTF-8; json's own escape keeps them.
    write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode(errors="backslashreplace")))
    write_atomically(path, lambda file: torch.save(weights, file))
    return fingerprint


def save_weights(path: Path, model: PreTrainedModel, sidecar: dict) -> None:
    """Writes weights and sidecar. Raises FloatingPointError (see `half_weights`) and StorageError."""
    write_weights(path, half_weights(model), model.config.to_diff_dict(), sidecar)


def lock_of(file: Path) -> Path:
    """The lock of the run that writes `file`."""
    return file.with_name(f".{file.stem}.lock")


def read_sidecar(path: Path) -> dict:
    """The json file stored next to the weights at `path`; empty when there is none, as with published weights."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return {}
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a json object is expected, not {type(content).__name__}")
        if not isinstance(content.get("weights", []), list):
            raise ValueError(f"'weights' should hold a list of fingerprints, not {content['weights']!r}")
        prints = content.get("fingerprints", {})
        if not isinstance(prints, dict) or not all(isinstance(value, str) for value in prints.values()):
            raise ValueError(f"'fingerprints' should hold texts by name, not {prints!r}")
    except ValueError as error:
        check_fetched(sidecar)
        raise UsageError(f"{sidecar} is broken ({error}). Fetch it with its weights again, or write both again: training by"
                         " --from_resume 1, a folder by python -m model.convert. Without it the weights load if"
                         " --tokenizer_path and --vision_model_path name what they were trained with") from error  # fmt: skip
    return content


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TIED = ("model.embed_tokens.weight", "lm_head.weight")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # keys of the weights in training states
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")  # of DistributedDataParallel and torch.compile


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a weight file or a training state, without the vision encoder, which has a folder of its own.

    Raises UsageError for a file without one, and for tensors whose numbers alone are not the weights (quantized, sparse).
    """
    state = read_tensors(path, "weight file")
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    entries = state.items() if isinstance(state, dict) else [(type(state).__name__, state)]
    if odd := [name for name, value in entries if not (isinstance(name, str) and isinstance(value, torch.Tensor))]:
        raise UsageError(f"{path} is no state dict: it should hold names and tensors, and holds {odd[0]}")
    state = {PREFIXES.sub("", name): tensor for name, tensor in entries}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("vision_encoder.")}
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            raise UsageError(f"{path}: the tensor {name} is of {tensor.dtype} ({tensor.layout} on {tensor.device}). Weights are"
                             " read as dense float16, bfloat16, float32 or float64: take those from before the"
                             " quantization")  # fmt: skip
    for name, twin in (TIED, TIED[::-1]):  # one tensor, which some programs write once
        if name not in state and twin in state:
            state[name] = state[twin]
    return state


def load_state(path: Path, model: PreTrainedModel, state: dict[str, torch.Tensor]) -> list[str]:
    """Loads the state dict that was read from `path` into `model`, strictly. Returns the names that stay randomly
    initialized: the projector's, when the weights are a plain language model's.

    Raises UsageError for other names or shapes, and for weights that are not finite.
    """
    own = model.state_dict()
    projector = [name for name in own if name not in state and name.startswith("vision_proj.")]
    kinds = {
        "missing": [name for name in own if name not in state and name not in projector],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [f"{name} {tuple(tensor.shape)}, the model has {tuple(own[name].shape)}"
                             for name, tensor in state.items() if name in own and tensor.shape != own[name].shape],
    }  # fmt: skip
    if problems := [f"{len(names)} {kind} (first: {names[0]})" for kind, names in kinds.items() if names]:
        raise UsageError(
            f"{path} does not fit the model: weights {', '.join(problems)}. Give what it was trained with: --family,"
            " --hidden_size, --num_hidden_layers, --use_moe, --projector, --image_tokens, --tokenizer_path, --vision_model_path. If so,"
            " fetch or make it again"
        )
    if model.config.tie_word_embeddings and not torch.equal(*(state[name] for name in TIED)):
        raise UsageError(f"{path}: {' and '.join(TIED)} differ, and this model has one tensor for both")
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor.float()).all()]:
        raise UsageError(f"{path} holds weights that are not finite ({len(broken)} of {len(state)} tensors, first {broken[0]}): the"
                         " training that made it went wrong. Take weights from before that")  # fmt: skip
    model.load_state_dict(state, strict=False)  # the differences are known by now
    return projector


def load_weights(path: Path, model: PreTrainedModel, expected: dict[str, str] | None = None) -> list[str]:
    """Loads the weights at `path` into `model`, as `load_state` does.

    Raises UsageError for a missing or corrupt file, for weights that `load_state` refuses or that are not those of the
    sidecar, and for a tokenizer or encoder other than those trained with (`expected`: those in use, see `fingerprints`).
    """
    if not path.is_file():
        there = ", ".join(file.name for file in weight_files(path.parent)[:12])
        raise UsageError(
            f"no weights at {path}." + (f" In that folder are {there}." if there else "") + " Published ones:\n"
            f"    hf download jingyaogong/MiniMind2-V-PyTorch --local-dir {path.parent}\n"
            f"or   modelscope download --model gongjy/MiniMind2-V-PyTorch --local_dir {path.parent}\n"
            f"or train them (make demo does, of width 256), or name others by --weight (of training: --from_weight; none starts from scratch)."
        )
    sidecar = read_sidecar(path)
    check_fingerprints(path, expected or {}, sidecar.get("fingerprints", {}))
    state = read_state(path)
    projector = load_state(path, model, state)
    if "weights" in sidecar and tensors_fingerprint(state) not in sidecar["weights"]:
        raise UsageError(
            f"{path.with_suffix('.json')} belongs to other weights than those in {path.name}: one of the two was exchanged,"
            " or a save was cut short. Put those together that belong together; training with --from_resume 1 writes both"
        )
    return projector


def weight_files(folder: Path) -> list[Path]:
    """The weight files in a folder, by name."""
    return [path for path in sorted(folder.glob("*.pth")) if path.is_file() and not path.name.startswith(".")]


def check_fingerprints(path: Path, used: dict[str, str], recorded: dict[str, str]) -> None:
    """Raises UsageError when a tokenizer or encoder in use differs from the one that the files were made with."""
    flags = {"tokenizer": "--tokenizer_path", "vision_encoder": "--vision_model_path"}
    for kind, value in used.items():
        if recorded.get(kind, value) != value:
            raise UsageError(
                f"{path} was trained with another {kind.replace('_', ' ')} (fingerprint {recorded[kind]}, in use:"
                f" {value}). Give the one it was trained with by {flags[kind]}."
            )


def load_vision_encoder(folder: str | Path) -> PreTrainedModel:
    """The frozen vision encoder in a folder in transformers format, in eval mode and fp32, of the CLIP, SigLIP or DINOv2
    kind, with its `pixel_settings`.

    Of a folder of a whole CLIP or SigLIP pair the text half is never read into memory.
    Raises UsageError when the folder is missing, holds another kind of model, or lacks some of what it should hold.
    """
    from .hub_names import folder_of  # with huggingface_hub

    name, folder = str(folder), folder_of(folder)
    if not os.path.isfile(folder / "config.json"):  # False, not an error, for the odd paths a sidecar may name
        raise UsageError(
            f"no vision encoder at {folder} (config.json not found there). Fetch CLIP ViT-B/16 (of minimind3:"
            " jingyaogong/siglip2-base-p32-256-ve) with\n"
            f"    hf download openai/clip-vit-base-patch16 --local-dir {folder}\n"
            f"or   modelscope download --model openai-mirror/clip-vit-base-patch16 --local_dir {folder}\n"
            f"or name another encoder's folder with --vision_model_path; the demo's own is {CLIP_FOLDER.parent / 'tiny-clip'}."
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind not in ENCODERS:
            raise ValueError(f"it holds a model of type {kind!r}; vision encoders are of type {', '.join(ENCODERS)}")
        options = {"vision_use_head": False} if "siglip" in kind else {}  # whose answer nobody asks for
        encoder, info = getattr(transformers, ENCODERS[kind]).from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32, **options)  # fmt: skip
        if info["missing_keys"]:
            raise ValueError(f"{len(info['missing_keys'])} weights missing (first: {min(info['missing_keys'])})")
        if not all(torch.isfinite(weight).all() for weight in encoder.parameters()):
            raise ValueError("weights that are not finite")
        encoder.pixel_settings = read_pixel_settings(folder, encoder)
    except Exception as error:  # damaged files raise errors of all kinds
        check_fetched(folder)
        raise UsageError(f"the vision encoder in {folder} cannot be used: {type(error).__name__}: {first_line(error)}. Fetch the"
                         " folder again, or name another with --vision_model_path") from error  # fmt: skip
    encoder.name_or_path = name  # by which it is recorded
    return encoder.eval().requires_grad_(False)


def read_pixel_settings(folder: Path, encoder: PreTrainedModel) -> PixelSettings:
    """How the encoder wants its images, by its folder's preprocessor_config.json. Raises ValueError where that is missing,
    asks for what cannot be done, or for images that the encoder cannot take."""
    file, clip, size = folder / "preprocessor_config.json", encoder.config.model_type[:4] == "clip", encoder.config.image_size
    if not file.is_file() and not clip:  # every CLIP was trained alike
        raise ValueError(f"{file.name} is missing, which says how it wants its images")
    settings = PixelSettings.from_dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else pixel_settings_of(encoder)
    if settings.size != size and "dinov2" not in encoder.config.model_type:  # which takes any size
        raise ValueError(f"{file.name} asks for images of {settings.size} pixels, config.json for {size}")
    patch = encoder.config.patch_size
    # SigLIP so400m leaves 6 of 384 pixels out; more is a mistake.
    if settings.size % patch >= patch / 2:
        raise ValueError(f"patches of {patch} pixels do not divide images of {settings.size}: {settings.size % patch} are left over")
    return settings


def find_vision_encoder(path: str | Path | None, record: dict) -> PreTrainedModel | None:
    """The vision encoder in the folder at `path`; None: the one that the weights were trained with; "none": none. Raises
    UsageError."""
    folder = path or recorded(record, "vision_model_path", "config.json", CLIP_FOLDER)
    return None if str(folder) == "none" else load_vision_encoder(folder)


def recorded(record: dict, name: str, file: str, default: Path) -> str | Path:
    """The folder that the weights were trained with, by the setting `name` in their record; it holds `file`. Where another
    machine's folder is recorded, the same one of this repository; a name on a hub as it is; `default` where none is."""
    training = record.get("training")
    path = training.get(name) if isinstance(training, dict) else None
    if not path or not isinstance(path, str):
        return default
    from .hub_names import HUB_NAME  # with huggingface_hub

    parts = Path(path.replace("\\", "/")).parts  # also of Windows
    places = [path, *(REPOSITORY.joinpath(*parts[start:]) for start in range(len(parts))), path if HUB_NAME.fullmatch(path) else default]
    return next((place for place in places if os.path.isfile(os.path.join(place, file))), path)


def tokenizer_folder(weights: Path, sidecar: dict, given: str | Path | None = None) -> str | Path:
    """The folder of the tokenizer that weights (a file or a folder) were trained with: the one `given`, or that of their
    sidecar. Weights without one were made elsewhere: a tokenizer.json next to them, or the published one, is theirs.

    Raises UsageError where none is known. Any of 6,400 tokens would load without a word, and give gibberish.
    """
    if given or sidecar:
        return given or recorded(sidecar, "tokenizer_path", "tokenizer.json", OWN_TOKENIZER)
    places = (weights if weights.is_dir() else weights.parent, PUBLISHED_TOKENIZER)
    if found := next((folder for folder in places if (folder / "tokenizer.json").is_file()), None):
        return found
    raise UsageError(
        f"{weights} has no sidecar that names its tokenizer, and with another than that of its training it gives gibberish."
        " For published weights fetch theirs (of 2026: that of minimind-3v, next to them):\n"
        f"    hf download jingyaogong/MiniMind2-V tokenizer.json tokenizer_config.json --local-dir {PUBLISHED_TOKENIZER}\n"
        f"or   modelscope download --model gongjy/MiniMind2-V tokenizer.json tokenizer_config.json --local_dir {PUBLISHED_TOKENIZER}\n"
        f"For weights trained here that lost their sidecar: --tokenizer_path {OWN_TOKENIZER}"
    )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder of that name; raises UsageError when there is none that can be read."""
    from .hub_names import folder_of  # with huggingface_hub

    folder = folder_of(name, weights=False)
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"no tokenizer.json in {name}; the project's own lies in model/ (--tokenizer_path)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of damaged files, all kinds
        check_fetched(folder)
        raise UsageError(f"cannot load the tokenizer in {folder}: {type(error).__name__}: {first_line(error)}. Fetch its files"
                         " again; the project's own lies in model/ (--tokenizer_path)") from error  # fmt: skip
    tokenizer.name_or_path = str(name)  # by which it is recorded: another machine's cache lies elsewhere
    return tokenizer
