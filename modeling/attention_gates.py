"""Gates on the output of the heads, computed from the attention's input."""

import torch
from torch import nn

from .zero_linear import ZeroLinear


class HeadGate(nn.Module):
    """`sigmoid(W x + b)` for each head (arXiv 2306.12929, "attend to nothing"); starts open."""

    def __init__(self, config):
        super().__init__()
        self.proj = ZeroLinear(config.hidden_size, config.num_attention_heads, initial_bias=10.0)

    def forward(self, inputs: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Gate `heads` `[B, H, N, D]` by `inputs` `[B, N, C]`."""
        return heads * self.proj(inputs).sigmoid().transpose(1, 2)[..., None]


class ValueGate(nn.Module):
    """A sigmoid or SiLU of `W x` for each channel of the heads' output, or for each head; `W` starts at zero."""

    def __init__(self, config):
        super().__init__()
        self.activation = torch.sigmoid if config.value_gate == "sigmoid" else nn.functional.silu
        channels = 1 if config.value_gate_per_head else config.value_head_dim
        self.heads, rank, out = (
            config.num_attention_heads,
            config.value_gate_rank,
            channels * config.num_attention_heads,
        )
        self.down = None if rank is None else nn.Linear(config.hidden_size, rank, bias=False)
        size = config.hidden_size if rank is None else rank
        self.proj = ZeroLinear(size, out, bias=config.value_gate_bias, initial_bias=10.0)

    def forward(self, inputs: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Gate `heads` `[B, H, N, D]` by `inputs` `[B, N, C]`."""
        if self.down is not None:
            inputs = nn.functional.silu(self.down(inputs))
        gate = self.activation(self.proj(inputs))
        return heads * gate.unflatten(-1, (self.heads, -1)).transpose(1, 2)
