"""Parts of a Vision Transformer with conditional computation, after Simple ViT (arXiv 2205.01580)."""

from torch import Tensor, nn

from .routed_feed_forward import RoutedFeedForward
from .routed_image_attention import RoutedImageAttention


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
