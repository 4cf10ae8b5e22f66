"""transformers' Perceiver, the format of DeepMind's checkpoints on the Hub -> PerceiverFlash, without loss.

The converted model answers as many queries as there are inputs; the original's masked language model always answers
`max_position_embeddings` of them. Padding on the right is as there; on the left, positions are counted from the first
real token here, unless `position_ids` says otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.modeling_utils import PreTrainedModel

from ..configuration.perceiver_flash import PerceiverFlashConfig
from ..modeling.perceiver_flash import (
    PerceiverFlashForImageClassification,
    PerceiverFlashForMaskedLM,
    PerceiverFlashForSequenceClassification,
    PerceiverFlashModel,
    PerceiverFlashPreTrainedModel,
)
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer


def convert_transformers_perceiver(
    original: PreTrainedModel,
) -> tuple[PerceiverFlashPreTrainedModel, ConversionReport]:
    """A PerceiverFlash with the weights and the results of a Perceiver of transformers.

    Args:
        original: a `PerceiverForMaskedLM`, `PerceiverForSequenceClassification`,
            `PerceiverForImageClassificationLearned`, `…Fourier` or `…ConvProcessing`, or a `PerceiverModel` that has
            neither preprocessor nor decoder.

    Raises:
        ConversionError: another class, or widths that have no counterpart.
    """
    name = type(original).__name__
    if name not in PERCEIVERS:
        raise ConversionError(f"the source must be one of {', '.join(PERCEIVERS)}, got {name}")
    source, config = PERCEIVERS[name], original.config
    fields = _stack_fields(config, original) | source.fields(config)
    # The width of an image's inputs follows from the other fields.
    draft = PerceiverFlashConfig(**fields)
    model = source.target(PerceiverFlashConfig(**fields, **_cross_widths(config, draft.input_sizes[0])))
    transfer = WeightTransfer(original.state_dict(), name, source.target.__name__)
    old, new = ("perceiver.", "model.") if source.move_ends else ("", "")
    _move_stack(transfer, old, new, config)
    if source.move_ends is not None:
        source.move_ends(transfer)
    else:
        transfer.note("the original takes inputs as `inputs`, and so does this model")
    if draft.modality == "text":
        transfer.note("left-padded rows need position_ids=arange to be read as the original reads them")
    return model.eval(), transfer.load_into(model)


class _Source(NamedTuple):
    """A class of transformers: what it becomes, the fields beside the stack, and the weights beside it."""

    target: type[PerceiverFlashPreTrainedModel]
    fields: Callable[[Any], dict[str, Any]]
    move_ends: Callable[[WeightTransfer], None] | None


# Fields


def _stack_fields(config: Any, original: PreTrainedModel) -> dict[str, Any]:
    """What all classes share. Their norms have torch's epsilon, whatever `config.layer_norm_eps` says."""
    if type(original).__name__ == "PerceiverModel" and (original.input_preprocessor or original.decoder):
        raise ConversionError("a bare PerceiverModel must have neither input_preprocessor nor decoder, got one")
    if not isinstance(config.hidden_act, str):
        raise ConversionError(f"hidden_act must be a name, got {config.hidden_act!r}")
    keys = config.qk_channels or config.d_latents
    values = config.v_channels or keys
    if values != config.d_latents:
        raise ConversionError(f"v_channels must be d_latents ({config.d_latents}), got {values}")
    dropout = config.attention_probs_dropout_prob
    return {
        "hidden_size": config.d_latents,
        "num_latents": config.num_latents,
        "num_self_attention_layers": config.num_self_attends_per_block,
        "self_attention_repeats": config.num_blocks,
        "num_attention_heads": config.num_self_attention_heads,
        "num_cross_attention_heads": config.num_cross_attention_heads,
        "head_dim": keys // config.num_self_attention_heads,
        "value_head_dim": values // config.num_self_attention_heads,
        "attention_bias": True,
        "cross_attention_bias": True,
        "attention_dropout": dropout,
        "cross_attention_dropout": dropout,
        "query_attention_dropout": dropout,
        "intermediate_size": config.self_attention_widening_factor * config.d_latents,
        "cross_intermediate_size": config.cross_attention_widening_factor * config.d_latents,
        "hidden_act": config.hidden_act,
        "cross_query_residual": config.use_query_residual,
        "output_norm": False,
        "initializer_range": config.initializer_range,
    }


def _cross_widths(config: Any, input_size: int) -> dict[str, int]:
    """Sizes of the heads of the cross-attention, which are as wide in all as its input or as the latents."""
    keys = config.qk_channels
    if keys is None:
        keys = config.d_latents if config.cross_attention_shape_for_attention == "q" else input_size
    heads = config.num_cross_attention_heads
    return {"cross_head_dim": keys // heads, "cross_value_head_dim": (config.v_channels or keys) // heads}


def _feature_fields(config: Any) -> dict[str, Any]:
    # It has no queries, and any width divides into one head.
    return {"modality": "features", "input_size": config.d_model, "num_query_attention_heads": 1}


def _text_fields(config: Any) -> dict[str, Any]:
    return {
        "modality": "text",
        "vocab_size": config.vocab_size,
        "input_size": config.d_model,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _masked_fields(config: Any) -> dict[str, Any]:
    # The decoder's sizes are constants of the original.
    heads, keys = 8, 256
    return _text_fields(config) | {
        "query_size": config.d_model,
        "num_query_attention_heads": heads,
        "query_head_dim": keys // heads,
        "query_value_head_dim": config.d_model // heads,
        "query_intermediate_size": config.d_model,
        "query_residual": False,
        "lm_head_bias": True,
    }


def _classifier_fields(config: Any) -> dict[str, Any]:
    """One query reads the latents, by one head as wide as they are."""
    return {
        "pooling": "query",
        "query_size": config.d_latents,
        "num_query_attention_heads": 1,
        "query_intermediate_size": config.d_latents,
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
    }


def _image_fields(**fields: Any) -> Callable[[Any], dict[str, Any]]:
    def make(config: Any) -> dict[str, Any]:
        size = {"image_size": config.image_size} if fields["image_position_encoding"] == "learned" else {}
        return _classifier_fields(config) | {"modality": "image", "num_channels": 3} | fields | size

    return make


# Weights

_LAYER = {
    "attention_norm": "attention.self.layernorm1",
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "mlp_norm": "layernorm",
    "mlp.up_proj": "mlp.dense1",
    "mlp.down_proj": "mlp.dense2",
}


def _move_layer(transfer: WeightTransfer, target: str, source: str, is_cross: bool) -> None:
    names = _LAYER | ({"context_norm": "attention.self.layernorm2"} if is_cross else {})
    for ours, theirs in names.items():
        transfer.move_linear(f"{target}{ours}", f"{source}{theirs}")


def _move_stack(transfer: WeightTransfer, source: str, target: str, config: Any) -> None:
    transfer.move(f"{target}latents", f"{source}embeddings.latents")
    _move_layer(transfer, f"{target}layers.0.", f"{source}encoder.cross_attention.", is_cross=True)
    for index in range(config.num_self_attends_per_block):
        old = f"{source}encoder.self_attends.{index}."
        _move_layer(transfer, f"{target}layers.{index + 1}.", old, is_cross=False)


def _move_decoder(transfer: WeightTransfer, target: str, source: str) -> None:
    transfer.move(f"{target}queries", f"{source}output_position_encodings.position_embeddings")
    _move_layer(transfer, f"{target}layer.", f"{source}decoding_cross_attention.", is_cross=True)


def _move_text(transfer: WeightTransfer) -> None:
    old = "perceiver.input_preprocessor."
    transfer.move("model.embed_tokens.weight", f"{old}embeddings.weight")
    transfer.move("model.embed_positions.weight", f"{old}position_embeddings.weight")


def _move_masked(transfer: WeightTransfer) -> None:
    _move_text(transfer)
    _move_decoder(transfer, "decoder.", "perceiver.decoder.")
    transfer.move("lm_head.bias", "embedding_decoder.bias")


def _move_classifier(transfer: WeightTransfer) -> None:
    _move_decoder(transfer, "classifier.decoder.", "perceiver.decoder.decoder.")
    transfer.move_linear("classifier.decoder.projection.1", "perceiver.decoder.decoder.final_layer")


def _move_text_classifier(transfer: WeightTransfer) -> None:
    _move_text(transfer)
    _move_classifier(transfer)


def _move_images(transfer: WeightTransfer) -> None:
    """Whatever of a stem and of learned positions there is."""
    _move_classifier(transfer)
    old, new = "perceiver.input_preprocessor.", "model.image_adapter."
    for ours, theirs in {
        "stem": "convnet_1x1",
        "stem.conv": "convnet.conv",
        "stem.norm": "convnet.batchnorm",
        "positions.projection": "positions_projection",
        "positions.table": "position_embeddings.position_embeddings",
    }.items():
        for name in [name for name in transfer.source if name.startswith(f"{old}{theirs}")]:
            transfer.move(f"{new}{ours}{name.removeprefix(f'{old}{theirs}')}", name)


# What the original's three preprocessors of images have for constants.
_LEARNED = {
    "image_stem": "conv1x1",
    "image_stem_channels": 256,
    "image_position_encoding": "learned",
    "position_size": 256,
    "project_positions": True,
}
_FOURIER = {"image_position_encoding": "fourier", "num_frequency_bands": 64}
_PIXELS = _FOURIER | {"image_size": 224, "image_max_resolution": [224, 224]}
_CONVOLUTION = _FOURIER | {
    "image_size": 224,
    "image_max_resolution": [56, 56],
    "image_stem": "conv",
    "image_stem_channels": 64,
}

PERCEIVERS = {
    "PerceiverModel": _Source(PerceiverFlashModel, _feature_fields, None),
    "PerceiverForMaskedLM": _Source(PerceiverFlashForMaskedLM, _masked_fields, _move_masked),
    "PerceiverForSequenceClassification": _Source(
        PerceiverFlashForSequenceClassification,
        lambda config: _text_fields(config) | _classifier_fields(config),
        _move_text_classifier,
    ),
    "PerceiverForImageClassificationLearned": _Source(
        PerceiverFlashForImageClassification, _image_fields(**_LEARNED), _move_images
    ),
    "PerceiverForImageClassificationFourier": _Source(
        PerceiverFlashForImageClassification, _image_fields(**_PIXELS), _move_images
    ),
    "PerceiverForImageClassificationConvProcessing": _Source(
        PerceiverFlashForImageClassification, _image_fields(**_CONVOLUTION), _move_images
    ),
}
