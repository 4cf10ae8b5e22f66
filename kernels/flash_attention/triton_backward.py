"""The backward pass, and its gradient of the query: weights are computed again from the saved log-sum-exp.

No kernel adds to global memory, so the gradients are the same in every run. The first turns each row's output and its
gradient into two numbers. Then one program per block of rows visits the keys for the gradient of the query (here), one
per block of keys the rows (`triton_backward_keys.py`), and one per band of distances both, if somebody wants the
gradient of slopes or distance bias (`triton_backward_distance.py`). Tiles are split as in the forward pass.
"""

import torch
from torch import Tensor

from ..backend import device_guard
from ..launch_config import choose_config
from .launch_table import BACKWARD_DISTANCE, BACKWARD_KEYS, BACKWARD_KEYS_BIASED, BACKWARD_PREPARE, BACKWARD_QUERY
from .operands import Gradients, Operands, Options, Wanted
from .triton_backward_distance import distance_gradients
from .triton_backward_keys import keys_gradient, memory_gradient
from .triton_tiles import (
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
    tile_gradient,
    tile_logits,
    tile_start,
)


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of flash_attention need Triton") from error


@triton.jit
def flash_attention_backward_prepare_kernel(
    output,
    grad_output,
    p_lse,
    p_grad_lse,
    p_row_lse,
    p_delta,
    p_grad_sinks,
    modifiers,
    num_queries,
    num_heads,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid: row blocks · heads · batch. Writes delta and the log-sum-exp as the other kernels need it, `[B, H, N]`.

    `delta = Σ output · grad_output - grad_lse` is what the softmax subtracts. `p_row_lse` is in the kernels' base, and
    +inf for rows that saw nothing, whose weights so become 0. `p_grad_sinks` `[B, H, row blocks]` float64:
    the blocks' parts.
    """
    PRECISE: tl.constexpr = output.data.dtype.element_ty == tl.float32
    i_program = tl.program_id(0)
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    i_block = i_program % num_blocks
    i_batch_head = i_program // num_blocks
    i_batch, i_head = i_batch_head // num_heads, i_batch_head % num_heads
    i_query = i_block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_query = i_query < num_queries  # [BLOCK_M]
    o_row = i_batch_head.to(tl.int64) * num_queries + i_query  # [BLOCK_M]
    b_lse = tl.load(p_lse + o_row, mask=m_query, other=float("-inf"))  # [BLOCK_M]
    m_seen = b_lse > float("-inf")  # [BLOCK_M]
    p_output, p_grad = head_pointer(output, i_batch, i_head), head_pointer(grad_output, i_batch, i_head)
    b_output = load_rows(p_output, output.row_stride, i_query, m_seen, V, BLOCK_V, True).to(tl.float32)
    b_grad = load_rows(p_grad, grad_output.row_stride, i_query, m_seen, V, BLOCK_V, True).to(tl.float32)
    b_delta = tl.sum(b_output * b_grad, 1)  # [BLOCK_M]
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o_row, mask=m_seen, other=0.0)
    tl.store(p_delta + o_row, b_delta, mask=m_query)
    tl.store(p_row_lse + o_row, tl.where(m_seen, in_base(b_lse, PRECISE), float("inf")), mask=m_query)
    if p_grad_sinks is not None:
        sink = tl.load(modifiers.sinks + i_head).to(tl.float32)
        b_weight = tl.where(m_seen, tl.exp(sink - b_lse), 0.0)  # [BLOCK_M]
        # Terms of either sign from all rows end in one number: in float64 their sum adds nothing to their own errors.
        tl.store(p_grad_sinks + i_program, -tl.sum(b_weight.to(tl.float64) * b_delta.to(tl.float64), 0))


@triton.jit
def _visit_keys(
    b_grad_query,  # [BLOCK_M, BLOCK_D] float32
    b_query,  # [BLOCK_M, BLOCK_D]
    b_grad_output,  # [BLOCK_M, BLOCK_V]
    b_lse,  # [BLOCK_M]
    b_delta,  # [BLOCK_M]
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
    """Adds what the keys of the ranges give to the gradient of the rows. Flags as in the forward pass."""
    KEY_MASK: tl.constexpr = modifiers.key_mask is not None and not MEMORY
    PRECISE: tl.constexpr = b_query.dtype == tl.float32
    LINE: tl.constexpr = modifiers.line is not None and not CUT
    if LINE:
        b_ramp = slope * tl.arange(0, BLOCK_N).to(tl.float32)  # [BLOCK_N]
        b_lse += slope * (i_position - first_position).to(tl.float32)
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
        b_key = load_rows(p_key, key_stride, i_key, m_key, D, BLOCK_D, CUT or KEY_MASK)  # [BLOCK_N, BLOCK_D]
        b_products = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        i_distance = i_key[None, :] - i_position[:, None]  # [BLOCK_M, BLOCK_N]
        far_bias = tl.where(i_tile < one, bias_before, bias_behind) if FAR else 0.0
        b_line = (b_ramp + slope * (first_key - first_position).to(tl.float32))[None, :] if LINE else 0.0
        b_logits, b_tanh = tile_logits(
            b_products, i_distance, far_bias, modifiers, slope, b_line, p_bias, MEMORY, FAR, LINE, PRECISE
        )
        if CUT and not MEMORY:
            b_logits = tl.where(m_key[None, :] & in_view(i_distance, modifiers), b_logits, float("-inf"))
        elif CUT or KEY_MASK:
            b_logits = tl.where(m_key[None, :], b_logits, float("-inf"))
        b_weights = exponential(b_logits - b_lse[:, None], PRECISE)  # [BLOCK_M, BLOCK_N]
        b_value = load_rows(p_value, value_stride, i_key, m_key, V, BLOCK_V, CUT or KEY_MASK)  # [BLOCK_N, BLOCK_V]
        b_grad_weights = tl.dot(b_grad_output, tl.trans(b_value), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if modifiers.seed is not None:
            m_kept = kept(b_row_hash[:, None], (first_column + i_key)[None, :], modifiers)  # [BLOCK_M, BLOCK_N]
            b_grad_weights = tl.where(m_kept, b_grad_weights * modifiers.keep_scale, 0.0)
        b_grad = tile_gradient(b_weights, b_grad_weights, b_tanh, b_delta[:, None], modifiers)  # [BLOCK_M, BLOCK_N]
        b_grad_query = tl.dot(b_grad.to(b_key.dtype), b_key, b_grad_query, input_precision=PRECISION)
    return b_grad_query


@triton.jit
def flash_attention_backward_query_kernel(
    query,
    key,
    value,
    memory_key,
    memory_value,
    grad_output,
    grad_query,
    p_row_lse,
    p_delta,
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
    """Grid: row blocks · heads · batch."""
    PRECISE: tl.constexpr = query.data.dtype.element_ty == tl.float32
    i_program = tl.program_id(0)
    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    i_block = i_program % num_blocks
    i_head = i_program // num_blocks % num_heads
    i_batch = i_program // num_blocks // num_heads
    if modifiers.right is not None:
        i_block = num_blocks - 1 - i_block  # the rows that see most go first
    counted_queries, counted_keys = batch_lengths(modifiers, i_batch, num_queries, num_keys)
    offset = counted_keys - counted_queries
    first_row = i_block * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, counted_queries) - 1

    i_query = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_query = i_query < counted_queries  # [BLOCK_M]
    p_query, p_grad_output = head_pointer(query, i_batch, i_head), head_pointer(grad_output, i_batch, i_head)
    b_query = load_rows(p_query, query.row_stride, i_query, m_query, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    b_grad_output = load_rows(
        p_grad_output, grad_output.row_stride, i_query, m_query, V, BLOCK_V, True
    )  # [BLOCK_M, BLOCK_V]
    o_row = (i_batch * num_heads + i_head).to(tl.int64) * num_queries + i_query  # [BLOCK_M]
    b_lse = tl.load(p_row_lse + o_row, mask=m_query, other=float("inf"))  # [BLOCK_M]
    b_delta = tl.load(p_delta + o_row, mask=m_query, other=0.0)  # [BLOCK_M]
    b_row_hash = dropout_row_hash(modifiers, i_batch * num_heads + i_head, i_query)  # [BLOCK_M]
    slope, p_bias = head_biases(modifiers, i_batch, i_head, PRECISE)
    first_position = first_row + offset
    i_position = i_query + offset  # [BLOCK_M]
    i_key_head = i_head // GROUP
    b_grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if memory_key is not None:
        p_memory_key = head_pointer(memory_key, i_batch, i_key_head)
        p_memory_value = head_pointer(memory_value, i_batch, i_key_head)
        b_grad = _visit_keys(
            b_grad, b_query, b_grad_output, b_lse, b_delta, first_position, i_position, b_row_hash, p_memory_key,
            p_memory_value, memory_key.row_stride, memory_value.row_stride, 0, (0, num_memory, 0, 0, 0, 0),
            num_memory, 0, slope, p_bias, modifiers, D, V, BLOCK_D, BLOCK_V, PRECISION, BLOCK_N, True, True, False,
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
        full_end = tl.where(last_row < first_row, full_start, full_end)
        end = tl.where(last_row < first_row, 0, end)
    near_start, near_end = full_start, full_start
    if modifiers.distance_bias is not None:
        near_start, near_end = near_span(
            first_position, last_row + offset, full_start, full_end, modifiers.radius, BLOCK_N
        )
    cut = (start, tl.minimum(full_start, end), near_start, near_end, full_end, end)
    b_grad = _visit_keys(
        b_grad, b_query, b_grad_output, b_lse, b_delta, first_position, i_position, b_row_hash, p_key, p_value,
        key.row_stride, value.row_stride, p_mask, cut, counted_keys, num_memory, slope, p_bias, modifiers,
        D, V, BLOCK_D, BLOCK_V, PRECISION, BLOCK_N, True, False, False,
    )  # fmt: skip
    whole = (full_start, near_start, near_end, full_end, 0, 0)
    b_grad = _visit_keys(
        b_grad, b_query, b_grad_output, b_lse, b_delta, first_position, i_position, b_row_hash, p_key, p_value,
        key.row_stride, value.row_stride, p_mask, whole, counted_keys, num_memory, slope, p_bias, modifiers,
        D, V, BLOCK_D, BLOCK_V, PRECISION, BLOCK_N, False, False, modifiers.distance_bias is not None,
    )  # fmt: skip
    p_grad_query = head_pointer(grad_query, i_batch, i_head)
    store_rows(
        p_grad_query, grad_query.row_stride, i_query, i_query < num_queries, b_grad * modifiers.scale, D, BLOCK_D
    )


def backward(
    operands: Operands,
    options: Options,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Gradients of the operands, contiguous; see `operands.py`. `output` and `lse` are what `forward` gave."""
    query = operands.query
    size = max(query.shape[3], operands.value.shape[3])
    keys_table = BACKWARD_KEYS if operands.distance_bias is None else BACKWARD_KEYS_BIASED
    tables = BACKWARD_QUERY, keys_table, BACKWARD_DISTANCE
    for_query, for_keys, for_distance = (choose_config(table, 8 * query.element_size(), size) for table in tables)
    bent = modifiers(operands, options)
    with device_guard(query):
        row_lse, delta, grad_sinks = _prepare(operands, bent, output, lse, grad_output, grad_lse)
        common = operands, bent, grad_output, row_lse, delta
        grad_query = _query_gradient(*common, for_query)
        grad_key, grad_value = keys_gradient(*common, for_keys)
        grad_memory = (None, None) if operands.memory_key is None else memory_gradient(*common, for_keys)
        of_distance = distance_gradients(*common, wanted, for_distance) if any(wanted) else (None, None)
    return Gradients(grad_query, grad_key, grad_value, *of_distance, *grad_memory, grad_sinks)


def _prepare(operands, bent, output, lse, grad_output, grad_lse):
    """The rows' log-sum-exp for the kernels and delta, `[B, H, N]` float32, and the gradient of the sinks or None."""
    batch, heads, num_queries, value_size = output.shape
    config = choose_config(BACKWARD_PREPARE, 8 * output.element_size(), value_size)
    blocks = triton.cdiv(num_queries, config.blocks["BLOCK_M"])
    row_lse, delta = torch.empty_like(lse), torch.empty_like(lse)
    parts = None if bent.sinks is None else lse.new_empty(batch, heads, blocks, dtype=torch.float64)
    if lse.numel():
        flash_attention_backward_prepare_kernel[(blocks * heads * batch,)](
            rows(output),
            rows(grad_output),
            lse,
            None if grad_lse is None else grad_lse.contiguous(),
            row_lse,
            delta,
            parts,
            bent,
            num_queries,
            heads,
            V=value_size,
            BLOCK_V=block_size(value_size),
            **config.keywords(),
        )
    return row_lse, delta, None if parts is None else parts.sum((0, 2)).to(bent.sinks.dtype)


def _query_gradient(operands, bent, grad_output, row_lse, delta, config):
    query, key, value = operands.query, operands.key, operands.value
    batch, heads, num_queries, head_size = query.shape
    grad_query = query.new_empty(query.shape)
    if not grad_query.numel():
        return grad_query
    memory_key = shared_rows(operands.memory_key, batch)
    flash_attention_backward_query_kernel[(triton.cdiv(num_queries, config.blocks["BLOCK_M"]) * heads * batch,)](
        rows(query),
        rows(key),
        rows(value),
        memory_key,
        shared_rows(operands.memory_value, batch),
        rows(grad_output),
        rows(grad_query),
        row_lse,
        delta,
        bent,
        num_queries,
        key.shape[2],
        0 if memory_key is None else memory_key.data.shape[2],
        heads,
        GROUP=heads // key.shape[1],
        D=head_size,
        V=value.shape[3],
        BLOCK_D=block_size(head_size),
        BLOCK_V=block_size(value.shape[3]),
        PRECISION=dot_precision(query.dtype),
        **config.keywords(),
    )
    return grad_query
