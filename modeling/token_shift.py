"""Token shift: a part of the channels comes from a neighbouring position."""

import torch


def shift_tokens(
    hidden_states: torch.Tensor, causal: bool, previous: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Take a half of the channels from the previous token (causal), or a third each from both neighbours.

    Args:
        hidden_states: `[B, N, C]`. The first groups of `C // 2` (`C // 3`) channels shift; a remainder stays.
        causal: whether only earlier positions may be read.
        previous: `[B, 1, C]`, the token before the first one (from the cache), or None for zeros.
        mask: `[B, N]`, nonzero at real tokens; padding is read as zeros. None if there is no padding.

    Returns:
        `[B, N, C]`.
    """
    source = hidden_states if mask is None else hidden_states * mask[..., None].to(hidden_states.dtype)
    edge = torch.zeros_like(source[:, :1])
    earlier = torch.cat([edge if previous is None else previous.to(source.dtype), source[:, :-1]], dim=1)
    if causal:
        group = source.shape[-1] // 2
        parts = [hidden_states[..., :group], earlier[..., group : 2 * group], hidden_states[..., 2 * group :]]
    else:
        later = torch.cat([source[:, 1:], edge], dim=1)
        group = source.shape[-1] // 3
        parts = [
            later[..., :group],
            hidden_states[..., group : 2 * group],
            earlier[..., 2 * group : 3 * group],
            hidden_states[..., 3 * group :],
        ]
    return torch.cat(parts, dim=-1)
