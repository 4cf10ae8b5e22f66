"""Conditional attention: local for every token, global for the routed ones; and from one sequence into another."""

import torch
from torch import Tensor, nn

from .heavy_attention import HeavyAttention
from .light_attention import LightAttention
from .token_router import check_mask


class RoutedAttention(nn.Module):
    """`A_light(X) + s_q · A_heavy(X, s_kv X)` (CoLT5, arXiv 2303.09752, section 3.2), both with a norm in front.

    With routed fractions q and v of N tokens: O(N · radius + q v N²) time, O(N) memory.

        layer = RoutedAttention(512, light_heads=4, heavy_heads=8, num_routed_queries=1024, num_routed_keys=2048)
        hidden_states = hidden_states + layer(hidden_states)

    Args:
        hidden_size: C.
        light_heads, light_head_dim, radius: see `LightAttention`; 0 heads for no light branch.
        light_norm_type: norm of the light branch, `"layer_norm"` in CoLT5-attention.
        heavy_heads, heavy_head_dim: heads of the heavy branch.
        norm_eps, dropout: of both branches.
        **heavy_options: the other arguments of `HeavyAttention`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        light_heads: int = 8,
        light_head_dim: int = 64,
        radius: int = 127,
        light_norm_type: str = "rms_norm",
        heavy_heads: int = 8,
        heavy_head_dim: int = 64,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        **heavy_options,
    ):
        super().__init__()
        self.light_attn = None
        if light_heads:
            self.light_attn = LightAttention(
                hidden_size,
                num_heads=light_heads,
                head_dim=light_head_dim,
                radius=radius,
                norm_type=light_norm_type,
                norm_eps=norm_eps if light_norm_type == "rms_norm" else 1e-5,
                dropout=dropout,
            )
        self.heavy_attn = HeavyAttention(
            hidden_size,
            num_heads=heavy_heads,
            head_dim=heavy_head_dim,
            norm_eps=norm_eps,
            dropout=dropout,
            **heavy_options,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        light_distance_bias: Tensor | None = None,
        heavy_distance_bias: Tensor | None = None,
        num_routed_queries: int | float | None = None,
        num_routed_keys: int | float | None = None,
    ) -> Tensor:
        """`[B, N, C]` for `hidden_states` `[B, N, C]`.

        Args:
            attention_mask: `[B, N]`, nonzero at real tokens. Others are never routed and seen by none; what comes out
                at their places is without a meaning, zero for a row that has no other.
            light_distance_bias, heavy_distance_bias: `[H, 2R + 1]` for the heads of either branch, as in
                `flash_attention`.
            num_routed_queries, num_routed_keys: instead of the module's own.

        Raises:
            ValueError: a mask of another shape.
        """
        mask = check_mask("attention_mask", attention_mask, hidden_states)
        if self.light_attn is None:
            output = torch.zeros_like(hidden_states)
        else:
            output = self.light_attn(hidden_states, mask, distance_bias=light_distance_bias)
        return self.heavy_attn(
            output,
            hidden_states,
            mask,
            distance_bias=heavy_distance_bias,
            num_routed_queries=num_routed_queries,
            num_routed_keys=num_routed_keys,
        )


class RoutedCrossAttention(nn.Module):
    """Attention from one sequence into another with routed queries and keys: a million memories at little cost.

    There is no light branch: tokens that are not routed get zero (or the learned null token).

        layer = RoutedCrossAttention(512, num_routed_queries=256, num_routed_keys=2048)
        hidden_states = hidden_states + layer(hidden_states, memories)

    Args:
        hidden_size: C.
        num_heads, head_dim: heads.
        **heavy_options: the other arguments of `HeavyAttention`. There are no rotary positions unless `rotary_base` is
            given.
    """

    def __init__(self, hidden_size: int, *, num_heads: int = 8, head_dim: int = 64, **heavy_options):
        super().__init__()
        heavy_options = {"rotary_base": None, **heavy_options}
        self.heavy_attn = HeavyAttention(hidden_size, num_heads=num_heads, head_dim=head_dim, **heavy_options)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        *,
        num_routed_queries: int | float | None = None,
        num_routed_keys: int | float | None = None,
    ) -> Tensor:
        """`[B, N, C]` for `hidden_states` `[B, N, C]` and `context` `[B, M, C]`.

        Args:
            attention_mask, context_mask: `[B, N]` and `[B, M]`, nonzero at real tokens.
            num_routed_queries, num_routed_keys: instead of the module's own.

        Raises:
            ValueError: a mask of another shape.
        """
        return self.heavy_attn(
            torch.zeros_like(hidden_states),
            hidden_states,
            check_mask("attention_mask", attention_mask, hidden_states),
            context=context,
            context_mask=check_mask("context_mask", context_mask, context),
            num_routed_queries=num_routed_queries,
            num_routed_keys=num_routed_keys,
        )
