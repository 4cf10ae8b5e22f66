"""Linear attention on GPUs, forward. Features are computed in tiles where they are used and never stored.

`triton_states.py` gives the sums `S`, `z` before each chunk and the running maximum `m₀` of the keys' scales there.
Here one program for a chunk of queries and a tile of the values

1. computes tiles of `φ(q)` and `φ(k)` and adds up `φ(q) S`, `φ(q)·z` and the chunk's square `A = φ(q) φ(k)ᵀ`;
2. takes the running maximum `m_i` of each row and weighs `A` by `exp(s_j - m_i)` for `j ≤ i`, zero elsewhere;
3. adds `exp(m₀ - m_i) φ(q) S + A v`, and divides by the sum of the weights, formed alike.

The square of one chunk is the only quadratic part. All exponents that count are at most 0, and row i reads nothing of
a later row. Bidirectional attention is the first line alone, with the state after the last key.
"""

import torch
from torch import Tensor

from ..backend import device_guard
from ..launch_config import choose_config
from .feature_maps import FeatureMap
from .launch_plan import Chunks, MapTensors, operand_dtype, precision
from .launch_table import CHUNKS, OUTPUTS
from .state import LinearAttentionState
from .triton_features import (
    exponential,
    load_features,
    load_keep,
    load_scales,
    load_tile,
    locate_chunk,
    running_maximum,
    to_operand,
    weigh,
    within,
)
from .triton_states import TRITON_DTYPES, normalizers, states


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton path of linear_attention needs Triton") from error


LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _outputs(
    p_query, p_key, p_value, p_mask, p_query_normalizers, p_key_normalizers, p_scales, p_states, p_sums, p_maxima,
    p_output, p_reciprocals, p_running, stride_query_batch, stride_query_head, stride_query_row,
    stride_query_column, stride_key_batch, stride_key_head, stride_key_row, stride_key_column, stride_value_batch,
    stride_value_head, stride_value_row, stride_value_column, stride_mask, p_high, p_low, p_bias, p_table, length,
    chunks, heads, num_features, num_values, scale, epsilon, CHUNK: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr, BLOCK_VALUES: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr, FUNCTION: tl.constexpr,
    HAS_PROJECTION: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    value_tiles = tl.cdiv(num_values, BLOCK_VALUES)
    i_value = i_program % value_tiles
    i_head = (i_program // value_tiles) % heads
    i_chunk = i_program // value_tiles // heads
    i_batch, i_sequence, o_start, o_end = locate_chunk(i_chunk, p_table, length, chunks, CHUNK, PACKED)
    o_rows = o_start + tl.arange(0, CHUNK)
    m_rows = o_rows < o_end
    o_values = i_value * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    m_values = o_values < num_values
    p_query += i_batch * stride_query_batch + i_head.to(tl.int64) * stride_query_head
    p_key += i_batch * stride_key_batch + i_head.to(tl.int64) * stride_key_head
    p_value += i_batch * stride_value_batch + i_head.to(tl.int64) * stride_value_head
    o_vector = (i_batch * heads + i_head) * length
    i_state = (i_chunk.to(tl.int64) if CAUSAL else i_sequence) * heads + i_head
    p_states += i_state * num_features * num_values
    p_sums += i_state * num_features
    m_keep = load_keep(p_mask, i_batch, o_rows, m_rows, stride_mask, HAS_MASK)

    b_numerator = tl.zeros([CHUNK, BLOCK_VALUES], dtype=tl.float32)
    b_denominator = tl.zeros([CHUNK], dtype=tl.float32)
    b_weights = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)  # [query, key]
    for o_feature in range(0, num_features, BLOCK_FEATURES):
        b_query = load_features(
            p_query, o_rows, m_rows, stride_query_row, stride_query_column, p_query_normalizers + o_vector, p_high,
            p_low, p_bias, o_feature, num_features, scale, epsilon, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, False,
            WHOLE, FUNCTION, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
        )  # fmt: skip  # [CHUNK, BLOCK_FEATURES]
        b_query = to_operand(b_query, OPERAND, PRECISION)
        o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
        m_features = within(o_features, num_features, WHOLE)
        b_state = load_tile(p_states, o_features, m_features, o_values, m_values, num_values, 1, False)
        b_state = to_operand(b_state, OPERAND, PRECISION)
        b_numerator = tl.dot(b_query, b_state, b_numerator, input_precision=PRECISION)
        b_sum = tl.load(p_sums + o_features, mask=m_features, other=0.0)  # [BLOCK_FEATURES]
        b_denominator += tl.sum(b_query.to(tl.float32) * b_sum[None, :], axis=1)
        if CAUSAL:
            b_key = load_features(
                p_key, o_rows, m_keep, stride_key_row, stride_key_column, p_key_normalizers + o_vector, p_high,
                p_low, p_bias, o_feature, num_features, scale, epsilon, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES,
                True, WHOLE, FUNCTION, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
            )  # fmt: skip  # [BLOCK_FEATURES, CHUNK]
            b_key = to_operand(b_key, OPERAND, PRECISION)
            b_weights = tl.dot(b_query, b_key, b_weights, input_precision=PRECISION)

    if CAUSAL:
        b_scales = load_scales(p_scales + o_vector, o_rows, m_keep, FUNCTION)  # [CHUNK]
        o_place = tl.arange(0, CHUNK)
        m_visible = (o_place[None, :] <= o_place[:, None]) & m_keep[None, :]  # [query, key]
        maximum = tl.load(p_maxima + i_state)
        b_running = tl.maximum(running_maximum(b_scales), maximum)  # [CHUNK]
        b_weights = weigh(b_weights, b_scales[None, :], b_running[:, None], m_visible, FUNCTION)
        b_weights = to_operand(b_weights, OPERAND, PRECISION)
        b_carried = exponential(maximum - b_running)  # [CHUNK]
        b_values = load_tile(
            p_value, o_rows, m_keep, o_values, m_values, stride_value_row, stride_value_column, False
        ).to(OPERAND)  # [CHUNK, BLOCK_VALUES]
        b_numerator = tl.dot(b_weights, b_values, b_numerator * b_carried[:, None], input_precision=PRECISION)
        b_denominator = b_denominator * b_carried + tl.sum(b_weights.to(tl.float32), axis=1)
        if i_value == 0:
            tl.store(p_running + o_vector + o_rows, b_running, mask=m_rows)
    b_denominator = tl.where(b_denominator == 0, 1.0, b_denominator)
    if i_value == 0:
        # What is not finite would make a gradient of zero no number: one by a subnormal number is held below that.
        b_reciprocals = 1.0 / b_denominator
        b_reciprocals = tl.where(b_reciprocals == float("inf"), LARGEST, b_reciprocals)
        b_reciprocals = tl.where(b_reciprocals == float("-inf"), -LARGEST, b_reciprocals)
        tl.store(p_reciprocals + o_vector + o_rows, b_reciprocals, mask=m_rows)
    o_output = (o_vector + o_rows)[:, None] * num_values + o_values[None, :]  # [CHUNK, BLOCK_VALUES]
    b_output = b_numerator / b_denominator[:, None]  # one over a subnormal denominator would be infinite
    tl.store(p_output + o_output, b_output.to(p_output.dtype.element_ty), mask=m_rows[:, None] & m_values[None, :])


def outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: MapTensors,
    mask: Tensor | None,
    states: LinearAttentionState,
    chunks: Chunks,
    query_normalizers: Tensor,
    found: tuple[Tensor, Tensor],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output `[B, H, N, V]` like the values, one by the denominators and, if `causal`, running maxima `[B, H, N]`.

    `states` are those before each chunk (`causal`) or the final ones; the rest is as in `states`.
    """
    batch, heads, length, head_dim = query.shape
    num_features, num_values = states.key_value.shape[2:]
    config = choose_config(OUTPUTS, query.element_size() * 8, head_dim)
    output = query.new_empty(batch, heads, length, num_values)
    reciprocals = query.new_empty(batch, heads, length, dtype=torch.float32)
    running = torch.empty_like(reciprocals) if causal else reciprocals.new_empty(0)
    grid = (chunks.total * heads * triton.cdiv(num_values, config.blocks["BLOCK_VALUES"]),)
    if grid[0]:
        with device_guard(query):
            _outputs[grid](
                query,
                key,
                value,
                mask if causal else None,
                query_normalizers,
                *found,
                *states,
                output,
                reciprocals,
                running,
                *query.stride(),
                *key.stride(),
                *value.stride(),
                0 if mask is None else mask.stride(0),
                heads=heads,
                num_features=num_features,
                num_values=num_values,
                HEAD=head_dim,
                CAUSAL=causal,
                HAS_MASK=mask is not None and causal,
                WHOLE=num_features % config.blocks["BLOCK_FEATURES"] == 0,
                OPERAND=TRITON_DTYPES[operand_dtype(query.dtype)],
                PRECISION=precision(query.dtype),
                **chunks.of_each(),
                **tensors.keywords(),
                **config.keywords(),
            )
    return output, reciprocals, running


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    mask: Tensor | None,
    state: LinearAttentionState,
    causal: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, LinearAttentionState, tuple[Tensor, ...]]:
    """Output, final state, and what the backward pass needs besides: five float32 tensors of one number for each row.

    These are the queries' normalizers, the keys' normalizers and scales (empty for pointwise maps), one by the
    denominators, and running maxima (empty unless `causal`).
    """
    tensors = MapTensors.of(feature_map, query)
    mask = None if mask is None else (mask != 0).contiguous()
    size = chunk_size(query)
    of_queries = Chunks.of(query.shape[0], query.shape[2], size, cu_seqlens)
    of_keys = of_queries if causal else Chunks.of(key.shape[0], key.shape[2], size, cu_seqlens)
    query_normalizers, _ = normalizers(query, tensors, None, is_key=False)
    found = normalizers(key, tensors, mask, is_key=True)
    end, kept = states(key, value, tensors, mask, state, of_keys, found, keep_states=causal)
    read = kept if causal else end
    output, reciprocals, running = outputs(
        query, key, value, tensors, mask, read, of_queries, query_normalizers, found, causal
    )
    return output, end, (query_normalizers, *found, reciprocals, running)


def chunk_size(query: Tensor) -> int:
    """Rows in a chunk, for all kernels of a call."""
    return choose_config(CHUNKS, query.element_size() * 8, query.shape[-1])
