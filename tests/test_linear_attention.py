"""linear_attention: the definition against the formula, the chunked form against the definition, splits, layouts.

Run: pytest tests/test_linear_attention.py -k causal
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_within_budget
from linear_attention_cases import (
    MAPS,
    assert_equal_in_double,
    assert_like_eager,
    definition,
    definition_of_state,
    doubled,
    empty_state,
    make_inputs,
    make_map,
    prefix_sums,
    random_mask,
    reference,
    run_in_parts,
    several,
    token_by_token,
    true_sums,
)

from hf_efficient.kernels.linear_attention import (
    FeatureMap,
    LinearAttentionOutput,
    LinearAttentionState,
    linear_attention,
)
from hf_efficient.kernels.linear_attention.eager_causal import causal_chunks, saved_states
from hf_efficient.kernels.linear_attention.reference import linear_attention_recurrent


causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
every_map = pytest.mark.parametrize("name", MAPS)
some_maps = pytest.mark.parametrize("name", ["softmax", "optimal-positive", "relu", "identity-of-inputs"])


@every_map
@causal_or_not
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
def test_reference_is_the_formula(name, causal, masked):
    query, key, value = make_inputs(name, 37, keys=37 if causal else 29, dtype=torch.float64)
    feature_map = make_map(name, 8, torch.float64)
    mask = random_mask(2, key.shape[2]) if masked else None
    output, state = reference(query, key, value, feature_map, causal=causal, mask=mask)
    expected = definition(query, key, value, feature_map, causal=causal, mask=mask)
    assert_equal_in_double(output, expected, "output")
    for actual, sums, part in zip(
        true_sums(state), definition_of_state(key, value, feature_map, mask), "SZ", strict=True
    ):
        assert_equal_in_double(actual, sums, part)


@every_map
def test_recurrent_is_quadratic(name):
    query, key, value = make_inputs(name, 33, dtype=torch.float64)
    feature_map = make_map(name, 8, torch.float64)
    mask = random_mask(2, 33)
    start = empty_state(query, value, feature_map)
    recurrent, recurrent_state = linear_attention_recurrent(query, key, value, feature_map, mask, start)
    quadratic, quadratic_state = reference(query, key, value, feature_map, causal=True, mask=mask)
    assert_equal_in_double(recurrent, quadratic, "output")
    for actual, expected, part in zip(recurrent_state, quadratic_state, LinearAttentionState._fields, strict=True):
        assert_equal_in_double(actual, expected, part)


def test_averages_like_softmax_attention_with_many_features():
    """The point of it all: the exponential features are an unbiased estimate of exp(q·k / sqrt(d))."""
    query, key, value = (0.5 * t for t in make_inputs("softmax", 40, dtype=torch.float64))
    softmax = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    errors = []
    for features in (100, 100_000):
        feature_map = FeatureMap("exponential", torch.randn(features, 8).double(), None, 8**-0.25)
        output = linear_attention(query, key, value, feature_map, causal=True).output
        errors.append(((output - softmax).norm() / softmax.norm()).item())
    assert errors[1] < 0.01 and errors[1] < errors[0] / 5, errors


@every_map
@causal_or_not
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
def test_chunked_is_the_reference_in_double(name, causal, length):
    query, key, value = make_inputs(name, length, keys=length if causal else length + 70, dtype=torch.float64)
    feature_map = make_map(name, 8, torch.float64)
    before = make_inputs(name, 21, dtype=torch.float64)
    _, state = reference(*before, feature_map)
    for start in (None, state):
        output, new_state = linear_attention(query, key, value, feature_map, causal=causal, state=start)
        expected, expected_state = reference(query, key, value, feature_map, causal=causal, state=start)
        assert_equal_in_double(output, expected, "output")
        for actual, wanted, part in zip(new_state, expected_state, LinearAttentionState._fields, strict=True):
            assert_equal_in_double(actual, wanted, part)


@some_maps
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300, 600])
def test_chunked_within_budget(name, causal, dtype, length):
    inputs = make_inputs(name, length, dtype=dtype, batch=2 if length > 100 else 8)
    feature_map = make_map(name, 8)
    actual = linear_attention(*inputs, feature_map, causal=causal)
    assert actual.output.dtype == dtype
    assert all(part.dtype == torch.float32 for part in actual.state)
    assert_all_like_eager(actual, inputs, feature_map, causal)


@pytest.mark.parametrize("head_dim, value_dim, features", [(16, 48, 40), (64, 8, 266), (3, 1, 1), (1, 7, 5)])
@causal_or_not
def test_sizes_need_not_match(head_dim, value_dim, features, causal):
    inputs = make_inputs("softmax", 260, head_dim, value_dim)
    feature_map = make_map("softmax", head_dim, features=features)
    actual = linear_attention(*inputs, feature_map, causal=causal)
    assert actual.output.shape == (2, 3, 260, value_dim) and actual.state.key_value.shape == (
        2,
        3,
        features,
        value_dim,
    )
    assert_all_like_eager(actual, inputs, feature_map, causal)


def assert_all_like_eager(actual, inputs, feature_map, causal):
    """Output and state of `linear_attention` against float64, as close as plain computations in the same dtype."""
    oracle, oracle_state = reference(*doubled(*inputs, feature_map), causal=causal)
    # With all weights at hand, numerator and denominator share the error of each weight; through a state they do not.
    plain = [*several(reference, prefix_sums), token_by_token]
    outputs, states = zip(*(function(*inputs, feature_map, causal=causal) for function in plain), strict=True)
    assert_like_eager(actual.output, oracle, outputs, "output")
    for part in LinearAttentionState._fields:
        eagers = [getattr(state, part) for state in states]
        assert_like_eager(getattr(actual.state, part), getattr(oracle_state, part), eagers, part)


SPLITS = {
    "token-by-token": [1] * 300,
    "halves": [150, 150],
    "chunk-multiples": [128, 128, 44],
    "prefill-then-steps": [250] + [1] * 50,
    "ragged": [3, 1, 124, 1, 37, 130, 4],
}


@some_maps
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked"])
def test_any_split_is_the_whole(name, split, masked):
    query, key, value = make_inputs(name, 300, dtype=torch.float64)
    feature_map = make_map(name, 8, torch.float64)
    mask = random_mask(2, 300) if masked else None
    whole, whole_state = linear_attention(query, key, value, feature_map, causal=True, mask=mask)
    parts, state = run_in_parts(query, key, value, feature_map, SPLITS[split], mask)
    assert_equal_in_double(parts, whole, "output")
    for actual, expected, field in zip(state, whole_state, LinearAttentionState._fields, strict=True):
        assert_equal_in_double(actual, expected, field)


def test_split_within_budget_in_single_precision():
    inputs = make_inputs("softmax", 300)
    feature_map = make_map("softmax", 8)
    for sizes in ([1] * 300, [130, 1, 169]):
        parts = LinearAttentionOutput(*run_in_parts(*inputs, feature_map, sizes))
        assert_all_like_eager(parts, inputs, feature_map, True)


def test_bidirectional_state_collects_keys_over_calls():
    query, key, value = make_inputs("softmax", 90, keys=200, dtype=torch.float64)
    feature_map = make_map("softmax", 8, torch.float64)
    whole = linear_attention(query, key, value, feature_map)
    _, state = linear_attention(query, key[:, :, :77], value[:, :, :77], feature_map)
    output, state = linear_attention(query, key[:, :, 77:], value[:, :, 77:], feature_map, state=state)
    assert_equal_in_double(output, whole.output, "output")
    read, unchanged = linear_attention(query, None, None, feature_map, state=state)
    assert_equal_in_double(read, whole.output, "output of a finished state")
    assert all(torch.equal(a, b) for a, b in zip(unchanged, state, strict=True))


@causal_or_not
def test_strides_and_views(causal):
    """Transposed, expanded and sliced inputs are read where they lie."""
    feature_map = make_map("softmax", 8)
    base = torch.randn(2, 260, 3, 3, 8)
    query, key, value = (base[:, :, index].transpose(1, 2) for index in range(3))
    views = {
        "transposed": (query, key, value),
        "heads expanded": (query, key[:, :1].expand(-1, 3, -1, -1), value[:, :1].expand(-1, 3, -1, -1)),
        "every second token": tuple(t.repeat_interleave(2, 2)[:, :, ::2] for t in (query, key, value)),
        "channels reversed in memory": tuple(t.mT.contiguous().mT for t in (query, key, value)),
        "length expanded": (query[:, :, :1].expand(-1, -1, 260, -1), key, value),
    }
    for name, inputs in views.items():
        assert any(not t.is_contiguous() for t in inputs), name
        copies = [t.contiguous() for t in inputs]
        assert_all_like_eager(linear_attention(*inputs, feature_map, causal=causal), copies, feature_map, causal)
        gradients = []
        for tensors in (inputs, copies):
            leaves = [t.detach().double().requires_grad_() for t in tensors]
            output = linear_attention(*leaves, feature_map, causal=causal).output
            gradients.append(torch.autograd.grad(output.square().sum(), leaves))
        for part, viewed, copied in zip("qkv", *gradients, strict=True):
            assert_equal_in_double(viewed, copied, f"{name}: gradient of {part}")


@every_map
@causal_or_not
def test_nothing_is_read_before_it_is_written(name, causal, nan_poisoned):
    inputs = [t.requires_grad_() for t in make_inputs(name, 260)]
    feature_map = make_map(name, 8)
    output, state = linear_attention(*inputs, feature_map, causal=causal, mask=random_mask(2, 260))
    (output.sum() + state.key_value.sum() + state.key_sum.sum()).backward()
    for tensor in (output, *state, *(t.grad for t in inputs)):
        assert torch.isfinite(tensor).all()


@causal_or_not
@pytest.mark.parametrize("length", [0, 70, 200])
@pytest.mark.parametrize("batch, heads, head_dim, value_dim", [(0, 3, 8, 5), (2, 0, 8, 5), (2, 3, 0, 5), (2, 3, 8, 0)])
def test_nothing_comes_of_nothing(batch, heads, head_dim, value_dim, length, causal):
    query, key = (torch.rand(batch, heads, length, head_dim) for _ in range(2))
    value = torch.rand(batch, heads, length, value_dim)
    output, state = linear_attention(query, key, value, FeatureMap("elu_plus_one"), causal=causal)
    assert output.shape == value.shape and not output.any()
    assert state.key_value.shape == (batch, heads, head_dim, value_dim)


@pytest.mark.parametrize("size", [128, 256])
def test_causal_chunks_cover_the_rows_and_have_room_for_their_states(size):
    for length in range(1100):
        chunks = causal_chunks(length, size)
        assert [row for here, _ in chunks for row in range(here.start, here.stop)] == list(range(length))
        assert all((here.stop - here.start) % block == 0 for here, block in chunks)
        assert len(chunks) <= saved_states(length)


@pytest.mark.parametrize("length", [130, 250, 700])
@causal_or_not
def test_with_and_without_a_backward_pass_to_come(causal, length):
    """The causal form takes other chunks where nothing is kept for a backward pass; the numbers are the same."""
    inputs = [t.double() for t in make_inputs("softmax", length)]
    feature_map, mask = make_map("softmax", 8).to(torch.float64), random_mask(inputs[0].shape[0], length)
    expected, end = reference(*inputs, feature_map, causal=causal, mask=mask)
    for needed in (False, True):
        leaves = [t.clone().requires_grad_(needed) for t in inputs]
        output, state = linear_attention(*leaves, feature_map, causal=causal, mask=mask)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state.key_value, end.key_value, rtol=1e-10, atol=1e-12)


@causal_or_not
def test_inputs_and_state_are_left_alone(causal):
    inputs = [t.requires_grad_() for t in make_inputs("softmax", 260)]
    feature_map = make_map("softmax", 8)
    _, state = linear_attention(*make_inputs("softmax", 9), feature_map)
    tensors = [*inputs, *state, feature_map.projection]
    copies = [t.detach().clone() for t in tensors]
    linear_attention(*inputs, feature_map, causal=causal, state=state).output.sum().backward()
    with torch.no_grad():
        linear_attention(*(t[:, :, :1] for t in inputs), feature_map, causal=True, state=state)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@causal_or_not
@pytest.mark.parametrize("keys", [0, 20])
def test_a_state_of_any_strides_leads_to_a_contiguous_one(causal, keys):
    inputs, feature_map = make_inputs("softmax-large-epsilon", keys), make_map("softmax-large-epsilon", 8)
    _, state = linear_attention(*make_inputs("softmax-large-epsilon", 9), feature_map)
    turned = state._replace(key_value=state.key_value.mT.contiguous().mT, key_sum=state.key_sum.mT.contiguous().mT)
    assert not turned.key_value.is_contiguous() and not turned.key_sum.is_contiguous()
    expected, actual = (linear_attention(*inputs, feature_map, causal=causal, state=s) for s in (state, turned))
    torch.testing.assert_close(actual, expected)
    assert all(part.is_contiguous() for part in actual.state)


EXTREMES = {"tiny": 1e-20, "zero": 0.0, "ordinary": 1.0, "large": 8.0, "beyond-float32": 40.0, "beyond-float64": 3e3}


@pytest.mark.parametrize("norm", EXTREMES)
@causal_or_not
@pytest.mark.parametrize("name", ["softmax", "hyperbolic", "optimal-positive", "without-norm"])
def test_extreme_inputs(name, causal, norm):
    """exp(w·x - |x|²/2) leaves float32 at |x'| ≈ 13 and float64 at ≈ 38; the result must not notice."""
    query, key, value = make_inputs(name, 150)
    # Rows of every size up to the extreme one, so that the running maximum has jumps to make.
    size = EXTREMES[norm] * torch.rand(2, 3, 150, 1) * 8**0.25 / 8**0.5
    inputs = (query * size, key * size.flip(2), value)
    feature_map = make_map(name, 8)
    output, state = actual = linear_attention(*inputs, feature_map, causal=causal)
    for tensor in (output, *state):
        assert torch.isfinite(tensor).all()
    assert_all_like_eager(actual, inputs, feature_map, causal)
    # The weights are positive and sum to one: no output can leave the range of the values it averages.
    assert (output.abs() <= value.abs().amax(dim=2, keepdim=True) * 1.0001).all()
    oracle = reference(*doubled(*inputs, feature_map), causal=causal)[0]
    naive = definition(*doubled(*inputs, feature_map), causal=causal)
    if torch.isfinite(naive).all():
        assert_equal_in_double(oracle, naive, "reference in float64")
    assert torch.isfinite(naive).all() or norm in ("beyond-float32", "beyond-float64")
    gradients = torch.autograd.grad(
        linear_attention(*(t.requires_grad_() for t in inputs), feature_map, causal=causal).output.sum(), inputs
    )
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("length", [16_384, 65_536])
def test_long_sequences(length):
    """The last rows against the formula over the whole prefix, the recurrent form from a state, and a split."""
    name, tail = "softmax", 200
    inputs = make_inputs(name, length, head_dim=16, value_dim=16, batch=1, heads=2)
    feature_map = make_map(name, 16, features=40)
    exact = doubled(*inputs, feature_map)
    whole, state = linear_attention(*exact, causal=True)
    formula = definition(exact[0][:, :, -tail:], *exact[1:], causal=True, first_row=length - tail)
    assert_equal_in_double(whole[:, :, -tail:], formula, "formula")

    parts, parts_state = run_in_parts(*exact, [1, 4096, 63, length - 4160])
    assert_equal_in_double(parts, whole, "split")
    assert_equal_in_double(parts_state.key_value, state.key_value, "state of the split")

    _, prefix = linear_attention(*(t[:, :, :-tail] for t in exact[:3]), exact[3], causal=True)
    suffix, _ = linear_attention_recurrent(*(t[:, :, -tail:] for t in exact[:3]), exact[3], None, prefix)
    assert_equal_in_double(suffix, whole[:, :, -tail:], "recurrent suffix")

    eager = definition(inputs[0][:, :, -tail:], *inputs[1:], feature_map, causal=True, first_row=length - tail)
    single = linear_attention(*inputs, feature_map, causal=True).output[:, :, -tail:]
    assert_within_budget(single, formula, eager, "float32")
