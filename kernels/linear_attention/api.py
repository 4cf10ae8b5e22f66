"""The public linear attention operation: signature, validation, choice of the backend."""

from contextlib import nullcontext
from typing import NamedTuple

import torch

from ..backend import resolve_backend
from .autograd import linear_attention_eager
from .eager import step
from .feature_maps import EXPONENTIAL, POINTWISE_FUNCTIONS, FeatureMap
from .state import LinearAttentionState


class LinearAttentionOutput(NamedTuple):
    """`output` `[B, H, N, V]` in the dtype of the values, and the state after the last key."""

    output: torch.Tensor
    state: LinearAttentionState


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    state: LinearAttentionState | None = None,
    backend: str = "auto",
) -> LinearAttentionOutput:
    """`out_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)` in time and memory linear in the length.

    The sums run over the unmasked keys, over those with `j ≤ i` if `causal`, and over all that `state` has seen. A row
    that sees no key is zero. Features are computed inside (`feature_maps.py`), in at least float32, and never stored.
    Sources: arXiv 2009.14794 (FAVOR+), arXiv 2006.16236 (recurrent form).

    Args:
        query: `[B, H, N, D]`, float16, bfloat16, float32 or float64.
        key: `[B, H, K, D]`, dtype of `query`; K = N if `causal`. None, with `value` None, reads `state` alone.
        value: `[B, H, K, V]`, dtype of `query`.
        feature_map: what turns queries and keys into features, see `FeatureMap`; its tensors on the same device.
        causal: whether row i sees the keys up to i only. A change of a later row leaves row i as it is, to the bit.
        mask: `[B, K]`, bool or integer, nonzero where a key counts. Masked keys are in no sum at all.
        state: what was seen before, from an earlier call with the same feature map, or None.
        backend: `"auto"` or `"eager"`. A Triton path does not exist yet, so `"triton"` raises.

    Returns:
        `LinearAttentionOutput`. The state has a gradient in its two sums, none in its scale, which cancels.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit, naming the argument.
        RuntimeError: an explicit `backend` that cannot serve this call.
    """
    decoding = causal and state is not None and query.shape[-2] == 1 and not torch.compiler.is_compiling()
    signature = _signature(query, key, value, feature_map, mask, state, backend) if decoding else None
    if signature is None or signature not in _CHECKED_STEPS:
        _validate(query, key, value, feature_map, causal, mask, state)
        resolve_backend(backend, query, unsupported_reason="linear_attention has no Triton kernels yet")
        if decoding:
            _CHECKED_STEPS.add(signature)
    dtype = torch.promote_types(query.dtype, torch.float32)
    feature_map = feature_map.to(dtype)
    if key is None:
        # No keys: the operation that has a gradient, and one node for the compiler, reads the state all the same.
        nothing = query[:, :, :0], query.new_empty(*query.shape[:2], 0, state.key_value.shape[-1])
        output, _ = linear_attention_eager(query, *nothing, feature_map, None, state, False)
        return LinearAttentionOutput(output, state)
    if state is None:
        features = feature_map.num_features(query.shape[-1])
        state = LinearAttentionState.empty(
            *query.shape[:2], features, value.shape[-1], dtype=dtype, device=query.device
        )
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (query, key, value, *state[:2], feature_map.projection, feature_map.bias)
    )
    if causal and query.shape[2] == 1 and not differentiable:
        autocast = torch.is_autocast_enabled(query.device.type)
        with torch.autocast(query.device.type, enabled=False) if autocast else nullcontext():
            return LinearAttentionOutput(*step(query, key, value, feature_map, mask, state))
    return LinearAttentionOutput(*linear_attention_eager(query, key, value, feature_map, mask, state, causal))


# Checking costs as much as a step of decoding takes, and the next step looks like this one: what was found right is
# remembered. One token at a time has few shapes, so the set stays small.
_CHECKED_STEPS: set[tuple] = set()


def _signature(query, key, value, feature_map, mask, state, backend) -> tuple:
    """Everything that `_validate` and `resolve_backend` look at."""
    tensors = (query, key, value, mask, *state, feature_map.projection, feature_map.bias)
    properties = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    return (backend, feature_map.function, feature_map.epsilon, *properties)


def _validate(query, key, value, feature_map, causal, mask, state):
    if (key is None) != (value is None):
        raise ValueError("key and value must be given together, or neither of them")
    if key is None and (state is None or causal):
        raise ValueError("without key and value, a state must be given and causal must be False")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is None:
            continue
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape [batch, heads, length, size], got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be like query, {query.dtype} on {query.device}, got {tensor.dtype} on {tensor.device}"
            )
        if tensor.shape[:2] != query.shape[:2]:
            raise ValueError(f"{name} must start with {tuple(query.shape[:2])}, got {tuple(tensor.shape)}")
    if key is not None:
        if key.shape[-1] != query.shape[-1]:
            raise ValueError(f"key must have size {query.shape[-1]} like query, got {key.shape[-1]}")
        if value.shape[2] != key.shape[2]:
            raise ValueError(f"value must have length {key.shape[2]} like key, got {value.shape[2]}")
        if causal and key.shape[2] != query.shape[2]:
            raise ValueError(f"causal attention needs as many keys as queries, {query.shape[2]}, got {key.shape[2]}")
    if mask is not None:
        _validate_mask(mask, key)
    _validate_feature_map(feature_map, query)
    if state is not None:
        _validate_state(state, query, feature_map, None if value is None else value.shape[-1])


def _validate_mask(mask, key):
    if key is None:
        raise ValueError(f"mask must be None without key, got {tuple(mask.shape)}")
    if mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(f"mask must have shape {(key.shape[0], key.shape[2])}, got {tuple(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"mask must be bool or integer, nonzero where a key counts, got {mask.dtype}")
    if mask.device != key.device:
        raise ValueError(f"mask must be on {key.device}, got {mask.device}")


def _validate_state(state, query, feature_map, value_dim):
    sizes = (*query.shape[:2], feature_map.num_features(query.shape[-1]))
    value_dim = state.key_value.shape[-1] if value_dim is None else value_dim
    dtype = torch.promote_types(query.dtype, torch.float32)
    for name, expected in {"key_value": (*sizes, value_dim), "key_sum": sizes, "log_scale": sizes[:2]}.items():
        tensor = getattr(state, name)
        if tensor.shape != expected:
            raise ValueError(f"state.{name} must have shape {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype or tensor.device != query.device:
            raise ValueError(f"state.{name} must be {dtype} on {query.device}, got {tensor.dtype} on {tensor.device}")


def _validate_feature_map(feature_map, query):
    if feature_map.function != EXPONENTIAL and feature_map.function not in POINTWISE_FUNCTIONS:
        names = sorted([EXPONENTIAL, *POINTWISE_FUNCTIONS])
        raise ValueError(f"feature_map.function must be one of {names}, got {feature_map.function!r}")
    projection, bias, size = feature_map.projection, feature_map.bias, query.shape[-1]
    if projection is not None and (projection.ndim != 2 or projection.shape[1] != size):
        raise ValueError(f"feature_map.projection must have shape [features, {size}], got {tuple(projection.shape)}")
    if bias is not None and tuple(bias.shape) != (feature_map.num_features(size),):
        raise ValueError(
            f"feature_map.bias must have shape ({feature_map.num_features(size)},), got {tuple(bias.shape)}"
        )
    for name, tensor in (("projection", projection), ("bias", bias)):
        if tensor is not None and (tensor.device != query.device or not tensor.is_floating_point()):
            raise ValueError(
                f"feature_map.{name} must be floating point on {query.device}, got {tensor.dtype} on {tensor.device}"
            )
    if feature_map.epsilon < 0:
        raise ValueError(f"feature_map.epsilon must not be negative, got {feature_map.epsilon}")
