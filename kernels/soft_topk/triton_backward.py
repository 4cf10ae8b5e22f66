"""Triton kernels of the two backward passes: one pass over the row for sums, one that writes the gradient.

Only scalars per row come from the forward pass; scores and weights are computed again from the logits. The sums of the
splits are added in their order, so the result does not depend on how the programs run. In coordinate descent the
saturated entries of an iteration all have the same weight, hence it is their number that the first pass counts for
every iteration, and the recursion over the iterations runs on scalars, between the two passes.
"""

import torch
from torch import Tensor

from ..backend import device_guard
from .triton_select import Splits, load_values, stream_config, sum_of


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of soft_topk need Triton") from error


@triton.jit
def _load_grad(p_grad, p_mask, o_logit, m_logit, HAS_MASK: tl.constexpr):
    """The incoming gradient in float32, zero where the logit is masked, whatever stands there."""
    b_grad = tl.load(p_grad + o_logit, mask=m_logit, other=0).to(tl.float32)
    if HAS_MASK:
        b_grad = tl.where(tl.load(p_mask + o_logit, mask=m_logit, other=0) != 0, b_grad, 0.0)
    return b_grad


@triton.jit
def _exact_reduce_kernel(
    p_grad, p_logits, p_mask, p_pivot, p_offset, p_total, p_dot, n_logits, n_split, n_chunk, inv_eps,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a split: Σ y and Σ g y over its unsaturated entries."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_split = i_program // n_split, i_program % n_split
    o_row, o_chunk = i_row * n_logits, i_split * n_chunk
    n_here = tl.minimum(n_logits - o_chunk, n_chunk)
    pivot, offset = tl.load(p_pivot + i_row), tl.load(p_offset + i_row)
    b_total = tl.zeros([BLOCK], tl.float32)
    b_dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_here, BLOCK):
        o_block = start + tl.arange(0, BLOCK)  # [BLOCK]
        o_logit, m_block = o_row + o_chunk + o_block, o_block < n_here
        b_exponent = load_values(p_logits, p_mask, o_logit, m_block, HAS_MASK)
        b_exponent = (b_exponent - pivot) * inv_eps - offset
        b_score = tl.where(b_exponent > 0, 0.0, tl.exp(b_exponent))  # [BLOCK], 0 where saturated
        b_total += b_score
        b_dot += b_score * _load_grad(p_grad, p_mask, o_logit, m_block, HAS_MASK)
    tl.store(p_total + i_program, tl.sum(b_total, axis=0))
    tl.store(p_dot + i_program, tl.sum(b_dot, axis=0))


@triton.jit
def _exact_grad_kernel(
    p_grad, p_logits, p_mask, p_pivot, p_offset, p_total, p_dot, p_grad_logits, p_grad_k,
    n_logits, n_split, n_chunk, inv_eps, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a split: `y (g - ∂L/∂k) / ε` where unsaturated."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_split = i_program // n_split, i_program % n_split
    o_row, o_chunk = i_row * n_logits, i_split * n_chunk
    n_here = tl.minimum(n_logits - o_chunk, n_chunk)
    pivot, offset = tl.load(p_pivot + i_row), tl.load(p_offset + i_row)
    total = sum_of(p_total + i_row * n_split, n_split, 64)
    mean = (sum_of(p_dot + i_row * n_split, n_split, 64) / tl.where(total == 0, 1.0, total)).to(tl.float32)
    if i_split == 0:
        tl.store(p_grad_k + i_row, mean)
    for start in range(0, n_here, BLOCK):
        o_block = start + tl.arange(0, BLOCK)  # [BLOCK]
        o_logit, m_block = o_row + o_chunk + o_block, o_block < n_here
        b_exponent = load_values(p_logits, p_mask, o_logit, m_block, HAS_MASK)
        b_exponent = (b_exponent - pivot) * inv_eps - offset
        b_score = tl.where(b_exponent > 0, 0.0, tl.exp(b_exponent))  # [BLOCK]
        b_grad = b_score * (_load_grad(p_grad, p_mask, o_logit, m_block, HAS_MASK) - mean) * inv_eps
        tl.store(p_grad_logits + o_logit, b_grad, mask=m_block)


def exact_backward(
    grad: Tensor, logits: Tensor, mask: Tensor | None, pivot: Tensor, offset: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `eager.exact_backward`; the gradient of the logits in their dtype."""
    grad, logits, mask = (None if t is None else t.contiguous() for t in (grad, logits, mask))
    grad_logits, grad_k = torch.empty_like(logits), torch.empty_like(pivot)
    rows, columns = logits.shape
    if not rows:
        return grad_logits, grad_k
    splits, config = Splits.of(logits), stream_config(logits)
    total, dot = pivot.new_empty(2, rows, splits.number).unbind(0)
    masks, flags = logits if mask is None else mask.view(torch.uint8), {"HAS_MASK": mask is not None}
    grid = (rows * splits.number,)
    with device_guard(logits):
        _exact_reduce_kernel[grid](
            grad, logits, masks, pivot, offset, total, dot, columns, *splits, 1 / eps, **flags, **config.keywords()
        )
        _exact_grad_kernel[grid](
            grad, logits, masks, pivot, offset, total, dot, grad_logits, grad_k, columns, *splits, 1 / eps,
            **flags, **config.keywords(),
        )  # fmt: skip
    return grad_logits, grad_k


@triton.jit
def _shifted(b_value, dual, temperature):
    """`(s + a) / ε` in single precision, without the rounding error of the double a."""
    pivot = (-dual).to(tl.float32)
    return (b_value - pivot) * (1 / temperature).to(tl.float32) - ((-dual - pivot) / temperature).to(tl.float32)


@triton.jit(do_not_specialize=["n_steps"])
def _descent_reduce_kernel(
    p_grad, p_logits, p_mask, p_dual, p_temperature, p_arriving, p_saturated,
    n_logits, n_split, n_chunk, n_steps, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a split: the gradient that arrives at the last dual, and how many entries each dual saturates.

    `p_saturated` holds zeros.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_split = i_program // n_split, i_program % n_split
    o_row, o_chunk = i_row * n_logits, i_split * n_chunk
    n_here = tl.minimum(n_logits - o_chunk, n_chunk)
    last = tl.load(p_dual + i_row * n_steps + n_steps - 1)
    temperature = tl.load(p_temperature + n_steps)
    inv_temperature = (1 / temperature).to(tl.float32)
    b_arriving = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_here, BLOCK):
        o_block = start + tl.arange(0, BLOCK)  # [BLOCK]
        o_logit, m_block = o_row + o_chunk + o_block, o_block < n_here
        b_value = load_values(p_logits, p_mask, o_logit, m_block, HAS_MASK)
        b_exponent = _shifted(b_value, last, temperature)
        b_score = tl.where(b_exponent > 0, 0.0, tl.exp(b_exponent)) * inv_temperature
        b_arriving += b_score * _load_grad(p_grad, p_mask, o_logit, m_block, HAS_MASK)
        for i_step in range(n_steps - 1):
            dual = tl.load(p_dual + i_row * n_steps + i_step)
            count = tl.sum((_shifted(b_value, dual, dual * 0 + 1) > 0).to(tl.int32), axis=0)
            p_here = p_saturated + (i_row * n_steps + i_step) * n_split + i_split
            # Nobody else adds there; but a number that is loaded is loaded by every thread, and stored by one of them.
            tl.atomic_add(p_here, count, sem="relaxed")
    tl.store(p_arriving + i_program, tl.sum(b_arriving, axis=0))


@triton.jit(do_not_specialize=["n_steps"])
def _descent_recursion_kernel(
    p_k, p_dual, p_temperature, p_arriving, p_saturated, p_factor, p_grad_k, n_split, n_steps
):
    """One program a row: the gradient that arrives at each dual, over k, and the gradient of k."""
    i_row = tl.program_id(0).to(tl.int64)
    k = tl.maximum(tl.load(p_k + i_row).to(tl.float64), 1e-20)
    arriving = sum_of(p_arriving + i_row * n_split, n_split, 64)
    grad_log_k = arriving * 0
    for i_back in range(n_steps - 1):
        i_step = n_steps - 1 - i_back
        temperature = tl.load(p_temperature + i_step)
        grad_log_k += temperature * arriving
        tl.store(p_factor + i_row * n_steps + i_step, (arriving / k).to(tl.float32))
        change = tl.load(p_dual + i_row * n_steps + i_step) - tl.load(p_dual + i_row * n_steps + i_step - 1)
        saturated = sum_of(p_saturated + (i_row * n_steps + i_step - 1) * n_split, n_split, 64)
        arriving = arriving * saturated * tl.exp(change / temperature) / k
    grad_log_k += tl.load(p_temperature) * arriving
    tl.store(p_grad_k + i_row, tl.where(k > 1e-20, grad_log_k / k, 0.0).to(tl.float32))


@triton.jit(do_not_specialize=["n_steps"])
def _descent_grad_kernel(
    p_grad, p_logits, p_mask, p_dual, p_temperature, p_factor, p_grad_logits,
    n_logits, n_split, n_chunk, n_steps, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a split: what comes through the scores, less what each iteration takes where it did not saturate."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_split = i_program // n_split, i_program % n_split
    o_row, o_chunk = i_row * n_logits, i_split * n_chunk
    n_here = tl.minimum(n_logits - o_chunk, n_chunk)
    p_dual += i_row * n_steps
    p_factor += i_row * n_steps
    for start in range(0, n_here, BLOCK):
        o_block = start + tl.arange(0, BLOCK)  # [BLOCK]
        o_logit, m_block = o_row + o_chunk + o_block, o_block < n_here
        b_value = load_values(p_logits, p_mask, o_logit, m_block, HAS_MASK)
        temperature = tl.load(p_temperature + n_steps)
        b_exponent = _shifted(b_value, tl.load(p_dual + n_steps - 1), temperature)
        b_score = tl.where(b_exponent > 0, 0.0, tl.exp(b_exponent)) * (1 / temperature).to(tl.float32)
        b_grad = b_score * _load_grad(p_grad, p_mask, o_logit, m_block, HAS_MASK)  # [BLOCK]
        for i_back in range(n_steps - 1):
            i_step = n_steps - 1 - i_back
            temperature, dual = tl.load(p_temperature + i_step), tl.load(p_dual + i_step)
            limit = ((dual - tl.load(p_dual + i_step - 1)) / temperature).to(tl.float32)
            b_exponent = _shifted(b_value, dual, temperature)
            b_weight = tl.where(b_exponent > limit, 0.0, tl.exp(b_exponent))
            b_grad -= b_weight * tl.load(p_factor + i_step)
        tl.store(p_grad_logits + o_logit, b_grad, mask=m_block)


def descent_backward(
    grad: Tensor, logits: Tensor, k: Tensor, mask: Tensor | None, duals: Tensor, temperatures: list[float]
) -> tuple[Tensor, Tensor]:
    """As `eager.descent_backward`; the gradients in the dtypes of logits and k."""
    grad, logits, mask = (None if t is None else t.contiguous() for t in (grad, logits, mask))
    grad_logits, grad_k = torch.empty_like(logits), torch.empty_like(k)
    (rows, columns), steps = logits.shape, len(temperatures) - 1
    if not rows:
        return grad_logits, grad_k
    splits, config = Splits.of(logits), stream_config(logits)
    arriving = logits.new_empty(rows, splits.number, dtype=torch.float32)
    saturated = logits.new_zeros(rows, steps, splits.number, dtype=torch.int32)
    factor = logits.new_empty(rows, steps, dtype=torch.float32)
    schedule = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)
    masks, flags = logits if mask is None else mask.view(torch.uint8), {"HAS_MASK": mask is not None}
    grid, sizes = (rows * splits.number,), (columns, *splits, steps)
    with device_guard(logits):
        _descent_reduce_kernel[grid](
            grad, logits, masks, duals, schedule, arriving, saturated, *sizes, **flags, **config.keywords()
        )
        _descent_recursion_kernel[(rows,)](
            k, duals, schedule, arriving, saturated, factor, grad_k, splits.number, steps
        )
        _descent_grad_kernel[grid](
            grad, logits, masks, duals, schedule, factor, grad_logits, *sizes, **flags, **config.keywords()
        )
    return grad_logits, grad_k
