"""T5 v1.1 and LongT5 of transformers -> CoLT5: their weights become the heavy branch and the decoder.

With every token routed and a light branch that starts at zero, an upcycled T5 computes what the T5 computes. With the
paper's fractions it is meant for a fine-tune, in which routers and light branches learn what to leave out.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from ..configuration.colt5 import CoLT5Config
from ..modeling.colt5 import CoLT5ForConditionalGeneration
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer


SOURCES = ("T5ForConditionalGeneration", "LongT5ForConditionalGeneration")
SECOND_NAME = "a second name of the token embeddings"
# What the attention of an encoder block is called, by the type of the original's attention.
ENCODER_ATTENTION = {
    None: "SelfAttention",
    "local": "LocalSelfAttention",
    "transient-global": "TransientGlobalSelfAttention",
}


def upcycle_t5(
    original: PreTrainedModel,
    *,
    light: Literal["zero", "copy"] = "zero",
    cross_attention_key_value_heads: int | None = None,
    **options: Any,
) -> tuple[CoLT5ForConditionalGeneration, ConversionReport]:
    """A CoLT5 with the weights of a T5 v1.1 or a LongT5.

    Args:
        original: a `T5ForConditionalGeneration` with a gated feed-forward, or a `LongT5ForConditionalGeneration`.
        light: how the light branches start: `"zero"`: with the first heads and inner channels of the heavy branch and
            output matrices of zero; `"copy"`: with output matrices taken along too, so that tokens that are not routed
            get a part of what they got, and routed ones that part twice.
        cross_attention_key_value_heads: as many as the original has if not given; fewer are the means of groups of its
            heads (arXiv 2305.13245).
        **options: other fields of `CoLT5Config`: the numbers of routed tokens, the light branch's sizes, ...

    Raises:
        ConversionError: another class, an option of the original's config that has no counterpart, an `options` field
            that the original decides.
    """
    name = type(original).__name__
    if name not in SOURCES:
        raise ConversionError(f"the source must be one of {', '.join(SOURCES)}, got {name}")
    source = original.config
    if not source.is_gated_act:
        raise ConversionError(
            f"{source.model_type} can be converted with a gated feed-forward only (T5 v1.1), got "
            f"feed_forward_proj={source.feed_forward_proj!r}"
        )
    if light not in ("zero", "copy"):
        raise ConversionError(f"light must be 'zero' or 'copy', got {light!r}")
    fields = _fields(source)
    decided = sorted(set(options) & set(fields))
    if decided:
        raise ConversionError(f"{', '.join(decided)} must stay what the {name} has, and cannot be given")
    sizes = {
        "num_light_attention_heads": max(source.num_heads // 4, 1),
        "light_intermediate_size": max(source.d_ff // 8, 1),
        "cross_attention_key_value_heads": cross_attention_key_value_heads or source.num_heads,
    }
    config = CoLT5Config(**fields, **{**sizes, **options})
    if config.num_light_attention_heads > source.num_heads or config.light_intermediate_size > source.d_ff:
        raise ConversionError(
            f"the light branch must not be larger than the original's ({source.num_heads} heads, {source.d_ff} inner "
            f"channels), got {config.num_light_attention_heads} and {config.light_intermediate_size}"
        )
    model = CoLT5ForConditionalGeneration(config)
    transfer = WeightTransfer(original.state_dict(), name, type(model).__name__)
    _Upcycling(transfer, source, config, 0.0 if light == "zero" else 1.0).run()
    report = transfer.load_into(model)
    return model.eval(), report


def _fields(source) -> dict[str, Any]:
    # Configurations that were not made from a checkpoint lack it; T5 starts with padding.
    start = getattr(source, "decoder_start_token_id", None)
    return {
        "vocab_size": source.vocab_size,
        "hidden_size": source.d_model,
        "num_hidden_layers": source.num_layers,
        "num_decoder_layers": source.num_decoder_layers,
        "num_attention_heads": source.num_heads,
        "num_heavy_attention_heads": source.num_heads,
        "head_dim": source.d_kv,
        "intermediate_size": source.d_ff,
        "heavy_intermediate_size": source.d_ff,
        "hidden_act": source.dense_act_fn,
        "gated_feed_forward": True,
        "norm_eps": source.layer_norm_epsilon,
        "dropout_rate": source.dropout_rate,
        "relative_attention_num_buckets": source.relative_attention_num_buckets,
        "relative_attention_max_distance": source.relative_attention_max_distance,
        "heavy_position_embedding_type": "relative_bias",
        # The head is a matrix of its own, into which the original's scaling of its input goes.
        "tie_word_embeddings": False,
        "pad_token_id": source.pad_token_id,
        "eos_token_id": source.eos_token_id,
        "decoder_start_token_id": source.pad_token_id if start is None else start,
    }


class _Upcycling:
    """One conversion. T5 does not divide scores by the root of the head's size: that goes into the queries."""

    def __init__(self, transfer: WeightTransfer, source, config: CoLT5Config, light_scale: float):
        self.transfer, self.source, self.config, self.light_scale = transfer, source, config, light_scale
        self.query_scale = config.head_dim**0.5
        kind = source.encoder_attention_type if source.model_type == "longt5" else None
        self.encoder_attention = ENCODER_ATTENTION[kind]

    def run(self) -> None:
        move, config = self.transfer.move, self.config
        move("model.encoder.embed_tokens.weight", "shared.weight")
        for part in ("encoder", "decoder"):
            self.transfer.drop_matching(lambda name, part=part: name == f"{part}.embed_tokens.weight", SECOND_NAME)
            move(f"model.{part}.norm.weight", f"{part}.final_layer_norm.weight")
        scaled = getattr(self.source, "scale_decoder_outputs", self.source.tie_word_embeddings)
        head_scale = config.hidden_size**-0.5 if scaled else 1.0
        move("lm_head.weight", "lm_head.weight", lambda weight: weight * head_scale)
        table = f"encoder.block.0.layer.0.{self.encoder_attention}.relative_attention_bias.weight"
        heads = config.num_light_attention_heads
        move("model.encoder.heavy_position_bias.weight", table)
        move("model.encoder.light_position_bias.weight", table, lambda weight: weight[:, :heads])
        table = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        move("model.decoder.position_bias.weight", table)
        for index in range(config.num_hidden_layers):
            self._encoder_layer(f"encoder.block.{index}.layer.", f"model.encoder.layers.{index}.")
        for index in range(config.num_decoder_layers):
            self._decoder_layer(f"decoder.block.{index}.layer.", f"model.decoder.layers.{index}.")
        self.transfer.drop_matching(lambda name: "global_" in name, "LongT5's summaries of blocks, which CoLT5 lacks")
        if self.source.model_type == "longt5":
            self.transfer.note("the heavy branch attends to all routed tokens, LongT5's attention was local")

    def _encoder_layer(self, source: str, target: str) -> None:
        inner = self.config.num_light_attention_heads * self.config.head_dim
        attention = f"{source}0.{self.encoder_attention}."
        self._attention(attention, f"{target}self_attn.heavy_attn.")
        light = f"{target}self_attn.light_attn."
        self._attention(attention, light, lambda rows: rows[:inner], lambda t: t[:, :inner] * self.light_scale)
        for branch in ("heavy_attn", "light_attn"):
            self.transfer.move(f"{target}self_attn.{branch}.norm.weight", f"{source}0.layer_norm.weight")
        width = self.config.light_intermediate_size
        self._feed_forward(f"{source}1.", f"{target}mlp.heavy_mlp.")
        self._feed_forward(
            f"{source}1.", f"{target}mlp.light_mlp.", lambda t: t[:width], lambda t: t[:, :width] * self.light_scale
        )
        for branch in ("heavy_norm", "light_norm"):
            self.transfer.move(f"{target}mlp.{branch}.weight", f"{source}1.layer_norm.weight")
        for router in ("self_attn.heavy_attn.q_router", "self_attn.heavy_attn.key_value_router", "mlp.router"):
            self.transfer.leave(f"{target}{router}.routing_vectors", "routers are new")

    def _decoder_layer(self, source: str, target: str) -> None:
        self._attention(f"{source}0.SelfAttention.", f"{target}self_attn.")
        self.transfer.move(f"{target}self_attn.norm.weight", f"{source}0.layer_norm.weight")
        cross = f"{source}1.EncDecAttention."
        self._attention(cross, f"{target}cross_attn.", shared=self._shared_heads)
        self.transfer.drop_matching(
            lambda name: name == f"{cross}relative_attention_bias.weight", "a bias that old checkpoints carry unused"
        )
        self.transfer.move(f"{target}cross_attn.norm.weight", f"{source}1.layer_norm.weight")
        self._feed_forward(f"{source}2.", f"{target}mlp.")
        self.transfer.move(f"{target}mlp_norm.weight", f"{source}2.layer_norm.weight")

    def _attention(self, source, target, rows=lambda t: t, columns=lambda t: t, shared=lambda t: t) -> None:
        move = self.transfer.move
        move(f"{target}q_proj.weight", f"{source}q.weight", lambda t: rows(t) * self.query_scale)
        move(f"{target}k_proj.weight", f"{source}k.weight", lambda t: shared(rows(t)))
        move(f"{target}v_proj.weight", f"{source}v.weight", lambda t: shared(rows(t)))
        move(f"{target}o_proj.weight", f"{source}o.weight", columns)

    def _feed_forward(self, source, target, rows=lambda t: t, columns=lambda t: t) -> None:
        dense = f"{source}DenseReluDense."
        self.transfer.move(f"{target}gate_proj.weight", f"{dense}wi_0.weight", rows)
        self.transfer.move(f"{target}up_proj.weight", f"{dense}wi_1.weight", rows)
        self.transfer.move(f"{target}down_proj.weight", f"{dense}wo.weight", columns)

    def _shared_heads(self, weight: Tensor) -> Tensor:
        """Rows `[H * D, C]` to those of the key heads, each the mean of a group."""
        groups = weight.unflatten(0, (self.config.cross_attention_key_value_heads, -1, self.config.head_dim))
        return torch.mean(groups, dim=1).flatten(0, 1)
