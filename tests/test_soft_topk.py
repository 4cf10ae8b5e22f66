"""soft_topk: the definition against the equation, the fast form against the definition, sums, masks, ties, indices.

Run: pytest tests/test_soft_topk.py -k exact
"""

import pytest
import torch
from soft_topk_cases import (
    ALL_OPTIONS,
    EPSILONS,
    METHODS,
    descended,
    largest_by_sorting,
    make_rows,
    name_of,
    reference,
    solved_by_bisection,
)

from hf_efficient.kernels.soft_topk import SoftTopkOutput, soft_topk
from hf_efficient.kernels.soft_topk import selection as selection_module


every_method = pytest.mark.parametrize("method", METHODS)
every_option = pytest.mark.parametrize("options", ALL_OPTIONS, ids=name_of)
masked_or_not = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


@pytest.mark.parametrize("eps", EPSILONS)
@masked_or_not
def test_exact_reference_solves_the_equation(eps, masked):
    logits, k, mask, _ = make_rows(6, 57, torch.float64, spread=2)
    mask = mask if masked else None
    expected = solved_by_bisection(logits, k, mask, eps)
    scores, _, threshold = reference(logits, k, eps=eps, mask=mask)
    assert (scores - expected).abs().max() < 1e-10
    again = torch.exp(((logits - threshold[:, None]) / eps).clamp(max=0))
    again = again if mask is None else again.masked_fill(~mask, 0)
    assert (again - expected).abs().max() < 1e-10


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
def test_the_iteration_tends_to_the_exact_scores(eps):
    logits, k, _, _ = make_rows(4, 60, torch.float64)
    exact = soft_topk(logits, k, eps=eps).scores
    assert (descended(logits, k, eps, 4000) - exact).abs().max() < 1e-10
    iterated = soft_topk(logits, k, eps=eps, method="coordinate_descent", n_iters=4000).scores
    assert (iterated - exact).abs().max() < 1e-10


@every_option
@masked_or_not
@pytest.mark.parametrize("columns", [1, 2, 17, 300])
def test_fast_form_is_the_reference_in_double(options, masked, columns):
    logits, k, mask, _ = make_rows(5, columns, torch.float64)
    mask = mask if masked else None
    selected = min(columns, 9)
    actual = soft_topk(logits, k, mask=mask, num_selected=selected, **options)
    scores, indices, threshold = reference(logits, k, mask=mask, num_selected=selected, **options)
    assert (actual.scores - scores).abs().max() < 1e-11
    assert torch.equal(actual.indices, indices)
    assert torch.allclose(actual.threshold, threshold, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("columns", [4096, 100_000, 1_048_576])
@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_sums_to_k_in_single_precision(columns, eps, spread):
    logits = spread * torch.randn(1, columns)
    for k in (1, columns // 16, columns * 9 / 128, columns / 2, columns - 0.5):
        total = soft_topk(logits, k, eps=eps, num_selected=0).scores.double().sum().item()
        assert abs(total - k) <= 1e-5 * k, (k, total)


def test_small_blocks_are_large_blocks(monkeypatch):
    """Rows that are cut for the cache, or taken together for it, with ragged ends."""
    logits, k, mask, weights = make_rows(7, 530)
    for options in ALL_OPTIONS:
        outputs = []
        for elements in (32768, 128, 1100):
            monkeypatch.setattr(selection_module, "CACHED_ELEMENTS", elements)
            leaf = logits.clone().requires_grad_()
            output = soft_topk(leaf, k, mask=mask, num_selected=40, **options)
            (output.scores * weights).sum().backward()
            outputs.append((output.scores.detach(), leaf.grad, output.indices))
        for scores, grad, indices in outputs[1:]:
            torch.testing.assert_close(scores, outputs[0][0], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(grad, outputs[0][1], rtol=1e-4, atol=1e-5)
            assert torch.equal(indices, outputs[0][2])


@pytest.mark.parametrize("kind", ["random", "ties", "sorted", "equal", "far apart", "minus infinity"])
@pytest.mark.parametrize("eps", [0.02, 1.0])
def test_rows_of_every_kind(kind, eps):
    """Where many are equal, or all or nothing saturates: the exact equation, in the precision of the computation."""
    logits = torch.randn(3, 5000)
    if kind == "ties":
        logits = logits.round()
    if kind == "sorted":
        logits = logits.sort(-1, descending=True).values
    if kind == "equal":
        logits[:] = 0.5
    if kind == "far apart":  # as exponents, far beyond the range of double precision
        logits[:, ::7] += 1000
        logits[:, 1::7] -= 1000
    if kind == "minus infinity":
        logits[:, 300:] = -torch.inf
    for number in (1, 30, 400, 4999):
        k = torch.tensor([1.0, number, number + 0.5])
        scores, indices, _ = soft_topk(logits, k, eps=eps, num_selected=number)
        expected = solved_by_bisection(logits, k, None, eps)
        assert (scores - expected).abs().max() < 1e-5
        assert torch.equal(indices, largest_by_sorting(logits, number))


@every_method
def test_more_wanted_than_there_is(method):
    """k at least the number of unmasked logits: ones. k zero: zeros. A fully masked row: zeros. Gradients: zero."""
    logits = torch.randn(6, 12, requires_grad=True)
    mask = torch.ones(6, 12, dtype=torch.bool)
    mask[1, 5:] = mask[2] = False
    mask[5, 4:] = False
    k = torch.tensor([12.0, 5.0, 3.0, 0.0, 20.0, 7.5], requires_grad=True)
    scores, indices, threshold = soft_topk(logits, k, mask=mask, method=method, num_selected=6, n_iters=20)
    expected = mask.float()
    expected[3] = 0
    assert not scores[2:4].any() if method == "exact" else (scores[2:4] < 1e-19).all()
    grads = torch.autograd.grad(scores.square().sum(), (logits, k))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert indices[2].tolist() == indices[1, :5].tolist() + [5] == [0, 1, 2, 3, 4, 5]
    if method == "exact":
        assert torch.equal(scores, expected) and not any(grad.any() for grad in grads)
        assert threshold.tolist() == [-torch.inf] * 3 + [torch.inf] + [-torch.inf] * 2


@every_method
def test_masked_entries_do_not_exist(method):
    """The same scores and gradients as for the row without them, whatever stands there; minus infinity masks too."""
    logits, k, mask, weights = make_rows(4, 50)
    k = k.clamp(max=20)
    options = {"method": method, "eps": 0.3, "num_selected": 8}
    for poison in (torch.nan, torch.inf, 1e30, -torch.inf):
        leaf = torch.where(mask, logits, poison).requires_grad_()
        scores, indices, _ = soft_topk(leaf, k, mask=None if poison == -torch.inf else mask, **options)
        grad = torch.autograd.grad((scores * weights).sum(), leaf)[0]
        assert not scores[~mask].any() and not grad[~mask].any()
        assert mask.gather(-1, indices).all()
        for row in range(4):
            keep = mask[row]
            alone = logits[row][keep].requires_grad_()
            output = soft_topk(alone, k[row], **options)
            alone_grad = torch.autograd.grad((output.scores * weights[row][keep]).sum(), alone)[0]
            torch.testing.assert_close(scores[row][keep], output.scores)
            torch.testing.assert_close(grad[row][keep], alone_grad, rtol=1e-4, atol=1e-6)
            assert torch.equal(indices[row], keep.nonzero()[:, 0][output.indices])


@every_method
def test_rows_do_not_influence_each_other(method):
    logits, k, mask, _ = make_rows(5, 64)
    output = soft_topk(logits, k, mask=mask, method=method, eps=0.2, num_selected=5)
    changed = logits.clone()
    changed[0] = torch.nan
    changed[1] = torch.inf
    changed[2] *= 100
    again = soft_topk(changed, k, mask=mask, method=method, eps=0.2, num_selected=5)
    for before, after in zip(output, again, strict=True):
        torch.testing.assert_close(before[3:], after[3:], rtol=1e-6, atol=1e-7)
    # Whatever stands in a row, its indices can be gathered with.
    assert (again.indices[:, 1:] > again.indices[:, :-1]).all() and again.indices.max() < 64


@every_method
@pytest.mark.parametrize("columns", [1, 3, 64, 65, 700])
def test_indices_are_the_largest_by_position(method, columns):
    logits = torch.randint(-3, 4, (5, columns)).float()  # full of ties
    logits[0] = 0
    logits[1, columns // 2 :] = -torch.inf
    logits[2] = torch.where(torch.rand(columns) > 0.5, 0.0, -0.0)
    mask = torch.rand(5, columns) > 0.3
    for keep in (None, mask):
        seen = logits if keep is None else logits.masked_fill(~keep, -torch.inf)
        for number in {0, 1, min(columns, 7), columns // 2, columns}:
            output = soft_topk(logits, 2, mask=keep, method=method, num_selected=number, n_iters=3)
            assert output.indices.dtype == torch.int64
            assert torch.equal(output.indices, largest_by_sorting(seen, number))
            ordered = soft_topk(
                logits, 2, mask=keep, method=method, num_selected=number, n_iters=3, sorted_by="logit"
            ).indices
            for row in range(5):
                expected = sorted(output.indices[row].tolist(), key=lambda i, row=row: (-seen[row, i].item(), i))
                assert ordered[row].tolist() == expected


def test_selection_is_by_logits_not_by_saturated_scores():
    logits = torch.arange(100.0).flip(0)
    output = soft_topk(logits, 10, eps=0.01)
    assert (output.scores[:9] == 1).all() and output.indices.tolist() == list(range(10))
    assert soft_topk(logits + 1e4, 10, eps=50.0, sorted_by="logit").indices.tolist() == list(range(10))


def test_number_of_indices():
    logits = torch.randn(2, 3, 8)
    assert isinstance(soft_topk(logits, 3), SoftTopkOutput)
    shapes = {
        (2, 3, 3): soft_topk(logits, 3).indices.shape,
        (2, 3, 8): soft_topk(logits, 11).indices.shape,
        (2, 3, 0): soft_topk(logits, 3.0).indices.shape,
        (2, 3, 5): soft_topk(logits, torch.full((2, 3), 2.5), num_selected=5).indices.shape,
        (2, 3, 1): soft_topk(logits, torch.tensor(2), num_selected=1).indices.shape,
    }
    assert all(expected == tuple(found) for expected, found in shapes.items())
    assert soft_topk(logits, 3).threshold.shape == (2, 3)


@every_method
def test_leading_dimensions_and_strides(method):
    wide = torch.randn(2, 40, 3, 4)
    k = torch.rand(2, 3, 4) * 10 + 1
    options = {"method": method, "eps": 0.3, "num_selected": 6}
    logits = wide.permute(0, 2, 3, 1)  # not contiguous
    output = soft_topk(logits, k, **options)
    for i, j, m in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        single = soft_topk(wide[i, :, j, m], k[i, j, m], **options)
        for whole, part in zip(output, single, strict=True):
            torch.testing.assert_close(whole[i, j, m], part, rtol=1e-5, atol=1e-6)
    expanded = torch.randn(40, requires_grad=True)
    scores = soft_topk(expanded.expand(3, 40), torch.tensor([2.0, 5.0, 9.0]), **options).scores
    assert torch.allclose(scores[1], soft_topk(expanded, 5, **options).scores, atol=1e-6)
    scores.square().sum().backward()
    assert expanded.grad.shape == (40,) and expanded.grad.any()
    steps = soft_topk(wide[..., ::2, ::3], 1, **options | {"num_selected": 1})
    assert steps.scores.shape == (2, 40, 2, 2)


def test_no_rows():
    output = soft_topk(torch.randn(0, 5), 2)
    assert output.scores.shape == (0, 5) and output.indices.shape == (0, 2) and output.threshold.shape == (0,)
    assert soft_topk(torch.randn(0, 5), 2, method="coordinate_descent").scores.shape == (0, 5)


@every_method
def test_nothing_unwritten(method, nan_poisoned):
    logits, k, mask, _ = make_rows(4, 90)
    leaf = logits.requires_grad_()
    output = soft_topk(leaf, k, mask=mask, method=method, num_selected=20)
    grad = torch.autograd.grad(output.scores.square().sum(), leaf)[0]
    assert torch.isfinite(output.scores).all() and torch.isfinite(grad).all()
    assert (output.indices[:, 1:] > output.indices[:, :-1]).all()
