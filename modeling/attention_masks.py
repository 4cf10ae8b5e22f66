"""Padding and causality for softmax attention, in the form that each attention implementation wants.

Every mask here is "these keys count" and "no key behind my position", where the last query stands at the last key. A
padding mask alone stays `[B, 1, 1, K]` and is broadcast: there is no tensor of queries times keys.
"""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.flash_attention import flash_attention


# The attention implementation that is our own operation. (A name with "flash" in it would be looked up on the Hub.)
KERNEL_ATTENTION = "hf_efficient"


class AttentionMask(NamedTuple):
    """Which keys a query sees.

    Attributes:
        mask: what the implementation is given: a bool `[B, 1, 1 or N, K]`, a `BlockMask`, `[B, K]`, or None.
        is_causal: whether the implementation itself hides the keys behind a query.
        sighted: bool `[B, 1 or N, 1, 1]`, False for queries that see nothing, whose result is zero; None if all see.
    """

    mask: object
    is_causal: bool
    sighted: torch.Tensor | None


def is_flash_attention(implementation: str) -> bool:
    """Whether it is a function of the flash-attn package (or of the Hub), which takes packed rows and no mask."""
    return "flash" in implementation


def make_attention_mask(
    implementation: str,
    key_mask: torch.Tensor | None,
    queries: int,
    keys: int,
    causal: bool = False,
    device: torch.device | None = None,
) -> AttentionMask:
    """The mask of `queries` rows, the last of which stands at the last of `keys`.

    Args:
        implementation: `config._attn_implementation`.
        key_mask: `[B, K]`, nonzero where a key counts, or None if all do.
        causal: whether a row sees no key behind its own.
    """
    causal = causal and queries > 1  # the last row sees all keys
    if key_mask is not None:
        key_mask = key_mask.to(torch.bool)
    if implementation == KERNEL_ATTENTION or is_flash_attention(implementation):
        return AttentionMask(key_mask, causal, None)
    if implementation == "sdpa" and key_mask is None and (not causal or queries == keys):
        return AttentionMask(None, causal, None)
    if key_mask is None and not causal:
        return AttentionMask(None, False, None)
    visible, past = None, None
    if causal:
        device = key_mask.device if device is None else device
        rows = torch.arange(keys - queries, keys, device=device)
        past = torch.arange(keys, device=device) <= rows[:, None]
        visible = past[None, None]
    if key_mask is not None:
        expanded = key_mask[:, None, None, :]
        visible = expanded if visible is None else visible & expanded
    sighted = visible.any(dim=-1, keepdim=True) if key_mask is not None else None
    if implementation == "flex_attention":
        mask = _block_mask(key_mask, queries, keys, causal, device if key_mask is None else key_mask.device)
    else:
        # A row of nothing but masked scores is undefined, in the gradient too; it looks everywhere and counts nowhere.
        mask = visible if sighted is None else visible | ~sighted
    return AttentionMask(mask, False, None if sighted is None else sighted.transpose(1, 2))


def _block_mask(key_mask, queries, keys, causal, device):
    offset = keys - queries

    def seen(batch, head, row, column):
        allowed = column <= row + offset if causal else column >= 0
        return allowed if key_mask is None else allowed & key_mask[batch, column]

    batch = None if key_mask is None else key_mask.shape[0]
    return create_block_mask(seen, batch, None, queries, keys, device=device)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention that gives out its weights.

    Args:
        query, key, value: `[B, H, N, D]`, `[B, H, K, D]`, `[B, H, K, V]`.
        attention_mask: bool, broadcast to `[B, H, N, K]`, or None.

    Returns:
        `[B, N, H, V]` and the weights `[B, H, N, K]`.
    """
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def kernel_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=False, **kwargs):
    """`flash_attention` under the name of an attention implementation; other models give it 4-d masks, which SDPA has.

    Args:
        query, key, value: `[B, H, N, D]`, `[B, H, K, D]`, `[B, H, K, V]`.
        attention_mask: `[B, K]`, nonzero where a key counts, or None.

    Returns:
        `[B, N, H, V]` and None.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    attended = flash_attention(
        query, key, value, scale=scaling, causal=is_causal, key_mask=attention_mask, dropout_p=dropout
    )
    return attended.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(KERNEL_ATTENTION, kernel_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(KERNEL_ATTENTION, sdpa_mask)
