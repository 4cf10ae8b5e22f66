"""The forward pass: one program per block of rows, an online softmax over the key tiles that the block can see.

Scores of 16-bit tensors live in base 2 (`exp2` is one instruction). A block first visits the memory keys, then the
tiles that the left edge of its window cuts, those it sees whole (no mask is computed there), and those that the right
edge or the end of the keys cuts. Tiles that nobody sees are never touched, so a window costs O(n·w).
"""

import torch
from torch import Tensor

from ..backend import device_guard
from ..launch_config import choose_config
from .launch_table import FORWARD, FORWARD_BIASED
from .operands import Operands, Options
from .triton_tiles import (
    LN_2,
    LOWEST,
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
    modifiers,
    near_span,
    rows,
    shared_rows,
    span,
    store_rows,
    tile_logits,
    tile_start,
)


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of flash_attention need Triton") from error


@triton.jit
def _visit_keys(
    state,  # output [BLOCK_M, BLOCK_V] not yet divided by the sum, maximum [BLOCK_M], sum [BLOCK_M]: all float32
    b_query,  # [BLOCK_M, BLOCK_D]
    first_position,
    i_position,  # [BLOCK_M], from `first_position` on
    b_row_hash,  # [BLOCK_M]
    p_key,
    p_value,
    key_stride,
    value_stride,
    p_mask,
    ranges,  # three ranges of keys: their starts and ends
    length,
    first_column,
    slope,
    p_bias,
    modifiers,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CUT: tl.constexpr,
    MEMORY: tl.constexpr,
    FAR: tl.constexpr,
):
    """Adds the keys of the ranges to the state.

    CUT: a row may not see some of these tiles' keys. FAR: the distance bias has one value before a row, one behind.
    """
    KEY_MASK: tl.constexpr = modifiers.key_mask is not None and not MEMORY
    PRECISE: tl.constexpr = b_query.dtype == tl.float32
    LINE: tl.constexpr = modifiers.line is not None and not CUT
    # Nothing is added to a product and nothing hides one: the largest logit is that of the largest product. With a
    # window before the rows that code spills on sm_90.
    BARE: tl.constexpr = (
        not CUT
        and not KEY_MASK
        and modifiers.positive is not None
        and modifiers.left is None
        and modifiers.alibi_slopes is None
        and modifiers.distance_bias is None
        and modifiers.softcap is None
    )
    b_output, b_maximum, b_sum = state
    if LINE:
        b_ramp = slope * tl.arange(0, BLOCK_N).to(tl.float32)  # [BLOCK_N]
        # No product: the compiler would merge some of the sums below with it and not others, which see it rounded.
        b_shift = tl.fma(slope, (i_position - first_position).to(tl.float32), 0.0)  # [BLOCK_M]
        # The shifted maximum is rounded; sum and output are then relative to what it stands for.
        b_shifted = b_maximum + b_shift
        b_rescale = exponential(b_maximum - (b_shifted - b_shift), PRECISE)  # [BLOCK_M]
        b_sum *= b_rescale
        b_output *= b_rescale[:, None]
        b_maximum = b_shifted
    if FAR:
        bias_before = in_base(tl.load(p_bias - modifiers.radius).to(tl.float32), PRECISE)
        bias_behind = in_base(tl.load(p_bias + modifiers.radius).to(tl.float32), PRECISE)
    one, two, num_tiles = count_tiles(ranges, BLOCK_N)
    for i_tile in tl.range(0, num_tiles):
        first_key = tile_start(i_tile, ranges, one, two, BLOCK_N)
        i_key = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        m_key = i_key < length  # [BLOCK_N]
        if KEY_MASK:
            m_key = m_key & (tl.load(p_mask + i_key, mask=m_key, other=0) != 0)
        # A key that does not count is read as zero: whatever stands there meets no product.
        b_key = load_rows(p_key, key_stride, i_key, m_key, D, BLOCK_D, CUT or KEY_MASK)  # [BLOCK_N, BLOCK_D]
        b_products = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        i_distance = i_key[None, :] - i_position[:, None]  # [BLOCK_M, BLOCK_N]
        far_bias = tl.where(i_tile < one, bias_before, bias_behind) if FAR else 0.0
        b_line = (b_ramp + slope * (first_key - first_position).to(tl.float32))[None, :] if LINE else 0.0
        b_logits, _ = tile_logits(
            b_products, i_distance, far_bias, modifiers, slope, b_line, p_bias, MEMORY, FAR, LINE, PRECISE
        )
        if CUT and not MEMORY:
            b_logits = tl.where(m_key[None, :] & in_view(i_distance, modifiers), b_logits, float("-inf"))
        elif CUT or KEY_MASK:
            b_logits = tl.where(m_key[None, :], b_logits, float("-inf"))
        b_tile_maximum = tl.max(b_products, 1) * in_base(modifiers.scale, PRECISE) if BARE else tl.max(b_logits, 1)
        b_new_maximum = tl.maximum(b_maximum, b_tile_maximum)  # [BLOCK_M]
        b_rescale = exponential(b_maximum - b_new_maximum, PRECISE)  # [BLOCK_M]
        b_weights = exponential(b_logits - b_new_maximum[:, None], PRECISE)  # [BLOCK_M, BLOCK_N]
        b_sum = b_sum * b_rescale + tl.sum(b_weights, 1)
        b_maximum = b_new_maximum
        if modifiers.seed is not None:
            b_weights = tl.where(kept(b_row_hash[:, None], (first_column + i_key)[None, :], modifiers), b_weights, 0.0)
        b_value = load_rows(p_value, value_stride, i_key, m_key, V, BLOCK_V, CUT or KEY_MASK)  # [BLOCK_N, BLOCK_V]
        b_output = tl.dot(
            b_weights.to(b_value.dtype), b_value, b_output * b_rescale[:, None], input_precision=PRECISION
        )  # [BLOCK_M, BLOCK_V]
    if LINE:
        b_maximum -= b_shift
    return b_output, b_maximum, b_sum


@triton.jit
def flash_attention_forward_kernel(
    query,
    key,
    value,
    memory_key,
    memory_value,
    output,
    p_lse,
    modifiers,
    num_queries,
    num_keys,
    num_memory,
    num_heads,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: row blocks · heads · batch. Tensors are `Rows`; `p_lse` is `[B, H, N]` float32, contiguous."""
    PRECISE: tl.constexpr = query.data.dtype.element_ty == tl.float32
    i_program = tl.program_id(0)
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    i_block = i_program % num_blocks
    i_head = i_program // num_blocks % num_heads
    i_batch = i_program // num_blocks // num_heads
    if modifiers.right is not None:
        # The last rows see most: they go first, so that short programs fill the end of the launch.
        i_block = num_blocks - 1 - i_block
    counted_queries, counted_keys = batch_lengths(modifiers, i_batch, num_queries, num_keys)
    offset = counted_keys - counted_queries
    first_row = i_block * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, counted_queries) - 1

    i_query = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_query = i_query < counted_queries  # [BLOCK_M]
    p_query = head_pointer(query, i_batch, i_head)
    b_query = load_rows(p_query, query.row_stride, i_query, m_query, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    b_row_hash = dropout_row_hash(modifiers, i_batch * num_heads + i_head, i_query)  # [BLOCK_M]
    slope, p_bias = head_biases(modifiers, i_batch, i_head, PRECISE)
    first_position = first_row + offset
    i_position = i_query + offset  # [BLOCK_M]
    state = (
        tl.zeros([BLOCK_M, BLOCK_V], tl.float32),
        tl.full([BLOCK_M], LOWEST, tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    i_key_head = i_head // GROUP

    if memory_key is not None:
        p_memory_key = head_pointer(memory_key, i_batch, i_key_head)
        p_memory_value = head_pointer(memory_value, i_batch, i_key_head)
        state = _visit_keys(
            state, b_query, first_position, i_position, b_row_hash, p_memory_key, p_memory_value,
            memory_key.row_stride, memory_value.row_stride, 0, (0, num_memory, 0, 0, 0, 0), num_memory, 0, slope,
            p_bias, modifiers,
            D, V, BLOCK_D, BLOCK_V, PRECISION, BLOCK_N, True, True, False,
        )  # fmt: skip

    p_key = head_pointer(key, i_batch, i_key_head)
    p_value = head_pointer(value, i_batch, i_key_head)
    p_mask = 0
    if modifiers.key_mask is not None:
        p_mask = modifiers.key_mask + i_batch.to(tl.int64) * modifiers.mask_stride
    start, full_start, full_end, end = span(
        first_position, last_row + offset, modifiers.left, modifiers.right, counted_keys, BLOCK_N
    )
    if modifiers.query_lengths is not None:
        # A block without a row that counts visits nothing.
        full_end = tl.where(last_row < first_row, full_start, full_end)
        end = tl.where(last_row < first_row, 0, end)
    near_start, near_end = full_start, full_start
    if modifiers.distance_bias is not None:
        near_start, near_end = near_span(
            first_position, last_row + offset, full_start, full_end, modifiers.radius, BLOCK_N
        )
    cut = (start, tl.minimum(full_start, end), near_start, near_end, full_end, end)
    state = _visit_keys(
        state, b_query, first_position, i_position, b_row_hash, p_key, p_value, key.row_stride, value.row_stride,
        p_mask, cut, counted_keys, num_memory, slope, p_bias, modifiers,
        D, V, BLOCK_D, BLOCK_V, PRECISION, BLOCK_N, True, False, False,
    )  # fmt: skip
    whole = (full_start, near_start, near_end, full_end, 0, 0)
    b_output, b_maximum, b_sum = _visit_keys(
        state, b_query, first_position, i_position, b_row_hash, p_key, p_value, key.row_stride, value.row_stride,
        p_mask, whole, counted_keys, num_memory, slope, p_bias, modifiers,
        D, V, BLOCK_D, BLOCK_V, PRECISION, BLOCK_N, False, False, modifiers.distance_bias is not None,
    )  # fmt: skip

    if modifiers.sinks is not None:
        sink = in_base(tl.load(modifiers.sinks + i_head).to(tl.float32), PRECISE)
        b_total = tl.maximum(b_maximum, sink)  # [BLOCK_M]
        b_rescale = exponential(b_maximum - b_total, PRECISE)  # [BLOCK_M]
        b_sum = b_sum * b_rescale + exponential(sink - b_total, PRECISE)
        b_output = b_output * b_rescale[:, None]
        b_maximum = b_total
    m_seen = m_query & (b_sum > 0)  # [BLOCK_M]
    b_sum = tl.where(m_seen, b_sum, 1.0)
    b_factor = tl.where(m_seen, 1 / b_sum, 0.0)  # [BLOCK_M]
    if modifiers.seed is not None:
        b_factor = b_factor * modifiers.keep_scale
    b_lse = b_maximum + tl.log(b_sum) if PRECISE else (b_maximum + tl.log2(b_sum)) * LN_2  # [BLOCK_M]
    b_lse = tl.where(m_seen, b_lse, float("-inf"))
    m_row = i_query < num_queries  # [BLOCK_M]
    p_output = head_pointer(output, i_batch, i_head)
    store_rows(p_output, output.row_stride, i_query, m_row, b_output * b_factor[:, None], V, BLOCK_V)
    tl.store(p_lse + (i_batch * num_heads + i_head).to(tl.int64) * num_queries + i_query, b_lse, mask=m_row)


def forward(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Output `[B, H, N, V]` in the dtype of the query and lse `[B, H, N]` in float32, both contiguous.

    See `operands.py`; the api refuses what the kernels cannot take.
    """
    query, key, value = operands.query, operands.key, operands.value
    batch, heads, num_queries, head_size = query.shape
    key_heads, num_keys, value_size = key.shape[1], key.shape[2], value.shape[3]
    output = query.new_empty(batch, heads, num_queries, value_size)
    lse = query.new_empty(batch, heads, num_queries, dtype=torch.float32)
    if not lse.numel():
        return output, lse
    memory_key = shared_rows(operands.memory_key, batch)
    table = FORWARD if operands.distance_bias is None else FORWARD_BIASED
    config = choose_config(table, 8 * query.element_size(), max(head_size, value_size))
    grid = (triton.cdiv(num_queries, config.blocks["BLOCK_M"]) * heads * batch,)
    with device_guard(query):
        flash_attention_forward_kernel[grid](
            rows(query),
            rows(key),
            rows(value),
            memory_key,
            shared_rows(operands.memory_value, batch),
            rows(output),
            lse,
            modifiers(operands, options),
            num_queries,
            num_keys,
            0 if memory_key is None else memory_key.data.shape[2],
            heads,
            GROUP=heads // key_heads,
            D=head_size,
            V=value_size,
            BLOCK_D=block_size(head_size),
            BLOCK_V=block_size(value_size),
            PRECISION=dot_precision(query.dtype),
            **config.keywords(),
        )
    return output, lse
