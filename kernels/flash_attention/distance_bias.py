"""The learned bias of T5 as a vector over distances, so that no N×M bias is ever built."""

import math

import torch
from torch import Tensor


def t5_distance_bias(table: Tensor, *, bidirectional: bool, max_distance: int = 128) -> Tensor:
    """T5's bucketed position bias as the `distance_bias` of `flash_attention`, differentiable in the table.

    Distances from `max_distance` on share one bucket, so the vector needs no more entries and does not depend on any
    length: compute it once for a decoding loop. Source: arXiv 1910.10683, section 2.1; buckets as in transformers'
    T5 and in x-transformers (which also multiplies by `sqrt(D)`: scale the result, or the table).

    Args:
        table: `[buckets, H]`, one learned number per bucket and head, floating point.
        bidirectional: whether the upper half of the buckets is for keys behind the position. If not, all of those
            share bucket 0, and a causal call never reads it for them.
        max_distance: the distance from which on all keys share the last bucket.

    Returns:
        `[H, 2 · max_distance + 1]`, dtype of `table`; entry `max_distance + d` is for keys d behind the position
        (d negative: before it).

    Raises:
        ValueError: a shape, dtype or number that does not fit, naming the argument.
    """
    if table.ndim != 2 or not table.is_floating_point():
        raise ValueError(f"table must be floating point [buckets, heads], got {table.dtype} {tuple(table.shape)}")
    buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    if buckets < 2 or (bidirectional and table.shape[0] % 2):
        raise ValueError(
            f"table must have {'an even number of at least 4' if bidirectional else 'at least 2'} buckets,"
            f" got {table.shape[0]}"
        )
    if max_distance <= buckets // 2:
        raise ValueError(f"max_distance must be over {buckets // 2}, half the buckets a side has, got {max_distance}")
    index = t5_bucket_of_distance(table.shape[0], bidirectional, max_distance, table.device)
    return table[index].T


def t5_bucket_of_distance(buckets: int, bidirectional: bool, max_distance: int, device=None) -> Tensor:
    """int64 `[2 · max_distance + 1]`: the bucket of each distance from `-max_distance` to `max_distance`."""
    distance = torch.arange(-max_distance, max_distance + 1, device=device)
    if bidirectional:
        buckets //= 2
        first = torch.where(distance > 0, buckets, 0)
        steps = distance.abs()
    else:
        first = torch.zeros_like(distance)
        steps = (-distance).clamp(min=0)
    exact = buckets // 2
    # float32 and this order of operations, whatever the dtype of the table: the edges of the buckets are roundings.
    growth = torch.log(steps.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (growth * (buckets - exact)).to(torch.int64)).clamp(max=buckets - 1)
    return first + torch.where(steps < exact, steps, coarse)
