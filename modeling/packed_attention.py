"""Padding without a mask: the rows of a batch packed behind one another, for flash-attn's functions.

transformers packs by a mask too, but takes the end of the keys' mask for that of the queries, which is wrong for
cross-attention, whose queries are others than its keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def attend_packed(
    attend: Callable, module, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, is_causal: bool, **kwargs
) -> Tensor:
    """Attention in which the keys that `key_mask` `[B, K]` leaves out are not there: `[B, N, H, V]`.

    Args:
        attend: a function of transformers' attention interface that takes `cu_seq_lens_q` and the like.
        query, key, value: `[B, H, N, D]`, `[B, H, K, D]`, `[B, H, K, V]`.
        is_causal: whether the last of N queries stands at the last key and sees none behind its own. Queries that
            stand at keys that are left out are left out as well, and give zeros.
    """
    batch, _, length, _ = query.shape
    rows = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    if is_causal:
        rows = key_mask[:, -length:]
    packed, sizes, longest = [], [], []
    for states, mask in ((query, rows), (key, key_mask), (value, key_mask)):
        packed.append(states.transpose(1, 2)[mask].transpose(0, 1)[None])
    for mask in (rows, key_mask):
        lengths = mask.sum(dim=1, dtype=torch.int32)
        sizes.append(torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0)))
        longest.append(int(lengths.max()))
    attended, _ = attend(
        module,
        *packed,
        None,
        is_causal=is_causal,
        cu_seq_lens_q=sizes[0],
        cu_seq_lens_k=sizes[1],
        max_length_q=longest[0],
        max_length_k=longest[1],
        **kwargs,
    )
    result = attended.new_zeros(batch, length, *attended.shape[2:])
    result[rows] = attended[0]
    return result
