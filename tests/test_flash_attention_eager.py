"""The blocked passes against the definition, with tiles so small that every loop runs several times, and ragged."""

import math

import pytest
import torch
from flash_attention_cases import BATCH, COMBINATIONS, DIFFERENTIABLE, HEADS, OPTIONS, in_dtype, make_call, operands_of
from flash_attention_kernels import FACTORS, scaled
from helpers import assert_within_budget
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from hf_efficient.kernels.flash_attention import eager, eager_band, eager_tiles, flash_attention
from hf_efficient.kernels.flash_attention.operands import Wanted
from hf_efficient.kernels.flash_attention.reference import flash_attention_reference


@pytest.fixture
def small_tiles(monkeypatch):
    """Sixteen rows and columns a tile, three heads: most tiles are in the middle of something."""
    monkeypatch.setattr(eager_tiles, "ROWS", 16)
    monkeypatch.setattr(eager_tiles, "LEAST_ROWS", 4)
    monkeypatch.setattr(eager_tiles, "TILE", {"cpu": 16 * 16 * 3})


def blocked(call):
    return flash_attention(**call, backend="eager", return_lse=True)


def reference(call):
    return flash_attention_reference(*operands_of(**call))


def results_and_gradients(function, call, weights):
    """Output, lse and all gradients of a weighted sum of both, by name. A lse of -inf counts as zero."""
    leaves = {n: call[n].detach().clone().requires_grad_() for n in DIFFERENTIABLE if n in call}
    output, lse = function(call | leaves)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    loss = (output * weights[0].to(output.dtype)).sum() + (lse * weights[1].to(lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {"output": output, "lse": lse} | named


def base_two_reference(call):
    """The same in other roundings: logits in base 2, as every fused attention has them."""
    scale = call.get("scale") or call["query"].shape[-1] ** -0.5
    return reference(call | {"query": call["query"] * (scale * math.log2(math.e)), "scale": math.log(2)})


def assert_equals_the_reference(call):
    """Within the error budget of the plain computation; in float32, of the worst of several in other roundings.

    The largest of few rounding errors scatters by more than the factor of two that the budget allows.
    """
    length, value_dim = call["query"].shape[2], call["value"].shape[3]
    weights = torch.randn(BATCH, HEADS, length, value_dim), torch.randn(BATCH, HEADS, length)
    actual = results_and_gradients(blocked, call, weights)
    oracle = results_and_gradients(reference, in_dtype(call, torch.float64), weights)
    ways = [reference]
    if call["query"].dtype == torch.float32:
        ways += [base_two_reference, *(scaled(reference, factor) for factor in FACTORS)]
    plain = [results_and_gradients(way, call, weights) for way in ways]
    for name, exact in oracle.items():
        worst = max((way[name] for way in plain), key=lambda result: (result - exact).abs().max().item())
        assert_within_budget(actual[name], exact, worst, name)


@pytest.fixture
def real_head_size(monkeypatch):
    """Rounding errors as models have them: with eight products a logit, no two computations err alike."""
    monkeypatch.setattr("flash_attention_cases.HEAD_DIM", 64)
    monkeypatch.setattr("flash_attention_cases.VALUE_DIM", 48)


# With one key a row, the gradient of the query is zero: what is left is rounding, of which plain softmax has none.
@pytest.mark.parametrize("combination", [name for name in COMBINATIONS if name != "window of itself"])
def test_blocked_is_the_reference(combination, small_tiles, real_head_size, nan_poisoned):
    assert_equals_the_reference(make_call(combination, 75, 91))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "combination", ["plain", "decoder", "encoder", "decoder with dropout", "no length but memory"]
)
def test_half_precision(combination, dtype, small_tiles, real_head_size, nan_poisoned):
    assert_equals_the_reference(make_call(combination, 75, 91, dtype=dtype))


@pytest.mark.parametrize("ends", [(300.0, 0.0), (0.0, 300.0), (-300.0, 300.0)], ids=str)
def test_far_keys_may_be_the_ones_that_count(ends, small_tiles):
    """Whole tiles of them have one bias, without which their weights overflow or vanish."""
    call = make_call("plain", 60, 60)
    bias = torch.zeros(HEADS, 9)
    bias[:, 0], bias[:, -1] = ends
    assert_equals_the_reference(call | {"distance_bias": bias})


def test_clamp_of_hundreds(small_tiles):
    """Logits that nearly reach it: as large as that, not as their tanh."""
    call = make_call("plain", 60, 60)
    assert_equals_the_reference(call | {"softcap": 400.0, "key": 100 * call["key"]})


def assert_equals_the_reference_in_float64(call):
    length, value_dim = call["query"].shape[2], call["value"].shape[3]
    weights = torch.randn(BATCH, HEADS, length, value_dim), torch.randn(BATCH, HEADS, length)
    actual, expected = (results_and_gradients(f, call, weights) for f in (blocked, reference))
    for name, want in expected.items():
        error = (actual[name] - want).abs().max().item()
        assert error <= 1e-13 * (1 + want.abs().max().item()), f"{name}: off by {error}"


@pytest.mark.parametrize("sizes", [(29, 29), (45, 20), (1, 33), (33, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_other_lengths(combination, sizes, small_tiles, nan_poisoned):
    assert_equals_the_reference_in_float64(make_call(combination, *sizes, dtype=torch.float64))


@pytest.mark.parametrize("key_heads", [1, 4])
def test_other_key_heads(key_heads, small_tiles, real_head_size, nan_poisoned, monkeypatch):
    monkeypatch.setattr("flash_attention_cases.KEY_HEADS", key_heads)
    assert_equals_the_reference(make_call("decoder with dropout", 37, 45, key_heads=key_heads))


@pytest.mark.parametrize("combination", ["decoder", "encoder with dropout", "plain", "window"])
def test_tiles_of_the_real_size(combination, real_head_size, nan_poisoned):
    assert_equals_the_reference(make_call(combination, 300, 500))


@settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(names=st.sets(st.sampled_from(OPTIONS), max_size=6), sizes=st.tuples(*[st.integers(1, 40)] * 2))
def test_options_together(names, sizes, small_tiles):
    torch.manual_seed(sum(sizes))
    COMBINATIONS["drawn"] = tuple(sorted(names))
    try:
        call = make_call("drawn", *sizes, dtype=torch.float64)
    finally:
        del COMBINATIONS["drawn"]
    assert_equals_the_reference_in_float64(call)


@pytest.mark.parametrize("combination", ["decoder with dropout", "encoder", "causal key lengths alibi"])
def test_blocked_gradcheck(combination, small_tiles):
    call = make_call(combination, 11, 13, dtype=torch.float64)
    leaves = {name: call[name].requires_grad_() for name in DIFFERENTIABLE if name in call}

    def run(*tensors):
        output, lse = blocked(call | dict(zip(leaves, tensors, strict=True)))
        return output, lse.masked_fill(lse == -torch.inf, 0)

    assert gradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("combination", ["decoder with dropout", "encoder"])
def test_strides_do_not_matter(combination, small_tiles):
    call = make_call(combination, 37, 45, dtype=torch.float64)
    expected = blocked(call)
    # [B, N, H, D] in memory, as models have it; every second number of a larger tensor; a broadcast.
    turned = call | {n: call[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("query", "key", "value")}
    spaced = call | {
        n: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
        for n, t in call.items()
        if torch.is_tensor(t) and t.is_floating_point()
    }
    for name, other in (("turned", turned), ("spaced", spaced)):
        for got, want in zip(blocked(other), expected, strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-13), name


def test_expanded_operands(small_tiles):
    call = make_call("decoder with dropout", 21, 23, dtype=torch.float64)
    expanded = call | {
        "key": call["key"][:1].expand(BATCH, -1, -1, -1),
        "value": call["value"][:, :1].expand(-1, 2, -1, -1),
        "distance_bias": call["distance_bias"][:1].expand(HEADS, -1),
    }
    plain = {n: t.clone() if torch.is_tensor(t) else t for n, t in expanded.items()}
    weights = torch.randn(BATCH, HEADS, 21, 5), torch.randn(BATCH, HEADS, 21)
    first, second = (results_and_gradients(blocked, c, weights) for c in (expanded, plain))
    for name, got in first.items():
        assert torch.equal(got, second[name]), name


def test_large_and_small_logits(small_tiles, real_head_size):
    """Weights over- and underflow without a running maximum; the first tiles of a row may be the small ones."""
    call = make_call("causal", 37, 45)
    for factor in (1e-6, 1.0, 300.0):
        ramp = torch.linspace(-factor, factor, 45)[:, None]
        assert_equals_the_reference(call | {"key": call["key"] * ramp})
        assert_equals_the_reference(call | {"key": call["key"] * ramp.flip(0)})


def test_only_the_wanted_gradients(small_tiles):
    call = make_call("decoder", 21, 23)
    for name in DIFFERENTIABLE:
        if name in call:
            leaf = call[name].clone().requires_grad_()
            blocked(call | {name: leaf}).output.sum().backward()
            assert leaf.grad.shape == leaf.shape and leaf.grad.abs().max() > 0, name


def test_gradient_of_either_result_alone(small_tiles):
    call = make_call("decoder", 21, 23, dtype=torch.float64)
    for index in (0, 1):
        results = []
        for function in (blocked, reference):
            leaf = call["key"].clone().requires_grad_()
            function(call | {"key": leaf})[index].sum().backward()
            results.append(leaf.grad)
        assert torch.allclose(*results, rtol=0, atol=1e-13)


def test_dropout_gradient_is_that_of_the_weights_kept():
    """With the identity for values, the output is the weights: where they are dropped, so is the gradient."""
    call = make_call("dropout", 6, 7, dtype=torch.float64)
    call["value"] = torch.eye(7, dtype=torch.float64).expand(BATCH, 2, 7, 7).clone().requires_grad_()
    output = flash_attention(**call, backend="eager")
    exact = flash_attention(**call | {"dropout_p": 0.0}, backend="eager")
    kept = output != 0
    assert 0.5 < kept.double().mean() < 0.9
    assert torch.allclose(output[kept], exact[kept] / 0.7, rtol=0, atol=1e-14)
    output.sum().backward()
    expected = (output.detach().view(BATCH, 2, 2, 6, 7).sum((2, 3)))[..., None].expand(-1, -1, -1, 7)
    assert torch.allclose(call["value"].grad, expected, rtol=0, atol=1e-13)


class SeesSubnormals(TorchDispatchMode):
    """Notes the arithmetic whose float32 results hold numbers that processors are slow with."""

    def __init__(self):
        super().__init__()
        self.seen, self.slow = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if name in ("exp2_", "mul_", "sub_", "bmm", "baddbmm_"):
            self.seen.add(name)
            if ((result != 0) & (result.abs() < torch.finfo(torch.float32).tiny)).any():
                self.slow.add(name)
        return result


@pytest.mark.parametrize("window", [None, 255], ids=["tiles", "band"])
def test_far_keys_do_not_make_slow_numbers(window):
    """ALiBi halves weights with every token or two; that made a training step three times slower."""
    length = 384 if window is None else 512
    call = {name: torch.randn(1, HEADS, length, 16) for name in ("query", "key", "value")}
    slopes = torch.tensor([2.0**-n for n in range(HEADS)])
    operands, options = operands_of(**call, alibi_slopes=slopes, causal=window is None, window=window)
    assert eager_band.suits(operands, options) == (window is not None)
    with SeesSubnormals() as found:
        output, lse = eager.forward(operands, options)
        eager.backward(operands, options, output, lse, torch.randn_like(output), None, Wanted(True, False))
    assert {"exp2_", "mul_"} <= found.seen and not found.slow
