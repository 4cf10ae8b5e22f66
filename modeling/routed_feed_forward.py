"""The conditional feed-forward: a narrow one for every token, a wide one for the routed tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .feed_forward import FeedForward
from .norms import make_norm
from .token_router import (
    DEFAULT_OPTIONS,
    RouterOptions,
    TokenRouter,
    add_tokens,
    check_mask,
    check_num_tokens,
    gather_tokens,
)


class FeedForwardShape(NamedTuple):
    """What `FeedForward` reads; the defaults are T5.1.1's."""

    hidden_size: int
    intermediate_size: int
    hidden_act: str = "gelu_new"
    gated_feed_forward: bool = True
    mlp_bias: bool = False
    feed_forward_dropout: float = 0.0
    chunk_size_feed_forward: int = 0


class RoutedFeedForward(nn.Module):
    """`FF_light(X) + s · FF_heavy(X)`, the second for routed tokens only (CoLT5, arXiv 2303.09752, section 3.1).

    Both have a norm in front; the sum with the residual stream is left to the caller.

        layer = RoutedFeedForward(512, light_intermediate_size=256, heavy_intermediate_size=2048, num_routed=1024)
        hidden_states = hidden_states + layer(hidden_states)

    Args:
        hidden_size: C.
        light_intermediate_size, heavy_intermediate_size: inner widths; the paper has 1/2 and 4 times T5's.
        num_routed: how many tokens (an int) or which fraction of them (a float).
        hidden_act, gated, bias, dropout: of both; see `FeedForward`.
        norm_eps: epsilon of the norms.
        router_options: see `RouterOptions`.
        router_class: what makes the router, with the arguments of `TokenRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        light_intermediate_size: int,
        heavy_intermediate_size: int,
        num_routed: int | float = 1 / 16,
        hidden_act: str = "gelu_new",
        gated: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        router_options: RouterOptions = DEFAULT_OPTIONS,
        router_class: Callable[..., TokenRouter] = TokenRouter,
    ):
        super().__init__()
        check_num_tokens("num_routed", num_routed)
        self.num_routed = num_routed
        shared = (hidden_act, gated, bias, dropout)
        self.router = router_class(hidden_size, 1, router_options)
        self.light_norm = make_norm("rms_norm", hidden_size, norm_eps)
        self.light_mlp = FeedForward(FeedForwardShape(hidden_size, light_intermediate_size, *shared))
        self.heavy_norm = make_norm("rms_norm", hidden_size, norm_eps)
        self.heavy_mlp = FeedForward(FeedForwardShape(hidden_size, heavy_intermediate_size, *shared))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, num_routed: int | float | None = None
    ) -> Tensor:
        """`[B, N, C]` for `hidden_states` `[B, N, C]`.

        Args:
            attention_mask: `[B, N]`, nonzero at real tokens; others are never routed.
            num_routed: instead of the module's own.
        """
        mask = check_mask("attention_mask", attention_mask, hidden_states)
        return self.add_heavy(hidden_states, self.router(hidden_states, num_routed or self.num_routed, mask))

    def add_heavy(self, hidden_states: Tensor, routing) -> Tensor:
        """Both branches, given the routing."""
        tokens = gather_tokens(hidden_states, routing.indices[:, 0])
        heavy = self.heavy_mlp(self.heavy_norm(tokens)) * routing.scores[:, 0, :, None]
        light = self.light_mlp(self.light_norm(hidden_states))
        if not torch.compiler.is_compiling() and light._is_view():
            light = light.clone()  # what tensor parallelism hands back must not be written to
        return add_tokens(light, heavy, routing)
