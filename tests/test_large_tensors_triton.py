"""Offsets beyond 2³¹ elements in the compiled code, without a GPU: large tensors, most of which nobody ever touches.

Memory that is never written takes none, as long as pages are small: a test asks for up to 20 GB and touches little of
it. A launch for a whole tensor of which only the programs of the last rows run needs no more than these, and so does
one for rows that are far from each other. What they give is compared, to the bit, with a call of these rows alone.

Run: HF_EFFICIENT_COMPILED_FOR=sm_90 pytest tests/test_large_tensors_triton.py
"""

import math
import os
from contextlib import contextmanager
from unittest.mock import patch

import ptx_machine
import pytest
import torch

from hf_efficient.kernels.flash_attention.autograd import triton_backward, triton_forward
from hf_efficient.kernels.flash_attention.operands import Operands, Options, Wanted
from hf_efficient.kernels.linear_attention import FeatureMap, LinearAttentionState
from hf_efficient.kernels.linear_attention.triton_autograd import backward, decode, forward
from hf_efficient.kernels.soft_topk import autograd as soft_topk


pytestmark = pytest.mark.skipif(
    not os.environ.get("HF_EFFICIENT_COMPILED_FOR"), reason="needs HF_EFFICIENT_COMPILED_FOR=sm_80 or sm_90"
)
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
# So many elements lie from one row to the next; either a head or a row then begins beyond 2³¹ of them.
FAR = 2**23
rows_far_apart = pytest.mark.parametrize("heads, length", [(3, 128), (1, 300)], ids=["heads", "rows"])


@contextmanager
def launching(part):
    """Of each launch only the programs run that `part` names, given how many there are."""
    launch = ptx_machine.launch

    def launch_part(ptx, shared, grid, arguments):
        launch(ptx, shared, grid, arguments, part(math.prod(grid)))

    with patch.object(ptx_machine, "launch", launch_part):
        yield


def last_of(batch):
    """The programs of the last batch row: in every grid it is the slowest to change."""
    return lambda total: range(total - total // batch, total)


def ends_of_two_heads(total):
    """The first and the last programs of each: some kernels go from a head's last rows to its first."""
    half = total // 2
    assert half >= 8
    return [*range(4), *range(half - 4, half + 4), *range(total - 4, total)]


def of_batch(batch, last):
    """A tensor with so many batch rows, of which the last one alone is there."""
    large = torch.empty(batch, *last.shape[1:], dtype=last.dtype)
    large[-1:] = last
    return large


def far_apart(own):
    """The same numbers in rows that are far from each other."""
    large = torch.empty(*own.shape[:3], FAR, dtype=own.dtype)[..., : own.shape[3]]
    assert sum((large.shape[axis] - 1) * large.stride(axis) for axis in (1, 2)) > 2**31
    return large.copy_(own)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize(
    "batch, heads, size, wanted",
    [(129_100, 2, 128, Wanted(True, True)), (33_100_000, 1, 1, Wanted(False, False))],
    ids=["elements", "rows"],
)
def test_flash_attention_of_many_batch_rows(batch, heads, size, wanted):
    """All kernels but that of memory keys; mask, lengths and slopes of each batch row."""
    length = 65
    assert batch * heads * length * size > 2**31
    own = [torch.randn(1, heads, length, size).bfloat16() for _ in range(4)]
    own += [torch.rand(1, length) > 0.3, torch.rand(1, heads), torch.tensor([length - 2])]
    bias, sinks = torch.randn(heads, 9), torch.randn(heads)
    options = Options(scale=0.1, left=40, right=0, softcap=20.0, dropout_p=0.0)

    def run(query, key, value, grad_output, mask, slopes, lengths):
        operands = Operands(query, key, value, mask, lengths, lengths, slopes, bias, None, None, sinks, None)
        output, lse = triton_forward(operands, options)
        grads = triton_backward(operands, options, output, lse, grad_output, None, wanted)
        of_rows = output, lse, grads.query, grads.key, grads.value, grads.alibi_slopes
        return [None if t is None else t[-1:].clone() for t in of_rows]

    with launching(last_of(batch)):
        found = run(*(of_batch(batch, t) for t in own))
    assert_equal(found, run(*own))


def test_flash_attention_of_many_rows():
    """The last rows of two heads."""
    length, tail = 2**25 + 64, 320  # also those of one head alone are beyond
    own = [torch.randn(1, 2, tail, 64).bfloat16() for _ in range(4)]
    large = [torch.empty(1, 2, length, 64, dtype=torch.bfloat16) for _ in own]
    for whole, last in zip(large, own, strict=True):
        assert whole.stride(1) > 2**31
        whole[:, :, -tail:] = last

    def run(query, key, value, grad_output):
        operands = Operands(query, key, value, *[None] * 9)
        options = Options(scale=0.1, left=63, right=0, softcap=0.0, dropout_p=0.0)
        output, lse = triton_forward(operands, options)
        grads = triton_backward(operands, options, output, lse, grad_output, None, Wanted(False, False))
        return [t[:, :, -64:].clone() for t in (output, lse, grads.query, grads.key, grads.value)]

    with launching(ends_of_two_heads):
        found = run(*large)
    assert_equal(found, run(*own))


@rows_far_apart
def test_flash_attention_of_rows_far_apart(heads, length):
    batch = 3
    own = [torch.randn(batch, heads, length, 32).bfloat16() for _ in range(4)]
    bias, mask = torch.randn(heads, 9), torch.rand(batch, length) > 0.3
    far_mask = torch.empty(batch, 2**30, dtype=torch.bool)[:, :length].copy_(mask)

    def run(query, key, value, grad_output, mask):
        operands = Operands(query, key, value, mask, None, None, None, bias, None, None, None, None)
        options = Options(scale=0.1, left=-1, right=0, softcap=0.0, dropout_p=0.0)
        output, lse = triton_forward(operands, options)
        return output, lse, *triton_backward(operands, options, output, lse, grad_output, None, Wanted(False, True))

    assert_equal(run(*map(far_apart, own), far_mask), run(*own, mask))


def run_linear_attention(query, key, value, grad_output, mask, start, of_end, feature_map, causal, wanted):
    """Output, final state, what is saved for the backward pass, and all gradients."""
    output, end, saved = forward(query, key, value, feature_map, mask, start, causal, None)
    grads = backward(
        grad_output, of_end, query, key, value, feature_map, wanted, mask, start, causal, None, output, end, saved
    )
    return output, *end, *saved, *grads


@causal_or_not
@pytest.mark.parametrize("function", ["exponential", "relu"])
def test_linear_attention_of_many_batch_rows(function, causal):
    batch, heads, length, size, features, values = 84_000, 2, 200, 64, 72, 64
    assert min(batch * heads * length * size, batch * heads * (length // 64) * features * values) > 2**31
    shapes = (1, heads, features, values), (1, heads, features), (1, heads)
    own = [torch.randn(1, heads, length, width).bfloat16() for width in (size, size, values, values)]
    own += [torch.rand(1, length) > 0.3, *(torch.rand(shape) for shape in (*shapes, *shapes[:2]))]
    feature_map = FeatureMap(function, torch.randn(features, size), None, 0.3, 1e-4, function == "exponential")

    def run(query, key, value, grad_output, mask, key_value, key_sum, log_scale, *of_end):
        start = LinearAttentionState(key_value, key_sum, log_scale)
        found = run_linear_attention(
            query, key, value, grad_output, mask, start, of_end, feature_map, causal, (False, False)
        )
        return [None if t is None else t[-1:].clone() for t in found]

    with launching(last_of(batch)):
        found = run(*(of_batch(batch, t) for t in own))
    assert_equal(found, run(*own))


@rows_far_apart
@causal_or_not
def test_linear_attention_of_rows_far_apart(causal, heads, length):
    own = [torch.randn(1, heads, length, 32).bfloat16() for _ in range(4)]
    start = LinearAttentionState.empty(1, heads, 40, 32)
    of_end = torch.randn(1, heads, 40, 32), torch.randn(1, heads, 40)
    feature_map = FeatureMap("exponential", torch.randn(40, 32), None, 0.3, 1e-4, True)
    rest = None, start, of_end, feature_map, causal, (True, False)
    assert_equal(run_linear_attention(*map(far_apart, own), *rest), run_linear_attention(*own, *rest))


def test_a_token_of_linear_attention_in_many_batch_rows():
    batch, heads, size, features, values = 131_100, 4, 64, 66, 64
    assert batch * heads * features * values > 2**31
    own = [torch.randn(1, heads, 1, width) for width in (size, size, values)]
    own += [torch.rand(1, heads, features, values), torch.rand(1, heads, features), torch.rand(1, heads)]
    feature_map = FeatureMap("exponential", torch.randn(features, size), None, 0.3, 1e-4, True)

    def run(query, key, value, *state):
        output, end = decode(query, key, value, feature_map, None, LinearAttentionState(*state), in_place=False)
        return [t[-1:].clone() for t in (output, *end)]

    with launching(last_of(batch)):
        found = run(*(of_batch(batch, t) for t in own))
    assert_equal(found, run(*own))


@pytest.mark.parametrize("columns", [16_384, 20_000], ids=["short rows", "split rows"])
def test_soft_topk_of_many_rows(columns):
    rows, selected, temperatures = 2**31 // columns + 3, columns // 2, [2.0, 1.0, 0.5, 0.5]
    own = [torch.randn(1, columns).half(), torch.tensor([123.5]), torch.rand(1, columns) > 0.1]
    own.append(torch.randn(1, columns).half())

    def run(logits, k, mask, grad):
        scores, indices, pivot, offset = soft_topk.exact_forward_triton(logits, k, mask, 0.5, selected)
        of_exact = soft_topk.exact_backward_triton(grad, logits, mask, pivot, offset, 0.5)
        descent, chosen, duals = soft_topk.descent_forward_triton(logits, k, mask, temperatures, selected)
        of_descent = soft_topk.descent_backward_triton(grad, logits, k, mask, duals, temperatures)
        found = scores, indices, pivot, offset, *of_exact, descent, chosen, duals, *of_descent
        return [t[-1:].clone() for t in found]

    with launching(last_of(rows)):
        found = run(*(of_batch(rows, t) for t in own))
    assert_equal(found, run(*own))
