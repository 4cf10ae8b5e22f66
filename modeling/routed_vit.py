"""Parts of a Vision Transformer with conditional computation, after Simple ViT (arXiv 2205.01580)."""

import torch
from torch import Tensor, nn

from .routed_feed_forward import RoutedFeedForward
from .routed_image_attention import RoutedImageAttention


class PatchEmbedding(nn.Module):
    """Images cut into patches, each patch between two norms turned into a vector.

    Args:
        patch_size: height and width of a patch.
        num_channels: channels of the images.
        hidden_size: C.
    """

    def __init__(self, patch_size: int, num_channels: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.patch_norm = nn.LayerNorm(num_channels * patch_size**2)
        self.projection = nn.Linear(num_channels * patch_size**2, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, height / p, width / p, C]` for images `[B, channels, height, width]`.

        Raises:
            ValueError: a height or width that is no multiple of the patches'.
        """
        size = self.patch_size
        height, width = pixel_values.shape[-2:]
        if height % size or width % size:
            raise ValueError(f"images must have a height and a width that {size} divides, got {height} and {width}")
        patches = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, channels, h, p, w, p]
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3)
        return self.norm(self.projection(self.patch_norm(patches)))


def sincos_positions(height: int, width: int, hidden_size: int, *, device=None, dtype=torch.float32) -> Tensor:
    """Fixed sine and cosine positions of a map, `[height, width, hidden_size]`, to be added to it.

    The channels are quarters: sine and cosine of the column, sine and cosine of the row.

    Raises:
        ValueError: a hidden size that is no multiple of 4, or less than 8.
    """
    if hidden_size % 4 or hidden_size < 8:
        raise ValueError(f"hidden_size must be a multiple of 4 of at least 8, got {hidden_size}")
    quarter = hidden_size // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / (quarter - 1))
    rows = torch.arange(height, device=device)[:, None, None] * frequencies
    columns = torch.arange(width, device=device)[None, :, None] * frequencies
    parts = (columns.sin(), columns.cos(), rows.sin(), rows.cos())
    return torch.cat([part.expand(height, width, quarter) for part in parts], dim=-1).to(dtype)


class RoutedImageBlock(nn.Module):
    """`X + RoutedImageAttention(X)`, then `X + RoutedFeedForward(X)` over all places of the map.

    Args:
        hidden_size: C.
        attention, feed_forward: the arguments of `RoutedImageAttention` and `RoutedFeedForward`.
    """

    def __init__(self, hidden_size: int, *, attention: dict, feed_forward: dict):
        super().__init__()
        self.self_attn = RoutedImageAttention(hidden_size, **attention)
        self.mlp = RoutedFeedForward(hidden_size, **feed_forward)

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, height, width, C]` for `maps` `[B, height, width, C]`."""
        maps = maps + self.self_attn(maps)
        return maps + self.mlp(maps.flatten(1, 2)).view(maps.shape)
