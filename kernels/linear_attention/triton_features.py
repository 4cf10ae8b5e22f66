"""Feature maps inside Triton kernels: tiles of logits, features and derivatives, as `feature_maps.py` defines them.

A tile of features is computed where it is used, from a tile of rows and a tile of the projection, in the orientation
in which it enters the next matrix product: `[CHUNK, BLOCK_FEATURES]`, or transposed. Sizes that are no power of two
are masked.
"""

try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton path of linear_attention needs Triton") from error


EMPTY = tl.constexpr(-1.0e30)  # state.EMPTY_LOG_SCALE
LOG2_E = tl.constexpr(1.4426950408889634)
# Loops over the tiles of a head, or of the values, are unrolled up to this size. What is unrolled stands in shared
# memory side by side: of longer ones it would not fit.
UNROLLED = tl.constexpr(128)


@triton.jit
def exponential(b_x):
    """`exp`, by the instruction that GPUs have for powers of two: `tl.exp` spends three more on denormal numbers."""
    return tl.exp2(b_x * LOG2_E)


@triton.jit
def exponential_of_difference(b_one, b_other, PRECISE: tl.constexpr):
    """`exp(one - other)`, where `other` has an axis of length 1.

    Unless PRECISE one multiply-add for each number, with a rounding that grows as they do.
    """
    return exponential(b_one - b_other) if PRECISE else tl.exp2(tl.fma(b_one, LOG2_E, b_other * -LOG2_E))


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit
def running_maximum(b_numbers):
    """The largest of the numbers up to each: `[CHUNK]`."""
    return tl.associative_scan(b_numbers, 0, _larger)


@triton.jit
def within(o_features, num_features, WHOLE: tl.constexpr):
    """Which features there are: all of them if WHOLE, a constant that the compiler folds into what it masks."""
    return tl.full(o_features.shape, True, tl.int1) if WHOLE else o_features < num_features


@triton.jit
def locate_chunk(i_chunk, p_table, length, chunks, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """The batch row, the sequence, the first row and the end of the rows of a chunk."""
    if PACKED:
        i_sequence = tl.load(p_table + i_chunk * 3)
        o_start = tl.load(p_table + i_chunk * 3 + 1)
        o_end = tl.load(p_table + i_chunk * 3 + 2)
        i_batch = i_sequence * 0
    else:
        i_sequence = (i_chunk // chunks).to(tl.int64)
        o_start = (i_chunk % chunks).to(tl.int64) * CHUNK
        o_end = o_start * 0 + length
        i_batch = i_sequence
    return i_batch, i_sequence, o_start, o_end


@triton.jit
def locate_segment(
    i_segment, p_first, p_borders, length, chunks, segments, per_segment, CHUNK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The batch row, the first chunk, the number of chunks, the first row and the end of the rows of a segment.

    Packed sequences are one segment each.
    """
    if PACKED:
        i_first = tl.load(p_first + i_segment)
        num_chunks = (tl.load(p_first + i_segment + 1) - i_first).to(tl.int32)
        o_start = tl.load(p_borders + i_segment)
        o_end = tl.load(p_borders + i_segment + 1)
        i_batch = i_first * 0
    else:
        i_batch = (i_segment // segments).to(tl.int64)
        i_before = (i_segment % segments) * per_segment
        i_first = i_batch * chunks + i_before
        num_chunks = tl.minimum(per_segment, chunks - i_before)
        o_start = i_before.to(tl.int64) * CHUNK
        o_end = o_start * 0 + length
    return i_batch, i_first, num_chunks, o_start, o_end


@triton.jit
def load_tile(p_tile, o_rows, m_rows, o_columns, m_columns, stride_row, stride_column, TRANSPOSED: tl.constexpr):
    """`[rows, columns]`, or `[columns, rows]` if `TRANSPOSED`; zero where a mask says no."""
    if TRANSPOSED:
        p_tile += o_rows[None, :] * stride_row + o_columns[:, None] * stride_column
        b_tile = tl.load(p_tile, mask=m_rows[None, :] & m_columns[:, None], other=0.0)
    else:
        p_tile += o_rows[:, None] * stride_row + o_columns[None, :] * stride_column
        b_tile = tl.load(p_tile, mask=m_rows[:, None] & m_columns[None, :], other=0.0)
    return b_tile


@triton.jit
def load_keep(p_mask, i_batch, o_rows, m_rows, stride_mask, HAS_MASK: tl.constexpr):
    """Which rows are keys that count: `[CHUNK]`."""
    if HAS_MASK:
        m_rows = m_rows & (tl.load(p_mask + i_batch * stride_mask + o_rows, mask=m_rows, other=0) != 0)
    return m_rows


@triton.jit
def _add_products(
    b_logits, p_rows, o_rows, m_rows, stride_row, stride_column, p_high, p_low, o_features, m_features, o_head,
    HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, and what the columns from `o_head` on add to them."""
    o_columns = o_head + tl.arange(0, BLOCK_HEAD)
    m_columns = o_columns < HEAD
    b_rows = load_tile(p_rows, o_rows, m_rows, o_columns, m_columns, stride_row, stride_column, TRANSPOSED)
    b_rows = b_rows.to(p_high.dtype.element_ty)
    b_high = load_tile(p_high, o_features, m_features, o_columns, m_columns, HEAD, 1, not TRANSPOSED)
    if TRANSPOSED:  # [BLOCK_FEATURES, BLOCK_HEAD] @ [BLOCK_HEAD, CHUNK]
        b_logits = tl.dot(b_high, b_rows, b_logits, input_precision=PRECISION)
    else:  # [CHUNK, BLOCK_HEAD] @ [BLOCK_HEAD, BLOCK_FEATURES]
        b_logits = tl.dot(b_rows, b_high, b_logits, input_precision=PRECISION)
    if SPLIT:
        b_low = load_tile(p_low, o_features, m_features, o_columns, m_columns, HEAD, 1, not TRANSPOSED)
        if TRANSPOSED:
            b_logits = tl.dot(b_low, b_rows, b_logits, input_precision=PRECISION)
        else:
            b_logits = tl.dot(b_rows, b_low, b_logits, input_precision=PRECISION)
    return b_logits


@triton.jit
def load_logits(
    p_rows, o_rows, m_rows, stride_row, stride_column, p_high, p_low, p_bias, o_feature, num_features, scale,
    HEAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, HAS_PROJECTION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of the rows for the features from `o_feature` on: `[CHUNK, BLOCK_FEATURES]` float32, or transposed."""
    o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
    m_features = within(o_features, num_features, WHOLE)
    if HAS_PROJECTION:
        if TRANSPOSED:
            b_logits = tl.zeros([BLOCK_FEATURES, CHUNK], dtype=tl.float32)
        else:
            b_logits = tl.zeros([CHUNK, BLOCK_FEATURES], dtype=tl.float32)
        if HEAD <= UNROLLED:
            for o_head in tl.static_range(0, HEAD, BLOCK_HEAD):
                b_logits = _add_products(
                    b_logits, p_rows, o_rows, m_rows, stride_row, stride_column, p_high, p_low, o_features,
                    m_features, o_head, HEAD, BLOCK_HEAD, TRANSPOSED, SPLIT, PRECISION,
                )  # fmt: skip
        else:
            for o_head in range(0, HEAD, BLOCK_HEAD):
                b_logits = _add_products(
                    b_logits, p_rows, o_rows, m_rows, stride_row, stride_column, p_high, p_low, o_features,
                    m_features, o_head, HEAD, BLOCK_HEAD, TRANSPOSED, SPLIT, PRECISION,
                )  # fmt: skip
    else:
        b_logits = load_tile(p_rows, o_rows, m_rows, o_features, m_features, stride_row, stride_column, TRANSPOSED)
        b_logits = b_logits.to(tl.float32) * scale
    if HAS_BIAS:
        b_bias = tl.load(p_bias + o_features, mask=m_features, other=0.0)  # [BLOCK_FEATURES]
        b_bias = b_bias[:, None] if TRANSPOSED else b_bias[None, :]
        # No plain sum: the compiler would begin the product with the bias, and round each of its steps to such digits.
        b_logits = tl.fma(b_logits, 1.0, b_bias)
    return b_logits


@triton.jit
def to_operand(b_block, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """A block as matrix products take it, rounded to nearest: left to themselves they cut TF32's last digits off."""
    b_block = b_block.to(OPERAND)
    if PRECISION == "tf32":
        b_block = ((b_block.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_block


@triton.jit
def apply_map(b_logits, b_normalizer, m_features, epsilon, FUNCTION: tl.constexpr, PRECISE: tl.constexpr):
    """Features of logits, in their shape; `b_normalizer` and `m_features` broadcast to it."""
    if FUNCTION == "exponential":
        b_features = exponential_of_difference(b_logits, b_normalizer, PRECISE)
    elif FUNCTION == "identity":
        b_features = b_logits
    elif FUNCTION == "relu":
        b_features = tl.maximum(b_logits, 0.0)
    elif FUNCTION == "squared_relu":
        b_positive = tl.maximum(b_logits, 0.0)
        b_features = b_positive * b_positive
    elif FUNCTION == "elu_plus_one":
        b_features = tl.where(b_logits > 0, b_logits + 1.0, exponential(tl.minimum(b_logits, 0.0)))
    elif FUNCTION == "gelu":
        b_features = 0.5 * b_logits * (1.0 + tl.erf(b_logits * 0.7071067811865476))
    elif FUNCTION == "silu":
        b_features = b_logits * tl.sigmoid(b_logits)
    elif FUNCTION == "sigmoid":
        b_features = tl.sigmoid(b_logits)
    else:
        tl.static_assert(FUNCTION == "softplus")
        # log(1 + e) loses the digits of a small e; the quotient gives them back.
        b_small = exponential(-tl.abs(b_logits))
        b_sum = 1.0 + b_small
        b_rounded = b_sum - 1.0
        b_log = tl.log(b_sum) * b_small / tl.where(b_rounded == 0.0, 1.0, b_rounded)
        b_features = tl.maximum(b_logits, 0.0) + tl.where(b_rounded == 0.0, b_small, b_log)
    return tl.where(m_features, b_features + epsilon, 0.0)


@triton.jit
def derivative_of_map(b_logits, FUNCTION: tl.constexpr):
    """Derivative of a pointwise function."""
    if FUNCTION == "identity":
        b_derivative = tl.full(b_logits.shape, 1.0, dtype=tl.float32)
    elif FUNCTION == "relu":
        b_derivative = tl.where(b_logits > 0, 1.0, 0.0)
    elif FUNCTION == "squared_relu":
        b_derivative = 2.0 * tl.maximum(b_logits, 0.0)
    elif FUNCTION == "elu_plus_one":
        b_derivative = exponential(tl.minimum(b_logits, 0.0))
    elif FUNCTION == "gelu":
        b_density = exponential(-0.5 * b_logits * b_logits) * 0.3989422804014327
        b_derivative = 0.5 * (1.0 + tl.erf(b_logits * 0.7071067811865476)) + b_logits * b_density
    elif FUNCTION == "silu":
        b_gate = tl.sigmoid(b_logits)
        b_derivative = b_gate * (1.0 + b_logits * (1.0 - b_gate))
    elif FUNCTION == "sigmoid":
        b_gate = tl.sigmoid(b_logits)
        b_derivative = b_gate * (1.0 - b_gate)
    else:
        tl.static_assert(FUNCTION == "softplus")
        b_derivative = tl.sigmoid(b_logits)
    return b_derivative


@triton.jit
def load_features(
    p_rows, o_rows, m_rows, stride_row, stride_column, p_normalizers, p_high, p_low, p_bias, o_feature, num_features,
    scale, epsilon, HEAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    TRANSPOSED: tl.constexpr, WHOLE: tl.constexpr, FUNCTION: tl.constexpr, HAS_PROJECTION: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of the rows from `o_feature` on: `[CHUNK, BLOCK_FEATURES]` float32, or transposed."""
    b_logits = load_logits(
        p_rows, o_rows, m_rows, stride_row, stride_column, p_high, p_low, p_bias, o_feature, num_features, scale,
        HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, TRANSPOSED, WHOLE, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
    )  # fmt: skip
    m_features = within(o_feature + tl.arange(0, BLOCK_FEATURES), num_features, WHOLE)
    if FUNCTION == "exponential":
        # Rows that do not count have logits of their bias alone, of which the exponential may be infinite: not theirs.
        b_normalizer = tl.load(p_normalizers + o_rows, mask=m_rows, other=float("inf"))  # [CHUNK]
    else:
        b_normalizer = tl.zeros([CHUNK], dtype=tl.float32)
    if TRANSPOSED:
        b_features = apply_map(b_logits, b_normalizer[None, :], m_features[:, None], epsilon, FUNCTION, not SPLIT)
    else:
        b_features = apply_map(b_logits, b_normalizer[:, None], m_features[None, :], epsilon, FUNCTION, not SPLIT)
    return b_features


@triton.jit
def load_scales(p_scales, o_rows, m_keep, FUNCTION: tl.constexpr):
    """The logarithms of the keys' scales, `EMPTY` for those that do not count: `[CHUNK]`."""
    if FUNCTION == "exponential":
        b_scales = tl.load(p_scales + o_rows, mask=m_keep, other=EMPTY)
    else:
        b_scales = tl.where(m_keep, 0.0, EMPTY)
    return b_scales


@triton.jit
def weigh(b_products, b_scales, b_running, m_visible, FUNCTION: tl.constexpr):
    """`products · exp(s_key - m_query)` where visible; scales and maxima come with the axes they broadcast along."""
    # The keys of a pointwise map have the scale 0.
    b_decay = exponential(b_scales - b_running) if FUNCTION == "exponential" else exponential(-b_running)
    return tl.where(m_visible, b_products * b_decay, 0.0)
