"""One block of a Performer: attention and feed-forward branches around a residual stream."""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_name import takes_handed_cache
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

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """The stream `[B, N, C]` after this block; `kwargs` are what the attentions and the token shift read."""
        attention, cross, mlp, cross_mlp = self.branches(**kwargs)
        hidden_states = self.self_attn_branch.add(hidden_states, attention(hidden_states, None))
        if cross is not None and cross_mlp is None:
            hidden_states = self.cross_attn_branch.add(hidden_states, cross(hidden_states, encoder_hidden_states))
        hidden_states = self.mlp_branch.add(hidden_states, mlp(hidden_states, None))
        if cross_mlp is not None:
            hidden_states = self.cross_attn_branch.add(hidden_states, cross(hidden_states, encoder_hidden_states))
            hidden_states = self.cross_mlp_branch.add(hidden_states, cross_mlp(hidden_states, None))
        return hidden_states

    @takes_handed_cache
    def branches(
        self,
        attention_masks: dict,
        position_ids: torch.Tensor | None = None,
        rotary: RotaryTables | None = None,
        past_key_values=None,
        projections: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ):
        """The four branches as functions of the stream and the encoder's states, None where there is none.

        Args:
            attention_masks: `"padding"`, `"window"`, `"full"`, `"encoder_padding"` and `"encoder_full"`, each a mask
                or None: see `PerformerModel.forward`.
            position_ids, rotary, past_key_values: see `PerformerAttention.forward`.
            projections: the captured projections of `"self_attn"` and `"cross_attn"`, or None for the buffers.
        """
        projections = projections or {}

        def shifted(stream, branch, name):
            inputs = branch.enter(stream)
            if not self.shifts_tokens:
                return inputs
            padding = attention_masks["padding"]
            if name == "mlp" and self.mlp_shift_reads_padding:
                padding = None
            before = None
            if past_key_values is not None:
                layer = getattr(past_key_values, "self_attention_cache", past_key_values).layers[self.layer_idx]
                masked = inputs if padding is None else inputs * padding[..., None].to(inputs.dtype)
                before = layer.shift_in(name, masked)
            return shift_tokens(inputs, self.is_causal, before, padding)

        def attention(stream, _):
            return self.self_attn(
                shifted(stream, self.self_attn_branch, "attention"),
                attention_mask=attention_masks["full"],
                padding_mask=attention_masks["padding"],
                window_mask=attention_masks["window"],
                position_ids=position_ids,
                rotary=rotary,
                past_key_values=past_key_values,
                projection=projections.get("self_attn"),
                **kwargs,
            )[0]

        def mlp(stream, _):
            return self.mlp(shifted(stream, self.mlp_branch, "mlp"))

        def cross(stream, encoder_hidden_states):
            return self.cross_attn(
                self.cross_attn_branch.enter(stream),
                attention_mask=attention_masks["encoder_full"],
                padding_mask=attention_masks["encoder_padding"],
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=past_key_values,
                projection=projections.get("cross_attn"),
                **kwargs,
            )[0]

        def cross_mlp(stream, _):
            return self.cross_mlp(self.cross_mlp_branch.enter(stream))

        return (
            attention,
            cross if self.cross_attn is not None else None,
            mlp,
            cross_mlp if self.cross_mlp is not None else None,
        )

    def reversible_blocks(self, **kwargs):
        """The pairs of branches of a reversible stack, each ready to be added to a stream."""
        attention, cross, mlp, cross_mlp = self.branches(**kwargs)

        def scaled(branch, function):
            return lambda stream, context: branch.leave(function(stream, context))

        blocks = [(scaled(self.self_attn_branch, attention), scaled(self.mlp_branch, mlp))]
        if cross is not None:
            blocks.append((scaled(self.cross_attn_branch, cross), scaled(self.cross_mlp_branch, cross_mlp)))
        return blocks
