"""What the tests of flash attention's kernels share: calls on the device at hand, and the comparison."""

import torch
from flash_attention_cases import DIFFERENTIABLE, in_dtype, make_call, operands_of
from helpers import assert_within_budget
from kernel_device import DEVICE

from hf_efficient.kernels.flash_attention import flash_attention
from hf_efficient.kernels.flash_attention.reference import flash_attention_reference


# Numbers of a gradient that are too few for their largest error to be typical, and how many losses there are instead.
FEW, OTHER_LOSSES = 8, 3
# Parts of the scale that go to the query. More on a GPU, whose exponentials, powers of two of a rounded product,
# scatter more than those of a processor.
FACTORS = (1.0, 0.3, 0.45, 0.7, 1.3) if DEVICE == "cpu" else tuple(0.3 * 1.09**i for i in range(20))


def call_of(combination, length, keys, dtype=torch.float32, key_heads=1):
    call = make_call(combination, length, keys, dtype, key_heads)
    return {n: t.to(DEVICE) if torch.is_tensor(t) else t for n, t in call.items()}


def kernels(call):
    return flash_attention(**call, backend="triton", return_lse=True)


def eager(call):
    return flash_attention(**call, backend="eager", return_lse=True)


def reference(call):
    return flash_attention_reference(*operands_of(**call))


def weights_of(call):
    """What output and lse are multiplied with before they are summed into a loss."""
    (batch, heads, length, _), value_size = call["query"].shape, call["value"].shape[3]
    return torch.randn(batch, heads, length, value_size, device=DEVICE), torch.randn(
        batch, heads, length, device=DEVICE
    )


def results_and_gradients(function, call, weights):
    """Output, lse and all gradients of a weighted sum of both, by name. A lse of -inf counts as zero."""
    leaves = {n: call[n].detach().requires_grad_() for n in DIFFERENTIABLE if n in call}
    output, lse = function(call | leaves)
    finite = lse.masked_fill(lse == -torch.inf, 0)
    loss = (output * weights[0].to(output.dtype)).sum() + (finite * weights[1].to(lse.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {"output": output, "lse": lse} | named


def scaled(function, factor):
    """The same function in other roundings: a part of the scale goes to the query."""

    def run(call):
        scale = call["query"].shape[-1] ** -0.5 if call.get("scale") is None else call["scale"]
        return function(call | {"query": call["query"] * factor, "scale": scale / factor})

    return run


def assert_equals_the_definition(call):
    """Within the error budget of the worst of several plain computations, which differ in their roundings alone.

    The largest of few rounding errors scatters by more than the factor of two that the budget allows. Where a gradient
    is only a few numbers, such as one slope for each head, it takes several losses to see how large one may be.
    """
    weights = weights_of(call)
    actual = results_and_gradients(kernels, call, weights)
    draws = [_plain(call, weights)]
    few = [name for name, result in actual.items() if name.startswith("gradient") and 0 < result.numel() <= FEW]
    if few:
        draws += [_plain(call, weights_of(call)) for _ in range(OTHER_LOSSES)]
    oracle, plain = draws[0]
    blind = oracle["lse"] == -torch.inf
    assert torch.equal(actual["lse"] == -torch.inf, blind), "lse: -inf in other places"
    for results in (actual, oracle, *plain):
        results["lse"] = results["lse"].masked_fill(blind, 0)
    for name, exact in oracle.items():
        if name in few:
            error = max((way[name] - of[name]).abs().max() for of, ways in draws for way in ways)
            assert_within_budget(actual[name], exact, (exact + error).to(actual[name].dtype), name)
        elif exact.numel():
            worst = max((way[name] for way in plain), key=lambda result: (result - exact).abs().max().item())
            assert_within_budget(actual[name], exact, worst, name)


def _plain(call, weights):
    """Results and gradients in float64, and those of several plain computations in the dtype of the call."""
    oracle = results_and_gradients(reference, in_dtype(call, torch.float64), weights)
    ways = [scaled(f, factor) for f in (reference, eager) for factor in FACTORS]
    return oracle, [results_and_gradients(way, call, weights) for way in ways]
