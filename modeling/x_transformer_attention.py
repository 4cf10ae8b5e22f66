"""XTransformer's attention: projections, the modifiers that the configuration asks for, and one of two operations."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, EncoderDecoderCache

from .attention_gates import HeadGate, ValueGate
from .few_rows import project
from .query_key_norms import make_query_key_norms
from .rotary import RotaryTables
from .rotary_embedding import rotate, rotate_both
from .softmax_attention import (
    Extras,
    Visibility,
    fused_attention,
    is_plain_step,
    plain_step,
    written_out_attention,
)
from .zero_linear import ZeroLinear


class Attended(NamedTuple):
    """What an attention returns: `[B, N, C]`, and what later blocks and callers may want.

    Attributes:
        output: `[B, N, C]`.
        weights: `[B, H, N, M]`, from the written-out form only.
        values: `[B, G, N, V]`, before any mixing.
        scores: `[B, H, N, R + M]` before the mask, from the written-out form only.
        lse: `[B, H, N]`, logarithms of the softmax' denominators, for `attention_z_loss_coef` only.
    """

    output: torch.Tensor
    weights: torch.Tensor | None
    values: torch.Tensor
    scores: torch.Tensor | None
    lse: torch.Tensor | None


class XTransformerAttention(nn.Module):
    """Multi-head attention to the sequence itself or, as cross-attention, to an encoder's states."""

    def __init__(self, config, layer_idx: int, is_cross_attention: bool = False):
        super().__init__()
        self.is_cross_attention = is_cross_attention
        self.head_dim, self.value_head_dim = config.head_dim, config.value_head_dim
        heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
        size = config.hidden_size
        source = config.encoder_state_size if is_cross_attention else size
        self.q_proj = nn.Linear(size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(source, key_value_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(source, key_value_heads * self.value_head_dim, bias=config.attention_bias)
        out = 2 * size if config.attention_on_attention else size
        linear = ZeroLinear if config.zero_init_branches else nn.Linear
        self.o_proj = linear(heads * self.value_head_dim, out, bias=config.attention_out_bias)
        self.q_norm, self.k_norm, self.scaling = make_query_key_norms(config)
        # Memory keys go through the L2 norm as keys do, but not through RMSNorm: so x-transformers.
        self.norms_memory = config.qk_norm in ("l2", "l2_learned")
        self.memory_key = self.memory_value = None
        if config.num_memory_key_values:
            slots = (key_value_heads, config.num_memory_key_values)
            self.memory_key = nn.Parameter(torch.empty(*slots, self.head_dim))
            self.memory_value = nn.Parameter(torch.empty(*slots, self.value_head_dim))
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.learned_attention_sinks else None
        self.zero_sink = config.zero_attention_sink
        self.mix_scores = TalkingHeads(heads) if config.pre_softmax_talking_heads else None
        self.mix_weights = TalkingHeads(heads) if config.post_softmax_talking_heads else None
        self.adds_scores = config.cross_residual_attention if is_cross_attention else config.residual_attention
        self.mixes_values = config.value_residual is not None
        learned_mix = config.value_residual == "learned" and layer_idx > 0 and not is_cross_attention
        self.value_mix = nn.Linear(size, key_value_heads) if learned_mix else None
        self.head_scale = nn.Parameter(torch.ones(heads, 1, 1)) if config.head_output_scale else None
        self.head_gate = HeadGate(config) if config.head_gate else None
        self.value_gate = ValueGate(config) if config.value_gate is not None else None
        self.is_gated_output = config.attention_on_attention
        self.dropout, self.output_dropout = config.attention_dropout, config.attention_output_dropout
        # Read once: a field of a configuration costs as much as a small operation, and a cached step is made of those.
        self.softcap, self.backend = config.attn_logit_softcapping, config.kernel_backend
        self.penalised = bool(config.attention_z_loss_coef)
        self.mixes_scores = self.adds_scores or self.mix_scores is not None or self.mix_weights is not None
        others = (self.memory_key, self.sinks, self.softcap)
        self.is_plain = all(other is None for other in others) and not (self.zero_sink or self.mixes_scores)
        self.is_plain &= not self.penalised and self.backend == "auto" and self.head_dim == self.value_head_dim

    def set_initial_values(self) -> None:
        if self.memory_key is not None:
            init.normal_(self.memory_key)
            init.normal_(self.memory_value)
        if self.sinks is not None:
            init.zeros_(self.sinks)
        if self.head_scale is not None:
            init.ones_(self.head_scale)

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor | None = None,
        first_values: torch.Tensor | None = None,
        previous_scores: torch.Tensor | None = None,
        *,
        visibility: Visibility,
        layer_idx: int,
        rotary: tuple[RotaryTables, RotaryTables] | None = None,
        position_bias: nn.Module | None = None,
        written_out: bool = False,
        past_key_values: Cache | None = None,
    ) -> Attended:
        """Attend from `hidden_states` `[B, N, C]` to itself, or to `source` `[B, K, E]`.

        Args:
            source: an encoder's states, or those of a memory and `hidden_states` together; None for the latter alone.
            first_values: `[B, G, N, V]`, the values of the first block, or None in the first.
            previous_scores: the scores of the block before, or None.
            visibility: which keys count. Its masks cover all keys, the cached ones as well.
            layer_idx: which step of the stack this is, and so its place in the cache.
            rotary: tables for queries and keys, or None.
            position_bias: gives the bias of the scores, see position_bias.py; or None.
            written_out: compute all weights, and return them.
            past_key_values: the cache, or None.
        """
        query, key, value, raw_value = self._project_in(
            hidden_states, source, first_values, rotary, past_key_values, layer_idx
        )
        if visibility.key_mask is not None and visibility.key_mask.shape[1] != key.shape[2]:
            visibility = visibility._replace(key_mask=_fit(visibility.key_mask, key.shape[2]))
        plain = self.is_plain and position_bias is None and not (written_out or self.training)
        if plain and is_plain_step(query, key, visibility):
            output = plain_step(query, key, value, self.scaling)
            return Attended(self._project_out(output, hidden_states), None, raw_value, None, None)
        extras = self._extras(query, key, position_bias)
        if self.mixes_scores or written_out:
            previous = previous_scores if self.adds_scores else None
            output, weights, scores, lse = written_out_attention(
                query, key, value, visibility, extras, previous, self.mix_scores, self.mix_weights
            )
        else:
            output, lse = fused_attention(query, key, value, visibility, extras, self.backend, self.penalised)
            weights = scores = None
        return Attended(self._project_out(output, hidden_states), weights, raw_value, scores, lse)

    def split_heads(self, states: torch.Tensor, size: int) -> torch.Tensor:
        """`[B, N, H * D]` to `[B, H, N, D]`; tensor parallelism may have left fewer heads than the config says."""
        return states.view(*states.shape[:2], states.shape[-1] // size, size).transpose(1, 2)

    def _project_in(self, hidden_states, source, first_values, rotary, past_key_values, layer_idx):
        """Queries, keys, values, and the values before they were mixed with those of the first block."""
        query = self.split_heads(project(self.q_proj, hidden_states), self.head_dim)
        if self.q_norm is not None:
            query = self.q_norm(query)
        cross, cache = self.is_cross_attention, past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
            if cross and past_key_values.is_updated.get(layer_idx):
                layer = cache.layers[layer_idx]
                query = query if rotary is None else rotate(query, rotary[0])
                return query, layer.keys, layer.values, layer.values
        source = hidden_states if source is None else source
        key = self.split_heads(project(self.k_proj, source), self.head_dim)
        if self.k_norm is not None:
            key = self.k_norm(key)
        if rotary is not None:
            query, key = rotate_both(query, key, rotary)
        raw_value = value = self.split_heads(project(self.v_proj, source), self.value_head_dim)
        if self.mixes_values and first_values is not None:
            value = torch.lerp(first_values, value, self._value_share(source, value))
        if cache is not None:
            key, value = cache.update(key, value, layer_idx)
            if cross:
                past_key_values.is_updated[layer_idx] = True
        return query, key, value, raw_value

    def _value_share(self, source, value):
        """How much of a block's own value stays: a number for each token and head, or one half."""
        if self.value_mix is None:
            return torch.full((), 0.5, dtype=value.dtype, device=value.device)
        return self.value_mix(source).sigmoid().transpose(1, 2)[..., None]

    def _extras(self, query, key, position_bias) -> Extras:
        memory_key = self.memory_key
        if memory_key is not None and self.norms_memory:
            memory_key = self.k_norm(memory_key)
        sinks = self.sinks
        if self.zero_sink:  # beside a learned sink, both take part in the denominator
            zeros = torch.zeros(query.shape[1], dtype=torch.float32, device=query.device)
            sinks = zeros if sinks is None else torch.logaddexp(sinks.float(), zeros)
        return Extras(
            scale=self.scaling,
            bias={} if position_bias is None else position_bias(max(key.shape[2] - 1, 0)),
            softcap=self.softcap,
            memory_key=memory_key if memory_key is None else memory_key.to(key.dtype),
            memory_value=self.memory_value if self.memory_value is None else self.memory_value.to(key.dtype),
            sinks=sinks,
            dropout=self.dropout if self.training else 0.0,
        )

    def _project_out(self, heads: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """`[B, H, N, V]` through scale and gates to `[B, N, C]`."""
        if self.head_scale is not None:
            heads = heads * self.head_scale
        if self.head_gate is not None:
            heads = self.head_gate(inputs, heads)
        if self.value_gate is not None:
            heads = self.value_gate(inputs, heads)
        output = project(self.o_proj, heads.transpose(1, 2).flatten(2))
        if self.is_gated_output:
            output = nn.functional.glu(output, dim=-1)
        if self.training and self.output_dropout:
            output = nn.functional.dropout(output, self.output_dropout)
        return output


class TalkingHeads(nn.Module):
    """A linear map between heads (arXiv 2003.02436); starts as the identity."""

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(heads))

    def set_initial_values(self) -> None:
        init.eye_(self.weight)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, H, N, M]` to the same."""
        return torch.einsum("gh,bhnm->bgnm", self.weight, states)


def _fit(mask: torch.Tensor, keys: int) -> torch.Tensor:
    """The mask of the last `keys` tokens; a preallocated cache has more keys than there are tokens."""
    if mask.shape[1] > keys:
        return mask[:, -keys:]
    return nn.functional.pad(mask, (0, keys - mask.shape[1]))
