"""The definition of linear attention: eager, differentiable, any device and dtype, quadratic in the length.

    out_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)        (j ≤ i if causal; over the unmasked keys)

after "Rethinking Attention with Performers" (arXiv 2009.14794, eq. 4 and 5) and "Transformers are RNNs"
(arXiv 2006.16236, eq. 9). Rows with no key at all are zero. Every key carries its own scale `exp(s_j)`; the rows
divide it by its running maximum, which cancels, so a later key changes nothing before it. Computes in at least float32
with autocast off and returns the dtype of the values.
"""

import torch

from .feature_maps import FeatureMap, key_features, query_features
from .state import LinearAttentionState


def linear_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: FeatureMap,
    mask: torch.Tensor | None,
    state: LinearAttentionState,
    causal: bool,
) -> tuple[torch.Tensor, LinearAttentionState]:
    """Quadratic form. Shapes as in `linear_attention`; `state` is the one before the first key."""
    with torch.autocast(query.device.type, enabled=False):
        dtype = state.key_value.dtype
        feature_map = feature_map.to(dtype)
        q = query_features(query.to(dtype), feature_map)
        k, v = key.to(dtype), value.to(dtype)
        keep = None if mask is None else mask[:, None, :].to(torch.bool)
        if keep is not None:  # before anything is computed: what stands at a masked position may not be a number
            k, v = torch.where(keep[..., None], k, 0), torch.where(keep[..., None], v, 0)
        k, log_scale = key_features(k, feature_map)
        if keep is not None:
            log_scale = torch.where(keep, log_scale, log_scale.detach().new_tensor(-1.0e30))
            k = k * keep[..., None]

        # `maximum` is the scale each row is written in: the largest among the keys that the row may see.
        start = state.log_scale[..., None]
        running = torch.cummax(torch.cat([start, log_scale], dim=-1), dim=-1).values.detach()
        length, keys = q.shape[-2], k.shape[-2]
        maximum = running[..., 1:] if causal else running[..., -1:].expand(*running.shape[:-1], length)
        weights = (q @ k.mT) * torch.exp((log_scale[..., None, :] - maximum[..., :, None]).clamp(max=0))
        if causal:
            weights = weights.masked_fill(torch.ones(length, keys, dtype=torch.bool, device=q.device).triu(1), 0)
        carried = torch.exp(start - maximum)
        numerator = weights @ v + carried[..., None] * (q @ state.key_value)
        denominator = weights.sum(-1) + carried * (q @ state.key_sum[..., None])[..., 0]
        output = numerator / denominator.masked_fill(denominator == 0, 1)[..., None]

        final = running[..., -1]
        scaled = k * torch.exp(log_scale - final[..., None])[..., None]
        decay = torch.exp(state.log_scale - final)
        new_state = LinearAttentionState(
            state.key_value * decay[..., None, None] + scaled.mT @ v,
            state.key_sum * decay[..., None] + scaled.sum(dim=-2),
            final,
        )
    return output.to(value.dtype), new_state


def linear_attention_recurrent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: FeatureMap,
    mask: torch.Tensor | None,
    state: LinearAttentionState,
) -> tuple[torch.Tensor, LinearAttentionState]:
    """The causal form token by token: the second definition, which the quadratic one is tested against."""
    outputs = []
    for token in range(query.shape[-2]):
        here = slice(token, token + 1)
        output, state = linear_attention_reference(
            query[..., here, :],
            key[..., here, :],
            value[..., here, :],
            feature_map,
            None if mask is None else mask[:, here],
            state,
            causal=True,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=-2), state
