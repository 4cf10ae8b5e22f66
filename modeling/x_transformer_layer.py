"""One block of an XTransformer: branches around a residual stream, by default self-attention and feed-forward."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_name import takes_cache
from .glu_feed_forward import NormedFeedForward
from .hyper_connections import make_hyper_connection
from .neighbour_shift import shift_neighbours, stack_neighbours
from .norm_family import block_norm
from .residual_rules import LayerScale, make_residual
from .segment_memory import Recalled
from .softmax_attention import Visibility
from .x_transformer_attention import XTransformerAttention


class Carried(NamedTuple):
    """What one block hands to the next beside the stream, each None unless an option asks for it.

    Attributes:
        values, cross_values: `[B, G, N, V]`, the first block's, for `value_residual`.
        scores, cross_scores: `[B, H, N, R + M]`, the last block's, for `residual_attention`.
        lse: `[B, H, N]`, the sum over all attentions so far, for `attention_z_loss_coef`.
        entered: `[B, N, C]`, what entered this block's self-attention, for `mem_len`; not for the next block.
    """

    values: torch.Tensor | None = None
    cross_values: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    cross_scores: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    entered: torch.Tensor | None = None


class Branch(nn.Module):
    """What stands around the function f of a branch: norms, LayerScale, and the rule by which it joins the stream.

    pre: x + f(N(x)). post: N(x + f(x)). sandwich: x + N(f(N(x))). pre_and_post: N(x + f(N(x))).
    With several streams, hyper_connections.py says which mixture of them is the x that f reads, and where f goes.
    """

    def __init__(self, config, branch_idx: int, factor: float = 1.0):
        super().__init__()
        position = config.norm_position
        self.norm = nn.Identity() if position == "post" else block_norm(config)
        self.inner_norm = block_norm(config) if position == "sandwich" else None
        self.outer_norm = block_norm(config) if position in ("post", "pre_and_post") else None
        self.layer_scale = LayerScale(config) if config.layer_scale_init_value is not None else None
        self.hyper_connection = make_hyper_connection(config, branch_idx)
        self.residual = make_residual(config) if self.hyper_connection is None else None
        self.factor, self.layerdrop = factor, config.of_branch("layerdrop", branch_idx)
        self.shift = config.of_branch("shift_tokens", branch_idx)

    def read(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """x `[B, N, C]`, and what `add` needs of a hyper-connection."""
        inputs, *mixed = self.hyper_connection(hidden_states)
        return inputs, tuple(mixed)

    def add(
        self, hidden_states: torch.Tensor, update: torch.Tensor, mixed: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """The stream `[B, N, C]` (or the streams `[B, N, n, C]`) after f gave `update`."""
        if self.factor != 1.0:
            update = update * self.factor
        if self.layer_scale is not None:
            update = self.layer_scale(update)
        if self.inner_norm is not None:
            update = self.inner_norm(update)
        if mixed is None:
            total = self.residual(hidden_states, update)
        else:
            streams, weights = mixed
            total = torch.addcmul(streams, weights[..., None], update[..., None, :])
        if self.outer_norm is not None:
            total = self.outer_norm(total)
        if self.training and self.layerdrop:
            keep = torch.rand((), device=total.device) >= self.layerdrop
            return torch.where(keep, total, hidden_states)
        return total


class XTransformerLayer(GradientCheckpointingLayer):
    """The branches of `config.block_orders[block_idx]`: by default "af", in a decoder with an encoder "acf"."""

    def __init__(self, config, block_idx: int):
        super().__init__()
        first_branch = sum(len(order) for order in config.block_orders[:block_idx])
        self.order = config.block_orders[block_idx]
        self.is_causal, self.remembers = config.is_decoder, config.mem_len > 0
        self.penalised = bool(config.attention_z_loss_coef)
        mixes = config.value_residual or config.residual_attention or config.cross_residual_attention
        self.carries = bool(mixes or self.penalised or self.remembers)
        self.branch_names: list[tuple[str, str]] = []
        for position, kind in enumerate(self.order):
            name = {"a": "self_attn", "c": "cross_attn", "f": "mlp"}[kind]
            count = self.order[:position].count(kind)
            name += f"_{count + 1}" if count else ""
            self.branch_names.append((kind, name))
            if kind == "f":
                self.add_module(name, NormedFeedForward(config))
            else:
                self.add_module(name, XTransformerAttention(config, block_idx, is_cross_attention=kind == "c"))
            factor = 0.5 if kind == "f" and config.macaron else 1.0
            self.add_module(f"{name}_branch", Branch(config, first_branch + position, factor))

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *carried: torch.Tensor | None,
        layer_idx: int,
        visibility: Visibility,
        encoder_visibility: Visibility | None = None,
        rotary=None,
        encoder_rotary=None,
        position_bias: nn.Module | None = None,
        written_out: bool = False,
        past_key_values=None,
        padding: torch.Tensor | None = None,
        recalled: Recalled | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The stream `[B, N, C]` (with several, `[B, N, n, C]`) after this block, and what the next one is handed.

        Args:
            carried: the fields of `Carried`.
            layer_idx: the place of this step in the cache.
            padding: `[B, N]`, nonzero at real tokens, for the token shift; or None.
            recalled: the memory of the segments before, or None.
            visibility, rotary, position_bias, written_out, past_key_values: see `XTransformerAttention.forward`;
                `encoder_visibility` and `encoder_rotary` are those of cross-attention.
        """
        carried = Carried(*carried)
        for kind, name in self.branch_names:
            function, branch = getattr(self, name), getattr(self, f"{name}_branch")
            entered, mixed = (hidden_states, None) if branch.hyper_connection is None else branch.read(hidden_states)
            inputs = branch.norm(entered)
            if branch.shift:
                inputs = self._shifted(inputs, branch.shift, name, past_key_values, layer_idx, padding)
            if kind == "f":
                update = function(inputs)
            elif kind == "a":
                update, _, values, scores, lse = function(
                    inputs,
                    None if recalled is None else recalled.before(inputs, layer_idx, branch.norm),
                    carried.values,
                    carried.scores,
                    visibility=visibility,
                    layer_idx=layer_idx,
                    rotary=rotary,
                    position_bias=position_bias,
                    written_out=written_out,
                    past_key_values=past_key_values,
                )
                if self.carries:
                    carried = carried._replace(**_kept(function, carried.values, values, scores))
                    carried = carried._replace(lse=self._summed(carried.lse, lse))
                    carried = carried._replace(entered=entered if self.remembers else None)
            else:
                update, _, values, scores, lse = function(
                    inputs,
                    encoder_hidden_states,
                    carried.cross_values,
                    carried.cross_scores,
                    visibility=encoder_visibility,
                    layer_idx=layer_idx,
                    rotary=encoder_rotary,
                    written_out=written_out,
                    past_key_values=past_key_values,
                )
                if self.carries:
                    kept = _kept(function, carried.cross_values, values, scores)
                    carried = carried._replace(**{f"cross_{name}": tensor for name, tensor in kept.items()})
                    carried = carried._replace(lse=self._summed(carried.lse, lse))
            hidden_states = branch.add(hidden_states, update, mixed)
        return hidden_states, *carried

    def _summed(self, total, lse):
        if not self.penalised:
            return None
        return lse if total is None else total + lse

    def _shifted(self, inputs, amount, name, past_key_values, layer_idx, padding):
        previous = None
        if past_key_values is not None:
            layer = getattr(past_key_values, "self_attention_cache", past_key_values).layers[layer_idx]
            masked = inputs if padding is None else inputs * padding[..., None].to(inputs.dtype)
            stacked = layer.last_tokens.tokens.get(name)
            if stacked is not None:
                previous = stacked[:, -1].unflatten(-1, (amount, -1))
            layer.shift_in(name, stack_neighbours(masked, amount, previous))
        return shift_neighbours(inputs, amount, self.is_causal, previous, padding)


def _kept(attention: XTransformerAttention, first_values, values, scores) -> dict:
    """What of an attention's results later blocks need."""
    if first_values is None and attention.mixes_values:
        first_values = values
    return {"values": first_values, "scores": scores if attention.adds_scores else None}
