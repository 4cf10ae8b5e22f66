"""The blocks of CoLT5: the routed one of the encoder, T5's of the decoder, and the routed causal one."""

from functools import partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration.colt5 import CoLT5Config
from ..kernels.flash_attention import flash_attention
from .cache_name import takes_cache
from .causal_router import CausalTokenRouter
from .feed_forward import FeedForward
from .few_rows import project
from .norms import make_norm
from .routed_attention import RoutedAttention
from .routed_autoregressive_attention import RoutedAutoregressiveAttention
from .routed_cache import RoutedStateLayer
from .routed_feed_forward import FeedForwardShape, RoutedFeedForward
from .token_router import RouterOptions


def router_options(config: CoLT5Config) -> RouterOptions:
    """The options of every router."""
    return RouterOptions(
        score_ratio=config.routing_score_ratio,
        temperature=config.routing_temperature,
        method=config.routing_method,
        num_iterations=config.routing_iterations,
        initial_temperature=config.routing_initial_temperature,
        temperature_decay=config.routing_temperature_decay,
        straight_through=config.straight_through_routing,
        normalization=config.routing_normalization,
        static=config.static_routing,
    )


def attention_options(config: CoLT5Config) -> dict:
    """What all routed attentions take from the configuration."""
    return {
        "light_heads": config.num_light_attention_heads,
        "light_head_dim": config.head_dim,
        "heavy_heads": config.num_heavy_attention_heads,
        "heavy_head_dim": config.head_dim,
        "num_routed_queries": config.num_routed_queries,
        "num_routed_keys": config.num_routed_keys,
        "num_key_value_sets": config.num_key_value_sets,
        "rotary_base": config.rotary_emb_base if config.heavy_position_embedding_type == "rotary" else None,
        "multiply_keys_by_score": config.multiply_keys_by_score,
        "null_query_token": config.null_query_token,
        "null_key_value": config.null_key_value,
        "norm_eps": config.norm_eps,
        "dropout": config.dropout_rate,
        "router_options": router_options(config),
    }


def feed_forward_options(config: CoLT5Config) -> dict:
    """What all routed feed-forwards take from the configuration."""
    return {
        "light_intermediate_size": config.light_intermediate_size,
        "heavy_intermediate_size": config.heavy_intermediate_size,
        "num_routed": config.num_routed_tokens,
        "hidden_act": config.hidden_act,
        "gated": config.gated_feed_forward,
        "bias": config.mlp_bias,
        "dropout": config.dropout_rate,
        "norm_eps": config.norm_eps,
        "router_options": router_options(config),
    }


class CoLT5EncoderLayer(GradientCheckpointingLayer):
    """Conditional attention, then a conditional feed-forward, each added to the residual stream."""

    def __init__(self, config: CoLT5Config):
        super().__init__()
        radius = config.light_attention_radius
        self.self_attn = RoutedAttention(config.hidden_size, radius=radius, **attention_options(config))
        self.mlp = RoutedFeedForward(config.hidden_size, **feed_forward_options(config))
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None, light_bias: Tensor | None, heavy_bias: Tensor | None
    ) -> Tensor:
        """`[B, N, C]`; `mask` `[B, N]`, the biases as in `RoutedAttention.forward`."""
        attended = self.self_attn(hidden_states, mask, light_distance_bias=light_bias, heavy_distance_bias=heavy_bias)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(hidden_states, mask))


class CoLT5CausalLayer(GradientCheckpointingLayer):
    """`CoLT5EncoderLayer` where no token sees, or is routed by, a later one."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = RoutedAutoregressiveAttention(
            config.hidden_size,
            radius=config.light_attention_radius,
            routing_window=config.routing_window,
            **attention_options(config),
        )
        router_class = partial(CausalTokenRouter, window=config.routing_window)
        self.mlp = RoutedFeedForward(config.hidden_size, router_class=router_class, **feed_forward_options(config))
        self.dropout = nn.Dropout(config.dropout_rate)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        light_bias: Tensor | None,
        heavy_bias: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """`[B, N, C]`, for `mask` `[B, everything seen]` and a cache made for this configuration."""
        past: RoutedStateLayer | None = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        attended = self.self_attn(
            hidden_states, mask, past=past, light_distance_bias=light_bias, heavy_distance_bias=heavy_bias
        )
        hidden_states = hidden_states + self.dropout(attended)
        router, length = self.mlp.router, hidden_states.shape[1]
        new = None if mask is None else mask[:, -length:].to(torch.bool)
        before = None if past is None else past.history("feed_forward")
        routing, history = router(hidden_states, self.mlp.num_routed, new, before)
        if past is not None:
            past.remember("feed_forward", history, max(router.window - 1, 1))
            past.count(hidden_states)
        return hidden_states + self.dropout(self.mlp.add_heavy(hidden_states, routing))


class DecoderAttention(nn.Module):
    """Softmax attention of T5's decoder with a norm in front: over itself, or over what the encoder gave.

    Args:
        config: reads `hidden_size`, `num_attention_heads`, `head_dim`, `norm_eps` and `dropout_rate`.
        key_value_heads: key and value heads, each shared by a group of query heads.
        layer_idx: place in the cache.
        is_causal: self-attention; else cross-attention.
    """

    def __init__(self, config: CoLT5Config, key_value_heads: int, layer_idx: int, is_causal: bool):
        super().__init__()
        self.layer_idx, self.is_causal = layer_idx, is_causal
        self.head_dim, self.dropout = config.head_dim, config.dropout_rate
        size, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.norm = make_norm("rms_norm", size, config.norm_eps)
        self.q_proj = nn.Linear(size, inner, bias=False)
        self.k_proj = nn.Linear(size, key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(size, key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(inner, size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        distance_bias: Tensor | None,
        past_key_values: EncoderDecoderCache | None,
    ) -> Tensor:
        """`[B, N, C]`; `mask` `[B, everything seen]` or, with a `context` `[B, M, C]`, `[B, M]`."""
        normed = self.norm(hidden_states)
        query = self._heads(project(self.q_proj, normed))
        key_lengths = None
        if context is None:
            key, value = (self._heads(project(layer, normed)) for layer in (self.k_proj, self.v_proj))
            if past_key_values is not None:
                cache = past_key_values.self_attention_cache
                seen = cache.get_seq_length(self.layer_idx) + query.shape[2]
                key, value = cache.update(key, value, self.layer_idx)
                if isinstance(seen, Tensor) or key.shape[2] != seen:  # preallocated: longer than what it holds
                    key_lengths = torch.as_tensor(seen, device=query.device).expand(len(query))
            if mask is not None and mask.shape[1] < key.shape[2]:
                mask = nn.functional.pad(mask, (0, key.shape[2] - mask.shape[1]), value=False)
        else:
            key, value = self._context_heads(context, past_key_values)
        output = flash_attention(
            query,
            key,
            value,
            causal=self.is_causal,
            key_mask=mask,
            key_lengths=key_lengths,
            distance_bias=distance_bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return project(self.o_proj, output.transpose(1, 2).flatten(2))

    def _context_heads(self, context, past_key_values):
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        key, value = self._heads(self.k_proj(context)), self._heads(self.v_proj(context))
        if past_key_values is not None:
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return key, value

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class CoLT5DecoderLayer(GradientCheckpointingLayer):
    """T5.1.1's block: causal self-attention, cross-attention with few key heads, gated feed-forward."""

    def __init__(self, config: CoLT5Config, layer_idx: int):
        super().__init__()
        self.self_attn = DecoderAttention(config, config.num_attention_heads, layer_idx, is_causal=True)
        self.cross_attn = DecoderAttention(config, config.cross_attention_key_value_heads, layer_idx, is_causal=False)
        self.mlp_norm = make_norm("rms_norm", config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(
            FeedForwardShape(
                config.hidden_size,
                config.intermediate_size,
                config.hidden_act,
                config.gated_feed_forward,
                config.mlp_bias,
                config.dropout_rate,
            )
        )
        self.dropout = nn.Dropout(config.dropout_rate)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        mask: Tensor | None,
        encoder_mask: Tensor | None,
        distance_bias: Tensor,
        past_key_values: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """`[B, N, C]` for `encoder_hidden_states` `[B, M, C]`, masks `[B, everything seen]` and `[B, M]`."""
        attended = self.self_attn(hidden_states, None, mask, distance_bias, past_key_values)
        hidden_states = hidden_states + self.dropout(attended)
        attended = self.cross_attn(hidden_states, encoder_hidden_states, encoder_mask, None, past_key_values)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
