"""The structure of the model, dense and as a mixture of experts. Every figure in it is read from a configuration or
from the parameters of a model."""

import math
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from dataset.images import load_image
from model.errors import UsageError
from model.inference.attention_map import pixels_to_image
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision import preprocess

from .canvas import EXPERT, FROZEN, PICTURE, PLAIN, TEXT, Canvas


def count(module: torch.nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def millions(number: int) -> str:
    """12_345_678 -> "12.3M"."""
    return f"{number / 1e6:.{2 if number < 1e7 else 1}f}M"


def build(hidden_size: int, num_hidden_layers: int, use_moe: bool = False) -> MiniMindVLM:
    """The model with its real tower, CLIP ViT-B/16, both with fresh weights; on torch's meta device, in shapes alone.

    Raises UsageError for sizes that cannot work.
    """
    if num_hidden_layers < 1:
        raise UsageError(f"--num_hidden_layers {num_hidden_layers}: at least 1")
    try:
        config = VLMConfig(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, use_moe=use_moe)
    except ValueError as error:
        raise UsageError(f"--hidden_size {hidden_size}: {error}") from error
    return MiniMindVLM(config, CLIPVisionModel(CLIPVisionConfig(patch_size=16)))


def at_work(model: MiniMindVLM) -> int:
    """Parameters that take part in a token: without the experts that the router leaves out."""
    idle = 0
    for block in model.model.layers:
        if block.use_moe:
            idle += count(block.mlp.experts[0]) * (len(block.mlp.experts) - model.config.num_experts_per_tok)
    return count(model) - idle


def draw_structure(path: Path, file: Path, hidden_size: int, num_hidden_layers: int) -> None:
    """The whole model, one of its blocks, and both kinds of feed-forward layer, bottom up.

    Raises SampleError when `file`, the picture it shows, is none, and UsageError for sizes that cannot work.
    """
    with torch.device("meta"):
        dense, moe = (build(hidden_size, num_hidden_layers, use_moe) for use_moe in (False, True))
    canvas = Canvas(1000, 800)
    _draw_whole(canvas, dense, pixels_to_image(preprocess(load_image(file, str(file)))))
    _draw_block(canvas, dense)
    _draw_dense(canvas, dense)
    _draw_experts(canvas, moe)
    canvas.save(path)


def _draw_whole(canvas: Canvas, model: MiniMindVLM, picture: Image.Image) -> None:
    """Left column: pixels and words become one sequence, the decoder continues it."""
    config, tower = model.config, model.vision_encoder
    D, P, W, V = config.hidden_size, config.image_tokens, config.vision_hidden_size, config.vocab_size
    canvas.text(175, 780, "The model", 12.5, weight="bold")
    side = math.isqrt(P)
    canvas.picture(picture, 43, 40, 104, side)
    canvas.text(95, 20, f"{picture.width} × {picture.height} pixels\n{side} × {side} patches", 9)
    canvas.arrow((95, 146), (95, 170))
    canvas.box(15, 170, 160, 62, f"CLIP ViT-B/{tower.config.patch_size}, frozen\n{tower.config.num_hidden_layers} blocks, {millions(count(tower))}",
               FROZEN)  # fmt: skip
    canvas.arrow((95, 232), (95, 272))
    canvas.text(103, 250, f"{P} × {W}", 9, ha="left")
    canvas.box(15, 272, 160, 52, f"projector\nlinear {W} → {D}, {millions(count(model.vision_proj))}", PICTURE)
    canvas.arrow((95, 324), (95, 366))
    canvas.text(103, 343, f"{P} × {D}", 9, ha="left")
    canvas.box(205, 30, 140, 52, "“What is this?”\nand 196 placeholders".replace("196", str(P)), PLAIN, 9)
    canvas.arrow((275, 82), (275, 122))
    canvas.text(283, 101, "T ids", 9, ha="left")
    embedding = model.model.embed_tokens
    canvas.box(205, 122, 140, 62, f"embedding\n{V:,} × {D}, {millions(count(embedding))}", TEXT)
    canvas.arrow((275, 184), (275, 366))
    canvas.text(283, 275, f"T × {D}", 9, ha="left")
    for number in range(18):  # the sequence, the picture's part shortened
        kind = PICTURE if 4 <= number < 12 else TEXT
        canvas.box(17 + number * 18.2, 368, 15, 24, kind=kind, linewidth=0.9)
    canvas.text(17 + 8 * 18.2 - 1.6, 380, f"… {P} …", 8.5, bbox={"facecolor": PICTURE[0], "edgecolor": "none", "pad": 1.5})
    canvas.text(180, 404, "one sequence: patch vectors in the placeholders' places", 8.5)
    canvas.arrow((180, 414), (180, 446))
    canvas.box(60, 446, 240, 62, f"{config.num_hidden_layers} blocks\n{millions(count(model.model.layers))}", TEXT, 11)
    canvas.arrow((180, 508), (180, 540))
    canvas.box(60, 540, 240, 30, "RMSNorm")
    canvas.arrow((180, 570), (180, 602))
    canvas.text(188, 585, f"T × {D}", 9, ha="left")
    canvas.box(60, 602, 240, 52, f"head, linear {D} → {V:,}\nthe embedding's weights once more", TEXT)
    canvas.arrow((180, 654), (180, 690))
    canvas.box(60, 690, 240, 52, f"{V:,} logits: what comes next\n“A cat.”", PLAIN)


def _draw_block(canvas: Canvas, model: MiniMindVLM) -> None:
    """Middle column: pre-norm, grouped-query attention, feed-forward."""
    config, attention = model.config, model.model.layers[0].self_attn
    H, G, d, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    left, middle = 395, 525
    canvas.text(middle, 780, f"One of the {config.num_hidden_layers} blocks", 12.5, weight="bold")
    canvas.box(375, 50, 295, 700, kind=("#fbfcfe", TEXT[1]), linestyle="--")
    canvas.text(middle, 17, f"T × {D}", 9)
    canvas.arrow((middle, 26), (middle, 86))
    canvas.box(435, 86, 180, 30, "RMSNorm")
    canvas.box(412, 142, 246, 300, kind=("#eef4fc", "#9db8d9"), linewidth=0.9)
    canvas.text(middle + 10, 428, f"grouped-query attention, {millions(count(attention))}", 9.5)
    for x, name, heads, weight in ((418, "queries", H, attention.q_proj), (499, "keys", G, attention.k_proj), (580, "values", G, attention.v_proj)):
        rows, columns = weight.weight.shape
        canvas.arrow((middle, 116), (middle, 129), (x + 36, 129), (x + 36, 156))
        canvas.box(x, 156, 72, 66, f"{name}\n{columns} → {rows}\n{heads} × {d}", TEXT, 9)
    for x in (454, 535):
        canvas.arrow((x, 222), (x, 244))
    canvas.box(418, 244, 153, 30, "rotary positions", size=9)
    canvas.arrow((495, 274), (495, 296))
    canvas.arrow((616, 222), (616, 296))
    canvas.box(418, 296, 234, 52, f"softmax(q kᵀ / √{d}) v, looking back only\n{H // G} query heads share a key head", size=8.5)
    canvas.arrow((middle, 348), (middle, 370))
    rows, columns = attention.o_proj.weight.shape
    canvas.box(435, 370, 180, 34, f"output, {columns} → {rows}", TEXT)
    canvas.arrow((middle, 404), (middle, 416), head=False)
    canvas.arrow((middle, 440), (middle, 466))
    canvas.plus(middle, 474)
    canvas.arrow((middle, 62), (left, 62), (left, 474), (middle - 9, 474))
    canvas.arrow((middle, 483), (middle, 530))
    canvas.box(435, 530, 180, 30, "RMSNorm")
    canvas.arrow((middle, 560), (middle, 592))
    canvas.box(425, 592, 200, 62, "feed-forward layer\ndense, or mixture of experts", EXPERT)
    canvas.arrow((middle, 654), (middle, 702))
    canvas.plus(middle, 710)
    canvas.arrow((middle, 505), (left, 505), (left, 710), (middle - 9, 710))
    canvas.arrow((middle, 719), (middle, 768))


def _draw_dense(canvas: Canvas, model: MiniMindVLM) -> None:
    """Upper right: SwiGLU."""
    mlp, middle = model.model.layers[0].mlp, 845
    canvas.text(middle, 780, "Feed-forward, dense", 12.5, weight="bold")
    (inner, D), (rows, columns) = mlp.gate_proj.weight.shape, mlp.down_proj.weight.shape
    canvas.arrow((middle, 480), (middle, 497), (770, 497), (770, 512))
    canvas.arrow((middle, 497), (920, 497), (920, 512))
    canvas.box(705, 512, 130, 46, f"gate\n{D} → {inner:,}", EXPERT)
    canvas.box(855, 512, 130, 46, f"up\n{D} → {inner:,}", EXPERT)
    canvas.arrow((770, 558), (770, 590))
    canvas.arrow((920, 558), (920, 590))
    canvas.box(705, 590, 280, 34, "SiLU(gate) × up")
    canvas.arrow((middle, 624), (middle, 652))
    canvas.box(765, 652, 160, 46, f"down\n{columns:,} → {rows}", EXPERT)
    canvas.arrow((middle, 698), (middle, 722))
    canvas.text(middle, 734, f"{millions(count(mlp))} a block, {millions(count(model))} in all", 9.5)


def _draw_experts(canvas: Canvas, model: MiniMindVLM) -> None:
    """Lower right: the router, its experts, and the shared ones."""
    mlp, config, middle = model.model.layers[0].mlp, model.config, 845
    E, k, shared = len(mlp.experts), config.num_experts_per_tok, len(mlp.shared_experts)
    chosen = sorted(range(E), key=lambda number: number % 2 == 0)[:k]  # every other one, for example
    canvas.text(middle, 440, "Feed-forward, mixture of experts", 12.5, weight="bold")
    canvas.arrow((middle, 17), (middle, 42), head=False)
    canvas.arrow((middle, 42), (805, 42), (805, 62))
    canvas.arrow((middle, 42), (952, 42), (952, 186))
    rows, columns = mlp.gate.weight.shape
    canvas.box(700, 62, 210, 62, f"router, linear {columns} → {rows}\nsoftmax; the best {k} for each token", PLAIN, 9)
    width = 210 / E
    for number in range(E):
        x = 700 + number * width
        canvas.box(x + 3, 186, width - 6, 70, f"expert\n{number + 1}", EXPERT if number in chosen else FROZEN, 9)
        if number in chosen:
            canvas.arrow((805, 124), (x + width / 2, 186))
            canvas.arrow((x + width / 2, 256), (805, 306))
    canvas.box(922, 186, 66, 70, "shared\n" + (f"× {shared}" if shared > 1 else "expert"), EXPERT, 9)
    canvas.arrow((952, 256), (952, 324), (middle + 9, 324))
    canvas.text(776, 300, "weighted sum", 9, ha="right")
    canvas.arrow((805, 306), (805, 324), (middle - 9, 324))
    canvas.plus(middle, 324)
    canvas.arrow((middle, 333), (middle, 358))
    canvas.text(middle, 389, f"{E} experts of {millions(count(mlp.experts[0]))} a block, {millions(count(model))} in all", 9.5)
    canvas.text(middle, 371, f"{millions(at_work(model))} of them at work on a token", 9.5)
