"""Native weights to a folder in transformers format and back, exactly.

    python -m model.convert out/sft_vlm_512.pth minimind-v                  # a folder for transformers, PEFT, the hub
    python -m model.convert out/sft_vlm_512.pth llava --to llava            # one that needs none of this project's code
    python -m model.convert out/sft_vlm_512.pth minimind-v-gguf --to gguf   # for llama.cpp, Ollama, LM Studio
    python -m model.convert minimind-v out/mine_512.pth                     # and weights for training and eval_vlm.py

Reads   weights with the sidecar next to them, or a folder, also one that the original project published
Writes  the folder: model.safetensors, config.json, tokenizer, processor, generation_config.json, sidecar.json (fingerprints
        and training record), and the vision encoder, of minimind-v in vision_model/ (--vision_model_path none leaves it
        out); or weights and sidecar. What exists already is not replaced. Nothing of a folder is ever executed.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from model.hub.llava import write_llava
from model.hub.modeling import MiniMindVForConditionalGeneration
from model.hub.processing import MiniMindVProcessor

from .errors import UsageError, print_anything
from .load import SIDECAR, Loaded, read_folder, read_native
from .model_vlm import MiniMindVLM
from .storage import StorageError, hold, home_for_tilde
from .weights import half_weights, lock_of, save_weights, weight_name


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` if nothing fails: that is there whole or not at all. Raises UsageError
    when something is there already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; name another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):  # a folder to hand on: others may read it
            path.chmod(0o755 if path.is_dir() else 0o644)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only when something failed


def write_folder(folder: Path, loaded: Loaded, dtype: torch.dtype = torch.float16) -> None:
    """Writes a folder in this project's own format. Raises FloatingPointError for weights beyond fp16's range."""
    model, config = loaded.model, loaded.model.config
    copy = MiniMindVForConditionalGeneration(config).to(dtype)
    copy.load_state_dict(half_weights(model, dtype))
    copy.attach_vision_encoder(model.vision_encoder)  # after to(): it stays as it is
    copy.save_pretrained(folder)
    pixels = {"tiles": config.tiles, **model.pixel_settings.to_dict()}
    MiniMindVProcessor(loaded.tokenizer, config.image_tokens, pixels=pixels).save_pretrained(folder)
    record = json.dumps(loaded.record, indent=2, ensure_ascii=False) + "\n"
    (folder / SIDECAR).write_text(record, encoding="utf-8")


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


def count_rounded(model: MiniMindVLM, dtype: torch.dtype) -> int:
    """Weights that `dtype` cannot hold exactly."""
    return sum(int((tensor.to(dtype) != tensor).sum()) for tensor in model.state_dict().values())


def convert(source: Path, target: Path, tokenizer_path: str | None, vision_model_path: str | None, to: str = "minimind-v",
            dtype: str = "float16", class_token: str = "last") -> None:  # fmt: skip
    """Weights or a folder to a folder, or a folder to weights; a notice when numbers had to be rounded. Raises UsageError."""
    native, back = source.suffix == ".pth" or source.is_file(), target.suffix == ".pth"
    if native == back and (back or to == "minimind-v"):
        raise UsageError(f"{source} -> {target}: one of them is a weight file (.pth), the other a folder")
    if back and (to, dtype) != ("minimind-v", "float16"):
        raise UsageError(f"{target}: --to and --dtype are for folders; weights are fp16")
    read = read_native if native else read_folder
    loaded = read(source, tokenizer_path, vision_model_path or ("none" if back else None))
    if back:
        write_native(target, loaded)
        print(f"wrote {target} and {target.with_suffix('.json').name}")
    elif to == "gguf":
        from model.hub.gguf import write_gguf  # which needs an optional package

        if vision_model_path == "none":
            loaded.model.attach_vision_encoder(None)
        with whole_folder(target) as folder:
            words = write_gguf(folder, loaded, target.resolve().name, getattr(torch, dtype), class_token)
        print(f"wrote {target}; {words}")
    else:
        with whole_folder(target) as folder:
            (write_llava if to == "llava" else write_folder)(folder, loaded, getattr(torch, dtype))
        print(f"wrote {target}; try it: python eval_vlm.py --load_from {target}")
    if rounded := count_rounded(loaded.model, getattr(torch, dtype)):
        print(f"notice: {rounded} of {loaded.model.num_parameters()} weights were rounded to {'bf16' if 'b' in dtype else 'fp16'}")


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
    parser.add_argument("--to", choices=("minimind-v", "llava", "gguf"), default="minimind-v", help="kind of folder (default: minimind-v)")
    parser.add_argument("--dtype", choices=("float16", "float32", "bfloat16"), default="float16", help="of a folder (default: float16)")
    parser.add_argument("--class_token", choices=["last", "first"], default="last", help="where gguf files have the position of CLIP's"
                        " class token: last for released llama.cpp, first for builds with its issue 25814 mended")  # fmt: skip
    args = parser.parse_args(home_for_tilde(argv))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        convert(**vars(args))
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
