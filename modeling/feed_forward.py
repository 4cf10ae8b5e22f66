"""The position-wise feed-forward, plain or gated."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .few_rows import project


class FeedForward(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))` (GLU, arXiv 2002.05202), position by position.

    Args:
        config: reads `hidden_size`, `intermediate_size`, `hidden_act`, `gated_feed_forward`, `mlp_bias`,
            `feed_forward_dropout` and `chunk_size_feed_forward`.
    """

    def __init__(self, config):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias) if config.gated_feed_forward else None
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = config.feed_forward_dropout
        self.chunk_size = config.chunk_size_feed_forward

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.chunk_size:
            return self._rows(hidden_states)
        # Bounds the memory of the inner activations; positions do not influence each other.
        return torch.cat([self._rows(chunk) for chunk in hidden_states.split(self.chunk_size, dim=1)], dim=1)

    def _rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = project(self.up_proj, hidden_states)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(project(self.gate_proj, hidden_states)) * up
        if self.training and self.dropout:
            inner = nn.functional.dropout(inner, self.dropout)
        return project(self.down_proj, inner)
