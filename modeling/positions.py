"""Position embeddings that are added to the token embeddings: sinusoidal, learned and axial."""

import torch
from torch import nn


class SinusoidalPositionEmbedding(nn.Module):
    """Fixed sinusoids (arXiv 1706.03762), all sines before all cosines. No table: any position works."""

    def __init__(self, hidden_size: int, base: float):
        super().__init__()
        self.hidden_size, self.base = hidden_size, base

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`[B or 1, N]` positions to `[B or 1, N, hidden_size]` float32."""
        half = torch.arange(0, self.hidden_size, 2, device=position_ids.device, dtype=torch.float32)
        angles = position_ids[..., None].to(torch.float32) * self.base ** (-half / self.hidden_size)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class AxialPositionEmbedding(nn.Module):
    """The sum of a learned row vector and a learned column vector (arXiv 1912.12180), positions in reading order."""

    def __init__(self, shape: list[int], hidden_size: int):
        super().__init__()
        self.columns_per_row = shape[1]
        self.rows = nn.Embedding(shape[0], hidden_size)
        self.columns = nn.Embedding(shape[1], hidden_size)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        row = torch.div(position_ids, self.columns_per_row, rounding_mode="floor")
        return self.rows(row) + self.columns(position_ids % self.columns_per_row)


def make_position_embedding(config) -> nn.Module | None:
    """The module that `config.position_embedding_type` asks for, or None if nothing is added to the embeddings."""
    kind = config.position_embedding_type
    if kind in ("sinusoidal", "rotary_and_sinusoidal"):
        return SinusoidalPositionEmbedding(config.hidden_size, config.rotary_emb_base)
    if kind == "learned":
        return nn.Embedding(config.max_position_embeddings, config.hidden_size)
    if kind == "axial":
        return AxialPositionEmbedding(config.axial_position_shape, config.hidden_size)
    return None
