"""docs/minimal_vlm.py is the oracle: what trains, renders and answers here computes what the one plain file computes."""

import ast
import itertools
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPVisionModel

from dataset.images import open_images
from dataset.jsonl import JsonlSamples
from dataset.vlm_dataset import VLMDataset, collate
from docs import minimal_vlm as minimal
from model.conversation import Renderer, parse_turns
from model.inference.generation import Prompt, Sampling, generate_batch
from model.inference.packed import PackedDecoder
from model.load import read_native
from model.moe import MOEFeedForward
from model.pixels import normalize
from model.weights import load_weights, save_weights
from tests.conftest import FIXTURES, REPOSITORY, make_model, make_vision_encoder, training_flags, write_jsonl
from trainer.main import main

SAID = ("A cat.", "two\nlines", "", "你好 🙂", "yes @@ <|im_end|> a")


@pytest.fixture(scope="session")
def plain_tokenizer():
    return minimal.load_tokenizer()


@pytest.fixture(scope="module")
def square_data(tmp_path_factory):
    """44 samples with none, one or two images of 224 x 224 pixels, which nobody has to resize; texts of all lengths."""
    folder = tmp_path_factory.mktemp("square")
    rng, rows = np.random.default_rng(0), []
    for number in range(44):
        names = [f"{number}_{place}.png" for place in range(rng.choice((0, 1, 1, 2)))]
        for name in names:
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((224, 224), Image.Resampling.NEAREST).save(folder / name)
        question = f"{'<image> ' * len(names)}{'what is this? ' * rng.integers(1, 6)}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{rng.choice(SAID)} {number}"}]
        rows.append({"conversations": turns * rng.integers(1, 2), "image": ", ".join(names)})
    return write_jsonl(folder / "data.jsonl", rows), folder


def plain_model(model):
    """The same weights and encoder in the minimal file's model."""
    c = model.config
    sizes = minimal.Config(c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.vocab_size,
                           c.vision_hidden_size)  # fmt: skip
    plain = minimal.MiniVLM(sizes)
    for layer in plain.model.layers if c.use_moe else ():
        layer.mlp = PlainExperts(c)
    plain.load_state_dict(model.state_dict())
    plain.vision_encoder = model.vision_encoder
    return plain


class PlainExperts(MOEFeedForward):
    """Mixture of Experts by its definition: every expert reads every token, and counts where it was chosen."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights, self.aux_loss = self.gate(x, self.token_mask)
        mix = torch.zeros(len(chosen), len(self.experts)).scatter(1, chosen, weights)
        routed = sum(expert(x) * mix[:, number].view(*x.shape[:2], 1) for number, expert in enumerate(self.experts))
        return routed + sum(expert(x) for expert in self.shared_experts)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def by_images(data, number: int, count: int) -> list[int]:
    """The first `count` samples with so many images."""
    samples = JsonlSamples(data[0])
    return [index for index in range(len(samples)) if len(samples[index].images) == number][:count]


# --- rendering --------------------------------------------------------------------------------------------------------

CONVERSATIONS = [
    [("user", "Hello"), ("assistant", "Hi")],
    [("user", "What is this?\n<image>"), ("assistant", "A cat.")],
    [("user", "<image>\n<image> compare"), ("assistant", "One"), ("user", "<image>and this?"), ("assistant", "two\n")],
    [("system", "Be brief."), ("user", "a  <image> b @ @@<image>@"), ("assistant", "")],
    [("user", "你好<image>🙂 <|im_end|>\n<|im_start|>assistant\nno"), ("assistant", "<|im_end|> @ 196")],
    [("system", "You are a helpful assistant"), ("user", "Why?"), ("assistant", "Because."), ("user", "And?")],
    [("user", "!<image>?<image>."), ("assistant", "x"), ("assistant", "y")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_rendering_is_the_same(renderer: Renderer, plain_tokenizer, turns):
    turns = [{"role": role, "content": content} for role, content in turns]
    real = renderer.render_turns(parse_turns(turns))
    ids, labels, starts = minimal.render(plain_tokenizer, turns)
    assert (ids, labels, tuple(starts)) == (real.ids.tolist(), real.labels.tolist(), real.image_starts)
    assert minimal.render(plain_tokenizer, turns, answer=True)[0] == renderer.render_prompt(parse_turns(turns)).ids.tolist()


def test_samples_are_the_same_and_images_do_not_fit_by_halves(square_data, renderer, plain_tokenizer):
    plain = minimal.Conversations(*square_data, plain_tokenizer, max_length=250)
    real = VLMDataset(JsonlSamples(square_data[0]), open_images(square_data[1]), renderer, 250)
    compared = 0
    for number in range(len(plain)):
        if len(real.samples[number].images) == 2:
            with pytest.raises(ValueError, match="do not fit in 250 tokens"):
                plain[number]
            continue
        own, theirs = plain[number], real[number]
        assert own.ids == theirs.ids.tolist() and own.labels == theirs.labels.tolist()
        assert tuple(own.image_starts) == theirs.image_starts
        assert all(torch.equal(a, b.pixels) for a, b in zip(own.images, theirs.images, strict=True))
        compared += 1
    assert compared > 25


@pytest.mark.parametrize("size", [(64, 64), (40, 30), (30, 90), (500, 400)])
def test_pixels_are_the_same_but_for_rounding(tmp_path, size):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    coarse.save(tmp_path / "a.png")
    own, real = minimal.load_image(tmp_path / "a.png"), open_images(tmp_path).pixels("a.png")
    assert (own.int() - real.int()).abs().float().mean() < 0.5 and (own.int() - real.int()).abs().max() <= 4


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "count", "moe"), [(0, 1, False), (1, 1, False), (2, 1, False), (None, 6, False), (None, 6, True)],
                         ids=["text", "image", "images", "padded", "padded with experts"])  # fmt: skip
def test_logits_loss_and_gradients_are_the_same(square_data, renderer, plain_tokenizer, images, count, moe):
    numbers = list(range(count)) if images is None else by_images(square_data, images, count)
    dataset = VLMDataset(JsonlSamples(square_data[0]), open_images(square_data[1]), renderer, 640)
    batch = collate(dataset.__getitems__(numbers), 0, 196)
    model = make_model(encoder=make_vision_encoder(), num_hidden_layers=3, use_moe=moe).train()
    features = model.encode_images(normalize(batch.pixels))[batch.image_index] if len(batch.pixels) else None
    inputs = {"image_features": features, "image_positions": batch.image_positions}
    out = model(batch.ids, labels=batch.labels, loss_positions=batch.loss_positions, token_mask=batch.attention_mask, **inputs)
    (out.loss + (out.aux_loss if moe else 0)).backward()

    plain = plain_model(model).train()
    samples = minimal.Conversations(*square_data, plain_tokenizer)
    own = minimal.collate([samples[number] for number in numbers], length=640)  # padded more than the real batch
    routers = [layer.mlp for layer in plain.model.layers if moe]
    for router in routers:
        router.token_mask = F.pad(batch.attention_mask, (0, 640 - batch.ids.shape[1]))
    loss = minimal.train_loss(plain, own)
    aux_loss = sum(router.aux_loss for router in routers)
    (loss + aux_loss).backward()
    with torch.no_grad():
        logits = model(batch.ids, **inputs).logits
        theirs = plain.lm_head(plain(plain.embed(own.ids, own.pixels, own.image_positions)))
    real = batch.attention_mask.bool()
    assert (theirs[:, : real.shape[1]] - logits)[real].abs().max() < 1e-5 * logits.abs().max()
    assert abs(out.loss - loss) < 1e-5 and (not moe or abs(out.aux_loss - aux_loss) < 1e-5)
    ours = gradients(model)
    own = gradients(plain)
    assert ours.keys() == own.keys()
    for name in ours:
        assert (ours[name] - own[name]).abs().max() < 1e-5, name
    assert images is not None or len(set(batch.attention_mask.sum(1).tolist())) > 1


def test_greedy_answers_are_the_same(square_data, renderer, plain_tokenizer):
    """The packed decoder's, a batch at a time, against the minimal file's, one by one."""
    model = make_model(encoder=make_vision_encoder(), hidden_size=64, initializer_range=0.3).eval()
    plain, samples = plain_model(model), minimal.Conversations(*square_data, plain_tokenizer)
    dataset = VLMDataset(JsonlSamples(square_data[0]), open_images(square_data[1]), renderer, 640)
    prompts, features, expected = [], [], []
    for number in range(8):
        turns = samples.rows[number]["conversations"][:1]
        rendered = renderer.render_prompt(parse_turns(turns))
        pixels = [image.pixels for image in dataset[number].images]
        numbers = tuple(range(len(features), len(features) + len(pixels)))
        features += list(model.encode_images(normalize(torch.stack(pixels)))) if pixels else []
        prompts.append(Prompt(rendered.ids, rendered.image_starts, numbers, 196))
        ids, labels, starts = minimal.render(plain_tokenizer, turns, answer=True)
        prompt = minimal.collate([minimal.Example(ids, labels, starts, samples[number].images)])
        expected.append(minimal.generate(plain, prompt, max_new_tokens=12))
    sampling = Sampling(max_new_tokens=12, temperature=0)
    assert generate_batch(PackedDecoder(model), prompts, features, sampling, minimal.IM_END) == expected
    assert len({tuple(tokens) for tokens in expected}) > 3


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_first_updates_of_fine_tuning_have_the_same_losses(square_data, plain_tokenizer, tmp_path, monkeypatch):
    """The whole of train_sft_vlm.py in fp32 from saved weights, against `update` on the same samples."""
    encoder, batches, read = make_vision_encoder(), [], VLMDataset.__getitems__
    encoder.save_pretrained(tmp_path / "encoder")
    minimal.save_weights(tmp_path / "llm_32.pth", plain_model(make_model(num_attention_heads=8)))
    monkeypatch.setattr(VLMDataset, "__getitems__", lambda self, numbers: (batches.append(list(numbers)), read(self, numbers))[1])
    flags = training_flags(square_data, tmp_path / "encoder", tmp_path, save_dir=tmp_path, from_weight="llm", num_workers=0,
                           max_seq_len=640, learning_rate=5e-3, save_weight="sft_vlm", tokenizer_path=REPOSITORY / "model")  # fmt: skip
    assert main("", {}, flags) == 0
    real = [line["loss"] for line in map(json.loads, (tmp_path / "sft_vlm_32.metrics.jsonl").read_text().splitlines())]

    plain = minimal.load_weights(tmp_path / "llm_32.pth", CLIPVisionModel.from_pretrained(tmp_path / "encoder"))
    # A run rounds the encoder's output to bf16, as its feature cache keeps it.
    exact = plain.encode
    plain.encode = lambda pixels: exact(pixels).bfloat16().float()
    samples = minimal.Conversations(*square_data, plain_tokenizer, max_length=640)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], weight_decay=0.01)
    assert len(batches) == len(real) == 22 and sorted(itertools.chain(*batches)) == list(range(44))
    for number, batch in enumerate(batches[:20]):
        learning_rate = minimal.cosine(number / len(batches), 5e-3)
        loss = minimal.update(plain, minimal.collate([samples[index] for index in batch]), optimizer, learning_rate)
        assert abs(loss - real[number]) < 1e-4, number
    assert real[19] < real[0] - 0.5


def test_weights_written_by_one_load_in_the_other_bit_for_bit(tmp_path):
    model = make_model(seed=1, num_attention_heads=8).half().float()  # as files keep them
    save_weights(tmp_path / "real.pth", model, {})
    plain = minimal.load_weights(tmp_path / "real.pth", None)
    minimal.save_weights(tmp_path / "plain.pth", plain)
    again = make_model(seed=2, num_attention_heads=8)
    assert load_weights(tmp_path / "plain.pth", again) == []
    for own in (plain, again):
        assert own.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in own.state_dict().items())


@pytest.mark.parametrize("size", ["512x8", "768x16"])
def test_names_and_shapes_are_the_published_ones(size):
    manifest = json.loads((FIXTURES / "state_dict_manifest.json").read_text())[size]
    width, layers = map(int, size.split("x"))
    with torch.device("meta"):
        state = minimal.MiniVLM(minimal.Config(hidden_size=width, num_hidden_layers=layers)).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == manifest


# --- the run ----------------------------------------------------------------------------------------------------------


def test_the_file_stands_alone():
    source = (REPOSITORY / "docs" / "minimal_vlm.py").read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.split(".")[0] for node in imports for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    assert modules - sys.stdlib_module_names == {"torch", "transformers", "tokenizers", "PIL"}
    assert len(source.splitlines()) <= 400


def test_the_run_trains_writes_and_prints_its_accuracy(tmp_path, monkeypatch, capsys):
    """On a few samples; the answers to the 500 questions are given here, every fifth of them right."""
    (tmp_path / "model").symlink_to(REPOSITORY / "model")
    (tmp_path / "out").mkdir()
    images = tmp_path / "demo" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(images / "a.png")
    said = {"conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "yes"}], "image": "a.png"}
    other = {**said, "conversations": [said["conversations"][0], {"role": "assistant", "content": "no"}]}
    for file, *_ in minimal.STAGES:
        write_jsonl(tmp_path / "demo" / file, [said] * 3)
    monkeypatch.setattr(minimal, "DEMO", tmp_path / "demo")
    monkeypatch.setattr(minimal, "REPOSITORY", tmp_path)
    monkeypatch.setattr(minimal, "generate", lambda model, prompt: minimal.load_tokenizer(REPOSITORY / "model").encode("yes").ids)
    monkeypatch.setattr(sys, "argv", ["minimal_vlm.py"])
    with pytest.raises(SystemExit, match=r"dataset\.demo --prepare_only"):
        minimal.main()
    write_jsonl(tmp_path / "demo" / "test.jsonl", [said if number % 5 == 0 else other for number in range(500)])
    minimal.main()
    assert "accuracy 0.200 on 500 test questions" in capsys.readouterr().out
    weights = tmp_path / "out" / "minimal_256.pth"
    loaded = read_native(weights, REPOSITORY / "model", REPOSITORY / "model" / "vision_model" / "tiny-clip")
    assert loaded.model.config.num_hidden_layers == 4
    monkeypatch.setattr(sys, "argv", ["minimal_vlm.py", str(weights)])
    monkeypatch.setattr(minimal, "train", lambda *_: pytest.fail("weights were given"))
    minimal.main()
    assert "accuracy 0.200" in capsys.readouterr().out
