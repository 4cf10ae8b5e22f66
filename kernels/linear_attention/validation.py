"""What `linear_attention` refuses, at the door and by name."""

import torch

from .feature_maps import EXPONENTIAL, POINTWISE_FUNCTIONS


def validate(query, key, value, feature_map, causal, mask, state, cu_seqlens):
    """Raises a ValueError that names the argument, what was expected and what came."""
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
    sequences = query.shape[0]
    if cu_seqlens is not None:
        _validate_packing(cu_seqlens, query, key)
        sequences = cu_seqlens.shape[0] - 1
    if state is not None:
        _validate_state(state, sequences, query, feature_map, None if value is None else value.shape[-1])


def _validate_mask(mask, key):
    if key is None:
        raise ValueError(f"mask must be None without key, got {tuple(mask.shape)}")
    if mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(f"mask must have shape {(key.shape[0], key.shape[2])}, got {tuple(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"mask must be bool or integer, nonzero where a key counts, got {mask.dtype}")
    if mask.device != key.device:
        raise ValueError(f"mask must be on {key.device}, got {mask.device}")


def _validate_packing(cu_seqlens, query, key):
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens must have shape [sequences + 1] in int32 or int64, got "
            f"{tuple(cu_seqlens.shape)} in {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens must be on {query.device}, got {cu_seqlens.device}")
    length = query.shape[2]
    if query.shape[0] != 1 or key is not None and key.shape[2] != length:
        keys = "no" if key is None else key.shape[2]
        raise ValueError(
            "cu_seqlens needs a batch of 1 and as many keys as queries, got a batch of "
            f"{query.shape[0]}, {length} queries and {keys} keys"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        steps = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != length or (steps < 0).any():
            raise ValueError(f"cu_seqlens must go from 0 to {length} and never fall, got {cu_seqlens.tolist()}")


def _validate_state(state, sequences, query, feature_map, value_dim):
    sizes = (sequences, query.shape[1], feature_map.num_features(query.shape[-1]))
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
