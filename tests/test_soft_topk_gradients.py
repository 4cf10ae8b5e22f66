"""The gradients of soft_topk: gradcheck, autograd through the definitions, thousands of unrolled iterations.

Run: pytest tests/test_soft_topk_gradients.py
"""

import numpy
import pytest
import torch
from soft_topk_cases import ALL_OPTIONS, assert_like_eager, descended, gradients, make_rows, name_of, reference

from hf_efficient.kernels.soft_topk import selection, soft_topk


every_option = pytest.mark.parametrize("options", ALL_OPTIONS, ids=name_of)


@every_option
@pytest.mark.parametrize("function", [reference, soft_topk], ids=["reference", "fast"])
def test_gradcheck(options, function):
    logits, k, mask, _ = make_rows(3, 14, torch.float64)
    k = k + 0.3  # with a whole k and a small temperature the scores have a kink
    arguments = [t.requires_grad_() for t in (logits, k)]
    assert torch.autograd.gradcheck(lambda s, k: function(s, k, mask=mask, **options)[0], arguments)


@every_option
@pytest.mark.parametrize("columns", [1, 2, 17, 300])
def test_backward_is_autograd_through_the_definition(options, columns):
    logits, k, mask, weights = make_rows(5, columns, torch.float64)
    k = k + 0.3 * (columns < 100)  # a whole k that is the number of logits, or nearly that of the scores, has a kink
    for keep in (None, mask):
        actual = gradients(soft_topk, logits, k, weights, mask=keep, **options)
        expected = gradients(reference, logits, k, weights, mask=keep, **options)
        for name, found, wanted in zip(("scores", "logits", "k"), actual, expected, strict=True):
            error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            assert error < 1e-12, f"{name}: {error:.2e}"


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
def test_implicit_gradient_is_that_of_4000_iterations(eps):
    logits, k, _, weights = make_rows(4, 60, torch.float64)
    actual = gradients(soft_topk, logits, k, weights, eps=eps)
    expected = gradients(lambda s, k: (descended(s, k, eps, 4000),), logits, k, weights)
    for name, found, wanted in zip(("scores", "logits", "k"), actual, expected, strict=True):
        error = (found - wanted).abs().max()
        assert error < 1e-10, f"{name}: {error:.2e}"


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_gradients_within_budget(options, dtype):
    logits, k, mask, weights = make_rows(6, 1000, dtype)
    actual = gradients(soft_topk, logits, k, weights, mask=mask, **options)
    assert actual[1].dtype == dtype and actual[2].dtype == k.dtype
    assert_like_eager(actual, logits, k, weights, mask, **options)


def test_gradient_of_k_in_its_own_dtype_and_shape():
    logits = torch.randn(2, 3, 20, dtype=torch.float16)
    k = torch.tensor(4.5, dtype=torch.float64, requires_grad=True)
    soft_topk(logits, k, eps=0.3).scores.float().square().sum().backward()
    assert k.grad.dtype == torch.float64 and k.grad.shape == () and k.grad > 0


def test_router_learns_at_every_width():
    """Unit-variance logits at the default temperature: hardly anything saturates, so the gradient is there."""
    for columns in (256, 4096):
        logits = torch.randn(1, columns, requires_grad=True)
        output = soft_topk(logits, columns // 16)
        output.scores.square().sum().backward()
        assert (logits.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("elements", [64, 32768], ids=["blocks", "whole"])
def test_both_libraries_give_the_same(elements, monkeypatch):
    """numpy's functions, which serve a processor of few threads, and torch's, which serve the rest."""
    monkeypatch.setattr(selection, "CACHED_ELEMENTS", elements)
    logits, weights = torch.randn(3, 200, dtype=torch.float64), torch.randn(200, 3, dtype=torch.float64).T
    mask = torch.rand(3, 200) > 0.2
    k = torch.tensor([7.5, 0.0, 300.0], dtype=torch.float64)
    results = []
    for many in (1, 10**6):
        monkeypatch.setattr(selection, "MANY_THREADS", many)
        assert selection.library_for(logits) is (torch if many == 1 else numpy)
        leaves = logits.clone().requires_grad_(), k.clone().requires_grad_()
        found = soft_topk(*leaves, eps=0.05, mask=mask, num_selected=9)
        results.append([*found, *torch.autograd.grad(found.scores, leaves, weights)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
