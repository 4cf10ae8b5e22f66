"""The norm that a configuration chooses for all of its blocks, and the LayerNorm that stands in fixed places."""

import torch
from torch import nn
from transformers import initialization as init

from .rms_norm import RMSNorm


class DynamicTanh(nn.Module):
    """`weight · tanh(alpha · x) + bias`, in place of a norm (arXiv 2503.10622)."""

    def __init__(self, size: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def set_initial_values(self) -> None:
        init.ones_(self.alpha)
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.alpha * hidden_states) * self.weight + self.bias


def unit_length(states: torch.Tensor) -> torch.Tensor:
    """`states` `[..., D]` with length 1 along D, zero where they are zero; computed in at least float32."""
    # In float16 the epsilon that guards zero vectors is zero itself.
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return nn.functional.normalize(wide, dim=-1).to(states.dtype)


class LengthNorm(nn.Module):
    """ScaleNorm: `g · x / |x|` with one learned number `g`, which starts at `sqrt(size)` (arXiv 1910.05895).

    The epsilon is under the root, as in RMSNorm: a clamped length would make the gradient of a zero vector (padding)
    explode from block to block.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps
        self.g = nn.Parameter(torch.full((1,), size**0.5))

    def set_initial_values(self) -> None:
        init.constant_(self.g, self.size**0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.rms_norm(hidden_states, (self.size,), eps=self.eps)
        return normed * (self.g * self.size**-0.5)


def layer_norm(config, size: int) -> nn.LayerNorm:
    """LayerNorm over `size` channels, with `config.norm_bias` and `config.layer_norm_eps`."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps, bias=config.norm_bias)


def block_norm(config) -> nn.Module:
    """The norm over `hidden_size` channels that `config.norm_type` names."""
    size = config.hidden_size
    if config.norm_type == "layer_norm":
        return layer_norm(config, size)
    if config.norm_type == "scale_norm":
        return LengthNorm(size, config.rms_norm_eps)
    if config.norm_type == "dynamic_tanh":
        return DynamicTanh(size)
    return RMSNorm(size, eps=config.rms_norm_eps, elementwise_affine=config.norm_type == "rms_norm")
