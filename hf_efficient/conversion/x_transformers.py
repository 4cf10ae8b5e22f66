"""x-transformers -> XTransformer: `TransformerWrapper` around a stack, and `XTransformer`, with every mapped flag.

    layers = {"class": "Decoder", "dim": 512, "depth": 6, "heads": 8}
    arguments = {"num_tokens": 256, "max_seq_len": 1024, "attn_layers": layers}
    model, report = convert_x_transformers(state_dict, arguments, version="2.31.10")

The flags are translated by the table in x_transformers_options.py. A file of weights carries no version, and the
original changed what its weights mean several times: `version` says which one trained it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..configuration.x_transformer import XTransformerConfig
from ..modeling.x_transformer import (
    XTransformerForCausalLM,
    XTransformerForConditionalGeneration,
    XTransformerForMaskedLM,
    XTransformerForSequenceClassification,
    XTransformerForTokenClassification,
    XTransformerModel,
    XTransformerPreTrainedModel,
)
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer
from .x_transformers_era import Era
from .x_transformers_options import LAYER_FLAGS, WRAPPER_FLAGS, complete, translate
from .x_transformers_weights import StackWeights


LATEST = "2.31.10"
STACKS = ("Decoder", "Encoder", "PrefixDecoder", "CrossAttender")
# `XTransformer` passes these to `TransformerWrapper`, the rest to the stack.
_ENCODER_DECODER_WRAPPER = ("num_tokens", "max_seq_len", "emb_dropout", "num_memory_tokens", "scaled_sinu_pos_emb",
                            "use_abs_pos_emb")  # fmt: skip


def convert_x_transformers(
    source: nn.Module | Mapping[str, Tensor], arguments: Mapping[str, Any], *, version: str = LATEST
) -> tuple[XTransformerPreTrainedModel, ConversionReport]:
    """A model of ours with the weights and the behaviour of one of x-transformers.

    A `Decoder` or `PrefixDecoder` becomes `XTransformerForCausalLM`, an `Encoder` or `CrossAttender`
    `XTransformerForMaskedLM`, an `XTransformer` `XTransformerForConditionalGeneration`. With `return_only_embed` it is
    `XTransformerModel`, with a width or number of output heads of its own `XTransformerForTokenClassification`, with
    CLS tokens or average pooling `XTransformerForSequenceClassification`.

    Args:
        source: the module or its state dict, also inside `AutoregressiveWrapper`.
        arguments: what `TransformerWrapper` was called with, where `attn_layers` holds the arguments of the stack and
            its `class`; or what `XTransformer` was called with.
        version: the release that trained the weights, such as `"1.27.0"`.

    Raises:
        ConversionError: anything that has no exact counterpart, and weights that do not fit the arguments.
    """
    state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    while state and all(name.startswith("net.") for name in state):
        state = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    era = Era(version)
    if "attn_layers" not in arguments:
        return _convert_encoder_decoder(state, dict(arguments), era)
    wrapper = dict(arguments)
    layers = dict(wrapper.pop("attn_layers"))
    kind = layers.pop("class", None)
    if kind not in STACKS:
        raise ConversionError(f"attn_layers must name its class, one of {', '.join(STACKS)}, got {kind!r}")
    stack = SourceStack(kind, wrapper, layers, era)
    config = XTransformerConfig(**stack.fields())
    if stack.wrapper["return_only_embed"]:
        model_class, target, head = XTransformerModel, "", None
    elif stack.is_pooled or stack.has_own_outputs:
        pooled, single = XTransformerForSequenceClassification, XTransformerForTokenClassification
        model_class, target, head = pooled if stack.is_pooled else single, "model.", "score"
    else:
        is_decoder = config.is_decoder
        model_class = XTransformerForCausalLM if is_decoder else XTransformerForMaskedLM
        target, head = "model.", "lm_head"
    model = model_class(config)
    transfer = WeightTransfer(state, f"{kind} of x-transformers {version}", model_class.__name__)
    stack.transfer(transfer, "", target, head)
    return model.eval(), transfer.load_into(model)


def _convert_encoder_decoder(state, arguments, era):
    encoder, decoder = {}, {}
    dim, tied = arguments.pop("dim", None), arguments.pop("tie_token_emb", False)
    dropout = arguments.pop("cross_attn_tokens_dropout", 0.0)
    labels = (arguments.pop("ignore_index", -100), arguments.pop("pad_value", 0))
    if dim is None:
        raise ConversionError(f"arguments must hold attn_layers (TransformerWrapper) or dim (XTransformer), got "
                              f"{sorted(arguments)}")  # fmt: skip
    for name, value in arguments.items():
        part = {"enc_": encoder, "dec_": decoder}.get(name[:4])
        if part is None:
            raise ConversionError(f"XTransformer has no argument {name} that is known here")
        part[name[4:]] = value
    stacks = []
    for part, kind, more in ((encoder, "Encoder", {}), (decoder, "Decoder", {"cross_attend": True})):
        wrapper = {name: part.pop(name) for name in _ENCODER_DECODER_WRAPPER if name in part}
        stacks.append(SourceStack(kind, wrapper, {"dim": dim, **part, **more}, era))
    encoder_fields, decoder_fields = (stack.fields() for stack in stacks)
    # All that the encoder says is said, so that nothing of the decoder's is taken over.
    defaults = XTransformerConfig(hidden_size=dim, num_attention_heads=encoder_fields["num_attention_heads"],
                                  head_dim=encoder_fields["head_dim"])  # fmt: skip
    overrides = {name: getattr(defaults, name) for name in {**decoder_fields} if name not in encoder_fields}
    overrides |= encoder_fields
    for name in ("is_decoder", "add_cross_attention", "cross_attention_hidden_size", "alibi_slopes"):
        overrides.pop(name, None)
    if "alibi_slopes" in encoder_fields:
        overrides["alibi_slopes"] = encoder_fields["alibi_slopes"]
    config = XTransformerConfig(
        **{name: value for name, value in decoder_fields.items() if name != "is_decoder"},
        is_encoder_decoder=True,
        encoder_overrides=overrides,
        share_embeddings=tied,
    )
    if dropout:
        config.encoder_token_dropout = dropout
    model = XTransformerForConditionalGeneration(config)
    transfer = WeightTransfer(state, f"XTransformer of x-transformers {era}", type(model).__name__)
    stacks[0].transfer(transfer, "encoder.", "model.encoder.", head=None)
    stacks[1].transfer(transfer, "decoder.net.", "model.decoder.", head="lm_head")
    transfer.note(
        f"labels: the original ignores {labels[0]} and feeds {labels[1]} in its place; here that is -100 and "
        "config.pad_token_id"
    )
    return model.eval(), transfer.load_into(model)


class SourceStack:
    """One `TransformerWrapper` with its stack: its fields, and its weights."""

    def __init__(self, kind: str, wrapper: Mapping[str, Any], layers: Mapping[str, Any], era: Era):
        self.kind, self.era = kind, era
        layers = dict(layers)
        if kind == "CrossAttender":
            layers |= {"cross_attend": True, "only_cross": True}
        self.cross = {name: layers.pop(name) for name in list(layers) if name.startswith("cross_attn_")}
        if "cross_attn_dim_context" in self.cross:
            layers["cross_attn_dim_context"] = self.cross.pop("cross_attn_dim_context")
        if "cross_attn_tokens_dropout" in self.cross:
            layers["cross_attn_tokens_dropout"] = self.cross.pop("cross_attn_tokens_dropout")
        self.flags = complete(LAYER_FLAGS, layers, kind)
        self.wrapper = complete(WRAPPER_FLAGS, wrapper, "TransformerWrapper")
        self.flags["default_rotary_dim"] = max(self.flags["attn_dim_head"] // 2, era.smallest_rotary_dim)
        self._check_cross_attention()
        if era.rotated_values and self._is_rotary():
            raise ConversionError(f"version {era} also turned the values by their positions, which is not built")
        if self._is_rotary() and era.interleaved_rotary and self.flags["attn_qk_norm_groups"] > 1:
            raise ConversionError(
                "attn_qk_norm_groups > 1 with rotary positions: its groups hold other channels than ours"
            )

    def _check_cross_attention(self):
        """Cross-attention inherits the flags of self-attention; here the two cannot differ."""
        if not self.flags["cross_attend"]:
            return
        window = self.cross.pop("cross_attn_max_attend_past", self.flags["attn_max_attend_past"])
        if window is not None:
            raise ConversionError(
                "attn_max_attend_past reaches cross-attention too, where positions mean nothing: pass "
                "cross_attn_max_attend_past=None"
            )
        for name, value in self.cross.items():
            own = self.flags.get(name.removeprefix("cross_"))
            if value != own:
                raise ConversionError(f"{name}={value!r} differs from self-attention's {own!r}, which is not built")

    @property
    def is_pooled(self) -> bool:
        """Whether the output is one for the whole sequence."""
        return self.wrapper["use_cls_token"] or self.wrapper["average_pool_embed"]

    @property
    def has_own_outputs(self) -> bool:
        """Whether the output is something else than one logit for each token id."""
        width, heads = self.wrapper["logits_dim"], self.wrapper["num_output_heads"]
        tied = self.wrapper["tie_embedding"]
        return not tied and (heads > 1 or width not in (None, self.wrapper["num_tokens"]))

    def _is_rotary(self) -> bool:
        return bool(self.flags["rotary_pos_emb"] or self.flags["rotary_xpos"])

    def fields(self) -> dict[str, Any]:
        """The fields of our configuration."""
        flags, era = self.flags, self.era
        fields = {"rotary_positions": None, "rms_norm_eps": 1e-20, "norm_bias": era.norm_bias}
        fields |= {"is_decoder": self.kind in ("Decoder", "PrefixDecoder"), "prefix_lm": self.kind == "PrefixDecoder"}
        if self.kind == "PrefixDecoder" and flags["shift_tokens"]:
            raise ConversionError("shift_tokens of a PrefixDecoder reads the future, so it has no counterpart")
        fields |= translate(WRAPPER_FLAGS, self.wrapper) | translate(LAYER_FLAGS, flags)
        fields["absolute_positions"] = self._absolute_positions()
        if era.biased_value_gate and flags["attn_gate_values"]:
            fields["value_gate_bias"] = True
        if self.is_pooled or self.has_own_outputs:
            width = self.wrapper["logits_dim"] or self.wrapper["num_tokens"]
            fields["num_labels"] = width * self.wrapper["num_output_heads"]
        fields["lm_head_bias"] = era.head_bias and not self.wrapper["tie_embedding"]
        if self.wrapper["tie_embedding"]:
            scale = self.wrapper["tie_embedding_scale"]
            default = flags["dim"] ** -0.5 if era.scaled_tied_head else 1.0
            fields["logit_scale"] = float(default if scale is None else scale)
        return fields

    def _absolute_positions(self) -> str | None:
        disabled = self.flags["disable_abs_pos_emb"]
        if disabled is None:
            disabled = self.flags["rel_pos_bias"] or self._is_rotary()
        if disabled or not self.wrapper["use_abs_pos_emb"] or self.wrapper["max_seq_len"] == 0:
            return None
        return "scaled_sinusoidal" if self.wrapper["scaled_sinu_pos_emb"] else "learned"

    def transfer(self, transfer: WeightTransfer, source: str, target: str, head: str | None) -> None:
        """Carry all weights over, see `StackWeights.transfer`."""
        self.weights(transfer, XTransformerConfig(**self.fields())).transfer(source, target, head)

    def weights(self, transfer: WeightTransfer, config: XTransformerConfig) -> StackWeights:
        """The weights of this stack, for a model with `config`."""
        return StackWeights(transfer, self.flags, self.wrapper, config, self.era, self._is_rotary())
