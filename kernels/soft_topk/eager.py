"""Soft top-k for machines without a Triton path: one top-k and a few passes over the row.

Exact: let p, the pivot, be the ⌈k⌉-th largest logit and `e_i = exp((s_i - p) / ε)`. With `τ = p + ε λ`, `λ ≥ 0`, the
scores are `min(1, z e_i)`, `z = exp(-λ)`, and their sum is concave and piecewise linear in z. Only the sorted largest
⌈k⌉ logits can saturate, so the sums over all unsaturated entries are one cumulative sum over these, added to the sum
over the others, and `z_j = (k - j) / Σ_{i≥j} e_i` is the solution for the first j with `z_j e_j ≤ 1`. The pair (p, λ)
says more than τ would: differences from p are exact, and λ is at most about the logarithm of the row's length.

Both gradients are implicit: nothing but logits and scalars is kept for them.
"""

import torch

from .selection import blocks_of, largest_values, select_by_position


def exact_forward(
    logits: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, eps: float, num_selected: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `[R, N]` in the dtype of the logits, indices `[R, num_selected]`, pivot `[R]` and offset λ `[R]`.

    A row where all of the logits saturate has the lowest number for a pivot, a row where none scores the highest.
    """
    values = _masked_values(logits, mask)
    rows, columns = values.shape
    limit = torch.finfo(values.dtype).max
    if rows == 0:
        empty = values.new_empty(0)
        return torch.empty_like(logits), select_by_position(values, num_selected), empty, empty.clone()
    k = k[:, None].double()
    # One more than saturate, to see whether there is anything besides them.
    needed = min(max(int(k.max().item()) + 1, num_selected, 1), columns)
    best = largest_values(values, needed)
    whole, ceiling = k.floor(), k.ceil()
    pivot = best.values.gather(-1, (ceiling - 1).clamp_(0, needed - 1).long())
    following = best.values.gather(-1, whole.clamp(0, needed - 1).long())
    all_saturate, none_does = (k >= columns).logical_or_(following == -torch.inf), k <= 0
    pivot.masked_fill_(all_saturate, -limit).masked_fill_(none_does, limit)

    scores, rest = torch.empty_like(values), torch.zeros_like(k)
    for row, column in blocks_of(values):
        block = torch.sub(values[row, column], pivot[row], out=scores[row, column])
        block.mul_(1 / eps).exp_()
    scores.scatter_(-1, best.positions, 0)
    for row, column in blocks_of(values):
        rest[row] += scores[row, column].sum(-1, keepdim=True)

    # Larger ones than 1/z are never unsaturated, and z is not smaller than this.
    smallest = (k - ceiling).add_(1).div_(columns)
    scaled = best.values.sub(pivot).mul_(1 / eps).double().clamp_(max=1 - smallest.log_()).exp_()
    sums = scaled.flip(-1).cumsum(-1).flip(-1).add_(rest)
    z = torch.sub(k, torch.arange(needed, dtype=k.dtype, device=k.device)).div_(sums)
    solution = z.gather(-1, (z * scaled <= 1).byte().argmax(-1, keepdim=True))
    solution.masked_fill_(all_saturate.logical_or_(none_does), 1)
    offset = solution.log().neg_()[:, 0].to(values.dtype)
    single = solution.to(values.dtype)

    for row, column in blocks_of(values):
        scores[row, column].mul_(single[row])
    scores.scatter_(-1, best.positions, scaled.mul_(solution).clamp_(max=1).to(values.dtype))
    indices = select_by_position(values, num_selected, best)
    return scores.to(logits.dtype), indices, pivot[:, 0].contiguous(), offset


def exact_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    mask: torch.Tensor | None,
    pivot: torch.Tensor,
    offset: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients `[R, N]` of the logits and `[R]` of k, in the computation's dtype.

    With U the unsaturated entries, `∂L/∂k = Σ_U g y / Σ_U y` and `∂L/∂s_i = y_i (g_i - ∂L/∂k) / ε` for i in U.
    """
    values, grad = _masked_values(logits, mask), _masked_grad(grad, mask, pivot.dtype)
    weights, pivot, offset = torch.empty_like(values), pivot[:, None], offset[:, None]
    total, dot = pivot.new_zeros(2, *pivot.shape, dtype=torch.float64)
    above_one = -1 - torch.finfo(values.dtype).eps
    for row, column in blocks_of(values):
        block = torch.sub(values[row, column], pivot[row], out=weights[row, column])
        block.mul_(1 / eps).sub_(offset[row])
        # -y where y ≤ 1, and 0 above: three times as fast as a mask.
        torch.threshold_(block.exp_().neg_(), above_one, 0)
        total[row] += block.sum(-1, keepdim=True)
        dot[row] += torch.linalg.vecdot(block, grad[row, column]).unsqueeze(-1)
    mean = (dot / total.masked_fill(total == 0, 1)).to(values.dtype)
    for row, column in blocks_of(values):
        weights[row, column].mul_(torch.sub(mean[row], grad[row, column]).mul_(1 / eps))
    return weights, mean[:, 0].contiguous()


def descent_forward(
    logits: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, temperatures: list[float], num_selected: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `[R, N]`, indices `[R, num_selected]`, and the row's dual after each iteration, `[R, T]` in float64.

    After iteration t the entry is `min(s_i, -a_t)`, so one number per row is all that an iteration hands on:
    `a_t = ε_t (log k - LSE_i(min(s_i, -a_{t-1}) / ε_t))`.
    """
    values = _masked_values(logits, mask)
    rows, columns = values.shape
    log_k = k[:, None].double().clamp(min=1e-20).log()
    maximum, count = values.new_full((rows, 1), -torch.inf), log_k.new_zeros(rows, 1)
    for row, column in blocks_of(values):
        block = values[row, column]
        maximum[row] = torch.maximum(maximum[row], block.amax(-1, keepdim=True))
        count[row] += (block > -torch.inf).sum(-1, keepdim=True)
    maximum = maximum.masked_fill(count == 0, 0)
    duals = [temperatures[0] * (log_k - count.clamp(min=1).log())]
    scores = torch.empty_like(values)
    for temperature in temperatures[1:-1]:
        top = torch.minimum(maximum.double(), -duals[-1]).to(values.dtype)
        limit = ((-duals[-1] - top) / temperature).to(values.dtype)
        total = torch.zeros_like(log_k)
        for row, column in blocks_of(values):
            block = torch.sub(values[row, column], top[row], out=scores[row, column])
            block.mul_(1 / temperature)
            torch.minimum(block, limit[row], out=block)
            total[row] += block.exp_().sum(-1, keepdim=True)
        duals.append(temperature * (log_k - total.log()) - top)
        duals[-1].masked_fill_(count == 0, 0)
    pivot, offset = _split(duals[-1], temperatures[-1], values.dtype)
    for row, column in blocks_of(values):
        block = torch.sub(values[row, column], pivot[row], out=scores[row, column])
        block.mul_(1 / temperatures[-1]).sub_(offset[row]).clamp_(max=0).exp_()
    return scores.to(logits.dtype), select_by_position(values, num_selected), torch.cat(duals, dim=-1)


def descent_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    duals: torch.Tensor,
    temperatures: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients `[R, N]` of the logits and `[R]` of k, in the computation's dtype.

    The softmax weights of iteration t are `p_i = exp(min(s_i + a_t, a_t - a_{t-1}) / ε_t) / k`, without a sum; the
    saturated ones are all the same, so only their number enters the gradient of a_{t-1}. `arriving` is ∂L/∂a_t.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    values, grad = _masked_values(logits, mask), _masked_grad(grad, mask, dtype)
    k = k[:, None].double().clamp(min=1e-20)
    grad_logits, weights = torch.empty_like(values), torch.empty_like(values)
    arriving, grad_log_k = torch.zeros_like(k), torch.zeros_like(k)
    pivot, offset = _split(duals[:, -1:], temperatures[-1], dtype)
    for row, column in blocks_of(values):
        block = torch.sub(values[row, column], pivot[row], out=grad_logits[row, column])
        block.mul_(1 / temperatures[-1]).sub_(offset[row])
        saturated = block > 0
        block.exp_().masked_fill_(saturated, 0).mul_(grad[row, column]).mul_(1 / temperatures[-1])
        arriving[row] += block.sum(-1, keepdim=True)
    for step in range(duals.shape[1] - 1, 0, -1):
        temperature = temperatures[step]
        grad_log_k += temperature * arriving
        pivot, offset = _split(duals[:, step : step + 1], temperature, dtype)
        limit = ((duals[:, step : step + 1] - duals[:, step - 1 : step]) / temperature).to(dtype)
        count, factor = torch.zeros_like(k), (arriving / k).to(dtype)
        for row, column in blocks_of(values):
            block = torch.sub(values[row, column], pivot[row], out=weights[row, column])
            block.mul_(1 / temperature).sub_(offset[row])
            saturated = block > limit[row]
            count[row] += saturated.sum(-1, keepdim=True)
            block.exp_().masked_fill_(saturated, 0).mul_(factor[row])
            grad_logits[row, column].sub_(block)
        arriving = arriving * count * limit.double().exp() / k
    grad_log_k += temperatures[0] * arriving
    grad_k = torch.where(k > 1e-20, grad_log_k / k, 0)
    return grad_logits, grad_k[:, 0].to(dtype)


def _split(dual: torch.Tensor, temperature: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`(s + a) / ε = (s - pivot) / ε - offset`, without the rounding error of a."""
    pivot = (-dual).to(dtype)
    return pivot, ((-dual - pivot) / temperature).to(dtype)


def _masked_values(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return values if mask is None else values.masked_fill(~mask, -torch.inf)


def _masked_grad(grad: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    grad = grad.to(dtype)
    return grad if mask is None else grad.masked_fill(~mask, 0)
