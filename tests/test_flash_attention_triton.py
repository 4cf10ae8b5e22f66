"""The Triton kernels against the definition: forward and every gradient, by the interpreter where there is no GPU.

Blocks are 16 there, so that with the lengths used here every loop runs several times and ends ragged.
"""

import numpy as np
import pytest
import torch
from flash_attention_cases import COMBINATIONS, in_dtype, operands_of
from flash_attention_kernels import (
    assert_equals_the_definition,
    call_of,
    eager,
    kernels,
    reference,
    results_and_gradients,
    weights_of,
)
from helpers import assert_within_budget
from kernel_device import DEVICE, INTERPRETED

from hf_efficient.kernels.flash_attention import flash_attention, merge_attention
from hf_efficient.kernels.flash_attention.launch_table import FORWARD
from hf_efficient.kernels.launch_config import LaunchConfig


pytest.importorskip("triton")
BATCH, HEADS, KEY_HEADS = 2, 2, 1

# Half of the options stand in one of the others as well.
REPEATED = {
    "scale", "window of itself", "key lengths", "alibi per row", "wide distance bias", "shared distance bias",
    "memory per row", "causal window", "causal mask", "causal lengths", "causal alibi", "no length",
    "one-sided window alibi", "causal window alibi per row", "clamped distance bias",
}  # fmt: skip


@pytest.fixture(autouse=True)
def two_heads(monkeypatch):
    """Both query heads share the key head; fewer programs for the interpreter to run."""
    for name, value in (("HEADS", HEADS), ("KEY_HEADS", KEY_HEADS)):
        monkeypatch.setattr(f"flash_attention_cases.{name}", value)


@pytest.fixture(autouse=True)
def products_without_an_order(monkeypatch):
    """The interpreter's products as exact sums, rounded once.

    The backward pass forms a logit again from operands in another order. Numpy does not add it up alike on every
    processor (on an EPYC it does not), and of logits of hundreds the last digits decide about a weight.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def dot(self, a, b, accumulator, input_precision, _):
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return interpreter.TensorHandle(product.astype(np.float32) + accumulator.data, accumulator.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


@pytest.mark.parametrize("combination", [name for name in COMBINATIONS if name not in REPEATED])
def test_kernels_are_the_definition(combination, nan_poisoned):
    assert_equals_the_definition(call_of(combination, 20, 36))


@pytest.mark.parametrize("combination", ["plain", "window ahead", "decoder"])
def test_half_precision(combination, nan_poisoned):
    assert_equals_the_definition(call_of(combination, 20, 36, torch.float16))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("combination", [name for name in COMBINATIONS if "alibi" in COMBINATIONS[name]])
def test_alibi_in_half_precision(combination, sign, nan_poisoned):
    """If causal, it is a line along the keys in tiles that rows see whole: several, so that the line goes on."""
    call = call_of(combination, 36, 60, torch.float16)
    assert_equals_the_definition(call | {"alibi_slopes": sign * call["alibi_slopes"]})


def test_the_log_sum_exp_of_steep_slopes(monkeypatch):
    """Far from a tile's first row the line and the row's shift are large, and their difference is not."""
    monkeypatch.setitem(FORWARD["interpreter"], (16, 64), LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64}, 1, 1))
    query, key, value = (torch.randn(1, 2, 300, 16, dtype=torch.float16, device=DEVICE) for _ in range(3))
    call = {
        "query": query,
        "key": key,
        "value": value,
        "causal": True,
        "alibi_slopes": torch.tensor([0.9, 100.0], device=DEVICE),
    }
    exact = reference(in_dtype(call, torch.float64))[1]
    assert_within_budget(kernels(call)[1], exact, eager(call)[1], "lse")


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (20, 1), (16, 32), (17, 0)], ids=str)
@pytest.mark.parametrize("combination", ["causal window distance bias", "memory"])
def test_lengths(combination, sizes, nan_poisoned):
    assert_equals_the_definition(call_of(combination, *sizes))


def test_rows_of_memory_keys_are_shared_by_several_programs(nan_poisoned):
    """64 rows each, in the interpreter."""
    assert_equals_the_definition(call_of("memory", 70, 3))


@pytest.mark.parametrize("key_heads", [2, 4])
def test_key_heads(key_heads, nan_poisoned, monkeypatch):
    monkeypatch.setattr("flash_attention_cases.BATCH", 1)
    monkeypatch.setattr("flash_attention_cases.HEADS", 4)
    monkeypatch.setattr("flash_attention_cases.KEY_HEADS", key_heads)
    assert_equals_the_definition(call_of("decoder", 17, 18, key_heads=key_heads))


@pytest.mark.parametrize("sizes", [(16, 32), (40, 24), (17, 17), (1, 1)], ids=str)
def test_head_sizes(sizes, nan_poisoned):
    query, key, value = (torch.randn(1, 1, 20, size, device=DEVICE) for size in (sizes[0], *sizes))
    assert_equals_the_definition({"query": query, "key": key, "value": value, "causal": True})


@pytest.mark.parametrize("combination, positive", [("softcap", 5.0), ("plain", 1.5)])
def test_scale_of_either_sign(combination, positive):
    call = call_of(combination, 20, 20)
    for scale in (-0.8, positive):
        assert_equals_the_definition(call | {"scale": scale})


def test_a_negative_scale_is_that_of_negative_queries():
    """With logits of hundreds, of which the largest belongs to the smallest product."""
    call = call_of("plain", 20, 40)
    call["key"] = call["key"] * 100
    output, lse = kernels(call | {"scale": -1.0})
    expected, expected_lse = kernels(call | {"query": -call["query"], "scale": 1.0})
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=0)


def test_large_and_small_logits():
    """Weights over- and underflow without a running maximum; the first tiles of a row may be the small ones."""
    call = call_of("causal", 20, 40)
    ramp = torch.linspace(-300, 300, 40, device=DEVICE)[:, None]
    for slope in (ramp, ramp.flip(0)):
        assert_equals_the_definition(call | {"key": call["key"] * slope})


def test_soft_clamp_far_from_and_near_zero():
    call = call_of("softcap", 20, 20)
    for softcap in (0.01, 1e4):
        assert_equals_the_definition(call | {"softcap": softcap})


def test_strides_do_not_matter():
    call = call_of("decoder", 17, 18)
    # [B, N, H, D] in memory, as models have it; every second number of a larger tensor.
    turned = call | {n: call[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("query", "key", "value")}
    spaced = call | {
        n: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
        for n, t in call.items()
        if torch.is_tensor(t) and t.is_floating_point()
    }
    weights = torch.randn(BATCH, HEADS, 5, 17, device=DEVICE).mT, torch.randn(BATCH, 17, HEADS, device=DEVICE).mT
    expected = results_and_gradients(kernels, call, weights)
    for other in (turned, spaced):
        for name, got in results_and_gradients(kernels, other, weights).items():
            assert torch.equal(got, expected[name]), name


def test_expanded_operands():
    call = call_of("decoder", 17, 18)
    expanded = call | {
        "query": call["query"][:, :1].expand(-1, HEADS, -1, -1),
        "key": call["key"][:1].expand(BATCH, -1, -1, -1),
        "key_mask": (torch.arange(18, device=DEVICE) % 3 > 0).expand(BATCH, -1),
        "distance_bias": call["distance_bias"][:1].expand(HEADS, -1),
    }
    plain = {n: t.clone() if torch.is_tensor(t) else t for n, t in expanded.items()}
    weights = torch.ones((), device=DEVICE).expand(BATCH, HEADS, 17, 5), torch.randn(BATCH, HEADS, 17, device=DEVICE)
    first, second = (results_and_gradients(kernels, c, weights) for c in (expanded, plain))
    for name, got in first.items():
        assert torch.equal(got, second[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_stands_at_masked_keys_is_never_read(bad):
    call = call_of("mask", 20, 40)
    call["key_lengths"] = torch.tensor([40, 29], device=DEVICE)
    hidden = ~call["key_mask"] | (torch.arange(40, device=DEVICE) >= call["key_lengths"][:, None])
    weights = weights_of(call)
    expected = results_and_gradients(kernels, call, weights)
    spoiled = call | {n: call[n].masked_fill(hidden[:, None, :, None], bad) for n in ("key", "value")}
    for name, got in results_and_gradients(kernels, spoiled, weights).items():
        assert torch.equal(got, expected[name]), name


def test_what_stands_in_rows_that_do_not_count_is_never_read():
    call = call_of("causal", 20, 20)
    lengths = torch.tensor([20, 9], device=DEVICE)
    call |= {"query_lengths": lengths, "key_lengths": lengths}
    hidden = (torch.arange(20, device=DEVICE) >= lengths[:, None])[:, None, :, None]
    weights = weights_of(call)
    expected = results_and_gradients(kernels, call, weights)
    spoiled = call | {"query": call["query"].masked_fill(hidden, torch.nan)}
    for name, got in results_and_gradients(kernels, spoiled, weights).items():
        assert torch.equal(got, expected[name]), name


def test_rows_do_not_see_behind_themselves():
    """To the bit: a later key changes no earlier row, though it shares their tiles."""
    call = call_of("causal", 40, 40)
    before = kernels(call).output
    for name in ("key", "value"):
        call[name] = call[name].clone()
        call[name][:, :, 21:] += 1
    after = kernels(call).output
    assert torch.equal(before[:, :, :21], after[:, :, :21]) and not torch.equal(before[:, :, 21:], after[:, :, 21:])


def test_tiles_out_of_sight_are_never_touched():
    """The window's cost: a key outside of every row's window may be NaN, and so may whole tiles beside a block."""
    tile = 16 if INTERPRETED else 128
    keys = 4 * tile + 16
    call = call_of("plain", 16, keys) | {"causal": True, "window": 10}
    expected = kernels(call).output
    for name in ("key", "value"):
        call[name] = call[name].clone()
        call[name][:, :, : (keys - 26) // tile * tile] = torch.nan
    assert torch.equal(kernels(call).output, expected)


def test_gradients_are_the_same_in_every_run():
    call = call_of("decoder with dropout", 17, 18)
    weights = weights_of(call)
    first, second = (results_and_gradients(kernels, call, weights) for _ in range(2))
    for name, got in first.items():
        assert torch.equal(got, second[name]), name


def test_chunks_of_keys_merge():
    call = call_of("sinks", 20, 40)
    whole = kernels(call)
    parts = [
        kernels(
            {k: v for k, v in call.items() if k != "sinks" or first}
            | {n: call[n][:, :, cut] for n in ("key", "value")}
        )
        for cut, first in ((slice(0, 17), True), (slice(17, 40), False))
    ]
    merged, lse = merge_attention(*zip(*parts, strict=True))
    assert torch.allclose(merged, whole.output, atol=1e-6) and torch.allclose(lse, whole.lse, atol=1e-6)


def test_what_the_kernels_cannot_take_is_refused():
    query = torch.randn(1, 1, 4, 8, device=DEVICE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="flash_attention has no kernel for float64"):
        flash_attention(query, query, query, backend="triton")
    query = torch.randn(1, 1, 4, 300, device=DEVICE)
    with pytest.raises(RuntimeError, match="kernels for sizes up to 256, got 300 of query and 300 of value"):
        flash_attention(query, query, query, backend="triton")


def test_the_operators_keep_their_promises():
    operands, options = operands_of(**call_of("decoder", 5, 6))
    operator = torch.ops.hf_efficient.flash_attention_forward.default
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator, (*operands, *options, "triton"), test_utils=checks)


def test_compiled_and_under_autocast():
    call = call_of("causal window distance bias", 5, 6)
    weights = weights_of(call)
    expected = results_and_gradients(kernels, call, weights)
    torch.compiler.reset()
    compiled = results_and_gradients(torch.compile(kernels, fullgraph=True, backend="aot_eager"), call, weights)
    torch.compiler.reset()
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = results_and_gradients(kernels, call, weights)
    for name, want in expected.items():
        assert torch.equal(compiled[name], want) and torch.equal(cast[name], want), name
