"""Norms chosen by name, and the learned scalars that stand in for a norm."""

import torch
from torch import nn

from .rms_norm import RMSNorm


class ScaleNorm(nn.Module):
    """`g · x / |x|` with one learned number `g` (arXiv 1910.05895, section 3.2).

    A vector shorter than `eps` is divided by `eps`, and has no gradient: its own would be `g / eps`, which would grow
    from block to block until it is infinite. (Padding whose embedding is zero stays zero through all blocks.)
    """

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        norm = wide.norm(dim=-1, keepdim=True)
        states = torch.where(norm < self.eps, hidden_states.detach(), hidden_states)
        return (states / norm.clamp(min=self.eps)).to(hidden_states.dtype) * self.g


class ReZeroScale(nn.Module):
    """A learned factor on a residual branch (arXiv 2003.04887).

    It starts small instead of at zero, so that what is inside the branch has a gradient from the first step on.
    """

    INITIAL = 1e-3

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.full((1,), self.INITIAL))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.g


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    """The norm called `kind` (`"layer_norm"`, `"rms_norm"`, `"scale_norm"`); identity for `"rezero"` and `"none"`."""
    if kind == "layer_norm":
        return nn.LayerNorm(size, eps=eps)
    if kind == "rms_norm":
        return RMSNorm(size, eps=eps)
    return ScaleNorm(eps) if kind == "scale_norm" else nn.Identity()
