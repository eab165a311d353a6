"""Train the demo's frozen vision encoder: a tiny CLIP on images drawn here, with captions written here.

    python -m model.recipes.train_tiny_clip                       # about 50 minutes on two cores; writes the folder below
    python -m model.recipes.train_tiny_clip --steps 20 --save_dir /tmp/t  # a quick look

Reads nothing. Writes `model/vision_model/tiny-clip/`: config.json, model.safetensors (fp16, vision half only),
preprocessor_config.json. The images are one flat shape on a pale background; a caption names its size, colour, shape
and place. The objective is CLIP's symmetric InfoNCE (Radford et al. 2021, arXiv 2103.00020, figure 3).

Three choices keep an hour on two cores enough:
- The image embedding is the mean of all output tokens, not the class token alone: the VLM reads patch vectors, so the
  patch vectors themselves have to carry what was seen.
- A batch draws from few colours and places, so its captions differ mostly in shape and size. Colour is learned in
  minutes; a patch is 16 pixels wide and shape needs the pressure.
- For the first nine tenths only some patches are encoded (FLIP, arXiv 2212.00794): those under the shape first,
  then random ones. The last tenth sees whole images.
"""

import argparse
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from model.hub.modeling import save_vision_encoder
from model.pixels import CLIP, normalize, preprocess

FOLDER = Path(__file__).resolve().parents[1] / "vision_model" / "tiny-clip"
SHAPES = ("circle", "triangle", "rectangle", "diamond", "star", "cross", "ring", "crescent")
COLOURS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "black": (0, 0, 0),
    "gray": (128, 128, 128), "teal": (0, 128, 128), "brown": (165, 42, 42), "orange": (255, 140, 0),
    "purple": (128, 0, 128), "pink": (255, 105, 180), "white": (255, 255, 255),
}  # fmt: skip
SIZES = {"small": (0.14, 0.24), "medium": (0.26, 0.38), "large": (0.40, 0.56)}  # side as a fraction of the image
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
TEMPLATES = (
    "a {size} {colour} {shape} at the {place}",
    "a picture of a {size} {shape} in {colour} at the {place}",
    "at the {place} is a {colour} {shape} of {size} size",
)
CONTEXT = 16  # words in the longest caption, <end> included, rounded up
LEARNING_RATE = 1e-3  # peak of the cosine
PATCHES = 72  # of 196, encoded in the first nine tenths
POLYGONS = {  # corners in the unit square
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "rectangle": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [(0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67),
              (0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)],
    "star": [(0.5 + (0.2 if i % 2 else 0.5) * math.cos(math.pi * i / 5 - math.pi / 2),
              0.5 + (0.2 if i % 2 else 0.5) * math.sin(math.pi * i / 5 - math.pi / 2)) for i in range(10)],
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a drawn image shows, and so what its caption says."""

    size: str
    colour: str
    shape: str
    place: str

    def caption(self, template: str) -> str:
        return template.format(**vars(self))


ALL_SCENES = tuple(Scene(*values) for values in itertools.product(SIZES, COLOURS, SHAPES, PLACES))
WORDS = {word for scene in ALL_SCENES for template in TEMPLATES for word in scene.caption(template).split()}
WORD_ID = {word: number for number, word in enumerate(("<pad>", "<end>", *sorted(WORDS)))}


def draw(scene: Scene, rng: random.Random) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Draws `scene` with random position inside its place, colour jitter, background and resolution.

    Returns the RGB image of 224 x 224 pixels and the shape's box (x0, y0, x1, y1) as fractions of the side.
    """
    canvas = rng.choice((48, 64, 64, 96, 128, 224))
    oversample = rng.choice((1, 1, 2))  # 1 leaves jagged edges, 2 smooths them
    side = canvas * oversample
    colour = tuple(min(255, max(0, channel + rng.randint(-18, 18))) for channel in COLOURS[scene.colour])
    low = 225 if scene.colour != "white" else 150
    background = tuple(rng.randint(low, low + 30) for _ in range(3))
    w = h = rng.uniform(*SIZES[scene.size])
    if scene.shape == "rectangle" and rng.random() < 0.75:
        squeeze = rng.uniform(0.4, 1.0)
        w, h = (w * squeeze, h) if rng.random() < 0.5 else (w, h * squeeze)
    elif scene.shape == "triangle":
        h *= rng.uniform(0.8, 1.0)
    row, column = divmod(PLACES.index(scene.place), 3)
    # The middle of the shape lies in its ninth of the image; the shape itself is kept whole.
    cx = min(max((column + rng.random()) / 3, w / 2), 1 - w / 2)
    cy = min(max((row + rng.random()) / 3, h / 2), 1 - h / 2)
    x0, y0 = cx - w / 2, cy - h / 2

    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    box = (x0 * side, y0 * side, (x0 + w) * side, (y0 + h) * side)
    if scene.shape in ("circle", "ring", "crescent"):
        pen.ellipse(box, fill=colour)
        if scene.shape == "ring":
            pen.ellipse([box[i] + (1, 1, -1, -1)[i] * 0.25 * w * side for i in range(4)], fill=background)
        elif scene.shape == "crescent":
            pen.ellipse([box[i] + (0.35, -0.1, 0.35, -0.1)[i] * w * side for i in range(4)], fill=background)
    else:
        corners = [(box[0] + w * side * x, box[1] + h * side * y) for x, y in POLYGONS[scene.shape]]
        pen.polygon(corners, fill=colour)
    if oversample > 1:
        image = image.resize((canvas, canvas), Image.Resampling.BOX)
    if canvas != CLIP.size:
        image = image.resize((CLIP.size, CLIP.size), Image.Resampling.BICUBIC)
    return image, (x0, y0, x0 + w, y0 + h)


def tokenize(captions: list[str]) -> torch.Tensor:
    """Word ids int64 [N, CONTEXT], each row ended by <end> and padded with <pad>."""
    rows = torch.full((len(captions), CONTEXT), WORD_ID["<pad>"])
    for row, caption in zip(rows, captions, strict=True):
        ids = [WORD_ID[word] for word in caption.split()] + [WORD_ID["<end>"]]
        row[: len(ids)] = torch.tensor(ids)
    return rows


class DrawnBatches(Dataset):
    """Item i is batch i, a pure function of (seed, i): uint8 pixels [B, 3, 224, 224], word ids [B, CONTEXT] and a
    priority [B, 196] that is higher for patches under the shape."""

    def __init__(self, batches: int, batch_size: int, seed: int):
        self.batches, self.batch_size, self.seed = batches, batch_size, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rng = random.Random(f"{self.seed}/{index}")
        if index % 4 == 0:
            pool = ALL_SCENES
        else:
            colours, places = set(rng.sample(sorted(COLOURS), 4)), set(rng.sample(PLACES, 3))
            pool = [scene for scene in ALL_SCENES if scene.colour in colours and scene.place in places]
        scenes = rng.sample(pool, self.batch_size)  # all different: every caption has one right image
        drawn = [draw(scene, rng) for scene in scenes]
        pixels = torch.stack([preprocess(image) for image, _ in drawn])
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        priority = torch.rand(self.batch_size, 14, 14, generator=generator)
        for grid, (_, (x0, y0, x1, y1)) in zip(priority, drawn, strict=True):
            grid[int(y0 * 14) : math.ceil(y1 * 14), int(x0 * 14) : math.ceil(x1 * 14)] += 1
        words = tokenize([scene.caption(rng.choice(TEMPLATES)) for scene in scenes])
        return pixels, words, priority.flatten(1)


class TinyCLIP(nn.Module):
    """Vision encoder, text encoder and a temperature; each encoder gives unit vectors of 128."""

    def __init__(self):
        super().__init__()
        self.vision = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6,
            image_size=224, patch_size=16, hidden_act="gelu", attn_implementation="eager",
        ))  # fmt: skip
        self.text = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(WORD_ID), hidden_size=128, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=CONTEXT, hidden_act="gelu",
            pad_token_id=WORD_ID["<pad>"], bos_token_id=None, eos_token_id=WORD_ID["<end>"],
        ))  # fmt: skip
        self.vision_projection = nn.Linear(192, 128, bias=False)
        self.text_projection = nn.Linear(128, 128, bias=False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_images(self, pixels: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """uint8 pixels [B, 3, 224, 224] -> unit vectors [B, 128]; `keep` [B, K] names the patches to encode."""
        vision = getattr(self.vision, "vision_model", self.vision)
        tokens = vision.embeddings(normalize(pixels))  # [B, 197, 192]
        if keep is not None:
            index = torch.cat([keep.new_zeros(len(keep), 1), keep + 1], dim=1)  # the class token always stays
            tokens = tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        tokens = vision.encoder(inputs_embeds=vision.pre_layrnorm(tokens)).last_hidden_state
        return F.normalize(self.vision_projection(vision.post_layernorm(tokens.mean(1))).float(), dim=-1)

    def encode_captions(self, words: torch.Tensor) -> torch.Tensor:
        """word ids [B, CONTEXT] -> unit vectors [B, 128]."""
        return F.normalize(self.text_projection(self.text(words).pooler_output).float(), dim=-1)


def contrastive_loss(images: torch.Tensor, captions: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE over a batch of unit vectors [B, D]: row i of one belongs to row i of the other."""
    logits = scale * images @ captions.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def zero_shot(model: TinyCLIP, count: int = 2048) -> dict[str, float]:
    """Fraction of newly drawn images whose best caption of all 2,592 names each attribute rightly."""
    captions = model.encode_captions(tokenize([scene.caption(TEMPLATES[0]) for scene in ALL_SCENES]))
    rng = random.Random(10**6)
    right = dict.fromkeys(("size", "colour", "shape", "place"), 0)
    for _ in range(count // 128):
        scenes = rng.choices(ALL_SCENES, k=128)
        pixels = torch.stack([preprocess(draw(scene, rng)[0]) for scene in scenes])
        best = (model.encode_images(pixels) @ captions.T).argmax(1).tolist()
        for scene, guess in zip(scenes, best, strict=True):
            for name in right:
                right[name] += getattr(scene, name) == getattr(ALL_SCENES[guess], name)
    return {name: n / count for name, n in right.items()}


def save(model: TinyCLIP, folder: Path) -> None:
    """Writes the vision half as a transformers folder, in fp16."""
    save_vision_encoder(model.vision.half(), folder)
    CLIPImageProcessorPil().save_pretrained(folder)


def main() -> None:
    """Trains, prints the zero-shot figures and saves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch_size", type=int, default=192)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--save_dir", type=Path, default=FOLDER)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = TinyCLIP()
    print(f"vision encoder: {sum(p.numel() for p in model.vision.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
                                  lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)  # fmt: skip
    loader = DataLoader(DrawnBatches(args.steps, args.batch_size, args.seed), batch_size=None, num_workers=1,
                        prefetch_factor=4)  # fmt: skip
    for step, (pixels, words, priority) in enumerate(loader, start=1):
        warmup, progress = min(1.0, step / 100), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warmup * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))
        keep = priority.topk(PATCHES).indices if progress <= 0.9 else None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images, captions = model.encode_images(pixels, keep), model.encode_captions(words)
        loss = contrastive_loss(images, captions, model.log_temperature.exp().clamp(max=100))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}/{args.steps} loss {loss.item():.3f}", flush=True)
    print("zero-shot on 2,048 new images:", zero_shot(model))
    save(model, args.save_dir)
    print(f"saved to {args.save_dir}")


if __name__ == "__main__":
    main()
