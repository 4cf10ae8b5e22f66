"""What a mask `[B, N]` of real tokens says: which tokens count, and where each stands."""

import torch
from transformers.utils.import_utils import is_tracing


def real_tokens(attention_mask: torch.Tensor | None, states: torch.Tensor | None = None) -> torch.Tensor | None:
    """`[B, everything seen]` bool, or None where there is no padding.

    Raises:
        ValueError: a mask of another form, or not one value for each of the `states` `[B, N, C]`, if they are given.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must have shape [batch, cached and new tokens], got {tuple(attention_mask.shape)}"
        )
    if states is not None and attention_mask.shape != states.shape[:2]:
        raise ValueError(
            f"encoder_attention_mask must have shape {tuple(states.shape[:2])} (batch, encoder tokens), got "
            f"{tuple(attention_mask.shape)}"
        )
    return attention_mask != 0


def count_positions(attention_mask, past_length, length: int, device) -> torch.Tensor:
    """Positions `[B or 1, length]`, counted over real tokens, so that padding on the left changes nothing."""
    if attention_mask is None or isinstance(attention_mask, dict) or attention_mask.ndim != 2:
        return (torch.arange(length, device=device) + past_length)[None]
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]


def padding_among_new_tokens(attention_mask, length: int) -> torch.Tensor | None:
    """The mask of the last `length` tokens, or None if it masks nothing.

    Like transformers' `create_recurrent_attention_mask`, except for a single token, which that one takes for real. A
    padded prompt may come token by token too (`prefill_chunk_size=1`), and its padding must not enter the state.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    mask = attention_mask[:, -length:].contiguous()
    # Looking waits for a GPU: well spent on a prompt, not on every token after it.
    if (length > 1 or mask.is_cpu) and not is_tracing(mask) and bool((mask == 1).all()):
        return None
    return mask
