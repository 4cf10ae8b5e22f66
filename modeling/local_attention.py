"""Softmax attention inside a window, block by block: time and memory linear in the length.

Two windows. *Sliding*: a query at position p sees the keys from p - (w - 1) to p (to p + (w - 1) in an encoder).
*Bucketed*: positions are cut into buckets of w, and a query sees its own bucket, the previous one and, in an encoder,
the next one; a causal query never looks ahead inside its bucket.
"""

import torch
import torch.nn.functional as F


def past_reach(window: int, bucketed: bool) -> int:
    """How many keys before a query its window can hold: what a cache has to keep."""
    return 2 * window - 1 if bucketed else window - 1


def local_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int,
    causal: bool,
    bucketed: bool,
    position_ids: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    blind_rows: str = "zero",
) -> torch.Tensor:
    """Windowed attention; a query with nothing to see gives zeros.

    Args:
        query: `[B, H, N, D]`, the last N positions of the keys.
        key, value: `[B, H, K, D]` with K ≥ N; the first K - N come from a cache (causal only).
        window: w.
        causal: whether later keys are out of sight.
        bucketed: which of the two windows.
        position_ids: `[B or 1, N]`, positions of the queries, which decide their buckets.
        mask: `[B, K]`, nonzero at keys that count, or None.
        scaling: factor on the scores.
        dropout: probability of dropping a weight.
        blind_rows: what a query with nothing to see gives: `"zero"`; or `"mean"`, performer-pytorch's uniform weights
            over all slots of its buckets, where slots before the first bucket (and behind the last) count as -1.
            (bucketed only.) With `"mean"`, padded queries that see something keep what they see.

    Returns:
        `[B, H, N, D]`.
    """
    length, cached = query.shape[2], key.shape[2] - query.shape[2]
    back = past_reach(window, bucketed)
    ahead = 0 if causal else past_reach(window, bucketed)
    outputs = []
    for start in range(0, length, window):
        stop = min(start + window, length)
        first = max(cached + start - back, 0)
        last = min(cached + stop + ahead, key.shape[2])
        here = slice(first, last)
        # `ahead of the query`, in slots: real tokens stand in a row, so slots and positions differ by a constant
        # there.
        distance = (
            torch.arange(first, last, device=query.device)[None, :]
            - torch.arange(cached + start, cached + stop, device=query.device)[:, None]
        )
        if bucketed:
            positions = position_ids[:, start:stop, None]
            bucket = torch.div(positions, window, rounding_mode="floor")
            apart = torch.div(positions + distance, window, rounding_mode="floor") - bucket
            visible = apart.abs() <= 1
        else:
            visible = (distance.abs() < window)[None]
        if causal:
            visible = visible & (distance <= 0)
        if mask is not None:
            visible = visible & mask[:, None, here].to(torch.bool)
        blind = None
        if mask is not None and blind_rows == "mean":
            blind = ~visible.any(dim=-1, keepdim=True)
            visible = visible | blind  # so that no row is undefined, not even in the gradient
        output = F.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, here],
            value[:, :, here],
            attn_mask=visible[:, None],
            dropout_p=dropout,
            scale=scaling,
        )
        if blind is not None:
            last_bucket = (key.shape[2] - 1) // window
            mean = _mean_of_buckets(value[:, :, here], apart, bucket, last_bucket, window, causal)
            output = torch.where(blind[:, None], mean, output)
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if mask is None or blind_rows == "mean":
        return output
    # A row without a visible key is not defined by softmax; it is zero here, as in the linear heads. In a causal
    # window every real token sees itself, so only padded rows are meant.
    return output * mask[:, None, cached:, None].to(output.dtype) if causal else torch.nan_to_num(output)


def _mean_of_buckets(value, apart, bucket, last_bucket: int, window: int, causal: bool) -> torch.Tensor:
    """The mean over all slots of a query's buckets, for `apart` `[·, N, K]` and `bucket` `[·, N, 1]`."""
    inside = (apart >= -1) & (apart <= (0 if causal else 1))
    outside = (bucket == 0).to(value.dtype)
    if not causal:
        outside = outside + (bucket == last_bucket).to(value.dtype)
    total = inside[:, None].to(value.dtype) @ value - window * outside[:, None]
    return total / (window * (2 if causal else 3))
