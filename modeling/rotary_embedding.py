"""Rotary positions as a configuration describes them: a part of each head, rescaled for long inputs, or with decay."""

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..configuration.x_transformer_rules import ROPE_TYPES
from .fixed_tables import FixedTable
from .rotary import RotaryTables, apply_rotary, both_halves


class RotaryEmbedding(FixedTable):
    """Angles for queries and keys (arXiv 2104.09864), and xPos' decay (arXiv 2212.10554).

    Args:
        config: reads `rope_parameters`, `rotary_positions`, `rotary_dim`, `xpos_scale_base`, and what transformers'
            rope functions read.
    """

    def __init__(self, config):
        self.__dict__["config"] = config  # `compute` needs it before nn.Module is set up
        super().__init__()
        self.scales_base = config.xpos_scale_base if config.rotary_positions == "xpos" else None
        self.attention_scaling = self.parameters_of_kind()[1]

    def parameters_of_kind(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[rotary_dim / 2]` and the factor on cosines and sines."""
        rope, dim = self.config.rope_parameters, self.config.rotary_dim
        kind = rope["rope_type"]
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r}")
        with torch.device("cpu"):
            if kind in ("default", "linear"):
                exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
                return rope["rope_theta"] ** -exponents / rope.get("factor", 1.0), 1.0
            return ROPE_INIT_FUNCTIONS[kind](self.config)

    def compute(self) -> torch.Tensor:
        return both_halves(self.parameters_of_kind()[0].float())

    def forward(self, position_ids: torch.Tensor) -> tuple[RotaryTables, RotaryTables]:
        """Tables for queries and for keys at `position_ids` `[B or 1, N]`, of `rotary_dim` channels."""
        angles = position_ids[:, None, :, None].float() * self.table
        tables = RotaryTables.of(angles, self.attention_scaling)
        if self.scales_base is None:
            return tables, tables
        size = self.table.shape[0]
        bases = (torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) + 0.4 * size) / (1.4 * size)
        decay = bases ** (position_ids[:, None, :, None].float() / self.scales_base)
        decay = torch.cat([decay, decay], dim=-1)
        cos, sin, _ = tables
        return RotaryTables(cos * decay, sin * decay), RotaryTables(cos / decay, sin / decay)


def rotate(states: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """Turn the first channels of `states` `[B, H, N, D]`, as many as the tables have."""
    size = tables[0].shape[-1]
    if size == states.shape[-1]:
        return apply_rotary(states, tables)
    return torch.cat([apply_rotary(states[..., :size], tables), states[..., size:]], dim=-1)


def rotate_both(
    query: torch.Tensor, key: torch.Tensor, tables: tuple[RotaryTables, RotaryTables]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` `[B, H, N, D]` by the first tables, `key` `[B, G, M, D]` by the second."""
    if tables[0] is tables[1] and query.shape[2] == key.shape[2] == 1:
        # A step of decoding waits for the number of its operations.
        turned = rotate(torch.cat([query, key], dim=1), tables[0])
        return turned.split_with_sizes((query.shape[1], key.shape[1]), dim=1)
    return rotate(query, tables[0]), rotate(key, tables[1])
