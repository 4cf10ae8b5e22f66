"""`plain_step`, the shortest way through a step of decoding: right where it goes, and untouched where it does not."""

import copy

import pytest
import torch
from helpers import assert_within_budget
from linear_attention_cases import make_inputs, make_map, reference

from hf_efficient import PerformerConfig, PerformerForCausalLM
from hf_efficient.kernels.linear_attention import LinearAttentionState, linear_attention, plain_step, step_offsets
from hf_efficient.modeling import performer_attention
from hf_efficient.modeling.recurrent_cache import RecurrentStateLayer


BATCH, HEADS = 2, 3


def walk(tokens, feature_map, start, step):
    """Outputs `[B, H, N, V]` and the last state of `step`, token by token; and at which it did not go."""
    state, outputs, refused = LinearAttentionState(*(part.clone() for part in start)), [], []
    for index in range(tokens[0].shape[2]):
        token = [states[:, :, index : index + 1] for states in tokens]
        output, state = step(*token, feature_map, state)
        refused += [index] if output is None else []
        outputs.append(torch.zeros_like(token[2]) if output is None else output)
    return torch.cat(outputs, dim=2), state, refused


def plain(query, key, value, feature_map, state):
    both = torch.cat([query, key], dim=1)
    return plain_step(both, value, feature_map, state, step_offsets(state.log_scale)), state


def general(query, key, value, feature_map, state):
    return linear_attention(query, key, value, feature_map, causal=True, state=state)


def behind_a_prompt(name, feature_map, dtype=torch.float32, size=1.0):
    """A state after 40 tokens, the largest of whose keys nothing below will surpass a million times; and 9 tokens."""
    torch.manual_seed(0)
    prompt = make_inputs(name, 40, batch=BATCH, heads=HEADS, dtype=dtype)
    tokens = [size * states for states in make_inputs(name, 9, batch=BATCH, heads=HEADS, dtype=dtype)]
    return linear_attention(*prompt, feature_map, causal=True).state, tokens


@pytest.mark.parametrize("name", ["softmax", "softmax-large-epsilon", "hyperbolic"])
@pytest.mark.parametrize("size", [0.01, 1.0, 2.0])
@torch.no_grad()
def test_it_is_the_recurrence(name, size):
    feature_map = make_map(name, 8)
    start, tokens = behind_a_prompt(name, feature_map, size=size)
    wide = [states.double() for states in tokens], LinearAttentionState(*(part.double() for part in start))
    exact, exact_state = reference(*wide[0], feature_map.to(torch.float64), causal=True, state=wide[1])
    eager, eager_state, _ = walk(tokens, feature_map, start, general)
    output, state, refused = walk(tokens, feature_map, start, plain)
    assert not refused
    assert_within_budget(output, exact, eager, "output")
    for name, index in (("key_value", 0), ("key_sum", 1)):
        sums = [
            part[index] * part.log_scale.double().exp().reshape(BATCH, HEADS, *[1] * (part[index].ndim - 2))
            for part in (state, exact_state, eager_state)
        ]
        assert_within_budget(sums[0], sums[1], sums[2], name)
    assert torch.equal(state.log_scale, start.log_scale)


@torch.no_grad()
def test_where_it_would_overflow_or_vanish_it_leaves_everything_as_it_was():
    feature_map = make_map("softmax", 8)
    start, tokens = behind_a_prompt("softmax", feature_map)
    big_key = [tokens[0], tokens[1] * 0, tokens[2]]
    low = start._replace(log_scale=start.log_scale - 100)
    for state, step in ((start, [tokens[0] * 40, *tokens[1:]]), (low, big_key)):
        parts = [part.clone() for part in state]
        output, state = plain(*(states[:, :, :1] for states in step), feature_map, state)
        assert output is None and all(torch.equal(part, old) for part, old in zip(state, parts, strict=True))
    empty = LinearAttentionState.empty(BATCH, HEADS, 24, 5)
    assert plain(*(states[:, :, :1] for states in tokens), feature_map, empty)[0] is None


@pytest.mark.parametrize(
    "name", ["softmax-no-epsilon", "optimal-positive", "without-norm", "exponential-of-inputs", "relu", "elu_plus_one"]
)
@torch.no_grad()
def test_other_maps_are_not_plain(name):
    feature_map = make_map(name, 8)
    start, tokens = behind_a_prompt(name, feature_map)
    assert walk(tokens, feature_map, start, plain)[2] == [*range(9)]


@torch.no_grad()
def test_other_numbers_are_not_plain():
    feature_map = make_map("softmax", 8)
    start, tokens = behind_a_prompt("softmax", feature_map)
    token = [states[:, :, :1] for states in tokens]
    assert plain(*(states.bfloat16() for states in token), feature_map, start)[0] is None
    spread = start._replace(key_value=start.key_value.mT.contiguous().mT)
    assert plain(*token, feature_map, spread)[0] is None
    spread = start._replace(key_sum=start.key_sum.mT.contiguous().mT)
    assert plain(*token, feature_map, spread)[0] is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain(*token, feature_map, start)[0] is None
    both, offsets = torch.cat(token[:2], dim=1), step_offsets(start.log_scale)
    assert plain_step(both, token[2], feature_map, start, offsets, "triton") is None
    assert plain_step(both, token[2], feature_map, start, offsets) is not None


def performer(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return PerformerForCausalLM(PerformerConfig(**sizes, intermediate_size=48, is_decoder=True, **options)).eval()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("options", [{}, {"position_embedding_type": "learned"}], ids=["rotary", "learned"])
def test_generation_goes_through_it_and_gives_what_it_gave(rows, options, monkeypatch):
    model, calls = performer(**options), []

    def noted(*arguments):
        calls.append(plain_step(*arguments))
        return calls[-1]

    tokens = torch.randint(1, 40, (rows, 12))
    settings = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    monkeypatch.setattr(performer_attention, "plain_step", noted)
    quick = model.generate(tokens, **settings)
    assert len(calls) == 19 * 2 and sum(output is not None for output in calls) > 30
    monkeypatch.setattr(performer_attention, "plain_step", lambda *arguments: None)
    slow = model.generate(tokens, **settings)
    assert torch.equal(quick.sequences, slow.sequences)
    torch.testing.assert_close(torch.stack(quick.logits), torch.stack(slow.logits), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_padded_batch_goes_through_it_too(monkeypatch):
    model, calls = performer(), []
    tokens, mask = torch.randint(1, 40, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    monkeypatch.setattr(performer_attention, "plain_step", lambda *a: calls.append(plain_step(*a)) or calls[-1])
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert len(calls) == 7 * 2 and sum(output is not None for output in calls) > 8
    alone = model.generate(tokens[1:, 5:], max_new_tokens=8, do_sample=False)
    assert torch.equal(together[1, 12:], alone[0, 7:])


@torch.no_grad()
def test_keys_far_below_the_largest_one_are_no_obstacle():
    feature_map = make_map("softmax", 8)
    start, tokens = behind_a_prompt("softmax", feature_map)
    high = start._replace(log_scale=start.log_scale + 200)  # as behind a key that all attend to
    output, state, refused = walk(tokens, feature_map, high, plain)
    assert not refused
    torch.testing.assert_close(output, walk(tokens, feature_map, high, general)[0])


@torch.no_grad()
def test_a_cache_of_an_older_copy_of_this_code_is_read_as_before(monkeypatch):
    model, tokens = performer(), torch.randint(1, 40, (1, 12))
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False)
    monkeypatch.delattr(RecurrentStateLayer, "step_offsets")
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), expected)


@torch.no_grad()
def test_no_rows_are_no_obstacle_to_the_general_step():
    feature_map = make_map("softmax", 8)
    empty = LinearAttentionState.empty(0, HEADS, 24, 5)
    token = [torch.zeros(0, HEADS, 1, size) for size in (8, 8, 5)]
    assert plain(*token, feature_map, empty)[0] is None
    assert general(*token, feature_map, empty).output.shape == (0, HEADS, 1, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_map": "relu"},
        {"feature_map": "optimal_positive"},
        {"feature_epsilon": 0.0},
        {"num_key_value_heads": 2},
        {"num_local_attention_heads": 1},
        {"masked_keys_in_normalizer": True},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_other_attentions_do_not_ask_for_it(options):
    assert not performer(**options).model.layers[0].self_attn.may_be_plain


@pytest.mark.parametrize("feature_map", ["softmax", "hyperbolic"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_read_the_projections_as_they_are_now(feature_map, mode):
    """Steps have their own copy of a projection; no later prompt may meet it, whichever way the model changed."""
    model, tokens = performer(feature_map=feature_map), torch.randint(1, 40, (1, 12))
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def logits(model):
        with mode():
            return torch.stack(model.generate(tokens, **settings).logits)

    def turned(layer):
        return layer.self_attn.projection_matrix.roll(1, dims=-1)

    def write(model):
        for layer in model.model.layers:
            layer.self_attn.projection_matrix.copy_(turned(layer))
        return model

    def write_unseen(model):
        for layer in model.model.layers:
            layer.self_attn.projection_matrix.data.copy_(turned(layer))
        return model

    def replace(model):
        for layer in model.model.layers:
            layer.self_attn.projection_matrix = turned(layer)
        return model

    for change in (write, write_unseen, replace, lambda model: write(copy.deepcopy(model))):
        before = logits(model)
        model = change(model)
        fresh = performer(feature_map=feature_map)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(model), logits(fresh))
        assert not torch.equal(logits(model), before)
