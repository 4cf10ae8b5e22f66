"""Generation of CoLT5 with a cache equals generation without: the causal model and the encoder–decoder."""

import copy

import pytest
import torch
from colt5_models import CAUSAL, DECODERS, causal_model, conditional_model
from generation_models import NEW_TOKENS, assert_one_at_a_time, assert_same, left_padded, run, tokens
from helpers import assert_within_budget
from transformers import DynamicCache, EncoderDecoderCache, StaticCache


STRATEGIES = {"greedy": {}, "sampling": {"do_sample": True}, "beams": {"num_beams": 3}}

strategies = pytest.mark.parametrize("strategy", STRATEGIES)
causal = pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in CAUSAL], indirect=True)
conditional = pytest.mark.parametrize("decoder", [pytest.param(name, id=name) for name in DECODERS], indirect=True)


@pytest.fixture
def model(request):
    return causal_model(request.param)


@pytest.fixture
def decoder(request):
    return conditional_model(request.param)


def source(lengths):
    """Encoder inputs of these lengths, padded on the right."""
    ids = tokens(len(lengths), max(lengths), seed=4)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


# The causal model


@causal
def test_models_are_decisive(model):
    prompt = tokens(2, 17)
    result = run(model, prompt, use_cache=False)
    best, second = result.logits.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-4
    other = result.sequences.clone()
    other[:, 0] = (other[:, 0] - 3 + 1) % 50 + 3
    # Behind what two layers of windows reach, where only the heavy branch can have carried it.
    assert (model(result.sequences).logits - model(other).logits)[:, 8:].abs().max() > 1e-6


@causal
@strategies
def test_cached_equals_uncached(model, strategy):
    prompt = tokens(2, 17)
    cached = run(model, prompt, **STRATEGIES[strategy])
    assert_same(cached, run(model, prompt, use_cache=False, **STRATEGIES[strategy]), strategy)
    assert_one_at_a_time(cached, 17)


@causal
def test_left_padding_equals_no_padding(model):
    lengths = [3, 17, 11]
    ids, mask = left_padded(lengths)
    batch = run(model, ids, attention_mask=mask)
    assert_same(batch, run(model, ids, attention_mask=mask, use_cache=False), "left-padded batch")
    beams = run(model, ids, attention_mask=mask, num_beams=2)
    assert_same(beams, run(model, ids, attention_mask=mask, num_beams=2, use_cache=False), "left-padded beams")
    for row, length in enumerate(lengths):
        alone = run(model, ids[row : row + 1, -length:])
        assert batch.sequences[row, -NEW_TOKENS:].tolist() == alone.sequences[0, -NEW_TOKENS:].tolist(), f"row {row}"
        assert_within_budget(batch.logits[:, row], alone.logits[:, 0].double(), alone.logits[:, 0], f"row {row}")


@causal
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_assistant_model(model, noise):
    prompt, assistant = tokens(1, 17), copy.deepcopy(model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(noise * weight.std(correction=0) * torch.randn_like(weight))
    assistant.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    assisted = run(model, prompt, assistant_model=assistant)
    assert_same(assisted, run(model, prompt, use_cache=False), "assistant model")
    if noise == 0.0:
        assert len(assisted.lengths) <= NEW_TOKENS // 2, f"right candidates were refused: {assisted.lengths}"


@causal
@pytest.mark.parametrize("chunk", [1, 7])
def test_chunked_prefill(model, chunk):
    ids, mask = left_padded([3, 17])
    chunked = run(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert_same(chunked, run(model, ids, attention_mask=mask, use_cache=False), "chunked prefill")


@causal
@torch.no_grad()
def test_the_cache_is_cropped_reordered_selected_and_static(model):
    ids, order = tokens(3, 30), torch.tensor([2, 0, 0])
    whole = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=64)):
        first = model(ids[:, :21], past_key_values=cache).logits
        torch.testing.assert_close(first, whole[:, :21], rtol=0, atol=1e-10)
        cache.activate_past_recording()
        model(tokens(3, 5, seed=7), past_key_values=cache)
        cache.crop(-5)
        model(torch.cat([ids[:, 21:23], tokens(3, 2, seed=8)], dim=1), past_key_values=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 23
        cache.reorder_cache(order)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 5]))
        rest = model(ids[order][:, 23:], past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[order][:, 23:], rtol=0, atol=1e-10)
        with pytest.raises(RuntimeError, match="can remove the 7 tokens it has recorded.*got 8"):
            cache.crop(-8)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_heavy_cache_holds_the_routed_tokens_only():
    model, ids = causal_model("paper"), tokens(1, 200)
    cache = DynamicCache(config=model.config)
    for piece in ids.split(1, dim=1):
        model(piece, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.window_keys.shape[2] == 3 and layer.histories["queries"].mask.shape[1] == 7
    assert layer.keys.shape[3] <= 5 * (200 // 8 + 2)  # 9/8 of half a window of 8, rounded up
    assert all(history.logits.untyped_storage().nbytes() == 8 * 7 for history in layer.histories.values()), [
        (name, history.logits.shape, history.logits.dtype) for name, history in layer.histories.items()
    ]


def test_a_cache_of_another_model_is_refused():
    model = causal_model("paper")
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(tokens(2, 7), past_key_values=DynamicCache())


@causal
@torch.no_grad()
def test_repeated_tokens_are_ties_that_always_go_the_same_way(model):
    """In the first layer equal tokens have equal logits: rounding must not decide which of them is routed."""
    ids = torch.tensor([[5] * 30, [5, 5, 9] * 10, [7] * 15 + [5] * 15])
    whole, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([1, 1, 1, 9, 1, 3, 14], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)
    for row in range(3):
        alone = model(ids[row : row + 1], use_cache=False).logits[0]
        torch.testing.assert_close(alone, whole[row], rtol=0, atol=1e-10)


# The encoder–decoder


@conditional
@strategies
def test_conditional_cached_equals_uncached(decoder, strategy):
    ids, mask = source([40, 23])
    options = {"attention_mask": mask, **STRATEGIES[strategy]}
    cached = run(decoder, ids, **options)
    assert_same(cached, run(decoder, ids, use_cache=False, **options), strategy)
    assert_one_at_a_time(cached, 1)
    static = run(decoder, ids, cache_implementation="static", **options)
    assert_same(static, run(decoder, ids, use_cache=False, **options), "static cache")


@conditional
def test_padded_source_equals_unpadded(decoder):
    lengths = [40, 3, 23]
    ids, mask = source(lengths)
    batch = run(decoder, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = run(decoder, ids[row : row + 1, :length])
        assert batch.sequences[row].tolist() == alone.sequences[0].tolist(), f"row {row}"
        assert_within_budget(batch.logits[:, row], alone.logits[:, 0].double(), alone.logits[:, 0], f"row {row}")


@conditional
def test_given_start_of_the_target(decoder):
    """Several target tokens at once, padded on the left as a batch of prompts is."""
    ids, mask = source([20, 11])
    start, start_mask = tokens(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"attention_mask": mask, "decoder_input_ids": start * start_mask, "decoder_attention_mask": start_mask}
    cached = run(decoder, ids, **options)
    assert_same(cached, run(decoder, ids, use_cache=False, **options), "given start")


@conditional
@torch.no_grad()
def test_several_tokens_per_step(decoder):
    ids, mask = source([20, 11])
    target = tokens(2, 9)
    whole = decoder(ids, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
    encoded = decoder.get_encoder()(ids, attention_mask=mask)
    cache = EncoderDecoderCache(DynamicCache(config=decoder.config), DynamicCache(config=decoder.config))
    pieces = [
        decoder(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=piece, past_key_values=cache).logits
        for piece in target.split([4, 3, 2], dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-9 * whole.abs().max().item())
