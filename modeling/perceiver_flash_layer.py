"""One block of a PerceiverFlash: attention (to an input, among the latents or of queries) and feed-forward."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_masks import AttentionMask, eager_attention, is_flash_attention
from .feed_forward import FeedForward
from .few_rows import project
from .packed_attention import attend_packed
from .rotary import RotaryTables, apply_rotary
from .streamed_attention import ContextChunk, chunked_attention, streamed_attention


Rotary = RotaryTables | None


def turn(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn the first channels of `states` `[B, H, N, D]`, as many as the tables have."""
    if rotary is None:
        return states
    size = rotary[0].shape[-1]
    if size == states.shape[-1]:
        return apply_rotary(states, rotary)
    return torch.cat([apply_rotary(states[..., :size], rotary), states[..., size:]], dim=-1)


class PerceiverFlashAttention(nn.Module):
    """Softmax attention through transformers' attention interface; all widths may differ.

    Args:
        config: for the name of the attention implementation.
        block: a `PerceiverFlashBlock`.
    """

    def __init__(self, config, block):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim, self.value_head_dim = block.num_heads, block.head_dim, block.value_head_dim
        self.scaling, self.attention_dropout = block.head_dim**-0.5, block.attention_dropout
        self.is_causal, self.num_key_value_groups = False, 1
        context_size = block.hidden_size if block.context_size is None else block.context_size
        keys, values, bias = (
            block.num_heads * block.head_dim,
            block.num_heads * block.value_head_dim,
            block.attention_bias,
        )
        self.q_proj = nn.Linear(block.hidden_size, keys, bias=bias)
        self.k_proj = nn.Linear(context_size, keys, bias=bias)
        self.v_proj = nn.Linear(context_size, values, bias=bias)
        self.o_proj = nn.Linear(values, block.hidden_size)

    @property
    def dropout(self) -> float:
        """Probability of dropping a weight now."""
        return self.attention_dropout if self.training else 0.0

    def project_query(self, hidden_states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """`[B, N, C]` to `[B, H, N, D]`."""
        return turn(project(self.q_proj, hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2), rotary)

    def project_context(self, context: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, K, C]` to keys `[B, H, K, D]` and values `[B, H, K, V]`."""
        key = project(self.k_proj, context).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        value = project(self.v_proj, context).unflatten(-1, (-1, self.value_head_dim)).transpose(1, 2)
        return turn(key, rotary), value

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        attention_mask: AttentionMask,
        query_rotary: Rotary = None,
        key_rotary: Rotary = None,
        layer_past=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `hidden_states` `[B, N, C]` read of `context` `[B, K, C']` (and of the cache), and the weights."""
        query = self.project_query(hidden_states, query_rotary)
        key, value = self.project_context(context, key_rotary)
        if layer_past is not None:
            key, value = layer_past.update(key, value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        kwargs |= {"dropout": self.dropout, "scaling": self.scaling, "is_causal": attention_mask.is_causal}
        if attention_mask.mask is not None and is_flash_attention(self.config._attn_implementation):
            attended = attend_packed(attend, self, query, key, value, attention_mask.mask, **kwargs)
            return project(self.o_proj, attended.flatten(2)), None
        attended, weights = attend(self, query, key, value, attention_mask.mask, **kwargs)
        if attention_mask.sighted is not None:
            # Not a product: of a row that sees nothing, flex attention makes NaN on some processors.
            attended = torch.where(attention_mask.sighted, attended, 0)
        # Only eager attention gives weights: what flex attention returns beside its output is something else.
        return project(self.o_proj, attended.flatten(2)), weights if attend is eager_attention else None


class PerceiverFlashLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind a LayerNorm and added to its input.

    Without `mlp_residual` the second sum is left out, which is flash-perceiver's block.
    """

    def __init__(self, config, block):
        super().__init__()
        self.query_residual, self.mlp_residual = block.query_residual, block.mlp_residual
        self.attention_norm = nn.LayerNorm(block.hidden_size, eps=block.layer_norm_eps)
        self.context_norm = nn.Identity()
        if block.normalize_context:
            self.context_norm = nn.LayerNorm(block.context_size, eps=block.layer_norm_eps)
        self.attention = PerceiverFlashAttention(config, block)
        self.mlp_norm = nn.LayerNorm(block.hidden_size, eps=block.layer_norm_eps)
        self.mlp = FeedForward(block)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None = None,
        chunk_size: int | None = None,
        key_mask: torch.Tensor | None = None,
        causal: bool = False,
        query_rotary: Rotary = None,
        key_rotary: Rotary = None,
        **kwargs,
    ) -> torch.Tensor:
        """The stream `[B, N, C]` after this block.

        Args:
            hidden_states: `[B, N, C]`.
            context: `[B, K, C']`, what is attended to; None for the stream itself.
            chunk_size: how many positions of the context have keys and values at a time; None for all.
            key_mask: `[B, K]`, nonzero where a position of the context counts, or None; read with `chunk_size` only.
            causal: whether a query, the last of which stands at the last position, sees none behind it; likewise.
            kwargs: what else `PerceiverFlashAttention.forward` reads, among it the mask without `chunk_size`.
        """
        if chunk_size is not None:
            attention = self.attention
            attended = chunked_attention(
                attention.project_query(self.attention_norm(hidden_states), query_rotary),
                context,
                chunk_size,
                key_mask,
                key_rotary,
                hidden_states.shape[1] if causal else 0,
                self._project,
                [*self.context_norm.parameters(), *attention.k_proj.parameters(), *attention.v_proj.parameters()],
                attention.scaling,
                attention.dropout,
            )
            return self._finish(hidden_states, project(attention.o_proj, attended.transpose(1, 2).flatten(2)))
        inputs = self.attention_norm(hidden_states)
        context = inputs if context is None else self.context_norm(context)
        rotary = {"query_rotary": query_rotary, "key_rotary": key_rotary}
        return self._finish(hidden_states, self.attention(inputs, context, **rotary, **kwargs)[0])

    def stream(
        self, hidden_states: torch.Tensor, chunks: Iterable[ContextChunk], query_rotary: Rotary = None
    ) -> torch.Tensor:
        """As `forward`, with a context that comes in chunks, which are read once; without gradients."""
        attention = self.attention
        query = attention.project_query(self.attention_norm(hidden_states), query_rotary)
        attended = streamed_attention(query, chunks, self._project, attention.scaling, attention.dropout)
        return self._finish(hidden_states, project(attention.o_proj, attended.transpose(1, 2).flatten(2)))

    def _project(self, context, rotary):
        return self.attention.project_context(self.context_norm(context), rotary)

    def _finish(self, hidden_states, update):
        hidden_states = hidden_states + update if self.query_residual else update
        update = self.mlp(self.mlp_norm(hidden_states))
        return hidden_states + update if self.mlp_residual else update
