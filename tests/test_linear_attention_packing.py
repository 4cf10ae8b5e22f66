"""linear_attention over packed sequences: the same as one call for each, forward, gradients and states; refusals.

Run: pytest tests/test_linear_attention_packing.py -k eager
"""

import pytest
import torch
from linear_attention_cases import (
    all_gradients,
    assert_equal_in_double,
    assert_like_eager,
    make_inputs,
    make_map,
    random_mask,
    reference,
)
from linear_attention_triton_cases import in_double, triton_attention

from hf_efficient.kernels.linear_attention import LinearAttentionState, linear_attention


causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
NAMES = ["key_value", "key_sum"]
# Shorter and longer than a chunk of either backend, of length one, and none at all, at the start and the end too.
BORDERS = {"eager": [0, 0, 70, 71, 71, 140, 205, 205], "triton": [0, 0, 17, 18, 18, 50, 53, 53]}


def one_by_one(function, cu_seqlens):
    """The definition: a call for each sequence."""

    def call(query, key, value, feature_map, *, causal, state, mask=None):
        outputs, states = [], []
        borders = cu_seqlens.tolist()
        for row, here in enumerate(map(slice, borders, borders[1:])):
            parts = (t[:, :, here] for t in (query, key, value))
            start = LinearAttentionState(*(part[row : row + 1] for part in state))
            of_mask = None if mask is None else mask[:, here]
            if here.start == here.stop:  # the quadratic form has no maximum of nothing
                outputs.append(value[:, :, here].to(state.key_value.dtype) * 0)
                states.append(start)
                continue
            output, end = function(*parts, feature_map, causal=causal, state=start, mask=of_mask)
            outputs.append(output)
            states.append(end)
        state = LinearAttentionState(*(torch.cat(parts) for parts in zip(*states, strict=True)))
        return torch.cat(outputs, dim=2), state

    return call


def make_case(name, borders, dtype=torch.float32, heads=2, kind=torch.int32, features=None):
    cu_seqlens = torch.tensor(borders, dtype=kind)
    sequences, length = len(borders) - 1, borders[-1]
    inputs = make_inputs(name, length, batch=1, heads=heads, dtype=dtype)
    feature_map = make_map(name, 8, torch.promote_types(dtype, torch.float32), features)
    before = make_inputs(name, 9, batch=sequences, heads=heads, dtype=feature_map.to(torch.float32).projection.dtype)
    before = [t.to(torch.promote_types(dtype, torch.float32)) for t in before]
    state = reference(*before, feature_map)[1]
    return (*inputs, feature_map), state, cu_seqlens


def loss_weights(inputs, state, dtype):
    return [torch.randn_like(inputs[2]), *(torch.randn_like(sums) / 50 for sums in state[:2])]


@pytest.mark.parametrize("name", ["softmax", "optimal-positive", "relu"])
@causal_or_not
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_eager_is_one_call_for_each_sequence(name, causal, masked, kind):
    """Outputs, final states and every gradient, in float64."""
    inputs, state, cu_seqlens = make_case(name, BORDERS["eager"], torch.float64, kind=kind)
    options = {"causal": causal, "mask": random_mask(1, inputs[0].shape[2]) if masked else None}
    weights = loss_weights(inputs, state, torch.float64)

    def packed(*tensors, **keywords):
        return linear_attention(*tensors, cu_seqlens=cu_seqlens, **keywords)

    separate = one_by_one(reference, cu_seqlens)
    output, end = packed(*inputs, state=state, **options)
    expected, expected_end = separate(*inputs, state=state, **options)
    assert_equal_in_double(output, expected, "output")
    for actual, wanted, part in zip(end, expected_end, LinearAttentionState._fields, strict=True):
        assert_equal_in_double(actual, wanted, part)
    found, wanted = (all_gradients(f, *inputs, state, weights, **options) for f in (packed, separate))
    for part in wanted:
        assert_equal_in_double(found[part], wanted[part], part)


@pytest.mark.parametrize("features, masked", [(None, True), (32, False)], ids=["masked", "features-fill-tiles"])
@pytest.mark.parametrize("name", ["softmax", "relu"])
@causal_or_not
def test_triton_within_budget_of_separate_sequences(name, causal, features, masked, nan_poisoned):
    """Without a mask, and with features that fill their tiles, chunks without rows are all that is masked."""
    pytest.importorskip("triton")
    inputs, state, cu_seqlens = make_case(name, BORDERS["triton"], heads=1, features=features)
    mask = random_mask(1, inputs[0].shape[2]) if masked else None
    options = {"causal": causal, "mask": mask}
    weights = loss_weights(inputs, state, torch.float32)
    *exact, exact_state = in_double(*inputs, state)

    def packed(*tensors, **keywords):
        return triton_attention(*tensors, cu_seqlens=cu_seqlens, **keywords)

    plain = [one_by_one(function, cu_seqlens) for function in (reference, linear_attention)]
    oracle, oracle_end = plain[0](*exact, state=exact_state, **options)
    output, end = packed(*inputs, state=state, **options)
    eagers = [function(*inputs, state=state, **options) for function in plain]
    assert_like_eager(output, oracle, [eager[0] for eager in eagers], "output")
    for part in LinearAttentionState._fields:
        eager_parts = [getattr(eager[1], part) for eager in eagers]
        assert_like_eager(getattr(end, part), getattr(oracle_end, part), eager_parts, part)
    exact_weights = [w.double() for w in weights]
    oracle = all_gradients(plain[0], *exact, exact_state, exact_weights, **options)
    found = all_gradients(packed, *inputs, state, weights, **options)
    eagers = [all_gradients(function, *inputs, state, weights, **options) for function in plain]
    for part in oracle:
        assert_like_eager(found[part], oracle[part], [eager[part] for eager in eagers], part)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@causal_or_not
def test_sequences_do_not_meet(backend, causal):
    """To the bit: whatever happens in a neighbour."""
    inputs, state, cu_seqlens = make_case("softmax", BORDERS[backend], heads=1)
    options = {"causal": causal, "cu_seqlens": cu_seqlens, "backend": backend}
    expected, ends = linear_attention(*inputs, state=state, **options)
    here = slice(*BORDERS[backend][4:6])
    changed = [100 * t for t in inputs[:3]]
    for tensor, original in zip(changed, inputs, strict=False):
        tensor[:, :, here] = original[:, :, here]
    actual, new_ends = linear_attention(*changed, inputs[3], state=state, **options)
    assert torch.equal(actual[:, :, here], expected[:, :, here])
    assert not torch.equal(actual, expected)
    assert all(torch.equal(a[4], b[4]) for a, b in zip(new_ends, ends, strict=True))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_starts_from_nothing_and_continues(backend):
    """Without a state, in two calls, and read by other queries: one row of the state for each sequence."""
    inputs, _, cu_seqlens = make_case("softmax", [0, 5, 23], heads=1)
    *tensors, feature_map = inputs
    options = {"causal": True, "backend": backend}
    output, end = linear_attention(*inputs, cu_seqlens=cu_seqlens, **options)
    assert [part.shape[0] for part in end] == [2, 2, 2]
    first, rest = torch.tensor([0, 3, 10]), torch.tensor([0, 2, 13])
    rows = torch.tensor([0, 1, 2, *range(5, 12)]), torch.tensor([3, 4, *range(12, 23)])
    begun, state = linear_attention(*(t[:, :, rows[0]] for t in tensors), feature_map, cu_seqlens=first, **options)
    ended, state = linear_attention(
        *(t[:, :, rows[1]] for t in tensors),
        feature_map,
        cu_seqlens=rest,
        state=state,
        update_state_in_place=True,
        **options,
    )
    torch.testing.assert_close(torch.cat([begun, ended], dim=2), output[:, :, torch.cat(rows)])
    for actual, expected in zip(state, end, strict=True):
        torch.testing.assert_close(actual, expected)
    query = tensors[0]
    read = linear_attention(query, None, None, feature_map, state=end, cu_seqlens=cu_seqlens, backend=backend).output
    for row, here in enumerate((slice(0, 5), slice(5, 23))):
        of_row = LinearAttentionState(*(part[row : row + 1] for part in end))
        alone = linear_attention(query[:, :, here], None, None, feature_map, state=of_row).output
        torch.testing.assert_close(read[:, :, here], alone)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_operators_and_compiler(backend):
    torch.compiler.reset()
    (query, key, value, feature_map), state, cu_seqlens = make_case("softmax", [0, 17, 18], heads=1)
    leaves = [t.requires_grad_() for t in (query, key, value, feature_map.projection)]
    function, projection, bias, *options = feature_map
    arguments = (query, key, value, *state, None, projection, bias, cu_seqlens, function, *options, True)
    name = {"eager": "linear_attention_packed_forward", "triton": "linear_attention_triton_forward"}[backend]
    torch.library.opcheck(getattr(torch.ops.hf_efficient, name).default, arguments)

    def attend(query, key, value, projection, cu_seqlens):
        used = feature_map._replace(projection=projection)
        return linear_attention(query, key, value, used, causal=True, cu_seqlens=cu_seqlens, backend=backend)

    results = []
    for call in (attend, torch.compile(attend, fullgraph=True)):
        output, end = call(*leaves, cu_seqlens)
        results.append([output, *end, *torch.autograd.grad(output.square().sum() + end[0].sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    torch.compiler.reset()


REJECTED = {
    "floats": (
        lambda c: {"cu_seqlens": c.float()},
        r"cu_seqlens must have shape \[sequences \+ 1\] in int32 or int64",
    ),
    "a matrix": (lambda c: {"cu_seqlens": c[None]}, r"cu_seqlens must have shape .* got \(1, 3\)"),
    "no sequence": (lambda c: {"cu_seqlens": c[:1]}, r"cu_seqlens must have shape .* got \(1,\)"),
    "another device": (lambda c: {"cu_seqlens": c.to("meta")}, "cu_seqlens must be on cpu, got meta"),
    "a late start": (lambda c: {"cu_seqlens": c + 1}, r"cu_seqlens must go from 0 to 18 and never fall, got \[1, 18"),
    "an early end": (lambda c: {"cu_seqlens": c[:2]}, r"cu_seqlens must go from 0 to 18 .* got \[0, 17\]"),
    "a fall": (lambda c: {"cu_seqlens": torch.tensor([0, 9, 5, 18])}, "never fall"),
    "a batch": (
        lambda c: {"inputs": make_inputs("softmax", 18)},
        "needs a batch of 1 .* got a batch of 2, 18 queries",
    ),
    "other keys": (
        lambda c: {"inputs": make_inputs("softmax", 18, keys=20, batch=1), "causal": False},
        "as many keys as queries, got a batch of 1, 18 queries and 20 keys",
    ),
    "a state of another number": (
        lambda c: {"state": 3},
        r"state.key_value must have shape \(2, 3, 24, 5\), got \(3, 3",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    change, message = REJECTED[name]
    cu_seqlens = torch.tensor([0, 17, 18], dtype=torch.int32)
    call = {"inputs": make_inputs("softmax", 18, batch=1), "cu_seqlens": cu_seqlens, "causal": True, "state": None}
    call |= change(cu_seqlens)
    inputs = call.pop("inputs")
    if call["state"]:
        call["state"] = LinearAttentionState.empty(call["state"], 3, 24, 5)
    with pytest.raises(ValueError, match=message):
        linear_attention(*inputs, make_map("softmax", 8), **call)
