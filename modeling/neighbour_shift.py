"""Token shift over several neighbours: each part of the channels comes from another distance (arXiv 2106.07477)."""

import torch


def shift_neighbours(
    hidden_states: torch.Tensor, amount: int, causal: bool, previous: torch.Tensor | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Take part k of the channels from the token k positions before (in an encoder from `amount` behind to before).

    Args:
        hidden_states: `[B, N, C]`, cut into `amount + 1` parts (`2 * amount + 1` in an encoder); a remainder stays.
        amount: the largest distance.
        causal: whether only earlier positions may be read.
        previous: `[B, amount, C]`, the tokens before the first one (from the cache), or None for zeros.
        mask: `[B, N]`, nonzero at real tokens; padding is read as zeros. None if there is no padding.

    Returns:
        `[B, N, C]`.
    """
    batch, length, size = hidden_states.shape
    source = hidden_states if mask is None else hidden_states * mask[..., None].to(hidden_states.dtype)
    edge = source.new_zeros(batch, amount, size)
    padded = torch.cat([edge if previous is None else previous.to(source.dtype), source, edge], dim=1)
    distances = range(amount + 1) if causal else range(-amount, amount + 1)
    part = size // len(distances)
    parts = []
    for index, distance in enumerate(distances):
        channels = slice(index * part, (index + 1) * part)
        start = amount - distance
        parts.append(padded[:, start : start + length, channels] if distance else hidden_states[..., channels])
    return torch.cat([*parts, hidden_states[..., part * len(distances) :]], dim=-1)


def stack_neighbours(hidden_states: torch.Tensor, amount: int, previous: torch.Tensor | None) -> torch.Tensor:
    """What a cache keeps of each token, `[B, N, amount * C]`: the token and the `amount - 1` before it, oldest first.

    Args:
        hidden_states: `[B, N, C]`, padding set to zero.
        amount: how many.
        previous: `[B, amount, C]`, the tokens before the first one, or None for zeros.
    """
    batch, length, size = hidden_states.shape
    before = hidden_states.new_zeros(batch, amount, size) if previous is None else previous
    everything = torch.cat([before, hidden_states], dim=1)
    return torch.cat([everything[:, k + 1 : k + 1 + length] for k in range(amount)], dim=-1)
