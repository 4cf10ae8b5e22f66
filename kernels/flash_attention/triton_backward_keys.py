"""The gradient of keys and values, and of memory keys and values: one program per block of them.

A program holds its keys and visits the rows that see them, of every query head that reads them, so that nothing is
added up in global memory. Scores are computed transposed, keys down and rows across: both products that end in the
held gradients then take their left factor as it is.
"""

import torch
from torch import Tensor

from ..launch_config import LaunchConfig
from .operands import Operands
from .triton_tiles import (
    Modifiers,
    batch_lengths,
    block_size,
    count_tiles,
    dot_precision,
    dropout_row_hash,
    exponential,
    head_biases,
    head_pointer,
    in_base,
    in_view,
    kept,
    load_rows,
    near_span,
    rows,
    shared_rows,
    span,
    store_rows,
    tile_gradient,
    tile_logits,
    tile_start,
)


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of flash_attention need Triton") from error


# At most so many programs share the rows that a memory key sees, at least so many blocks each.
_MEMORY_SPLITS = 32
_MEMORY_BLOCKS = 4


@triton.jit
def _visit_rows(
    state,  # gradients of the keys [BLOCK_N, BLOCK_D] and of the values [BLOCK_N, BLOCK_V], float32
    b_key,  # [BLOCK_N, BLOCK_D]
    b_value,  # [BLOCK_N, BLOCK_V]
    first_key,
    i_key,  # [BLOCK_N], from `first_key` on
    query,
    grad_output,
    p_row_lse,
    p_delta,
    ranges,  # three ranges of rows: their starts and ends
    length,
    offset,
    i_batch,
    i_key_head,
    num_heads,
    num_queries,
    first_column,
    modifiers,
    group,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CUT: tl.constexpr,
    MEMORY: tl.constexpr,
    FAR: tl.constexpr,
):
    """Adds what the rows of the ranges give. CUT: some of a tile's rows may not see these keys, or not exist.

    Keys that do not count are not masked here: each has its own row of the gradients, which is zeroed at the end.
    """
    PRECISE: tl.constexpr = b_key.dtype == tl.float32
    LINE: tl.constexpr = modifiers.line is not None and not CUT and not MEMORY
    b_grad_key, b_grad_value = state
    one, two, num_tiles = count_tiles(ranges, BLOCK_M)
    # One loop over the tiles and their heads: a loop in a loop takes more registers. With the tiles inside one would
    # divide by their number: the compiler concludes that there are some, and fetches the first two before it asks.
    for i_step in tl.range(0, group * num_tiles):
        i_head = i_key_head * group + i_step % group
        i_tile = i_step // group
        i_batch_head = i_batch * num_heads + i_head
        p_query, p_grad_output = head_pointer(query, i_batch, i_head), head_pointer(grad_output, i_batch, i_head)
        o_head = i_batch_head.to(tl.int64) * num_queries
        slope, p_bias = head_biases(modifiers, i_batch, i_head, PRECISE)
        first_row = tile_start(i_tile, ranges, one, two, BLOCK_M)
        i_query = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        m_query = i_query < length  # [BLOCK_M]
        b_query = load_rows(p_query, query.row_stride, i_query, m_query, D, BLOCK_D, CUT)  # [BLOCK_M, BLOCK_D]
        if CUT:
            b_lse = tl.load(p_row_lse + o_head + i_query, mask=m_query, other=float("inf"))  # [BLOCK_M]
            b_delta = tl.load(p_delta + o_head + i_query, mask=m_query, other=0.0)  # [BLOCK_M]
        else:
            b_lse = tl.load(p_row_lse + o_head + i_query)
            b_delta = tl.load(p_delta + o_head + i_query)
        b_products = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        i_distance = i_key[:, None] - (i_query + offset)[None, :]  # [BLOCK_N, BLOCK_M]
        far_bias = 0.0
        if FAR:
            # Rows of the first range stand before the keys: they see them behind themselves.
            p_end = p_bias + tl.where(i_tile < one, modifiers.radius, -modifiers.radius)
            far_bias = in_base(tl.load(p_end).to(tl.float32), PRECISE)
        b_line = 0.0
        if LINE:
            b_line = (slope * (i_key - first_key).to(tl.float32))[:, None]
            b_rows = tl.arange(0, BLOCK_M).to(tl.float32) + (first_row + offset - first_key).to(tl.float32)
            b_lse += slope * b_rows
        b_logits, b_tanh = tile_logits(
            b_products, i_distance, far_bias, modifiers, slope, b_line, p_bias, MEMORY, FAR, LINE, PRECISE
        )
        if CUT and not MEMORY:
            b_logits = tl.where(in_view(i_distance, modifiers), b_logits, float("-inf"))
        b_weights = exponential(b_logits - b_lse[None, :], PRECISE)  # [BLOCK_N, BLOCK_M]
        b_grad_output = load_rows(
            p_grad_output, grad_output.row_stride, i_query, m_query, V, BLOCK_V, CUT
        )  # [BLOCK_M, BLOCK_V]
        b_grad_weights = tl.dot(b_value, tl.trans(b_grad_output), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        b_dropped = b_weights  # [BLOCK_N, BLOCK_M]
        if modifiers.seed is not None:
            b_row_hash = dropout_row_hash(modifiers, i_batch_head, i_query)  # [BLOCK_M]
            m_kept = kept(b_row_hash[None, :], (first_column + i_key)[:, None], modifiers)  # [BLOCK_N, BLOCK_M]
            b_dropped = tl.where(m_kept, b_weights * modifiers.keep_scale, 0.0)
            b_grad_weights = tl.where(m_kept, b_grad_weights * modifiers.keep_scale, 0.0)
        b_grad_value = tl.dot(
            b_dropped.to(b_grad_output.dtype), b_grad_output, b_grad_value, input_precision=PRECISION
        )  # [BLOCK_N, BLOCK_V]
        b_grad = tile_gradient(b_weights, b_grad_weights, b_tanh, b_delta[None, :], modifiers)  # [BLOCK_N, BLOCK_M]
        b_grad_key = tl.dot(b_grad.to(b_query.dtype), b_query, b_grad_key, input_precision=PRECISION)
    return b_grad_key, b_grad_value


@triton.jit
def flash_attention_backward_keys_kernel(
    query,
    key,
    value,
    grad_output,
    grad_key,
    grad_value,
    p_row_lse,
    p_delta,
    modifiers,
    num_queries,
    num_keys,
    num_memory,
    num_key_heads,
    num_batch,
    split_rows,
    group,
    MEMORY: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: key blocks · key heads · batch · splits.

    MEMORY: `key` and `value` are the memory's, and a program visits `split_rows` rows only; `grad_key` and
    `grad_value` then have `splits · B` batch rows.
    """
    i_program = tl.program_id(0)
    num_here = num_memory if MEMORY else num_keys
    num_blocks = tl.cdiv(num_here, BLOCK_N)
    i_block = i_program % num_blocks
    i_key_head = i_program // num_blocks % num_key_heads
    i_split_batch = i_program // num_blocks // num_key_heads
    i_split, i_batch = i_split_batch // num_batch, i_split_batch % num_batch
    counted_queries, counted_keys = batch_lengths(modifiers, i_batch, num_queries, num_keys)
    offset = counted_keys - counted_queries
    counted = num_memory if MEMORY else counted_keys

    first_key = i_block * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, counted) - 1
    i_key = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_key = i_key < counted  # [BLOCK_N]
    p_key, p_value = head_pointer(key, i_batch, i_key_head), head_pointer(value, i_batch, i_key_head)
    b_key = load_rows(p_key, key.row_stride, i_key, m_key, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    b_value = load_rows(p_value, value.row_stride, i_key, m_key, V, BLOCK_V, True)  # [BLOCK_N, BLOCK_V]
    state = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32))

    if MEMORY:
        full_start = i_split * split_rows
        end = tl.minimum(full_start + split_rows, counted_queries)
        full_end = tl.maximum(end // BLOCK_M * BLOCK_M, full_start)
        cut = (full_end, end, 0, 0, 0, 0)
        whole = (full_start, full_end, 0, 0, 0, 0)
        first_column = 0
    else:
        # A key sees the rows that see it: the window turned around.
        start, full_start, full_end, end = span(
            first_key - offset, last_key - offset, modifiers.right, modifiers.left, counted_queries, BLOCK_M
        )
        if modifiers.key_lengths is not None:
            full_end = tl.where(last_key < first_key, full_start, full_end)
            end = tl.where(last_key < first_key, 0, end)
        near_start, near_end = full_start, full_start
        if modifiers.distance_bias is not None:
            near_start, near_end = near_span(
                first_key - offset, last_key - offset, full_start, full_end, modifiers.radius, BLOCK_M
            )
        cut = (start, tl.minimum(full_start, end), near_start, near_end, full_end, end)
        whole = (full_start, near_start, near_end, full_end, 0, 0)
        first_column = num_memory

    num_heads = num_key_heads * group
    state = _visit_rows(
        state, b_key, b_value, first_key, i_key, query, grad_output, p_row_lse, p_delta, cut, counted_queries, offset,
        i_batch, i_key_head, num_heads, num_queries, first_column, modifiers, group,
        D, V, BLOCK_D, BLOCK_V, PRECISION, BLOCK_M, True, MEMORY, False,
    )  # fmt: skip
    b_grad_key, b_grad_value = _visit_rows(
        state, b_key, b_value, first_key, i_key, query, grad_output, p_row_lse, p_delta, whole, counted_queries,
        offset, i_batch, i_key_head, num_heads, num_queries, first_column, modifiers, group,
        D, V, BLOCK_D, BLOCK_V, PRECISION, BLOCK_M, False, MEMORY, modifiers.distance_bias is not None and not MEMORY,
    )  # fmt: skip

    if modifiers.key_mask is not None and not MEMORY:
        p_mask = modifiers.key_mask + i_batch.to(tl.int64) * modifiers.mask_stride
        m_key = m_key & (tl.load(p_mask + i_key, mask=m_key, other=0) != 0)
    b_grad_key = tl.where(m_key[:, None], b_grad_key * modifiers.scale, 0.0)
    b_grad_value = tl.where(m_key[:, None], b_grad_value, 0.0)
    p_grad_key, p_grad_value = (
        head_pointer(grad_key, i_split_batch, i_key_head),
        head_pointer(grad_value, i_split_batch, i_key_head),
    )
    store_rows(p_grad_key, grad_key.row_stride, i_key, i_key < num_here, b_grad_key, D, BLOCK_D)
    store_rows(p_grad_value, grad_value.row_stride, i_key, i_key < num_here, b_grad_value, V, BLOCK_V)


def keys_gradient(
    operands: Operands, bent: Modifiers, grad_output: Tensor, row_lse: Tensor, delta: Tensor, config: LaunchConfig
) -> tuple[Tensor, Tensor]:
    """The gradients of key and value, contiguous and in their dtype."""
    key, value = operands.key, operands.value
    grads = key.new_empty(key.shape), value.new_empty(value.shape)
    memory = 0 if operands.memory_key is None else operands.memory_key.shape[2]
    tensors = rows(key), rows(value)
    _launch(operands, tensors, bent, grad_output, row_lse, delta, grads, memory, 1, 0, False, config)
    return grads


def memory_gradient(
    operands: Operands, bent: Modifiers, grad_output: Tensor, row_lse: Tensor, delta: Tensor, config: LaunchConfig
) -> tuple[Tensor, Tensor]:
    """The gradients of memory key and value, like them. Programs share the rows, or few would have to visit all."""
    batch, _, num_queries = operands.query.shape[:3]
    block = config.blocks["BLOCK_M"]
    blocks = max(_MEMORY_BLOCKS, triton.cdiv(triton.cdiv(num_queries, block), _MEMORY_SPLITS))
    splits = max(1, triton.cdiv(num_queries, blocks * block))
    pair = operands.memory_key, operands.memory_value
    parts = [t.new_empty(splits * batch, *t.shape[1:], dtype=torch.float32) for t in pair]
    tensors = [shared_rows(t, batch) for t in pair]
    memory = operands.memory_key.shape[2]
    _launch(operands, tensors, bent, grad_output, row_lse, delta, parts, memory, splits, blocks * block, True, config)
    summed = (part.unflatten(0, (splits, batch)).sum(0) for part in parts)
    return tuple(
        (grad if t.shape[0] == batch else grad.sum(0, keepdim=True)).to(t.dtype)
        for grad, t in zip(summed, pair, strict=True)
    )


def _launch(
    operands, tensors, bent, grad_output, row_lse, delta, grads, num_memory, splits, split_rows, memory, config
):
    query, (key, value) = operands.query, tensors
    batch, heads, num_queries, head_size = query.shape
    key_heads, length, value_size = key.data.shape[1], key.data.shape[2], value.data.shape[3]
    grid = (triton.cdiv(length, config.blocks["BLOCK_N"]) * key_heads * batch * splits,)
    if not grid[0]:
        return
    flash_attention_backward_keys_kernel[grid](
        rows(query),
        key,
        value,
        rows(grad_output),
        rows(grads[0]),
        rows(grads[1]),
        row_lse,
        delta,
        bent,
        num_queries,
        operands.key.shape[2],
        num_memory,
        key_heads,
        batch,
        split_rows,
        heads // key_heads,
        MEMORY=memory,
        D=head_size,
        V=value_size,
        BLOCK_D=block_size(head_size),
        BLOCK_V=block_size(value_size),
        PRECISION=dot_precision(query.dtype),
        **config.keywords(),
    )
