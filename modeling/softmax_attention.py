"""Softmax attention in two forms: written out, with every score in memory, and fused, which never holds N×M of them.

Both compute, in this order (x_ij of query i and key j, mixes over the heads, p the position of query i):

    x = scale · q·k + previous;   x = x + mix(x);   x = x + bias(j - p);   x = softcap · tanh(x / softcap)
    weights = softmax(x where i sees j; a sink takes part in the sum);   out = mix(drop(weights)) · v

The fused form is `kernels/flash_attention`; it has everything but the two mixes and the previous scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.flash_attention import flash_attention, merge_attention


class Visibility(NamedTuple):
    """Which keys a query sees. Query i stands at key `i + M - N`, or `i + key_lengths - N` where those are given.

    Attributes:
        causal: whether later keys are hidden.
        window: how many keys before and behind are seen; None is no limit.
        key_mask: `[B, M]` bool, True at keys that count, or None.
        key_lengths: `[B]`, how many of the keys are there yet (a preallocated cache), or None for all.
        prefix_lengths: `[B]`, keys before this one are seen by all queries, causal or not; or None.
    """

    causal: bool
    window: tuple[int | None, int | None] | None = None
    key_mask: Tensor | None = None
    key_lengths: Tensor | None = None
    prefix_lengths: Tensor | None = None


class Extras(NamedTuple):
    """What takes part besides queries, keys and values.

    Attributes:
        scale: factor of the products.
        bias: `alibi_slopes` `[H]` or `distance_bias` `[H, 2R + 1]`, as `flash_attention` takes them; or nothing.
        softcap: bound of the scores, or None.
        memory_key, memory_value: `[G, R, D]`, `[G, R, V]`, seen by all and without a position; or None.
        sinks: `[H]`, logits that take part in the denominator only, or None.
        dropout: probability of dropping a weight.
    """

    scale: float
    bias: dict[str, Tensor]
    softcap: float | None
    memory_key: Tensor | None
    memory_value: Tensor | None
    sinks: Tensor | None
    dropout: float


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, extras: Extras, backend: str, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, N, V]` of `query` `[B, H, N, D]`, `key` `[B, G, M, D]`, `value` `[B, G, M, V]`.

    With `return_lse` also the logarithms of the denominators `[B, H, N]`, else None.
    """
    scale, bias, softcap, memory_key, memory_value, sinks, dropout = extras
    memory = {"memory_key": memory_key, "memory_value": memory_value}
    shared = {"scale": scale, "softcap": softcap, "dropout_p": dropout, "backend": backend, **bias}
    shared |= {"window": visibility.window, "key_lengths": visibility.key_lengths}
    if visibility.prefix_lengths is None:
        shared |= {"causal": visibility.causal, "key_mask": visibility.key_mask, "sinks": sinks, **memory}
        found = flash_attention(query, key, value, return_lse=return_lse, **shared)
        return found if return_lse else (found, None)
    # The keys of the prefix are seen by all, the others causally: two parts, put together by their denominators.
    prefix = _before(visibility.prefix_lengths, key)
    masks = (prefix, ~prefix)
    if visibility.key_mask is not None:
        masks = tuple(mask & visibility.key_mask for mask in masks)
    seen = flash_attention(query, key, value, key_mask=masks[0], sinks=sinks, return_lse=True, **memory, **shared)
    rest = flash_attention(query, key, value, causal=True, key_mask=masks[1], return_lse=True, **shared)
    return merge_attention([seen.output, rest.output], [seen.lse, rest.lse])


def plain_step(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As `fused_attention` where `is_plain_step`, and nothing but queries, keys and values takes part.

    `flash_attention` does the same behind checks that take longer than the sum itself.
    """
    return nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)


def is_plain_step(query: Tensor, key: Tensor, visibility: Visibility) -> bool:
    """Whether one query sees all keys: the step of decoding that has to be quick."""
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and key.shape[2] > 0
        and (visibility.causal or visibility.window is None)
        and (visibility.window is None or visibility.window[0] is None or key.shape[2] <= visibility.window[0] + 1)
        and visibility[2:] == (None, None, None)
    )


def written_out_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    extras: Extras,
    previous: Tensor | None = None,
    mix_scores: Callable[[Tensor], Tensor] | None = None,
    mix_weights: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `fused_attention`; returns output, weights `[B, H, N, M]`, scores `[B, H, N, R + M]` and lse `[B, H, N]`.

    Args:
        previous: scores of an earlier block, to be added.
        mix_scores, mix_weights: maps of `[B, H, N, R + M]` over the heads.
    """
    groups = query.shape[1] // key.shape[1]
    bias = _bias(query, key, visibility, extras.bias)
    visible = _visible(query, key, visibility)
    slots = 0
    if extras.memory_key is not None:
        slots = extras.memory_key.shape[1]
        batch = query.shape[0]
        key = torch.cat([extras.memory_key.expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([extras.memory_value.expand(batch, -1, -1, -1), value], dim=2)
        bias = nn.functional.pad(bias, (slots, 0)) if bias is not None else None
        visible = nn.functional.pad(visible, (slots, 0), value=True)
    scores = (query @ key.repeat_interleave(groups, dim=1).mT) * extras.scale
    if previous is not None:
        scores = scores + previous
    if mix_scores is not None:
        scores = scores + mix_scores(scores)
    if bias is not None:
        scores = scores + bias
    if extras.softcap is not None:
        scores = extras.softcap * torch.tanh(scores / extras.softcap)
    logits = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if extras.sinks is not None:
        sinks = extras.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = nn.functional.softmax(logits, dim=-1, dtype=dtype)[..., : scores.shape[-1]].to(query.dtype)
    # A query that sees nothing gives zeros, not the mean of what it must not see.
    weights = weights * visible.any(dim=-1, keepdim=True)
    # What is returned has to be what is used, so that it has a gradient.
    seen = weights[..., slots:] if slots else weights
    weights = torch.cat([weights[..., :slots], seen], dim=-1) if slots else weights
    mixed = nn.functional.dropout(weights, extras.dropout, training=extras.dropout > 0)
    if mix_weights is not None:
        mixed = mix_weights(mixed)
    return mixed @ value.repeat_interleave(groups, dim=1), seen, scores, logits.logsumexp(dim=-1)


def _before(lengths: Tensor, key: Tensor) -> Tensor:
    return torch.arange(key.shape[2], device=key.device) < lengths[:, None]


def _distance(query: Tensor, key: Tensor, visibility: Visibility) -> Tensor:
    """`j - p`, `[B or 1, 1, N, M]`."""
    length, keys, device = query.shape[2], key.shape[2], query.device
    ends = torch.full((1,), keys, device=device)
    if visibility.key_lengths is not None:  # a window that has slid holds fewer keys than there were tokens
        ends = visibility.key_lengths.clamp(max=keys)
    positions = torch.arange(length, device=device) + (ends - length)[:, None]
    return (torch.arange(keys, device=device) - positions[..., None])[:, None]


def _visible(query: Tensor, key: Tensor, visibility: Visibility) -> Tensor:
    """`[B or 1, 1, N, M]` bool."""
    distance = _distance(query, key, visibility)
    visible = distance <= 0 if visibility.causal else torch.ones_like(distance, dtype=torch.bool)
    if visibility.prefix_lengths is not None:
        visible = visible | _before(visibility.prefix_lengths, key)[:, None, None]
    if visibility.window is not None:
        before, behind = visibility.window
        visible = visible & (distance >= -before) if before is not None else visible
        visible = visible & (distance <= behind) if behind is not None else visible
    if visibility.key_lengths is not None:
        visible = visible & _before(visibility.key_lengths, key)[:, None, None]
    if visibility.key_mask is not None:
        visible = visible & visibility.key_mask[:, None, None]
    return visible


def _bias(query: Tensor, key: Tensor, visibility: Visibility, bias: dict[str, Tensor]) -> Tensor | None:
    """`[B or 1, H, N, M]`, or None."""
    if not bias:
        return None
    distance = _distance(query, key, visibility)
    if "alibi_slopes" in bias:
        return (-bias["alibi_slopes"][:, None, None] * distance.abs()).to(query.dtype)
    table = bias["distance_bias"]
    radius = table.shape[1] // 2
    return table[:, distance[:, 0].clamp(-radius, radius) + radius].transpose(0, 1).to(query.dtype)
