"""The feed-forward with what GLU variants and NormFormer put around its activation."""

import torch
from torch import nn
from transformers import initialization as init

from .feed_forward import FeedForward
from .few_rows import project
from .norm_family import layer_norm
from .zero_linear import ZeroLinear


class NormedFeedForward(FeedForward):
    """`down(norm(act(gate(x)) * up(x) * scale))`, where gate, scale and norm are options.

    Args:
        config: what `FeedForward` reads, `gate_channel_scale`, `feed_forward_norm` (arXiv 2110.09456),
            `mlp_output_bias` and `feed_forward_output_dropout`.
    """

    def __init__(self, config):
        super().__init__(config)
        inner = config.intermediate_size
        if config.mlp_output_bias != config.mlp_bias or config.zero_init_branches:
            linear = ZeroLinear if config.zero_init_branches else nn.Linear
            self.down_proj = linear(inner, config.hidden_size, bias=config.mlp_output_bias)
        self.gate_scale = nn.Parameter(torch.ones(inner)) if config.gate_channel_scale else None
        self.norm = layer_norm(config, inner) if config.feed_forward_norm else None
        self.output_dropout = config.feed_forward_output_dropout

    def set_initial_values(self) -> None:
        if self.gate_scale is not None:
            init.ones_(self.gate_scale)

    def _rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = project(self.up_proj, hidden_states)
        gate = None if self.gate_proj is None else self.act_fn(project(self.gate_proj, hidden_states))
        inner = self.act_fn(inner) if gate is None else gate * inner
        if self.gate_scale is not None:
            inner = inner * self.gate_scale
        if self.norm is not None:
            inner = self.norm(inner)
        if self.training and self.dropout:
            inner = nn.functional.dropout(inner, self.dropout)
        output = project(self.down_proj, inner)
        return nn.functional.dropout(output, self.output_dropout) if self.training and self.output_dropout else output
