"""What the soft_topk tests share: the equation and the iteration written once more, naively, and their inputs."""

import torch
from helpers import assert_within_budget

from hf_efficient.kernels.soft_topk.reference import soft_topk_descent_reference, soft_topk_exact_reference


METHODS = ("exact", "coordinate_descent")
# The temperatures of the paper, of CoLT5-attention's router, of its `topk`, and the ends of the promised range.
EPSILONS = (0.02, 0.1, 0.3, 1.0, 4.0)


def solved_by_bisection(logits, k, mask, eps):
    """Scores of the equation Σ min(1, exp((s - τ) / ε)) = k, its root found by halving; float64 `[R, N]`, k `[R]`."""
    logits = logits.double()
    keep = logits > -torch.inf
    keep = keep if mask is None else keep & mask
    scores = torch.zeros_like(logits)
    for row in range(logits.shape[0]):
        s, target = logits[row][keep[row]], float(k[row])
        if target <= 0 or s.numel() == 0:
            continue
        if s.numel() <= target:
            scores[row, keep[row]] = 1
            continue
        low, high = s.min() - 1, s.max() + eps * torch.log(torch.tensor(2 * s.numel() / target))
        for _ in range(200):
            middle = (low + high) / 2
            if torch.exp(((s - middle) / eps).clamp(max=0)).sum() > target:
                low = middle
            else:
                high = middle
        scores[row, keep[row]] = torch.exp(((s - high) / eps).clamp(max=0))
    return scores


def descended(logits, k, eps, iterations):
    """Scores after the paper's iterations at one temperature, unmasked, as one would first write them down."""
    correction = -logits
    for _ in range(iterations):
        dual = eps * (torch.log(k)[:, None] - torch.logsumexp((logits + correction) / eps, -1, keepdim=True))
        correction = -torch.relu(logits + dual)
    return torch.exp((logits + dual + correction) / eps)


def largest_by_sorting(logits, number):
    """Ascending positions of the largest, ties to the smaller position, by a stable sort in Python."""
    rows = []
    for row in logits.tolist():
        order = sorted(range(len(row)), key=lambda position: (-row[position], position))
        rows.append(sorted(order[:number]))
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), number)


def temperatures(n_iters, eps, eps_init=None, eps_decay=1.0):
    """One for each iteration and one for the scores."""
    found = [max(eps_init or eps, eps)]
    for _ in range(n_iters):
        found.append(max(found[-1] * eps_decay, eps))
    return found


def reference(logits, k, *, method="exact", mask=None, eps=1.0, num_selected=0, n_iters=50, **schedule):
    """The differentiable definition of `method` with the arguments of `soft_topk`; logits `[R, N]`, k `[R]`."""
    if method == "exact":
        return soft_topk_exact_reference(logits, k, mask, eps, num_selected)
    steps = temperatures(n_iters, eps, **schedule)
    return soft_topk_descent_reference(logits, k, mask, steps, num_selected)


def gradients(function, logits, k, weights, **options):
    """Scores, and the gradients of their weighted sum in logits and k."""
    logits, k = logits.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    scores = function(logits, k, **options)[0]
    grads = torch.autograd.grad((scores * weights.to(scores.dtype)).sum(), (logits, k))
    return scores.detach(), *grads


def assert_like_eager(actual, logits, k, weights, mask=None, **options):
    """Scores and gradients within the budget of the least accurate of several plain computations in the same dtype,
    which differ in the order of their sums: one alone may be lucky in its rounding."""
    oracle = gradients(reference, logits.double(), k.double(), weights, mask=mask, **options)
    eagers = []
    for _ in range(4):
        order = torch.randperm(logits.shape[1])
        shuffled = None if mask is None else mask[:, order]
        scores, grad, grad_k = gradients(reference, logits[:, order], k, weights[:, order], mask=shuffled, **options)
        back = order.argsort()
        eagers.append((scores[:, back], grad[:, back], grad_k))
    for name, found, exact, *plain in zip(("scores", "logits", "k"), actual, oracle, *eagers, strict=True):
        assert_within_budget(found, exact, max(plain, key=lambda t, e=exact: (t.double() - e).abs().max()), name)


def make_rows(rows, columns, dtype=torch.float32, spread=1.0):
    """Logits `[R, N]`, k `[R]` between 1 and N (whole and broken numbers), a mask, and weights for a loss."""
    logits = (spread * torch.randn(rows, columns)).to(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    k = (torch.rand(rows) * 0.6 + 0.02).mul(columns).clamp(min=1)
    k[::2] = k[::2].round()
    return logits, k.to(compute), torch.rand(rows, columns) > 0.2, torch.randn(rows, columns)


def many_methods(eps):
    """Keyword arguments that cover both methods at this temperature."""
    yield {"method": "exact", "eps": eps}
    yield {"method": "coordinate_descent", "eps": eps, "n_iters": 20}
    yield {"method": "coordinate_descent", "eps": eps, "n_iters": 20, "eps_init": 4.0, "eps_decay": 0.7}


ALL_OPTIONS = [options for eps in (0.05, 0.4, 2.0) for options in many_methods(eps)]


def name_of(options):
    decay = "-decay" if "eps_decay" in options else ""
    return f"{options['method'].partition('_')[0]}{decay}-{options['eps']}"
