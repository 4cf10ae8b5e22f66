"""The generation contract: every head that generates says with a cache what it says without, in every way there is.

One definition for all: the same call of `generate` with `use_cache=False`. The rows of tests/generation_heads.py say
which heads there are, and with which options each is tried. transformers' GenerationTesterMixin is not in its sdist;
this file stands in its place, and also holds that a cached step never computes anything again
(`assert_one_at_a_time`). A mode that transformers or a cache cannot serve is refused by name, which is tested too.
"""

import copy
import functools

import generation_heads as table
import pytest
import tiny_heads
import torch
from generation_models import NEW_TOKENS, assert_one_at_a_time, assert_same, run, tokens
from helpers import assert_within_budget
from transformers import QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer


def held_to(cases):
    return pytest.mark.parametrize("asked", [pytest.param(case, id="-".join(case)) for case in cases], indirect=True)


@pytest.fixture
def asked(request):
    return table.ask(*request.param)


@functools.cache
def by_definition(asked, *lengths, strategy="greedy"):
    """What the prompt has to give, in whatever way it is asked; `lengths` are those of its rows."""
    return run(asked.model, **asked.prompt(*lengths), use_cache=False, **table.STRATEGIES[strategy])


def about(strategy):
    return pytest.mark.matrix("beams" if "num_beams" in table.STRATEGIES[strategy] else "greedy, sampling")


@pytest.fixture
def refused(record_property):
    """As `pytest.raises`; docs/matrix.md says that the cell is refused, if nothing else in it works."""

    def refused(error, match):
        record_property("matrix_cell", "refused")
        return pytest.raises(error, match=match)

    return refused


contract = held_to(table.CONTRACT)


def test_every_head_that_generates_has_a_row():
    generating = {name for name, head in tiny_heads.HEADS.items() if head.generates}
    assert set(table.HEADS) == generating, "tests/generation_heads.py holds exactly the heads that generate"


@contract
@torch.no_grad()
def test_models_are_decisive(asked):
    """What the other tests stand on: no near-ties, and the first token of all still matters at the end."""
    prompt = {name: value for name, value in asked.prompt(*[asked.long] * 2).items() if name != "attention_mask"}
    result = run(asked.model, **prompt, use_cache=False)
    best, second = result.logits.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-4
    assert len(set(result.sequences[:, -NEW_TOKENS:].flatten().tolist())) > 1, "the model repeats itself"
    if asked.variant in asked.row.short_sighted:
        return
    other = result.sequences.clone()
    place = int(asked.model.config.is_encoder_decoder)  # an encoder–decoder's first token is the start of the target
    other[:, place] = (other[:, place] - 3 + 1) % 50 + 3
    last = [asked.whole(ids)[:, -8:] for ids in (result.sequences, other)]
    assert (last[0] - last[1]).abs().max() > 1e-6


# The strategies


@pytest.mark.parametrize(
    "asked, strategy",
    [
        pytest.param(case, strategy, id="-".join((*case, strategy)), marks=about(strategy))
        for case in table.CONTRACT + table.CACHED_ONLY
        for strategy in table.strategies_for(*case)
    ],
    indirect=["asked"],
)
def test_cached_equals_uncached(asked, strategy):
    prompt, options = asked.prompt(), table.STRATEGIES[strategy]
    cached = run(asked.model, **prompt, **options)
    assert_same(cached, by_definition(asked, strategy=strategy), strategy)
    assert_one_at_a_time(cached, asked.shown(prompt), options["max_new_tokens"])


@pytest.mark.matrix("padding")
@contract
def test_a_padded_batch_equals_its_rows(asked):
    lengths = [asked.short, asked.long, (asked.short + asked.long) // 2]
    prompt = asked.prompt(*lengths)
    batch = run(asked.model, **prompt, **table.FEW)
    for row, length in enumerate(lengths):
        alone = run(asked.model, **asked.alone(prompt, row, length), **table.FEW)
        new = len(batch.logits)
        assert batch.sequences[row, -new:].tolist() == alone.sequences[0, -new:].tolist(), f"row {row}"
        assert_within_budget(batch.logits[:, row], alone.logits[:, 0].double(), alone.logits[:, 0], f"row {row}")


@pytest.mark.matrix("padding")
@contract
def test_rows_that_end_early(asked):
    """A finished row is fed padding while the others go on."""
    prompt = asked.prompt(asked.long, asked.short, asked.long)
    end = run(asked.model, **prompt, max_new_tokens=4).sequences[0, -1].item()
    cached = run(asked.model, **prompt, eos_token_id=end)
    assert_same(cached, run(asked.model, **prompt, eos_token_id=end, use_cache=False), "a row ends early")
    assert (cached.sequences[0, cached.sequences.shape[1] - len(cached.logits) + 4 :] == 0).all()


@pytest.mark.matrix("prompt lookup")
@contract
def test_prompt_lookup(asked, refused):
    """A prompt that repeats itself, so that candidates are found; most are wrong and have to be taken back."""
    prompt = asked.prompt(asked.long)
    if not asked.model.config.is_encoder_decoder:
        prompt = {"ids": tokens(1, 4).repeat(1, 3)}
    options = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    if asked.model._is_stateful:
        with refused(ValueError, match="assisted generation is not supported"):
            run(asked.model, **prompt, **options)
        return
    looked_up = run(asked.model, **prompt, **options)
    shown = asked.shown(prompt)
    assert max(looked_up.lengths[1:]) > 1 or looked_up.lengths[0] > shown, f"no candidates: {looked_up.lengths}"
    assert_same(looked_up, run(asked.model, **prompt, use_cache=False), "prompt lookup")


@pytest.mark.matrix("assistant")
@contract
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_assistant_model(asked, noise, refused):
    """An assistant that is always right, and one that is now and then."""
    prompt, assistant = asked.prompt(asked.long), copy.deepcopy(asked.model)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(noise * weight.std(correction=0) * torch.randn_like(weight))
    assistant.generation_config.update(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    if asked.model._is_stateful:
        with refused(ValueError, match="assisted generation is not supported"):
            run(asked.model, **prompt, assistant_model=assistant)
        return
    assisted = run(asked.model, **prompt, assistant_model=assistant)
    assert_same(assisted, by_definition(asked, asked.long), "assistant model")
    if noise == 0.0:
        # The assistant of an encoder–decoder loses its place in transformers after the first round, BART's as well.
        most = NEW_TOKENS - 3 if asked.model.config.is_encoder_decoder else NEW_TOKENS // 2
        assert len(assisted.lengths) <= most, f"right candidates were refused: {assisted.lengths}"


@pytest.mark.matrix("group, contrastive")
@held_to([(head, row.contract[0]) for head, row in table.HEADS.items()])
@pytest.mark.parametrize("mode", table.MOVED_OUT)
def test_modes_that_transformers_moved_out_are_refused_by_name(asked, mode, refused):
    with refused(ValueError, match=f"(?i){mode} requires `trust_remote_code=True`"):
        run(asked.model, **asked.prompt(), **table.MOVED_OUT[mode])


@pytest.mark.matrix("continued")
@contract
def test_continued_from_a_cache(asked):
    prompt = asked.prompt()
    first = run(asked.model, **prompt, max_new_tokens=4)
    again = asked.continued(prompt, first.sequences)
    rest = run(asked.model, **again, past_key_values=first.cache, max_new_tokens=NEW_TOKENS - 4)
    assert_one_at_a_time(rest, 1, NEW_TOKENS - 4)
    assert rest.sequences.tolist() == by_definition(asked).sequences.tolist()


@pytest.mark.matrix("continued")
@contract
def test_next_turn_of_a_conversation(asked):
    """The cache goes on with what was generated and five tokens that were not."""
    prompt = asked.prompt()
    first = run(asked.model, **prompt, max_new_tokens=4)
    turn = asked.continued(prompt, torch.cat((first.sequences, tokens(2, 5, seed=2)), dim=1))
    second = run(asked.model, **turn, past_key_values=first.cache)
    # The last generated token has not been seen yet.
    assert_one_at_a_time(second, 6)
    assert_same(second, run(asked.model, **turn, use_cache=False), "second turn")


@pytest.mark.matrix("chunked prefill")
@held_to(table.DECODERS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunked_prefill(asked, chunk, refused):
    """The first chunks are all padding for one of the rows."""
    lengths = ()
    if asked.first_call_reaches_every_row:
        with refused(ValueError, match="memory tokens"):
            run(asked.model, **asked.prompt(), prefill_chunk_size=chunk)
        lengths = (asked.long, asked.long)
    chunked = run(asked.model, **asked.prompt(*lengths), prefill_chunk_size=chunk)
    assert_same(chunked, by_definition(asked, *lengths), "chunked prefill")
    prefill = [chunk] * (asked.long // chunk) + [asked.long % chunk] * (asked.long % chunk > 0)
    assert chunked.lengths == prefill + [1] * (NEW_TOKENS - 1)


@pytest.mark.matrix("chunked prefill")
@held_to(table.ENCODER_DECODERS)
def test_chunked_prefill_of_a_target_is_refused(asked, refused, request):
    """transformers cuts the mask of the encoder's input to the length of the chunk, which nobody can mean."""
    if asked.row.images:
        why = "a question whose mask was cut is taken for a shorter one, with more patches in front of it"
        request.applymarker(pytest.mark.xfail(strict=True, reason=why))
    prompt = asked.started(asked.prompt())
    del prompt["decoder_attention_mask"]
    with refused(ValueError, match=r"mask must have shape \(2, \d+\).*got \(2, 3\)"):
        run(asked.model, **prompt, prefill_chunk_size=3)


@pytest.mark.matrix("static")
@contract
@pytest.mark.parametrize("strategy", ["greedy", "beams"])
def test_static_cache(asked, strategy):
    prompt, options = asked.prompt(), table.STRATEGIES[strategy]
    static = run(asked.model, **prompt, cache_implementation="static", **options)
    assert isinstance(static.decoder_cache, StaticCache)
    assert_same(static, by_definition(asked, strategy=strategy), "static cache")
    assert_one_at_a_time(static, asked.shown(prompt), options["max_new_tokens"])


@pytest.mark.matrix("static")
@contract
def test_a_cache_is_used_again(asked):
    """`reset` leaves nothing of the first prompt behind."""
    cache = asked.cache("static")
    run(asked.model, **asked.prompt(asked.long, asked.long), past_key_values=cache)
    cache.reset()
    again = run(asked.model, **asked.prompt(), past_key_values=cache)
    assert_same(again, by_definition(asked), "a static cache used again")


@pytest.mark.matrix("offloaded")
@contract
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache(asked, implementation, refused):
    """Keys and values that grow are moved by CUDA streams; states and windows, being small, stay where they are."""
    model, prompt = asked.model, asked.prompt()
    if torch.cuda.is_available():
        model = copy.deepcopy(model).cuda()
        prompt = {name: value.cuda() for name, value in prompt.items()}
    elif not asked.row.latents_only and any(isinstance(layer, DynamicLayer) for layer in asked.layers()):
        with refused((AssertionError, RuntimeError), match="CUDA"):
            run(model, **prompt, cache_implementation=implementation)
        return
    offloaded = run(model, **prompt, cache_implementation=implementation)
    expected = by_definition(asked) if model is asked.model else run(model, **prompt, use_cache=False)
    assert_same(offloaded, expected, implementation)


@pytest.mark.matrix("quantised")
@contract
@torch.no_grad()
def test_quantized_cache(asked, refused):
    """transformers quantises keys and values of full attention, in decoders; what else there is it refuses."""
    model, prompt = asked.model, asked.prompt()
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    if model.config.is_encoder_decoder:
        with refused(ValueError, match="does not support the quantized cache"):
            run(model, **prompt, **options)
        return
    if any(type(layer) is not DynamicLayer for layer in asked.layers()):
        with refused(ValueError, match="only supported for models with only full attention layers"):
            run(model, **prompt, **options)
        return
    cache = run(model, **prompt, **options).cache
    assert {type(layer).__name__ for layer in cache.layers} == {"Fp8QuantizedLayer"}
    # Three bits of mantissa: what follows differs, and by little beside how far the logits spread.
    turn = asked.continued(prompt, torch.cat([prompt["ids"], tokens(2, 4, seed=9)], dim=1))
    whole = asked.whole(turn["ids"], turn["attention_mask"])[:, -4:]
    cache = QuantizedCache("fp8", model.config)
    logits = asked.feed(cache, turn["ids"], [asked.long, 1, 2, 1], turn["attention_mask"])[:, -4:]
    assert 0 < (logits - whole).abs().max() < 0.2 * whole.std()


@pytest.mark.matrix("inputs_embeds")
@contract
def test_inputs_embeds(asked):
    prompt = asked.prompt()
    expected = by_definition(asked)
    embedded = run(asked.model, **asked.embedded(prompt))
    assert embedded.sequences[:, -NEW_TOKENS:].tolist() == expected.sequences[:, -NEW_TOKENS:].tolist()
    assert_within_budget(embedded.logits, expected.logits.double(), expected.logits, "inputs_embeds")
    assert_one_at_a_time(embedded, asked.shown(prompt))


@pytest.mark.matrix("several tokens")
@held_to(table.ENCODER_DECODERS)
def test_given_start_of_the_target(asked):
    prompt = asked.started(asked.prompt())
    cached = run(asked.model, **prompt)
    assert_one_at_a_time(cached, cached.sequences.shape[1] - NEW_TOKENS)
    assert_same(cached, run(asked.model, **prompt, use_cache=False), "given start")


@pytest.mark.matrix("inputs_embeds")
@held_to(table.ENCODER_DECODERS)
def test_the_encoder_runs_once_or_not_at_all(asked):
    prompt, calls = asked.prompt(), []
    handle = asked.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    try:
        expected = run(asked.model, **prompt)
        assert len(calls) == 1
        encoded = asked.encoded(prompt)
        calls.clear()
        given = run(asked.model, encoder_outputs=encoded, attention_mask=prompt["attention_mask"])
        assert not calls
    finally:
        handle.remove()
    assert_same(given, expected, "encoder outputs given")


# The cache itself, without `generate`


@pytest.mark.matrix("several tokens")
@held_to(table.CONTRACT + table.CACHED_ONLY)
@pytest.mark.parametrize(
    "kind, split",
    [("dynamic", [1] * 14), ("dynamic", [5, 4, 3, 2]), ("static", [5, 1, 1, 7])],
    ids=str,
)
@torch.no_grad()
def test_several_tokens_per_step(asked, kind, split):
    """Any split of a sequence gives the logits of the whole, in float64 to 1e-10."""
    short = 14 if asked.first_call_reaches_every_row and split[0] == 1 else 9
    ids, mask = asked.sequence(short, 14, max(short, 12))
    whole = asked.whole(ids, mask)
    pieces = asked.feed(asked.cache(kind), ids, split, mask)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    if asked.row.latents_only:
        real, whole, pieces = real[:, -1:], whole[:, -1:], pieces[:, -1:]
    torch.testing.assert_close(pieces[real], whole[real], rtol=0, atol=1e-10 * whole[real].abs().max().item())


@pytest.mark.matrix("several tokens")
@contract
@torch.no_grad()
def test_several_tokens_per_step_in_float32(asked):
    ids, _ = asked.sequence(14, 14, 14)
    single = copy.deepcopy(asked.model).float()
    oracle, whole = asked.whole(ids), asked.whole(ids, model=single)
    for split in ([1] * 14, [5, 4, 3, 2]):
        pieces = asked.feed(asked.cache("dynamic"), ids, split, model=single)
        if asked.row.latents_only:
            oracle, whole, pieces = oracle[:, -1:], whole[:, -1:], pieces[:, -1:]
        assert_within_budget(pieces, oracle, whole, f"split {split}")


@pytest.mark.matrix("beams")
@contract
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_rows_reordered_repeated_and_selected(asked, kind):
    ids = tokens(3, 13)
    changes = {"reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])}
    if kind == "dynamic":  # transformers' static layers know no other change of rows
        changes |= {
            "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            "selected": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        }
    filled = asked.cache(kind)
    asked.feed(filled, ids, [11, 1, 1])  # steps leave more behind than a prompt does
    for what, (change, rows) in changes.items():
        cache = copy.deepcopy(filled)
        change(cache)
        asked.assert_remembers(cache, ids[rows], what, rows)


@pytest.mark.matrix("assistant")
@contract
@torch.no_grad()
def test_crop_again_and_again(asked):
    """As assisted decoding does it: candidates come, some are taken back, others come in their place."""
    if asked.model._is_stateful:
        pytest.skip("assisted decoding is refused")
    ids, wrong = tokens(2, 22), tokens(2, 22, seed=3)
    cache = asked.cache("dynamic")
    cache.activate_past_recording()
    asked.feed(cache, ids[:, :7], [7])
    cache.crop(0)
    for start, right in ((7, 2), (9, 4), (13, 0), (13, 1), (14, 3)):
        candidates = torch.cat((ids[:, start : start + right], wrong[:, start + right : start + 5]), dim=1)
        asked.feed(cache, candidates, [2, 3])
        cache.crop(right - 5)
        assert cache.get_seq_length() == start + right
    asked.assert_remembers(cache, ids[:, :17], "crops in a row")
