"""The gradients of ALiBi slopes and of the distance bias: sums of the tiles' gradients along their diagonals.

One program per band of distances: as its rows move on, its keys move with them, so every element of the tile that it
adds up keeps its distance. Only at the end are diagonals summed, once per program. No atomics, and no workspace beyond
one number per head and distance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch_config import LaunchConfig
from .operands import Operands, Wanted
from .triton_tiles import (
    Modifiers,
    batch_lengths,
    block_size,
    dot_precision,
    dropout_row_hash,
    exponential,
    head_biases,
    head_pointer,
    in_view,
    kept,
    load_rows,
    rows,
    tile_gradient,
    tile_logits,
)


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels of flash_attention need Triton") from error


@triton.jit
def flash_attention_backward_distance_kernel(
    query,
    key,
    value,
    grad_output,
    p_row_lse,
    p_delta,
    p_sums,
    modifiers,
    num_queries,
    num_keys,
    num_memory,
    num_heads,
    num_bands,
    lowest,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: bands · heads · batch. Needs BLOCK_M <= BLOCK_N.

    A band's tiles begin `lowest + band · BLOCK_N` behind their first row's position. `p_sums` `[B, H, bands, 2,
    BLOCK_N]`: for each band the sums of the distances from its own on, and what belongs to the band before it.
    """
    PRECISE: tl.constexpr = query.data.dtype.element_ty == tl.float32
    i_program = tl.program_id(0)
    i_band = i_program % num_bands
    i_head = i_program // num_bands % num_heads
    i_batch = i_program // num_bands // num_heads
    counted_queries, counted_keys = batch_lengths(modifiers, i_batch, num_queries, num_keys)
    offset = counted_keys - counted_queries
    band = lowest + i_band * BLOCK_N
    i_key_head = i_head // GROUP
    p_query, p_grad_output = head_pointer(query, i_batch, i_head), head_pointer(grad_output, i_batch, i_head)
    p_key, p_value = head_pointer(key, i_batch, i_key_head), head_pointer(value, i_batch, i_key_head)
    slope, p_bias = head_biases(modifiers, i_batch, i_head, PRECISE)
    o_row = (i_batch * num_heads + i_head).to(tl.int64) * num_queries

    # Blocks of rows whose keys, `first_row + offset + band` and on, are neither all before nor all behind the line.
    start = tl.maximum(-(offset + band + BLOCK_N - 1), 0) // BLOCK_M * BLOCK_M
    end = tl.maximum(tl.minimum(counted_keys - offset - band, counted_queries), 0)
    if modifiers.left is not None:
        end = tl.where(band + BLOCK_N - 1 < -modifiers.left, 0, end)
    if modifiers.right is not None:
        end = tl.where(band - BLOCK_M + 1 > modifiers.right, 0, end)
    i_row, i_column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i_distance = band + i_column[None, :] - i_row[:, None]  # [BLOCK_M, BLOCK_N]
    m_view = in_view(i_distance, modifiers)  # [BLOCK_M, BLOCK_N]
    b_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_row in tl.range(start, end, BLOCK_M):
        i_query = first_row + i_row  # [BLOCK_M]
        m_query = i_query < counted_queries  # [BLOCK_M]
        i_key = first_row + offset + band + i_column  # [BLOCK_N]
        m_key = (i_key >= 0) & (i_key < counted_keys)  # [BLOCK_N]
        if modifiers.key_mask is not None:
            p_mask = modifiers.key_mask + i_batch.to(tl.int64) * modifiers.mask_stride
            m_key = m_key & (tl.load(p_mask + i_key, mask=m_key, other=0) != 0)
        b_query = load_rows(p_query, query.row_stride, i_query, m_query, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
        b_key = load_rows(p_key, key.row_stride, i_key, m_key, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
        b_products = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        b_logits, b_tanh = tile_logits(
            b_products, i_distance, 0.0, modifiers, slope, 0.0, p_bias, False, False, False, PRECISE
        )
        b_logits = tl.where(m_view & m_key[None, :], b_logits, float("-inf"))
        b_lse = tl.load(p_row_lse + o_row + i_query, mask=m_query, other=float("inf"))  # [BLOCK_M]
        b_delta = tl.load(p_delta + o_row + i_query, mask=m_query, other=0.0)  # [BLOCK_M]
        b_weights = exponential(b_logits - b_lse[:, None], PRECISE)  # [BLOCK_M, BLOCK_N]
        b_grad_output = load_rows(
            p_grad_output, grad_output.row_stride, i_query, m_query, V, BLOCK_V, True
        )  # [BLOCK_M, BLOCK_V]
        b_value = load_rows(p_value, value.row_stride, i_key, m_key, V, BLOCK_V, True)  # [BLOCK_N, BLOCK_V]
        b_grad_weights = tl.dot(b_grad_output, tl.trans(b_value), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if modifiers.seed is not None:
            b_row_hash = dropout_row_hash(modifiers, i_batch * num_heads + i_head, i_query)  # [BLOCK_M]
            m_kept = kept(b_row_hash[:, None], (num_memory + i_key)[None, :], modifiers)  # [BLOCK_M, BLOCK_N]
            b_grad_weights = tl.where(m_kept, b_grad_weights * modifiers.keep_scale, 0.0)
        b_total += tile_gradient(b_weights, b_grad_weights, b_tanh, b_delta[:, None], modifiers)

    # Each row is turned by its number, so that columns become diagonals; what wraps around is BLOCK_N less far.
    i_turned = i_row[:, None] + i_column[None, :]  # [BLOCK_M, BLOCK_N]
    b_turned = tl.gather(b_total, i_turned % BLOCK_N, 1)  # [BLOCK_M, BLOCK_N]
    m_own = i_turned < BLOCK_N  # [BLOCK_M, BLOCK_N]
    p_band = p_sums + i_program.to(tl.int64) * (2 * BLOCK_N) + i_column  # [BLOCK_N]
    tl.store(p_band, tl.sum(tl.where(m_own, b_turned, 0.0), 0))
    tl.store(p_band + BLOCK_N, tl.sum(tl.where(m_own, 0.0, b_turned), 0))


def distance_gradients(
    operands: Operands,
    bent: Modifiers,
    grad_output: Tensor,
    row_lse: Tensor,
    delta: Tensor,
    wanted: Wanted,
    config: LaunchConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of slopes and distance bias, like them, or None where not wanted."""
    query, key, value = operands.query, operands.key, operands.value
    batch, heads, num_queries, head_size = query.shape
    num_keys, value_size = value.shape[2:]
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    assert block_m <= block_n, f"BLOCK_M must be at most BLOCK_N, got {config.blocks}"
    before = triton.cdiv(num_keys, block_n)
    bands = before + triton.cdiv(num_queries + block_m, block_n)
    sums = row_lse.new_empty(batch, heads, bands, 2, block_n)
    lowest = -before * block_n
    if sums.numel():
        flash_attention_backward_distance_kernel[(bands * heads * batch,)](
            rows(query),
            rows(key),
            rows(value),
            rows(grad_output),
            row_lse,
            delta,
            sums,
            bent,
            num_queries,
            num_keys,
            0 if operands.memory_key is None else operands.memory_key.shape[2],
            heads,
            bands,
            lowest,
            GROUP=heads // key.shape[1],
            D=head_size,
            V=value_size,
            BLOCK_D=block_size(head_size),
            BLOCK_V=block_size(value_size),
            PRECISION=dot_precision(query.dtype),
            **config.keywords(),
        )
    # [B, H, distances]; the first band has nothing that belongs before it.
    by_distance = torch.cat([sums[:, :, :-1, 0] + sums[:, :, 1:, 1], sums[:, :, -1:, 0]], 2).flatten(2)
    slopes, bias = operands.alibi_slopes, operands.distance_bias
    grad_slopes = _slopes_gradient(by_distance, lowest, slopes) if wanted.alibi_slopes else None
    grad_bias = _bias_gradient(by_distance.sum(0), lowest, bias) if wanted.distance_bias else None
    return grad_slopes, grad_bias


def _slopes_gradient(by_distance, lowest, slopes):
    distance = torch.arange(lowest, lowest + by_distance.shape[2], device=by_distance.device, dtype=torch.float32)
    grad = -(by_distance * distance.abs()).sum(2)
    return (grad if slopes.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)).to(slopes.dtype)


def _bias_gradient(by_distance, lowest, bias):
    """`[H, distances]` summed into the entries: by slices, since an indexed sum has another order in every run."""
    radius = bias.shape[1] // 2
    first = -radius - lowest  # where distance -radius stands, before and after the padding
    missing = max(0, radius - lowest + 1 - by_distance.shape[1])
    padded = F.pad(by_distance, (max(0, -first), missing))
    first = max(0, first)
    grad = padded[:, first : first + 2 * radius + 1].clone()
    grad[:, 0] += padded[:, :first].sum(1)
    grad[:, -1] += padded[:, first + 2 * radius + 1 :].sum(1)
    return (grad if bias.shape[0] == grad.shape[0] else grad.sum(0, keepdim=True)).to(bias.dtype)
