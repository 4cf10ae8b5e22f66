"""Conditional attention over feature maps: windows for every place, the whole map for the routed places."""

from torch import Tensor, nn

from .heavy_attention import HeavyAttention
from .light_attention import LightAttention


class RoutedImageAttention(nn.Module):
    """`A_light(X) + s_q · A_heavy(X, s_kv X)` with full attention inside square windows for the light branch.

    The heavy branch routes over the whole map, so that information crosses windows. For a map of N places and windows
    of w × w: O(N w² + q v) time.

        layer = RoutedImageAttention(32, window_size=16, num_routed_queries=1024, num_routed_keys=2048)
        maps = maps + layer(maps)  # [B, 256, 256, 32]

    Args:
        hidden_size: C.
        light_heads, light_head_dim: heads of the light branch.
        window_size: w, which has to divide height and width.
        heavy_heads, heavy_head_dim: heads of the heavy branch.
        channel_first: maps are `[B, C, height, width]`.
        heavy_in_windows: route and attend inside each window, as CoLT5-attention does: the numbers of routed tokens
            are then those of a window, and nothing mixes windows. For converted weights.
        norm_eps, dropout: of both branches.
        **heavy_options: the other arguments of `HeavyAttention`. There are no rotary positions unless `rotary_base` is
            given, and then they are those of the flattened map.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        light_heads: int = 8,
        light_head_dim: int = 64,
        window_size: int = 16,
        heavy_heads: int = 8,
        heavy_head_dim: int = 64,
        channel_first: bool = False,
        heavy_in_windows: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        **heavy_options,
    ):
        super().__init__()
        self.window_size, self.channel_first, self.heavy_in_windows = window_size, channel_first, heavy_in_windows
        shared = {"norm_eps": norm_eps, "dropout": dropout}
        self.light_attn = LightAttention(
            hidden_size, num_heads=light_heads, head_dim=light_head_dim, radius=None, **shared
        )
        self.heavy_attn = HeavyAttention(
            hidden_size,
            num_heads=heavy_heads,
            head_dim=heavy_head_dim,
            **{"rotary_base": None, **shared, **heavy_options},
        )

    def forward(
        self,
        maps: Tensor,
        *,
        num_routed_queries: int | float | None = None,
        num_routed_keys: int | float | None = None,
    ) -> Tensor:
        """Maps of the shape of `maps`, `[B, height, width, C]` or, if `channel_first`, `[B, C, height, width]`.

        Raises:
            ValueError: a height or width that is no multiple of the window.
        """
        if maps.ndim != 4:
            raise ValueError(f"maps must have four axes, got shape {tuple(maps.shape)}")
        if self.channel_first:
            maps = maps.movedim(1, -1)
        height, width = maps.shape[1:3]
        size = self.window_size
        if height % size or width % size:
            raise ValueError(f"maps must have a height and a width that {size} divides, got {height} and {width}")
        windows = maps.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)  # [B, h, w, size, size, C]
        folded = windows.flatten(3, 4).flatten(0, 2)
        options = {"num_routed_queries": num_routed_queries, "num_routed_keys": num_routed_keys}
        output = self.light_attn(folded)
        if self.heavy_in_windows:
            output = self.heavy_attn(output, folded, **options)
        output = output.view(windows.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if not self.heavy_in_windows:
            flat = self.heavy_attn(output.flatten(1, 2), maps.flatten(1, 2), **options)
            output = flat.unflatten(1, (height, width))
        return output.movedim(-1, 1) if self.channel_first else output
