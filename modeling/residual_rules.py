"""How a branch's output and the residual stream become the new stream."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init


class SumResidual(nn.Module):
    """`scale · x + f(x)`: a constant (arXiv 2203.00555) and a learned (arXiv 2110.09456) scale, 1 by default."""

    def __init__(self, config):
        super().__init__()
        self.constant = config.residual_scale
        self.weight = nn.Parameter(torch.ones(config.hidden_size)) if config.learned_residual_scale else None

    def set_initial_values(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            hidden_states = hidden_states * self.weight
        if self.constant != 1:
            hidden_states = hidden_states * self.constant
        return hidden_states + update


class StreamGRU(nn.GRUCell):
    """A GRU cell with transformers' initial values."""

    def __init__(self, size: int, std: float):
        super().__init__(size, size)
        self.std = std

    def set_initial_values(self) -> None:
        for name, weight in self.named_parameters():
            init.zeros_(weight) if "bias" in name else init.normal_(weight, std=self.std)


class GRUResidual(nn.Module):
    """A GRU cell with the stream as state and the branch's output as input (arXiv 1910.06764)."""

    def __init__(self, config):
        super().__init__()
        self.gru = StreamGRU(config.hidden_size, config.initializer_range)
        self.weight = nn.Parameter(torch.ones(config.hidden_size)) if config.learned_residual_scale else None

    def set_initial_values(self) -> None:
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            hidden_states = hidden_states * self.weight
        gated = self.gru(update.flatten(0, 1), hidden_states.flatten(0, 1))
        return gated.view_as(hidden_states)


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch's output (arXiv 2103.17239)."""

    def __init__(self, config):
        super().__init__()
        self.initial = float(config.layer_scale_init_value)
        self.weight = nn.Parameter(torch.full((config.hidden_size,), self.initial))

    def set_initial_values(self) -> None:
        init.constant_(self.weight, self.initial)

    def forward(self, update: torch.Tensor) -> torch.Tensor:
        return update * self.weight


def make_residual(config) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The rule that `config.residual_type` names; a plain sum needs no module."""
    if config.residual_type == "gru":
        return GRUResidual(config)
    return SumResidual(config) if config.learned_residual_scale or config.residual_scale != 1 else torch.add
