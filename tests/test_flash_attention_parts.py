"""The backward pass of attention over parts of the keys, put together, is that of attention over all of them."""

import pytest
import torch
from helpers import assert_within_budget

from hf_efficient.kernels.flash_attention import flash_attention, merge_attention, part_gradients


NAMES = ("query", "key", "value")


def tensors(dtype=torch.float64, rows=3, keys=11):
    torch.manual_seed(0)
    shapes = (2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 6)
    mask = torch.arange(keys) < torch.tensor([[keys], [4]])
    return [torch.randn(shape, dtype=dtype) for shape in shapes], mask


def in_parts(query, key, value, mask, grad, edges, **options):
    """Output and gradients of attention that never sees two parts at once."""
    pieces = list(zip((key.split(edges, 2)), value.split(edges, 2), mask.split(edges, 1), strict=True))
    seeds = [{"dropout_seed": index} for index in range(len(pieces))]
    made = [flash_attention(query, k, v, key_mask=m, return_lse=True, **options, **seed)
            for (k, v, m), seed in zip(pieces, seeds, strict=True)]  # fmt: skip
    output, lse = merge_attention([part.output for part in made], [part.lse for part in made])
    found = [part_gradients(query, k, v, output, lse, grad, key_mask=m, **options, **seed)
             for (k, v, m), seed in zip(pieces, seeds, strict=True)]  # fmt: skip
    keys, values = (torch.cat([getattr(part, name) for part in found], dim=2) for name in ("key", "value"))
    return output, (sum(part.query for part in found), keys, values)


def whole(query, key, value, mask, grad):
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    scores = inputs[0] @ inputs[1].repeat_interleave(2, 1).mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    output = weights @ inputs[2].repeat_interleave(2, 1)
    return output.detach(), torch.autograd.grad(output, inputs, grad)


@pytest.mark.parametrize("edges", [[11], [4, 7], [5, 1, 5]], ids=str)
def test_parts_equal_the_whole(edges):
    """The second row sees nothing of the last parts, whose gradients are zeros for it."""
    inputs, mask = tensors()
    grad = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    output, gradients = in_parts(*inputs, mask, grad, edges)
    expected, wanted = whole(*inputs, mask, grad)
    torch.testing.assert_close(output, expected)
    for name, found, oracle in zip(NAMES, gradients, wanted, strict=True):
        torch.testing.assert_close(found, oracle, msg=lambda m, name=name: f"{name}: {m}")
    assert gradients[1][1, :, 4:].abs().max() == 0


def test_single_precision_stays_in_the_budget():
    inputs, mask = tensors(torch.float32, rows=17, keys=300)
    grad = torch.randn(2, 4, 17, 6)
    _, gradients = in_parts(*inputs, mask, grad, [100, 150, 50])
    _, oracle = whole(*(tensor.double() for tensor in inputs), mask, grad.double())
    _, plain = whole(*inputs, mask, grad)
    for arguments in zip(gradients, oracle, plain, NAMES, strict=True):
        assert_within_budget(*arguments)


def test_rows_that_see_nothing():
    inputs, mask = tensors()
    mask[1] = False
    output, gradients = in_parts(*inputs, mask, torch.ones(2, 4, 3, 6, dtype=torch.float64), [4, 7])
    assert output[1].abs().max() == 0
    for gradient in gradients:
        assert gradient.isfinite().all() and gradient[1].abs().max() == 0


def test_dropped_weights_are_those_of_the_forward_pass():
    """The values' gradient is linear in the weights that were kept."""
    inputs, mask = tensors()
    grad = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    output, gradients = in_parts(*inputs, mask, grad, [4, 7], dropout_p=0.5)
    torch.testing.assert_close((gradients[2] * inputs[2]).sum(), (grad * output).sum())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("output", torch.zeros(2, 4, 3, 5), r"output must be floating point of shape \(2, 4, 3, 6\)"),
        ("lse", torch.zeros(2, 4, 2), r"lse must be floating point of shape \(2, 4, 3\)"),
        ("grad_output", torch.zeros(2, 4, 3, 6, dtype=torch.long), "grad_output must be floating point"),
        ("key", torch.zeros(2, 3, 11, 8), "key"),
    ],
)
def test_bad_input(name, value, message):
    inputs, _ = tensors(torch.float32)
    arguments = dict(zip(NAMES, inputs, strict=True))
    arguments |= {
        "output": torch.zeros(2, 4, 3, 6),
        "lse": torch.zeros(2, 4, 3),
        "grad_output": torch.zeros(2, 4, 3, 6),
    }
    with pytest.raises(ValueError, match=message):
        part_gradients(**arguments | {name: value})


@pytest.mark.parametrize("edges", [[50], [16, 34]], ids=str)
def test_parts_without_a_mask_go_to_the_kernel_behind_sdpa(edges, monkeypatch):
    """As exact as float32 is, forward and backward; and one call of that kernel for each."""
    calls = []
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    monkeypatch.setattr(
        torch.ops.aten,
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        lambda *arguments, **options: calls.append(1) or kernel(*arguments, **options),
    )
    torch.manual_seed(0)
    query, key, value, grad = (torch.randn(2, length, 4, 8).transpose(1, 2) for length in (7, 50, 50, 7))

    def results(dtype, backend):
        q, k, v, g = (tensor.to(dtype) for tensor in (query, key, value, grad))
        pieces = list(zip(k.split(edges, 2), v.split(edges, 2), strict=True))
        made = [flash_attention(q, *piece, return_lse=True, backend=backend, scale=0.4) for piece in pieces]
        output, lse = merge_attention([part.output for part in made], [part.lse for part in made])
        found = [part_gradients(q, *piece, output, lse, g, backend=backend, scale=0.4) for piece in pieces]
        of_keys = (torch.cat([getattr(part, name) for part in found], dim=2) for name in ("key", "value"))
        return output, lse, sum(part.query for part in found), *of_keys

    oracle, eager = results(torch.float64, "eager"), results(torch.float32, "eager")
    assert not calls
    found = results(torch.float32, "auto")
    assert len(calls) == len(edges)
    for name, part, exact, plain in zip(("output", "lse", *NAMES), found, oracle, eager, strict=True):
        # The blocked form rounds its lse in float64, so its own error is smaller than that of a float32 computation.
        assert (part - exact).abs().max() <= 2e-6 * exact.abs().max().clamp(min=1), name
        assert torch.allclose(part, plain, rtol=1e-5, atol=2e-6), name
