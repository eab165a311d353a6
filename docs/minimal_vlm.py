"""A vision-language model in one file: what this repository does, without anything that makes it fast or safe.

    python -m dataset.demo --prepare_only             # once: 5,000 images of coloured shapes, and questions about them
    python docs/minimal_vlm.py                        # three stages into out/minimal_256.pth, 500 held-out questions
    python docs/minimal_vlm.py out/sft_vlm_256.pth    # the questions alone, here to what the real scripts trained

Read it from top to bottom. The idea (LLaVA, arXiv 2304.08485): a language model reads vectors and does not care where
they come from, so an image may enter as vectors in the places of words.

Legend of shapes, for all comments below:
    B rows of a batch     T tokens of a row            D width of the decoder        V = 6400 tokens of the vocabulary
    H query heads         G key/value heads            d = D / H, width of a head
    N images of a batch   P = 196 patches of an image  W width of the vision encoder
"""

import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPVisionModel

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "dataset" / "demo"

# ---- 1. The language model -------------------------------------------------------------------------------------------
# A decoder-only transformer (arXiv 1706.03762) of the Llama family: it reads tokens and scores every possible next one.


@dataclass
class Config:
    """The published 26M model; the demo's is half as wide and half as deep."""

    hidden_size: int = 512  # D
    num_hidden_layers: int = 8
    num_attention_heads: int = 8  # H
    num_key_value_heads: int = 2  # G
    vocab_size: int = 6400  # V
    vision_hidden_size: int = 768  # W
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6


class RMSNorm(nn.Module):
    """Each vector divided by its root mean square, then scaled channel by channel (arXiv 1910.07467). However large the
    sum of many layers' outputs has grown, every layer reads numbers of the same size: training stays stable."""

    def __init__(self, config: Config):
        super().__init__()
        self.eps, self.weight = config.rms_norm_eps, nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate(x: torch.Tensor, start: int, theta: float) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) for x [B, heads, T, d], whose first token is number `start` of its row.
    Channels i and i + d/2 are a point in a plane, which position p turns by p * theta^(-2i/d). A dot product of two
    turned vectors depends on the difference of their angles alone, so attention learns "three tokens back" rather than
    "token 57". The first pair turns once in six tokens, the last once in millions: near and far can be told apart."""
    T, d = x.shape[2:]
    speed = 1 / theta ** (torch.arange(0, d, 2, device=x.device) / d)  # [d/2], radians a token
    angle = torch.outer(torch.arange(start, start + T, device=x.device), speed)  # [T, d/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Where tokens exchange information: each looks back at all before it and takes a weighted mean of what they offer.
    Grouped queries (arXiv 2305.13245): H/G heads share a key and a value, which makes their cache H/G times smaller."""

    def __init__(self, config: Config):
        super().__init__()
        self.H, self.G, self.theta = config.num_attention_heads, config.num_key_value_heads, config.rope_theta
        D = config.hidden_size
        self.q_proj = nn.Linear(D, D, bias=False)  # what am I looking for?
        self.k_proj = nn.Linear(D, D // self.H * self.G, bias=False)  # what can I be found by?
        self.v_proj = nn.Linear(D, D // self.H * self.G, bias=False)  # what do I tell those who look at me?
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: torch.Tensor, cache: dict) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]. `cache` holds keys and values of the tokens before x, and afterwards of x, too."""
        B, T, D = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.view(B, T, -1, D // self.H).transpose(1, 2) for y in (q, k, v))  # [B, H or G, T, d]
        past = cache["k"].shape[2] if cache else 0
        q, k = rotate(q, past, self.theta), rotate(k, past, self.theta)
        if past:
            k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
        cache.update(k=k, v=v)
        k, v = (y.repeat_interleave(self.H // self.G, dim=1) for y in (k, v))  # [B, H, past + T, d]
        # softmax(q k^T / sqrt(d)) v. In training all next tokens of a row are predicted at once, and none may see its
        # answer: token i looks at tokens 0..i (causal). A single token after a cache may look at everything.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """Where each token is transformed by itself: SwiGLU (arXiv 2002.05202), two wide layers, one scaling the other.
    Three matrices of width 8/3 D cost what the classic two of 4 D do; multiples of 64 suit the hardware."""

    def __init__(self, config: Config):
        super().__init__()
        D, width = config.hidden_size, 64 * math.ceil(config.hidden_size * 8 / 3 / 64)
        self.gate_proj, self.up_proj = nn.Linear(D, width, bias=False), nn.Linear(D, width, bias=False)
        self.down_proj = nn.Linear(width, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then feed-forward. Both add to x (residual connections, arXiv 1512.03385), so gradients pass."""

    def __init__(self, config: Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), FeedForward(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config), RMSNorm(config)

    def forward(self, x: torch.Tensor, cache: dict) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- 2. The vision-language model ------------------------------------------------------------------------------------
# A vision transformer (arXiv 2010.11929) cuts 224 x 224 pixels into 14 x 14 patches of 16 x 16: P = 196 vectors, which
# look at one another as tokens do. CLIP's (arXiv 2103.00020) learned which caption belongs to which image, so it sees
# what people speak of. The demo's, tiny-clip, learned the same in small, from drawings of shapes: it comes pretrained.

IMAGE_SIZE, IMAGE_TOKENS = 224, 196
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of R, G, B


def load_image(path: Path) -> torch.Tensor:
    """The middle square of an image file, resized: pixels uint8 [3, 224, 224]."""
    image = ImageOps.fit(Image.open(path).convert("RGB"), (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*image.size, 3).permute(2, 0, 1)


class MiniVLM(nn.Module):
    """Vision encoder, projector, decoder and output head. The nesting serves only the published weights' names."""

    def __init__(self, config: Config, vision_encoder: CLIPVisionModel | None = None):
        super().__init__()
        D = config.hidden_size
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(config.vocab_size, D)})
        self.model["layers"] = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight  # read and write by one matrix (arXiv 1608.05859)
        self.vision_proj = nn.ModuleDict({"vision_proj": nn.Sequential(nn.Linear(config.vision_hidden_size, D))})
        for matrix in (parameter for parameter in self.parameters() if parameter.ndim == 2):
            nn.init.normal_(matrix, std=D**-0.5)  # a sum of D products with numbers near 1 is near 1 again
        self.vision_encoder = vision_encoder

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, 224, 224] -> patch vectors [N, P, W]. Frozen: CLIP saw more images than we could show it."""
        if len(pixels) == 0:  # text only
            return torch.zeros(0, IMAGE_TOKENS, self.vision_proj.vision_proj[0].in_features, device=pixels.device)
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return self.vision_encoder(pixel_values=(pixels / 255 - mean) / std).last_hidden_state[:, 1:]  # no class token

    def embed(self, ids: torch.Tensor, pixels: torch.Tensor, image_positions: torch.Tensor) -> torch.Tensor:
        """ids [B, T], images, their positions (int64 [N * P], indices into B * T) -> what the decoder reads [B, T, D].
        Here a language model becomes a vision-language model: patch vectors replace the placeholders' embeddings."""
        x = self.model.embed_tokens(ids)
        projected = self.vision_proj.vision_proj(self.encode(pixels))  # [N, P, D]
        return x.flatten(0, 1).index_copy(0, image_positions, projected.flatten(0, 1)).view_as(x)

    def forward(self, x: torch.Tensor, caches: list[dict] | None = None) -> torch.Tensor:
        """[B, T, D] -> [B, T, D], of which `lm_head` makes logits [B, T, V]. `caches`: one for each block."""
        for number, layer in enumerate(self.model.layers):
            x = layer(x, caches[number] if caches else {})
        return self.model.norm(x)


def save_weights(path: Path, model: MiniVLM) -> None:
    """Writes the weights in fp16, without the vision encoder's, which nobody changed."""
    state = model.state_dict()
    torch.save({name: state[name].half() for name in state if not name.startswith("vision_encoder.")}, path)


def load_weights(path: Path, vision_encoder: CLIPVisionModel | None) -> MiniVLM:
    """The model in a weight file; the shapes tell its sizes."""
    state = torch.load(path, weights_only=True)
    (V, D), (_, W) = state["model.embed_tokens.weight"].shape, state["vision_proj.vision_proj.0.weight"].shape
    layers = sum(name.endswith("input_layernorm.weight") for name in state)
    model = MiniVLM(Config(hidden_size=D, num_hidden_layers=layers, vocab_size=V, vision_hidden_size=W))
    model.load_state_dict(state)  # strict: without some of its weights it would still answer, only badly
    model.vision_encoder = vision_encoder
    return model


# ---- 3. From conversations to numbers --------------------------------------------------------------------------------
# A line {"conversations": [{"role": "user", "content": "What is this?\n<image>"}, ...], "image": "cat.jpg"} of the data
# is written as ChatML, <image> as 196 placeholders. Loss is on what the assistant says, which it is to learn:
#   <|im_start|>system\nYou are a helpful assistant<|im_end|>\n
#   <|im_start|>user\nWhat is this?\n@@@...@<|im_end|>\n
#   <|im_start|>assistant\nA cat.<|im_end|>\n                 <- "A cat.<|im_end|>\n" has labels, nothing else

PAD, IM_START, IM_END, PLACEHOLDER = 0, 1, 2, 34  # ids in model/tokenizer.json; the placeholder is "@"
IGNORE = -100  # the label of a token without loss


def load_tokenizer(folder: Path = REPOSITORY / "model") -> Tokenizer:
    """Byte-level BPE (arXiv 1508.07909). "<|im_end|>" in somebody's message stays text and ends no turn."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text with 196 placeholders for each "<image>", and the index of each image's first. "a<image>b" becomes
    "a@b": the token at character 1 is the image (no token has "@" and more in it); any other "@" is somebody's text."""
    parts = text.split("<image>")
    begins = {len("@".join(parts[:number])) for number in range(1, len(parts))}  # for "a<image>b": {1}
    encoding, ids, starts = tokenizer.encode("@".join(parts)), [], []
    for token, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True):
        starts += [len(ids)] if begin in begins else []
        ids += [PLACEHOLDER] * IMAGE_TOKENS if begin in begins else [token]
    return ids, starts


def render(tokenizer: Tokenizer, turns: list[dict], answer: bool = False) -> tuple[list[int], list[int], list[int]]:
    """A conversation as ids [T], labels [T] and its images' starts; with `answer`, opened for the assistant's next."""
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": "You are a helpful assistant"}, *turns]
    newline, header = tokenizer.encode("\n").ids, [IM_START, *tokenizer.encode("assistant\n").ids]
    ids, labels, starts = [], [], []
    for turn in turns:
        if turn["role"] == "assistant":  # header and answer are tokenized apart, as in generation
            said = [*tokenizer.encode(turn["content"]).ids, IM_END, *newline]
            ids += header + said
            labels += [IGNORE] * len(header) + said
        else:
            read, found = encode_text(tokenizer, f"{turn['role']}\n{turn['content']}")
            starts += [len(ids) + 1 + start for start in found]
            ids += [IM_START, *read, IM_END, *newline]
            labels += [IGNORE] * (len(ids) - len(labels))
    return (ids + header if answer else ids), labels, starts


@dataclass
class Example:  # one conversation in numbers
    ids: list[int]
    labels: list[int]  # equal to ids where there is loss, else IGNORE
    image_starts: list[int]
    images: list[torch.Tensor]  # uint8 [3, 224, 224] each


class Conversations(Dataset):
    """The Examples of a jsonl file (or its first `most`), cut to `max_length` tokens, each made when it is asked for."""

    def __init__(self, path: Path, image_folder: Path, tokenizer: Tokenizer, max_length: int = 1536, most: int | None = None):
        self.rows = [json.loads(line) for line in path.read_bytes().splitlines()[:most]]
        self.image_folder, self.tokenizer, self.max_length = image_folder, tokenizer, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        ids, labels, starts = render(self.tokenizer, row["conversations"])
        if starts and starts[-1] + IMAGE_TOKENS > self.max_length:  # half an image is none
            raise ValueError(f"sample {index}: its images do not fit in {self.max_length} tokens")
        names = row["image"].split(",") if row.get("image") else []
        images = [load_image(self.image_folder / name.strip()) for name in names]
        return Example(ids[: self.max_length], labels[: self.max_length], starts, images)


@dataclass
class Batch:
    """Rows filled up on the right. The images of all rows lie flat one after another: a row may have any number.
    Nothing needs to mask the padding: no token looks to its right, and padding has no labels."""

    ids: torch.Tensor  # int64 [B, T]
    labels: torch.Tensor  # int64 [B, T]
    pixels: torch.Tensor  # uint8 [N, 3, 224, 224]
    image_positions: torch.Tensor  # int64 [N * P], indices into B * T


def collate(examples: list[Example], length: int | None = None, device: str = "cpu") -> Batch:
    """Examples as a Batch with rows of `length` tokens, by default as many as the longest has."""
    T = length or max(len(example.ids) for example in examples)
    starts = [row * T + start for row, example in enumerate(examples) for start in example.image_starts]
    pixels = [image for example in examples for image in example.images]
    return Batch(
        torch.tensor([example.ids + [PAD] * (T - len(example.ids)) for example in examples], device=device),
        torch.tensor([example.labels + [IGNORE] * (T - len(example.labels)) for example in examples], device=device),
        (torch.stack(pixels) if pixels else torch.empty(0, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)).to(device),
        (torch.tensor(starts, dtype=torch.int64)[:, None] + torch.arange(IMAGE_TOKENS)).flatten().to(device),
    )


# ---- 4. Training -----------------------------------------------------------------------------------------------------


def train_loss(model: MiniVLM, batch: Batch) -> torch.Tensor:
    """Mean of -log p(the token that comes) over all tokens with a label. With all V tokens equally likely it is
    ln 6400 = 8.76; random weights, whose scores vary, begin at about 9.3. If it stays there, nothing is learned."""
    hidden = model(model.embed(batch.ids, batch.pixels, batch.image_positions))
    targets = batch.labels[:, 1:]  # position t predicts token t + 1
    supervised = targets != IGNORE  # the head is the largest matrix; it runs only where there is something to learn
    return F.cross_entropy(model.lm_head(hidden[:, :-1][supervised]), targets[supervised])


def cosine(done: float, peak: float) -> float:
    """The learning rate (arXiv 1608.03983) after a fraction `done` of all updates: from `peak` to a tenth of it."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def update(model: MiniVLM, batch: Batch, optimizer: torch.optim.Optimizer, learning_rate: float) -> float:
    """One step of training; returns the loss before it."""
    optimizer.param_groups[0]["lr"] = learning_rate
    loss = train_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # clipped: one odd batch moves little
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# Each stage learns one thing from what works already. First the language model, on text: to read a description and to
# answer ("a blue circle\nis it red?" "no"). Then the projector alone, on captions: the decoder can talk, so loss falls
# only when patch vectors mean "blue" and "circle" to it, and untrained noise does not unsettle it. Then everything.
STAGES = (  # file, samples at most, samples a batch, peak of the learning rate, whether the projector learns alone
    ("llm.jsonl", None, 32, 1e-3, False),
    ("captions.jsonl", None, 16, 4e-3, True),
    ("sft.jsonl", 4000, 16, 5e-4, False),  # without speed-ups, ten minutes do not suffice for all 7,400
)


def train(model: MiniVLM, data: Dataset, batch_size: int, learning_rate: float, projector_only: bool, device: str):
    """One epoch, by AdamW (arXiv 1711.05101), which scales a weight's step by the size of its recent gradients."""
    model.requires_grad_(not projector_only)
    model.vision_proj.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)  # skips what gets no gradient
    loader = DataLoader(data, batch_size, shuffle=True, collate_fn=lambda examples: collate(examples, device=device))
    for done, batch in enumerate(loader):
        loss = update(model, batch, optimizer, cosine(done / len(loader), learning_rate))
        if done % 50 == 0 or done == len(loader) - 1:
            print(f"update {done + 1} of {len(loader)}, loss {loss:.3f}", flush=True)


# ---- 5. Answering, and the whole run ---------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: MiniVLM, prompt: Batch, max_new_tokens: int = 64, stop: int | None = IM_END) -> list[int]:
    """The tokens that follow a prompt of one row, always the likeliest (greedy), up to `stop`. Keys and values of a
    token do not depend on later ones, so they are kept, and each step reads the newest token alone."""
    x = model.embed(prompt.ids, prompt.pixels, prompt.image_positions)
    caches, tokens = [{} for _ in model.model.layers], []
    while len(tokens) < max_new_tokens:
        token = model.lm_head(model(x, caches)[:, -1]).argmax(-1)  # int64 [1]
        if token.item() == stop:
            break
        tokens.append(token.item())
        x = model.model.embed_tokens(token[:, None])
    return tokens


def main() -> None:
    if not (DEMO / "test.jsonl").is_file():
        raise SystemExit(f"no data in {DEMO}. Make them first: python -m dataset.demo --prepare_only")
    torch.manual_seed(42)
    begin, device, tokenizer = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu", load_tokenizer()
    encoder = CLIPVisionModel.from_pretrained(REPOSITORY / "model" / "vision_model" / "tiny-clip", dtype=torch.float32)
    if sys.argv[1:]:
        model = load_weights(Path(sys.argv[1]), encoder).to(device)
    else:
        model = MiniVLM(Config(256, 4, vision_hidden_size=encoder.config.hidden_size), encoder).to(device)
        for file, most, *settings in STAGES:
            print(f"{file}, {time.monotonic() - begin:.0f} s")
            train(model, Conversations(DEMO / file, DEMO / "images", tokenizer, most=most), *settings, device)
        save_weights(REPOSITORY / "out" / "minimal_256.pth", model)
    test, right = Conversations(DEMO / "test.jsonl", DEMO / "images", tokenizer), 0
    for number, index in enumerate(random.Random(0).sample(range(len(test)), 500)):
        question, answer = test.rows[index]["conversations"]
        prompt = collate([Example(*render(tokenizer, [question], answer=True), test[index].images)], device=device)
        said = tokenizer.decode(generate(model, prompt))
        right += said == answer["content"]
        if number < 8:
            print(f"{test.rows[index]['image']}: {question['content']!r} -> {said!r}, expected {answer['content']!r}")
    print(f"accuracy {right / 500:.3f} on 500 test questions, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
