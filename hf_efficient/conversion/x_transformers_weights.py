"""The weights of one stack of x-transformers, under their names and in their layout, written to one of ours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..configuration.x_transformer import XTransformerConfig
from .weight_transfer import ConversionError, WeightTransfer
from .x_transformers_era import Era
from .x_transformers_options import head_order, key_value_heads


class StackWeights:
    """One `TransformerWrapper` inside the source.

    Args:
        transfer: the ledger.
        flags, wrapper: complete arguments of the stack and of its wrapper.
        config: what they mean here.
        era: what the weights mean.
        is_rotary: whether the source turned its queries and keys.
    """

    def __init__(
        self,
        transfer: WeightTransfer,
        flags: Mapping[str, Any],
        wrapper: Mapping[str, Any],
        config: XTransformerConfig,
        era: Era,
        is_rotary: bool,
    ):
        self.transfer_weights, self.flags, self.wrapper = transfer, flags, wrapper
        self.config, self.era, self.is_rotary = config, era, is_rotary
        self.order = head_order(flags)

    def transfer(self, source: str, target: str, head: str | None) -> None:
        """Carry over what is named `source...` to `target...`; `head` is our output head's name, None without one."""
        transfer = self.transfer_weights
        config = self.config
        transfer.move(f"{target}embed_tokens.weight", f"{source}token_emb.emb.weight")
        self.embeddings(source, target)
        if head == "score":
            self._labels(source)
        elif head is not None and not config.tie_word_embeddings:
            transfer.move_linear(head, f"{source}to_logits", bias=config.lm_head_bias)
        self.stack(f"{source}attn_layers.", target)

    def embeddings(self, source: str, target: str) -> None:
        """Carry over what stands between the token table and the first block."""
        transfer, wrapper, config = self.transfer_weights, self.wrapper, self.config
        if config.absolute_positions == "learned":
            scale = 1.0 if config.l2_normalize_embeddings else config.token_size**-0.5
            positions = f"{target}embeddings.positions.weight"
            transfer.move(positions, f"{source}pos_emb.emb.weight", lambda table: table * scale)
        elif config.absolute_positions == "scaled_sinusoidal":
            transfer.move(f"{target}embeddings.positions.scale", f"{source}pos_emb.scale")
        if config.type_vocab_size:
            for kind, name in enumerate(wrapper["embed_num_tokens"]):
                table = f"token_types.{kind}" if isinstance(config.type_vocab_size, list) else "token_types"
                transfer.move(f"{target}embeddings.{table}.weight", f"{source}embeds.{name}_embed.weight")
        if config.embedding_norm:
            self.layer_norm(f"{target}embeddings.norm", f"{source}post_emb_norm")
        if config.token_size != config.hidden_size:
            transfer.move_linear(f"{target}embeddings.projection", f"{source}project_emb")
        if config.num_cls_tokens:
            transfer.move(f"{target}cls_tokens", f"{source}cls_token")
        if config.num_memory_tokens:
            transfer.move(f"{target}memory_tokens", f"{source}memory_tokens")

    def _labels(self, source: str) -> None:
        """One head, or several as the rows of one."""
        transfer, heads = self.transfer_weights, self.wrapper["num_output_heads"]
        indices = [""] if heads == 1 else [f"{index}." for index in range(heads)]
        names = [f"{source}to_logits.{index}weight" for index in indices]
        rows = [tensor for name in names if (tensor := transfer.read(name)) is not None]
        if rows:
            transfer.put("score.weight", torch.cat(rows), names)
            transfer.put("score.bias", rows[0].new_zeros(self.config.num_labels), [])

    def stack(self, source: str, target: str) -> None:
        """Carry over the blocks alone, and the final norm."""
        config = self.config
        index = 0
        for block, order in enumerate(config.block_orders):
            seen = ""
            for kind in order:
                seen += kind
                count = seen.count(kind)
                name = {"a": "self_attn", "c": "cross_attn", "f": "mlp"}[kind] + (f"_{count}" if count > 1 else "")
                where = _Branch(self.transfer_weights, f"{source}layers.{index}.")
                ours = f"{target}layers.{block}.{name}"
                self._around(where, f"{ours}_branch")
                if kind == "f":
                    self._feed_forward(where, ours)
                else:
                    self._attention(where, ours, is_cross=kind == "c", is_first=block == 0)
                index += 1
        if config.final_norm:
            self._norm(f"{target}norm", f"{source}final_norm")
        self._position_bias(f"{source}rel_pos.", f"{target}position_bias.")
        tables = (f"{source}rotary_pos_emb.", f"{source}rel_pos.slopes", f"{source}rel_pos.bias")
        self.transfer_weights.drop_matching(
            lambda name: name.startswith(tables), "a fixed table that is computed instead"
        )

    def _norm(self, target: str, source: str) -> None:
        kind, size = self.config.norm_type, self.config.hidden_size
        offset = float(self.era.unit_offset and self.flags["norm_add_unit_offset"])
        move = self.transfer_weights.move
        if kind == "layer_norm":
            self.layer_norm(target, source, offset)
        elif kind == "rms_norm":
            move(f"{target}.weight", f"{source}.g", lambda weight: weight + offset)
        elif kind == "scale_norm":
            move(f"{target}.g", f"{source}.g", lambda weight: (weight + offset) * size**0.5)
        elif kind == "dynamic_tanh":
            alpha = self.flags["dynamic_tanh_init_alpha"] * offset
            move(f"{target}.alpha", f"{source}.pre_tanh_scale", lambda weight: weight.reshape(1) + alpha)
            move(f"{target}.weight", f"{source}.gamma", lambda weight: weight + offset)
            move(f"{target}.bias", f"{source}.beta")

    def layer_norm(self, target: str, source: str, offset: float = 0.0) -> None:
        """Carry over a LayerNorm; `offset` is what its stored weight lacks."""
        self.transfer_weights.move(
            f"{target}.weight", f"{source}.{self.era.norm_weight}", lambda weight: weight + offset
        )
        if self.era.norm_bias:
            self.transfer_weights.move(f"{target}.bias", f"{source}.bias")

    def _around(self, where: "_Branch", target: str) -> None:
        config, move = self.config, self.transfer_weights.move
        for slot, (name, positions) in enumerate(
            (("norm", ("pre", "sandwich", "pre_and_post")), ("inner_norm", ("sandwich",)),
             ("outer_norm", ("post", "pre_and_post")))
        ):  # fmt: skip
            if config.norm_position in positions:
                self._norm(f"{target}.{name}", f"{where.prefix}0.{slot}")
        if config.layer_scale_init_value is not None:
            offset = float(self.era.unit_offset and self.flags["norm_add_unit_offset"])
            move(f"{target}.layer_scale.weight", where.name("gamma"), lambda weight: weight + offset)
        if config.residual_type == "gru":
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                move(f"{target}.residual.gru.{name}", f"{where.prefix}2.gru.{name}")
        if config.learned_residual_scale:
            move(f"{target}.residual.weight", f"{where.prefix}2.residual_scale")

    def _feed_forward(self, where: "_Branch", target: str) -> None:
        config, transfer = self.config, self.transfer_weights
        if config.gated_feed_forward:
            for part, half in (("up_proj", 0), ("gate_proj", 1)):
                transfer.move_linear(
                    f"{target}.{part}", where.name("ff.0.proj"), config.mlp_bias, lambda t, half=half: t.chunk(2)[half]
                )
            if config.gate_channel_scale:
                transfer.move(f"{target}.gate_scale", where.name("ff.0.mult_bias"))
        else:
            transfer.move_linear(f"{target}.up_proj", where.name("ff.0.0"), config.mlp_bias)
        if config.feed_forward_norm:
            self.layer_norm(f"{target}.norm", where.name("ff.1"))
        out = where.name(f"ff.{3 if config.feed_forward_norm else 2}")
        transfer.move_linear(f"{target}.down_proj", out, config.mlp_output_bias)

    def _attention(self, where: "_Branch", target: str, is_cross: bool, is_first: bool) -> None:
        config, move = self.config, self.transfer_weights.move
        turns = self.is_rotary and self.era.interleaved_rotary  # in cross-attention only `encoder_position_ids` turn
        size, shared = config.head_dim, key_value_heads(self.flags)

        def turned(tensor: Tensor, dim: int) -> Tensor:
            return _unpair(tensor, dim, config.rotary_dim) if turns else tensor

        def rows(tensor: Tensor, heads: int, turn: bool = False) -> Tensor:
            """Rows `[heads * D, ...]` of queries (in our order of heads) or keys."""
            split = tensor.unflatten(0, (heads, -1))
            split = split[self.order] if heads == config.num_attention_heads else split
            return (turned(split, 1) if turn else split).flatten(0, 1)

        heads = config.num_attention_heads
        move(f"{target}.q_proj.weight", where.name("to_q.weight"), lambda t: rows(t, heads, turn=True))
        move(
            f"{target}.k_proj.weight",
            where.name("to_k.weight"),
            lambda t: turned(t.unflatten(0, (shared, size)), 1).flatten(0, 1),
        )
        move(f"{target}.v_proj.weight", where.name("to_v.weight"))
        out = where.name("to_out.0.weight" if config.attention_on_attention else "to_out.weight")
        if heads == 1 and not config.attention_on_attention and out not in self.transfer_weights.source:
            # With a single head the original has no output projection.
            identity = torch.eye(
                config.hidden_size, dtype=self.transfer_weights.source[where.name("to_v.weight")].dtype
            )
            self.transfer_weights.put(f"{target}.o_proj.weight", identity, [])
        else:
            move(f"{target}.o_proj.weight", out, lambda t: rows(t.mT.contiguous(), heads).mT.contiguous())
        if config.num_memory_key_values:
            move(f"{target}.memory_key", where.name("mem_k"), lambda t: turned(t, 2))
            move(f"{target}.memory_value", where.name("mem_v"))
        per_head = lambda t: t.reshape(heads, -1)[self.order].reshape(t.shape)  # noqa: E731
        if config.qk_norm == "l2_learned":
            move(f"{target}.q_norm.weight", where.name("qk_norm_q_scale"), lambda t: turned(t[self.order], 2))
            move(f"{target}.k_norm.weight", where.name("qk_norm_k_scale"), lambda t: turned(t, 2))
        if config.qk_norm == "rms":
            move(f"{target}.q_norm.weight", where.name("q_rmsnorm.gamma"), lambda t: turned(t[self.order] + 1, 2))
        if config.qk_norm in ("rms", "rms_key"):
            move(f"{target}.k_norm.weight", where.name("k_rmsnorm.gamma"), lambda t: turned(t + 1, 2))
        if config.learned_attention_sinks:
            move(f"{target}.sinks", where.name("attend.head_attn_sink"), per_head)
        for ours, theirs, wanted, identity in (
            ("mix_scores", "pre", config.pre_softmax_talking_heads, not self.era.residual_talking_heads),
            ("mix_weights", "post", config.post_softmax_talking_heads, False),
        ):
            if wanted:
                move(
                    f"{target}.{ours}.weight",
                    where.name(f"attend.{theirs}_softmax_talking_heads.weight"),
                    lambda t, less=identity: t[self.order][:, self.order, 0, 0] - less * torch.eye(heads).to(t),
                )
        if config.head_output_scale:
            move(f"{target}.head_scale", where.name("head_scale_params"), lambda t: t[0, self.order])
        if config.head_gate:
            for part in ("weight", "bias"):
                move(f"{target}.head_gate.proj.{part}", where.name(f"to_v_head_gate.{part}"), lambda t: t[self.order])
        if config.value_gate is not None:
            low_rank = config.value_gate_rank is not None
            if low_rank:
                move(f"{target}.value_gate.down.weight", where.name("to_v_gate.down.weight"))
            name = where.name("to_v_gate.up.weight" if low_rank else "to_v_gate.weight")
            move(f"{target}.value_gate.proj.weight", name, lambda t: rows(t, heads))
            if config.value_gate_bias:
                move(f"{target}.value_gate.proj.bias", where.name("to_v_gate.bias"), lambda t: rows(t, heads))
        if config.value_residual == "learned" and not is_first and not is_cross:
            if shared != heads:
                raise ConversionError("learned_value_residual_mix with grouped heads: the original cannot run it")
            for part in ("weight", "bias"):
                move(f"{target}.value_mix.{part}", where.name(f"to_value_residual_mix.0.{part}"))

    def _position_bias(self, source: str, target: str) -> None:
        config, transfer = self.config, self.transfer_weights
        if config.position_bias == "t5":
            move, scale = transfer.move, config.head_dim**0.5
            table = "relative_attention_bias.weight"
            move(f"{target}{table}", f"{source}{table}", lambda t: t[:, self.order] * scale)
        if config.position_bias != "dynamic":
            return
        place = 0
        for depth in range(config.dynamic_bias_depth):
            transfer.move_linear(f"{target}mlp.{place}", f"{source}mlp.{depth}.0")
            place += 1
            if config.dynamic_bias_norm:
                # Their first norm is their own LayerNorm, without a bias; the others are torch's.
                norm, first = f"{source}mlp.{depth}.1", depth == 0 and not self.era.norm_bias
                weight = self.era.norm_weight if depth == 0 else "weight"
                transfer.move(f"{target}mlp.{place}.weight", f"{norm}.{weight}")
                if first:
                    transfer.put(f"{target}mlp.{place}.bias", torch.zeros(config.dynamic_bias_hidden_size), [])
                else:
                    transfer.move(f"{target}mlp.{place}.bias", f"{norm}.bias")
                place += 1
            place += 1
        last = f"mlp.{config.dynamic_bias_depth}"
        transfer.move_linear(f"{target}mlp.{place}", f"{source}{last}", change=lambda t: t[self.order])


class _Branch:
    """The names below one branch of the source, whose wrappers add a level `fn` each."""

    def __init__(self, transfer: WeightTransfer, prefix: str):
        self.prefix = prefix
        self.names = {}
        for name in transfer.source:
            if name.startswith(f"{prefix}1."):
                parts = name.removeprefix(f"{prefix}1.").split(".")
                while parts[0] == "fn":
                    parts = parts[1:]
                self.names[".".join(parts)] = name

    def name(self, inner: str) -> str:
        """The source's full name of a tensor, or of the module it belongs to."""
        for known, full in self.names.items():
            if known == inner or known.startswith(f"{inner}."):
                return full[: len(full) - len(known) + len(inner)]
        return f"{self.prefix}1.*.{inner}"


def _unpair(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Reorders the first `size` channels along `dim`: the original turns pairs (2i, 2i + 1), we (i, i + size / 2)."""
    first, rest = tensor.split((size, tensor.shape[dim] - size), dim=dim)
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)]).to(tensor.device)
    return torch.cat([first.index_select(dim, order), rest], dim=dim)
