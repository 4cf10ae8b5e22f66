"""Linear attention on GPUs, first half of the backward pass: gradients of the states, and of the values.

With the gradient `g` of the output, `δ_i = g_i·out_i`, the denominators `n_i`, and `r_i = exp(m₀ - m_i) / n_i`:

1. `_row_products` gives `δ`.
2. `_state_gradients` walks along a sequence from its end, as `_states` does from its start, and carries
   `dS ← exp(m₀ - m₁) dS + (r φ(q))ᵀ g` and `dz ← exp(m₀ - m₁) dz - Σ r δ φ(q)`, and writes them for each chunk.
3. `_value_gradients` is the mirror image of the forward pass: `dv = exp(s - m₁) φ(k) dS + Pᵀ g`, where `P` is the
   chunk's square of weights divided by the denominators, computed transposed from the start.
"""

import torch
from torch import Tensor

from ..backend import device_guard
from ..launch_config import choose_config
from .launch_plan import Chunks, MapTensors, operand_dtype, precision
from .launch_table import ROW_PRODUCTS, STATE_GRADIENTS, VALUE_GRADIENTS
from .triton_features import (
    exponential,
    load_features,
    load_keep,
    load_scales,
    load_tile,
    locate_chunk,
    locate_segment,
    to_operand,
    weigh,
    within,
)
from .triton_segments import carry, in_segments, scales_behind
from .triton_states import TRITON_DTYPES


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton path of linear_attention needs Triton") from error


@triton.jit
def _row_products(
    p_gradient, p_output, p_products, stride_batch, stride_head, stride_row, stride_column, length, heads, num_values,
    CHUNK: tl.constexpr, BLOCK_VALUES: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    chunks = tl.cdiv(length, CHUNK)
    i_head = (i_program // chunks) % heads
    i_batch = (i_program // chunks // heads).to(tl.int64)
    o_rows = (i_program % chunks).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    m_rows = o_rows < length
    o_vector = (i_batch * heads + i_head) * length
    p_gradient += i_batch * stride_batch + i_head.to(tl.int64) * stride_head
    p_output += o_vector * num_values
    b_sum = tl.zeros([CHUNK], dtype=tl.float32)
    for o_value in range(0, num_values, BLOCK_VALUES):
        o_values = o_value + tl.arange(0, BLOCK_VALUES)
        m_values = o_values < num_values
        b_gradient = load_tile(p_gradient, o_rows, m_rows, o_values, m_values, stride_row, stride_column, False)
        b_output = load_tile(p_output, o_rows, m_rows, o_values, m_values, num_values, 1, False)
        b_sum += tl.sum(b_gradient.to(tl.float32) * b_output.to(tl.float32), axis=1)  # [CHUNK]
    tl.store(p_products + o_vector + o_rows, b_sum, mask=m_rows)


def row_products(gradient: Tensor, output: Tensor) -> Tensor:
    """`Σ_v gradient · output` in float32: `[B, H, N]`; `output` is contiguous."""
    batch, heads, length, num_values = output.shape
    config = choose_config(ROW_PRODUCTS, output.element_size() * 8, num_values)
    products = output.new_empty(batch, heads, length, dtype=torch.float32)
    grid = (batch * heads * triton.cdiv(length, config.blocks["CHUNK"]),)
    if grid[0]:
        with device_guard(output):
            _row_products[grid](
                gradient, output, products, *gradient.stride(), length, heads, num_values, **config.keywords()
            )
    return products


# One segment is a case of its own to the compiler, without the arithmetic of several.
@triton.jit(do_not_specialize=["per_segment"])
def _state_gradients(
    p_query, p_gradient, p_products, p_reciprocals, p_running, p_normalizers, p_maxima, p_start_scale, p_end_scale,
    p_end_state, p_end_sum, p_states, p_sums, p_start_state, p_start_sum,
    stride_query_batch, stride_query_head, stride_query_row, stride_query_column,
    stride_gradient_batch, stride_gradient_head, stride_gradient_row, stride_gradient_column,
    p_high, p_low, p_bias, p_first, p_borders, length, chunks, segments, per_segment, heads, num_features, num_values,
    scale, epsilon, CHUNK: tl.constexpr, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, CAUSAL: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr,
    WHOLE: tl.constexpr, FUNCTION: tl.constexpr, HAS_PROJECTION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    value_tiles = tl.cdiv(num_values, BLOCK_VALUES)
    feature_tiles = tl.cdiv(num_features, BLOCK_FEATURES)
    i_value = i_program % value_tiles
    i_feature = (i_program // value_tiles) % feature_tiles
    i_head = (i_program // value_tiles // feature_tiles) % heads
    i_segment = i_program // value_tiles // feature_tiles // heads
    i_batch, i_first, num_chunks, o_start, o_end = locate_segment(
        i_segment, p_first, p_borders, length, chunks, segments, per_segment, CHUNK, PACKED
    )
    o_feature = i_feature * BLOCK_FEATURES
    o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
    m_features = within(o_features, num_features, WHOLE)
    o_values = i_value * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    m_values = o_values < num_values
    o_state = o_features[:, None] * num_values + o_values[None, :]  # [BLOCK_FEATURES, BLOCK_VALUES]
    m_state = m_features[:, None] & m_values[None, :]
    i_end = i_segment.to(tl.int64) * heads + i_head
    state_size = tl.cast(num_features, tl.int64) * num_values
    p_query += i_batch * stride_query_batch + i_head.to(tl.int64) * stride_query_head
    p_gradient += i_batch * stride_gradient_batch + i_head.to(tl.int64) * stride_gradient_head
    o_vector = (i_batch * heads + i_head) * length

    b_state = tl.load(p_end_state + i_end * state_size + o_state, mask=m_state, other=0.0)
    b_sum = tl.load(p_end_sum + i_end * num_features + o_features, mask=m_features, other=0.0)  # [BLOCK_FEATURES]
    maximum = tl.load(p_end_scale + i_end)
    for i_step in range(0, num_chunks):
        i_chunk = num_chunks - 1 - i_step
        o_rows = o_start + i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_rows = o_rows < o_end
        b_ratios = tl.load(p_reciprocals + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
        if CAUSAL:
            i_state = (i_first + i_chunk) * heads + i_head
            if KEEP:
                b_operand = to_operand(b_state, OPERAND, PRECISION)
                tl.store(p_states + i_state * state_size + o_state, b_operand, mask=m_state)
                if i_value == 0:
                    tl.store(p_sums + i_state * num_features + o_features, b_sum, mask=m_features)
            start = tl.load(p_maxima + i_state)
            b_running = tl.load(p_running + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
            b_ratios *= exponential(start - b_running)
            decay = exponential(start - maximum)
            b_state *= decay
            b_sum *= decay
            maximum = start
        b_ratios = tl.where(m_rows, b_ratios, 0.0)
        b_query = load_features(
            p_query, o_rows, m_rows, stride_query_row, stride_query_column, p_normalizers + o_vector, p_high, p_low,
            p_bias, o_feature, num_features, scale, epsilon, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, True, WHOLE,
            FUNCTION, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
        )  # fmt: skip
        b_query = b_query * b_ratios[None, :]  # [BLOCK_FEATURES, CHUNK]
        b_gradient = load_tile(
            p_gradient, o_rows, m_rows, o_values, m_values, stride_gradient_row, stride_gradient_column, False
        ).to(OPERAND)  # [CHUNK, BLOCK_VALUES]
        b_products = tl.load(p_products + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
        b_state += tl.dot(to_operand(b_query, OPERAND, PRECISION), b_gradient, input_precision=PRECISION)
        b_sum -= tl.sum(b_query * b_products[None, :], axis=1)

    if KEEP and not CAUSAL:
        tl.store(p_states + i_end * state_size + o_state, to_operand(b_state, OPERAND, PRECISION), mask=m_state)
        if i_value == 0:
            tl.store(p_sums + i_end * num_features + o_features, b_sum, mask=m_features)
        decay = exponential(tl.load(p_start_scale + i_end) - maximum)
        b_state *= decay
        b_sum *= decay
    tl.store(p_start_state + i_end * state_size + o_state, b_state, mask=m_state)
    if i_value == 0:
        tl.store(p_start_sum + i_end * num_features + o_features, b_sum, mask=m_features)


def state_gradients(
    query: Tensor,
    gradient: Tensor,
    tensors: MapTensors,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    maxima: Tensor,
    scales: tuple[Tensor, Tensor],
    of_end: tuple[Tensor, Tensor],
    chunks: Chunks,
    causal: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gradients of the sums after each chunk (`[total, H, …]`, or at the end alone), and of the initial sums.

    `rows` are the queries' row products, reciprocals of the denominators, running maxima and normalizers; `maxima`
    those before each chunk; `scales` of the initial and the final state; `of_end` the gradients of the final sums.
    """
    heads, num_features, num_values = of_end[0].shape[1:]
    config = choose_config(STATE_GRADIENTS, query.element_size() * 8, query.shape[-1])
    blocks = config.blocks
    tiles = triton.cdiv(num_features, blocks["BLOCK_FEATURES"]) * triton.cdiv(num_values, blocks["BLOCK_VALUES"])
    of_end = tuple(t.contiguous() for t in of_end)
    chunks = in_segments(chunks, heads * tiles, query, walks=2 if causal else 1)
    common = query, gradient, tensors, rows, maxima, config, tiles, causal
    if chunks.segments == 1:
        return _walk(of_end, scales, chunks, *common)
    if causal:
        decays, behind = scales_behind(maxima, scales[1], chunks)
    else:  # one scale for all queries: that of the final state
        decays = of_end[0].new_ones(chunks.sequences, chunks.segments, heads)
        behind = scales[1].repeat_interleave(chunks.segments, dim=0)
    nothing = [part.new_zeros(chunks.sequences * chunks.segments, *part.shape[1:]) for part in of_end]
    _, own = _walk(nothing, (behind, behind), chunks, *common, keep=False)
    weights = torch.ones_like(decays)
    of_start = tuple(carry(*parts, decays, weights, reverse=True) for parts in zip(of_end, own, strict=True))
    if not causal:  # everything is added up: what is left is to write it, and to take it to the start's scale
        return _walk(of_start, scales, chunks._replace(per_sequence=0, segments=1), *common)
    kept, _ = _walk(own, (behind, behind), chunks, *common)
    return kept, of_start


def _walk(of_end, scales, chunks, query, gradient, tensors, rows, maxima, config, tiles, causal, keep=True):
    """One launch, from the gradients behind each segment to those before it; `keep` writes those after the chunks."""
    end_state, end_sum = of_end
    heads, num_features, num_values = end_state.shape[1:]
    operand = operand_dtype(query.dtype)
    of_start = torch.empty_like(end_state), torch.empty_like(end_sum)
    total = (chunks.total if causal else chunks.sequences) if keep else 0
    kept = (
        end_state.new_empty(total, heads, num_features, num_values, dtype=operand),
        end_sum.new_empty(total, heads, num_features),
    )
    grid = (chunks.sequences * chunks.segments * heads * tiles,)
    if grid[0]:
        with device_guard(query):
            _state_gradients[grid](
                query,
                gradient,
                *rows,
                maxima,
                *scales,
                end_state,
                end_sum,
                *kept,
                *of_start,
                *query.stride(),
                *gradient.stride(),
                heads=heads,
                num_features=num_features,
                num_values=num_values,
                HEAD=query.shape[-1],
                CAUSAL=causal,
                KEEP=keep,
                WHOLE=num_features % config.blocks["BLOCK_FEATURES"] == 0,
                OPERAND=TRITON_DTYPES[operand],
                PRECISION=precision(query.dtype),
                **chunks.of_sequences(),
                **tensors.keywords(),
                **config.keywords(),
            )
    return kept, of_start


@triton.jit
def _value_gradients(
    p_query, p_key, p_gradient, p_mask, p_reciprocals, p_running, p_query_normalizers, p_key_normalizers, p_scales,
    p_end_scale, p_states, p_gradient_value,
    stride_query_batch, stride_query_head, stride_query_row, stride_query_column,
    stride_key_batch, stride_key_head, stride_key_row, stride_key_column,
    stride_gradient_batch, stride_gradient_head, stride_gradient_row, stride_gradient_column, stride_mask,
    p_high, p_low, p_bias, p_table, length, chunks, heads, num_features, num_values, scale, epsilon,
    CHUNK: tl.constexpr, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    WHOLE: tl.constexpr, FUNCTION: tl.constexpr, HAS_PROJECTION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
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
    p_gradient += i_batch * stride_gradient_batch + i_head.to(tl.int64) * stride_gradient_head
    o_vector = (i_batch * heads + i_head) * length
    i_state = (i_chunk.to(tl.int64) if CAUSAL else i_sequence) * heads + i_head
    p_states += i_state * num_features * num_values
    m_keep = load_keep(p_mask, i_batch, o_rows, m_rows, stride_mask, HAS_MASK)
    b_scales = load_scales(p_scales + o_vector, o_rows, m_keep, FUNCTION)  # [CHUNK]
    if CAUSAL:
        o_last = tl.minimum(o_start + CHUNK, o_end) - 1
        maximum = tl.load(p_running + o_vector + o_last, mask=o_start < o_end, other=0.0)
    else:
        maximum = tl.load(p_end_scale + i_state)

    b_gradient_value = tl.zeros([CHUNK, BLOCK_VALUES], dtype=tl.float32)
    b_weights = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)  # [key, query]
    for o_feature in range(0, num_features, BLOCK_FEATURES):
        b_key = load_features(
            p_key, o_rows, m_keep, stride_key_row, stride_key_column, p_key_normalizers + o_vector, p_high, p_low,
            p_bias, o_feature, num_features, scale, epsilon, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, False, WHOLE,
            FUNCTION, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
        )  # fmt: skip  # [CHUNK, BLOCK_FEATURES]
        b_key = to_operand(b_key, OPERAND, PRECISION)
        o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
        b_state = load_tile(
            p_states, o_features, within(o_features, num_features, WHOLE), o_values, m_values, num_values, 1, False
        )  # [BLOCK_FEATURES, BLOCK_VALUES]
        b_gradient_value = tl.dot(b_key, b_state, b_gradient_value, input_precision=PRECISION)
        if CAUSAL:
            b_query = load_features(
                p_query, o_rows, m_rows, stride_query_row, stride_query_column, p_query_normalizers + o_vector,
                p_high, p_low, p_bias, o_feature, num_features, scale, epsilon, HEAD, CHUNK, BLOCK_HEAD,
                BLOCK_FEATURES, True, WHOLE, FUNCTION, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
            )  # fmt: skip  # [BLOCK_FEATURES, CHUNK]
            b_query = to_operand(b_query, OPERAND, PRECISION)
            b_weights = tl.dot(b_key, b_query, b_weights, input_precision=PRECISION)

    b_to_end = tl.where(m_keep, exponential(b_scales - maximum), 0.0)  # [CHUNK]
    b_gradient_value *= b_to_end[:, None]
    if CAUSAL:
        b_running = tl.load(p_running + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
        b_ratios = tl.load(p_reciprocals + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
        o_place = tl.arange(0, CHUNK)
        m_visible = (o_place[:, None] <= o_place[None, :]) & m_keep[:, None] & m_rows[None, :]  # [key, query]
        b_weights = weigh(b_weights, b_scales[:, None], b_running[None, :], m_visible, FUNCTION) * b_ratios[None, :]
        b_gradient = load_tile(
            p_gradient, o_rows, m_rows, o_values, m_values, stride_gradient_row, stride_gradient_column, False
        ).to(OPERAND)  # [CHUNK, BLOCK_VALUES]
        b_gradient_value = tl.dot(
            to_operand(b_weights, OPERAND, PRECISION), b_gradient, b_gradient_value, input_precision=PRECISION
        )
    o_out = (o_vector + o_rows)[:, None] * num_values + o_values[None, :]
    m_out = m_rows[:, None] & m_values[None, :]
    tl.store(p_gradient_value + o_out, b_gradient_value.to(p_gradient_value.dtype.element_ty), mask=m_out)


def value_gradients(
    query: Tensor,
    key: Tensor,
    gradient: Tensor,
    tensors: MapTensors,
    mask: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor],
    found: tuple[Tensor, Tensor],
    end_scale: Tensor,
    states: Tensor,
    chunks: Chunks,
    causal: bool,
) -> Tensor:
    """Gradient of the values, `[B, H, K, V]` contiguous in the dtype of `key`.

    `rows` are the reciprocals of the queries' denominators, running maxima and normalizers; `found` the keys'
    normalizers and scales; `states` the gradients of the state after each chunk.
    """
    batch, heads, length, head_dim = key.shape
    num_features, num_values = states.shape[2:]
    config = choose_config(VALUE_GRADIENTS, key.element_size() * 8, head_dim)
    found_gradient = key.new_empty(batch, heads, length, num_values)
    grid = (chunks.total * heads * triton.cdiv(num_values, config.blocks["BLOCK_VALUES"]),)
    if grid[0]:
        with device_guard(key):
            _value_gradients[grid](
                query,
                key,
                gradient,
                mask,
                *rows,
                *found,
                end_scale,
                states,
                found_gradient,
                *query.stride(),
                *key.stride(),
                *gradient.stride(),
                0 if mask is None else mask.stride(0),
                heads=heads,
                num_features=num_features,
                num_values=num_values,
                HEAD=head_dim,
                CAUSAL=causal,
                HAS_MASK=mask is not None,
                WHOLE=num_features % config.blocks["BLOCK_FEATURES"] == 0,
                OPERAND=TRITON_DTYPES[operand_dtype(key.dtype)],
                PRECISION=precision(key.dtype),
                **chunks.of_each(),
                **tensors.keywords(),
                **config.keywords(),
            )
    return found_gradient
