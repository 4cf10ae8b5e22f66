"""Norms of queries and keys, head by head, which bound the scores."""

import torch
from torch import nn
from transformers import initialization as init

from .norm_family import unit_length


class HeadRMSNorm(nn.Module):
    """RMSNorm over a head with a weight for each head and channel (arXiv 2302.05442)."""

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, size))

    def set_initial_values(self) -> None:
        init.ones_(self.weight)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, H, N, D]` to the same."""
        return unit_length(states) * states.shape[-1] ** 0.5 * self.weight


class HeadL2Norm(nn.Module):
    """Length 1 for each of `groups` parts of a head (arXiv 2010.04245), with learned factors if `learned`."""

    def __init__(self, heads: int, size: int, groups: int, learned: bool):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.full((heads, 1, size), size**0.25)) if learned else None

    def set_initial_values(self) -> None:
        if self.weight is not None:
            init.constant_(self.weight, self.weight.shape[-1] ** 0.25)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, H, N, D]` (or `[H, N, D]`) to the same."""
        parts = states.unflatten(-1, (self.groups, -1))
        normed = unit_length(parts).flatten(-2)
        return normed if self.weight is None else normed * self.weight


def make_query_key_norms(config) -> tuple[nn.Module | None, nn.Module | None, float]:
    """The norms of queries and keys that `config.qk_norm` names, and the factor of the scores that belongs to them."""
    kind, size = config.qk_norm, config.head_dim
    heads = (config.num_attention_heads, config.num_key_value_heads)
    if kind in ("l2", "l2_learned"):
        learned = kind == "l2_learned"
        query_norm, key_norm = (HeadL2Norm(count, size, config.qk_norm_groups, learned) for count in heads)
        return query_norm, key_norm, size**-0.5 if learned else float(config.qk_norm_scale)
    query_norm = HeadRMSNorm(heads[0], size) if kind == "rms" else None
    key_norm = HeadRMSNorm(heads[1], size) if kind in ("rms", "rms_key") else None
    return query_norm, key_norm, size**-0.5
