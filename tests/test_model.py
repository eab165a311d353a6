"""The decoder and the splice: equivalences that must hold whatever the weights."""

import copy
import inspect
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, StaticCache, Trainer, TrainingArguments
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import model.hub  # noqa: F401  (teaches transformers the families)
from model.hub.modeling import MiniMindVForConditionalGeneration
from model.layers import rope_tables
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, find_loss_positions
from model.model_vlm import MiniMindVLM, VLMConfig, find_image_positions, splice_image_features
from model.moe import MOEFeedForward
from tests.conftest import make_model, make_vision_encoder

P = 196


def text(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(100, 6000, (rows, length), generator=torch.Generator().manual_seed(seed))


def with_images(pattern: list[list[int]], tail: int = 5) -> torch.Tensor:
    """ids [B, T] with images after the given numbers of text tokens, e.g. [[3, 0]]: 3 tokens, image, image."""
    rows = []
    for row, gaps in enumerate(pattern):
        parts = [part for gap in gaps for part in (text(1, gap, row)[0], torch.full((P,), 34))]
        rows.append(torch.cat([*parts, text(1, tail, 9 + row)[0]]))
    longest = max(map(len, rows))
    return torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])


@pytest.mark.parametrize("use_moe", [False, True])
def test_cached_chunked_and_static_decoding_equal_a_full_forward(use_moe):
    model = make_model(use_moe=use_moe).eval()
    ids = text(2, 17)
    with torch.no_grad():
        full = model(ids).logits
        for cache in (None, StaticCache(config=model.config, max_cache_len=32)):
            pieces, at = [], 0
            for size in (5, 1, 7, 4):  # a first chunk, one token, chunks of several after a cache
                out = model(ids[:, at : at + size], past_key_values=cache, use_cache=True)
                cache, at = out.past_key_values, at + size
                pieces.append(out.logits)
            assert (torch.cat(pieces, 1) - full).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_padding_changes_nothing(side, use_moe):
    model = make_model(use_moe=use_moe).eval()
    short, long = text(1, 6), text(1, 11, seed=1)
    padding = (5, 0) if side == "left" else (0, 5)
    ids, mask = torch.cat([F.pad(short, padding), long]), torch.cat([F.pad(torch.ones_like(short), padding), torch.ones_like(long)])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        place = slice(5, None) if side == "left" else slice(0, 6)
        assert (logits[0, place] - model(short).logits[0]).abs().max() < 1e-5
        assert (logits[1] - model(long).logits[0]).abs().max() < 1e-5
        if side == "right":  # causal attention makes the mask unnecessary
            assert (model(ids).logits[0, place] - logits[0, place]).abs().max() < 1e-5


def test_all_ones_mask_equals_no_mask():
    model, ids = make_model().eval(), text(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


def test_loss_is_the_mean_over_supervised_tokens_of_full_logits():
    model, ids = make_model(), text(2, 12)
    labels = ids.clone()
    labels[0, :5] = labels[1, 3:] = -100
    out = model(ids, labels=labels)
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(out.logits, model(ids).logits)
    supervised = model(ids, labels=labels, loss_positions=find_loss_positions(labels))
    assert supervised.logits.shape == ((labels[:, 1:] != -100).sum(), model.config.vocab_size)
    assert supervised.loss.item() == pytest.approx(out.loss.item(), rel=1e-6)
    gradient = torch.autograd.grad(out.loss, model.model.norm.weight)[0]
    assert torch.allclose(gradient, torch.autograd.grad(expected, model.model.norm.weight)[0], rtol=1e-4, atol=1e-8)


def test_no_supervised_token_is_zero_loss_not_nan():
    model, ids = make_model(), text(2, 7)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_logits_only_where_asked():
    model, ids = make_model().eval(), text(2, 9)
    with torch.no_grad():
        full = model(ids).logits
        assert torch.allclose(model(ids, logits_to_keep=3).logits, full[:, -3:], atol=1e-6)
        assert torch.allclose(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]], atol=1e-6)


def decoders() -> list:
    """A VLM and a decoder alone, of the same weights."""
    vlm = make_model().eval()
    decoder = MiniMindForCausalLM(vlm.config).eval()
    decoder.load_state_dict({name: tensor for name, tensor in vlm.state_dict().items() if "vision" not in name})
    return [vlm, decoder]


@pytest.mark.parametrize("model", decoders(), ids=["vlm", "decoder"])
def test_arguments_are_those_of_transformers_models(model):
    ids, mask = text(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    ours, llama = (list(inspect.signature(kind.forward).parameters)[1:9] for kind in (type(model), LlamaForCausalLM))
    assert ours == llama
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask)
        positional = model(ids, mask)
        assert positional.loss is None and torch.equal(positional.logits, expected.logits)
        assert model(ids, mask, None, None, None, ids, False, 2).logits.shape == (2, 2, 6400)
        assert torch.equal(model(ids, mask, return_dict=False)[0], expected.logits)
        with_labels = model(ids, mask, labels=ids, logits_to_keep=2)
        assert torch.equal(with_labels.logits, expected.logits[:, -2:])
        assert torch.equal(with_labels.loss, model(ids, mask, labels=ids).loss)
        next_token = text(2, 1, seed=3)
        grown = model(torch.cat([ids, next_token], 1), F.pad(mask, (0, 1), value=1)).logits[:, -1:]
        assert torch.allclose(model(next_token, F.pad(mask, (0, 1), value=1), past_key_values=expected.past_key_values).logits,
                              grown, atol=1e-5), "the cache comes unasked, as the configuration says"  # fmt: skip
    assert model(ids, use_cache=False).past_key_values is None
    for wrong, error in (({"position_ids": torch.zeros(2, 3, 224, 224)}, "position_ids"), ({"labels": ids[:, 1:]}, "labels"),
                         ({"inputs_embeds": torch.zeros(2, 9, 32)}, "exactly one"), ({"output_attentions": True}, "attention_map")):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            model(ids, **wrong)
    with pytest.raises(TypeError, match="pixel_value"):
        model(ids, pixel_value=torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize("use_moe", [False, True])
def test_hidden_states_are_those_that_lead_to_the_logits(use_moe):
    model, ids = make_model(use_moe=use_moe).eval(), text(2, 9)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
        block = model.model.layers[0](out.hidden_states[0], rope_tables(model.config, torch.arange(9)), None, None, None)[0]
        assert torch.equal(out.hidden_states[1], block)
        assert model(ids).hidden_states is None
        model.config.output_hidden_states = True
        assert torch.equal(model(ids).hidden_states[1], block)


@pytest.mark.parametrize("use_moe", [False, True])
def test_positions_of_padding_on_the_left_may_be_counted_or_not(use_moe):
    model, ids = make_model(use_moe=use_moe).eval(), text(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits, alone = model(ids, mask, positions).logits, model(ids[:1, 5:]).logits[0]
        assert (logits[0, 5:] - alone).abs().max() < 1e-5 and (logits - model(ids, mask).logits)[mask == 1].abs().max() < 1e-5
        gap = positions + 3 * (torch.arange(11) > 8)
        assert (model(ids, mask, gap).logits - logits)[:, 9:].abs().max() > 1e-3, "positions are read"


def test_two_texts_in_a_row_are_two_texts_when_their_positions_say_so():
    model, ids = make_model().eval(), text(1, 11)
    with torch.no_grad():
        packed = model(ids, position_ids=torch.cat([torch.arange(4), torch.arange(7)])[None], use_cache=False).logits
        assert (packed - torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)).abs().max() < 1e-5


# --- transformers' Trainer --------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Eight texts of one length with different numbers of supervised tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        ids = text(1, 12, seed=index)[0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(torch.arange(12) < index, -100)}


def train(folder, model, **settings) -> Trainer:
    """One epoch by transformers' Trainer; plain gradient descent, so that a change of weights is a gradient."""
    arguments = TrainingArguments(folder, per_device_train_batch_size=2, per_device_eval_batch_size=4, num_train_epochs=1,
                                  learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, report_to=[],
                                  save_strategy="no", disable_tqdm=True, use_cpu=True, **settings)  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=token_accuracy)
    trainer.train()
    return trainer


def token_accuracy(predictions) -> dict:
    """As TRL has it: the logits before the last against the labels after the first."""
    right = predictions.predictions[:, :-1].argmax(-1) == predictions.label_ids[:, 1:]
    return {"accuracy": right[predictions.label_ids[:, 1:] != -100].mean()}


@pytest.mark.parametrize("build", [lambda: make_model(kind=MiniMindVForConditionalGeneration), lambda: decoders()[1]], ids=["vlm", "decoder"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_transformers_trainer_descends_the_mean_over_all_supervised_tokens(tmp_path, build, smoothing):
    """Four micro-batches of different numbers of labels are one update: that of all eight rows at once."""
    model, reference = build().train(), build().train()
    rows = [Rows()[index] for index in range(8)]
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    loss = F.cross_entropy(reference(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)
    loss.backward()
    trainer = train(tmp_path, model, gradient_accumulation_steps=4, label_smoothing_factor=smoothing)
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for (name, new), old in zip(model.named_parameters(), reference.parameters(), strict=True):
        expected = old - 0.1 * (0 if old.grad is None else old.grad)  # the projector of a VLM sees nothing
        assert torch.allclose(new, expected, atol=1e-6), name
    figures = trainer.evaluate()
    with torch.no_grad():
        logits = model.eval()(ids).logits
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
    assert figures["eval_accuracy"] == pytest.approx(right.float().mean().item())
    halves = [F.cross_entropy(logits[part, :-1].flatten(0, 1), labels[part, 1:].flatten(), label_smoothing=smoothing)
              for part in (slice(0, 4), slice(4, 8))]  # fmt: skip
    assert figures["eval_loss"] == pytest.approx(sum(halves).item() / 2, rel=1e-4)


def test_every_forward_gives_an_output_of_its_own():
    model = make_model().eval()
    first = model(text(1, 5))
    before = first.logits.clone()
    second = model(text(3, 4, seed=2))
    assert torch.equal(first.logits, before) and second.logits.shape[0] == 3
    ghost = weakref.ref(first.logits)
    del first
    assert ghost() is None


def test_save_and_load_as_transformers_folder(tmp_path):
    model = make_model(use_moe=True).eval()
    model.save_pretrained(tmp_path)
    ids = text(1, 8)
    for loaded in (MiniMindVLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(loaded, MiniMindVLM) and loaded.lm_head.weight is loaded.model.embed_tokens.weight
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_registered_with_transformers():
    assert VLMConfig().model_type == "minimind-v" and VLMConfig().intermediate_size == 1408


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": 30}, {"num_key_value_heads": 3}, {"use_moe": True, "num_experts_per_tok": 9},
              {"scoring_func": "sigmoid"}, {"hidden_size": 12}],
)  # fmt: skip
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ValueError):
        VLMConfig(**({"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2} | wrong))


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [[[2]], [[2, 3]], [[0, 0, 0]], [[2], [4]], [[1, 0], [0, 2]], [[1, 1, 0], [2, 0, 0]], [[3, 0], [2]]])
def test_each_image_lands_at_its_own_positions(pattern):
    model, ids = make_model().eval(), with_images(pattern)
    N = sum(map(len, pattern))
    features = torch.randn(N, P, 24)
    with torch.no_grad():
        embeds = model.embed(ids, image_features=features)
        projected = model.vision_proj(features)
    places = [(row, place) for row, gaps in enumerate(pattern) for place in accumulate(gaps)]
    for number, (row, start) in enumerate(places):
        assert torch.equal(embeds[row, start : start + P], projected[number])
    untouched = ids != 34
    assert torch.equal(embeds[untouched], model.model.embed_tokens(ids)[untouched])


def accumulate(gaps: list[int]) -> list[int]:
    starts, at = [], 0
    for gap in gaps:
        starts.append(at + gap)
        at += gap + P
    return starts


def test_runs_are_leftmost_and_do_not_overlap():
    assert len(find_image_positions(torch.full((1, 3 * P + 5), 34), 34, P)) == 3 * P
    assert len(find_image_positions(torch.full((2, P - 1), 34), 34, P)) == 0
    ids = torch.full((1, P + 4), 34)
    assert find_image_positions(ids, 34, P).tolist() == list(range(P))


def test_counts_that_do_not_match_are_named():
    model, ids = make_model(), with_images([[2]])
    with pytest.raises(ValueError, match=r"2 images .* positions for 1 "):
        model(ids, image_features=torch.randn(2, P, 24))
    with pytest.raises(ValueError, match=r"1 images .* positions for 0 "):
        model(text(1, 9), image_features=torch.randn(1, P, 24))
    with pytest.raises(ValueError, match="no vision encoder"):
        model(ids, pixel_values=torch.randn(1, 3, 224, 224))


def test_splice_gradient_reaches_features_and_text_alone():
    embeds, features = torch.randn(1, 10, 4, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)
    splice_image_features(embeds, features, torch.tensor([2, 3, 4])).sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))
    assert embeds.grad[0, :, 0].tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]


def test_the_vision_encoder_is_held_but_is_no_submodule():
    encoder = make_vision_encoder()
    model = make_model(encoder=encoder).train()
    model.to(torch.float64)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert encoder.dtype == torch.float64, "the encoder follows the model"
    assert not any("vision_encoder" in name for name, _ in [*model.named_parameters(), *model.state_dict().items()])
    assert copy.deepcopy(model).vision_encoder is not encoder
    with pytest.raises(ValueError, match="width 24"):
        make_model(encoder=encoder, vision_hidden_size=768)


def test_text_only_batches_give_every_parameter_a_gradient():
    for use_moe in (False, True):
        model, ids = make_model(use_moe=use_moe).train(), text(1, 2)  # 1 token a row and expert at most
        model(ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert model.vision_proj.vision_proj[0].weight.grad.abs().max() == 0


# --- generation -------------------------------------------------------------------------------------------------------


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def seeing():
    return make_model(encoder=make_vision_encoder(), kind=MiniMindVForConditionalGeneration, initializer_range=0.3).eval()


def batch_with_images(model, pattern: list[list[int]]) -> dict:
    """Inputs as the processor gives them: padded on the left, with the places of images; a run of "@" is text."""
    ids = with_images(pattern)
    lengths = [len(gaps) * P + sum(gaps) + 5 for gaps in pattern]
    ids = torch.stack([row.roll(ids.shape[1] - length) for row, length in zip(ids, lengths, strict=True)])
    positions = find_image_positions(ids, 34, P)
    starts = torch.tensor([ids.shape[1] - length for length in lengths])[:, None]
    ids[:, -2:] = 34
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= starts).long(), "image_positions": positions,
            "pixel_values": torch.randn(sum(map(len, pattern)), 3, 224, 224, generator=torch.Generator().manual_seed(0))}


def by_full_forwards(model, given: dict, row: int, first: int, count: int) -> list[int]:
    """The definition: the row alone, without padding, all tokens through the model for every new one; its images are
    `count` from `first` on."""
    T = given["input_ids"].shape[1]
    ids = given["input_ids"][row : row + 1, given["attention_mask"][row] == 1]
    positions = given["image_positions"][first * P : (first + count) * P] - row * T - (T - ids.shape[1])
    with torch.no_grad():
        for _ in range(5):
            logits = model(ids, pixel_values=given["pixel_values"][first : first + count], image_positions=positions).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, -5:].tolist()


@pytest.mark.parametrize(
    ("given", "way"),
    [("positions", {}), ("positions", {"use_cache": False}), ("searched", {"use_cache": False}), ("features", {"num_beams": 2}),
     ("features", {"num_return_sequences": 2, "do_sample": True, "top_k": 1}),
     ("positions", {"num_return_sequences": 2, "num_beams": 2, "use_cache": False})],
)  # fmt: skip
def test_rows_of_a_batch_get_the_answers_of_each_alone(seeing, given, way):
    pattern = [[2, 1], [3], [0, 0]]
    batch = batch_with_images(seeing, pattern)
    if given == "searched":
        del batch["image_positions"]
    if given == "features":
        batch["image_features"] = seeing.encode_images(batch.pop("pixel_values"))
    out = seeing.generate(**batch, **{**GREEDY, **way})[:, batch["input_ids"].shape[1] :]
    batch = batch_with_images(seeing, pattern)
    if way.get("num_beams", 1) == 1:
        expected = [by_full_forwards(seeing, batch, row, first, len(pattern[row])) for row, first in enumerate((0, 2, 3))]
        assert len({tuple(tokens) for tokens in expected}) == 3
    else:
        expected = []
        for row, first in enumerate((0, 2, 3)):
            kept = batch["attention_mask"][row] == 1
            T, N = len(kept), len(pattern[row])
            alone = seeing.generate(
                batch["input_ids"][row : row + 1, kept], pixel_values=batch["pixel_values"][first : first + N],
                image_positions=batch["image_positions"][first * P : (first + N) * P] - row * T - int((~kept).sum()),
                **{**GREEDY, **way, "use_cache": True})  # fmt: skip
            expected += alone[:, -5:].tolist()
    repeat = way.get("num_return_sequences", 1) if way.get("num_beams", 1) == 1 else 1
    assert out.tolist() == [tokens for tokens in expected for _ in range(repeat)]


def test_images_that_a_cache_holds_are_not_read_again(seeing):
    """A conversation goes on: the whole text and all images are given again, with the cache of the first answer; also
    when an image was read in part."""
    batch = batch_with_images(seeing, [[2, 1]])
    ids, more = batch["input_ids"], {name: batch[name] for name in ("pixel_values", "image_positions")}
    expected = seeing.generate(ids, **more, **GREEDY)
    for held in (1, 2 + P // 2, 3 + P, 2 * P + 3, ids.shape[1] - 1):
        cache = seeing(ids, **more, use_cache=True).past_key_values
        cache.crop(held - ids.shape[1])
        assert torch.equal(seeing.generate(ids, **more, **GREEDY, past_key_values=cache), expected)
    assert torch.equal(seeing.generate(ids, **more, **GREEDY, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(seeing.generate(ids, **more, **GREEDY, assistant_model=seeing), expected)
    embeds = seeing.embed(ids, **more)
    assert torch.equal(seeing.generate(inputs_embeds=embeds, **GREEDY), expected[:, -5:])
    with pytest.raises(ValueError, match="hold them already"):
        seeing(inputs_embeds=embeds, **more)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        seeing.generate(ids, **more, **GREEDY, prefill_chunk_size=50)


def test_text_alone_is_answered_with_and_without_a_cache(seeing):
    ids = torch.full((2, P + 20), 34)  # looks like an image, and is none
    ids[0, :3], ids[1, 7:9] = 100, 200
    expected = seeing.generate(ids, **GREEDY)
    assert torch.equal(seeing.generate(ids, **GREEDY, use_cache=False), expected)
    assert torch.equal(seeing.generate(ids, **GREEDY, prefill_chunk_size=50), expected)
    out = seeing.generate(ids, **GREEDY, output_hidden_states=True, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected) and len(out.hidden_states[0]) == 3 and len(out.logits) == 5
    with pytest.raises(ValueError, match=r"1 images.* positions for 2"):
        seeing.generate(ids, pixel_values=torch.zeros(1, 3, 224, 224), num_beams=2, **GREEDY)


def test_repetition_penalty_lowers_scores_of_either_sign():
    scores = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[0, 1]]), torch.tensor([[3.0, -2.0, 1.0]]))
    assert scores.tolist() == [[2.0, -3.0, 1.0]]


# --- Mixture of Experts -----------------------------------------------------------------------------------------------


def plain_moe(layer: MOEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The definition, token by token."""
    experts, weights, _ = layer.gate(x)
    rows = []
    for token, chosen, weight in zip(x.flatten(0, 1), experts, weights, strict=True):
        routed = sum(w * layer.experts[e](token) for e, w in zip(chosen.tolist(), weight, strict=True))
        rows.append(routed + sum(expert(token) for expert in layer.shared_experts))
    return torch.stack(rows).view_as(x)


def test_sorted_experts_equal_the_definition_with_gradients():
    layer = make_model(use_moe=True).model.layers[0].mlp.eval()
    x = torch.randn(2, 7, 32)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    out, plain = layer(x)[0], plain_moe(layer, x)
    assert torch.allclose(out, plain, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(out.square().sum(), parameters)
    theirs = torch.autograd.grad(plain.square().sum(), parameters, allow_unused=True)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-4), name


def test_auxiliary_loss_ignores_padding_and_is_kept_apart():
    model = make_model(use_moe=True).train()
    ids = text(2, 6)
    padded, mask = F.pad(ids, (0, 9)), F.pad(torch.ones_like(ids), (0, 9))
    labels, padded_labels = ids, F.pad(ids, (0, 9), value=-100)
    plain, out = model(ids, labels=labels), model(padded, labels=padded_labels, attention_mask=mask)
    assert out.aux_loss.item() == pytest.approx(plain.aux_loss.item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    assert model(padded, labels=padded_labels).aux_loss.item() != pytest.approx(plain.aux_loss.item(), rel=1e-3)
    assert model.eval()(ids).aux_loss is None and make_model().train()(ids).aux_loss is None


def test_moe_keeps_the_number_format():
    layer = make_model(use_moe=True).model.layers[0].mlp.train()
    x = 1e5 * torch.randn(1, 4, 32)  # beyond fp16
    assert torch.isfinite(layer(x)[0]).all() and layer(x)[0].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(layer(x)[0]).all()


def test_decoder_alone_is_a_transformers_model():
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    decoder = MiniMindForCausalLM(config).eval()
    out = decoder.generate(text(2, 4), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 7)


def test_a_training_step_asks_the_device_for_no_value():
    """Whoever asks waits: on a GPU for all that was queued before."""
    model, ids, places = make_model().train(), torch.full((2, 210), 7), torch.arange(196)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(ids, labels=ids, use_cache=False, loss_positions=torch.arange(5), image_features=torch.zeros(1, 196, 24),
              image_positions=places).loss.backward()  # fmt: skip
    names = {event.key for event in profile.key_averages()}
    assert "aten::index_copy" in names and not names & {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}
