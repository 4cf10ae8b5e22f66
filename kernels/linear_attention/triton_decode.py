"""Linear attention on GPUs, one token: a program for each head reads its state once, updates it and has the output.

1. The logits of query and key, all in float32 and tile by tile, give their normalizers and the key's scale `s`.
2. With `m' = max(m, s)`, for each tile of the state: `S ← exp(m - m') S + exp(s - m') φ(k) vᵀ`, likewise `z`, and the
   sums of `φ(q) S` and `φ(q)·z`. The new state may stand where the old one stood: a program meets no other one's head.

The time is that of reading and writing the state, whatever came before.
"""

import torch
from torch import Tensor

from ..backend import device_guard
from ..launch_config import choose_config
from .feature_maps import EXPONENTIAL, FeatureMap
from .launch_table import DECODE
from .state import LinearAttentionState
from .triton_features import EMPTY, apply_map, exponential


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton path of linear_attention needs Triton") from error


@triton.jit
def _token_logits(
    p_row, stride_column, p_projection, p_bias, o_features, m_features, scale, HEAD: tl.constexpr,
    BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr, HAS_PROJECTION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Logits of one row: `[BLOCK_FEATURES]`."""
    if HAS_PROJECTION:
        b_logits = tl.zeros([BLOCK_FEATURES], dtype=tl.float32)
        for o_head in tl.static_range(0, HEAD, BLOCK_HEAD):
            o_columns = o_head + tl.arange(0, BLOCK_HEAD)
            m_columns = o_columns < HEAD
            b_row = tl.load(p_row + o_columns * stride_column, mask=m_columns, other=0.0).to(tl.float32) * scale
            o_tile = o_features[:, None] * HEAD + o_columns[None, :]
            m_tile = m_features[:, None] & m_columns[None, :]
            b_projection = tl.load(p_projection + o_tile, mask=m_tile, other=0.0)  # [BLOCK_FEATURES, BLOCK_HEAD]
            b_logits += tl.sum(b_projection * b_row[None, :], axis=1)
    else:
        b_logits = tl.load(p_row + o_features * stride_column, mask=m_features, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        b_logits += tl.load(p_bias + o_features, mask=m_features, other=0.0)
    return b_logits


@triton.jit
def _decode(
    p_query, p_key, p_value, p_mask, p_state, p_sum, p_scale, p_new_state, p_new_sum, p_new_scale, p_output,
    stride_query_batch, stride_query_head, stride_query_column, stride_key_batch, stride_key_head, stride_key_column,
    stride_value_batch, stride_value_head, stride_value_column, stride_mask, p_projection, p_bias, heads,
    num_features, num_values, scale, epsilon,
    HEAD: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_FEATURES: tl.constexpr, BLOCK_VALUES: tl.constexpr,
    HAS_MASK: tl.constexpr, SUBTRACT_NORM: tl.constexpr, FUNCTION: tl.constexpr, HAS_PROJECTION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    i_batch = i_program // heads
    i_head = i_program % heads
    p_query += i_batch * stride_query_batch + i_head * stride_query_head
    p_key += i_batch * stride_key_batch + i_head * stride_key_head
    p_value += i_batch * stride_value_batch + i_head * stride_value_head
    o_state = i_program * num_features * num_values
    keep = 1  # whether the key counts
    if HAS_MASK:
        keep = tl.load(p_mask + i_batch * stride_mask).to(tl.int32)
    maximum = tl.load(p_scale + i_program)

    query_normalizer = 0.0
    key_normalizer = 0.0
    key_scale = 0.0
    if FUNCTION == "exponential":
        query_maximum = float("-inf")
        key_maximum = float("-inf")
        query_total = 0.0
        key_total = 0.0
        for o_feature in range(0, num_features, BLOCK_FEATURES):
            o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
            m_features = o_features < num_features
            b_logits = _token_logits(
                p_query, stride_query_column, p_projection, p_bias, o_features, m_features, scale, HEAD, BLOCK_HEAD,
                BLOCK_FEATURES, HAS_PROJECTION, HAS_BIAS,
            )  # fmt: skip  # [BLOCK_FEATURES]
            b_logits = tl.where(m_features, b_logits, float("-inf"))
            new = tl.maximum(query_maximum, tl.max(b_logits, axis=0))
            query_total = query_total * exponential(query_maximum - new) + tl.sum(exponential(b_logits - new), axis=0)
            query_maximum = new
            b_logits = _token_logits(
                p_key, stride_key_column, p_projection, p_bias, o_features, m_features, scale, HEAD, BLOCK_HEAD,
                BLOCK_FEATURES, HAS_PROJECTION, HAS_BIAS,
            )  # fmt: skip  # [BLOCK_FEATURES]
            b_logits = tl.where(m_features, b_logits, float("-inf"))
            new = tl.maximum(key_maximum, tl.max(b_logits, axis=0))
            key_total = key_total * exponential(key_maximum - new) + tl.sum(exponential(b_logits - new), axis=0)
            key_maximum = new
        query_normalizer = query_maximum + tl.log(query_total)
        key_normalizer = key_maximum + tl.log(key_total)
        key_scale = key_normalizer
        if SUBTRACT_NORM:
            for o_head in tl.static_range(0, HEAD, BLOCK_HEAD):
                o_columns = o_head + tl.arange(0, BLOCK_HEAD)
                b_row = tl.load(p_key + o_columns * stride_key_column, mask=o_columns < HEAD, other=0.0)
                b_row = b_row.to(tl.float32) * scale
                key_scale -= 0.5 * tl.sum(b_row * b_row, axis=0)
    # What stands at a masked position may not be a number: chosen, not multiplied.
    if HAS_MASK:
        key_scale = tl.where(keep != 0, key_scale, EMPTY)
    new_maximum = tl.maximum(maximum, key_scale)
    decay = exponential(maximum - new_maximum)
    weight = exponential(key_scale - new_maximum)

    denominator = 0.0
    for o_value in range(0, num_values, BLOCK_VALUES):
        o_values = o_value + tl.arange(0, BLOCK_VALUES)
        m_values = o_values < num_values
        b_value = tl.load(p_value + o_values * stride_value_column, mask=o_values < num_values * keep, other=0.0).to(
            tl.float32
        )
        b_output = tl.zeros([BLOCK_VALUES], dtype=tl.float32)
        for o_feature in range(0, num_features, BLOCK_FEATURES):
            o_features = o_feature + tl.arange(0, BLOCK_FEATURES)
            m_features = o_features < num_features
            b_logits = _token_logits(
                p_query, stride_query_column, p_projection, p_bias, o_features, m_features, scale, HEAD, BLOCK_HEAD,
                BLOCK_FEATURES, HAS_PROJECTION, HAS_BIAS,
            )  # fmt: skip  # [BLOCK_FEATURES]
            b_query = apply_map(b_logits, query_normalizer, m_features, epsilon, FUNCTION, True)
            b_logits = _token_logits(
                p_key, stride_key_column, p_projection, p_bias, o_features, m_features, scale, HEAD, BLOCK_HEAD,
                BLOCK_FEATURES, HAS_PROJECTION, HAS_BIAS,
            )  # fmt: skip  # [BLOCK_FEATURES]
            m_key = o_features < num_features * keep
            b_key = tl.where(m_key, apply_map(b_logits, key_normalizer, m_key, epsilon, FUNCTION, True) * weight, 0.0)
            o_tile = o_state + o_features[:, None] * num_values + o_values[None, :]  # [BLOCK_FEATURES, BLOCK_VALUES]
            m_tile = m_features[:, None] & m_values[None, :]
            b_state = tl.load(p_state + o_tile, mask=m_tile, other=0.0) * decay
            b_state += b_key[:, None] * b_value[None, :]
            tl.store(p_new_state + o_tile, b_state, mask=m_tile)
            b_output += tl.sum(b_query[:, None] * b_state, axis=0)
            if o_value == 0:
                o_sum = i_program * num_features + o_features
                b_sum = tl.load(p_sum + o_sum, mask=m_features, other=0.0) * decay + b_key  # [BLOCK_FEATURES]
                tl.store(p_new_sum + o_sum, b_sum, mask=m_features)
                denominator += tl.sum(b_query * b_sum, axis=0)
        b_output = b_output / tl.where(denominator == 0, 1.0, denominator)
        o_output = i_program * num_values + o_values
        tl.store(p_output + o_output, b_output.to(p_output.dtype.element_ty), mask=m_values)
    tl.store(p_new_scale + i_program, new_maximum)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: FeatureMap,
    mask: Tensor | None,
    state: LinearAttentionState,
    in_place: bool,
) -> tuple[Tensor, LinearAttentionState]:
    """Output `[B, H, 1, V]` and the new state, which is `state` itself if `in_place` (contiguous then)."""
    batch, heads, _, head_dim = query.shape
    num_features, num_values = state.key_value.shape[2:]
    config = choose_config(DECODE, 32, head_dim)
    projection, bias = (None if t is None else t.contiguous() for t in (feature_map.projection, feature_map.bias))
    mask = None if mask is None else (mask != 0).contiguous()
    state = LinearAttentionState(*(part.contiguous() for part in state))
    new_state = state if in_place else LinearAttentionState(*(torch.empty_like(part) for part in state))
    output = query.new_empty(batch, heads, 1, num_values)
    if batch * heads:
        with device_guard(query):
            _decode[(batch * heads,)](
                query,
                key,
                value,
                mask,
                *state,
                *new_state,
                output,
                *(stride for t in (query, key, value) for stride in (t.stride(0), t.stride(1), t.stride(3))),
                1,
                projection,
                bias,
                heads,
                num_features,
                num_values,
                feature_map.scale,
                feature_map.epsilon,
                HEAD=head_dim,
                HAS_MASK=mask is not None,
                SUBTRACT_NORM=feature_map.function == EXPONENTIAL and feature_map.subtract_norm,
                FUNCTION=feature_map.function,
                HAS_PROJECTION=projection is not None,
                HAS_BIAS=bias is not None,
                **config.keywords(),
            )
    return output, new_state
