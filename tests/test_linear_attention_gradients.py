"""linear_attention: every gradient against autograd through the definition, gradcheck, no gradient from the future.

Run: pytest tests/test_linear_attention_gradients.py -k causal
"""

import pytest
import torch
from linear_attention_cases import (
    MAPS,
    all_gradients,
    assert_equal_in_double,
    assert_like_eager,
    doubled,
    gradients_of_each,
    make_inputs,
    make_map,
    prefix_sums,
    random_mask,
    reference,
    run_in_parts,
    several,
)

from hf_efficient.kernels.linear_attention import (
    FeatureMap,
    LinearAttentionState,
    eager_causal,
    eager_chunks,
    linear_attention,
)


causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
every_map = pytest.mark.parametrize("name", MAPS)

# Length -> draws of the inputs: enough for the largest error to be typical, few enough for the quadratic form.
DRAWS = {1: 8, 129: 4, 300: 3}


def make_case(name, length, dtype, causal, masked=False, batch=2):
    """Inputs, feature map, an earlier state, the weights of the loss, and the options of the call."""
    query, key, value = make_inputs(name, length, keys=length if causal else length + 70, dtype=dtype, batch=batch)
    wide = torch.promote_types(dtype, torch.float32)
    feature_map = make_map(name, 8, wide)
    state = reference(*make_inputs(name, 21, dtype=wide, batch=batch), feature_map)[1]
    # The last weights are smaller: the sums grow with the length, and would drown the gradient of the output.
    weights = [torch.randn_like(query[..., :1].expand(*query.shape[:3], value.shape[-1]))]
    weights += [torch.randn_like(sums) / (length + 21) for sums in state[:2]]
    mask = random_mask(batch, key.shape[2]) if masked else None
    return (query, key, value, feature_map, state, weights), {"causal": causal, "mask": mask}


def in_double(case):
    query, key, value, feature_map, state, weights = case
    state = LinearAttentionState(*doubled(*state))
    return (*doubled(query, key, value, feature_map), state, list(doubled(*weights)))


@every_map
@causal_or_not
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
def test_gradients_are_those_of_the_reference_in_double(name, causal, length):
    case, options = make_case(name, length, torch.float64, causal, masked=True)
    actual, expected = (all_gradients(function, *case, **options) for function in (linear_attention, reference))
    assert actual.keys() == expected.keys() >= {"query", "key", "value", "key_value", "key_sum"}
    for part in expected:
        assert_equal_in_double(actual[part], expected[part], part)


@pytest.mark.parametrize("name", ["softmax", "optimal-positive", "relu", "exponential-of-inputs-with-bias"])
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("length", [1, 129, pytest.param(300, marks=pytest.mark.slow)])
def test_gradients_within_budget(name, causal, dtype, length):
    """Over several draws of the inputs, since the largest of few rounding errors is a matter of luck."""
    plain = several(reference, prefix_sums, orders=5)
    found = {}

    def note(label, gradients):
        for of, parts in zip(("output", "state"), gradients, strict=True):
            for part, gradient in parts.items():
                found.setdefault((of, part), {}).setdefault(label, []).append(gradient)

    for _ in range(DRAWS[length]):
        (*case, weights), options = make_case(name, length, dtype, causal)
        # One after the other: gradients of the sums are larger, their rounding would hide that of the output's.
        losses = [
            [w if (index == 0) == first else 0 * w for index, w in enumerate(weights)] for first in (True, False)
        ]
        *in_float64, _ = in_double((*case, weights))
        note("oracle", gradients_of_each(reference, *in_float64, [doubled(*loss) for loss in losses], **options))
        for label, function in enumerate((linear_attention, *plain)):
            note(label, gradients_of_each(function, *case, losses, **options))
    for (of, part), by_label in found.items():
        by_label = {label: torch.stack(gradients) for label, gradients in by_label.items()}
        oracle, actual = by_label.pop("oracle"), by_label.pop(0)
        assert_like_eager(actual, oracle, list(by_label.values()), f"of {of}: {part}")


@every_map
@causal_or_not
def test_gradcheck(name, causal, monkeypatch):
    """Finite differences, so that the definition's own backward is not the only judge.

    Several chunks (the first causal one has four blocks), a mask, and a state before.
    """
    monkeypatch.setattr(eager_chunks, "CHUNK", 60)
    monkeypatch.setattr(eager_causal, "CAUSAL_BLOCK", 15)
    length = 70 if causal else 3
    query, key, value = make_inputs(name, length, 2, 2, keys=length if causal else 140, batch=1, heads=1)
    feature_map = make_map(name, 2, torch.float64, features=4)
    state = reference(*make_inputs(name, 3, 2, 2, batch=1, heads=1, dtype=torch.float64), feature_map)[1]
    mask = random_mask(1, key.shape[2])
    parameters = [t for t in (feature_map.projection, feature_map.bias) if t is not None]
    leaves = [t.double().requires_grad_() for t in (query, key, value, *state[:2], *parameters)]

    def function(query, key, value, key_value, key_sum, *parameters):
        parameters = list(parameters)
        projection = parameters.pop(0) if feature_map.projection is not None else None
        bias = parameters.pop(0) if feature_map.bias is not None else None
        start = LinearAttentionState(key_value, key_sum, state.log_scale)
        output, new_state = linear_attention(
            query,
            key,
            value,
            feature_map._replace(projection=projection, bias=bias),
            causal=causal,
            mask=mask,
            state=start,
        )
        # The true sums, not those relative to the scale: the scale is a constant for autograd, not for differences.
        scale = new_state.log_scale.exp()
        return output, new_state.key_value * scale[..., None, None], new_state.key_sum * scale[..., None]

    moves_scale = feature_map.function == "exponential"
    check = (lambda *tensors: function(*tensors)[0]) if moves_scale else function
    assert torch.autograd.gradcheck(check, leaves, fast_mode=True)


def test_gradients_flow_through_a_state_to_earlier_calls():
    """Truncation is the caller's choice: undetached, split calls have the gradients of one call."""
    inputs = make_inputs("softmax", 300, dtype=torch.float64)
    feature_map = make_map("softmax", 8, torch.float64)
    gradients = []
    for sizes in ([300], [128, 1, 171], [250] + [1] * 50):
        leaves = [t.clone().requires_grad_() for t in inputs]
        output, _ = run_in_parts(*leaves, feature_map, sizes)
        gradients.append(torch.autograd.grad((output * torch.linspace(-1, 1, 300)[:, None]).sum(), leaves))
    for parts in gradients[1:]:
        for part, whole, name in zip(parts, gradients[0], ("query", "key", "value"), strict=True):
            assert_equal_in_double(part, whole, name)


@pytest.mark.parametrize("name", ["softmax", "optimal-positive", "relu", "exponential-of-inputs"])
def test_gradients_through_a_finished_state(name):
    """Cross-attention that keeps its state: reading it equals attending to the keys, in the gradients as well."""
    case, _ = make_case(name, 90, torch.float64, causal=False)

    def in_two_calls(query, key, value, feature_map, *, state):
        _, state = linear_attention(key[:, :, :1], key, value, feature_map, state=state)
        return linear_attention(query, None, None, feature_map, state=state)

    actual, expected = (all_gradients(function, *case) for function in (in_two_calls, reference))
    for part in expected:
        assert_equal_in_double(actual[part], expected[part], part)


@causal_or_not
@pytest.mark.parametrize("length", [1, 140])
@pytest.mark.parametrize("wanted", ["query", "key", "value", "key_value", "projection", "bias"])
def test_gradient_of_one_thing_alone(causal, length, wanted):
    """Each path that asks "does anything need a gradient" has to ask about everything."""
    case, options = make_case("optimal-positive", length, torch.float64, causal)
    expected = all_gradients(linear_attention, *case, **options)[wanted]
    query, key, value, feature_map, state, weights = case
    tensors = {"query": query, "key": key, "value": value, "key_value": state.key_value}
    tensors |= {"projection": feature_map.projection, "bias": feature_map.bias}
    leaf = tensors[wanted].detach().clone().requires_grad_()
    tensors[wanted] = leaf
    output, new_state = linear_attention(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        feature_map._replace(projection=tensors["projection"], bias=tensors["bias"]),
        state=state._replace(key_value=tensors["key_value"]),
        **options,
    )
    loss = sum((t * w).sum() for t, w in zip((output, *new_state[:2]), weights, strict=True))
    assert_equal_in_double(torch.autograd.grad(loss, leaf)[0], expected, wanted)


@every_map
@pytest.mark.parametrize("row", [0, 63, 64, 100])
def test_no_gradient_from_the_future(name, row):
    """Exactly zero, not small: rows up to `row` do not know that there is anything after them."""
    inputs = [t.requires_grad_() for t in make_inputs(name, 150)]
    output = linear_attention(*inputs, make_map(name, 8), causal=True).output
    gradients = torch.autograd.grad(output[:, :, : row + 1].square().sum(), inputs)
    for gradient, part in zip(gradients, ("query", "key", "value"), strict=True):
        assert not gradient[:, :, row + 1 :].any(), part
        assert gradient[:, :, : row + 1].any() or (part, row) in (("query", 0), ("key", 0)), part


def test_a_second_derivative_is_refused():
    """The backward pass runs below autograd: it must say so, not return a wrong number."""
    inputs = [t.requires_grad_() for t in make_inputs("softmax", 70)]
    output = linear_attention(*inputs, make_map("softmax", 8), causal=True).output
    gradient = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), inputs)


@causal_or_not
@pytest.mark.parametrize("size", [90.0, 95.0])
def test_rows_outside_the_loss_have_gradients_of_zero_over_a_subnormal_denominator(size, causal):
    """Not 0 · ∞."""
    feature_map = FeatureMap("exponential", None, None, 1.0, 0.0, subtract_norm=False)
    query = torch.tensor([size, 0.0]).expand(1, 1, 3, 2).clone().requires_grad_()
    key = torch.tensor([0.0, size]).expand(1, 1, 3, 2).clone().requires_grad_()
    value = torch.rand(1, 1, 3, 2, requires_grad=True)
    (linear_attention(query, key, value, feature_map, causal=causal).output * 0).sum().backward()
    assert not any(leaf.grad.any() for leaf in (query, key, value))
