"""Rotary position embeddings (arXiv 2104.09864): pairs (i, i + d/2) of a head turn with the position."""

import torch


def rotary_tables(position_ids: torch.Tensor, dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for `position_ids` `[B or 1, N]`: two float32 tensors `[B or 1, 1, N, dim]`.

    The sines of the first half are negative, as `apply_rotary` wants them. Computed where they are needed, so there is
    no buffer that could be lost or cast to a low precision.
    """
    frequencies = base ** (-torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim)
    angles = position_ids[:, None, :, None].to(torch.float32) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary(states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn `states` `[B, H, N, D]` by the tables' angles; computed in float32, returned in the dtype of `states`."""
    cos, sin = tables
    swapped = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * cos, swapped, sin).to(states.dtype)
