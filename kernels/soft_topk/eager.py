"""Soft top-k for machines without a Triton path: one partition and a few passes over the row.

Exact: let p, the pivot, be the ⌈k⌉-th largest logit and `e_i = exp((s_i - p) / ε)`. With `τ = p + ε λ`, `λ ≥ 0`, the
scores are `min(1, z e_i)`, `z = exp(-λ)`, and their sum is concave and piecewise linear in z. Only the sorted largest
⌈k⌉ logits can saturate, so the sums over all unsaturated entries are one cumulative sum over these, added to the sum
over the others, and `z_j = (k - j) / Σ_{i≥j} e_i` is the solution for the first j with `z_j e_j ≤ 1`. The pair (p, λ)
says more than τ would: differences from p are exact, and λ is at most about the logarithm of the row's length.

On a processor most of this is done in numpy: a short row is a matter of microseconds, and each operator of torch takes
several of them.

Both gradients are implicit: nothing but logits and scalars is kept for them.
"""

import numpy as np
import torch

from .selection import as_tensor, in_blocks, in_library, library_for, on_host, select_by_position, split_largest


LARGEST_EXPONENT = 600.0  # a sum of so many powers of e as there can be entries is finite in double precision
SMALLEST = 1e-300


def exact_forward(
    logits: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, eps: float, num_selected: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `[R, N]` in the dtype of the logits, indices `[R, num_selected]`, pivot `[R]` and offset λ `[R]`.

    A row where all of the logits saturate has the lowest number for a pivot, a row where none scores the highest.
    """
    values = _masked_values(logits, mask)
    rows, columns = values.shape
    if rows == 0:
        empty = values.new_empty(0)
        return torch.empty_like(logits), select_by_position(values, num_selected), empty, empty.clone()
    k = np.minimum(k.numpy(force=True), columns, dtype=np.float64)
    # One more than saturate, to see whether there is anything besides them.
    needed = min(max(int(k.max()) + 1, num_selected, 1), columns)
    top, others = split_largest(values, needed)
    # While the logits are in the processor's cache.
    indices = select_by_position(values, num_selected, top[:, needed - num_selected :][:, :1])
    pivots, trivial = _pivots(top, k, columns)
    xp = library_for(values)
    values, others = in_library(xp, values.detach().contiguous(), others)
    pivot = _like(values, pivots)
    scores, rest = xp.empty_like(values), np.zeros(pivots.shape)
    with np.errstate(all="ignore"):  # rows without a solution
        for block, p, total in in_blocks(others, pivot, rest):
            block -= p
            block *= 1 / eps
            total += on_host(xp.exp(block, out=block).sum(-1, keepdims=True))
        offset = _like(values, _offsets(top, k, pivots, trivial, rest, eps))
        for block, p, shift, out in in_blocks(values, pivot, offset, scores):
            xp.subtract(block, p, out=out)
            out *= 1 / eps
            out -= shift
            xp.exp(xp.clip(out, None, 0, out=out), out=out)
    scores, pivot, offset = map(as_tensor, (scores, pivot[:, 0], offset[:, 0]))
    return scores.to(logits.dtype), indices, pivot, offset


def _pivots(top: np.ndarray, k: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the largest logits `[R, n]`, ascending, the pivots `[R, 1]`, and flags `[R]` where all or none score."""
    rows, last = np.arange(top.shape[0]), top.shape[1] - 1
    following = top[rows, np.minimum(last - k.astype(np.int64), last)]
    # The same one if there is a fraction, else the one before it.
    pivots = top[rows, np.minimum(last + 1 - np.ceil(k).astype(np.int64), last)]
    all_saturate, none_does = (k >= columns) | (following == -np.inf), k <= 0
    limit = np.finfo(top.dtype).max
    pivots[all_saturate] = -limit
    pivots[none_does] = limit
    return pivots[:, None], all_saturate | none_does


def _offsets(
    top: np.ndarray, k: np.ndarray, pivots: np.ndarray, trivial: np.ndarray, rest: np.ndarray, eps: float
) -> np.ndarray:
    """λ `[R, 1]`, of the largest logits `[R, n]`, ascending, and the sum over the others `[R, 1]`."""
    needed = top.shape[1]
    scaled = np.multiply(top - pivots, 1 / eps, dtype=np.float64)
    # Whatever is beyond this saturates: z is not so small.
    np.exp(np.minimum(scaled, LARGEST_EXPONENT, out=scaled), out=scaled)
    z = np.add.accumulate(scaled, axis=-1)
    z += rest
    # With all entries above it saturated, the j-th largest has z_j here; `z_j e_j ≤ 1` holds from some j on.
    np.divide(k[:, None] - np.arange(needed - 1, -1, -1), z, out=z)
    saturated = (scaled * z > 1).sum(axis=-1)
    solution = z[np.arange(top.shape[0]), np.maximum(needed - 1 - saturated, 0)]
    solution[trivial] = 1
    return -np.log(solution)[:, None].astype(top.dtype)


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
    values = _masked_values(logits, mask).detach().contiguous()
    grad = _masked_grad(grad, mask, pivot.dtype).contiguous()  # numpy adds up in the order of the memory
    xp, dtype = library_for(values), np.float64 if pivot.dtype == torch.float64 else np.float32
    values, grad, pivot, offset = in_library(xp, values, grad, pivot.unsqueeze(-1), offset.unsqueeze(-1))
    weights = xp.empty_like(values)
    total, dot = np.zeros(pivot.shape), np.zeros(pivot.shape)
    with np.errstate(all="ignore"):  # rows that hold what is not a number, or where all of it saturates
        for block, p, shift, g, y, y_sum, gy_sum in in_blocks(values, pivot, offset, grad, weights, total, dot):
            xp.subtract(block, p, out=y)
            y *= 1 / eps
            y -= shift
            xp.exp(xp.clip(y, None, 1, out=y), out=y)
            y *= y <= 1
            y_sum += on_host(y.sum(-1, keepdims=True))
            gy_sum += on_host((y * g).sum(-1, keepdims=True))
        # Both are sums over U: if it is empty, the mean is zero.
        mean = _like(values, (dot / (total + SMALLEST)).astype(dtype))
        for y, g, m in in_blocks(weights, grad, mean):
            difference = g - m
            difference *= 1 / eps
            y *= difference
    return as_tensor(weights), as_tensor(mean[:, 0])


def _like(values: torch.Tensor | np.ndarray, numbers: np.ndarray) -> torch.Tensor | np.ndarray:
    """Numbers of the host in the library, and on the device, of the values."""
    return torch.from_numpy(numbers).to(values.device) if torch.is_tensor(values) else numbers


def descent_forward(
    logits: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, temperatures: list[float], num_selected: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `[R, N]`, indices `[R, num_selected]`, and the row's dual after each iteration, `[R, T]` in float64.

    After iteration t the entry is `min(s_i, -a_t)`, so one number per row is all that an iteration hands on:
    `a_t = ε_t (log k - LSE_i(min(s_i, -a_{t-1}) / ε_t))`.
    """
    values = _masked_values(logits, mask)
    rows = values.shape[0]
    log_k = k[:, None].double().clamp(min=1e-20).log()
    maximum, count = values.new_full((rows, 1), -torch.inf), log_k.new_zeros(rows, 1)
    for block, highest, number in in_blocks(values, maximum, count):
        torch.maximum(highest, block.amax(-1, keepdim=True), out=highest)
        number += (block > -torch.inf).sum(-1, keepdim=True)
    maximum = maximum.masked_fill(count == 0, 0)
    duals = [temperatures[0] * (log_k - count.clamp(min=1).log())]
    scores = torch.empty_like(values)
    for temperature in temperatures[1:-1]:
        top = torch.minimum(maximum.double(), -duals[-1]).to(values.dtype)
        limit = ((-duals[-1] - top) / temperature).to(values.dtype)
        total = torch.zeros_like(log_k)
        for block, highest, ceiling, out, sums in in_blocks(values, top, limit, scores, total):
            torch.sub(block, highest, out=out).mul_(1 / temperature)
            torch.minimum(out, ceiling, out=out)
            sums += out.exp_().sum(-1, keepdim=True)
        duals.append(temperature * (log_k - total.log()) - top)
        duals[-1].masked_fill_(count == 0, 0)
    pivot, offset = _split(duals[-1], temperatures[-1], values.dtype)
    for block, p, shift, out in in_blocks(values, pivot, offset, scores):
        torch.sub(block, p, out=out).mul_(1 / temperatures[-1]).sub_(shift).clamp_(max=0).exp_()
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
    for block, p, shift, g, out, sums in in_blocks(values, pivot, offset, grad, grad_logits, arriving):
        torch.sub(block, p, out=out).mul_(1 / temperatures[-1]).sub_(shift)
        saturated = out > 0
        out.exp_().masked_fill_(saturated, 0).mul_(g).mul_(1 / temperatures[-1])
        sums += out.sum(-1, keepdim=True)
    for step in range(duals.shape[1] - 1, 0, -1):
        temperature = temperatures[step]
        grad_log_k += temperature * arriving
        pivot, offset = _split(duals[:, step : step + 1], temperature, dtype)
        limit = ((duals[:, step : step + 1] - duals[:, step - 1 : step]) / temperature).to(dtype)
        count, factor = torch.zeros_like(k), (arriving / k).to(dtype)
        for block, p, shift, ceiling, f, weight, out, number in in_blocks(
            values, pivot, offset, limit, factor, weights, grad_logits, count
        ):
            torch.sub(block, p, out=weight).mul_(1 / temperature).sub_(shift)
            saturated = weight > ceiling
            number += saturated.sum(-1, keepdim=True)
            out.sub_(weight.exp_().masked_fill_(saturated, 0).mul_(f))
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
