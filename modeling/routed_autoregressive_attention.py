"""Conditional attention for decoders: causal to the bit, and with a cache that holds the routed tokens only."""

from functools import partial

import torch
from torch import Tensor, nn

from .causal_router import CausalTokenRouter
from .heavy_attention import HeavyAttention
from .light_attention import LightAttention
from .routed_cache import RoutedStateLayer
from .token_router import check_mask


class CausalHeavyAttention(HeavyAttention):
    """`HeavyAttention` whose routers know the past only, and whose queries see the routed keys up to themselves.

    Args:
        hidden_size, **options: as in `HeavyAttention`; numbers of routed tokens are those of a window.
        routing_window: see `CausalTokenRouter`.
    """

    def __init__(self, hidden_size: int, *, routing_window: int = 128, **options):
        super().__init__(hidden_size, router_class=partial(CausalTokenRouter, window=routing_window), **options)

    def forward(
        self,
        output: Tensor,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        *,
        distance_bias: Tensor | None = None,
        past: RoutedStateLayer | None = None,
        num_routed_queries: int | float | None = None,
        num_routed_keys: int | float | None = None,
    ) -> Tensor:
        """As `HeavyAttention.forward`, for the tokens behind those in `past`."""
        length, start = hidden_states.shape[1], 0 if past is None else past.get_seq_length()
        routings, histories = {}, {}
        for name, router, number in (
            ("queries", self.q_router, num_routed_queries or self.num_routed_queries),
            ("keys", self.key_value_router, num_routed_keys or self.num_routed_keys),
        ):
            before = None if past is None else past.history(name)
            routings[name], histories[name] = router(hidden_states, number, mask, before)
            if past is not None:
                past.remember(name, histories[name], max(router.window - 1, 1))
        queries, keys = routings["queries"], routings["keys"]
        # Counted over real tokens, so that padding on the left turns nothing.
        position = (histories["keys"].seen[:, None, -length:] - 1).clamp(min=0)
        query = self.project_queries(hidden_states, queries, position.gather(2, queries.indices))
        positions = position.expand(-1, self.num_sets, -1).gather(2, keys.indices)
        key, value = self.project_keys(hidden_states, keys, positions)
        query_slots, key_slots, filled = queries.indices + start, keys.indices + start, keys.mask
        if past is not None:
            limit = self.key_value_router.limit(num_routed_keys or self.num_routed_keys)
            split = (-1, self.num_sets)
            room = limit * ((start + length) // self.key_value_router.window + 2)
            key, value = past.update(
                key.unflatten(0, split), value.unflatten(0, split), slots=key_slots, filled=filled, room=room
            )
            key, value, key_slots, filled = key.flatten(0, 1), value.flatten(0, 1), past.slots, past.filled
        visible = (key_slots[:, :, None, :] <= query_slots[..., None]) & filled[:, :, None, :]
        bias = None if distance_bias is None else self.bias_of(distance_bias, query_slots, key_slots)
        return self.add_output(output, self.attend_to_pairs(query, key, value, visible, bias), queries)


class RoutedAutoregressiveAttention(nn.Module):
    """`A_light(X) + s_q · A_heavy(X, s_kv X)` where no token sees, or is routed by, a later one.

    Routing follows `CausalTokenRouter`: a token is routed if its logit is among the k largest of the last
    `routing_window` tokens, itself included. So k tokens of each window are routed on average, decisions are final, a
    cached step decides as the whole sequence does, and the weight of a routed token has the gradient of a soft top-k.
    (CoLT5-attention chooses queries by a top-k inside a window, in which a later token can push out an earlier one.)

    The routed keys of the whole past are visible: for N tokens, O(N · radius + (k / W)² N²) time, and a cache that
    grows by at most `9/8 · k` keys every W tokens.

        layer = RoutedAutoregressiveAttention(512, num_routed_queries=32, num_routed_keys=16, num_key_value_sets=2)
        hidden_states = hidden_states + layer(hidden_states)

    Args:
        hidden_size: C.
        light_heads, light_head_dim, radius: see `LightAttention`.
        heavy_heads, heavy_head_dim: heads of the heavy branch.
        routing_window: W.
        norm_eps, dropout: of both branches.
        **heavy_options: the other arguments of `HeavyAttention`; `num_routed_queries` and `num_routed_keys` are
            numbers or fractions of the W tokens of a window.
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
        routing_window: int = 128,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        **heavy_options,
    ):
        super().__init__()
        self.light_attn = LightAttention(
            hidden_size,
            num_heads=light_heads,
            head_dim=light_head_dim,
            radius=radius,
            causal=True,
            norm_type=light_norm_type,
            norm_eps=norm_eps if light_norm_type == "rms_norm" else 1e-5,
            dropout=dropout,
        )
        self.heavy_attn = CausalHeavyAttention(
            hidden_size,
            num_heads=heavy_heads,
            head_dim=heavy_head_dim,
            routing_window=routing_window,
            norm_eps=norm_eps,
            dropout=dropout,
            **heavy_options,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        past: RoutedStateLayer | None = None,
        light_distance_bias: Tensor | None = None,
        heavy_distance_bias: Tensor | None = None,
        num_routed_queries: int | float | None = None,
        num_routed_keys: int | float | None = None,
    ) -> Tensor:
        """`[B, N, C]` for `hidden_states` `[B, N, C]`, the tokens behind those in `past`.

        Args:
            attention_mask: `[B, everything seen]`, nonzero at real tokens; padding stands on the left, or on the right
                of everything.
            past: a cache layer, which the caller advances with `past.count(hidden_states)` when the block is done.
            light_distance_bias, heavy_distance_bias: `[H, 2R + 1]` for the heads of either branch, as in
                `flash_attention`.
            num_routed_queries, num_routed_keys: instead of the module's own.

        Raises:
            ValueError: a mask of another shape.
        """
        mask = new = None
        if attention_mask is not None:
            new = check_mask("attention_mask", attention_mask[:, -hidden_states.shape[1] :], hidden_states)
            mask = attention_mask.to(torch.bool)
        return self.heavy_attn(
            self.light_attn(hidden_states, mask, distance_bias=light_distance_bias, past=past),
            hidden_states,
            new,
            distance_bias=heavy_distance_bias,
            past=past,
            num_routed_queries=num_routed_queries,
            num_routed_keys=num_routed_keys,
        )
