"""One vector for a sequence, of its hidden states."""

import torch


def pool_hidden_states(hidden_states: torch.Tensor, mask: torch.Tensor | None, kind: str) -> torch.Tensor:
    """`[B, C]`: the mean of the real tokens of `hidden_states` `[B, N, C]`, or the first or last one of them.

    Args:
        mask: `[B, N]`, nonzero at real tokens, or None if all are.
        kind: `"mean"`, `"first"` or `"last"`.
    """
    if mask is None:
        mask = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
    if kind == "mean":
        weights = mask.to(hidden_states.dtype)[..., None]
        return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    order = order if kind == "last" else order.flip(0)
    index = ((mask != 0) * order).argmax(dim=1)
    return hidden_states[torch.arange(len(index), device=index.device), index]
