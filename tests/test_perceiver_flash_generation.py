"""Perceiver AR generates with a cache exactly what it generates without, also far beyond its latents.

As tests/test_generation.py, whose tests of assisted decoding do not apply: the latents of several tokens at once are
those of the last one's window, and transformers is told so (`_is_stateful`).
"""

from functools import cache

import pytest
import torch
from generation_models import NEW_TOKENS, assert_one_at_a_time, assert_same, left_padded, run, tokens
from helpers import assert_within_budget
from perceiver_flash_models import CAUSAL, SIZES, decisive
from transformers import DynamicCache, StaticCache

from hf_efficient import PerceiverFlashConfig, PerceiverFlashForCausalLM
from hf_efficient.modeling.perceiver_flash_window import window_start


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}


@cache
def causal_model(name):
    torch.manual_seed(0)
    config = PerceiverFlashConfig(**{**SIZES, "tie_word_embeddings": False, **CAUSAL[name]})
    return decisive(PerceiverFlashForCausalLM(config))


@pytest.fixture(params=list(CAUSAL))
def model(request):
    return causal_model(request.param)


def test_models_are_decisive(model):
    """What the other tests stand on: no near-ties, and the first token of the prompt still matters at the end."""
    result = run(model, tokens(2, 13), use_cache=False)
    best, second = result.logits.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-3
    other = result.sequences.clone()
    other[:, 0] = (other[:, 0] - 3 + 1) % 50 + 3
    last = [model(ids).logits[:, -1] for ids in (result.sequences, other)]
    assert (last[0] - last[1]).abs().max() > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prompt", [5, 13])
def test_cached_equals_uncached(model, strategy, prompt):
    ids = tokens(2, prompt)
    cached = run(model, ids, **STRATEGIES[strategy])
    assert_same(cached, run(model, ids, use_cache=False, **STRATEGIES[strategy]), strategy)
    assert_one_at_a_time(cached, prompt)


def test_rows_that_end_early(model):
    prompt = tokens(3, 7)
    end = run(model, prompt).sequences[0, 10].item()
    cached = run(model, prompt, eos_token_id=end)
    assert_same(cached, run(model, prompt, eos_token_id=end, use_cache=False), "a row ends early")


@pytest.mark.parametrize("lengths", [[3, 7, 5], [4, 19, 11]])
def test_left_padding_equals_no_padding(model, lengths):
    ids, mask = left_padded(lengths)
    batch = run(model, ids, attention_mask=mask)
    assert_one_at_a_time(batch, max(lengths))
    assert_same(batch, run(model, ids, attention_mask=mask, use_cache=False), "left-padded batch")
    for row, length in enumerate(lengths):
        alone = run(model, ids[row : row + 1, -length:])
        assert batch.sequences[row, -NEW_TOKENS:].tolist() == alone.sequences[0, -NEW_TOKENS:].tolist(), f"row {row}"
        assert_within_budget(batch.logits[:, row], alone.logits[:, 0].double(), alone.logits[:, 0], f"row {row}")


def test_left_padded_beams(model):
    ids, mask = left_padded([3, 14])
    cached = run(model, ids, attention_mask=mask, num_beams=3)
    assert_same(cached, run(model, ids, attention_mask=mask, num_beams=3, use_cache=False), "left-padded beams")


def test_next_turn_of_a_conversation(model):
    first = run(model, tokens(2, 7), max_new_tokens=4)
    turn = torch.cat((first.sequences, tokens(2, 5, seed=2)), dim=1)
    second = run(model, turn, past_key_values=first.cache)
    assert_one_at_a_time(second, 6)
    assert_same(second, run(model, turn, use_cache=False), "second turn")


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_prefill(model, chunk):
    ids, mask = left_padded([5, 14])
    chunked = run(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert_same(chunked, run(model, ids, attention_mask=mask, use_cache=False), "chunked prefill")


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
def test_static_cache(model, strategy):
    ids, mask = left_padded([3, 13])
    options = {"attention_mask": mask, **STRATEGIES[strategy]}
    static = run(model, ids, cache_implementation="static", **options)
    assert isinstance(static.cache, StaticCache)
    assert_same(static, run(model, ids, use_cache=False, **options), "static cache")
    assert_one_at_a_time(static, 13)


def test_inputs_embeds(model):
    prompt = tokens(2, 11)
    expected = run(model, prompt, use_cache=False)
    embedded = run(model, inputs_embeds=model.get_input_embeddings()(prompt))
    assert embedded.sequences.tolist() == expected.sequences[:, 11:].tolist()
    assert_one_at_a_time(embedded, 11)


@torch.no_grad()
def test_rows_reordered_repeated_and_selected(model):
    """Each row of the cache keeps all that is its own, the inputs of the next window among it."""
    ids, following = tokens(3, 13), tokens(3, 6, seed=9)
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    ):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        change(cache)
        tail = following[:1].expand(len(rows), -1)
        for step in range(tail.shape[1]):
            logits = model(tail[:, step : step + 1], past_key_values=cache).logits
        whole = model(torch.cat([ids[rows], tail], dim=1), use_cache=False).logits
        torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=0, atol=1e-10 * whole.abs().max().item())


def test_latents_keep_their_size_and_the_input_grows():
    model, ids = causal_model("learned positions"), tokens(1, 40)
    cache = DynamicCache(config=model.config)
    for start in range(40):
        model(ids[:, start : start + 1], past_key_values=cache)
        assert cache.layers[0].get_seq_length() == start + 1
        assert cache.layers[1].get_seq_length() == start + 1 - window_start(start + 1, 8, 4) <= 8
        assert cache.layers[0].recent.shape[1] <= 8


def test_assisted_decoding_is_refused():
    model = causal_model("learned positions")
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        run(model, tokens(1, 7), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("count, stride", [(8, 4), (8, 1), (8, 8), (5, 2)])
def test_window_start(count, stride):
    lengths = torch.arange(60)
    starts = window_start(lengths, count, stride)
    for length in range(60):
        expected = next(start for start in range(0, 100, stride) if length - start <= count)
        assert window_start(length, count, stride) == starts[length] == expected
