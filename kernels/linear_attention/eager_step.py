"""One token of causal linear attention without a Triton path: the step of decoding, in few and small operations."""

import torch

from .eager import chunk_features
from .feature_maps import EXPONENTIAL, project
from .state import EMPTY_LOG_SCALE, LinearAttentionState


def step(query, key, value, feature_map, mask, state, in_place: bool = False):
    """One causal token, all shapes `[B, H, 1, ·]`: output and new state.

    With `in_place` the new state is in the tensors of `state`: no second state is allocated and read back.
    """
    dtype = state.key_value.dtype
    value = value.to(dtype)
    if mask is not None:
        keep = mask.to(torch.bool)[:, None, :, None]
        key, value = torch.where(keep, key, 0), torch.where(keep, value, 0)
    q, k, log_scale = _token_features(torch.stack([query, key]).to(dtype), feature_map)
    if mask is not None:
        k, log_scale = k * keep, torch.where(keep[..., 0, 0], log_scale, EMPTY_LOG_SCALE)
    maximum = torch.maximum(log_scale, state.log_scale)
    k = k * torch.exp(log_scale - maximum).unsqueeze(-1).unsqueeze(-1)
    key_value, key_sum = state.key_value, state.key_sum
    stores = (key_value, key_sum) if in_place else (None, None)
    # The maximum rarely moves after the first tokens. Looking is free on a CPU, and saves a pass over the state.
    if torch.compiler.is_compiling() or maximum.device.type != "cpu" or not torch.equal(maximum, state.log_scale):
        decay = torch.exp(state.log_scale - maximum).unsqueeze(-1)
        key_value = torch.mul(key_value, decay.unsqueeze(-1), out=stores[0])
        key_sum = torch.mul(key_sum, decay, out=stores[1])
        if in_place:
            state.log_scale.copy_(maximum)
    key_value = torch.addcmul(key_value, k.mT, value, out=stores[0])
    key_sum = torch.add(key_sum, k.squeeze(-2), out=stores[1])
    denominator = torch.matmul(q, key_sum.unsqueeze(-1))
    if feature_map.function == EXPONENTIAL:
        denominator.clamp_(min=torch.finfo(dtype).tiny)  # positive, unless there is no key and the numerator is 0
    else:
        denominator.masked_fill_(denominator == 0, 1)
    output = torch.matmul(q, key_value).div_(denominator)
    return output.to(query.dtype), state if in_place else LinearAttentionState(key_value, key_sum, maximum)


def _token_features(both, feature_map):
    """Features of the query and key in `both` `[2, B, H, 1, D]`: `[B, H, 1, M]` each, and the key's scale `[B, H]`.

    Logarithms first: they give the features and the scale by one pass over the logits.
    """
    if feature_map.function != EXPONENTIAL:
        q, k = chunk_features(both, feature_map, is_key=False).values.unbind()
        return q, k, k.new_zeros(k.shape[:2])
    rows = both if feature_map.scale == 1 else both * feature_map.scale
    logits = project(rows, feature_map._replace(scale=1.0))
    features = torch.log_softmax(logits, dim=-1)
    log_scale = logits.select(-1, 0) - features.select(-1, 0)
    if feature_map.subtract_norm:
        log_scale.sub_(rows.square().sum(dim=-1), alpha=0.5)
    features.exp_()
    q, k = (features.add_(feature_map.epsilon) if feature_map.epsilon else features).unbind()
    return q, k, log_scale.select(0, 1).squeeze(-1)
