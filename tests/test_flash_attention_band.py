"""A window that slides over one sequence, which has a path of its own on CPUs, against the definition."""

import pytest
import torch
from flash_attention_cases import operands_of
from helpers import assert_within_budget

from hf_efficient.kernels.flash_attention import eager, eager_band, flash_attention
from hf_efficient.kernels.flash_attention.reference import flash_attention_reference


BIASES = {
    "plain": (),
    "distance bias": ("distance_bias",),
    "everything": ("distance_bias", "alibi_slopes", "key_mask"),
}


def make_call(length, batch, heads, window, names=(), size=8, dtype=torch.float64):
    """Heads come out of the last dimension of a projection, as in a model."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, length, heads, size).transpose(1, 2) for _ in range(3))
    key_mask = torch.rand(batch, length) > 0.3
    key_mask[0, 100:260] = False  # whole windows without a key
    options = {
        "distance_bias": torch.randn(heads, 2 * 20 + 1),
        "alibi_slopes": torch.rand(batch, heads),
        "key_mask": key_mask,
    }
    call = {"query": query, "key": key, "value": value, **{name: options[name] for name in names}}
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in call.items()} | {"window": window}


def results(function, call):
    """Output, lse and the gradients of a weighted sum of both."""
    names = [name for name, value in call.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    leaves = {name: call[name].detach().requires_grad_() for name in names}
    output, lse = function(call | leaves)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    torch.manual_seed(1)
    weights = torch.randn(output.shape), torch.randn(lse.shape)
    loss = (output * weights[0].to(output.dtype)).sum() + (lse * weights[1].to(lse.dtype)).sum()
    return [output, lse, *torch.autograd.grad(loss, list(leaves.values()))]


def ours(call):
    return flash_attention(**call, backend="eager", return_lse=True)


def reference(call):
    return flash_attention_reference(*operands_of(**call))


@pytest.fixture
def counted(monkeypatch):
    """The calls that took the path."""
    calls = []
    for name in ("band_forward", "band_backward"):
        original = getattr(eager, name)
        monkeypatch.setattr(
            eager, name, lambda *a, original=original, name=name: (calls.append(name), original(*a))[1]
        )
    return calls


@pytest.mark.parametrize("names", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("window", [64, (70, 5), (9, 0)], ids=str)
@pytest.mark.parametrize(("length", "batch", "heads"), [(300, 1, 2), (256, 2, 3), (330, 3, 1)])
@pytest.mark.parametrize("tile", [2**19, 1])
def test_a_band_is_the_reference(names, window, length, batch, heads, tile, counted, nan_poisoned, monkeypatch):
    monkeypatch.setattr(eager_band, "TILE", {"cpu": tile})
    call = make_call(length, batch, heads, window, names)
    for actual, expected in zip(results(ours, call), results(reference, call), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert counted == ["band_forward", "band_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_errors(dtype, counted):
    call = make_call(300, 1, 2, 64, BIASES["everything"], size=64, dtype=dtype)
    exact = results(
        reference, {n: t.double() if torch.is_tensor(t) and n != "key_mask" else t for n, t in call.items()}
    )
    names = ("output", "lse", "query", "key", "value", "bias", "slopes")
    for name, actual, oracle, plain in zip(names, results(ours, call), exact, results(reference, call), strict=True):
        assert_within_budget(actual, oracle, plain, name)
    assert len(counted) == 2


def test_gradients_lie_where_a_projection_wants_them(counted):
    call = make_call(300, 2, 2, 64)
    output, _, *gradients = results(ours, call)
    for tensor in (output, *gradients):
        assert tensor.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("what", ["key", "value", "query"])
def test_what_is_not_finite_stays_in_its_window(what, counted):
    call = make_call(300, 1, 2, 16, size=8)
    expected = ours(call).output
    call[what] = call[what].clone()
    call[what][0, 0, 150] = torch.inf
    output = ours(call).output
    far = (torch.arange(300) - 150).abs() > 16
    torch.testing.assert_close(output[0, 1], expected[0, 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(output[0, 0, far], expected[0, 0, far], rtol=0, atol=1e-12)
    assert counted == ["band_forward"]


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"window": None}, {"window": (3, None)}, {"sinks": torch.zeros(2)}], ids=str
)
def test_other_calls_take_the_general_path(options, counted):
    call = make_call(300, 1, 2, 16) | options
    torch.testing.assert_close(ours(call).output, reference(call)[0], rtol=0, atol=1e-10)
    assert not counted


def test_the_operator_keeps_what_it_promises():
    operands, options = operands_of(**make_call(300, 2, 2, 16, BIASES["everything"]))
    operator = torch.ops.hf_efficient.flash_attention_forward.default
    torch.library.opcheck(operator, (*operands, *options, "eager"), test_utils=("test_schema", "test_faketensor"))
    output, lse = operator(*operands, *options, "eager")
    arguments = (output, lse.new_zeros(lse.shape), output, lse, *operands, *options, "eager", True, True)
    operator = torch.ops.hf_efficient.flash_attention_backward.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
