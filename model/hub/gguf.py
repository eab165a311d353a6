"""A model as the files that llama.cpp, Ollama and LM Studio run; docs/export.md explains the mapping.

Legend of shapes: D hidden size, heads of d channels, E experts, W width of the vision encoder.
"""

import json
import re
from pathlib import Path

import torch

from model.conversation import DEFAULT_SYSTEM, IMAGE_PAD, image_token_of
from model.errors import UsageError
from model.load import Loaded
from model.model_vlm import MiniMindVLM
from model.vision import patches_per_image
from model.weights import CLASSIC_PREFIX

# What names of tensors become, by patterns in this order: the decoder's, experts side by side, and CLIP's.
NAMES = {
    r"mlp\.experts\.\d+\.(\w+)_proj": r"ffn_\1_exps", r"mlp\.shared_experts\.\d+\.(\w+)_proj": r"ffn_\1_shexp",
    r"mlp\.gate\.": "ffn_gate_inp.", r"model\.embed_tokens": "token_embd", r"model\.norm": "output_norm", "lm_head": "output",
    r"model\.layers": "blk", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", r"self_attn\.o_proj": "attn_output",
    r"encoder\.layers": "v.blk", "pre_layrnorm": "v.pre_ln", "layer_norm": "ln", r"mlp\.fc1": "ffn_up", r"mlp\.fc2": "ffn_down",
    r"embeddings\.(\w+)_embedding": r"v.\1_embd", r"self_attn\.": "attn_", r"mlp\.": "ffn_", "_proj": "",
}  # fmt: skip
# The renderer's layout. llama-server gives a message with an image as one text, other programs as parts.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{%- endif -%}
{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{%- set before = namespace(image=false) -%}
{%- for part in message['content'] -%}{%- set image = part['type'] != 'text' or '<__media' in part['text'] -%}
{%- if not loop.first and (image or before.image) -%}{{ '\\n' }}{%- endif -%}{{ part['text'] }}{%- set before.image = image -%}
{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}""".replace("SYSTEM", DEFAULT_SYSTEM)


def write_gguf(folder: Path, loaded: Loaded, name: str, dtype: torch.dtype, class_token: str) -> str:
    """Writes NAME-f16.gguf (or f32), with a vision encoder mmproj-NAME-f16.gguf, and a Modelfile; returns a word on their use.

    `class_token` is last or first (see `vision_tensors`). Raises UsageError for what llama.cpp cannot compute and where the
    package gguf is missing, and FloatingPointError for weights beyond the range of `dtype`.
    """
    model, sees = loaded.model, loaded.model.vision_encoder is not None
    text, vision = (f"{prefix}{name}-f{dtype.itemsize * 8}.gguf" for prefix in ("", "mmproj-"))
    check(loaded, dtype)
    write_file(folder / text, *text_settings(loaded), text_tensors(model), dtype)
    if sees:
        write_file(folder / vision, "clip", vision_settings(model), vision_tensors(model, class_token), dtype)
    ending = '<think>\n\n</think>\n\n"""' if image_token_of(loaded.tokenizer) == IMAGE_PAD else f'"""\nSYSTEM {DEFAULT_SYSTEM}'
    lines = [f"FROM ./{text}", *([f"FROM ./{vision}"] if sees else []), 'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}',
             "{{ .Content }}<|im_end|>", "{{ end }}<|im_start|>assistant", ending, "PARAMETER stop <|im_end|>", ""]  # fmt: skip
    (folder / "Modelfile").write_text("\n".join(lines), encoding="utf-8")
    notice = f" --mmproj {vision}\nnotice: crop images to squares first. llama.cpp pads others to one, where training cut out the middle"
    return f"try it there: llama-server -m {text}{notice if sees else ''}"


def check(loaded: Loaded, dtype: torch.dtype) -> None:
    """Raises UsageError for what llama.cpp cannot compute exactly."""
    config, encoder, backend = loaded.model.config, loaded.model.vision_encoder, json.loads(loaded.tokenizer.backend_tokenizer.to_str())
    splits = {key: (backend["pre_tokenizer"] or {}).get(key) for key in ("type", "add_prefix_space", "use_regex")}
    written, fixed = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"), {"beta_fast": 32, "beta_slow": 1}
    further = sorted(key for key, value in config.rope_parameters.items() if key not in written and value != fixed.get(key))
    normalized = config.norm_topk_prob and (config.num_experts_per_tok > 1 or config.norm_top1_prob)
    problems, remedy = {
        f"{dtype} instead of float16 or float32": dtype not in (torch.float16, torch.float32),
        "its tokenizer does not split text as GPT-2's does, which llama.cpp knows": backend["normalizer"] is not None
            or backend["model"]["type"] != "BPE" or splits != {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        f"YaRN with {', '.join(further)}: llama.cpp has its own figures for that": further,
        "norm_topk_prob or norm_top1_prob is false: llama.cpp makes experts' weights add up to 1": config.use_moe and not normalized,
        "qk_norm with shared experts: llama.cpp has no such model": config.use_moe and config.qk_norm and config.n_shared_experts,
    }, ""  # fmt: skip
    if not any(problems.values()) and encoder is not None:
        vision, pixels, patches = encoder.config, loaded.model.pixel_settings, patches_per_image(encoder)
        problems, remedy = {
            f"a vision encoder of type {vision.model_type}: only CLIP is exported": vision.model_type != "clip_vision_model",
            f"projector {config.projector!r}: it begins with a LayerNorm, llama.cpp's with a linear layer": config.projector != "linear",
            f"image_tokens {config.image_tokens} of {patches} patches: llama.cpp does not pool them": config.image_tokens != patches,
            f"tiles {config.tiles}: llama.cpp shows the whole image alone": config.tiles,
            f"the encoder's {vision.hidden_act!r}: llama.cpp has quick_gelu and gelu": vision.hidden_act not in ("quick_gelu", "gelu"),
            "the encoder's intermediate_size is its hidden_size: llama.cpp swaps matrices": vision.intermediate_size == vision.hidden_size,
            f"images are resized to {pixels.shortest_edge} ({pixels.filter}) and cropped to {pixels.size}: llama.cpp resizes to the size of"
            " the encoder, bicubic": pixels.filter != "bicubic" or pixels.shortest_edge not in (None, pixels.size),
        }, ". --vision_model_path none writes the language model alone"  # fmt: skip
    if found := next((problem for problem, there in problems.items() if there), None):
        raise UsageError(f"no GGUF of this model: {found}{remedy}")


def write_file(path: Path, arch: str, settings: dict, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """One GGUF file, matrices in `dtype`; vectors, routers and positions in fp32."""
    try:
        from gguf import GGUFValueType, GGUFWriter
    except ModuleNotFoundError as error:
        raise UsageError("--to gguf needs the package gguf: pip install gguf==0.19.0") from error
    writer = GGUFWriter(path, arch)
    for key, value in {"general.name": path.stem, "general.file_type": int(dtype == torch.float16), **settings}.items():
        if value is not None:
            writer.add_key_value(key, value, GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value))
    for name, tensor in tensors.items():
        exact = tensor.dim() == 1 or name.endswith(("ffn_gate_inp.weight", "position_embd.weight"))
        values = tensor.detach().to("cpu", torch.float32 if exact else dtype)
        if not values.isfinite().all():
            raise FloatingPointError(f"{name} is beyond fp16's range; --dtype float32 holds it")
        writer.add_tensor(name, values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text_settings(loaded: Loaded) -> tuple[str, dict]:
    """llama.cpp's name for an architecture that computes the same; the decoder's sizes, the tokenizer and the chat template."""
    config, tokenizer = loaded.model.config, loaded.tokenizer
    arch = ("qwen3moe" if config.use_moe else "qwen3") if config.qk_norm else ("granitemoe" if config.use_moe else "llama")
    rope, F = config.rope_parameters, config.intermediate_size
    sizes = {"vocab_size": config.vocab_size, "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
             "block_count": config.num_hidden_layers, "feed_forward_length": F, "attention.head_count": config.num_attention_heads,
             "attention.head_count_kv": config.num_key_value_heads, "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
             "rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": config.head_dim}  # fmt: skip
    if rope["rope_type"] == "yarn":
        sizes |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]),
                  "rope.scaling.original_context_length": rope["original_max_position_embeddings"]}  # fmt: skip
    if config.use_moe:  # granitemoe also scales what others do not
        sizes |= {"expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok, "expert_feed_forward_length": F,
                  "expert_shared_feed_forward_length": F * config.n_shared_experts, "attention.scale": config.head_dim**-0.5,
                  "logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0}  # fmt: skip
    kinds = {number: 3 if token.special else 4 for number, token in tokenizer.added_tokens_decoder.items()}  # control, user-defined
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    vocabulary = {"model": "gpt2", "pre": "gpt-2", "tokens": tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
                  "token_type": [kinds.get(number, 1) for number in range(len(tokenizer))],  # or normal
                  "merges": [" ".join(merge) for merge in merges], "bos_token_id": tokenizer.bos_token_id,
                  "eos_token_id": tokenizer.eos_token_id, "padding_token_id": tokenizer.pad_token_id,
                  "add_bos_token": False, "add_eos_token": False, "add_space_prefix": False}  # fmt: skip
    template = tokenizer.chat_template if image_token_of(tokenizer) == IMAGE_PAD else CHAT_TEMPLATE
    return arch, {"general.type": "model", "tokenizer.chat_template": template, **{f"{arch}.{key}": value for key, value in sizes.items()},
                  **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}}  # fmt: skip


def renamed(name: str) -> str:
    """llama.cpp's name for a tensor."""
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def text_tensors(model: MiniMindVLM) -> dict[str, torch.Tensor]:
    """The decoder's weights. Those of routed experts are stacked [E, ...]; shared ones are a single wider one."""
    config, parts = model.config, {}
    for name, weight in model.named_parameters():
        if not name.startswith("vision_proj"):
            parts.setdefault(renamed(name), []).append(weight)
    tensors = {name: torch.stack(some) if "_exps" in name else torch.cat(some, dim=1 if "down_shexp" in name else 0)
               for name, some in parts.items()}  # fmt: skip
    for name in tensors if not config.qk_norm else ():
        if heads := {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2]):
            # Channels that are turned together: i and i + d/2 here, 2i and 2i + 1 in llama.cpp's architectures without qk_norm.
            rows = tensors[name].view(heads, 2, config.head_dim // 2, config.hidden_size)
            tensors[name] = rows.transpose(1, 2).reshape(tensors[name].shape)
    return tensors


def vision_settings(model: MiniMindVLM) -> dict:
    """CLIP's sizes, how it wants its images, and that the last block's output is read."""
    config, pixels = model.vision_encoder.config, model.pixel_settings
    vision = {"image_size": config.image_size, "patch_size": config.patch_size, "embedding_length": config.hidden_size,
              "feed_forward_length": config.intermediate_size, "block_count": config.num_hidden_layers,
              "attention.head_count": config.num_attention_heads, "attention.layer_norm_epsilon": float(config.layer_norm_eps),
              "projection_dim": model.config.hidden_size, "image_mean": list(pixels.mean), "image_std": list(pixels.std),
              "feature_layer": [config.num_hidden_layers]}  # fmt: skip
    return {"general.type": "mmproj", "clip.has_vision_encoder": True, "clip.projector_type": "mlp",
            "clip.use_gelu": config.hidden_act == "gelu", **{f"clip.vision.{key}": value for key, value in vision.items()}}  # fmt: skip


def vision_tensors(model: MiniMindVLM, class_token: str) -> dict[str, torch.Tensor]:
    """CLIP's weights but for the last norm, which patches do not pass, and the linear projector as two layers with a gelu between
    them: gelu(x) - gelu(-x) = x.

    llama.cpp as released puts the class token behind the patches but its position before theirs (issue 25814): with that
    "last" every token gets its own again. "first" is CLIP's order, for builds that are mended.
    """
    state, linear = model.vision_encoder.state_dict(), model.vision_proj.vision_proj[0]
    tensors = {renamed(name.removeprefix(CLASSIC_PREFIX)): tensor for name, tensor in state.items() if "post_l" not in name}
    if class_token == "last":
        tensors["v.position_embd.weight"] = tensors["v.position_embd.weight"].roll(-1, 0)
    weight, bias = 16 * linear.weight, 16 * linear.bias  # llama.cpp computes gelu beyond 10 exactly, below from a table
    one = torch.eye(len(bias)) / 16
    return tensors | {"mm.0.weight": torch.cat((weight, -weight)), "mm.0.bias": torch.cat((bias, -bias)),
                      "mm.2.weight": torch.cat((one, -one), dim=1), "mm.2.bias": torch.zeros(len(bias))}  # fmt: skip
