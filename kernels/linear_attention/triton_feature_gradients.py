"""Linear attention on GPUs, second half of the backward pass: gradients of queries, keys, projection and bias.

One program for a chunk

1. forms the gradient of the chunk's square, `dA_ij = (g_i·v_j - δ_i) exp(s_j - m_i) / n_i` for `j ≤ i`, and its
   transpose;
2. for each tile of features computes `φ(q)`, `φ(k)` and their gradients,
   `dφ(q) = dA φ(k) + r (g Sᵀ - δ z)` and `dφ(k) = dAᵀ φ(q) + exp(s - m₁) (v dSᵀ + dz)`;
3. goes through the map to the logits. For an exponential map that is `p ∘ (dφ + ε Σ_f dφ)` with `p = φ - ε`, for
   queries because their factor is free, for keys because their scale has the gradient `Σ_f φ_f dφ_f`. The sum over all
   features comes first, without features: those of a key or query sum to `1 + Mε`;
4. adds up `dq` and `dk` over the tiles, and, where wanted, the gradients of projection and bias in a slot of its own.
"""

from torch import Tensor

from ..backend import device_guard, multiprocessor_count
from ..launch_config import choose_config
from .feature_maps import EXPONENTIAL
from .launch_plan import Chunks, MapTensors, operand_dtype, precision
from .launch_table import FEATURE_GRADIENTS
from .triton_features import (
    apply_map,
    derivative_of_map,
    load_keep,
    load_logits,
    load_scales,
    load_tile,
    locate_chunk,
    to_operand,
    weigh,
)
from .triton_states import TRITON_DTYPES


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton path of linear_attention needs Triton") from error


@triton.jit
def _through_map(b_logits, b_features, b_gradient, b_floor, epsilon, m_logits, FUNCTION: tl.constexpr):
    """Gradient of the logits from that of the features, all `[CHUNK, BLOCK_FEATURES]`; `b_floor` `[CHUNK]`."""
    if FUNCTION == "exponential":
        b_gradient = (b_gradient + b_floor[:, None]) * (b_features - epsilon)
    else:
        b_gradient = b_gradient * derivative_of_map(b_logits, FUNCTION)
    # Chosen, not multiplied: a chunk without rows has no state, and there stands what happens to stand there.
    return tl.where(m_logits, b_gradient, 0.0)


@triton.jit
def _feature_gradients(
    p_query, p_key, p_value, p_gradient, p_mask, p_products, p_denominators, p_running, p_query_normalizers,
    p_key_normalizers, p_scales, p_maxima, p_end_scale, p_states, p_sums, p_gradient_states, p_gradient_sums,
    p_gradient_query, p_gradient_key, p_gradient_projection, p_gradient_bias,
    stride_query_batch, stride_query_head, stride_query_row, stride_query_column,
    stride_key_batch, stride_key_head, stride_key_row, stride_key_column,
    stride_value_batch, stride_value_head, stride_value_row, stride_value_column,
    stride_gradient_batch, stride_gradient_head, stride_gradient_row, stride_gradient_column, stride_mask,
    p_high, p_low, p_bias, p_table, length, chunks, total, steps, heads, num_features, scale, epsilon,
    CHUNK: tl.constexpr, HEAD: tl.constexpr, VALUES: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_OUT: tl.constexpr, CAUSAL: tl.constexpr,
    WITH_QUERY: tl.constexpr, WITH_KEY: tl.constexpr, WITH_PROJECTION: tl.constexpr, WITH_BIAS: tl.constexpr,
    HAS_FLOOR: tl.constexpr, SUBTRACT_NORM: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    FUNCTION: tl.constexpr, HAS_PROJECTION: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    out_tiles = tl.cdiv(HEAD, BLOCK_OUT) if HAS_PROJECTION else 1
    i_out = i_program % out_tiles
    i_head = (i_program // out_tiles) % heads
    i_group = i_program // out_tiles // heads
    o_out = i_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)  # the columns of the gradients that this program adds up
    m_out = o_out < HEAD
    i_slot = i_group.to(tl.int64) * heads + i_head
    p_gradient_projection += i_slot * num_features * HEAD
    p_gradient_bias += i_slot * num_features

    for i_step in range(0, tl.minimum(steps, total - i_group * steps)):
        i_chunk = i_group * steps + i_step
        i_batch, i_sequence, o_start, o_end = locate_chunk(i_chunk, p_table, length, chunks, CHUNK, PACKED)
        o_rows = o_start + tl.arange(0, CHUNK)
        m_rows = o_rows < o_end
        p_q = p_query + i_batch * stride_query_batch + i_head.to(tl.int64) * stride_query_head
        p_k = p_key + i_batch * stride_key_batch + i_head.to(tl.int64) * stride_key_head
        p_v = p_value + i_batch * stride_value_batch + i_head.to(tl.int64) * stride_value_head
        p_g = p_gradient + i_batch * stride_gradient_batch + i_head.to(tl.int64) * stride_gradient_head
        o_vector = (i_batch * heads + i_head) * length
        i_state = (i_chunk.to(tl.int64) if CAUSAL else i_sequence) * heads + i_head
        p_s = p_states + i_state * num_features * VALUES
        p_ds = p_gradient_states + i_state * num_features * VALUES

        if WITH_QUERY:
            b_ratios = 1.0 / tl.load(p_denominators + o_vector + o_rows, mask=m_rows, other=1.0)  # [CHUNK]
            b_products = tl.load(p_products + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
            b_query_floor = tl.zeros([CHUNK], dtype=tl.float32)
            b_carried = b_ratios
            if CAUSAL:
                b_running = tl.load(p_running + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
                b_carried = b_ratios * tl.exp(tl.load(p_maxima + i_state) - b_running)
            b_carried = tl.where(m_rows, b_carried, 0.0)
            b_gradient_query = tl.zeros([CHUNK, BLOCK_OUT], dtype=tl.float32)
        if WITH_KEY:
            m_keep = load_keep(p_mask, i_batch, o_rows, m_rows, stride_mask, HAS_MASK)
            b_scales = load_scales(p_scales + o_vector, o_rows, m_keep, FUNCTION)  # [CHUNK]
            if CAUSAL:
                o_last = tl.minimum(o_start + CHUNK, o_end) - 1
                maximum = tl.load(p_running + o_vector + o_last, mask=o_start < o_end, other=0.0)
            else:
                maximum = tl.load(p_end_scale + i_state)
            b_to_end = tl.where(m_keep, tl.exp(b_scales - maximum), 0.0)  # [CHUNK]
            b_key_floor = tl.zeros([CHUNK], dtype=tl.float32)
            b_gradient_key = tl.zeros([CHUNK, BLOCK_OUT], dtype=tl.float32)
            b_gradient_norm = tl.zeros([CHUNK], dtype=tl.float32)

        if CAUSAL:
            b_square = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)  # [query, key]
            b_transposed = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)  # [key, query]
            for o_value in tl.static_range(0, VALUES, BLOCK_VALUES):
                o_values = o_value + tl.arange(0, BLOCK_VALUES)
                m_values = o_values < VALUES
                b_left = load_tile(
                    p_g, o_rows, m_rows, o_values, m_values, stride_gradient_row, stride_gradient_column, False
                ).to(OPERAND)  # [CHUNK, BLOCK_VALUES]
                b_right = load_tile(
                    p_v, o_rows, m_keep, o_values, m_values, stride_value_row, stride_value_column, True
                ).to(OPERAND)  # [BLOCK_VALUES, CHUNK]
                b_square = tl.dot(b_left, b_right, b_square, input_precision=PRECISION)
                b_left = load_tile(
                    p_v, o_rows, m_keep, o_values, m_values, stride_value_row, stride_value_column, False
                ).to(OPERAND)  # [CHUNK, BLOCK_VALUES]
                b_right = load_tile(
                    p_g, o_rows, m_rows, o_values, m_values, stride_gradient_row, stride_gradient_column, True
                ).to(OPERAND)  # [BLOCK_VALUES, CHUNK]
                b_transposed = tl.dot(b_left, b_right, b_transposed, input_precision=PRECISION)
            o_place = tl.arange(0, CHUNK)
            m_visible = (o_place[None, :] <= o_place[:, None]) & m_keep[None, :] & m_rows[:, None]  # [query, key]
            b_square = (b_square - b_products[:, None]) * b_ratios[:, None]
            b_square = weigh(b_square, b_scales[None, :], b_running[:, None], m_visible, FUNCTION)
            m_visible = (o_place[:, None] <= o_place[None, :]) & m_keep[:, None] & m_rows[None, :]  # [key, query]
            b_transposed = (b_transposed - b_products[None, :]) * b_ratios[None, :]
            b_transposed = weigh(b_transposed, b_scales[:, None], b_running[None, :], m_visible, FUNCTION)

        if HAS_FLOOR:
            # The sums over all features, of which every tile needs a part.
            sum_of_sums = 0.0
            sum_of_gradients = 0.0
            for o_value in tl.static_range(0, VALUES, BLOCK_VALUES):
                o_values = o_value + tl.arange(0, BLOCK_VALUES)
                m_values = o_values < VALUES
                b_states = tl.zeros([BLOCK_VALUES], dtype=tl.float32)
                b_gradients = tl.zeros([BLOCK_VALUES], dtype=tl.float32)
                for o_feature in range(0, num_features, BLOCK_FEATURES):
                    o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
                    m_features = o_features < num_features
                    if WITH_QUERY:
                        b_part = load_tile(p_s, o_features, m_features, o_values, m_values, VALUES, 1, False)
                        b_states += tl.sum(b_part.to(tl.float32), axis=0)
                        if o_value == 0:
                            b_total = tl.load(p_sums + i_state * num_features + o_features, mask=m_features, other=0.0)
                            sum_of_sums += tl.sum(b_total, axis=0)
                    if WITH_KEY:
                        b_part = load_tile(p_ds, o_features, m_features, o_values, m_values, VALUES, 1, False)
                        b_gradients += tl.sum(b_part.to(tl.float32), axis=0)
                        if o_value == 0:
                            o_z = i_state * num_features + o_features
                            b_total = tl.load(p_gradient_sums + o_z, mask=m_features, other=0.0)
                            sum_of_gradients += tl.sum(b_total, axis=0)
                if WITH_QUERY:
                    b_rows = load_tile(
                        p_g, o_rows, m_rows, o_values, m_values, stride_gradient_row, stride_gradient_column, False
                    ).to(tl.float32)  # [CHUNK, BLOCK_VALUES]
                    b_query_floor += tl.sum(b_rows * b_states[None, :], axis=1)
                if WITH_KEY:
                    b_rows = load_tile(
                        p_v, o_rows, m_keep, o_values, m_values, stride_value_row, stride_value_column, False
                    ).to(tl.float32)  # [CHUNK, BLOCK_VALUES]
                    b_key_floor += tl.sum(b_rows * b_gradients[None, :], axis=1)
            whole = 1.0 + num_features * epsilon
            if WITH_QUERY:
                b_query_floor = b_carried * (b_query_floor - b_products * sum_of_sums)
                if CAUSAL:
                    b_query_floor += whole * tl.sum(b_square, axis=1)
                b_query_floor *= epsilon
            if WITH_KEY:
                b_key_floor = b_to_end * (b_key_floor + sum_of_gradients)
                if CAUSAL:
                    b_key_floor += whole * tl.sum(b_transposed, axis=1)
                b_key_floor *= epsilon
        if CAUSAL:
            b_square = to_operand(b_square, OPERAND, PRECISION)
            b_transposed = to_operand(b_transposed, OPERAND, PRECISION)

        for o_feature in range(0, num_features, BLOCK_FEATURES):
            o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
            m_features = o_features < num_features
            if HAS_PROJECTION:  # [BLOCK_FEATURES, BLOCK_OUT]
                b_projection = load_tile(p_high, o_features, m_features, o_out, m_out, HEAD, 1, False).to(OPERAND)
            if WITH_QUERY:
                b_query_logits = load_logits(
                    p_q, o_rows, m_rows, stride_query_row, stride_query_column, p_high, p_low, p_bias, o_feature,
                    num_features, scale, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, False, HAS_PROJECTION, HAS_BIAS,
                    SPLIT, PRECISION,
                )  # fmt: skip  # [CHUNK, BLOCK_FEATURES]
                b_normalizer = tl.zeros([CHUNK], dtype=tl.float32)
                if FUNCTION == "exponential":
                    b_normalizer = tl.load(p_query_normalizers + o_vector + o_rows, mask=m_rows, other=0.0)
                b_query = apply_map(b_query_logits, b_normalizer[:, None], m_features[None, :], epsilon, FUNCTION)
            if WITH_KEY:
                b_key_logits = load_logits(
                    p_k, o_rows, m_keep, stride_key_row, stride_key_column, p_high, p_low, p_bias, o_feature,
                    num_features, scale, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, False, HAS_PROJECTION, HAS_BIAS,
                    SPLIT, PRECISION,
                )  # fmt: skip  # [CHUNK, BLOCK_FEATURES]
                b_normalizer = tl.zeros([CHUNK], dtype=tl.float32)
                if FUNCTION == "exponential":
                    b_normalizer = tl.load(p_key_normalizers + o_vector + o_rows, mask=m_keep, other=0.0)
                b_key = apply_map(b_key_logits, b_normalizer[:, None], m_features[None, :], epsilon, FUNCTION)

            if WITH_QUERY:
                b_gradient = tl.zeros([CHUNK, BLOCK_FEATURES], dtype=tl.float32)
                for o_value in tl.static_range(0, VALUES, BLOCK_VALUES):
                    o_values = o_value + tl.arange(0, BLOCK_VALUES)
                    m_values = o_values < VALUES
                    b_g = load_tile(
                        p_g, o_rows, m_rows, o_values, m_values, stride_gradient_row, stride_gradient_column, False
                    ).to(OPERAND)  # [CHUNK, BLOCK_VALUES]
                    b_s = load_tile(p_s, o_features, m_features, o_values, m_values, VALUES, 1, True)
                    b_s = to_operand(b_s, OPERAND, PRECISION)
                    b_gradient = tl.dot(b_g, b_s, b_gradient, input_precision=PRECISION)
                b_z = tl.load(p_sums + i_state * num_features + o_features, mask=m_features, other=0.0)
                b_gradient = (b_gradient - b_products[:, None] * b_z[None, :]) * b_carried[:, None]
                if CAUSAL:
                    b_gradient = tl.dot(
                        b_square, to_operand(b_key, OPERAND, PRECISION), b_gradient, input_precision=PRECISION
                    )
                b_gradient = _through_map(
                    b_query_logits,
                    b_query,
                    b_gradient,
                    b_query_floor,
                    epsilon,
                    m_rows[:, None] & m_features[None, :],
                    FUNCTION,
                )
                b_operand = to_operand(b_gradient, OPERAND, PRECISION)
                if HAS_PROJECTION:
                    b_gradient_query = tl.dot(b_operand, b_projection, b_gradient_query, input_precision=PRECISION)
                else:
                    o_store = (o_vector + o_rows)[:, None] * HEAD + o_features[None, :]
                    b_store = (scale * b_gradient).to(p_gradient_query.dtype.element_ty)
                    tl.store(p_gradient_query + o_store, b_store, mask=m_rows[:, None] & m_features[None, :])
                if WITH_PROJECTION:
                    b_x = load_tile(p_q, o_rows, m_rows, o_out, m_out, stride_query_row, stride_query_column, True)
                    b_x = tl.dot(b_x.to(OPERAND), b_operand, input_precision=PRECISION) * scale
                    o_add = o_out[:, None] + o_features[None, :] * HEAD  # [BLOCK_OUT, BLOCK_FEATURES]
                    tl.atomic_add(p_gradient_projection + o_add, b_x, mask=m_out[:, None] & m_features[None, :])
                if WITH_BIAS:
                    b_x = tl.sum(b_gradient, axis=0)  # [BLOCK_FEATURES]
                    if i_out == 0:
                        tl.atomic_add(p_gradient_bias + o_features, b_x, mask=m_features)
            if WITH_KEY:
                b_gradient = tl.zeros([CHUNK, BLOCK_FEATURES], dtype=tl.float32)
                for o_value in tl.static_range(0, VALUES, BLOCK_VALUES):
                    o_values = o_value + tl.arange(0, BLOCK_VALUES)
                    m_values = o_values < VALUES
                    b_v = load_tile(
                        p_v, o_rows, m_keep, o_values, m_values, stride_value_row, stride_value_column, False
                    ).to(OPERAND)  # [CHUNK, BLOCK_VALUES]
                    b_s = load_tile(p_ds, o_features, m_features, o_values, m_values, VALUES, 1, True)
                    b_gradient = tl.dot(b_v, b_s, b_gradient, input_precision=PRECISION)
                b_z = tl.load(p_gradient_sums + i_state * num_features + o_features, mask=m_features, other=0.0)
                b_gradient = (b_gradient + b_z[None, :]) * b_to_end[:, None]
                if CAUSAL:
                    b_gradient = tl.dot(
                        b_transposed, to_operand(b_query, OPERAND, PRECISION), b_gradient, input_precision=PRECISION
                    )
                b_gradient = _through_map(
                    b_key_logits,
                    b_key,
                    b_gradient,
                    b_key_floor,
                    epsilon,
                    m_keep[:, None] & m_features[None, :],
                    FUNCTION,
                )
                b_operand = to_operand(b_gradient, OPERAND, PRECISION)
                b_gradient_norm += tl.sum(b_gradient, axis=1)
                if HAS_PROJECTION:
                    b_gradient_key = tl.dot(b_operand, b_projection, b_gradient_key, input_precision=PRECISION)
                else:
                    o_store = (o_vector + o_rows)[:, None] * HEAD + o_features[None, :]
                    b_store = (scale * b_gradient).to(p_gradient_key.dtype.element_ty)
                    tl.store(p_gradient_key + o_store, b_store, mask=m_rows[:, None] & m_features[None, :])
                if WITH_PROJECTION:
                    b_x = load_tile(p_k, o_rows, m_keep, o_out, m_out, stride_key_row, stride_key_column, True)
                    b_x = tl.dot(b_x.to(OPERAND), b_operand, input_precision=PRECISION) * scale
                    o_add = o_out[:, None] + o_features[None, :] * HEAD  # [BLOCK_OUT, BLOCK_FEATURES]
                    tl.atomic_add(p_gradient_projection + o_add, b_x, mask=m_out[:, None] & m_features[None, :])
                if WITH_BIAS:
                    b_x = tl.sum(b_gradient, axis=0)  # [BLOCK_FEATURES]
                    if i_out == 0:
                        tl.atomic_add(p_gradient_bias + o_features, b_x, mask=m_features)

        if HAS_PROJECTION:
            o_store = (o_vector + o_rows)[:, None] * HEAD + o_out[None, :]
            m_store = m_rows[:, None] & m_out[None, :]
            if WITH_QUERY:
                b_store = b_gradient_query.to(p_gradient_query.dtype.element_ty)
                tl.store(p_gradient_query + o_store, b_store, mask=m_store)
            if WITH_KEY:
                if SUBTRACT_NORM:
                    b_x = load_tile(p_k, o_rows, m_keep, o_out, m_out, stride_key_row, stride_key_column, False)
                    b_gradient_key -= scale * scale * b_gradient_norm[:, None] * b_x.to(tl.float32)
                b_store = b_gradient_key.to(p_gradient_key.dtype.element_ty)
                tl.store(p_gradient_key + o_store, b_store, mask=m_store)


def feature_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    tensors: MapTensors,
    mask: Tensor | None,
    of_rows: tuple[Tensor, ...],
    maxima: tuple[Tensor, Tensor],
    sums: tuple[Tensor, ...],
    chunks: Chunks,
    causal: bool,
    of_query: bool,
    of_key: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query and key in their dtype, of the projection and the bias in float32; both sides if `causal`.

    `of_rows` are row products, denominators, running maxima, normalizers of queries and of keys, and scales; `maxima`
    those before each chunk and at the end; `sums` the two sums and their gradients, for each chunk or each sequence.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    num_features, num_values = sums[0].shape[2:]
    config = choose_config(FEATURE_GRADIENTS, query.element_size() * 8, head_dim)
    found = query.new_empty(query.shape if of_query else 0), key.new_empty(key.shape if of_key else 0)
    groups = max(1, chunks.total)
    if any(wanted):  # A program adds up over several chunks, in their order, so that the result is always the same.
        groups = max(1, min(groups, 4 * multiprocessor_count(query) // heads))
    steps = triton.cdiv(chunks.total, groups)
    slots = groups * heads
    of_projection = sums[1].new_zeros((slots, num_features, head_dim) if wanted[0] else 0)
    of_bias = sums[1].new_zeros((slots, num_features) if wanted[1] else 0)
    has_projection = tensors.high is not None
    is_exponential = tensors.function == EXPONENTIAL
    grid = (slots * (triton.cdiv(head_dim, config.blocks["BLOCK_OUT"]) if has_projection else 1),)
    if chunks.total and grid[0]:
        with device_guard(query):
            _feature_gradients[grid](
                query,
                key,
                value,
                gradient,
                mask,
                *of_rows,
                *maxima,
                *sums,
                *found,
                of_projection,
                of_bias,
                *query.stride(),
                *key.stride(),
                *value.stride(),
                *gradient.stride(),
                0 if mask is None else mask.stride(0),
                total=chunks.total,
                steps=steps,
                heads=heads,
                num_features=num_features,
                HEAD=head_dim,
                VALUES=num_values,
                CAUSAL=causal,
                WITH_QUERY=of_query,
                WITH_KEY=of_key,
                WITH_PROJECTION=wanted[0],
                WITH_BIAS=wanted[1],
                HAS_FLOOR=is_exponential and tensors.epsilon > 0,
                SUBTRACT_NORM=is_exponential and tensors.subtract_norm,
                HAS_MASK=mask is not None,
                OPERAND=TRITON_DTYPES[operand_dtype(query.dtype)],
                PRECISION=precision(query.dtype),
                **chunks.of_each(),
                **tensors.keywords(),
                **config.keywords(),
            )
    return *found, of_projection.sum(0) if wanted[0] else None, of_bias.sum(0) if wanted[1] else None
