"""The definition of flash attention against the formula written out; T5 vector, hash, merging and the door."""

import math

import pytest
import torch
from flash_attention_cases import COMBINATIONS, DIFFERENTIABLE, definition, dropout_hash, make_call, operands_of
from torch.autograd import gradcheck

from hf_efficient.kernels.flash_attention import flash_attention, merge_attention, t5_distance_bias
from hf_efficient.kernels.flash_attention.operands import dropout_keep, dropout_row_keys
from hf_efficient.kernels.flash_attention.reference import flash_attention_reference


def assert_same(actual, expected, name):
    """Equal in float64 but for the order of sums; -inf stands where -inf is expected."""
    assert actual.dtype == expected.dtype == torch.float64
    assert torch.equal(actual == -torch.inf, expected == -torch.inf), f"{name}: -inf in other places"
    actual, expected = (t.masked_fill(t == -torch.inf, 0) for t in (actual, expected))
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert error < 1e-13, f"{name}: off by {error}"


@pytest.mark.parametrize("sizes", [(11, 13), (5, 5), (7, 4), (1, 9), (3, 1)], ids=str)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_reference_is_the_formula(combination, sizes):
    call = make_call(combination, *sizes, dtype=torch.float64)
    actual, expected = flash_attention_reference(*operands_of(**call)), definition(**call)
    for name, got, want in zip(("output", "lse"), actual, expected, strict=True):
        assert_same(got, want, name)


THOROUGHLY = ("plain", "decoder with dropout", "encoder")


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_reference_gradcheck(combination):
    """Every entry of the Jacobian of the plain call and the fullest two; elsewhere its product with random vectors."""
    call = make_call(combination, 5, 6, dtype=torch.float64)
    leaves = {name: call[name].requires_grad_() for name in DIFFERENTIABLE if name in call}

    def run(*tensors):
        output, lse = flash_attention_reference(*operands_of(**call | dict(zip(leaves, tensors, strict=True))))
        return output, lse.masked_fill(lse == -torch.inf, 0)

    assert gradcheck(run, tuple(leaves.values()), fast_mode=combination not in THOROUGHLY)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_the_public_function_is_the_reference(combination, backend):
    call = make_call(combination, dtype=torch.float64)
    expected = flash_attention_reference(*operands_of(**call))
    both = flash_attention(**call, backend=backend, return_lse=True)
    alone = flash_attention(**call, backend=backend)
    for name, got, want in zip(
        ("output", "lse", "output alone"), (*both, alone), (*expected, expected[0]), strict=True
    ):
        assert_same(got, want, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_out(dtype):
    output, lse = flash_attention(**make_call("decoder", dtype=dtype), return_lse=True)
    assert output.dtype == dtype and lse.dtype == torch.float32


def test_key_heads_are_shared_in_a_row():
    """Query heads 0 and 1 read key head 0, as transformers' repeat_kv has it; x-transformers tiles instead."""
    call = make_call("plain", dtype=torch.float64)
    repeated = call | {n: call[n].repeat_interleave(2, dim=1) for n in ("key", "value")}
    assert_same(flash_attention(**call, backend="eager"), flash_attention(**repeated, backend="eager"), "output")


# --- T5 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets,max_distance", [(32, 128), (8, 20), (32, 1000), (64, 33), (4, 3)])
def test_t5_distances_have_the_buckets_of_transformers(bidirectional, buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    table = torch.arange(buckets, dtype=torch.float64)[:, None]
    vector = t5_distance_bias(table, bidirectional=bidirectional, max_distance=max_distance)
    reach = 2 * max_distance + 7
    distance = torch.arange(-reach, reach + 1)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    ours = vector[0, distance.clamp(-max_distance, max_distance) + max_distance].long()
    assert vector.shape == (1, 2 * max_distance + 1) and torch.equal(ours, theirs)


def test_t5_table_has_a_gradient():
    call = make_call("causal", 5, 6, dtype=torch.float64)
    table = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)

    def run(table):
        bias = t5_distance_bias(table, bidirectional=False, max_distance=5)
        return flash_attention(**call, distance_bias=bias)

    assert gradcheck(run, (table,))


@pytest.mark.parametrize(
    "table,options,message",
    [
        (torch.randn(8), {}, r"table must be floating point \[buckets, heads\], got torch.float32 \(8,\)"),
        (torch.zeros(8, 2).long(), {}, "table must be floating point"),
        (torch.randn(7, 2), {}, "an even number of at least 4 buckets, got 7"),
        (torch.randn(2, 2), {}, "an even number of at least 4 buckets, got 2"),
        (torch.randn(1, 2), {"bidirectional": False}, "at least 2 buckets, got 1"),
        (torch.randn(32, 2), {"max_distance": 8}, "max_distance must be over 8.*got 8"),
    ],
)
def test_t5_rejects(table, options, message):
    with pytest.raises(ValueError, match=message):
        t5_distance_bias(table, **{"bidirectional": True} | options)


# --- dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, -7, 2**63 - 1, -(2**63)])
def test_dropout_hash_is_the_one_in_integers(seed):
    heads, rows, columns = torch.tensor([[0, 1], [2, 70000]]), torch.tensor([0, 3, 65537]), torch.arange(50)
    keep = dropout_keep(dropout_row_keys(torch.tensor([seed]), rows, heads), columns, 0.4)
    for (b, h), head in zip([(0, 0), (0, 1), (1, 0), (1, 1)], heads.flatten().tolist(), strict=True):
        for i, row in enumerate(rows.tolist()):
            expected = [dropout_hash(seed, head, row, c) >> 8 >= round(0.4 * 2**24) for c in range(50)]
            assert keep[b, h, i].tolist() == expected


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_is_fair_along_every_axis(dropout_p):
    """Every row, column and head, and every pair of neighbours, keeps its share, within five deviations."""
    heads, size = 8, 512
    keys = dropout_row_keys(torch.tensor([5]), torch.arange(size), torch.arange(heads))
    keep = dropout_keep(keys, torch.arange(size), dropout_p).double()
    share = 1 - dropout_p
    for dimensions in ((0, 1), (0, 2), (1, 2), (0,)):
        count = math.prod(keep.shape[d] for d in dimensions)
        limit = (5 if len(dimensions) > 1 else 8) * math.sqrt(share * dropout_p / count)
        assert (keep.mean(dimensions) - share).abs().max() < limit
    for shifted in (keep.roll(1, 0), keep.roll(1, 1), keep.roll(1, 2)):
        together = (keep * shifted).mean() - share**2
        assert together.abs() < 5 * math.sqrt(share**2 * (1 - share**2) / keep.numel())


def test_dropout_seed():
    call = make_call("plain") | {"dropout_p": 0.5}
    first, again, other = (flash_attention(**call, dropout_seed=s) for s in (3, torch.tensor([3]), 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    drawn = flash_attention(**call), flash_attention(**call)
    torch.manual_seed(1)
    assert torch.equal(drawn[0], flash_attention(**call)) and not torch.equal(*drawn)


def test_dropout_keeps_the_mean():
    call = make_call("plain", dtype=torch.float64)
    exact = flash_attention(**call)
    draws = torch.stack([flash_attention(**call, dropout_p=0.3, dropout_seed=s) for s in range(2000)])
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 5 * deviation).all()


# --- merging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4, 5, 4), (13, 0), (1, 12)], ids=str)
def test_parts_of_the_keys_merge_into_the_whole(sizes):
    call = make_call("decoder", dtype=torch.float64)
    call = {n: t for n, t in call.items() if n not in ("causal", "alibi_slopes", "distance_bias")}
    leaves = {n: call[n].requires_grad_() for n in DIFFERENTIABLE if n in call}
    whole = flash_attention(**call, return_lse=True)

    parts, start = [], 0
    for size in sizes:
        here = slice(start, start + size)
        part = call | {"key": call["key"][:, :, here], "value": call["value"][:, :, here]}
        part["key_mask"] = call["key_mask"][:, here]
        if start:  # memory and sinks are in one part only
            part = {n: t for n, t in part.items() if n not in ("memory_key", "memory_value", "sinks")}
        parts.append(flash_attention(**part, return_lse=True))
        start += size
    merged = merge_attention(*zip(*parts, strict=True))

    weights = [torch.randn_like(t) for t in whole]
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(result, weights, strict=True)), list(leaves.values()))
        for result in (merged, whole)
    ]
    for name, got, want in zip(("output", "lse"), merged, whole, strict=True):
        assert_same(got, want, name)
    for name, got, want in zip(leaves, *gradients, strict=True):
        assert_same(got, want, f"gradient of {name}")


def test_merging_parts_that_see_nothing():
    output, lse = torch.randn(2, 3, requires_grad=True), torch.tensor([0.5, -torch.inf], requires_grad=True)
    nothing = torch.zeros(2, 3), torch.full((2,), -torch.inf)
    merged, total = merge_attention([output, nothing[0]], [lse, nothing[1]])
    assert torch.equal(merged[0], output[0]) and torch.equal(total, lse)
    assert torch.equal(merged[1], torch.zeros(3))
    merged.sum().backward()
    assert torch.isfinite(output.grad).all() and torch.isfinite(lse.grad).all()


@pytest.mark.parametrize(
    "outputs,lses,message",
    [
        ([], [], "equally many and not none, got 0 and 0"),
        ([torch.zeros(2, 3)], [], "equally many and not none, got 1 and 0"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], [torch.zeros(2)] * 2, r"outputs\[1\] must have shape \(2, 3\)"),
        ([torch.zeros(2, 3)], [torch.zeros(3)], r"lses\[0\] must have shape \(2,\), got \(3,\)"),
    ],
)
def test_merging_rejects(outputs, lses, message):
    with pytest.raises(ValueError, match=message):
        merge_attention(outputs, lses)


# --- the door ---------------------------------------------------------------------------------------------------

META = {"device": "meta"}
REJECTED = {
    "query of three dimensions": ({"query": torch.randn(2, 11, 8)}, r"query must have shape \[batch, heads"),
    "integer key": ({"key": torch.zeros(2, 2, 13, 8).long()}, "key must be one of torch.float16.*got torch.int64"),
    "value of another dtype": ({"value": torch.randn(2, 2, 13, 5).half()}, "value must be like query, torch.float32"),
    "key on another device": ({"key": torch.empty(2, 2, 13, 8, **META)}, "key must be like query.*on meta"),
    "other batch": ({"key": torch.randn(1, 2, 13, 8)}, "key must have batch size 2 like query, got 1"),
    "key of another size": ({"key": torch.randn(2, 2, 13, 7)}, "key must have size 8 like query, got 7"),
    "no size": ({"query": torch.randn(2, 4, 11, 0)}, "query must have a size of at least 1"),
    "value of another length": ({"value": torch.randn(2, 2, 12, 5)}, r"value must have .* \(2, 13\) like key"),
    "key heads that do not divide": (
        {"key": torch.randn(2, 3, 13, 8), "value": torch.randn(2, 3, 13, 5)},
        "key must have a number of heads that divides 4, got 3",
    ),
    "negative window": ({"window": -1}, "window must be an int of at least 0.*got -1"),
    "three windows": ({"window": (1, 2, 3)}, "window must be"),
    "window of a bool": ({"window": True}, "window must be"),
    "window of a float": ({"window": (1.0, None)}, "window must be"),
    "mask over pairs": ({"key_mask": torch.ones(2, 11, 13).bool()}, r"key_mask must have shape \(2, 13\)"),
    "additive mask": ({"key_mask": torch.zeros(2, 13)}, "key_mask must be bool or integer.*got torch.float32"),
    "mask elsewhere": ({"key_mask": torch.empty(2, 13, **META).bool()}, "key_mask must be on cpu, got meta"),
    "one length": ({"key_lengths": torch.tensor([3])}, r"key_lengths must have shape \(2,\), got \(1,\)"),
    "lengths of floats": ({"query_lengths": torch.ones(2)}, "query_lengths must be integer, got torch.float32"),
    "lengths of bools": ({"query_lengths": torch.ones(2).bool()}, "query_lengths must be integer, got torch.bool"),
    "slopes of key heads": ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes must have shape \(4,\) or \(2, 4\)"),
    "integer slopes": ({"alibi_slopes": torch.ones(4).long()}, "alibi_slopes must be floating point on cpu, got"),
    "even distances": ({"distance_bias": torch.randn(4, 8)}, r"distance_bias must have shape \(4 or 1, odd"),
    "bias of key heads": ({"distance_bias": torch.randn(2, 9)}, r"distance_bias must have shape .* got \(2, 9\)"),
    "softcap of zero": ({"softcap": 0.0}, "softcap must be positive and finite, or None, got 0.0"),
    "infinite softcap": ({"softcap": math.inf}, "softcap must be positive and finite"),
    "infinite scale": ({"scale": math.inf}, "scale must be finite, got inf"),
    "memory keys alone": ({"memory_key": torch.randn(2, 3, 8)}, "must be given together"),
    "memory of query heads": (
        {"memory_key": torch.randn(4, 3, 8), "memory_value": torch.randn(4, 3, 5)},
        r"memory_key must have shape \(2, 3, 8\) or \(2, 2, 3, 8\), got \(4, 3, 8\)",
    ),
    "memory of two lengths": (
        {"memory_key": torch.randn(2, 3, 8), "memory_value": torch.randn(2, 4, 5)},
        "memory_value must have shape",
    ),
    "memory, one with a batch": (
        {"memory_key": torch.randn(2, 3, 8), "memory_value": torch.randn(2, 2, 3, 5)},
        "memory_value must have shape",
    ),
    "memory of another dtype": (
        {"memory_key": torch.randn(2, 3, 8).double(), "memory_value": torch.randn(2, 3, 5).double()},
        "memory_key must be like query",
    ),
    "sinks of another size": ({"sinks": torch.randn(2)}, r"sinks must have shape \(4,\), got \(2,\)"),
    "certain dropout": ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
    "two seeds": ({"dropout_p": 0.1, "dropout_seed": torch.tensor([1, 2])}, "dropout_seed must be one int64"),
    "seed of a float": ({"dropout_p": 0.1, "dropout_seed": 1.5}, "dropout_seed must be an int, .* got 1.5"),
    "unknown backend": ({"backend": "sdpa"}, "backend must be one of 'auto', 'triton', 'eager', got 'sdpa'"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    change, message = REJECTED[name]
    call = make_call("plain")
    flash_attention(**call)
    with pytest.raises(ValueError, match=message):
        flash_attention(**call | change)
