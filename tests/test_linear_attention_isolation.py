"""linear_attention: no row knows what it must not know, neither the future, nor padding, nor another row of the batch.

Run: pytest tests/test_linear_attention_isolation.py -k padding
"""

import pytest
import torch
from linear_attention_cases import (
    MAPS,
    assert_equal_in_double,
    definition,
    make_inputs,
    make_map,
    random_mask,
    reference,
    run_in_parts,
)

from hf_efficient.kernels.linear_attention import LinearAttentionState, linear_attention


causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
every_map = pytest.mark.parametrize("name", MAPS)
LENGTH = 300


@every_map
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4, 1e15], ids=["zero", "ordinary", "1e4", "1e15"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_causal_means_causal_to_the_bit(name, size, dtype):
    """A changed token changes nothing before it: the original's stabiliser leaked up to 0.75 (performer.md, B1)."""
    inputs = make_inputs(name, LENGTH, dtype=dtype)
    feature_map = make_map(name, 8)
    expected = linear_attention(*inputs, feature_map, causal=True).output
    size = min(size, 1e4) if name == "squared_relu" else size  # its square has to fit float32
    for token in (0, 1, 126, 127, 128, 129, 255, 256, 299):
        for changed in range(3):  # query, key, value, one at a time
            perturbed = [t.clone() for t in inputs]
            perturbed[changed][:, :, token:] = size * torch.randn_like(perturbed[changed][:, :, token:])
            actual = linear_attention(*perturbed, feature_map, causal=True).output
            assert torch.equal(actual[:, :, :token], expected[:, :, :token]), f"token {token}, input {changed}"
            assert not torch.equal(actual[:, :, token:], expected[:, :, token:])


@every_map
def test_causal_state_of_a_prefix_is_that_of_the_prefix_alone(name):
    inputs = make_inputs(name, LENGTH, dtype=torch.float64)
    feature_map = make_map(name, 8, torch.float64)
    whole = linear_attention(*inputs, feature_map, causal=True).output
    for length in (1, 127, 128, 129, 299):
        part = linear_attention(*(t[:, :, :length] for t in inputs), feature_map, causal=True).output
        assert_equal_in_double(part, whole[:, :, :length], f"prefix of {length}")


def padded(tensor, left, right, filling):
    """`tensor` with `filling` before and after it along the length."""
    ends = [tensor.new_full((*tensor.shape[:2], n, tensor.shape[3]), filling) for n in (left, right)]
    return torch.cat([ends[0], tensor, ends[1]], dim=2)


PADDINGS = {"left": (140, 0), "right": (0, 140), "both": (3, 129), "one": (1, 0)}


@every_map
@causal_or_not
@pytest.mark.parametrize("sides", PADDINGS)
def test_padding_is_no_padding(name, causal, sides):
    """Output, state and gradients are those of the shorter call; what stands at a masked position is never used."""
    left, right = PADDINGS[sides]
    inputs = [t.requires_grad_() for t in make_inputs(name, 80, dtype=torch.float64)]
    feature_map = make_map(name, 8, torch.float64)
    weights = torch.randn_like(inputs[2])
    expected = linear_attention(*inputs, feature_map, causal=causal)
    expected_gradients = torch.autograd.grad((expected.output * weights).sum(), inputs)
    real = slice(left, left + 80)
    mask = torch.zeros(2, left + 80 + right, dtype=torch.long)
    mask[:, real] = 1
    for filling in (0.0, 1e4, float("inf"), float("-inf"), float("nan")):
        # Queries at padded positions are ordinary rows, so they hold numbers.
        longer = [padded(t.detach(), left, right, 0.5 if t is inputs[0] else filling).requires_grad_() for t in inputs]
        for function in (linear_attention, reference):
            output, state = function(*longer, feature_map, causal=causal, mask=mask)
            assert_equal_in_double(output[:, :, real], expected.output, f"output, {filling}")
            for part, wanted, field in zip(state, expected.state, LinearAttentionState._fields, strict=True):
                assert_equal_in_double(part, wanted, f"{field}, {filling}")
            gradients = torch.autograd.grad((output[:, :, real] * weights).sum(), longer)
            for gradient, wanted, part in zip(gradients, expected_gradients, ("query", "key", "value"), strict=True):
                assert_equal_in_double(gradient[:, :, real], wanted, f"gradient of {part}, {filling}")
                outside = torch.cat([gradient[:, :, :left], gradient[:, :, real.stop :]], dim=2)
                assert not outside.any(), f"gradient of {part} at padding, {filling}: {outside.abs().max()}"


@every_map
@causal_or_not
def test_rows_without_any_key_are_zero(name, causal):
    inputs = [t.requires_grad_() for t in make_inputs(name, LENGTH)]
    feature_map = make_map(name, 8)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0] = False
    mask[1, :140] = False
    output, state = linear_attention(*inputs, feature_map, causal=causal, mask=mask)
    assert not output[0].any()
    assert not state.key_value[0].any() and not state.key_sum[0].any()
    assert output[1, :, 140:].any()
    assert output[1, :, :140].any() != causal  # before the first key there is nothing to see, unless all keys are seen
    output.square().sum().backward()
    for tensor, part in zip(inputs, ("query", "key", "value"), strict=True):
        assert torch.isfinite(tensor.grad).all(), part
        assert not tensor.grad[0].any(), part
        assert tensor.grad[1].any(), part


def test_masks_of_any_integer_type_mean_the_same():
    inputs = make_inputs("softmax", 90)
    feature_map = make_map("softmax", 8)
    mask = random_mask(2, 90)
    expected = linear_attention(*inputs, feature_map, causal=True, mask=mask).output
    for dtype in (torch.int64, torch.int32, torch.uint8):
        actual = linear_attention(*inputs, feature_map, causal=True, mask=mask.to(dtype)).output
        assert torch.equal(actual, expected)
    everything = torch.ones(2, 90, dtype=torch.bool)
    masked = linear_attention(*inputs, feature_map, causal=True, mask=everything).output
    assert torch.equal(masked, linear_attention(*inputs, feature_map, causal=True).output)


def test_mask_and_state_together():
    """A left-padded batch, prefilled in two calls and then decoded, is the shorter sequence."""
    inputs = make_inputs("softmax", 100, dtype=torch.float64)
    feature_map = make_map("softmax", 8, torch.float64)
    longer = [padded(t, 30, 0, 7.0) for t in inputs]
    mask = torch.ones(2, 130, dtype=torch.bool)
    mask[:, :30] = False
    expected = definition(*inputs, feature_map, causal=True)
    for sizes in ([20, 100] + [1] * 10, [1] * 130, [30, 100]):
        output, _ = run_in_parts(*longer, feature_map, sizes, mask)
        assert_equal_in_double(output[:, :, 30:], expected, str(sizes[:2]))
        assert not output[:, :, :30].any()


@every_map
@causal_or_not
def test_rows_of_a_batch_and_heads_do_not_meet(name, causal):
    """To the bit: only the other row's numbers change, not the shapes."""
    inputs = make_inputs(name, LENGTH)
    feature_map = make_map(name, 8)
    mask = random_mask(2, LENGTH)
    expected = linear_attention(*inputs, feature_map, causal=causal, mask=mask).output
    changed = [t.clone() for t in inputs]
    for tensor in changed:
        tensor[1] = 100 * tensor[1]
        tensor[0, 2] = -tensor[0, 2]
    other = mask.clone()
    other[1] = random_mask(1, LENGTH)[0]
    actual = linear_attention(*changed, feature_map, causal=causal, mask=other).output
    assert torch.equal(actual[0, :2], expected[0, :2])
    assert not torch.equal(actual[1], expected[1])
