"""The processor: its ids are the renderer's, its pixels those of training, and `generate` takes them as they are."""

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, pipeline

from dataset.jsonl import parse_sample
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.convert import main as convert
from model.convert import write_folder
from model.hub.processing import MiniMindVProcessor
from model.inference.assistant import Assistant, load_assistant
from model.inference.generation import Sampling
from model.load import Loaded, read_folder
from model.pixels import normalize, preprocess
from model.weights import fingerprints
from tests.conftest import REPOSITORY, make_model, make_vision_encoder

P = 196
RED, BLUE = Image.new("RGB", (60, 40), "red"), Image.new("RGB", (30, 50), "blue")
CONVERSATIONS = {
    "an image": [{"role": "user", "content": "<image>\nWhat is it?"}],
    "several turns": [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "<image>a<image>"},
                      {"role": "assistant", "content": "\n so"}, {"role": "user", "content": "@<image>@\n 也好🙂"}],
    "text alone": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}, {"role": "user", "content": "and?"}],
    "a run of @ is text": [{"role": "user", "content": f"{'@' * 300}<image>{'@' * 196} what?"}],
}
SPECIAL = [{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nyes<image>"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    model = make_model(encoder=make_vision_encoder(), hidden_size=32, num_attention_heads=8)
    target = tmp_path_factory.mktemp("folder") / "minimind-v"
    write_folder(target, Loaded(model, tokenizer, {"fingerprints": fingerprints(model, tokenizer)}))
    return target


@pytest.fixture(scope="module")
def processor(folder) -> MiniMindVProcessor:
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is MiniMindVProcessor
    return processor


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def turns_of(messages: list) -> tuple[Turn, ...]:
    return tuple(Turn(**message) for message in messages)


def images_for(messages: list) -> list:
    return [RED, BLUE, RED][: sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)]


def positions(rendered) -> list[int]:
    return [start + offset for start in rendered.image_starts for offset in range(P)]


@pytest.mark.parametrize("messages", [*CONVERSATIONS.values(), SPECIAL], ids=[*CONVERSATIONS, "special tokens are text"])
def test_a_conversation_has_the_renderers_ids_and_positions(processor, renderer, messages):
    images = images_for(messages)
    batch = processor.apply_chat_template(messages, images=images, add_generation_prompt=True, tokenize=True, return_dict=True)
    expected = renderer.render_prompt(turns_of(messages))
    assert batch.input_ids.tolist() == [expected.ids.tolist()] and batch.attention_mask.all()
    assert batch.get("image_positions", torch.empty(0)).tolist() == positions(expected)
    if images:
        pixels = normalize(torch.stack([preprocess(image) for image in images]))
        assert torch.equal(batch.pixel_values, pixels)
    whole = processor.apply_chat_template(messages, images=images, tokenize=True)
    assert whole.tolist() == [renderer.render_turns(turns_of(messages)).ids.tolist()]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_written_out_it_is_the_chat_template_and_has_the_same_ids(processor, tokenizer, messages, add_generation_prompt):
    text = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    images = images_for(messages)
    direct = processor.apply_chat_template(messages, images=images, add_generation_prompt=add_generation_prompt,
                                           tokenize=True, return_dict=True)  # fmt: skip
    written = processor(images=images or None, text=text)
    assert list(direct) == list(written) and all(torch.equal(direct[name], written[name]) for name in direct)


def test_parts_are_texts_and_images_of_every_kind(processor, tmp_path):
    BLUE.save(tmp_path / "blue.png")
    parts = [{"type": "image", "image": RED}, {"type": "image", "path": str(tmp_path / "blue.png")}, {"type": "text", "text": "Both?"},
             {"type": "image"}, {"type": "image", "image": np.asarray(RED)}]  # fmt: skip
    with_parts = processor.apply_chat_template([{"role": "user", "content": parts}], images=[BLUE], tokenize=True, return_dict=True)
    with_marks = processor.apply_chat_template([{"role": "user", "content": "<image>\n<image>\nBoth?\n<image>\n<image>"}],
                                               images=[RED, BLUE, BLUE, RED], tokenize=True, return_dict=True)  # fmt: skip
    assert all(torch.equal(with_parts[name], with_marks[name]) for name in with_marks)
    typed = [{"role": "user", "content": [{"type": "text", "text": "what is <image>?"}]}]
    assert "pixel_values" not in processor.apply_chat_template(typed, tokenize=True, return_dict=True)


def test_a_last_turn_may_be_continued(processor, renderer):
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two"}]
    ids = processor.apply_chat_template(messages, tokenize=True, continue_final_message=True)[0].tolist()
    prompt = renderer.render_prompt(turns_of(messages[:1])).ids.tolist()
    assert ids == prompt + processor.tokenizer("one two").input_ids
    assert processor.apply_chat_template(messages, continue_final_message=True).endswith("assistant\none two")


def test_assistant_masks_are_the_supervised_tokens_of_training(processor, renderer):
    rows = [{"conversations": [*messages, {"role": "assistant", "content": "A cat."}]} for messages in CONVERSATIONS.values()]
    images = [images_for(row["conversations"]) for row in rows]
    batch = processor.apply_chat_template([row["conversations"] for row in rows], images=images, tokenize=True, return_dict=True,
                                          return_assistant_tokens_mask=True, padding_side="right")  # fmt: skip
    for row, some, ids, mask in zip(rows, images, batch.input_ids, batch.assistant_masks, strict=True):
        rendered = renderer.render(parse_sample(row | {"image": ["x"] * len(some)}))
        assert ids[: len(rendered)].tolist() == rendered.ids.tolist()
        assert mask[: len(rendered)].tolist() == (rendered.labels != -100).astype(int).tolist()
        assert not mask[len(rendered) :].any()


def test_generate_takes_what_the_processor_gives_alone_and_in_batches(processor, model):
    conversations = [*CONVERSATIONS.values(), SPECIAL]
    images = [images_for(messages) for messages in conversations]
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    greedy = {"max_new_tokens": 5, "do_sample": False}
    batch = processor.apply_chat_template(conversations, images=images, **chat)
    together = processor.batch_decode(model.generate(**batch, **greedy)[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    assistant = Assistant(model, processor.tokenizer)
    pixels = [preprocess(image) for some in images for image in some]
    assert together == assistant.generate([turns_of(one) for one in conversations], pixels, Sampling(5, 0.0))
    alone = processor.apply_chat_template(conversations[1], images=images[1], **chat)
    twice = model.generate(**alone, num_return_sequences=2, num_beams=2, **greedy)
    assert processor.decode(model.generate(**alone, **greedy)[0, alone.input_ids.shape[1] :], skip_special_tokens=True) == together[1]
    assert len(twice) == 2


def test_transformers_pipeline(folder, processor, model):
    messages = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What?"}]}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    said = pipe(text=messages, generate_kwargs={"max_new_tokens": 4, "do_sample": False}, return_full_text=False)[0]["generated_text"]
    batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**batch, max_new_tokens=4, do_sample=False)[0, batch.input_ids.shape[1] :]
    assert said == processor.decode(ids, skip_special_tokens=True)
    longer = [{"role": "user", "content": [{"type": "text", "text": "What? " * 100}, {"type": "image", "image": RED}]}]
    for one, other in ((messages, messages), (messages, longer), (longer, messages)):
        with pytest.raises(ValueError, match="batch_size"):  # transformers puts the rows together, and knows nothing of places
            pipe(text=[one, other], batch_size=2, generate_kwargs={"max_new_tokens": 4})


def test_a_processor_survives_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    messages, images = CONVERSATIONS["several turns"], [RED, BLUE, RED]
    first, second = (one.apply_chat_template(messages, images=images, tokenize=True, return_dict=True) for one in (processor, again))
    assert all(torch.equal(first[name], second[name]) for name in first) and again.chat_template == processor.chat_template


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda p: p(images=[RED], text="none"), "0 <image> placeholders, but 1 images"),
     (lambda p: p(text="<image>"), "1 <image> placeholders, but 0 images"),
     (lambda p: p(images=[[RED], [RED]], text=["<image><image>", "none"]), r"\[2, 0\] <image> placeholders, but \[1, 1\] images"),
     (lambda p: p(images=[RED]), "text is missing"),
     (lambda p: p(images=[3], text="<image>"), "an image is a PIL image"),
     (lambda p: p(text="a", return_tensors="np"), "only PyTorch tensors"),
     (lambda p: p(text=["a", "b c d e"], padding=False), "need padding"),
     (lambda p: p(text="a b c d e f", padding="max_length", max_length=2), "none is cut"),
     (lambda p: p.apply_chat_template([{"role": "tool", "content": "x"}]), "role 'tool'"),
     (lambda p: p.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}]), "'audio'"),
     (lambda p: p.apply_chat_template([{"role": "user", "content": "<image>"}], tokenize=True), "wait for an image"),
     (lambda p: p.apply_chat_template(SPECIAL, tools=[{}]), "tools: conversations"),
     (lambda p: p.apply_chat_template(SPECIAL, add_generation_prompt=True, continue_final_message=True), "not both"),
     (lambda p: type(p.image_processor)(do_center_crop=False, size={"shortest_edge": 224}), "give no squares")],
)  # fmt: skip
def test_mistakes_are_named(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)


def test_the_tutorials_lora_trains_merges_and_comes_back_native(folder, tmp_path, monkeypatch):
    tutorial = (REPOSITORY / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    [code] = (block for block in re.findall(r"(?s)```python\n(.*?)```", tutorial) if "get_peft_model" in block)
    (tmp_path / "minimind-v").symlink_to(folder)
    RED.save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, "how-it-works.md", "exec"), scope)
    losses = scope["losses"]
    assert losses[-1] < 0.7 * losses[0]
    merged, batch = scope["merged"], {**scope["batch"], "labels": scope["labels"]}
    assert not any("lora" in name for name in merged.state_dict())
    with torch.no_grad():
        assert merged.eval()(**batch).loss.item() == pytest.approx(losses[-1], rel=0.3)
    assert convert(["minimind-v-mine", "out/mine_32.pth"]) == 0
    native = load_assistant("model", tmp_path / "out" / "mine_32.pth", "cpu", str(folder / "vision_model"), str(REPOSITORY / "model"))
    answers = [Assistant(one, native.tokenizer).generate([(Turn("user", "<image>\nWhat?"),)], [preprocess(RED)], Sampling(5, 0.0))
               for one in (native.model, read_folder(tmp_path / "minimind-v-mine", "", "none").model)]  # fmt: skip
    assert answers[0] == answers[1]


LAYERS = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(
    ("settings", "learns"),
    [({"modules_to_save": ["vision_proj"]}, {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"}),
     ({"modules_to_save": ["vision_proj", "embed_tokens"], "ensure_weight_tying": True},
      {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias", "model.embed_tokens.weight", "lm_head.weight"})],
    ids=["projector", "tied embedding"],
)  # fmt: skip
def test_lora_trains_whole_modules_beside_it(folder, processor, tmp_path, settings, learns, task_type):
    """As LLaVA's recipes have it: the projector learns, and the adapter is saved, loaded and merged without loss."""
    def base():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    talk = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A red one."}]
    batch = processor.apply_chat_template([talk], images=[RED], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
    adapted = get_peft_model(base(), LoraConfig(**LAYERS, **settings, task_type=task_type)).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**batch, labels=labels).loss.backward()
    optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        assert (expected - base()(**batch).logits).abs().max() > 1e-3
        assert torch.equal(again(**batch).logits, expected)
        answer = again.generate(**batch, max_new_tokens=3, do_sample=False)
        merged = again.merge_and_unload()
        assert (merged(**batch).logits - expected).abs().max() < 1e-4
        assert torch.equal(merged.generate(**batch, max_new_tokens=3, do_sample=False), answer)
        merged.save_pretrained(tmp_path / "merged")
        assert (AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(**batch).logits - expected).abs().max() < 1e-4
    before, after = base().state_dict(), merged.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name]) and "_proj.weight" not in name}
    assert after.keys() == before.keys() and changed == learns


def test_the_model_takes_what_the_processor_gives_with_labels_and_in_the_order_of_the_decoder(processor, model):
    batch = processor.apply_chat_template(CONVERSATIONS["an image"], images=[RED], tokenize=True, return_dict=True)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**batch, labels=batch["input_ids"]).logits, expected)
        images = {name: batch[name] for name in ("pixel_values", "image_positions")}
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"], **images).logits, expected)
        with pytest.raises(ValueError, match="position_ids"):
            model(batch["input_ids"], None, batch["pixel_values"])
