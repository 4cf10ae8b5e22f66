"""Triton kernels that write scores and indices, and those that run the iterations of coordinate descent.

An iteration hands on one scalar per row, so each is one pass over the row by as many programs as it is split into;
every program adds up the sums of the pass before for itself, in the order of the splits. Rows that are not split run
all iterations in one launch.
"""

import torch
from torch import Tensor

from ..backend import device_guard
from .triton_select import Selection, Splits, load_values, solve, stream_config, sum_of


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of soft_topk need Triton") from error


@triton.jit
def _emit_kernel(
    p_logits, p_mask, p_pivot, p_offset, p_last, p_ties, p_first, p_ties_before, p_scores, p_indices,
    n_logits, n_split, n_chunk, num_selected, inv_eps,
    HAS_MASK: tl.constexpr, SELECT: tl.constexpr, IS_SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a split: scores `exp(min((s - pivot) / ε - offset, 0))`, and the positions that are selected."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_split = i_program // n_split, i_program % n_split
    o_row, o_chunk = i_row * n_logits, i_split * n_chunk
    n_here = tl.minimum(n_logits - o_chunk, n_chunk)
    pivot, offset = tl.load(p_pivot + i_row), tl.load(p_offset + i_row)
    selected, tied = i_row * 0, i_row * 0
    if SELECT:
        last, ties = tl.load(p_last + i_row), tl.load(p_ties + i_row)
        if IS_SPLIT:
            selected, tied = tl.load(p_first + i_program), tl.load(p_ties_before + i_program)
    for start in range(0, n_here, BLOCK):
        o_block = start + tl.arange(0, BLOCK)  # [BLOCK]
        m_block = o_block < n_here
        b_value = load_values(p_logits, p_mask, o_row + o_chunk + o_block, m_block, HAS_MASK)  # [BLOCK]
        b_exponent = (b_value - pivot) * inv_eps - offset
        b_score = tl.exp(tl.where(b_exponent > 0, 0.0, b_exponent))  # unlike a minimum, it hands on what is no number
        tl.store(p_scores + o_row + o_chunk + o_block, b_score, mask=m_block)
        if SELECT:
            b_value = tl.where(b_value == b_value, b_value, float("-inf"))
            b_equal = ((b_value == last) & m_block).to(tl.int32)
            m_selected = (b_value > last) | ((b_equal > 0) & (tied + tl.cumsum(b_equal, 0) <= ties))
            o_selected = selected + tl.cumsum(m_selected.to(tl.int32), 0) - 1  # [BLOCK]
            tl.store(p_indices + i_row * num_selected + o_selected, o_chunk + o_block, mask=m_selected)
            selected += tl.sum(m_selected.to(tl.int32), axis=0)
            tied += tl.sum(b_equal, axis=0)


def _emit(
    logits: Tensor, mask: Tensor | None, pivot: Tensor, offset: Tensor, eps: float, num_selected: int,
    selection: Selection | None, scores: Tensor,
) -> Tensor:  # fmt: skip
    """Fills the scores, returns the indices."""
    rows, columns = logits.shape
    splits = Splits.of(logits)
    indices = torch.empty(rows, num_selected, dtype=torch.int64, device=logits.device)
    unused = Selection(pivot, pivot, None, None) if selection is None else selection
    within = [indices if part is None else part for part in unused[2:]]
    with device_guard(logits):
        _emit_kernel[(rows * splits.number,)](
            logits, logits if mask is None else mask.view(torch.uint8), pivot, offset, *unused[:2], *within,
            scores, indices, columns, *splits, num_selected, 1 / eps,
            HAS_MASK=mask is not None, SELECT=num_selected > 0, IS_SPLIT=splits.number > 1,
            **stream_config(logits).keywords(),
        )  # fmt: skip
    return indices


def exact_forward(
    logits: Tensor, k: Tensor, mask: Tensor | None, eps: float, num_selected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eager.exact_forward`: scores, indices, pivot and offset."""
    logits, mask = logits.contiguous(), None if mask is None else mask.contiguous()
    scores = torch.empty_like(logits)
    if not logits.shape[0]:
        pivot, offset = (logits.new_empty(0, dtype=torch.float32) for _ in range(2))
        return scores, torch.empty(0, num_selected, dtype=torch.int64, device=logits.device), pivot, offset
    pivot, offset, selection = solve(logits, k, mask, eps, num_selected, scores)
    return scores, _emit(logits, mask, pivot, offset, eps, num_selected, selection, scores), pivot, offset


@triton.jit
def _statistics_kernel(
    p_logits, p_mask, p_maximum, p_count, n_logits, n_split, n_chunk, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a split: its largest logit, and how many of them count."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_split = i_program // n_split, i_program % n_split
    o_row, o_chunk = i_row * n_logits, i_split * n_chunk
    n_here = tl.minimum(n_logits - o_chunk, n_chunk)
    b_maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    b_count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_here, BLOCK):
        o_block = start + tl.arange(0, BLOCK)  # [BLOCK]
        b_value = load_values(p_logits, p_mask, o_row + o_chunk + o_block, o_block < n_here, HAS_MASK)
        b_maximum = tl.maximum(b_maximum, b_value)
        b_count += (b_value != float("-inf")).to(tl.int32)
    tl.store(p_maximum + i_program, tl.max(b_maximum, axis=0))
    tl.store(p_count + i_program, tl.sum(b_count, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["first_step", "last_step", "n_steps"])
def _descent_kernel(
    p_logits, p_mask, p_k, p_temperature, p_maximum, p_read, p_write, p_dual, p_pivot, p_offset,
    n_logits, n_split, n_chunk, first_step, last_step, n_steps,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a split: iterations `first_step` to `last_step` (without), each of which ends with the sum over the
    split that the next one begins with. Step 0 begins with the number of logits."""
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_split = i_program // n_split, i_program % n_split
    o_row, o_chunk = i_row * n_logits, i_split * n_chunk
    n_here = tl.minimum(n_logits - o_chunk, n_chunk)
    log_k = tl.log(tl.maximum(tl.load(p_k + i_row).to(tl.float64), 1e-20))
    maximum = tl.load(p_maximum + i_row * n_split)
    for i_other in range(n_split):
        maximum = tl.maximum(maximum, tl.load(p_maximum + i_row * n_split + i_other))
    is_empty = maximum == float("-inf")
    maximum = tl.where(is_empty, 0.0, maximum)
    total = sum_of(p_read + i_row * n_split, n_split, 64)
    top = log_k * 0
    if first_step > 0:
        top = tl.minimum(maximum.to(tl.float64), -tl.load(p_dual + i_row * n_steps + first_step - 1))
    for i_step in range(first_step, last_step):
        temperature = tl.load(p_temperature + i_step)
        log_total = tl.log(tl.where(total == 0, 1.0, total))
        dual = temperature * (log_k - log_total) - top.to(tl.float32).to(tl.float64)
        dual = tl.where(is_empty, 0.0, dual)
        if i_split == 0:
            tl.store(p_dual + i_row * n_steps + i_step, dual)
        temperature = tl.load(p_temperature + i_step + 1)
        if i_step + 1 < n_steps:
            top = tl.minimum(maximum.to(tl.float64), -dual)
            shift = top.to(tl.float32)
            limit = ((-dual - shift) / temperature).to(tl.float32)
            inv_temperature = (1 / temperature).to(tl.float32)
            b_sum = tl.zeros([BLOCK], tl.float32)
            for start in range(0, n_here, BLOCK):
                o_block = start + tl.arange(0, BLOCK)  # [BLOCK]
                b_value = load_values(p_logits, p_mask, o_row + o_chunk + o_block, o_block < n_here, HAS_MASK)
                b_exponent = (b_value - shift) * inv_temperature
                b_sum += tl.exp(tl.where(b_exponent > limit, limit, b_exponent))
            total = tl.sum(b_sum, axis=0).to(tl.float64)
            tl.store(p_write + i_program, total.to(tl.float32))
        elif i_split == 0:
            pivot = (-dual).to(tl.float32)
            tl.store(p_pivot + i_row, pivot)
            tl.store(p_offset + i_row, ((-dual - pivot) / temperature).to(tl.float32))


def descent_forward(
    logits: Tensor, k: Tensor, mask: Tensor | None, temperatures: list[float], num_selected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `eager.descent_forward`: scores, indices and duals."""
    logits, mask = logits.contiguous(), None if mask is None else mask.contiguous()
    (rows, columns), steps = logits.shape, len(temperatures) - 1
    scores, duals = torch.empty_like(logits), logits.new_empty(rows, steps, dtype=torch.float64)
    if not rows:
        return scores, torch.empty(0, num_selected, dtype=torch.int64, device=logits.device), duals
    splits, config = Splits.of(logits), stream_config(logits)
    selection = solve(logits, k, mask, None, num_selected, scores)[2] if num_selected else None
    masks, flags = logits if mask is None else mask.view(torch.uint8), {"HAS_MASK": mask is not None}
    parts = logits.new_empty(3, rows, splits.number, dtype=torch.float32)
    pivot, offset = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    schedule = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)
    with device_guard(logits):
        _statistics_kernel[(rows * splits.number,)](
            logits, masks, parts[2], parts[0], columns, *splits, **flags, **config.keywords()
        )
        for first in range(steps) if splits.number > 1 else [0]:
            last = first + 1 if splits.number > 1 else steps
            _descent_kernel[(rows * splits.number,)](
                logits, masks, k, schedule, parts[2], parts[first % 2], parts[1 - first % 2], duals, pivot, offset,
                columns, *splits, first, last, steps, **flags, **config.keywords(),
            )  # fmt: skip
    return scores, _emit(logits, mask, pivot, offset, temperatures[-1], num_selected, selection, scores), duals
