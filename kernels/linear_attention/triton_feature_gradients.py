"""Linear attention on GPUs, second half of the backward pass: gradients of queries, keys, projection and bias.

One launch for the queries and one for the keys: both at once need more registers than a thread has. There one program
for a chunk

1. forms the gradient of the chunk's square, `dA_ij = (g_i·v_j - δ_i) exp(s_j - m_i) / n_i` for `j ≤ i`, or its
   transpose for keys;
2. for each tile of features computes `φ(q)`, `φ(k)` and the gradient of one,
   `dφ(q) = dA φ(k) + r (g Sᵀ - δ z)` or `dφ(k) = dAᵀ φ(q) + exp(s - m₁) (v dSᵀ + dz)`;
3. goes through the map to the logits. For an exponential map that is `p ∘ (dφ + ε Σ_f dφ)` with `p = φ - ε`, for
   queries because their factor is free, for keys because their scale has the gradient `Σ_f φ_f dφ_f`. The sum over all
   features comes first, without features: those of a key or query sum to `1 + Mε`;
4. adds up `dq` or `dk` over the tiles, and, where wanted, the gradients of projection and bias in a slot of its own.

In the kernel `own` are the rows that the gradient is of, `other` those of the other side; the square is
`[own, other]`, from `left`, which is `g` for queries and `v` for keys, and `right`, which is the other one.
"""

from torch import Tensor

from ..backend import device_guard, multiprocessor_count
from ..launch_config import choose_config
from .feature_maps import EXPONENTIAL
from .launch_plan import Chunks, MapTensors, operand_dtype, precision
from .launch_table import FEATURE_GRADIENTS
from .triton_features import (
    UNROLLED,
    apply_map,
    derivative_of_map,
    exponential,
    load_features,
    load_keep,
    load_logits,
    load_scales,
    load_tile,
    locate_chunk,
    to_operand,
    weigh,
    within,
)
from .triton_states import TRITON_DTYPES


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton path of linear_attention needs Triton") from error


@triton.jit
def _through_map(
    b_logits, b_features, b_gradient, b_floor, epsilon, m_logits, FUNCTION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from that of the features, all `[CHUNK, BLOCK_FEATURES]`; `b_floor` `[CHUNK]`."""
    if FUNCTION == "exponential":
        b_gradient = (b_gradient + b_floor[:, None]) * (b_features - epsilon)
    else:
        b_gradient = b_gradient * derivative_of_map(b_logits, FUNCTION)
    if MASKED:
        # Chosen, not multiplied: a chunk without rows has no state, and there stands what happens to stand there.
        b_gradient = tl.where(m_logits, b_gradient, 0.0)
    return b_gradient


@triton.jit
def _add_to_square(
    b_square, p_left, p_right, o_rows, m_own, m_other, o_value, stride_left_row, stride_left_column, stride_right_row,
    stride_right_column, VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The square `[own, other]`, and what the values from `o_value` on add to it."""
    o_values = o_value + tl.arange(0, BLOCK_VALUES)
    m_values = o_values < VALUES
    b_left = load_tile(p_left, o_rows, m_own, o_values, m_values, stride_left_row, stride_left_column, False)
    b_right = load_tile(
        p_right, o_rows, m_other, o_values, m_values, stride_right_row, stride_right_column, True
    )  # [BLOCK_VALUES, CHUNK]
    return tl.dot(b_left.to(OPERAND), b_right.to(OPERAND), b_square, input_precision=PRECISION)


@triton.jit
def _add_to_floor(
    b_floor, sum_of_sums, p_left, p_states, p_sums, o_rows, m_own, o_value, num_features, stride_left_row,
    stride_left_column, VALUES: tl.constexpr, BLOCK_FEATURES: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """The sums over all features, and what the values from `o_value` on add to them."""
    o_values = o_value + tl.arange(0, BLOCK_VALUES)
    m_values = o_values < VALUES
    b_state = tl.zeros([BLOCK_VALUES], dtype=tl.float32)
    for o_feature in range(0, num_features, BLOCK_FEATURES):
        o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
        m_features = within(o_features, num_features, WHOLE)
        b_part = load_tile(p_states, o_features, m_features, o_values, m_values, VALUES, 1, False)
        b_state += tl.sum(b_part.to(tl.float32), axis=0)
        if o_value == 0:
            sum_of_sums += tl.sum(tl.load(p_sums + o_features, mask=m_features, other=0.0), axis=0)
    b_left = load_tile(p_left, o_rows, m_own, o_values, m_values, stride_left_row, stride_left_column, False)
    b_floor += tl.sum(b_left.to(tl.float32) * b_state[None, :], axis=1)
    return b_floor, sum_of_sums


@triton.jit
def _add_from_state(
    b_gradient, p_left, p_states, o_rows, m_own, o_features, m_features, o_value, stride_left_row, stride_left_column,
    VALUES: tl.constexpr, BLOCK_VALUES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the features, and what the state's values from `o_value` on add to it."""
    o_values = o_value + tl.arange(0, BLOCK_VALUES)
    m_values = o_values < VALUES
    b_left = load_tile(p_left, o_rows, m_own, o_values, m_values, stride_left_row, stride_left_column, False)
    b_s = load_tile(p_states, o_features, m_features, o_values, m_values, VALUES, 1, True)
    b_s = to_operand(b_s, OPERAND, PRECISION)  # [BLOCK_VALUES, BLOCK_FEATURES]
    return tl.dot(b_left.to(OPERAND), b_s, b_gradient, input_precision=PRECISION)


@triton.jit
def _feature_gradients(
    p_own, p_other, p_left, p_right, p_mask, p_products, p_reciprocals, p_running, p_own_normalizers,
    p_other_normalizers, p_scales, p_maxima, p_states, p_sums, p_gradient_own, p_gradient_projection, p_gradient_bias,
    stride_own_batch, stride_own_head, stride_own_row, stride_own_column,
    stride_other_batch, stride_other_head, stride_other_row, stride_other_column,
    stride_left_batch, stride_left_head, stride_left_row, stride_left_column,
    stride_right_batch, stride_right_head, stride_right_row, stride_right_column, stride_mask,
    p_high, p_low, p_bias, p_table, length, chunks, total, steps, heads, num_features, scale, epsilon,
    CHUNK: tl.constexpr, HEAD: tl.constexpr, VALUES: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_OUT: tl.constexpr, CAUSAL: tl.constexpr,
    OF_QUERY: tl.constexpr, WITH_PROJECTION: tl.constexpr, WITH_BIAS: tl.constexpr, HAS_FLOOR: tl.constexpr,
    SUBTRACT_NORM: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
    FUNCTION: tl.constexpr, HAS_PROJECTION: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For queries `p_states`, `p_sums` and `p_maxima` are `S`, `z`, `m₀`; for keys `dS`, `dz` and `m` at the end."""
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
        p_x = p_own + i_batch * stride_own_batch + i_head.to(tl.int64) * stride_own_head
        p_y = p_other + i_batch * stride_other_batch + i_head.to(tl.int64) * stride_other_head
        p_l = p_left + i_batch * stride_left_batch + i_head.to(tl.int64) * stride_left_head
        p_r = p_right + i_batch * stride_right_batch + i_head.to(tl.int64) * stride_right_head
        o_vector = (i_batch * heads + i_head) * length
        i_state = (i_chunk.to(tl.int64) if CAUSAL else i_sequence) * heads + i_head
        p_s = p_states + i_state * num_features * VALUES
        p_z = p_sums + i_state * num_features

        if CAUSAL or not OF_QUERY:
            m_keep = load_keep(p_mask, i_batch, o_rows, m_rows, stride_mask, HAS_MASK)
            b_scales = load_scales(p_scales + o_vector, o_rows, m_keep, FUNCTION)  # [CHUNK]
        if CAUSAL or OF_QUERY:
            b_ratios = tl.load(p_reciprocals + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
            b_products = tl.load(p_products + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
        if CAUSAL:
            b_running = tl.load(p_running + o_vector + o_rows, mask=m_rows, other=0.0)  # [CHUNK]
        if OF_QUERY:
            m_own = m_rows
            b_factor = b_ratios  # of what comes from the state: [CHUNK]
            if CAUSAL:
                b_factor = b_ratios * exponential(tl.load(p_maxima + i_state) - b_running)
        else:
            m_own = m_keep
            if CAUSAL:
                o_last = tl.minimum(o_start + CHUNK, o_end) - 1
                maximum = tl.load(p_running + o_vector + o_last, mask=o_start < o_end, other=0.0)
            else:
                maximum = tl.load(p_maxima + i_state)
            b_factor = exponential(b_scales - maximum)
        b_factor = tl.where(m_own, b_factor, 0.0)

        if CAUSAL:
            m_other = m_keep if OF_QUERY else m_rows
            b_square = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)  # [own, other]
            if VALUES <= UNROLLED:
                for o_value in tl.static_range(0, VALUES, BLOCK_VALUES):
                    b_square = _add_to_square(
                        b_square, p_l, p_r, o_rows, m_own, m_other, o_value, stride_left_row, stride_left_column,
                        stride_right_row, stride_right_column, VALUES, BLOCK_VALUES, OPERAND, PRECISION,
                    )  # fmt: skip
            else:
                for o_value in range(0, VALUES, BLOCK_VALUES):
                    b_square = _add_to_square(
                        b_square, p_l, p_r, o_rows, m_own, m_other, o_value, stride_left_row, stride_left_column,
                        stride_right_row, stride_right_column, VALUES, BLOCK_VALUES, OPERAND, PRECISION,
                    )  # fmt: skip
            o_place = tl.arange(0, CHUNK)
            if OF_QUERY:
                m_visible = (o_place[None, :] <= o_place[:, None]) & m_keep[None, :] & m_rows[:, None]
                b_square = (b_square - b_products[:, None]) * b_ratios[:, None]
                b_square = weigh(b_square, b_scales[None, :], b_running[:, None], m_visible, FUNCTION)
            else:
                m_visible = (o_place[:, None] <= o_place[None, :]) & m_keep[:, None] & m_rows[None, :]
                b_square = (b_square - b_products[None, :]) * b_ratios[None, :]
                b_square = weigh(b_square, b_scales[:, None], b_running[None, :], m_visible, FUNCTION)

        b_floor = tl.zeros([CHUNK], dtype=tl.float32)
        if HAS_FLOOR:
            # The sums over all features, of which every tile needs a part.
            sum_of_sums = 0.0
            if VALUES <= UNROLLED:
                for o_value in tl.static_range(0, VALUES, BLOCK_VALUES):
                    b_floor, sum_of_sums = _add_to_floor(
                        b_floor, sum_of_sums, p_l, p_s, p_z, o_rows, m_own, o_value, num_features, stride_left_row,
                        stride_left_column, VALUES, BLOCK_FEATURES, BLOCK_VALUES, WHOLE,
                    )  # fmt: skip
            else:
                for o_value in range(0, VALUES, BLOCK_VALUES):
                    b_floor, sum_of_sums = _add_to_floor(
                        b_floor, sum_of_sums, p_l, p_s, p_z, o_rows, m_own, o_value, num_features, stride_left_row,
                        stride_left_column, VALUES, BLOCK_FEATURES, BLOCK_VALUES, WHOLE,
                    )  # fmt: skip
            b_floor = b_factor * (b_floor - b_products * sum_of_sums if OF_QUERY else b_floor + sum_of_sums)
            if CAUSAL:
                b_floor += (1.0 + num_features * epsilon) * tl.sum(b_square, axis=1)
            b_floor *= epsilon
        if CAUSAL:
            b_square = to_operand(b_square, OPERAND, PRECISION)

        b_gradient_own = tl.zeros([CHUNK, BLOCK_OUT], dtype=tl.float32)
        b_gradient_norm = tl.zeros([CHUNK], dtype=tl.float32)
        for o_feature in range(0, num_features, BLOCK_FEATURES):
            o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
            m_features = within(o_features, num_features, WHOLE)
            b_gradient = tl.zeros([CHUNK, BLOCK_FEATURES], dtype=tl.float32)
            if VALUES <= UNROLLED:
                for o_value in tl.static_range(0, VALUES, BLOCK_VALUES):
                    b_gradient = _add_from_state(
                        b_gradient, p_l, p_s, o_rows, m_own, o_features, m_features, o_value, stride_left_row,
                        stride_left_column, VALUES, BLOCK_VALUES, OPERAND, PRECISION,
                    )  # fmt: skip
            else:
                for o_value in range(0, VALUES, BLOCK_VALUES):
                    b_gradient = _add_from_state(
                        b_gradient, p_l, p_s, o_rows, m_own, o_features, m_features, o_value, stride_left_row,
                        stride_left_column, VALUES, BLOCK_VALUES, OPERAND, PRECISION,
                    )  # fmt: skip
            b_z = tl.load(p_z + o_features, mask=m_features, other=0.0)[None, :]
            b_gradient = (b_gradient - b_products[:, None] * b_z if OF_QUERY else b_gradient + b_z) * b_factor[:, None]
            if CAUSAL:
                b_other = load_features(
                    p_y, o_rows, m_other, stride_other_row, stride_other_column, p_other_normalizers + o_vector,
                    p_high, p_low, p_bias, o_feature, num_features, scale, epsilon, HEAD, CHUNK, BLOCK_HEAD,
                    BLOCK_FEATURES, False, WHOLE, FUNCTION, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
                )  # fmt: skip  # [CHUNK, BLOCK_FEATURES]
                b_other = to_operand(b_other, OPERAND, PRECISION)
                b_gradient = tl.dot(b_square, b_other, b_gradient, input_precision=PRECISION)
            b_logits = load_logits(
                p_x, o_rows, m_own, stride_own_row, stride_own_column, p_high, p_low, p_bias, o_feature, num_features,
                scale, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, False, WHOLE, HAS_PROJECTION, HAS_BIAS, SPLIT,
                PRECISION,
            )  # fmt: skip  # [CHUNK, BLOCK_FEATURES]
            b_normalizer = tl.zeros([CHUNK], dtype=tl.float32)
            if FUNCTION == "exponential":
                b_normalizer = tl.load(p_own_normalizers + o_vector + o_rows, mask=m_own, other=float("inf"))
            b_features = apply_map(b_logits, b_normalizer[:, None], m_features[None, :], epsilon, FUNCTION, not SPLIT)
            m_gradient = m_own[:, None] & m_features[None, :]
            b_gradient = _through_map(
                b_logits, b_features, b_gradient, b_floor, epsilon, m_gradient, FUNCTION,
                PACKED or HAS_MASK or not WHOLE,
            )  # fmt: skip
            if SUBTRACT_NORM and not OF_QUERY:
                b_gradient_norm += tl.sum(b_gradient, axis=1)
            b_operand = to_operand(b_gradient, OPERAND, PRECISION)
            if HAS_PROJECTION:
                b_projection = load_tile(p_high, o_features, m_features, o_out, m_out, HEAD, 1, False).to(OPERAND)
                b_gradient_own = tl.dot(b_operand, b_projection, b_gradient_own, input_precision=PRECISION)
            else:
                o_store = (o_vector + o_rows)[:, None] * HEAD + o_features[None, :]
                b_store = (scale * b_gradient).to(p_gradient_own.dtype.element_ty)
                tl.store(p_gradient_own + o_store, b_store, mask=m_rows[:, None] & m_features[None, :])
            if WITH_PROJECTION:
                b_x = load_tile(p_x, o_rows, m_own, o_out, m_out, stride_own_row, stride_own_column, True)
                b_x = tl.dot(b_x.to(OPERAND), b_operand, input_precision=PRECISION) * scale
                o_add = o_out[:, None] + o_features[None, :] * HEAD  # [BLOCK_OUT, BLOCK_FEATURES]
                tl.atomic_add(p_gradient_projection + o_add, b_x, mask=m_out[:, None] & m_features[None, :])
            if WITH_BIAS:
                b_x = tl.sum(b_gradient, axis=0)  # [BLOCK_FEATURES]
                if i_out == 0:
                    tl.atomic_add(p_gradient_bias + o_features, b_x, mask=m_features)

        if HAS_PROJECTION:
            if SUBTRACT_NORM and not OF_QUERY:
                b_x = load_tile(p_x, o_rows, m_own, o_out, m_out, stride_own_row, stride_own_column, False)
                b_gradient_own -= scale * scale * b_gradient_norm[:, None] * b_x.to(tl.float32)
            o_store = (o_vector + o_rows)[:, None] * HEAD + o_out[None, :]
            b_store = b_gradient_own.to(p_gradient_own.dtype.element_ty)
            tl.store(p_gradient_own + o_store, b_store, mask=m_rows[:, None] & m_out[None, :])


def feature_gradients(
    of_query: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    tensors: MapTensors,
    mask: Tensor | None,
    of_rows: tuple[Tensor, ...],
    maxima: Tensor,
    sums: tuple[Tensor, Tensor],
    chunks: Chunks,
    causal: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of the query, or of the key, in its dtype, and what it adds to those of projection and bias in float32.

    `of_rows` are row products, reciprocals of the denominators, running maxima, normalizers of queries and of keys,
    and scales. `maxima` and `sums`: for a query those before each chunk, for a key the maxima at the end and the
    gradients of the sums; for each chunk, or each sequence. `wanted` says which of the last two results.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    num_features, num_values = sums[0].shape[2:]
    config = choose_config(FEATURE_GRADIENTS, query.element_size() * 8, head_dim)
    products, reciprocals, running, *normalizers, scales = of_rows
    own, other, left, right = (query, key, gradient, value) if of_query else (key, query, value, gradient)
    found = own.new_empty(own.shape)
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
                own,
                other,
                left,
                right,
                mask,
                products,
                reciprocals,
                running,
                *(normalizers if of_query else reversed(normalizers)),
                scales,
                maxima,
                *sums,
                found,
                of_projection,
                of_bias,
                *own.stride(),
                *other.stride(),
                *left.stride(),
                *right.stride(),
                0 if mask is None else mask.stride(0),
                total=chunks.total,
                steps=steps,
                heads=heads,
                num_features=num_features,
                HEAD=head_dim,
                VALUES=num_values,
                CAUSAL=causal,
                OF_QUERY=of_query,
                WITH_PROJECTION=wanted[0],
                WITH_BIAS=wanted[1],
                HAS_FLOOR=is_exponential and tensors.epsilon > 0,
                SUBTRACT_NORM=is_exponential and tensors.subtract_norm,
                HAS_MASK=mask is not None,
                WHOLE=num_features % config.blocks["BLOCK_FEATURES"] == 0,
                OPERAND=TRITON_DTYPES[operand_dtype(query.dtype)],
                PRECISION=precision(query.dtype),
                **chunks.of_each(),
                **tensors.keywords(),
                **config.keywords(),
            )
    return found, of_projection.sum(0) if wanted[0] else None, of_bias.sum(0) if wanted[1] else None
