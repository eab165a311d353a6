"""Files of weights: the state dict in fp16 and its sidecar, read strictly, and never by executing what they hold.
"""

import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CLIPVisionModel, PreTrainedTokenizerBase

from .errors import UsageError, check_fetched, first_line
from .model_vlm import MiniMindVLM
from .storage import write_atomically
from .vision import CLASSIC_PREFIX


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
        if (wanted := foreign_globals(path)):
            raise UsageError(
                f"{path} is refused: a {what} holds tensors and plain values, this file wants to call"
                f" {', '.join(wanted[:5])}. Nothing of it was run. Take the file from its maker again, or do without it."
            ) from error
        raise UsageError(
            f"{path} is no readable {what}: {type(error).__name__}: {first_line(error)}. It is torn, of"
            f" another kind, or holds more than tensors; fetch or make it again."
        ) from error


def foreign_globals(path: Path) -> list[str]:
    """Names of what a pickle would call or build beyond tensors and plain values; it is read, not run."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torn, or no file of torch.save at all: the caller says so
        return []


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of everything that decides how text becomes ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def fingerprints(model: MiniMindVLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What weights depend on without containing it; no vision encoder where the model has none."""
    tower = model.vision_encoder
    return {"tokenizer": tokenizer_fingerprint(tokenizer)} | ({} if tower is None else {"vision_encoder": vision_encoder_fingerprint(tower)})


def half_weights(model: MiniMindVLM) -> dict[str, torch.Tensor]:
    """A copy of the state dict on the CPU, in fp16.

    Raises FloatingPointError when a weight does not fit into fp16, rather than giving infinity.
    """
    state = {name: tensor.detach().to("cpu", torch.float16, copy=True) for name, tensor in model.state_dict().items()}
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


def vision_encoder_fingerprint(tower: CLIPVisionModel) -> str:
    """The fingerprint of a vision encoder, whatever release of transformers loaded it."""
    return tensors_fingerprint({name.removeprefix(CLASSIC_PREFIX): tensor for name, tensor in tower.state_dict().items()})


def write_weights(path: Path, weights: dict[str, torch.Tensor], config: dict, sidecar: dict, before: str | None = None) -> str:
    """Writes the sidecar, which holds what a reader needs to rebuild the model, and then the weights; returns their
    fingerprint. `before` is that of the weights there until now, if the sidecar fits them as well: so the two files
    belong together at every instant. Raises StorageError."""
    config = {key: value for key, value in config.items() if key not in ("architectures", "dtype")}  # transformers' folders alone have these
    fingerprint = tensors_fingerprint(weights)
    content = {"config": config, **sidecar, "weights": [fingerprint, *([before] if before else [])]}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Names of files may hold bytes that are no UTF-8; json's own escape keeps them.
    write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode(errors="backslashreplace")))
    write_atomically(path, lambda file: torch.save(weights, file))
    return fingerprint


def save_weights(path: Path, model: MiniMindVLM, sidecar: dict) -> None:
    """Writes weights and sidecar. Raises FloatingPointError (see `half_weights`) and StorageError."""
    write_weights(path, half_weights(model), model.config.to_diff_dict(), sidecar)


def lock_of(file: Path) -> Path:
    """The lock of the run that writes `file`."""
    return file.with_name(f".{file.stem}.lock")


def read_sidecar(path: Path) -> dict | None:
    """The json file beside the weights at `path`; None when there is none, as with published weights."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return None
    try:
        return parse_sidecar(sidecar)
    except ValueError as error:
        check_fetched(sidecar)
        raise UsageError(f"{sidecar} is broken ({error}). Fetch it with its weights again, or have the training write both by --from_resume 1."
                         f" Without it {path.name} loads if --tokenizer_path and --vision_model_path name what it was trained with") from error


def parse_sidecar(path: Path) -> dict:
    """Raises ValueError when there is no json object in the file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a json object is expected, not {type(content).__name__}")
    if not isinstance(content.get("weights", []), list):
        raise ValueError(f"'weights' should hold a list of fingerprints, not {content['weights']!r}")
    prints = content.get("fingerprints", {})
    if not isinstance(prints, dict) or not all(isinstance(value, str) for value in prints.values()):
        raise ValueError(f"'fingerprints' should hold texts by name, not {prints!r}")
    return content


def is_state_dict(content: Any) -> bool:
    """Whether `content` holds names and tensors."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    )


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TIED = ("model.embed_tokens.weight", "lm_head.weight")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # keys of the weights in training states, others' and ours
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")  # of DistributedDataParallel and torch.compile


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict in a weight file without the vision encoder, which is loaded from its own folder, and a notice of
    what was left out to get it. Raises UsageError for a file without one, or with tensors that are no plain weights."""
    state, kept = read_tensors(path, "weight file"), ""
    while not is_state_dict(state) and (key := next((key for key in WRAPPERS if isinstance(state, dict) and isinstance(state.get(key), dict)), None)):
        state, kept = state[key], f"{kept}[{key!r}]"
    if not is_state_dict(state):
        held = {str(name): type(value).__name__ for name, value in state.items() if not isinstance(value, torch.Tensor)} if isinstance(state, dict) else {}
        raise UsageError(f"{path} is no state dict: it should hold names and tensors, not"
                         f" {', '.join(f'{name} ({kind})' for name, kind in list(held.items())[:3]) or type(state).__name__}")
    names = {name: PREFIXES.sub("", name) for name in state}
    prefixed = next((name for name in names if names[name] != name), None)
    notices = [f"of what it holds, only {kept} is taken"] if kept else []
    notices += [f"names are read without their prefixes: {prefixed} as {names[prefixed]}"] if prefixed else []
    state = {names[name]: tensor for name, tensor in state.items() if not names[name].startswith("vision_encoder.")}
    refuse_odd_kinds(path, state)
    for name, twin in (TIED, TIED[::-1]):  # one tensor, which some write once
        if name not in state and twin in state:
            state[name] = state[twin]
    return state, "; ".join(notices)


def refuse_odd_kinds(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Raises UsageError for quantized, integer, fp8, sparse and other tensors, whose numbers alone are not the weights."""
    for name, tensor in state.items():
        kinds = {"nested": tensor.is_nested, f"{tensor.layout}": tensor.layout != torch.strided,
                 "without numbers (of the meta device)": tensor.is_meta, f"of {tensor.dtype}": tensor.dtype not in FLOATS}  # fmt: skip
        if odd := [kind for kind, is_so in kinds.items() if is_so]:
            raise UsageError(f"{path}: the tensor {name} is {', '.join(odd)}. Weights are read as dense float16, bfloat16, float32 or"
                             " float64: take those from before the quantization, or have its program write them back so")  # fmt: skip


def refuse_untied(path: Path, model: MiniMindVLM, state: dict[str, torch.Tensor]) -> None:
    """Raises UsageError when embedding and head differ, but are one tensor in the model."""
    if model.config.tie_word_embeddings and not torch.equal(*(state[name] for name in TIED)):
        raise UsageError(f"{path}: {' and '.join(TIED)} differ, and this model has one tensor for both")


def weight_choices(folder: Path) -> dict[Path, tuple[str, int, bool]]:
    """The weight files in a folder, by name, and what `weight_name` made each name of."""
    found = {path: re.fullmatch(r"([^.].*)_(\d+)(_moe)?", path.stem) for path in sorted(folder.glob("*.pth")) if path.is_file()}
    return {path: (match[1], int(match[2]), bool(match[3])) for path, match in found.items() if match}


def find_weights(folder: Path, weight: str, hidden_size: int | None, use_moe: int | None) -> Path:
    """The weight file of that name and, where they are given, size and kind. Among several the published size, 512, dense,
    is meant; raises UsageError when it is none of them. Whether the file returned exists is for its reader to say."""
    fitting = [path for path, (name, width, moe) in weight_choices(folder).items()
               if name == weight and hidden_size in (None, width) and use_moe in (None, moe)]  # fmt: skip
    meant = folder / f"{weight_name(weight, hidden_size or 512, bool(use_moe))}.pth"
    if len(fitting) > 1 and meant not in fitting:
        raise UsageError(f"--weight {weight}: there are several in {folder}; choose one:{listed(folder, weight)}")
    if len(fitting) > 1 and hidden_size is None:
        print(f"notice: {meant.name} is taken, the default; weights of that name are:{listed(folder, weight)}", file=sys.stderr)
    return fitting[0] if len(fitting) == 1 else meant


def listed(folder: Path, weight: str = "") -> str:
    """The weight files in a folder, of this name if there are any, a line each with the flags that take it; at most 12."""
    choices = weight_choices(folder)
    named = {path: choice for path, choice in choices.items() if choice[0] == weight} or choices
    return "".join(f"\n    {path.name}: {name} --hidden_size {width}{' --use_moe 1' if moe else ''}"
                   for path, (name, width, moe) in list(named.items())[:12])  # fmt: skip


def load_weights(path: Path, model: MiniMindVLM, expected: dict[str, str] | None = None) -> list[str]:
    """Loads the weights at `path` into `model`, strictly. Returns the names that stay at their fresh values: the
    projector's, when the weights are a plain language model's.

    Names that others wrap weights in are taken off, with a notice on standard error.
    Raises UsageError for a missing or torn file, other keys or shapes, weights that are quantized or not finite, and for a tokenizer or encoder other than the
    ones trained with (`expected` holds those in use; see `fingerprints`).
    """
    if not path.is_file():
        there = listed(path.parent)
        raise UsageError(
            f"no weights at {path}." + (f" Those that are there, as --weight (of training: --from_weight) takes them:{there}\n" if there else " ")
            + f"Published ones:\n    hf download jingyaogong/MiniMind2-V-PyTorch --local-dir {path.parent}\n"
            f"or   modelscope download --model gongjy/MiniMind2-V-PyTorch --local_dir {path.parent}\n"
            f"or train them, or name others by --weight (of training: --from_weight; none starts from scratch)."
        )
    sidecar = read_sidecar(path) or {}
    check_fingerprints(path, expected or {}, sidecar.get("fingerprints", {}))
    state, notice = read_state(path)
    if notice:
        print(f"notice: {path}: {notice}", file=sys.stderr)
    theirs, ours = sizes_of(state), sizes_of(model.state_dict())
    other = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
    if other:
        raise UsageError(
            f"{path} is of a model with {', '.join(f'{name} {theirs[name]}' for name in other)}; this one has"
            f" {', '.join(f'{name} {ours[name]}' for name in other)}. {REMEDIES.get(other[0], 'Give the same flags')}."
        )
    own = model.state_dict()
    fresh = [name for name in own if name not in state and name.startswith("vision_proj.")]
    missing = [name for name in own if name not in state and name not in fresh]
    unexpected = [name for name in state if name not in own]
    shapes = [f"{name} {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
              for name in own if name in state and state[name].shape != own[name].shape]  # fmt: skip
    problems = [f"{len(names)} {kind} (first: {names[0]})"
                for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
                if names]  # fmt: skip
    if problems:
        raise UsageError(
            f"{path} does not fit the model, though its size does: weights {'; '.join(problems)}. It was cut, or made"
            f" by another program; fetch or make it again."
        )
    refuse_untied(path, model, state)
    refuse_non_finite(path, state)
    if "weights" in sidecar and tensors_fingerprint(state) not in sidecar["weights"]:
        raise UsageError(
            f"{path.with_suffix('.json')} belongs to other weights than those in {path.name}: one of the two was exchanged, or a save was"
            f" cut short. Put those together that belong together; training with --from_resume 1 writes both again."
        )
    model.load_state_dict(state, strict=False)  # what strict would say is said above, and the fresh names are meant
    return fresh


def refuse_non_finite(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Raises UsageError for weights that are NaN or infinite: whatever is made of them is worth nothing."""
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise UsageError(f"{path} holds weights that are not finite ({len(broken)} of {len(state)} tensors, first {broken[0]}): the"
                         " training that made it went wrong. Take weights from before that")  # fmt: skip


REMEDIES = {
    "encoder width": "Give the encoder it was trained with by --vision_model_path",
    "vocabulary": "Give the tokenizer it was trained with by --tokenizer_path",
}


def sizes_of(state: dict[str, torch.Tensor]) -> dict[str, int]:
    """What the names and shapes of a model's weights tell of its flags; only what can be told."""
    sizes = {}
    if (embedding := state.get("model.embed_tokens.weight")) is not None and embedding.dim() == 2:
        sizes |= {"vocabulary": embedding.shape[0], "--hidden_size": embedding.shape[1]}
    if (projector := state.get("vision_proj.vision_proj.0.weight")) is not None and projector.dim() == 2:
        sizes["encoder width"] = projector.shape[1]
    layers = {name.split(".")[2] for name in state if name.startswith("model.layers.")}
    if layers:
        sizes |= {"--num_hidden_layers": len(layers), "--use_moe": int(any(".experts." in name for name in state))}
    return sizes


def check_fingerprints(path: Path, used: dict[str, str], recorded: dict[str, str]) -> None:
    """Raises UsageError when a tokenizer or encoder in use differs from the one that the files were made with."""
    flags = {"tokenizer": "--tokenizer_path", "vision_encoder": "--vision_model_path"}
    for kind, value in used.items():
        if recorded.get(kind, value) != value:
            raise UsageError(
                f"{path} was trained with another {kind.replace('_', ' ')} (fingerprint {recorded[kind]}, in use:"
                f" {value}). Give the one it was trained with by {flags[kind]}."
            )
