"""The way of one sample: a line of jsonl becomes tokens and labels, its picture becomes patch vectors, both become a loss.

The sample is run for this: tokens, labels, places and shapes are those of the code that trains.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.patches import Rectangle
from PIL import Image

from dataset.images import load_image
from dataset.vlm_dataset import parse_sample
from model.conversation import Rendered, Renderer, load_tokenizer
from model.inference.attention_map import pixels_to_image
from model.model_minimind import IGNORE_INDEX, find_loss_positions
from model.storage import REPOSITORY
from model.vision import normalize, preprocess

from .canvas import FROZEN, LOSS, PICTURE, TEXT, Canvas
from .structure import build

QUESTION, ANSWER = "What is this?\n<image>", "A cat."


@dataclass(frozen=True)
class Journey:
    """What became of a sample on its way; the shapes by the names of what has them."""

    rendered: Rendered
    texts: list[str]  # of the tokens
    shapes: dict[str, tuple[int, ...]]


def travel(row: dict, picture: Image.Image, hidden_size: int, num_hidden_layers: int) -> Journey:
    """Sends one jsonl row through renderer, tower, projector and decoder, all with fresh weights."""
    tokenizer = load_tokenizer(str(REPOSITORY / "model"))
    rendered = Renderer(tokenizer).render(parse_sample(row))
    model = build(hidden_size, num_hidden_layers).eval()
    ids, labels = (torch.from_numpy(array)[None] for array in (rendered.ids, rendered.labels))
    places = torch.cat([torch.arange(model.config.image_tokens) + start for start in rendered.image_starts])
    with torch.no_grad():
        pixels = normalize(preprocess(picture)[None])
        features = model.encode_images(pixels)
        embedded = model.embed(ids, image_features=features, image_positions=places)
        hidden_states = model.model(inputs_embeds=embedded).last_hidden_state
        logits = model(inputs_embeds=embedded, labels=labels, loss_positions=find_loss_positions(labels)).logits
    tensors = {"ids": ids, "labels": labels, "pixels": pixels, "features": features, "projected": model.vision_proj(features),
               "embedded": embedded, "hidden": hidden_states, "logits": logits}  # fmt: skip
    return Journey(rendered, [tokenizer.decode([token]) for token in rendered.ids],
                   {name: tuple(tensor.shape) for name, tensor in tensors.items()})  # fmt: skip


def draw_sample(path: Path, file: Path, hidden_size: int, num_hidden_layers: int) -> None:
    """The way of a question about the picture in `file`, from top to bottom.

    Raises SampleError when the file is no picture, and UsageError for sizes that cannot work.
    """
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    row, picture = {"conversations": turns, "image": file.name}, load_image(file, str(file))
    journey = travel(row, picture, hidden_size, num_hidden_layers)
    canvas = Canvas(1000, 832)
    _draw_line(canvas, row)
    _draw_tokens(canvas, journey, 667)
    _draw_picture(canvas, journey, picture)
    _draw_sequence(canvas, journey)
    _draw_loss(canvas, journey, num_hidden_layers)
    canvas.save(path)


def _title(canvas: Canvas, y: float, words: str, where: str) -> None:
    """The heading of a step, and the file that does it."""
    canvas.text(20, y, words, 10.5, ha="left", weight="bold")
    canvas.text(980, y, where, 9, ha="right", family="monospace", color="#5a6672")


def _draw_line(canvas: Canvas, row: dict) -> None:
    """The sample as it lies in its file."""
    _title(canvas, 818, "A line of a jsonl file", "dataset/jsonl.py")
    canvas.box(20, 750, 960, 54)
    first, second = (json.dumps(turn) for turn in row["conversations"])
    for y, words in ((790, f'{{"conversations": [{first},'), (763, f'  {second}], "image": "{row["image"]}"}}')):
        canvas.text(34, y, words, 9.5, ha="left", family="monospace")


def _draw_tokens(canvas: Canvas, journey: Journey, top: float) -> None:
    """Every token with its text, id and label, a row a turn; the placeholders of a picture as one cell."""
    _title(canvas, 728, f"Rendered: {len(journey.rendered)} tokens, {journey.shapes['logits'][0]} of them with a label to learn",
           "model/conversation.py")  # fmt: skip
    rendered, P = journey.rendered, journey.shapes["features"][1]
    x, y = 0.0, top + 68
    for number, (token, label, text) in enumerate(zip(rendered.ids, rendered.labels, journey.texts, strict=True)):
        start = next((at for at in rendered.image_starts if at <= number < at + P), None)
        if start not in (None, number):
            continue
        if token == rendered.ids[0]:  # a turn begins
            x, y = 66, y - 68
            for line, name in enumerate(("token", "id", "label")):
                canvas.text(58, y + 40 - 17 * line, name, 8, ha="right", color="#5a6672")
        learns = label != IGNORE_INDEX
        canvas.box(x, y - 2, 68, 52, kind=PICTURE if start is not None else LOSS if learns else TEXT, linewidth=0.9)
        words = f"{text} × {P}" if start is not None else text.replace("\n", "↵").replace(" ", "·")
        canvas.text(x + 34, y + 40, words, 7.5 if len(words) > 8 else 9)
        canvas.text(x + 34, y + 23, str(token), 8)
        canvas.text(x + 34, y + 6, str(label) if learns else "–", 8, weight="bold" if learns else "normal")
        x += 70.5


def _draw_picture(canvas: Canvas, journey: Journey, picture: Image.Image) -> None:
    """Pixels to patch vectors of the decoder's width."""
    _title(canvas, 498, "The picture: a middle square, patch vectors, the decoder's width", "model/vision.py")
    shapes, seen = journey.shapes, pixels_to_image(preprocess(picture))
    canvas.picture(picture, 20, 398, 80)
    canvas.picture(seen, 200, 398, 80, grid=math.isqrt(shapes["features"][1]))
    canvas.arrow((26 + 80 * picture.width / picture.height, 438), (194, 438))
    canvas.arrow((286, 438), (418, 438))
    canvas.text(352, 450, _size(shapes["pixels"]), 9)
    canvas.box(418, 414, 150, 48, "CLIP, frozen", FROZEN)
    canvas.arrow((568, 438), (684, 438))
    canvas.text(626, 450, _size(shapes["features"]), 9)
    canvas.box(684, 414, 150, 48, "projector", PICTURE)
    canvas.arrow((834, 438), (866, 438), (866, 372))
    canvas.text(874, 406, _size(shapes["projected"]), 9, ha="left")


def _draw_sequence(canvas: Canvas, journey: Journey) -> None:
    """The embedded tokens to scale, with the picture in its place."""
    _title(canvas, 350, f"Spliced: embeddings of the tokens, patch vectors in the placeholders' places, {_size(journey.shapes['embedded'])}",
           "model/model_vlm.py")  # fmt: skip
    T, P, wide = len(journey.rendered), journey.shapes["features"][1], 960
    for number in range(T):
        in_picture = any(at <= number < at + P for at in journey.rendered.image_starts)
        kind = PICTURE if in_picture else LOSS if journey.rendered.labels[number] != IGNORE_INDEX else TEXT
        canvas.axes.add_patch(Rectangle((20 + number * wide / T, 298), wide / T, 36, facecolor=kind[0], edgecolor=kind[1], linewidth=0.5))
    for at in journey.rendered.image_starts:
        canvas.text(20 + (at + P / 2) * wide / T, 316, f"positions {at} to {at + P - 1}", 9, bbox={"facecolor": PICTURE[0], "edgecolor": "none", "pad": 3})
    canvas.arrow((500, 298), (500, 272))


def _draw_loss(canvas: Canvas, journey: Journey, num_hidden_layers: int) -> None:
    """Hidden states, logits where a label is to be predicted, and the loss."""
    shapes, rendered = journey.shapes, journey.rendered
    S, (targets,) = shapes["logits"][0], (rendered.labels != IGNORE_INDEX).nonzero()
    steps = ((226, TEXT, f"{num_hidden_layers} blocks and RMSNorm: hidden states {_size(shapes['hidden'])}"),
             (156, TEXT, f"head, only where the next token carries a label: logits {_size(shapes['logits'])}"),
             (16, LOSS, f"loss: mean cross-entropy over these {S} and all others of the update"))  # fmt: skip
    for y, kind, words in steps:
        canvas.box(20, y, 960, 46, words, kind)
    for y, file in ((249, "model/model_minimind.py"), (39, "trainer/loop.py")):
        canvas.text(970, y, file, 9, ha="right", family="monospace", color="#5a6672")
    width = 960 / S
    for number, target in enumerate(targets):
        x = 20 + number * width
        before, after = (journey.texts[at].replace("\n", "↵").replace(" ", "·") for at in (target - 1, target))
        for y in (226, 156, 86):
            canvas.arrow((x + width / 2, y), (x + width / 2, y - 24))
        canvas.box(x + 6, 86, width - 12, 46, f"after {before}\nlearn {after}", LOSS, 9.5)


def _size(shape: tuple[int, ...]) -> str:
    """(1, 231, 512) -> "1 × 231 × 512"."""
    return " × ".join(f"{size:,}" for size in shape)
