"""Images as sequences of patches: the cut, the embedding of Simple ViT (arXiv 2205.01580), and positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Module):
    """Images cut into patches, each patch between two norms turned into a vector.

    Args:
        patch_size: height and width of a patch.
        num_channels: channels of the images.
        hidden_size: C.
        eps, norm_bias: epsilon of the norms, and whether they have biases.
    """

    def __init__(
        self, patch_size: int, num_channels: int, hidden_size: int, *, eps: float = 1e-5, norm_bias: bool = True
    ):
        super().__init__()
        self.patch_size, self.num_channels = patch_size, num_channels
        self.patch_norm = nn.LayerNorm(num_channels * patch_size**2, eps=eps, bias=norm_bias)
        self.projection = nn.Linear(num_channels * patch_size**2, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps, bias=norm_bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[B, height / p, width / p, C]` for images `[B, channels, height, width]`, floating point.

        Raises:
            ValueError: another shape or dtype, or a height or width that is no multiple of the patches'.
        """
        size, shape = self.patch_size, tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.num_channels or not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floating point [batch, channels, height, width] with {self.num_channels} "
                f"channels, got {pixel_values.dtype} of shape {shape}"
            )
        height, width = shape[-2:]
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


def resized_positions(table: Tensor, known: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """A learned table `[rows * columns, C]` for the grid `known`, interpolated (bicubic) to the grid `wanted`."""
    if wanted == known:
        return table
    grid = table.unflatten(0, known).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=wanted, mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T
