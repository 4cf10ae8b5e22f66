"""A whole block of conditional computation, for use in other models."""

from torch import Tensor, nn

from .routed_attention import RoutedAttention
from .routed_feed_forward import RoutedFeedForward


class RoutedTransformerBlock(nn.Module):
    """`X + RoutedAttention(X)`, then `X + RoutedFeedForward(X)` (CoLT5, arXiv 2303.09752, section 3).

        block = RoutedTransformerBlock(
            512,
            attention={"light_heads": 4, "heavy_heads": 8, "num_routed_queries": 1024, "num_routed_keys": 2048},
            feed_forward={"light_intermediate_size": 256, "heavy_intermediate_size": 2048, "num_routed": 1024},
        )

    Args:
        hidden_size: C.
        attention, feed_forward: the arguments of `RoutedAttention` and `RoutedFeedForward`.
    """

    def __init__(self, hidden_size: int, *, attention: dict, feed_forward: dict):
        super().__init__()
        self.self_attn = RoutedAttention(hidden_size, **attention)
        self.mlp = RoutedFeedForward(hidden_size, **feed_forward)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_routed_queries: int | float | None = None,
        num_routed_keys: int | float | None = None,
        num_routed: int | float | None = None,
    ) -> Tensor:
        """`[B, N, C]` for `hidden_states` `[B, N, C]`; the last three instead of the modules' own numbers."""
        hidden_states = hidden_states + self.self_attn(
            hidden_states,
            attention_mask,
            num_routed_queries=num_routed_queries,
            num_routed_keys=num_routed_keys,
        )
        return hidden_states + self.mlp(hidden_states, attention_mask, num_routed=num_routed)
