"""What the distance of a key adds to its score: ALiBi, T5's learned buckets, and an MLP of the distance.

Each module returns keyword arguments for `kernels/flash_attention`: one number per head or one per distance, never
one per query and key.
"""

import torch
from torch import nn

from ..kernels.flash_attention import t5_distance_bias
from .fixed_tables import FixedTable


class AlibiBias(FixedTable):
    """`-slope_h · |distance|` (arXiv 2108.12409), in an encoder the same on both sides."""

    def __init__(self, config):
        self.__dict__["slopes"] = config.alibi_slopes
        super().__init__()

    def compute(self) -> torch.Tensor:
        with torch.device("cpu"):
            return torch.tensor(self.slopes, dtype=torch.float32)

    def forward(self, longest_distance: int) -> dict[str, torch.Tensor]:
        return {"alibi_slopes": self.table}


class T5Bias(nn.Module):
    """One learned number per head and bucket of distances (arXiv 1910.10683); scores are scaled, unlike T5's."""

    def __init__(self, config):
        super().__init__()
        self.bidirectional = config.prefix_lm or not config.is_decoder
        self.max_distance = config.relative_attention_max_distance
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_attention_heads)

    def forward(self, longest_distance: int) -> dict[str, torch.Tensor]:
        bias = t5_distance_bias(
            self.relative_attention_bias.weight, bidirectional=self.bidirectional, max_distance=self.max_distance
        )
        return {"distance_bias": bias}


class DynamicBias(nn.Module):
    """An MLP of the signed distance from key to query (arXiv 2108.00154; logarithm: arXiv 2111.09883)."""

    def __init__(self, config):
        super().__init__()
        size, self.log_distance = config.dynamic_bias_hidden_size, config.dynamic_bias_log_distance
        layers, width = [], 1
        for _ in range(config.dynamic_bias_depth):
            layers.append(nn.Linear(width, size))
            if config.dynamic_bias_norm:
                layers.append(nn.LayerNorm(size, eps=config.layer_norm_eps))
            layers.append(nn.SiLU())
            width = size
        self.mlp = nn.Sequential(*layers, nn.Linear(width, config.num_attention_heads))

    def forward(self, longest_distance: int) -> dict[str, torch.Tensor]:
        """The bias for distances up to `longest_distance`, `[H, 2 * longest_distance + 1]`."""
        weight = self.mlp[-1].weight
        distance = torch.arange(longest_distance, -longest_distance - 1, -1, device=weight.device, dtype=torch.float32)
        if self.log_distance:
            distance = distance.sign() * torch.log1p(distance.abs())
        return {"distance_bias": self.mlp(distance[:, None].to(weight.dtype)).T}


def make_position_bias(config) -> nn.Module | None:
    """The module that `config.position_bias` asks for, or None."""
    kinds = {"alibi": AlibiBias, "t5": T5Bias, "dynamic": DynamicBias}
    return None if config.position_bias is None else kinds[config.position_bias](config)
