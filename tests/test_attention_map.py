"""Attention maps: the known patch is found, the weights are those of the attention that answers, nothing is changed."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from chat.chat import Chat
from docs.figures.attention import overlay
from model.conversation import IMAGE_PLACEHOLDER, Turn
from model.errors import UsageError
from model.inference.assistant import Assistant
from model.inference.attention_map import attention_to_images, look, pixels_to_image
from model.inference.generation import Sampling
from model.layers import apply_rope
from model.model_vlm import MiniMindVLM
from model.pixels import preprocess
from tests.conftest import make_model, make_vision_encoder

P, SIDE = 196, 14
ASKS_FOR_A, ASKS_FOR_B, NEUTRAL = 500, 501, 502  # tokens of the model built by hand


def prompt_with(images: int) -> tuple[torch.Tensor, list[int]]:
    """Ids that end with ASKS_FOR_A, and where their images begin: next to each other and apart."""
    parts, starts = [torch.tensor([1, 400, 401])], []
    for number in range(images):
        starts.append(sum(map(len, parts)))
        parts += [torch.full((P,), 34), torch.full((number % 2 * 3,), NEUTRAL)]
    return torch.cat([*parts, torch.tensor([NEUTRAL, ASKS_FOR_A])]), starts


def pointing_model() -> MiniMindVLM:
    """A model whose attention is known. Width 32: channel 0 carries mark A of a patch, 1 mark B, 2 nothing of note, 3 and
    4 the tokens that ask for A and for B. Four query heads read two key heads. The second key head swaps A and B, so does
    every second query head, and so does the second block. Nothing else is computed.
    """
    model = make_model(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, vision_hidden_size=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.vision_proj.vision_proj[0].weight[:3] = torch.eye(3)
        model.model.embed_tokens.weight[:, 2] = 1
        for token, channel in ((ASKS_FOR_A, 3), (ASKS_FOR_B, 4)):
            model.model.embed_tokens.weight[token] = torch.eye(32)[channel]
        for number, block in enumerate(model.model.layers):
            block.input_layernorm.weight.fill_(1)
            q = block.self_attn.q_proj.weight.view(4, 8, 32)
            k = block.self_attn.k_proj.weight.view(2, 8, 32)
            # Channels 3 and 7 of a head are the pair that rotary positions turn slowest, by 0.02 in 600 tokens.
            for query_head in range(4):
                q[query_head, 3, 3 + query_head % 2] = q[query_head, 7, 4 - query_head % 2] = 1
            for key_head in range(2):
                swapped = (key_head + number) % 2
                k[key_head, 3, swapped] = k[key_head, 7, 1 - swapped] = 4
    return model


def marks(images: int, a: tuple[int, int, int], b: tuple[int, int, int]) -> torch.Tensor:
    """Features [N, P, 3] with mark A and mark B at (image, row, column)."""
    features = torch.zeros(images, SIDE, SIDE, 3)
    features[..., 2] = 1
    for channel, (image, row, column) in enumerate((a, b)):
        features[image, row, column] = torch.eye(3)[channel]
    return features.flatten(1, 2)


@pytest.mark.parametrize("images, a, b", [(1, (0, 2, 11), (0, 13, 0)), (3, (1, 0, 5), (2, 9, 3)), (3, (0, 7, 7), (0, 7, 8))])
def test_each_token_looks_at_the_patch_it_asks_for(images, a, b):
    model, (prompt, starts) = pointing_model(), prompt_with(images)
    answer = torch.tensor([ASKS_FOR_B, NEUTRAL, ASKS_FOR_A])  # chosen where A, then B, then nothing was asked for

    def maps(**choice) -> torch.Tensor:
        found = attention_to_images(model, prompt, starts, answer, marks(images, a, b), **choice)
        assert found.shape == (3, images, SIDE, SIDE)
        return found

    for layer in range(2):
        for head in range(4):
            first, second = (a, b) if (layer + head // 2 + head % 2) % 2 == 0 else (b, a)
            found = maps(layer=layer, head=head)
            assert found[0][first] > 0.99 and found[1][second] > 0.99
            assert torch.allclose(found[2], torch.tensor(1 / (len(prompt) + 2)), rtol=1e-3)  # all alike
    for choice in ({}, {"layer": 0}, {"layer": 1}, {"head": 0}, {"head": 3}):  # half of what it averages looks at each
        assert torch.allclose(maps(**choice)[0][[a[0], b[0]], [a[1], b[1]], [a[2], b[2]]], torch.tensor(0.5), atol=0.01)


def plain_attention(model, ids: torch.Tensor, positions: torch.Tensor, features: torch.Tensor) -> list[torch.Tensor]:
    """Weights [H, T, T] of each layer over the whole sequence, head by head, from what the answering forward feeds its
    attention; that they are the ones it uses is asserted on what it returns."""
    calls = []
    handles = [block.self_attn.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs, output)))
               for block in model.model.layers]  # fmt: skip
    model(ids[None], image_positions=positions, image_features=features)
    for handle in handles:
        handle.remove()
    layers = []
    for module, (hidden, rope, *_), output in calls:
        T, d = hidden.shape[1], module.head_dim
        q, k, v = (proj(hidden).view(T, -1, d).transpose(0, 1) for proj in (module.q_proj, module.k_proj, module.v_proj))
        q, k = (apply_rope(x, *(table[0, 0] for table in rope)) for x in (q, k))
        share = len(q) // len(k)
        weights = []
        for head in range(len(q)):
            scores = torch.full((T, T), -torch.inf)
            for row in range(T):
                scores[row, : row + 1] = k[head // share, : row + 1] @ q[head, row] / d**0.5
            weights.append(scores.softmax(-1))
        layers.append(torch.stack(weights))
        mixed = torch.cat([layers[-1][head] @ v[head // share] for head in range(len(q))], dim=-1)
        assert torch.allclose(module.o_proj(mixed), output[0], atol=1e-5)
    return layers


@pytest.mark.parametrize("use_moe, heads", [(False, (4, 2)), (True, (8, 2))])
def test_weights_are_those_of_the_attention_that_answers(use_moe, heads):
    model = make_model(num_attention_heads=heads[0], num_key_value_heads=heads[1], use_moe=use_moe).eval()
    prompt, starts = prompt_with(2)
    answer, features = torch.tensor([7, 300, 34, 9]), torch.randn(2, P, 24)
    positions = torch.cat([torch.arange(P) + start for start in starts])
    with torch.no_grad():
        plain = plain_attention(model, torch.cat((prompt, answer)), positions, features)
    expected = torch.stack(plain)[:, :, len(prompt) - 1 : -1, positions].unflatten(-1, (2, SIDE, SIDE))
    maps = attention_to_images(model, prompt, starts, answer, features)
    assert torch.allclose(maps, expected.mean((0, 1)), atol=1e-6)
    assert torch.allclose(attention_to_images(model, prompt, starts, answer, features, layer=1, head=2), expected[1, 2], atol=1e-6)
    shares = maps.sum((1, 2, 3))
    assert (maps > 0).all() and (shares < 1).all()
    assert expected.std((0, 1)).max() > 1e-4  # layers and heads differ, so the mean is one


def test_later_tokens_change_nothing_of_earlier_ones():
    model, (prompt, starts) = make_model().eval(), prompt_with(1)
    features = torch.randn(1, P, 24)
    long, other = (attention_to_images(model, prompt, starts, torch.tensor(answer), features)
                   for answer in ([7, 8, 9, 10], [7, 8, 900, 1000]))  # fmt: skip
    short = attention_to_images(model, prompt, starts, torch.tensor([7]), features)
    assert torch.allclose(long[:3], other[:3], atol=1e-7) and torch.allclose(long[:1], short, atol=1e-7)
    assert not torch.allclose(long[3], other[3], atol=1e-7)


@pytest.mark.parametrize("training", [False, True])
def test_a_map_leaves_the_model_as_it_was(training):
    model, (prompt, starts) = make_model(use_moe=True).train(training), prompt_with(1)
    weights, features = copy.deepcopy(model.state_dict()), torch.randn(1, P, 24)
    positions = torch.arange(P) + starts[0]

    def step():
        return model(prompt[None], image_positions=positions, image_features=features, use_cache=True)

    before = step()
    lengths = before.past_key_values.get_seq_length()
    maps = attention_to_images(model, prompt, starts, torch.tensor([5, 6]), features)
    after = step()
    assert not maps.requires_grad and model.training is training and torch.is_grad_enabled()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(before.logits, after.logits) and before.past_key_values.get_seq_length() == lengths


def test_a_layer_or_head_that_is_not_there_is_named():
    model, (prompt, starts) = make_model().eval(), prompt_with(1)
    for choice, message in (({"layer": 2}, "layer 2 is not there: the model has 2"), ({"layer": -1}, "layer -1"),
                            ({"head": 4}, "head 4 is not there: the model has 4")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            attention_to_images(model, prompt, starts, torch.tensor([5]), torch.randn(1, P, 24), **choice)


@pytest.fixture(scope="module")
def assistant(tokenizer) -> Assistant:
    return Assistant(make_model(encoder=make_vision_encoder(), hidden_size=32, num_attention_heads=8), tokenizer)


def test_an_answer_of_a_chat_is_looked_into(assistant):
    chat = Chat(assistant, Sampling(max_new_tokens=5, temperature=0.0))
    for colours in (("red", "blue"), ("green",)):
        for colour in colours:
            chat.add_image(Image.new("RGB", (50, 40), colour))
        chat.ask("What is it?")
    chat.turns[1] = Turn("assistant", "a red 藍色 <|im_end|> @")
    chat.turns[3] = Turn("assistant", "green")
    first, second = look(assistant, chat.turns[:2], chat.pixels), look(assistant, chat.turns, chat.pixels)
    assert "".join(first.tokens) == "a red 藍色 <|im_end|> @" and "".join(second.tokens) == "green"
    assert first.maps.shape == (len(first.tokens), 2, SIDE, SIDE) and second.maps.shape == (len(second.tokens), 3, SIDE, SIDE)
    one_head = look(assistant, chat.turns, chat.pixels, layer=0, head=7)
    assert not torch.equal(one_head.maps, second.maps)
    # The same image in both places, and the other way round: the maps follow the images.
    swapped = look(assistant, chat.turns[:2], [chat.pixels[1], chat.pixels[0]])
    assert not torch.allclose(first.maps, swapped.maps, atol=1e-6)


def test_only_an_answer_about_images_can_be_looked_into(assistant):
    pixels = [preprocess(Image.new("RGB", (30, 30), "red"))]
    question, answer = Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat?"), Turn("assistant", "red")
    for turns, given, message in (
        ((), pixels, "only an answer"), ((question,), pixels, "only an answer"),
        ((question, Turn("assistant", "")), pixels, "only an answer"),
        ((Turn("user", "What?"), answer), pixels, "shows 0 images"), ((question, answer), [], "shows 1 images"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            look(assistant, turns, given)
    with pytest.raises(UsageError, match="layer 9"):
        look(assistant, (question, answer), pixels, layer=9)


def test_texts_of_tokens_are_whole_characters(assistant):
    text = "蘋果🍎 and � a red one"
    ids = assistant.tokenizer(text, add_special_tokens=False).input_ids
    texts = list(assistant.pieces(ids))
    assert "".join(texts) == text and len(texts) == len(ids) and "" in texts


def test_the_overlay_lights_the_patch_and_nothing_else():
    pixels = preprocess(Image.new("RGB", (300, 200), (120, 120, 120)))
    heat = torch.zeros(SIDE, SIDE)
    heat[3, 10], heat[8, 0] = 0.02, 0.01  # row 3, column 10: x from 160, y from 48
    image = pixels_to_image(pixels)
    drawn = np.asarray(overlay(image, heat)).astype(int).sum(-1)
    assert image.size == (224, 224) and np.array_equal(np.asarray(image), pixels.permute(1, 2, 0))
    lit = drawn == drawn.max()
    assert lit[48:64, 160:176].all() and lit.sum() == 16 * 16
    half = drawn[128:144, 0:16]
    assert (half == half[0, 0]).all() and drawn.min() < half[0, 0] < drawn.max()
    assert (drawn == drawn.min()).sum() == 224 * 224 - 2 * 16 * 16
    dimmer = np.asarray(overlay(image, heat, top=0.04)).astype(int).sum(-1)
    assert dimmer.max() == half[0, 0]  # on a scale twice as long
    assert np.asarray(overlay(image, heat * 0)).std() == 0  # no attention at all is no error
    assert overlay(image.resize((100, 60)), heat).size == (100, 60)
