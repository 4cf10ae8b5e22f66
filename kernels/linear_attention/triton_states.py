"""Linear attention on GPUs, first half of the forward pass: the scales of the keys and the states before each chunk.

1. `_normalizers`: the logarithm of each row's sum of exponentials, and each key's scale `s_j` (exponential maps only).
2. `_states`: one program for a head and a tile of the state walks along a sequence chunk by chunk, or along a segment
   of it where several share the walk (`triton_segments.py`). It carries the sums `S = Σ φ(k) vᵀ` and `z = Σ φ(k)`
   relative to the running maximum `m` of the scales, `S ← exp(m - m') S + (φ(k) exp(s - m'))ᵀ v`, and writes what it
   has before each chunk (causal) or at the end alone.

The backward pass runs the second kernel again rather than keep its result: that is `M·V` numbers for each chunk.
"""

import torch
from torch import Tensor

from ..backend import device_guard
from ..launch_config import choose_config
from .feature_maps import EXPONENTIAL
from .launch_plan import Chunks, MapTensors, operand_dtype, precision
from .launch_table import NORMALIZERS, STATES
from .state import LinearAttentionState
from .triton_features import (
    EMPTY,
    exponential,
    exponential_of_difference,
    load_features,
    load_keep,
    load_logits,
    load_scales,
    load_tile,
    locate_segment,
    to_operand,
    within,
)
from .triton_segments import carry_states, empty_segments, in_segments


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton path of linear_attention needs Triton") from error


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def _normalizers(
    p_rows, p_mask, p_normalizers, p_scales, stride_batch, stride_head, stride_row, stride_column, stride_mask,
    p_high, p_low, p_bias, length, heads, num_features, scale, epsilon, norm_factor, CHUNK: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr, IS_KEY: tl.constexpr,
    SUBTRACT_NORM: tl.constexpr, HAS_MASK: tl.constexpr, WHOLE: tl.constexpr, FUNCTION: tl.constexpr,
    HAS_PROJECTION: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    chunks = tl.cdiv(length, CHUNK)
    i_chunk = i_program % chunks
    i_head = (i_program // chunks) % heads
    i_batch = (i_program // chunks // heads).to(tl.int64)
    o_rows = i_chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    m_rows = o_rows < length
    m_keep = load_keep(p_mask, i_batch, o_rows, m_rows, stride_mask, HAS_MASK)
    p_rows += i_batch * stride_batch + i_head.to(tl.int64) * stride_head
    o_out = (i_batch * heads + i_head) * length

    b_maximum = tl.full([CHUNK], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([CHUNK], dtype=tl.float32)
    for o_feature in range(0, num_features, BLOCK_FEATURES):
        b_logits = load_logits(
            p_rows, o_rows, m_keep, stride_row, stride_column, p_high, p_low, p_bias, o_feature, num_features,
            scale, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, False, WHOLE, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
        )  # fmt: skip  # [CHUNK, BLOCK_FEATURES]
        m_features = within(o_feature + tl.arange(0, BLOCK_FEATURES), num_features, WHOLE)
        b_logits = tl.where(m_features[None, :], b_logits, float("-inf"))
        b_new = tl.maximum(b_maximum, tl.max(b_logits, axis=1))  # [CHUNK]
        b_exponentials = exponential_of_difference(b_logits, b_new[:, None], not SPLIT)  # [CHUNK, BLOCK_FEATURES]
        b_total = b_total * exponential(b_maximum - b_new) + tl.sum(b_exponentials, axis=1)
        b_maximum = b_new
    b_normalizer = b_maximum + tl.log(b_total)  # [CHUNK]
    tl.store(p_normalizers + o_out + o_rows, b_normalizer, mask=m_rows)
    if IS_KEY:
        if SUBTRACT_NORM:
            b_square = tl.zeros([CHUNK], dtype=tl.float32)
            for o_head in tl.static_range(0, HEAD, BLOCK_HEAD):
                o_columns = o_head + tl.arange(0, BLOCK_HEAD)
                b_rows = load_tile(
                    p_rows, o_rows, m_keep, o_columns, o_columns < HEAD, stride_row, stride_column, False
                ).to(tl.float32)  # [CHUNK, BLOCK_HEAD]
                b_square += tl.sum(b_rows * b_rows, axis=1)
            b_normalizer -= norm_factor * b_square
        tl.store(p_scales + o_out + o_rows, tl.where(m_keep, b_normalizer, EMPTY), mask=m_rows)


def normalizers(rows: Tensor, tensors: MapTensors, mask: Tensor | None, is_key: bool) -> tuple[Tensor, Tensor]:
    """For rows `[B, H, N, D]`: the logarithms of the sums `[B, H, N]` and, for keys, the scales `[B, H, N]`.

    Both are empty for a pointwise map, which has neither.
    """
    if tensors.function != EXPONENTIAL:
        return rows.new_empty(0, dtype=torch.float32), rows.new_empty(0, dtype=torch.float32)
    batch, heads, length, head_dim = rows.shape
    num_features = tensors.high.shape[0]
    config = choose_config(NORMALIZERS, rows.element_size() * 8, head_dim)
    found = rows.new_empty(batch, heads, length, dtype=torch.float32)
    scales = torch.empty_like(found) if is_key else found.new_empty(0)
    grid = (batch * heads * triton.cdiv(length, config.blocks["CHUNK"]),)
    if grid[0]:
        with device_guard(rows):
            _normalizers[grid](
                rows,
                mask,
                found,
                scales,
                *rows.stride(),
                0 if mask is None else mask.stride(0),
                length=length,
                heads=heads,
                num_features=num_features,
                HEAD=head_dim,
                norm_factor=0.5 * tensors.scale**2,
                IS_KEY=is_key,
                SUBTRACT_NORM=tensors.subtract_norm,
                HAS_MASK=mask is not None,
                WHOLE=num_features % config.blocks["BLOCK_FEATURES"] == 0,
                PRECISION=precision(rows.dtype),
                **tensors.keywords(),
                **config.keywords(),
            )
    return found, scales


# One segment is a case of its own to the compiler, without the arithmetic of several.
@triton.jit(do_not_specialize=["per_segment"])
def _states(
    p_key, p_value, p_mask, p_normalizers, p_scales, p_start_state, p_start_sum, p_start_scale, p_states, p_sums,
    p_maxima, p_end_state, p_end_sum, p_end_scale, stride_key_batch, stride_key_head, stride_key_row,
    stride_key_column, stride_value_batch, stride_value_head, stride_value_row, stride_value_column, stride_mask,
    p_high, p_low, p_bias, p_first, p_borders, length, chunks, segments, per_segment, heads, num_features, num_values,
    scale, epsilon, CHUNK: tl.constexpr, HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    BLOCK_VALUES: tl.constexpr, KEEP_STATES: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
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
    p_key += i_batch * stride_key_batch + i_head.to(tl.int64) * stride_key_head
    p_value += i_batch * stride_value_batch + i_head.to(tl.int64) * stride_value_head
    o_vector = (i_batch * heads + i_head) * length

    b_state = tl.load(p_start_state + i_end * state_size + o_state, mask=m_state, other=0.0)
    b_sum = tl.load(p_start_sum + i_end * num_features + o_features, mask=m_features, other=0.0)  # [BLOCK_FEATURES]
    maximum = tl.load(p_start_scale + i_end)
    for i_chunk in range(0, num_chunks):
        o_rows = o_start + i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_keep = load_keep(p_mask, i_batch, o_rows, o_rows < o_end, stride_mask, HAS_MASK)
        if KEEP_STATES:
            i_state = (i_first + i_chunk) * heads + i_head
            tl.store(p_states + i_state * state_size + o_state, to_operand(b_state, OPERAND, PRECISION), mask=m_state)
            if i_value == 0:
                tl.store(p_sums + i_state * num_features + o_features, b_sum, mask=m_features)
                if i_feature == 0:
                    tl.store(p_maxima + i_state, maximum)
        b_scales = load_scales(p_scales + o_vector, o_rows, m_keep, FUNCTION)  # [CHUNK]
        new_maximum = tl.maximum(maximum, tl.max(b_scales, axis=0))
        b_weights = tl.where(m_keep, exponential(b_scales - new_maximum), 0.0)  # [CHUNK]
        b_features = load_features(
            p_key, o_rows, m_keep, stride_key_row, stride_key_column, p_normalizers + o_vector, p_high, p_low,
            p_bias, o_feature, num_features, scale, epsilon, HEAD, CHUNK, BLOCK_HEAD, BLOCK_FEATURES, True,
            WHOLE, FUNCTION, HAS_PROJECTION, HAS_BIAS, SPLIT, PRECISION,
        )  # fmt: skip  # [BLOCK_FEATURES, CHUNK]
        b_features = to_operand(b_features * b_weights[None, :], OPERAND, PRECISION)
        b_values = load_tile(
            p_value, o_rows, m_keep, o_values, m_values, stride_value_row, stride_value_column, False
        ).to(OPERAND)  # [CHUNK, BLOCK_VALUES]
        decay = exponential(maximum - new_maximum)
        b_state = b_state * decay + tl.dot(b_features, b_values, input_precision=PRECISION)
        # Of the rounded features, as the state: weights sum to one to the last digit.
        b_sum = b_sum * decay + tl.sum(b_features.to(tl.float32), axis=1)
        maximum = new_maximum

    tl.store(p_end_state + i_end * state_size + o_state, b_state, mask=m_state)
    if i_value == 0:
        tl.store(p_end_sum + i_end * num_features + o_features, b_sum, mask=m_features)
        if i_feature == 0:
            tl.store(p_end_scale + i_end, maximum)


def states(
    key: Tensor,
    value: Tensor,
    tensors: MapTensors,
    mask: Tensor | None,
    state: LinearAttentionState,
    chunks: Chunks,
    found: tuple[Tensor, Tensor],
    keep_states: bool,
) -> tuple[LinearAttentionState, LinearAttentionState]:
    """The state after the last key of each sequence, and the states before each chunk.

    `found` is what `normalizers` gives for the keys. The second result, `[total, H, …]` with its `key_value` in the
    dtype of the products, is empty unless `keep_states`.
    """
    heads, num_features, num_values = state.key_value.shape[1:]
    config = choose_config(STATES, key.element_size() * 8, key.shape[-1])
    blocks = config.blocks
    tiles = triton.cdiv(num_features, blocks["BLOCK_FEATURES"]) * triton.cdiv(num_values, blocks["BLOCK_VALUES"])
    start = LinearAttentionState(*(t.contiguous() for t in state))
    chunks = in_segments(chunks, heads * tiles, key, walks=2 if keep_states else 1)
    common = key, value, tensors, mask, chunks, found, config, tiles
    if chunks.segments == 1:
        return _walk(start, *common, keep_states)
    own, kept = _walk(empty_segments(start, chunks), *common, keep_states=False)
    start, end = carry_states(start, own, chunks)
    if keep_states:
        _, kept = _walk(start, *common, keep_states)
    return end, kept


def _walk(start, key, value, tensors, mask, chunks, found, config, tiles, keep_states):
    """One launch: the state after each segment that starts with one of `start`, and the states before the chunks."""
    heads, num_features, num_values = start.key_value.shape[1:]
    end = LinearAttentionState(*(torch.empty_like(t) for t in start))
    operand = operand_dtype(key.dtype)
    total = chunks.total if keep_states else 0
    kept = LinearAttentionState(
        start.key_value.new_empty(total, heads, num_features, num_values, dtype=operand),
        start.key_sum.new_empty(total, heads, num_features),
        start.log_scale.new_empty(total, heads),
    )
    grid = (chunks.sequences * chunks.segments * heads * tiles,)
    if grid[0]:
        with device_guard(key):
            _states[grid](
                key,
                value,
                mask,
                *found,
                *start,
                *kept,
                *end,
                *key.stride(),
                *value.stride(),
                0 if mask is None else mask.stride(0),
                heads=heads,
                num_features=num_features,
                num_values=num_values,
                HEAD=key.shape[-1],
                KEEP_STATES=keep_states,
                HAS_MASK=mask is not None,
                WHOLE=num_features % config.blocks["BLOCK_FEATURES"] == 0,
                OPERAND=TRITON_DTYPES[operand],
                PRECISION=precision(key.dtype),
                **chunks.of_sequences(),
                **tensors.keywords(),
                **config.keywords(),
            )
    return end, kept
