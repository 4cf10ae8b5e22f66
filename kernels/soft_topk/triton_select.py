"""Triton kernels that find the scalars of a row: the num_selected-th logit, the pivot, and the offset from it.

A row that is too long for one program is read once, by many: what is not below a bound goes onto a shortlist, the rest
into a sum of exponentials. The bound comes from a sample of the row, four standard deviations on the safe side; should
the sample mislead, a second pass puts the whole row onto the list. One program for each row then walks over the list:
four times for the n-th largest value (8 bits of it at a time, by a histogram), and a few times for the root of a
concave piecewise linear function by Newton's method, which comes from below and never overshoots (see eager.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import device_guard, gpu_architecture
from ..launch_config import choose_config
from .launch_table import MOST_SPLITS, SAMPLE, SHORT_ROW, SOLVE, STREAM


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of soft_topk need Triton") from error


class Splits(NamedTuple):
    """How many programs read a row, and how many of its logits each."""

    number: int
    size: int

    @classmethod
    def of(cls, logits: Tensor) -> "Splits":
        columns = logits.shape[1]
        if columns <= SHORT_ROW[gpu_architecture()]:
            return cls(1, columns)
        block = stream_config(logits).blocks["BLOCK"]
        number = min(triton.cdiv(columns, block), MOST_SPLITS[gpu_architecture()])
        size = triton.cdiv(triton.cdiv(columns, number), block) * block
        return cls(triton.cdiv(columns, size), size)


class Selection(NamedTuple):
    """For each row: the smallest value that is selected, how many equal to it are, and, if the row is split, for each
    split how many are selected and tied before it."""

    last: Tensor
    ties: Tensor
    first: Tensor | None
    ties_before: Tensor | None


def stream_config(logits: Tensor):
    return choose_config(STREAM, 8 * logits.element_size(), logits.shape[1])


@triton.jit
def load_values(p_logits, p_mask, o_logit, m_logit, HAS_MASK: tl.constexpr):
    """Logits in float32; −inf where they are masked or out of the row."""
    b_value = tl.load(p_logits + o_logit, mask=m_logit, other=float("-inf")).to(tl.float32)
    if HAS_MASK:
        b_keep = tl.load(p_mask + o_logit, mask=m_logit, other=0)
        b_value = tl.where(b_keep != 0, b_value, float("-inf"))
    return b_value


@triton.jit
def _key(b_value):
    """uint32 in the order of the values; both zeros are equal, and what is not a number is lowest."""
    b_value = tl.where(b_value == b_value, b_value, float("-inf"))
    b_bits = tl.where(b_value == 0, 0.0, b_value).to(tl.uint32, bitcast=True)
    return tl.where(b_bits >= 0x80000000, b_bits ^ 0xFFFFFFFF, b_bits | 0x80000000)


@triton.jit
def _needed(k, num_selected, n_logits):
    """How many of the largest have to be known: one more than can saturate, to see whether there is another."""
    return tl.minimum(tl.maximum(tl.floor(k).to(tl.int64) + 1, num_selected), n_logits)


@triton.jit
def _load_k(p_k, i_row, n_logits):
    return tl.minimum(tl.maximum(tl.load(p_k + i_row).to(tl.float32), 0.0), n_logits * 1.0)


@triton.jit
def _load_segments(
    p_values, p_mask, p_count, i_first, start, n_split, n_chunk, stride,
    HAS_MASK: tl.constexpr, FILTERED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """BLOCK values: WIDTH columns from `start` on of the BLOCK / WIDTH segments from `i_first` on."""
    i_lane = tl.arange(0, BLOCK)  # [BLOCK]
    i_segment = i_first + i_lane // WIDTH  # [BLOCK]
    o_column = start + i_lane % WIDTH  # [BLOCK]
    if FILTERED:
        b_count = tl.load(p_count + i_segment, mask=i_segment < n_split, other=0)  # [BLOCK]
    else:
        b_count = tl.where(i_segment < n_split, n_chunk, 0)  # [BLOCK]
    o_value = (i_segment.to(tl.int64) * n_chunk + o_column) * stride  # [BLOCK]
    m_value = o_column < b_count
    return load_values(p_values, p_mask, o_value, m_value, HAS_MASK), m_value


@triton.jit
def _longest(p_count, i_first, n_split, n_chunk, FILTERED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The length of the longest of the BLOCK / WIDTH segments from `i_first` on."""
    if FILTERED:
        i_segment = i_first + tl.arange(0, BLOCK // WIDTH)  # [BLOCK / WIDTH]
        return tl.max(tl.load(p_count + i_segment, mask=i_segment < n_split, other=0), axis=0)
    else:
        return n_chunk


@triton.jit
def _nth_largest(
    p_values, p_mask, p_count, n_split, n_chunk, stride, rank,
    HAS_MASK: tl.constexpr, FILTERED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The value of this rank (from 1), and how many equal to it are among the `rank` largest."""
    i_bin = tl.arange(0, 256)  # [256]
    prefix = rank.to(tl.uint32) * 0
    remaining = rank.to(tl.int32)
    for i_digit in range(4):
        shift = 24 - 8 * i_digit
        b_histogram = tl.zeros([256], tl.int32)
        for i_first in range(0, n_split, BLOCK // WIDTH):
            longest = _longest(p_count, i_first, n_split, n_chunk, FILTERED, BLOCK, WIDTH)
            for start in range(0, longest, WIDTH):
                b_value, m_value = _load_segments(
                    p_values, p_mask, p_count, i_first, start, n_split, n_chunk, stride,
                    HAS_MASK, FILTERED, BLOCK, WIDTH,
                )  # fmt: skip
                b_digits = _key(b_value) >> shift  # [BLOCK]
                m_digit = m_value & ((b_digits >> 8) == prefix)
                b_histogram += tl.histogram((b_digits & 255).to(tl.int32), 256, mask=m_digit)
        b_from = tl.cumsum(b_histogram, 0, reverse=True)  # [256], how many have this digit or a larger one
        digit = tl.max(tl.where(b_from >= remaining, i_bin, 0), axis=0)
        remaining -= tl.sum(tl.where(i_bin > digit, b_histogram, 0), axis=0)
        prefix = (prefix << 8) | digit.to(tl.uint32)
    bits = tl.where(prefix >= 0x80000000, prefix ^ 0x80000000, prefix ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True), remaining


@triton.jit
def sum_of(p_part, n_split, BLOCK: tl.constexpr):
    """The sum over the splits, in their order whatever the machine, in double precision."""
    b_sum = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n_split, BLOCK):
        i_split = start + tl.arange(0, BLOCK)  # [BLOCK]
        b_sum += tl.load(p_part + i_split, mask=i_split < n_split, other=0).to(tl.float64)
    return tl.sum(b_sum, axis=0)


@triton.jit
def _bound_kernel(
    p_logits, p_mask, p_k, p_bound, n_logits, n_sample, stride, num_selected,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a row: a value that hopefully few more than the needed ones reach."""
    i_row = tl.program_id(0).to(tl.int64)
    o_row = i_row * n_logits
    k = _load_k(p_k, i_row, n_logits)
    share = _needed(k, num_selected, n_logits).to(tl.float32) / n_logits * 1.0
    deviation = tl.sqrt(n_sample * share * tl.maximum(1 - share, 0.0))
    rank = (n_sample * share + 4 * deviation + 2).to(tl.int32)
    bound, _ = _nth_largest(
        p_logits + o_row, p_mask + o_row, p_k, 1, n_sample, stride, tl.minimum(rank, n_sample),
        HAS_MASK, False, BLOCK, WIDTH,
    )  # fmt: skip
    tl.store(p_bound + i_row, tl.where(rank > n_sample, float("-inf"), bound))


@triton.jit
def _shortlist_kernel(
    p_logits, p_mask, p_k, p_bound, p_list, p_count, p_rest, n_rows, n_logits, n_split, n_chunk, num_selected, inv_eps,
    HAS_MASK: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a split: values from the bound on, in their order, and the sum over the others.

    `p_count` and `p_rest` hold `[2, R, S]`; the second pass fills their second half where the first found too few.
    """
    i_program = tl.program_id(0).to(tl.int64)
    i_row, i_split = i_program // n_split, i_program % n_split
    o_row = i_row * n_logits
    bound = tl.load(p_bound + i_row)
    if SECOND:
        found = sum_of(p_count + i_row * n_split, n_split, BLOCK)
        if found >= _needed(_load_k(p_k, i_row, n_logits), num_selected, n_logits).to(tl.float64):
            return
        bound = float("-inf")
        i_program += n_rows * n_split
    o_chunk = i_split * n_chunk
    n_here = tl.minimum(n_logits - o_chunk, n_chunk)
    count = (i_program * 0).to(tl.int32)
    b_rest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_here, BLOCK):
        o_block = start + tl.arange(0, BLOCK)  # [BLOCK]
        b_value = load_values(p_logits, p_mask, o_row + o_chunk + o_block, o_block < n_here, HAS_MASK)  # [BLOCK]
        m_listed = (b_value >= bound) & (b_value > float("-inf"))
        o_listed = count + tl.cumsum(m_listed.to(tl.int32), 0) - 1  # [BLOCK]
        tl.store(p_list + o_row + o_chunk + o_listed, b_value, mask=m_listed)
        count += tl.sum(m_listed.to(tl.int32), axis=0)
        m_rest = (b_value != float("-inf")) & (m_listed == 0)  # also what is not a number
        b_rest += tl.where(m_rest, tl.exp((b_value - bound) * inv_eps), 0.0)
    tl.store(p_count + i_program, count)
    tl.store(p_rest + i_program, tl.sum(b_rest, axis=0))


@triton.jit
def _count_splits(
    p_values, p_mask, p_count, p_first, p_ties_before, n_logits, n_split, n_chunk, last, ties, wanting,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Writes how many are selected, and how many equal to `last` are, before each of the at most MOST splits."""
    for i_first in range(0, n_split, BLOCK // WIDTH):
        b_larger = tl.zeros([BLOCK // WIDTH], tl.int32)
        b_equal = tl.zeros([BLOCK // WIDTH], tl.int32)
        for start in range(0, _longest(p_count, i_first, n_split, n_chunk, True, BLOCK, WIDTH), WIDTH):
            b_value, m_value = _load_segments(
                p_values, p_mask, p_count, i_first, start, n_split, n_chunk, 1, HAS_MASK, True, BLOCK, WIDTH
            )
            m_equal = (b_value == last) & m_value
            b_larger += tl.sum(tl.reshape((b_value > last).to(tl.int32), [BLOCK // WIDTH, WIDTH]), axis=1)
            b_equal += tl.sum(tl.reshape(m_equal.to(tl.int32), [BLOCK // WIDTH, WIDTH]), axis=1)
        i_segment = i_first + tl.arange(0, BLOCK // WIDTH)
        tl.store(p_first + i_segment, b_larger.to(tl.int64), mask=i_segment < n_split)
        tl.store(p_ties_before + i_segment, b_equal.to(tl.int64), mask=i_segment < n_split)
    tl.debug_barrier()  # what other threads of this program wrote is read below
    i_split = tl.arange(0, MOST).to(tl.int64)
    m_split = i_split < n_split
    b_larger = tl.load(p_first + i_split, mask=m_split, other=0)  # [MOST]
    b_equal = tl.load(p_ties_before + i_split, mask=m_split, other=0)
    # The list holds no −inf: where that is what ties, it is what the list leaves out.
    b_listed = tl.load(p_count + i_split, mask=m_split, other=0)
    b_unlisted = tl.maximum(tl.minimum(n_logits - i_split * n_chunk, n_chunk), 0) - b_listed
    b_equal += tl.where(wanting & m_split, b_unlisted, 0)
    b_ties_before = tl.cumsum(b_equal, 0) - b_equal
    b_selected = b_larger + tl.minimum(b_equal, tl.maximum(ties - b_ties_before, 0))
    tl.debug_barrier()  # every thread has read what is written over
    tl.store(p_first + i_split, tl.cumsum(b_selected, 0) - b_selected, mask=m_split)
    tl.store(p_ties_before + i_split, b_ties_before, mask=m_split)


@triton.jit
def _solve_kernel(
    p_values, p_mask, p_k, p_bound, p_count, p_rest, p_pivot, p_offset, p_last, p_ties, p_first, p_ties_before,
    n_rows, n_logits, n_split, n_chunk, num_selected, inv_eps,
    HAS_MASK: tl.constexpr, FILTERED: tl.constexpr, SELECT: tl.constexpr, SOLVE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One program a row: pivot and offset of the equation, and what `Selection` says."""
    i_row = tl.program_id(0).to(tl.int64)
    o_row = i_row * n_logits
    p_values += o_row
    p_mask += o_row
    k = _load_k(p_k, i_row, n_logits)
    rest = k * 0
    bound = k * 0
    if FILTERED:
        p_count += i_row * n_split
        p_rest += i_row * n_split
        misled = sum_of(p_count, n_split, 64) < _needed(k, num_selected, n_logits).to(tl.float64)
        o_pass = tl.where(misled, i_row * 0 + n_rows * n_split, 0)
        p_count += o_pass
        p_rest += o_pass
        bound = tl.where(misled, float("-inf"), tl.load(p_bound + i_row))
        n_finite = sum_of(p_count, n_split, 64).to(tl.int64)
        rest = sum_of(p_rest, n_split, 64).to(tl.float32)
    else:
        b_finite = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n_chunk, WIDTH):
            b_value, _ = _load_segments(
                p_values, p_mask, p_count, 0, start, n_split, n_chunk, 1, HAS_MASK, FILTERED, BLOCK, WIDTH
            )
            b_finite += (b_value > float("-inf")).to(tl.int32)
        n_finite = tl.sum(b_finite, axis=0).to(tl.int64)

    last = k * 0
    ties = n_finite.to(tl.int32) * 0
    if SELECT:
        rank = tl.maximum(tl.minimum(n_finite, num_selected), 1)
        last, ties = _nth_largest(
            p_values, p_mask, p_count, n_split, n_chunk, 1, rank, HAS_MASK, FILTERED, BLOCK, WIDTH
        )
        wanting = n_finite < num_selected
        last = tl.where(wanting, float("-inf"), last)
        ties = tl.where(wanting, num_selected - n_finite, ties)
        tl.store(p_last + i_row, last)
        tl.store(p_ties + i_row, ties)
        if FILTERED:
            _count_splits(
                p_values, p_mask, p_count, p_first + i_row * n_split, p_ties_before + i_row * n_split, n_logits,
                n_split, n_chunk, last, ties, wanting, HAS_MASK, BLOCK, WIDTH, MOST,
            )  # fmt: skip

    if SOLVE:
        rank = tl.maximum(tl.minimum(tl.ceil(k).to(tl.int64), n_finite), 1)
        pivot = last
        if rank != num_selected:  # 0 where nothing is selected
            pivot, _ = _nth_largest(
                p_values, p_mask, p_count, n_split, n_chunk, 1, rank, HAS_MASK, FILTERED, BLOCK, WIDTH
            )
        if FILTERED:
            rest = tl.where(bound > float("-inf"), rest * tl.exp(tl.minimum((bound - pivot) * inv_eps, 0.0)), 0.0)
        z = (k - tl.ceil(k) + 1) / n_logits * 1.0  # not above the root
        largest = 1 - tl.log(z)
        before = k * 0
        i_step = 0
        while (z > before * 1.0000002) & (i_step < 64):
            b_saturated = tl.zeros([BLOCK], tl.int32)
            b_sum = tl.zeros([BLOCK], tl.float32)
            for i_first in range(0, n_split, BLOCK // WIDTH):
                longest = _longest(p_count, i_first, n_split, n_chunk, FILTERED, BLOCK, WIDTH)
                for start in range(0, longest, WIDTH):
                    b_value, _ = _load_segments(
                        p_values, p_mask, p_count, i_first, start, n_split, n_chunk, 1,
                        HAS_MASK, FILTERED, BLOCK, WIDTH,
                    )  # fmt: skip
                    b_exponent = (b_value - pivot) * inv_eps
                    b_scaled = tl.exp(tl.where(b_exponent > largest, largest, b_exponent))  # [BLOCK]
                    m_saturated = b_scaled * z > 1
                    b_saturated += m_saturated.to(tl.int32)
                    b_sum += tl.where(m_saturated, 0.0, b_scaled)
            before = z
            room = k - tl.sum(b_saturated, axis=0).to(tl.float32)
            z = room / (tl.sum(b_sum, axis=0) + rest)
            z = tl.where(z < before, before, z)  # hands on what is not a number, where a maximum would not
            i_step += 1
        highest = 3.4028234663852886e38
        all_saturate = k >= n_finite.to(tl.float32)
        tl.store(p_pivot + i_row, tl.where(k > 0, tl.where(all_saturate, -highest, pivot), highest))
        offset = -tl.log(tl.where(z > 1, 1.0, z))
        tl.store(p_offset + i_row, tl.where((k > 0) & (all_saturate == 0), offset, 0.0))


def solve(
    logits: Tensor, k: Tensor, mask: Tensor | None, eps: float | None, num_selected: int, scratch: Tensor
) -> tuple[Tensor, Tensor, Selection]:
    """Pivot and offset `[R]` (without an `eps` unset) and the selection, of contiguous logits `[R, N]`.

    `scratch` is like the logits, and is overwritten if the rows are long.
    """
    rows, columns = logits.shape
    splits = Splits.of(logits)
    filtered = splits.number > 1
    config = choose_config(SOLVE, 8 * logits.element_size(), columns)
    masks = logits if mask is None else mask.view(torch.uint8)
    flags = {"HAS_MASK": mask is not None}
    inv_eps = 1.0 if eps is None else 1 / eps

    pivot, offset, last, bound = (logits.new_empty(rows, dtype=torch.float32) for _ in range(4))
    ties = logits.new_empty(rows, dtype=torch.int32)
    values, values_mask, count, rest, first, ties_before = logits, masks, ties, pivot, ties, ties
    with device_guard(logits):
        if filtered:
            first, ties_before = (logits.new_empty(rows, splits.number, dtype=torch.int64) for _ in range(2))
            count = logits.new_empty(2, rows, splits.number, dtype=torch.int32)
            rest = logits.new_empty(2, rows, splits.number, dtype=torch.float32)
            stride = columns // min(columns, SAMPLE[gpu_architecture()])
            sampling = choose_config(SOLVE, 8 * logits.element_size(), SAMPLE[gpu_architecture()])
            _bound_kernel[(rows,)](
                logits, masks, k, bound, columns, columns // stride, stride, num_selected, **flags,
                **sampling.keywords(),
            )  # fmt: skip
            for second in (False, True):
                _shortlist_kernel[(rows * splits.number,)](
                    logits, masks, k, bound, scratch, count, rest, rows, columns, *splits, num_selected, inv_eps,
                    **flags, SECOND=second, **stream_config(logits).keywords(),
                )  # fmt: skip
            values, values_mask, flags = scratch, scratch, {"HAS_MASK": False}
        _solve_kernel[(rows,)](
            values, values_mask, k, bound, count, rest, pivot, offset, last, ties, first, ties_before,
            rows, columns, *splits, num_selected, inv_eps,
            **flags, FILTERED=filtered, SELECT=num_selected > 0, SOLVE=eps is not None,
            MOST=triton.next_power_of_2(MOST_SPLITS[gpu_architecture()]), **config.keywords(),
        )  # fmt: skip
    return pivot, offset, Selection(last, ties, *((first, ties_before) if filtered else (None, None)))
