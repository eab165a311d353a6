"""Decoding: whatever the path, the tokens are those of full forwards."""

import copy
import math
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import DynamicCache, StaticCache

from chat.chat import Chat
from chat.scoring import Question, answer_in_batches
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.hub.modeling import MiniMindVForConditionalGeneration
from model.inference.assistant import Assistant
from model.inference.generation import Chooser, Memory, Prompt, Sampling, generate_batch, generate_stream
from model.inference.packed import PackedDecoder
from tests.conftest import make_model, make_vision_encoder

P = 196
NEVER = -1  # no token: answers go on to max_new_tokens
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
KINDS = {"dense": {}, "moe": {"use_moe": True}, "yarn": {"rope_parameters": YARN}, "one key head": {"num_key_value_heads": 1}}


def make_prompt(*parts, seed: int = 0) -> Prompt:
    """Numbers of text tokens and "a", "b", ... for images 0, 1, ..."""
    rng, ids, starts, images = np.random.default_rng(seed), [1], [], []
    for part in parts:
        if isinstance(part, str):
            starts.append(len(ids))
            images.append(ord(part) - ord("a"))
            ids += [34] * P
        else:
            ids += rng.integers(100, 6000, part).tolist()
    return Prompt(np.array(ids), tuple(starts), tuple(images), P)


PROMPTS = [make_prompt(3, "a", 4), make_prompt(3, "a", 9), make_prompt(6), make_prompt(3, "a", "b", 2, seed=1),
           make_prompt(3, "a", 4), make_prompt(30, seed=2), make_prompt(3, "a")]  # fmt: skip
FEATURES = torch.randn(2, P, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return make_model(kind=MiniMindVForConditionalGeneration, hidden_size=64, initializer_range=0.3, **KINDS[request.param]).eval()


def by_full_forwards(model, prompt: Prompt, sampling: Sampling = GREEDY) -> list[int]:
    """The definition: all tokens through the whole model for every new one."""
    ids = torch.from_numpy(prompt.ids)[None]
    features = FEATURES[list(prompt.images)]
    positions = torch.cat([torch.arange(P) + at for at in prompt.image_starts]) if prompt.images else None
    with torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            logits = model(ids, image_features=features, image_positions=positions).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt.ids) :].tolist()


def stream(decoder, prompt, memory=None, sampling=GREEDY, stop=NEVER, **options) -> list[int]:
    memory = memory or Memory(decoder.new_cache())
    return list(generate_stream(decoder, memory, prompt, FEATURES, sampling, stop, **options))


class Recorder:
    """A decoder that keeps the shapes [B, T] of what it was asked; it may break off at a call."""

    def __init__(self, decoder, fail_at: int | None = None):
        self.decoder, self.model, self.new_cache, self.calls, self.fail_at = decoder, decoder.model, decoder.new_cache, [], fail_at

    def __call__(self, x, cache, *arguments):
        self.calls.append(tuple(x.shape[:2]))
        if len(self.calls) == self.fail_at:
            cache.append(0, *torch.zeros(2, 1, self.model.config.num_key_value_heads, 1, self.model.config.head_dim))  # one layer of two
            raise KeyboardInterrupt
        return self.decoder(x, cache, *arguments)


def test_every_path_gives_the_tokens_of_full_forwards(model):
    decoder = PackedDecoder(model)
    expected = [by_full_forwards(model, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) >= 4 and max(len(set(tokens)) for tokens in expected) > 3
    for chunk in (7, 2048):
        assert [stream(decoder, prompt, chunk=chunk) for prompt in PROMPTS] == expected
    assert generate_batch(decoder, PROMPTS, FEATURES, GREEDY, NEVER) == expected
    assert generate_batch(decoder, PROMPTS[2:3], FEATURES, GREEDY, NEVER) == expected[2:3], "text alone"
    prompt, options = PROMPTS[3], {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    inputs = {"input_ids": torch.from_numpy(prompt.ids)[None], "image_features": FEATURES[list(prompt.images)]}
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=420)):
        out = model.generate(**inputs, **options, past_key_values=cache)
        assert out[0, len(prompt.ids) :].tolist() == expected[3]


@pytest.fixture(scope="module")
def small():
    return make_model(hidden_size=64, initializer_range=0.3).eval()


def test_rows_that_have_ended_leave_the_batch(small):
    expected = [by_full_forwards(small, prompt) for prompt in PROMPTS]
    stop = expected[0][3]
    ended = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in expected]
    assert len({len(tokens) for tokens in ended}) > 1
    decoder = Recorder(PackedDecoder(small))
    assert generate_batch(decoder, PROMPTS, FEATURES, GREEDY, stop) == ended
    assert [stream(decoder.decoder, prompt, stop=stop) for prompt in PROMPTS] == ended
    first, *steps = decoder.calls[1:]
    assert first[0] == len({prompt.key().tobytes() for prompt in PROMPTS}) < len(PROMPTS) and steps[-1][0] < len(PROMPTS)


def test_what_prompts_share_is_read_once(small):
    decoder = Recorder(PackedDecoder(small))
    same = [make_prompt(3, "a", 4 + n) for n in range(5)]  # one image, five questions
    answers = generate_batch(decoder, same, FEATURES, GREEDY, NEVER)
    assert decoder.calls[:2] == [(1, 4 + P), (5, 8)] and answers == [by_full_forwards(small, prompt) for prompt in same]

    memory = Memory(decoder.new_cache())
    for prompt, read in ((same[0], 8 + P), (same[4], 4), (same[4], 1), (make_prompt(3, "b", 4), 4 + P)):
        decoder.calls.clear()
        assert stream(decoder, prompt, memory) == by_full_forwards(small, prompt)
        assert decoder.calls[0] == (1, read), "another image in the same place is another prefix"


def test_an_interrupted_step_leaves_a_memory_that_can_be_used(small):
    decoder = Recorder(PackedDecoder(small), fail_at=4)
    memory, said = Memory(decoder.new_cache()), []
    with pytest.raises(KeyboardInterrupt):
        for token in generate_stream(decoder, memory, PROMPTS[0], FEATURES, GREEDY, NEVER):
            said.append(token)
    expected = by_full_forwards(small, PROMPTS[0])
    assert said == expected[:3] and memory.key[-2:].tolist() == said[:2]
    assert stream(decoder, PROMPTS[0], memory) == expected


def test_a_prompt_interrupted_anywhere_in_its_images_is_read_to_its_end(small):
    decoder, prompt = PackedDecoder(small), make_prompt(3, "a", "b", 2)
    expected = by_full_forwards(small, prompt)
    for call in range(1, math.ceil(len(prompt.ids) / 90) + 1):
        recorder = Recorder(decoder, fail_at=call)
        memory = Memory(decoder.new_cache())
        with pytest.raises(KeyboardInterrupt):
            stream(recorder, prompt, memory, chunk=90)
        assert len(memory.key) == 90 * (call - 1)
        assert stream(decoder, prompt, memory) == expected


def test_layers_that_are_more_than_their_weight_answer_as_they_are(small):
    """Adapters that were not merged, and quantized layers."""
    adapted = get_peft_model(copy.deepcopy(small), LoraConfig(target_modules=["k_proj", "down_proj"], init_lora_weights=False))
    adapted = adapted.base_model.model.eval()
    expected = [by_full_forwards(adapted, prompt) for prompt in PROMPTS[2:4]]
    assert expected != [by_full_forwards(small, prompt) for prompt in PROMPTS[2:4]]
    assert generate_batch(PackedDecoder(adapted), PROMPTS[2:4], FEATURES, GREEDY, NEVER) == expected


def test_bf16_differs_by_rounding_alone(small):
    half = make_model(hidden_size=64, initializer_range=0.3).eval().to(torch.bfloat16)
    ids = torch.from_numpy(PROMPTS[5].ids)[None]
    with torch.inference_mode():
        decoder = PackedDecoder(half)
        own = decoder(half.embed(ids), decoder.new_cache())
        logits = half(ids).logits[:, -1]
        exact = small(ids).logits[:, -1]
    assert own.dtype == torch.bfloat16
    error = (logits.float() - exact).abs().mean()  # of the number format
    assert (own.float() - exact).abs().mean() < 1.5 * error + 1e-3


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_follow_the_probabilities():
    logits, none = torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), torch.empty(20_000, 0, dtype=torch.int64)
    tokens = Chooser(Sampling(temperature=1.0, top_p=1.0, seed=0), logits.device)(logits.expand(20_000, -1), none)
    assert torch.allclose(tokens.bincount() / 20_000, logits.exp(), atol=0.02)
    tokens = Chooser(Sampling(temperature=1.0, top_p=0.6, seed=0), logits.device)(logits.expand(20_000, -1), none)
    assert torch.allclose(tokens.bincount(minlength=4) / 20_000, torch.tensor([0, 0, 3 / 7, 4 / 7]), atol=0.02)


def test_a_seed_is_the_callers_own(small):
    sampling = Sampling(max_new_tokens=12, temperature=1.5, top_p=0.95, repetition_penalty=1.2, seed=5)
    decoder, state = PackedDecoder(small), torch.get_rng_state()
    first = stream(decoder, PROMPTS[0], sampling=sampling)
    assert torch.equal(torch.get_rng_state(), state), "global random state is left alone"
    torch.rand(3)
    assert stream(decoder, PROMPTS[0], sampling=sampling) == first
    assert generate_batch(decoder, PROMPTS[:1], FEATURES, sampling, NEVER) == [first]
    assert stream(decoder, PROMPTS[0], sampling=replace(sampling, seed=6)) != first
    unseeded = [stream(decoder, PROMPTS[0], sampling=replace(sampling, seed=None)) for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    several = generate_batch(decoder, PROMPTS[:1] * 3, FEATURES, sampling, NEVER)
    assert len({tuple(tokens) for tokens in several}) == 3, "a prompt given several times gets as many samples"


def test_a_penalty_counts_prompt_and_answer(small):
    sampling = replace(GREEDY, max_new_tokens=20, repetition_penalty=1e6)
    for tokens in (stream(PackedDecoder(small), PROMPTS[0], sampling=sampling),
                   *generate_batch(PackedDecoder(small), PROMPTS[:3], FEATURES, sampling, NEVER)[:1]):  # fmt: skip
        assert len(set(tokens)) == 20 and not set(tokens) & set(PROMPTS[0].ids.tolist())


# --- a chat -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def assistant(tokenizer):
    return Assistant(make_model(encoder=make_vision_encoder(), hidden_size=64, initializer_range=0.3), tokenizer)


def watch(assistant) -> tuple[Recorder, list[int]]:
    """Records what a chat's decoder reads, and how many images the vision encoder sees."""
    assistant.decoder = Recorder(assistant.decoder)
    encoded = []
    assistant.model.vision_encoder.register_forward_pre_hook(lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True)
    return assistant.decoder, encoded


def afresh(chat: Chat) -> Chat:
    """The same conversation without any memory of having read it."""
    return Chat(Assistant(chat.assistant.model, chat.assistant.tokenizer), chat.sampling, chat.max_length,
                list(chat.turns), list(chat.pixels), list(chat.waiting))  # fmt: skip


def test_a_chat_reads_and_encodes_nothing_twice(assistant):
    recorder, encoded = watch(assistant)
    chat = Chat(assistant, GREEDY)
    chat.add_image(Image.new("RGB", (40, 40), "red"))
    chat.ask("What is it?")
    assert encoded == [1] and recorder.calls[0][1] > P
    for ask in ("And its colour?", "Why?"):
        expected = afresh(chat).ask(ask)
        recorder.calls.clear()
        encoded.clear()
        assert chat.ask(ask) == expected
        assert not encoded and recorder.calls[0][1] < 40


def test_a_chats_answers_are_those_of_one_without_memory(assistant):
    chat = Chat(assistant, GREEDY, max_length=700)

    def ask(question: str) -> None:
        other = afresh(chat)
        assert chat.ask(question) == other.ask(question) and (chat.turns, chat.dropped) == (other.turns, other.dropped)

    chat.add_image(Image.new("RGB", (40, 40), "red"))
    chat.add_image(Image.new("RGB", (40, 40), "blue"))
    ask("What are these?")
    ask("And what does <image> mean?")
    assert chat.undo()
    ask("And the second?")
    chat.add_image(Image.new("RGB", (40, 40), "green"))
    ask("This?")
    assert chat.dropped == 0 and len(chat.pixels) == 3
    chat.undo()
    assert len(chat.waiting) == 1 and len(chat.pixels) == 2
    ask("And this one?")
    chat.add_image(Image.new("RGB", (40, 40), "white"))
    ask("And this?")
    assert chat.dropped == 1 and len(chat.pixels) == 2, "the first exchange went with its two images"
    while chat.turns:
        chat.undo()
    assert not chat.undo() and len(chat.waiting) == 2 and not chat.pixels
    ask("What are these?")
    chat.reset()
    ask("Hello?")


def test_a_closed_stream_stops_at_once_and_keeps_what_was_said(assistant):
    recorder, _ = watch(assistant)
    chat = Chat(assistant, replace(GREEDY, max_new_tokens=40))
    chat.add_image(Image.new("RGB", (40, 40), "red"))
    with closing(chat.stream("What is it?")) as pieces:
        said = next(pieces)
        asked = len(recorder.calls)
    assert len(recorder.calls) == asked and chat.turns[-1] == Turn("assistant", said) and not chat.waiting
    other = afresh(chat)
    assert chat.ask("And?") == other.ask("And?")


def test_an_exception_keeps_what_was_said_or_else_the_history(assistant):
    recorder, _ = watch(assistant)
    chat = Chat(assistant, replace(GREEDY, max_new_tokens=40))
    chat.ask("Hello?")
    before = list(chat.turns)
    chat.add_image(Image.new("RGB", (40, 40), "red"))
    recorder.fail_at = len(recorder.calls) + 1  # while the prompt is read
    with pytest.raises(KeyboardInterrupt):
        chat.ask("What is it?")
    assert chat.turns == before and len(chat.waiting) == 1 and not chat.pixels
    recorder.fail_at = len(recorder.calls) + 20
    said = []
    with pytest.raises(KeyboardInterrupt):
        for piece in chat.stream("What is it?"):
            said.append(piece)
    assert chat.turns[-1] == Turn("assistant", "".join(said)) and said and not chat.waiting and len(chat.pixels) == 1
    other = afresh(chat)
    assert chat.ask("And?") == other.ask("And?")


def test_scoring_encodes_an_image_once_a_batch_and_answers_in_order(assistant):
    _, encoded = watch(assistant)
    images = {name: torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8) for name in "abc"}
    asked = [("a", "What?"), ("a", "Why?"), ("ab", "Which?"), ("b", "What?"), ("", "Hm?"), ("b", "So?"), ("c", "Where is it now?")]
    questions = [Question((Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(names) + text),), tuple(names), "", "") for names, text in asked]
    answers = list(answer_in_batches(assistant, questions, lambda question, place: images[question.images[place]], 2, 6))
    assert sum(encoded) == 1 + 2 + 1 + 1, "once for the questions of a batch"
    alone = [assistant.generate([q.turns], [images[n] for n in q.images], replace(GREEDY, max_new_tokens=6))[0] for q in questions]
    assert answers == alone and len(set(alone)) > 3
