"""A stock LLaVA, which transformers and others run with none of this project's code: writing one and reading it back.

    ours                            LlavaForConditionalGeneration
    vision encoder                  vision_tower.vision_model.*
    vision_proj.vision_proj.0       multi_modal_projector.linear_1; linear_2 is the identity, with nothing between the two
    model.*, as they are            language_model.model.*: Llama; with normed queries and keys Qwen3, Qwen3Moe
    model.layers.N.mlp.* of experts language_model.model.layers.N.{block_sparse_moe,shared_mlp}.*: GraniteMoeShared
    "@" at recorded positions       <image>, a token of its own; <|image_pad|> is one already

docs/export.md explains the mapping, and what may come out otherwise.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

from model.conversation import IMAGE_PAD, IMAGE_PLACEHOLDER, image_token_of
from model.errors import UsageError, first_line
from model.load import SIDECAR, Loaded, assemble, build_model
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision import patches_per_image
from model.weights import CLASSIC_PREFIX, fingerprints, half_weights, load_state, read_pixel_settings, read_tensors

TEXT, TOWER, PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector.linear_"
TEXT_MODELS = {"llama": "Llama", "qwen3": "Qwen3", "granitemoeshared": "GraniteMoeShared", "qwen3_moe": "Qwen3Moe"}
WORDS = ("model.embed_tokens.weight", "lm_head.weight")
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAME = (*ENDS, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")  # fmt: skip
# The renderer's layout for contents that are texts or lists of parts. A newline stands between an image and its neighbours.
TEMPLATE = """\
{%- if not thinks and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
  {%- set ns = namespace(text=message['content'], before='') %}
  {%- if message['content'] is not string %}
    {%- set ns.text = '' %}
    {%- for part in message['content'] %}
      {%- set kind = 'text' if part['type'] == 'text' else 'image' %}
      {%- set gap = '\\n' if ns.before and 'image' in (kind, ns.before) else '' %}
      {%- set ns.text = ns.text + gap + (part['text'] if kind == 'text' else image) %}
      {%- set ns.before = kind %}
    {%- endfor %}
  {%- endif %}
  {%- set text = ns.text | replace('<image>', image) %}
  {%- if thinks and message['role'] == 'assistant' %}
    {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in text else '' %}
    {%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text.split('</think>')[-1].lstrip('\\n') %}
  {%- endif %}
  {{- '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if thinks else '') }}{% endif %}"""


def check_mapping(model: MiniMindVLM) -> None:
    """Raises UsageError for a model that no stock LLaVA equals."""
    config, encoder = model.config, model.vision_encoder
    if encoder is None:
        raise UsageError("a LLaVA brings its vision encoder; give one by --vision_model_path")
    one_each = config.norm_topk_prob and (config.num_experts_per_tok > 1 or config.norm_top1_prob)
    for problem, found in {
        f"its vision encoder is a {encoder.config.model_type}, and LLaVA reads an encoder's last layer before the norm that ends"
        " this one (CLIP's patches pass none)": not encoder.config.model_type.startswith("clip"),
        "its projector begins with a norm (\"mlp\"), and LLaVA's has none": config.projector != "linear",
        f"it pools {patches_per_image(encoder)} patches in {config.image_tokens} tokens, and LLaVA reads each patch":
            patches_per_image(encoder) != config.image_tokens,
        f"it shows images in tiles (up to {config.tiles}), and LLaVA shows them whole": config.tiles > 0,
        "the weights of a token's experts do not add up to 1, as those of GraniteMoeShared do":
            config.use_moe and not config.qk_norm and not one_each,
        "it has normed queries and keys and shared experts, and Qwen3Moe has no shared experts":
            config.use_moe and config.qk_norm and config.n_shared_experts > 0,
    }.items():  # fmt: skip
        if found:
            raise UsageError(f"this model does not become a LLaVA: {problem}. --to minimind-v takes any model")


def expert_tensors(config: VLMConfig) -> dict[str, tuple[list[str], int, tuple[int, ...]]]:
    """GraniteMoeShared's tensors of experts: of which of ours each is joined, along which dimension, and what its shape
    begins with. Several shared experts are one wide one."""
    E, shared = range(config.n_routed_experts), range(config.n_shared_experts)
    table = {"block_sparse_moe.router.layer": (["gate"], 0, ()),
             "block_sparse_moe.input_linear": ([f"experts.{e}.{half}_proj" for e in E for half in ("gate", "up")], 0, (len(E),)),
             "block_sparse_moe.output_linear": ([f"experts.{e}.down_proj" for e in E], 0, (len(E),)),
             "shared_mlp.input_linear": ([f"shared_experts.{s}.{half}_proj" for half in ("gate", "up") for s in shared], 0, ()),
             "shared_mlp.output_linear": ([f"shared_experts.{s}.down_proj" for s in shared], 1, ())}  # fmt: skip
    return {f"model.layers.{n}.{theirs}.weight": ([f"model.layers.{n}.mlp.{name}.weight" for name in ours], dim, begin)
            for n in range(config.num_hidden_layers) for theirs, (ours, dim, begin) in table.items()
            if ours and config.use_moe and not config.qk_norm}  # fmt: skip


def llava_tensors(model: MiniMindVLM, dtype: torch.dtype, added: int) -> dict[str, torch.Tensor]:
    """The model's tensors under the names that transformers 4 and 5 and vLLM read, with `added` (0 or 1) tokens more."""
    config, state = model.config, half_weights(model, dtype)
    tensors = {TOWER + CLASSIC_PREFIX + name.removeprefix(CLASSIC_PREFIX): tensor
               for name, tensor in half_weights(model.vision_encoder, dtype).items()}  # fmt: skip
    tensors |= {f"{PROJECTOR}1.{kind}": state.pop(f"vision_proj.vision_proj.0.{kind}") for kind in ("weight", "bias")}
    tensors[f"{PROJECTOR}2.weight"] = torch.eye(config.hidden_size, dtype=dtype)
    tensors[f"{PROJECTOR}2.bias"] = torch.zeros(config.hidden_size, dtype=dtype)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name in state.keys() & {*WORDS}:  # <image> becomes as unlikely as the token of number 0, which no answer holds
        state[name] = torch.cat((state[name], state[name][:added]))
    for name, (ours, dim, begin) in expert_tensors(config).items():
        joined = torch.cat([state.pop(part) for part in ours], dim)
        state[name] = joined.view(*begin, -1, joined.shape[-1])
    return tensors | {TEXT + name: tensor for name, tensor in state.items()}


def our_tensors(tensors: dict[str, torch.Tensor], config: VLMConfig) -> tuple[dict, dict]:
    """The reverse: our state dict and the vision encoder's. Raises KeyError for a missing tensor, and ValueError for a
    second layer of the projector that does something."""
    tower = {name.removeprefix(TOWER).removeprefix(CLASSIC_PREFIX): tensors.pop(name) for name in [*tensors] if name.startswith(TOWER)}
    first, bias, second, shift = (tensors.pop(f"{PROJECTOR}{n}.{kind}") for n in "12" for kind in ("weight", "bias"))
    if not torch.equal(second, torch.eye(config.hidden_size)) or shift.any():
        raise ValueError("the projector's second layer is no longer the identity")
    state = {"vision_proj.vision_proj.0.weight": first, "vision_proj.vision_proj.0.bias": bias}
    state |= {name.removeprefix(TEXT): tensor for name, tensor in tensors.items()}
    for name, (ours, dim, _) in expert_tensors(config).items():
        joined = state.pop(name)
        state |= zip(ours, joined.reshape(-1, joined.shape[-1]).chunk(len(ours), dim), strict=True)
    state.setdefault(WORDS[1], state[WORDS[0]])
    return state | {name: state[name][: config.vocab_size] for name in WORDS}, tower


def text_config(config: VLMConfig) -> dict:
    """The configuration of LLaVA's text model."""
    rope, E, k = config.rope_parameters, config.n_routed_experts, config.num_experts_per_tok
    kind = [*TEXT_MODELS][2 * config.use_moe + config.qk_norm]
    further = {
        "llama": {"mlp_bias": False},
        "qwen3": {},
        "granitemoeshared": {  # its attention divides by no root of itself
            "attention_multiplier": config.head_dim**-0.5, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0,
            "num_local_experts": E, "num_experts_per_tok": k,
            "shared_intermediate_size": config.intermediate_size * config.n_shared_experts},
        "qwen3_moe": {"num_experts": E, "num_experts_per_tok": k, "moe_intermediate_size": config.intermediate_size,
                      "norm_topk_prob": config.norm_topk_prob and (k > 1 or config.norm_top1_prob)},
    }[kind]  # fmt: skip
    if rope["rope_type"] != "default":  # for releases before 5, which know no rope_parameters
        further["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {"architectures": [f"{TEXT_MODELS[kind]}ForCausalLM"], "model_type": kind, **{name: getattr(config, name) for name in SAME},
            "attention_bias": False, "rope_theta": rope["rope_theta"], **further}  # fmt: skip


def write_llava(folder: Path, loaded: Loaded, dtype: torch.dtype) -> None:
    """Fills the folder. Raises UsageError for a model that no LLaVA equals, and FloatingPointError for weights beyond the
    range of `dtype`."""
    model, config, tokenizer = loaded.model, loaded.model.config, loaded.tokenizer
    check_mapping(model)
    thinks = image_token_of(tokenizer) == IMAGE_PAD
    image, backend = IMAGE_PAD if thinks else IMAGE_PLACEHOLDER, Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    added = 0 if thinks else backend.add_special_tokens([AddedToken(image, normalized=False, special=True)])
    image_id, precision = backend.token_to_id(image), {"dtype": str(dtype).removeprefix("torch.")}
    files = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", **precision, "image_token_index": image_id,
            "image_seq_length": config.image_tokens, "projector_hidden_act": "linear", "multimodal_projector_bias": True,
            "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "tie_word_embeddings": config.tie_word_embeddings,
            "vision_config": {**model.vision_encoder.config.to_dict(), **precision},
            "text_config": {**text_config(config), "vocab_size": config.vocab_size + added, **precision}},
        "generation_config.json": {**{name: getattr(config, name) for name in ENDS}, "suppress_tokens": [image_id]},
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": image, "patch_size": model.vision_encoder.config.patch_size,
            "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, **model.pixel_settings.to_dict()},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings, "model_input_names": ["input_ids", "attention_mask"],
            **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}},
        SIDECAR: {"config": config.to_diff_dict(), "fingerprints": fingerprints(model, tokenizer), **loaded.record},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    backend.save(str(folder / "tokenizer.json"))
    head = f"{{%- set image, thinks = '{image}', {str(thinks).lower()} %}}\n"
    (folder / "chat_template.jinja").write_text(head + TEMPLATE, encoding="utf-8")
    save_file(llava_tensors(model, dtype, added), folder / "model.safetensors", metadata={"format": "pt"})


def read_llava(folder: Path, settings: dict, record: dict) -> Loaded:
    """The model in a folder that `write_llava` filled, with its config.json and sidecar. Raises UsageError for any other."""
    if "config" not in record:
        raise UsageError(f"{folder} holds somebody else's LLaVA: only one that python -m model.convert --to llava wrote, with its"
                         f" {SIDECAR}, can be read here")  # fmt: skip
    model = build_model(folder / SIDECAR, record.pop("config"))
    tensors = read_tensors(folder / "model.safetensors", "weight file")
    try:
        state, tower = our_tensors({name: tensor.float() for name, tensor in tensors.items()}, model.config)
        encoder = CLIPVisionModel(CLIPVisionConfig.from_dict(settings["vision_config"]))
        encoder.load_state_dict(tower)
        encoder.pixel_settings = read_pixel_settings(folder, encoder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # damaged files raise errors of all kinds
        raise UsageError(f"{folder} is no longer what was exported: {type(error).__name__}: {first_line(error)}. Export the model"
                         " again") from error  # fmt: skip
    load_state(folder, model, state)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    words["added_tokens"] = [entry for entry in words["added_tokens"] if entry["content"] != IMAGE_PLACEHOLDER]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)), **tokenizer.special_tokens_map)
    # Rounded to bf16 the encoder is not quite that of the training any more: the tokenizer alone is compared.
    compared = {kind: value for kind, value in record.get("fingerprints", {}).items() if kind == "tokenizer"}
    return replace(assemble(folder, model, tokenizer, encoder, {"fingerprints": compared}), record=record)
