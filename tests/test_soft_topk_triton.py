"""soft_topk's kernels against the definition: by the interpreter on rows of a few blocks, and compiled at full size.

Under the interpreter a row of more than 64 logits is long: it has a shortlist, up to five splits of several blocks
each, and a ragged end.

Run: pytest tests/test_soft_topk_triton.py
"""

import pytest
import torch
from kernel_device import DEVICE
from soft_topk_cases import assert_like_eager, gradients, largest_by_sorting, make_rows, name_of, reference


pytest.importorskip("triton")

from hf_efficient.kernels.soft_topk import soft_topk  # noqa: E402


SHORT, LONG = 50, 150
OPTIONS = [
    {"method": "exact", "eps": 0.05},
    {"method": "exact", "eps": 1.0},
    {"method": "coordinate_descent", "eps": 0.3, "n_iters": 4, "eps_init": 1.0, "eps_decay": 0.5},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=name_of)
every_method = pytest.mark.parametrize("options", OPTIONS[1:], ids=name_of)
short_and_long = pytest.mark.parametrize("columns", [SHORT, LONG], ids=["short", "long"])


def run(logits, k, *, mask=None, **options):
    """The kernels' output, on the CPU."""
    mask = None if mask is None else mask.to(DEVICE)
    k = k.to(DEVICE) if isinstance(k, torch.Tensor) else k
    return [t.cpu() for t in soft_topk(logits.to(DEVICE), k, mask=mask, backend="triton", **options)]


def compare(logits, k, mask, weights, options, num_selected):
    """Scores, gradients and indices within the budget."""
    actual = gradients(run, logits, k, weights, mask=mask, num_selected=num_selected, **options)
    assert_like_eager(actual, logits, k, weights, mask, **options)
    seen = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    indices = run(logits, k, mask=mask, num_selected=num_selected, **options)[1]
    assert torch.equal(indices, largest_by_sorting(seen, num_selected))


@every_option
@short_and_long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_within_budget(options, columns, dtype, masked, nan_poisoned):
    logits, k, mask, weights = make_rows(2, columns, dtype)
    compare(logits, k, mask if masked else None, weights, options, 7)


@every_method
@pytest.mark.parametrize("columns", [1, 2, 64, 65])
def test_lengths_around_a_limit(options, columns):
    logits, k, _, weights = make_rows(2, columns)
    compare(logits, k + 0.3 * (columns < 10), None, weights, options, min(columns, 3))


@short_and_long
def test_rows_with_nothing_to_solve(columns, nan_poisoned):
    """All scores 1, none, no logit at all; and gradients that are zero."""
    logits, k, mask, weights = make_rows(5, columns)
    mask[1, 7:] = mask[2] = False
    k = torch.tensor([columns + 5.0, 7.0, 3.0, 0.0, -1.0])
    actual = run(logits, k, mask=mask, num_selected=12)
    expected = mask.float()
    expected[3:] = 0
    assert torch.equal(actual[0], expected)
    assert torch.equal(actual[1], largest_by_sorting(logits.masked_fill(~mask, -torch.inf), 12))
    assert actual[2].tolist() == [-torch.inf] * 3 + [torch.inf] * 2
    _, grad, grad_k = gradients(run, logits, k, weights, mask=mask)
    assert not grad.any() and not grad_k.any()
    descent = gradients(run, logits, k, weights, mask=mask, method="coordinate_descent", n_iters=3)
    wanted = gradients(reference, logits, k, weights, mask=mask, method="coordinate_descent", n_iters=3)
    for found, expected in zip(descent, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@short_and_long
def test_masked_values_do_not_matter(columns):
    logits, k, mask, weights = make_rows(2, columns)
    k = k.clamp(max=columns / 3)
    expected = gradients(run, logits, k, weights, mask=mask)
    for poison in (torch.nan, -torch.inf):
        poisoned = torch.where(mask, logits, poison)
        for found, wanted in zip(gradients(run, poisoned, k, weights, mask=mask), expected, strict=True):
            assert torch.equal(found, wanted)
    for found, wanted in zip(gradients(run, poisoned, k, weights), expected, strict=True):
        assert torch.equal(found, wanted)  # minus infinity is a mask


@short_and_long
def test_ties_go_to_the_smaller_position(columns):
    logits = torch.randint(-1, 2, (4, columns)).float()
    logits[0] = 0
    logits[1] = torch.where(torch.rand(columns) > 0.5, 0.0, -0.0)
    logits[2, columns // 3 :] = -torch.inf
    for number in (1, columns // 2):
        assert torch.equal(run(logits, 2.0, num_selected=number)[1], largest_by_sorting(logits, number))


@pytest.mark.parametrize("kind", ["sample too low", "sample too high", "descending", "equal"])
def test_a_sample_that_misleads(kind):
    """Every second logit is in the sample of this length."""
    logits, k, _, weights = make_rows(2, LONG)
    if kind == "sample too low":
        logits[:, ::2] -= 9
    if kind == "sample too high":
        logits[:, ::2] += 9
    if kind == "descending":
        logits = logits.sort(-1, descending=True).values
    if kind == "equal":
        logits = torch.zeros_like(logits)
    compare(logits, torch.tensor([9.0, 97.5]), None, weights, OPTIONS[1], 30)


@short_and_long
def test_what_is_no_number_stays_in_its_row(columns):
    logits, _, _, _ = make_rows(3, columns)
    expected = run(logits, 5, num_selected=9)
    logits[1, 7] = torch.nan
    actual = run(logits, 5, num_selected=9)
    assert actual[0][1].isnan().all()
    for found, wanted in zip(actual, expected, strict=True):
        assert torch.equal(found[[0, 2]], wanted[[0, 2]])
    assert (actual[1][:, 1:] > actual[1][:, :-1]).all() and actual[1].max() < columns


def test_strides_and_leading_dimensions():
    wide = torch.randn(2, 70, 3)
    weights = torch.randn(2, 3, 70)
    logits = wide.permute(0, 2, 1)
    mask = (torch.rand(70, 2, 3) > 0.2).permute(1, 2, 0)
    k = torch.rand(2, 3) * 9 + 1
    actual = gradients(run, logits, k, weights, mask=mask)
    flat = [t.reshape(6, *t.shape[2:]) for t in (logits, k, weights, mask)]
    expected = gradients(reference, *flat[:3], mask=flat[3])
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-6)
    row = torch.randn(70)
    torch.testing.assert_close(run(row.expand(2, 70), torch.tensor([2.0, 9.0]))[0][1], run(row, 9.0)[0])


def test_runs_twice_to_the_bit():
    logits, k, mask, weights = make_rows(2, LONG)
    for options in OPTIONS[1:]:
        first, second = (gradients(run, logits, k, weights, mask=mask, **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows():
    for method in ("exact", "coordinate_descent"):
        leaf = torch.randn(0, 5, device=DEVICE, requires_grad=True)
        output = soft_topk(leaf, 2, method=method, backend="triton")
        assert output.scores.shape == (0, 5) and output.indices.shape == (0, 2)
        output.scores.sum().backward()
        assert leaf.grad.shape == (0, 5)


def test_double_precision_is_refused():
    with pytest.raises(RuntimeError, match="soft_topk has no kernel for float64"):
        soft_topk(torch.randn(2, 9, dtype=torch.float64), 3, backend="triton")


@pytest.mark.compiled
@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("columns", [1000, 4096, 16_384, 16_385, 100_003, 1_048_579])
def test_every_shipped_configuration(options, dtype, columns):
    logits, k, mask, weights = make_rows(3, columns, dtype)
    for keep in (None, mask):
        compare(logits, k, keep, weights, options, columns // 16)


@pytest.mark.compiled
def test_sums_to_k_in_single_precision():
    for columns in (4096, 131_073, 1_048_576):
        for eps in (0.02, 0.1, 1.0, 4.0):
            logits = torch.randn(2, columns, device=DEVICE)
            for k in (1, columns // 16, columns * 9 / 128, columns / 2, columns - 0.5):
                total = soft_topk(logits, k, eps=eps, num_selected=0, backend="triton").scores.double().sum(-1)
                assert ((total - k).abs() <= 1e-5 * k).all(), (columns, eps, k, total)


@every_method
@short_and_long
def test_operators_and_the_compiler(options, columns):
    """The operators keep their promises on this backend too, and a compiled call is one graph."""
    name = "soft_topk_exact" if options["method"] == "exact" else "soft_topk_descent"
    logits, k, mask, weights = make_rows(2, columns)
    setting = 0.3 if options["method"] == "exact" else [1.0, 0.5, 0.3]
    arguments = [t.to(DEVICE) for t in (logits.requires_grad_(), k.requires_grad_(), mask)]
    torch.library.opcheck(getattr(torch.ops.hf_efficient, name).default, (*arguments, setting, 5, "triton"))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    logits, k = logits.detach(), k.detach()
    found = gradients(compiled, logits, k, weights, mask=mask, num_selected=5, **options)
    for actual, expected in zip(found, gradients(run, logits, k, weights, mask=mask, **options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_more_rows_than_a_grid_has_in_its_second_dimension():
    logits = torch.randn(70_000, 33, device=DEVICE, requires_grad=True)
    output = soft_topk(logits, 4, backend="triton")
    output.scores.square().sum().backward()
    expected = soft_topk(logits[-5:].detach().cpu(), 4)
    torch.testing.assert_close(output.scores[-5:].cpu(), expected.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.indices[-5:].cpu(), expected.indices) and logits.grad[-5:].any()


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    rows, columns = 2100, 1_048_576
    logits = torch.randn(1, columns, dtype=torch.float16, device=DEVICE).expand(rows, columns).contiguous()
    logits.requires_grad_()
    output = soft_topk(logits, columns // 16, backend="triton")
    output.scores[-1].sum().backward()
    single = soft_topk(logits[:1].detach(), columns // 16, backend="triton")
    assert torch.equal(output.scores[-1], single.scores[0]) and torch.equal(output.indices[-1], single.indices[0])
    assert torch.isfinite(logits.grad[-1]).all() and not logits.grad[0].any()


@pytest.mark.gpu
def test_one_row_of_more_than_two_to_the_31_logits():
    columns = 2**31 + 7
    logits = torch.zeros(1, columns, dtype=torch.float16, device=DEVICE)
    logits[0, -3:] = 5
    output = soft_topk(logits, 3, eps=0.1, backend="triton")
    assert output.indices.tolist() == [[columns - 3, columns - 2, columns - 1]]
    assert (output.scores[0, -3:] > 0.99).all()
