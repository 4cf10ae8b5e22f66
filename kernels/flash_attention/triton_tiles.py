"""What the forward and backward kernels share: which keys a row sees, and what happens to a tile of products."""

from typing import NamedTuple

import torch
from torch import Tensor

from .operands import DROPOUT_BITS, UNLIMITED, Operands, Options, dropout_threshold


try:  # transformers makes every unguarded import of a checkpoint's code a hard requirement
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of flash_attention need Triton") from error


LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every real logit, yet finite: a row that saw no key needs no guard against inf - inf.
LOWEST = tl.constexpr(-1.0e38)
_UNUSED_HASH_BITS = tl.constexpr(32 - DROPOUT_BITS)


class Rows(NamedTuple):
    """A tensor `[B, H, length, width]` with adjacent elements in its last dimension, as one argument of a kernel."""

    data: Tensor
    batch_stride: int
    head_stride: int
    row_stride: int


class Modifiers(NamedTuple):
    """Everything that bends plain attention, as one argument of a kernel. A field that is None is compiled out.

    Attributes:
        scale: factor of the products.
        positive: 1 if it is more than 0.
        left, right: how far before and behind its own position a row sees.
        key_mask: `[B, M]`, one byte a key, with `mask_stride` elements from batch row to batch row.
        key_lengths, query_lengths: `[B]`.
        alibi_slopes: `[B or 1, H]` contiguous; `alibi_stride` is 0 where the batch shares them.
        line: 1 if a tile that a row sees whole may take ALiBi as a line along its keys (`tile_logits`).
        distance_bias: `[H or 1, 2·radius + 1]` contiguous; `bias_stride` is 0 where the heads share it.
        softcap: cap of the soft clamp.
        sinks: `[H]` contiguous.
        seed: `[1]` int64. A weight is dropped where its hash is below `threshold`.
    """

    scale: float
    positive: int | None
    left: int | None
    right: int | None
    key_mask: Tensor | None
    mask_stride: int | None
    key_lengths: Tensor | None
    query_lengths: Tensor | None
    alibi_slopes: Tensor | None
    alibi_stride: int | None
    line: int | None
    distance_bias: Tensor | None
    bias_stride: int | None
    radius: int | None
    softcap: float | None
    sinks: Tensor | None
    seed: Tensor | None
    threshold: int | None
    keep_scale: float | None


def rows(tensor: Tensor | None) -> Rows | None:
    """The tensor as a kernel's argument, copied if its last dimension is not contiguous."""
    if tensor is None:
        return None
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return Rows(tensor, *tensor.stride()[:3])


def shared_rows(tensor: Tensor | None, batch: int) -> Rows | None:
    """`rows` of a tensor whose first dimension may be 1 for the whole batch."""
    return None if tensor is None else rows(tensor.expand(batch, -1, -1, -1))


def modifiers(operands: Operands, options: Options) -> Modifiers:
    """The options that are on, in the form the kernels read."""

    def contiguous(tensor):
        return None if tensor is None else tensor.contiguous()

    mask, slopes, bias = operands.key_mask, operands.alibi_slopes, operands.distance_bias
    if mask is not None:
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    dropout = options.dropout_p > 0
    # No row sees a key behind itself, and half precision does not see that a row's log-sum-exp is rounded once more.
    line = slopes is not None and options.right == 0 and not options.softcap and operands.query.dtype != torch.float32
    return Modifiers(
        scale=options.scale,
        positive=1 if options.scale > 0 else None,
        left=None if options.left == UNLIMITED else options.left,
        right=None if options.right == UNLIMITED else options.right,
        key_mask=mask,
        mask_stride=None if mask is None else mask.stride(0),
        key_lengths=contiguous(operands.key_lengths),
        query_lengths=contiguous(operands.query_lengths),
        alibi_slopes=contiguous(slopes),
        alibi_stride=None if slopes is None else slopes.shape[1] * (slopes.shape[0] > 1),
        line=1 if line else None,
        distance_bias=contiguous(bias),
        bias_stride=None if bias is None else bias.shape[1] * (bias.shape[0] > 1),
        radius=None if bias is None else bias.shape[1] // 2,
        softcap=options.softcap or None,
        sinks=contiguous(operands.sinks),
        seed=operands.dropout_seed if dropout else None,
        threshold=dropout_threshold(options.dropout_p) if dropout else None,
        keep_scale=1 / (1 - options.dropout_p) if dropout else None,
    )


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact unless the user allowed TF32 for torch's own; other types have one precision."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def block_size(width: int) -> int:
    """Columns of a tile that holds `width` of them: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def head_pointer(tensor, i_batch, i_head):
    """Where the rows of one head begin."""
    i_batch, i_head = i_batch.to(tl.int64), i_head.to(tl.int64)
    return tensor.data + i_batch * tensor.batch_stride + i_head * tensor.head_stride


@triton.jit
def load_rows(p_head, row_stride, i_row, m_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows `i_row` [R] of one head as a tile [R, BLOCK]; with MASKED, zeros where `m_row` [R] is false."""
    i_column = tl.arange(0, BLOCK)
    p_tile = p_head + i_row.to(tl.int64)[:, None] * row_stride + i_column[None, :]  # [R, BLOCK]
    if MASKED and WIDTH != BLOCK:
        b_tile = tl.load(p_tile, mask=m_row[:, None] & (i_column < WIDTH)[None, :], other=0.0)
    elif MASKED:
        b_tile = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    elif WIDTH != BLOCK:
        b_tile = tl.load(p_tile, mask=(i_column < WIDTH)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile  # [R, BLOCK]


@triton.jit
def store_rows(p_head, row_stride, i_row, m_row, b_tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a tile [R, BLOCK] to rows `i_row` [R] of one head, where `m_row` [R] is true."""
    i_column = tl.arange(0, BLOCK)
    p_tile = p_head + i_row.to(tl.int64)[:, None] * row_stride + i_column[None, :]  # [R, BLOCK]
    tl.store(p_tile, b_tile.to(p_head.dtype.element_ty), mask=m_row[:, None] & (i_column < WIDTH)[None, :])


@triton.jit
def batch_lengths(modifiers, i_batch, num_queries, num_keys):
    """How many queries and keys of this batch row count."""
    queries, keys = num_queries, num_keys
    if modifiers.query_lengths is not None:
        queries = tl.load(modifiers.query_lengths + i_batch).to(tl.int32)
    if modifiers.key_lengths is not None:
        keys = tl.load(modifiers.key_lengths + i_batch).to(tl.int32)
    return queries, keys


@triton.jit
def span(first, last, before, after, length, BLOCK: tl.constexpr):
    """The tiles of a line of `length` that the points `first`..`last` see, each from `before` to `after` itself.

    `before` or `after` is None where nothing limits the view. Returns four bounds: tiles that need a mask lie in
    [start, full_start) and [full_end, end), tiles that every point sees whole in [full_start, full_end). All but `end`
    are multiples of BLOCK.
    """
    start, full_start, end, full_end = 0, 0, length, length
    if before is not None:
        start = tl.maximum(first - before, 0) // BLOCK * BLOCK
        full_start = (tl.maximum(last - before, 0) + BLOCK - 1) // BLOCK * BLOCK
    if after is not None:
        end = tl.maximum(tl.minimum(last + after + 1, length), 0)
        full_end = tl.maximum(tl.minimum(first + after + 1, length), 0)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_start)
    return start, full_start, full_end, end


@triton.jit
def near_span(first, last, full_start, full_end, radius, BLOCK: tl.constexpr):
    """The part of [full_start, full_end) where some of the points `first`..`last` is closer than `radius`."""
    near_start = tl.maximum(first - radius + 1, 0) // BLOCK * BLOCK
    near_end = (tl.maximum(last + radius, 0) + BLOCK - 1) // BLOCK * BLOCK
    near_start = tl.minimum(tl.maximum(near_start, full_start), full_end)
    return near_start, tl.minimum(tl.maximum(near_end, near_start), full_end)


@triton.jit
def count_tiles(ranges, BLOCK: tl.constexpr):
    """How many tiles the first, the first two and all three of the ranges hold: one loop visits them all."""
    one = tl.cdiv(tl.maximum(ranges[1] - ranges[0], 0), BLOCK)
    two = one + tl.cdiv(tl.maximum(ranges[3] - ranges[2], 0), BLOCK)
    return one, two, two + tl.cdiv(tl.maximum(ranges[5] - ranges[4], 0), BLOCK)


@triton.jit
def tile_start(i_tile, ranges, one, two, BLOCK: tl.constexpr):
    """Where the tile begins that the loop over `count_tiles` visits as number `i_tile`."""
    third = tl.where(i_tile < two, ranges[2] - one * BLOCK, ranges[4] - two * BLOCK)
    return tl.where(i_tile < one, ranges[0], third) + i_tile * BLOCK


@triton.jit
def hyperbolic_tangent(b_x, PRECISE: tl.constexpr):
    """tanh of a float32 tile. PRECISE keeps the relative error small near 0 too, where the quotient cancels."""
    b_decay = tl.exp2(tl.abs(b_x) * (-2 * LOG2_E))
    b_tanh = (1 - b_decay) / (1 + b_decay)
    b_tanh = tl.where(b_x < 0, -b_tanh, b_tanh)
    if PRECISE:
        # The polynomial of least squared relative error on |x| <= 0.6, which is 3e-9.
        b_square = b_x * b_x
        b_series = 0.02074749 - 0.00584539 * b_square
        b_series = b_series * b_square - 0.05376676
        b_series = b_series * b_square + 0.13331664
        b_series = b_series * b_square - 0.33333282
        b_tanh = tl.where(b_square < 0.36, b_x + b_x * b_square * b_series, b_tanh)
    return b_tanh


@triton.jit
def in_base(b_logits, PRECISE: tl.constexpr):
    """Logits in the base of the kernels: 2, or e for float32, where the log-sum-exp so is kept as it was."""
    return b_logits if PRECISE else b_logits * LOG2_E


@triton.jit
def exponential(b_logits, PRECISE: tl.constexpr):
    """The base of the kernels to the power of `b_logits`."""
    return tl.exp(b_logits) if PRECISE else tl.exp2(b_logits)


@triton.jit
def head_biases(modifiers, i_batch, i_head, PRECISE: tl.constexpr):
    """The head's ALiBi slope, and where its distance bias has the entry of distance 0."""
    slope, p_bias = 0.0, 0
    if modifiers.alibi_slopes is not None:
        p_slope = modifiers.alibi_slopes + i_batch * modifiers.alibi_stride + i_head
        slope = in_base(tl.load(p_slope).to(tl.float32), PRECISE)
    if modifiers.distance_bias is not None:
        p_bias = modifiers.distance_bias + i_head.to(tl.int64) * modifiers.bias_stride + modifiers.radius
    return slope, p_bias


@triton.jit
def tile_logits(
    b_products,
    i_distance,
    far_bias,
    modifiers,
    slope,
    b_line,
    p_bias,
    MEMORY: tl.constexpr,
    FAR: tl.constexpr,
    LINE: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Scaled, biased and capped scores, and the tanh of the cap (meaningless without one).

    `i_distance`: key's position minus row's position, in the shape of `b_products`. Memory keys have no position, so
    no bias. FAR: the whole tile lies beyond the radius of the distance bias, where it is `far_bias`.

    LINE: no key stands behind a row, so ALiBi is `slope · (key - reference)`, which is `b_line` and broadcasts to the
    tile, less `slope · (row - reference)`, which the caller adds to what it subtracts from the row's logits.
    """
    b_logits = b_products * in_base(modifiers.scale, PRECISE)
    if not MEMORY:
        if LINE:
            b_logits += b_line
        elif modifiers.alibi_slopes is not None:
            b_logits -= slope * tl.abs(i_distance).to(tl.float32)
        if modifiers.distance_bias is not None:
            if FAR:
                b_logits += far_bias
            else:
                i_entry = tl.minimum(tl.maximum(i_distance, -modifiers.radius), modifiers.radius)
                b_logits += in_base(tl.load(p_bias + i_entry).to(tl.float32), PRECISE)
    b_tanh = b_logits
    if modifiers.softcap is not None:
        softcap = in_base(modifiers.softcap, PRECISE)
        b_tanh = hyperbolic_tangent(b_logits / softcap if PRECISE else b_logits * (1 / softcap), PRECISE)
        b_logits = b_tanh * softcap
    return b_logits, b_tanh


@triton.jit
def in_view(i_distance, modifiers):
    """Whether a key at this distance is inside the causal limit and the window."""
    if modifiers.left is not None and modifiers.right is not None:
        m_view = (i_distance >= -modifiers.left) & (i_distance <= modifiers.right)
    elif modifiers.left is not None:
        m_view = i_distance >= -modifiers.left
    elif modifiers.right is not None:
        m_view = i_distance <= modifiers.right
    else:
        m_view = i_distance == i_distance
    return m_view


@triton.jit
def _mix(x):
    """The mixer of `operands.py`, in unsigned 32-bit numbers."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropout_row_hash(modifiers, i_batch_head, i_query):
    """The part of the hash that belongs to a row, uint32 in the shape of `i_query`; zeros without dropout."""
    b_hash = tl.zeros_like(i_query).to(tl.uint32)
    if modifiers.seed is not None:
        seed = tl.load(modifiers.seed)
        b_hash += ((seed & 0xFFFFFFFF) ^ 0x9E3779B9).to(tl.uint32)
        b_hash = _mix(_mix(b_hash) ^ (seed >> 32).to(tl.uint32))
        b_hash = _mix(_mix(b_hash ^ i_batch_head.to(tl.uint32)) ^ i_query.to(tl.uint32))
    return b_hash


@triton.jit
def kept(b_row_hash, i_column, modifiers):
    """Which weights dropout keeps; `i_column` counts the memory keys first. Broadcasts its two operands."""
    b_hash = _mix(b_row_hash ^ (i_column.to(tl.uint32) * 0x9E3779B9))
    return (b_hash >> _UNUSED_HASH_BITS).to(tl.int32) >= modifiers.threshold


@triton.jit
def tile_gradient(b_weights, b_grad_weights, b_tanh, delta, modifiers):
    """Gradient of the scaled and biased products: through softmax and cap. `delta` broadcasts to the tile."""
    b_grad = b_weights * (b_grad_weights - delta)
    if modifiers.softcap is not None:
        b_grad = b_grad * (1 - b_tanh * b_tanh)
    return b_grad
