"""One block of a Performer: attention and feed-forward branches around a residual stream."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_name import takes_cache
from .feed_forward import FeedForward
from .norms import ReZeroScale, make_norm
from .performer_attention import PerformerAttention, PerformerSoftmaxAttention
from .rotary import RotaryTables
from .token_shift import shift_tokens


class PerformerBranch(nn.Module):
    """What stands around a branch's function: the norm (before or after), and ReZero's factor."""

    def __init__(self, config):
        super().__init__()
        self.is_post_norm = config.norm_position == "post"
        self.norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.rezero = ReZeroScale() if config.norm_type == "rezero" else None

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The branch's input, of the residual stream `[B, N, C]`."""
        return hidden_states if self.is_post_norm else self.norm(hidden_states)

    def leave(self, update: torch.Tensor) -> torch.Tensor:
        """What is added to the stream, of the branch's output."""
        return update if self.rezero is None else self.rezero(update)

    def add(self, hidden_states: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """The stream after the branch."""
        total = hidden_states + self.leave(update)
        return self.norm(total) if self.is_post_norm else total


class PerformerLayer(GradientCheckpointingLayer):
    """Self-attention, cross-attention (in decoders that have it) and feed-forward.

    The order is self-attention, cross-attention, feed-forward; with `cross_attention_feed_forward` each of the two
    attentions is followed by a feed-forward of its own.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        is_full = config.is_full_attention(layer_idx)
        self.shifts_tokens, self.is_causal = config.shift_tokens, config.is_decoder
        self.mlp_shift_reads_padding = config.masked_keys_in_normalizer
        attention = PerformerSoftmaxAttention if is_full else PerformerAttention
        self.self_attn = attention(config, layer_idx, is_cross_attention=False)
        self.self_attn_branch = PerformerBranch(config)
        self.mlp = FeedForward(config)
        self.mlp_branch = PerformerBranch(config)
        self.cross_attn = self.cross_mlp = None
        if config.add_cross_attention:
            self.cross_attn = attention(config, layer_idx, is_cross_attention=True)
            self.cross_attn_branch = PerformerBranch(config)
            if config.cross_attention_feed_forward:
                self.cross_mlp = FeedForward(config)
                self.cross_mlp_branch = PerformerBranch(config)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *,
        attention_masks: dict,
        position_ids: torch.Tensor | None = None,
        rotary: RotaryTables | None = None,
        past_key_values=None,
        projections: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """The stream `[B, N, C]` after this block.

        Args:
            attention_masks: `"padding"`, `"window"`, `"full"`, `"encoder_padding"` and `"encoder_full"`, each a mask
                or None: see `PerformerModel.forward`.
            position_ids, rotary, past_key_values: see `PerformerAttention.forward`.
            projections: the captured projections of `"self_attn"` and `"cross_attn"`, or None for the buffers.
            kwargs: what else an attention function reads.
        """
        call = _Call(attention_masks, position_ids, rotary, past_key_values, projections or {}, kwargs)
        crosses, crosses_alone = self.cross_attn is not None, self.cross_mlp is None
        hidden_states = self.self_attn_branch.add(hidden_states, self._attend(hidden_states, call))
        if crosses and crosses_alone:
            update = self._cross_attend(hidden_states, encoder_hidden_states, call)
            hidden_states = self.cross_attn_branch.add(hidden_states, update)
        hidden_states = self.mlp_branch.add(hidden_states, self._feed_forward(hidden_states, call))
        if crosses and not crosses_alone:
            update = self._cross_attend(hidden_states, encoder_hidden_states, call)
            hidden_states = self.cross_attn_branch.add(hidden_states, update)
            update = self.cross_mlp(self.cross_mlp_branch.enter(hidden_states))
            hidden_states = self.cross_mlp_branch.add(hidden_states, update)
        return hidden_states

    @takes_cache
    def reversible_blocks(
        self, *, attention_masks, position_ids=None, rotary=None, past_key_values=None, projections=None, **kwargs
    ):
        """The pairs of branches of a reversible stack, each ready to be added to a stream; arguments as `forward`'s.

        Each is a function of the stream and the encoder's states.
        """
        call = _Call(attention_masks, position_ids, rotary, past_key_values, projections or {}, kwargs)

        def attention(stream, _):
            return self.self_attn_branch.leave(self._attend(stream, call))

        def mlp(stream, _):
            return self.mlp_branch.leave(self._feed_forward(stream, call))

        def cross(stream, encoder_hidden_states):
            return self.cross_attn_branch.leave(self._cross_attend(stream, encoder_hidden_states, call))

        def cross_mlp(stream, _):
            return self.cross_mlp_branch.leave(self.cross_mlp(self.cross_mlp_branch.enter(stream)))

        return [(attention, mlp)] + ([(cross, cross_mlp)] if self.cross_attn is not None else [])

    def _attend(self, stream: torch.Tensor, call: "_Call") -> torch.Tensor:
        inputs = self.self_attn_branch.enter(stream)
        if self.shifts_tokens:
            inputs = self._shifted(inputs, "attention", call.attention_masks["padding"], call.past_key_values)
        return self.self_attn(
            inputs,
            attention_mask=call.attention_masks["full"],
            padding_mask=call.attention_masks["padding"],
            window_mask=call.attention_masks["window"],
            position_ids=call.position_ids,
            rotary=call.rotary,
            past_key_values=call.past_key_values,
            projection=call.projections.get("self_attn"),
            **call.others,
        )[0]

    def _feed_forward(self, stream: torch.Tensor, call: "_Call") -> torch.Tensor:
        inputs = self.mlp_branch.enter(stream)
        if self.shifts_tokens:
            padding = None if self.mlp_shift_reads_padding else call.attention_masks["padding"]
            inputs = self._shifted(inputs, "mlp", padding, call.past_key_values)
        return self.mlp(inputs)

    def _cross_attend(self, stream: torch.Tensor, encoder_hidden_states: torch.Tensor, call: "_Call") -> torch.Tensor:
        return self.cross_attn(
            self.cross_attn_branch.enter(stream),
            attention_mask=call.attention_masks["encoder_full"],
            padding_mask=call.attention_masks["encoder_padding"],
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=call.past_key_values,
            projection=call.projections.get("cross_attn"),
            **call.others,
        )[0]

    def _shifted(self, inputs: torch.Tensor, name: str, padding: torch.Tensor | None, past_key_values) -> torch.Tensor:
        before = None
        if past_key_values is not None:
            layer = getattr(past_key_values, "self_attention_cache", past_key_values).layers[self.layer_idx]
            masked = inputs if padding is None else inputs * padding[..., None].to(inputs.dtype)
            before = layer.shift_in(name, masked)
        return shift_tokens(inputs, self.is_causal, before, padding)


class _Call(NamedTuple):
    """What every branch of a block is handed beside the stream: arguments of `PerformerLayer.forward`."""

    attention_masks: dict
    position_ids: torch.Tensor | None
    rotary: RotaryTables | None
    past_key_values: Cache | None
    projections: dict
    others: dict
