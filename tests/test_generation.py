"""Generation with a cache equals generation without, in every way `generate` offers and for every kind of decoder.

transformers' GenerationTesterMixin is not in its sdist; this file stands in its place and goes further: it also holds
that the cached path never computes anything again (`assert_one_at_a_time`).
"""

import copy

import pytest
import torch
from generation_models import (
    CAUSAL,
    CONSTANT_STATE,
    NEW_TOKENS,
    assert_one_at_a_time,
    assert_same,
    causal_model,
    left_padded,
    run,
    tokens,
)
from helpers import assert_within_budget
from transformers import DynamicCache, StaticCache


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "top-k, top-p, temperature": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.5},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.fixture(params=list(CAUSAL))
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return causal_model(name)


def test_models_are_decisive(name, model):
    """What the other tests stand on: no near-ties, and the first token of the prompt still matters at the end."""
    prompt = tokens(2, 7)
    result = run(model, prompt, use_cache=False)
    best, second = result.logits.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-3
    assert len(set(result.sequences[0, 7:].tolist())) > 2, "the model repeats itself"
    other = result.sequences.clone()
    other[:, 0] = (other[:, 0] - 3 + 1) % 50 + 3
    last = [model(ids).logits[:, -1] for ids in (result.sequences, other)]
    # A window of four tokens in each of two layers does not reach back that far.
    assert ((last[0] - last[1]).abs().max() > 1e-3) == (name != "local heads only")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cached_equals_uncached(model, strategy):
    prompt = tokens(2, 7)
    cached = run(model, prompt, **STRATEGIES[strategy])
    assert_same(cached, run(model, prompt, use_cache=False, **STRATEGIES[strategy]), strategy)
    assert_one_at_a_time(cached, 7)


def test_rows_that_end_early(model):
    """A finished row is fed padding while the others go on."""
    prompt = tokens(3, 7)
    end = run(model, prompt).sequences[0, 10].item()
    cached = run(model, prompt, eos_token_id=end)
    assert_same(cached, run(model, prompt, eos_token_id=end, use_cache=False), "a row ends early")
    assert (cached.sequences[0, 11:] == 0).all()


def test_left_padding_equals_no_padding(model):
    lengths = [3, 7, 5]
    ids, mask = left_padded(lengths)
    batch = run(model, ids, attention_mask=mask)
    assert_one_at_a_time(batch, 7)
    assert_same(batch, run(model, ids, attention_mask=mask, use_cache=False), "left-padded batch")
    for row, length in enumerate(lengths):
        alone = run(model, ids[row : row + 1, -length:])
        assert batch.sequences[row, -NEW_TOKENS:].tolist() == alone.sequences[0, -NEW_TOKENS:].tolist(), f"row {row}"
        assert_within_budget(batch.logits[:, row], alone.logits[:, 0].double(), alone.logits[:, 0], f"row {row}")


def test_left_padded_beams(model):
    ids, mask = left_padded([3, 7])
    cached = run(model, ids, attention_mask=mask, num_beams=3)
    assert_same(cached, run(model, ids, attention_mask=mask, num_beams=3, use_cache=False), "left-padded beams")


def test_prompt_lookup(model):
    # The prompt repeats itself, so that candidates are found at once; most are wrong and have to be taken back.
    prompt = tokens(1, 4).repeat(1, 3)
    looked_up = run(model, prompt, prompt_lookup_num_tokens=3, max_matching_ngram_size=2)
    assert max(looked_up.lengths[1:]) > 1 or looked_up.lengths[0] > 12, f"no candidates: {looked_up.lengths}"
    assert_same(looked_up, run(model, prompt, use_cache=False), "prompt lookup")


@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
def test_assistant_model(model, noise):
    """An assistant that is always right, one that is mostly right, and one that hardly ever is."""
    prompt = tokens(1, 7)
    assistant = copy.deepcopy(model)
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
    if noise == 1.0:
        assert sum(assisted.lengths) > 7 + NEW_TOKENS, f"nothing had to be taken back: {assisted.lengths}"


def test_continued_from_a_cache(model):
    prompt = tokens(2, 7)
    first = run(model, prompt, max_new_tokens=4)
    rest = run(model, first.sequences, past_key_values=first.cache, max_new_tokens=NEW_TOKENS - 4)
    assert_one_at_a_time(rest, 1, NEW_TOKENS - 4)
    assert rest.sequences.tolist() == run(model, prompt, use_cache=False).sequences.tolist()


def test_next_turn_of_a_conversation(model):
    first = run(model, tokens(2, 7), max_new_tokens=4)
    turn = torch.cat((first.sequences, tokens(2, 5, seed=2)), dim=1)
    second = run(model, turn, past_key_values=first.cache)
    # The last generated token has not been seen yet.
    assert_one_at_a_time(second, 6)
    assert_same(second, run(model, turn, use_cache=False), "second turn")


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_prefill(model, chunk):
    ids, mask = left_padded([3, 7])  # the first chunk of three is all padding for one row
    chunked = run(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert_same(chunked, run(model, ids, attention_mask=mask, use_cache=False), "chunked prefill")
    prefill = {1: [1] * 7, 3: [3, 3, 1], 7: [7]}[chunk]
    assert chunked.lengths == prefill + [1] * (NEW_TOKENS - 1)


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams"])
def test_static_cache(model, strategy):
    ids, mask = left_padded([3, 7])
    options = {"attention_mask": mask, **STRATEGIES[strategy]}
    static = run(model, ids, cache_implementation="static", **options)
    assert isinstance(static.cache, StaticCache)
    assert_same(static, run(model, ids, use_cache=False, **options), "static cache")
    assert_one_at_a_time(static, 7)


def test_static_cache_is_used_again(model):
    """`reset` leaves nothing of the first prompt behind."""
    cache = StaticCache(config=model.config, max_cache_len=7 + NEW_TOKENS)
    run(model, tokens(2, 7, seed=5), past_key_values=cache)
    cache.reset()
    again = run(model, tokens(2, 7), past_key_values=cache)
    assert_same(again, run(model, tokens(2, 7), use_cache=False), "a static cache used again")


def test_inputs_embeds(model):
    prompt = tokens(2, 7)
    expected = run(model, prompt, use_cache=False)
    embedded = run(model, inputs_embeds=model.get_input_embeddings()(prompt))
    assert embedded.sequences.tolist() == expected.sequences[:, 7:].tolist()
    assert_within_budget(embedded.logits, expected.logits.double(), expected.logits, "inputs_embeds")
    assert_one_at_a_time(embedded, 7)


def test_quantized_cache():
    """transformers quantises keys and values of full attention only, and says so."""
    with pytest.raises(ValueError, match="only full attention layers.*performer_state"):
        run(causal_model("softmax"), tokens(1, 7), cache_implementation="quantized", cache_config={"backend": "fp8"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers' offloaded cache needs a CUDA stream")
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache(model, implementation):
    model, prompt = copy.deepcopy(model).cuda(), tokens(2, 7).cuda()
    offloaded = run(model, prompt, cache_implementation=implementation)
    assert_same(offloaded, run(model, prompt, use_cache=False), implementation)


# The cache itself, without `generate`.


def new_cache(model, kind, length=64):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=length)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("split", [[1] * 14, [5, 4, 3, 2], [1, 6, 1, 6], [14]], ids=str)
@torch.no_grad()
def test_several_tokens_per_step(model, split, kind):
    """Any split of a sequence gives the logits of the whole, in float64 to 1e-10."""
    ids, mask = left_padded([9, 14, 12])
    whole = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    pieces = feed(model, new_cache(model, kind), ids, split, mask)
    real = mask.bool()
    torch.testing.assert_close(pieces[real], whole[real], rtol=0, atol=1e-10 * whole[real].abs().max().item())


@torch.no_grad()
def test_several_tokens_per_step_in_float32(model):
    ids = tokens(3, 14)
    oracle = model(ids, use_cache=False).logits
    single = copy.deepcopy(model).float()
    whole = single(ids, use_cache=False).logits
    for split in ([1] * 14, [5, 4, 3, 2]):
        pieces = feed(single, new_cache(model, "dynamic"), ids, split)
        assert_within_budget(pieces, oracle, whole, f"split {split}")


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def feed(model, cache, ids, split, mask=None):
    """Logits of `ids`, given to the model in pieces of these lengths."""
    logits, start = [], cache.get_seq_length()
    for piece in ids.split(split, dim=1):
        end = start + piece.shape[1]
        keywords = {}
        if mask is not None:
            keywords = {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, start:end]}
        logits.append(model(piece, past_key_values=cache, use_cache=True, **keywords).logits)
        assert cache.get_seq_length() == end
        start = end
    return torch.cat(logits, dim=1)


def assert_remembers(model, cache, ids, what):
    """The cache holds `ids`: what comes next gets the logits that it gets after `ids` without a cache."""
    following = tokens(len(ids), 5, seed=9)
    whole = model(torch.cat((ids, following), dim=1), use_cache=False).logits[:, -5:]
    logits = feed(model, cache, following, [1, 3, 1])
    torch.testing.assert_close(
        logits, whole, rtol=0, atol=1e-10 * whole.abs().max().item(), msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("removed", [0, 1, 3, 5])
@torch.no_grad()
def test_crop(model, removed):
    ids = tokens(2, 12)
    cache = new_cache(model, "dynamic")
    feed(model, cache, ids[:, :7], [7])
    cache.activate_past_recording()
    feed(model, cache, ids[:, 7:], [5])
    cache.crop(-removed)
    assert cache.get_seq_length() == 12 - removed
    assert_remembers(model, cache, ids[:, : 12 - removed], f"{removed} tokens removed")


@torch.no_grad()
def test_crop_again_and_again(model):
    """As assisted decoding does it: candidates come, some are taken back, others come in their place."""
    ids, wrong = tokens(2, 19), tokens(2, 19, seed=3)
    cache = new_cache(model, "dynamic")
    cache.activate_past_recording()
    feed(model, cache, ids[:, :7], [7])
    cache.crop(0)
    for start, right in ((7, 2), (9, 4), (13, 0), (13, 1)):
        candidates = torch.cat((ids[:, start : start + right], wrong[:, start + right : start + 5]), dim=1)
        feed(model, cache, candidates, [5])
        cache.crop(right - 5)
    assert_remembers(model, cache, ids[:, :14], "crops in a row")


@torch.no_grad()
def test_crop_of_what_was_not_recorded(model):
    """A sum does not know its summands; saying so beats a wrong state. (Every decoder here has a linear block.)"""
    cache = new_cache(model, "dynamic")
    feed(model, cache, tokens(2, 7), [4, 3])
    with pytest.raises((RuntimeError, ValueError), match="crop|record"):
        cache.crop(-2)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_reorder(model, kind):
    ids, order = tokens(3, 7), torch.tensor([2, 0, 0])
    cache = new_cache(model, kind)
    feed(model, cache, ids, [7])
    cache.reorder_cache(order)
    assert_remembers(model, cache, ids[order], "reordered")


@torch.no_grad()
def test_rows_repeated_and_selected(model):
    ids = tokens(2, 7)
    cache = new_cache(model, "dynamic")
    feed(model, cache, ids, [7])
    cache.batch_repeat_interleave(3)
    copies = copy.deepcopy(cache)
    assert_remembers(model, copies, ids.repeat_interleave(3, dim=0), "repeated")
    chosen = torch.tensor([4, 0])
    cache.batch_select_indices(chosen)
    assert_remembers(model, cache, ids[[1, 0]], "selected")


@pytest.mark.parametrize("name", CONSTANT_STATE)
@torch.no_grad()
def test_cache_has_constant_size(name):
    model, sizes = causal_model(name), []
    cache = new_cache(model, "dynamic")
    ids = tokens(1, 80)
    for start in range(0, 80, 20):
        feed(model, cache, ids[:, start : start + 20], [1] * 20)
        sizes.append(sum(tensor_bytes(layer) for layer in cache.layers))
    assert len(set(sizes)) == 1 and sizes[0] > 0, f"bytes after 20, 40, 60 and 80 tokens: {sizes}"


def tensor_bytes(value) -> int:
    """Bytes of storage of every tensor inside, views counted with all that they keep alive."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    return sum(map(tensor_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0
