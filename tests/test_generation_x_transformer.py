"""XTransformer's cache in `generate`: every kind of decoder with greedy search and beams, some in every other way.

That any split of a sequence gives the logits of the whole is in test_x_transformer.py.
"""

import copy

import pytest
import torch
from generation_models import NEW_TOKENS, assert_one_at_a_time, assert_same, left_padded, run, tokens
from helpers import assert_within_budget
from transformers import StaticCache
from x_transformer_models import CAUSAL, SOME, causal_model, encoder_decoder_model


STRATEGIES = {
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", CAUSAL)
def test_cached_equals_uncached(name, strategy):
    """With rows padded on the left; a cached step sees one token."""
    ids, mask = left_padded([3, 7])
    options = {"attention_mask": mask, **strategy}
    cached = run(causal_model(name), ids, **options)
    assert_same(cached, run(causal_model(name), ids, use_cache=False, **options), name)
    assert_one_at_a_time(cached, 7)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SOME)
def test_sampling(name, strategy):
    prompt = tokens(2, 7)
    cached = run(causal_model(name), prompt, **STRATEGIES[strategy])
    assert_same(cached, run(causal_model(name), prompt, use_cache=False, **STRATEGIES[strategy]), strategy)


@pytest.mark.parametrize("name", SOME)
def test_left_padding_equals_no_padding(name):
    model, lengths = causal_model(name), [3, 7, 5]
    ids, mask = left_padded(lengths)
    batch = run(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = run(model, ids[row : row + 1, -length:])
        assert batch.sequences[row, -NEW_TOKENS:].tolist() == alone.sequences[0, -NEW_TOKENS:].tolist(), f"row {row}"
        assert_within_budget(batch.logits[:, row], alone.logits[:, 0].double(), alone.logits[:, 0], f"row {row}")


@pytest.mark.parametrize("name", SOME)
def test_prompt_lookup_and_assistant(name):
    """Candidates come, and most are taken back."""
    model = causal_model(name)
    prompt = tokens(1, 4).repeat(1, 3)
    expected = run(model, prompt, use_cache=False)
    assert_same(run(model, prompt, prompt_lookup_num_tokens=3, max_matching_ngram_size=2), expected, "prompt lookup")
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    assistant.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    assert_same(run(model, prompt, assistant_model=assistant), expected, "assistant")


@pytest.mark.parametrize("name", SOME)
def test_continued_from_a_cache(name):
    model, prompt = causal_model(name), tokens(2, 7)
    first = run(model, prompt, max_new_tokens=4)
    rest = run(model, first.sequences, past_key_values=first.cache, max_new_tokens=NEW_TOKENS - 4)
    assert_one_at_a_time(rest, 1, NEW_TOKENS - 4)
    assert rest.sequences.tolist() == run(model, prompt, use_cache=False).sequences.tolist()


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", SOME)
def test_static_cache(name, strategy):
    model, (ids, mask) = causal_model(name), left_padded([3, 7])
    options = {"attention_mask": mask, **strategy}
    static = run(model, ids, cache_implementation="static", **options)
    assert isinstance(static.cache, StaticCache)
    assert_same(static, run(model, ids, use_cache=False, **options), "static cache")


@pytest.mark.parametrize("name", SOME)
def test_chunked_prefill(name):
    model, (ids, mask) = causal_model(name), left_padded([5, 7])
    chunked = run(model, ids, attention_mask=mask, prefill_chunk_size=3)
    assert_same(chunked, run(model, ids, attention_mask=mask, use_cache=False), "chunked prefill")


def test_a_window_bounds_the_cache():
    cache = run(causal_model("window"), tokens(1, 7), max_new_tokens=20).cache
    assert all(layer.keys.shape[2] == 3 for layer in cache.layers)


def source(lengths):
    ids = tokens(len(lengths), max(lengths), seed=4)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", SOME)
def test_encoder_decoder(name, strategy):
    model, (ids, mask) = encoder_decoder_model(name), source([8, 5])
    options = {"attention_mask": mask, **strategy}
    cached = run(model, ids, **options)
    assert_same(cached, run(model, ids, use_cache=False, **options), name)
    assert_one_at_a_time(cached, 1)
    alone = run(model, ids[1:, :5], **strategy)
    assert cached.sequences[1].tolist() == alone.sequences[0].tolist()


@pytest.mark.parametrize("name", ("rope", "memory tokens, alibi", "window"))
def test_encoder_decoder_with_a_static_cache(name):
    model, (ids, mask) = encoder_decoder_model(name), source([8, 5])
    static = run(model, ids, attention_mask=mask, cache_implementation="static")
    assert_same(static, run(model, ids, attention_mask=mask, use_cache=False), name)
