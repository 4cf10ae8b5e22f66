"""Norms and routing logits over many rows, block by block, are the plain computation, equal for equal rows."""

import pytest
import torch
from helpers import assert_within_budget
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_efficient.modeling.rms_norm import RMSNorm
from hf_efficient.modeling.routing_logits import routing_logits
from hf_efficient.modeling.row_blocks import BLOCK, LEAST, row_blocks, worth_blocks


WIDTH = 96
ROWS = LEAST // WIDTH + 40  # three blocks, the last a ragged one
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def states(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, ROWS // 2, WIDTH).mul_(3).to(dtype)


def gradients(function, *inputs):
    """Output and gradients of a random sum of it."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    torch.manual_seed(1)
    weights = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, weights)]


def assert_same(function, plain, inputs):
    """Within the budget of `plain`, both in the dtype of the inputs, and exact in float64."""
    oracle = gradients(plain, *(tensor.double() for tensor in inputs))
    for index, (ours, theirs, exact) in enumerate(
        zip(gradients(function, *inputs), gradients(plain, *inputs), oracle, strict=True)
    ):
        if inputs[0].dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
        else:
            assert_within_budget(ours, exact, theirs.to(ours.dtype), f"result {index}")


def test_blocks_cover_every_row_once():
    rows = torch.empty(ROWS, WIDTH)
    covered = [index for here in row_blocks(rows) for index in range(ROWS)[here]]
    assert covered == list(range(ROWS)) and len(list(row_blocks(rows))) == -(-ROWS // (BLOCK // WIDTH)) > 2
    assert worth_blocks(states()) and not worth_blocks(states()[:1, :10])


@dtypes
def test_the_norm_is_torchs(dtype):
    norm = RMSNorm(WIDTH, eps=1e-6)
    plain = nn.RMSNorm(WIDTH, eps=1e-6)

    def call(module):
        return lambda rows, weight: torch.func.functional_call(module, {"weight": weight}, (rows,))

    assert_same(call(norm), call(plain), [states(dtype), torch.rand(WIDTH).to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_the_norm_of_a_few_rows_without_gradients_is_torchs(dtype, rows):
    norm, plain = (kind(WIDTH, eps=1e-3, dtype=dtype) for kind in (RMSNorm, nn.RMSNorm))
    torch.manual_seed(0)
    weight, inputs = torch.rand(WIDTH, dtype=dtype), torch.randn(2, rows, WIDTH, dtype=dtype) * 0.02
    inputs[0, 0] = 0
    norm.weight.data, plain.weight.data = weight, weight
    exact = nn.functional.rms_norm(inputs.double(), (WIDTH,), weight.double(), 1e-3)
    with torch.no_grad():
        if dtype == torch.float64:
            torch.testing.assert_close(norm(inputs), exact)
        else:
            assert_within_budget(norm(inputs), exact, plain(inputs), "output")
        with torch.inference_mode():
            fast = norm(inputs)
        assert torch.equal(norm(inputs), fast)


@torch.no_grad()
def test_the_norm_leaves_nothing_behind_when_somebody_looks_on():
    """What it keeps from call to call is made of numbers, whoever calls first."""
    norm, rows = RMSNorm(WIDTH, eps=0.125), torch.ones(1, 2, WIDTH)
    expected = torch.full((1, 2, WIDTH), 1.125**-0.5)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert norm(rows).shape == norm(torch.ones(1, 2, WIDTH)).shape == (1, 2, WIDTH)
        torch.testing.assert_close(norm(rows), expected)


@torch.no_grad()
def test_an_ensemble_of_norms_is_each_of_them():
    norms = [RMSNorm(WIDTH, eps=1e-6) for _ in range(3)]
    for norm in norms:
        norm.weight.uniform_()
    weights = torch.stack([norm.weight for norm in norms])
    rows = torch.randn(2, WIDTH)

    def call(weight):
        return torch.func.functional_call(norms[0], {"weight": weight}, (rows,))

    torch.testing.assert_close(torch.func.vmap(call)(weights), torch.stack([norm(rows) for norm in norms]))


def test_a_row_of_zeros_has_a_gradient():
    rows = states()
    rows[0, 3] = 0
    for function in (RMSNorm(WIDTH, eps=1e-6), lambda x: routing_logits(x, torch.ones(1, WIDTH), 1e-6)):
        output, gradient = gradients(function, rows)
        assert output[0].isfinite().all() and gradient.isfinite().all() and gradient[0, 3].abs().sum() > 0


@dtypes
@pytest.mark.parametrize("eps", [1e-6, None])
@pytest.mark.parametrize("routes", [1, 3])
def test_the_logits_are_the_formula(dtype, eps, routes):
    def plain(tokens, vectors):
        wide = torch.promote_types(tokens.dtype, torch.float32)
        logits = torch.einsum("bnc,rc->brn", tokens.to(wide), vectors.to(wide))
        scale = 1.0 if eps is None else torch.rsqrt(tokens.to(wide).square().mean(-1) + eps)[:, None]
        return logits * scale

    assert_same(lambda t, v: routing_logits(t, v, eps), plain, [states(dtype), torch.randn(routes, WIDTH).to(dtype)])


def test_equal_tokens_have_equal_logits_to_the_bit():
    rows = states()
    rows[:, 1::7] = rows[0, 1]
    logits = routing_logits(rows, torch.randn(2, WIDTH), 1e-6)
    assert (logits[:, :, 1::7] == logits[:1, :, 1:2]).all()
    few = routing_logits(rows[:1, :1000], torch.randn(1, WIDTH), 1e-6)
    assert (few[:, :, 1::7] == few[:, :, 1:2]).all()
