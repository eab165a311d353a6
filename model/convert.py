"""Native weights to a folder in transformers format and back, exactly.

    python -m model.convert out/sft_vlm_512.pth minimind-v                  # a folder for transformers, PEFT, the hub
    python -m model.convert minimind-v out/mine_512.pth                     # and weights for training and eval_vlm.py

Reads   weights with the sidecar next to them, or a folder, also one that the original project published
Writes  the folder: model.safetensors, config.json, tokenizer, processor, generation_config.json, sidecar.json (fingerprints
        and training record), and the vision encoder in vision_model/ (--vision_model_path none leaves it out); or weights
        and sidecar. What exists already is not replaced. Nothing of a folder is ever executed.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from model.hub.modeling import MiniMindVForConditionalGeneration
from model.hub.processing import MiniMindVProcessor

from .errors import UsageError, print_anything
from .load import SIDECAR, Loaded, read_folder, read_native
from .model_vlm import MiniMindVLM
from .storage import StorageError, hold, home_for_tilde
from .weights import half_weights, lock_of, save_weights, weight_name


def write_folder(folder: Path, loaded: Loaded) -> None:
    """Writes the folder whole or not at all, its weights in fp16. Raises UsageError when something is there already, and
    FloatingPointError for weights beyond fp16's range."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; name another folder, or remove it")
    model, config = loaded.model, loaded.model.config
    halves = MiniMindVForConditionalGeneration(config).half()
    halves.load_state_dict(half_weights(model))
    halves.attach_vision_encoder(model.vision_encoder)  # after half(): it stays as it is
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        halves.save_pretrained(temporary)
        pixels = {"tiles": config.tiles, **model.pixel_settings.to_dict()}
        MiniMindVProcessor(loaded.tokenizer, config.image_tokens, pixels=pixels).save_pretrained(temporary)
        record = json.dumps(loaded.record, indent=2, ensure_ascii=False) + "\n"
        (temporary / SIDECAR).write_text(record, encoding="utf-8")
        for path in (temporary, *temporary.rglob("*")):  # a folder to hand on: others may read it
            path.chmod(0o755 if path.is_dir() else 0o644)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only when something failed


def write_native(path: Path, loaded: Loaded) -> None:
    """Writes weights and sidecar as one. Raises UsageError when they are there already, and FloatingPointError for
    weights beyond fp16's range."""
    ending = weight_name("", loaded.model.config.hidden_size, loaded.model.config.use_moe)
    if not path.stem.removesuffix(ending) or not path.stem.endswith(ending):
        raise UsageError(f"{path}: weights of this model are called NAME{ending}.pth, with the NAME for --weight")
    for file in (path, path.with_suffix(".json")):
        if file.exists():
            raise UsageError(f"{file} exists already; name another file, or remove it")
    lock = hold(lock_of(path), "name another file")
    try:
        save_weights(path, loaded.model, loaded.record)
    finally:
        lock.release()


def count_rounded(model: MiniMindVLM) -> int:
    """Weights that fp16 cannot hold exactly."""
    return sum(int((tensor.half() != tensor).sum()) for tensor in model.state_dict().values())


def convert(source: Path, target: Path, tokenizer_path: str | None, vision_model_path: str | None) -> None:
    """Weights to a folder or a folder to weights; a notice when numbers had to be rounded. Raises UsageError."""
    native = source.suffix == ".pth" or source.is_file()
    if native == (target.suffix == ".pth"):
        raise UsageError(f"{source} -> {target}: one of them is a weight file (.pth), the other a folder")
    if native:
        loaded = read_native(source, tokenizer_path, vision_model_path)
        write_folder(target, loaded)
        print(f"wrote {target}; try it: python eval_vlm.py --load_from {target}")
    else:
        loaded = read_folder(source, tokenizer_path, vision_model_path or "none")
        write_native(target, loaded)
        print(f"wrote {target} and {target.with_suffix('.json').name}")
    if rounded := count_rounded(loaded.model):
        print(f"notice: {rounded} of {loaded.model.num_parameters()} weights were rounded to fp16")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 for a user's mistake, 1 when writing failed."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m model.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("source", type=Path, help="weights (.pth), a folder, or org/name on a hub")
    parser.add_argument("target", type=Path, help="a folder or weights (.pth)")
    parser.add_argument("--tokenizer_path", help="folder of the tokenizer, when the source has none (default: that of the training)")
    parser.add_argument("--vision_model_path", help="folder of the vision encoder, or org/name on a hub, that goes into the folder; none: leaves it out"
                        " (default: that of the training)")  # fmt: skip
    args = parser.parse_args(home_for_tilde(argv))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        convert(args.source, args.target, args.tokenizer_path, args.vision_model_path)
    except UnicodeError as error:  # of tokenizers and safetensors, which open files by UTF-8 names alone
        print(f"error: {args.source} -> {args.target}: {error}. Take folders with plain names, or set PYTHONUTF8=1", file=sys.stderr)
        return 2
    except (UsageError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StorageError, SafetensorError, OSError) as error:
        print(f"error: cannot write {args.target}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
