"""One token of causal linear attention without a Triton path: the step of decoding, in few and small operations."""

import math

import torch

from ..backend import is_observed
from .feature_maps import EXPONENTIAL, FeatureMap, project, query_features
from .state import EMPTY_LOG_SCALE, LinearAttentionState


LOG2_E = math.log2(math.e)
# Between these, sums of features are far from both ends of float32; a key's may be as small as it likes.
LEAST_SUM, LARGEST_SUM = 1e-25, 1e6
# With this floor under the features, no denominator is near 0.
LEAST_EPSILON = 1e-10


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


def step_offsets(log_scale: torch.Tensor) -> torch.Tensor:
    """What `plain_step` subtracts from the logits of queries (nothing) and keys: `[2 B H, 1]` of `[B, H]`."""
    return torch.stack([torch.zeros_like(log_scale), log_scale], dim=1).view(-1, 1)


def plain_step(
    query_and_key: torch.Tensor,
    value: torch.Tensor,
    feature_map: FeatureMap,
    state: LinearAttentionState,
    offsets: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor | None:
    """The commonest step, in as few operations as there can be: an exponential map, on a CPU, behind no checks.

    All features are computed relative to `exp(|x'|²/2)`, those of keys to the state's scale as well. Whether that
    went well is read from their sums, which the floor `ε` needs anyhow; a maximum is not looked for, so the state's
    scale stays where it is as long as no key is above it by a factor of a million. All rows of a batch go this way
    or none does. `linear_attention` validates, this does not: it is for a caller who knows what it has in hand.

    Args:
        query_and_key: `[B, 2H, 1, D]`, the queries' heads before the keys'; requires no gradient.
        value: `[B, H, 1, V]`.
        feature_map: as for `linear_attention`, its tensors in the dtype of the state.
        state: gets the key and the value in place.
        offsets: `step_offsets` of the state, the same from step to step.
        backend: as for `linear_attention`; what asks for kernels is another step.

    Returns:
        `[B, H, 1, V]`; None, and the state as it was, where the step is another one: `linear_attention` takes all.
    """
    key_value, key_sum, _ = state
    function, projection, bias, scale, epsilon, subtract_norm = feature_map
    if function != EXPONENTIAL or projection is None or bias is not None or not subtract_norm:
        return None
    if epsilon < LEAST_EPSILON or not (query_and_key.dtype == value.dtype == projection.dtype == key_value.dtype):
        return None
    if backend == "triton" or not (query_and_key.is_cpu and key_value.is_contiguous() and key_sum.is_contiguous()):
        return None
    if is_observed(query_and_key) or torch.is_autocast_enabled("cpu") or not query_and_key.numel():
        return None
    (batch, heads, count), size = key_sum.shape, value.shape[-1]
    rows = query_and_key.reshape(2 * batch * heads, -1)
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    shifts = torch.addcmul(offsets, lengths, lengths, value=0.5 * scale**2)
    # Powers of two: of 2,128 numbers, `exp` takes more than twice as long as `exp2`.
    features = torch.addmm(shifts, rows, projection.t(), beta=-LOG2_E, alpha=LOG2_E * scale).exp2_()
    sums = features.sum(dim=-1, keepdim=True)
    for numbers in sums.view(batch, 2 * heads).tolist():
        if not (min(numbers[:heads]) > LEAST_SUM and max(numbers) < LARGEST_SUM):
            return None
    query, key = features.add_(sums, alpha=epsilon).view(batch, 2, heads, count).unbind(1)
    key_value.addcmul_(key.unsqueeze(-1), value)
    key_sum.add_(key)
    query = query.reshape(batch * heads, 1, count)  # in three dimensions `bmm` is what it is, without `matmul` around
    numerator = torch.bmm(query, key_value.view(batch * heads, count, size))
    return numerator.div_(torch.bmm(query, key_sum.view(batch * heads, count, 1))).view(batch, heads, 1, size)


def _token_features(both, feature_map):
    """Features of the query and key in `both` `[2, B, H, 1, D]`: `[B, H, 1, M]` each, and the key's scale `[B, H]`.

    Logarithms first: they give the features and the scale by one pass over the logits.
    """
    if feature_map.function != EXPONENTIAL:
        q, k = query_features(both, feature_map).unbind()
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
