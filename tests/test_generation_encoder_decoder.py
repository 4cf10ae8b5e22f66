"""The same as test_generation.py for the encoder–decoder: here the cache also holds what cross-attention reads."""

import copy

import pytest
import torch
from generation_models import (
    ENCODER_DECODER,
    NEW_TOKENS,
    assert_one_at_a_time,
    assert_same,
    encoder_decoder_model,
    run,
    tokens,
)
from helpers import assert_within_budget
from transformers import DynamicCache, EncoderDecoderCache


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}


@pytest.fixture(params=list(ENCODER_DECODER))
def model(request):
    return encoder_decoder_model(request.param)


def source(lengths):
    """Encoder inputs of these lengths, padded on the right."""
    ids = tokens(len(lengths), max(lengths), seed=4)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


class Calls:
    """How often the encoder ran."""

    def __init__(self, model):
        self.count = 0
        self.handle = model.get_encoder().register_forward_hook(self.note)

    def note(self, *_):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def test_models_are_decisive(model):
    """No near-ties, and the last source token and the first target token both matter at the end."""
    ids, mask = source([8, 8])
    result = run(model, ids, attention_mask=mask, use_cache=False)
    best, second = result.logits.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-3
    assert len(set(result.sequences[:, 1:].flatten().tolist())) > 3, "the model repeats itself"
    other_source, other_target = ids.clone(), result.sequences.clone()
    other_source[:, -1] = (ids[:, -1] - 3 + 1) % 50 + 3
    other_target[:, 1] = (other_target[:, 1] - 3 + 1) % 50 + 3
    last = model(ids, decoder_input_ids=result.sequences).logits[:, -1]
    for other in ((other_source, result.sequences), (ids, other_target)):
        changed = model(other[0], decoder_input_ids=other[1]).logits[:, -1]
        assert (last - changed).abs().max() > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cached_equals_uncached(model, strategy):
    ids, mask = source([8, 5])
    options = {"attention_mask": mask, **STRATEGIES[strategy]}
    with Calls(model) as encoder:
        cached = run(model, ids, **options)
    assert encoder.count == 1
    assert_same(cached, run(model, ids, use_cache=False, **options), strategy)
    assert_one_at_a_time(cached, 1)


def test_padded_source_equals_unpadded(model):
    lengths = [8, 3, 5]
    ids, mask = source(lengths)
    batch = run(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = run(model, ids[row : row + 1, :length])
        assert batch.sequences[row].tolist() == alone.sequences[0].tolist(), f"row {row}"
        assert_within_budget(batch.logits[:, row], alone.logits[:, 0].double(), alone.logits[:, 0], f"row {row}")


def test_rows_that_end_early(model):
    ids, mask = source([8, 5, 8])
    end = run(model, ids, attention_mask=mask).sequences[0, 4].item()
    cached = run(model, ids, attention_mask=mask, eos_token_id=end)
    expected = run(model, ids, attention_mask=mask, eos_token_id=end, use_cache=False)
    assert_same(cached, expected, "a row ends early")
    assert (cached.sequences[0, 5:] == 0).all()


def test_given_start_of_the_target(model):
    """Several target tokens at once, padded on the left as a batch of prompts is."""
    ids, mask = source([8, 5])
    start = tokens(2, 4)
    start_mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"attention_mask": mask, "decoder_input_ids": start * start_mask, "decoder_attention_mask": start_mask}
    cached = run(model, ids, **options)
    assert_one_at_a_time(cached, cached.sequences.shape[1] - NEW_TOKENS)
    assert_same(cached, run(model, ids, use_cache=False, **options), "given start")


def test_encoder_outputs_given(model):
    ids, mask = source([8, 5])
    encoded = model.get_encoder()(ids, attention_mask=mask)
    with Calls(model) as encoder:
        given = run(model, encoder_outputs=encoded, attention_mask=mask)
    assert encoder.count == 0
    assert_same(given, run(model, ids, attention_mask=mask), "encoder outputs given")


def test_prompt_lookup(model):
    ids, _ = source([8])
    looked_up = run(model, ids, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert_same(looked_up, run(model, ids, use_cache=False), "prompt lookup")


@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
def test_assistant_model(model, noise):
    ids, _ = source([8])
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(noise * weight.std(correction=0) * torch.randn_like(weight))
    assistant.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    assisted = run(model, ids, assistant_model=assistant)
    assert_same(assisted, run(model, ids, use_cache=False), "assistant model")
    if noise == 0.0:
        assert len(assisted.lengths) <= NEW_TOKENS // 2, f"right candidates were refused: {assisted.lengths}"
    if noise == 1.0:
        assert sum(assisted.lengths) > NEW_TOKENS, f"nothing had to be taken back: {assisted.lengths}"


def test_continued_from_a_cache(model):
    ids, mask = source([8, 5])
    first = run(model, ids, attention_mask=mask, max_new_tokens=4)
    rest = run(
        model,
        ids,
        attention_mask=mask,
        decoder_input_ids=first.sequences,
        # transformers tells from its length that the ids hold what the cache has already seen.
        decoder_attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.cache,
        max_new_tokens=NEW_TOKENS - 4,
    )
    assert_one_at_a_time(rest, 1, NEW_TOKENS - 4)
    assert rest.sequences.tolist() == run(model, ids, attention_mask=mask, use_cache=False).sequences.tolist()


@pytest.mark.parametrize("strategy", ["greedy", "beams"])
def test_static_cache(model, strategy):
    ids, mask = source([8, 5])
    options = {"attention_mask": mask, **STRATEGIES[strategy]}
    static = run(model, ids, cache_implementation="static", **options)
    assert_same(static, run(model, ids, use_cache=False, **options), "static cache")
    assert_one_at_a_time(static, 1)


@pytest.mark.parametrize("split", [[1] * 9, [4, 3, 2], [9]], ids=str)
@torch.no_grad()
def test_several_tokens_per_step(model, split):
    ids, mask = source([8, 5])
    target = tokens(2, 9)
    whole = model(ids, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits
    encoded = model.get_encoder()(ids, attention_mask=mask)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    pieces = [
        model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=piece, past_key_values=cache).logits
        for piece in target.split(split, dim=1)
    ]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10 * whole.abs().max().item())
