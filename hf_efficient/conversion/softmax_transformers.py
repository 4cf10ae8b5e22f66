"""BERT, GPT-2 and Llama of transformers -> Performer with the same weights (arXiv 2009.14794, section 4.2).

With `layer_types="full_attention"` the converted model computes what the original computes. With linear layers the
weights are the same and the attention is approximated, the better the more features there are and the smaller the
queries and keys: such a model is meant for a short fine-tune.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import PreTrainedModel

from ..configuration.performer import PerformerConfig
from ..modeling.performer import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerModel,
    PerformerPreTrainedModel,
)
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer


SECOND_NAME = "a second name of the token embeddings"


def convert_softmax_transformer(
    original: PreTrainedModel, *, layer_types: str | list[str] = "linear_attention", **options: Any
) -> tuple[PerformerPreTrainedModel, ConversionReport]:
    """A Performer with the weights of a softmax transformer.

    Args:
        original: a `BertModel`, `BertForMaskedLM`, `BertForSequenceClassification`, `GPT2Model`, `GPT2LMHeadModel`,
            `LlamaModel` or `LlamaForCausalLM`.
        layer_types: `"linear_attention"` or `"full_attention"` for all layers, or a list with one of them for each.
        **options: fields of `PerformerConfig` that say how the attention is approximated (`feature_map`,
            `num_random_features`, `feature_seed`, `num_local_attention_heads`, ...).

    Raises:
        ConversionError: another class, an option of the original's config that has no counterpart, an `options` field
            that the original decides.
    """
    name = type(original).__name__
    if name not in _SOURCES:
        raise ConversionError(f"the source must be one of {', '.join(_SOURCES)}, got {name}")
    source = _SOURCES[name]
    fields = source.architecture.fields(original.config)
    if source.head_fields is not None:
        fields |= source.head_fields(original.config)
    decided = sorted(set(options) & set(fields))
    if decided:
        raise ConversionError(f"{', '.join(decided)} must stay what the {name} has, and cannot be given")
    if isinstance(layer_types, str):
        layer_types = [layer_types] * fields["num_hidden_layers"]
    model = source.target(PerformerConfig(**fields, **options, layer_types=layer_types))
    transfer = WeightTransfer(original.state_dict(), name, source.target.__name__)
    has_head = source.target is not PerformerModel
    source.architecture.move_weights(
        transfer, f"{original.base_model_prefix}." if has_head else "", "model." if has_head else "", original.config
    )
    if source.move_head is not None:
        source.move_head(transfer, original.config)
    for index, kind in enumerate(model.config.layer_types):
        if kind != "full_attention" and model.config.feature_map not in ("elu", "no_projection"):
            prefix = f"{'model.' if has_head else ''}layers.{index}.self_attn."
            for buffer in ("projection_matrix", "pair_norm"):
                if f"{prefix}{buffer}" in model.state_dict():
                    transfer.leave(f"{prefix}{buffer}", "random features, new here")
    for counter in ("forwards_since_redraw", "num_redraws"):
        transfer.leave(f"{'model.' if has_head else ''}{counter}", "counts draws of random features")
    report = transfer.load_into(model)
    if model.can_generate() and getattr(original, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(original.generation_config)
    return model.eval(), report


class _Architecture(NamedTuple):
    """How one of transformers' architectures is read.

    `fields` gives the fields of our config; `move_weights` is called with the transfer, the prefixes of the base model
    in the source and in the target, and the source's config.
    """

    fields: Callable[[Any], dict[str, Any]]
    move_weights: Callable[[WeightTransfer, str, str, Any], None]


class _Source(NamedTuple):
    """A class of transformers: what it becomes, and what its head adds to the base model."""

    architecture: _Architecture
    target: type[PerformerPreTrainedModel]
    head_fields: Callable[[Any], dict[str, Any]] | None = None
    move_head: Callable[[WeightTransfer, Any], None] | None = None


def _refuse(config: Any, **expected: Any) -> None:
    """Refuse a config in which a field is not the one value that has a counterpart."""
    for name, value in expected.items():
        found = getattr(config, name, value)
        if found != value:
            raise ConversionError(f"{config.model_type} can be converted with {name}={value!r} only, got {found!r}")


def _common_fields(config: Any) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {
        **{name: getattr(config, name) for name in names},
        **{name: getattr(config, name, None) for name in tokens},
        "initializer_range": config.initializer_range,
        "use_cache": config.use_cache,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


# BERT


def _bert_fields(config) -> dict[str, Any]:
    _refuse(config, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    if not isinstance(config.hidden_act, str):
        raise ConversionError(f"bert can be converted with a named hidden_act only, got {config.hidden_act!r}")
    return _common_fields(config) | {
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "norm_position": "post",
        "norm_eps": config.layer_norm_eps,
        "embedding_norm": True,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "type_vocab_size": config.type_vocab_size,
        "position_embedding_type": "learned",
        "embedding_dropout": config.hidden_dropout_prob,
        "attention_output_dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "use_cache": False,
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
    }


def _move_bert(transfer, source, target, config) -> None:
    embeddings = f"{source}embeddings."
    transfer.move(f"{target}embed_tokens.weight", f"{embeddings}word_embeddings.weight")
    transfer.move(f"{target}embed_positions.weight", f"{embeddings}position_embeddings.weight")
    if config.type_vocab_size:
        transfer.move(f"{target}embed_token_types.weight", f"{embeddings}token_type_embeddings.weight")
    transfer.move_linear(f"{target}embedding_norm", f"{embeddings}LayerNorm")
    for layer in range(config.num_hidden_layers):
        old, new = f"{source}encoder.layer.{layer}.", f"{target}layers.{layer}."
        for ours, theirs in {
            "self_attn.q_proj": "attention.self.query",
            "self_attn.k_proj": "attention.self.key",
            "self_attn.v_proj": "attention.self.value",
            "self_attn.o_proj": "attention.output.dense",
            "self_attn_branch.norm": "attention.output.LayerNorm",
            "mlp.up_proj": "intermediate.dense",
            "mlp.down_proj": "output.dense",
            "mlp_branch.norm": "output.LayerNorm",
        }.items():
            transfer.move_linear(f"{new}{ours}", f"{old}{theirs}")
    _note_dropout(transfer, config.hidden_dropout_prob)
    transfer.drop_matching(
        lambda name: name == f"{embeddings}position_ids", "a fixed table that old checkpoints carry"
    )
    if not source:
        transfer.drop_matching(
            lambda name: name.startswith("pooler."), "the pooler, which PerformerModel does not have"
        )


def _move_masked_head(transfer, config) -> None:
    head = "cls.predictions."
    transfer.move_linear("transform.0", f"{head}transform.dense")
    transfer.move_linear("transform.2", f"{head}transform.LayerNorm")
    transfer.move("lm_head.bias", f"{head}decoder.bias")
    transfer.drop(f"{head}bias", "a second name of the head's bias")
    if config.tie_word_embeddings:
        transfer.drop(f"{head}decoder.weight", SECOND_NAME)
    else:
        transfer.move("lm_head.weight", f"{head}decoder.weight")


def _classifier_fields(config) -> dict[str, Any]:
    dropout = config.classifier_dropout
    return {
        "classifier_pooling": "first",
        "classifier_transform": True,
        "classifier_bias": True,
        "classifier_dropout": config.hidden_dropout_prob if dropout is None else dropout,
    }


def _move_classifier(transfer, config) -> None:
    transfer.move_linear("transform.0", "bert.pooler.dense")
    transfer.move_linear("score", "classifier")


# GPT-2


def _gpt2_fields(config) -> dict[str, Any]:
    _refuse(config, add_cross_attention=False)
    return _common_fields(config) | {
        "intermediate_size": config.n_inner or 4 * config.hidden_size,
        "hidden_act": config.activation_function,
        "norm_eps": config.layer_norm_epsilon,
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "position_embedding_type": "learned",
        "embedding_dropout": config.embd_pdrop,
        "attention_output_dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
        "is_decoder": True,
    }


def _move_gpt2(transfer, source, target, config) -> None:
    transfer.move(f"{target}embed_tokens.weight", f"{source}wte.weight")
    transfer.move(f"{target}embed_positions.weight", f"{source}wpe.weight")
    transfer.move_linear(f"{target}norm", f"{source}ln_f")
    head_dim = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        old, new = f"{source}h.{layer}.", f"{target}layers.{layer}."
        # Other scalings of the scores than 1/sqrt(d) become part of the queries.
        scale = (1.0 if config.scale_attn_weights else head_dim**0.5) / (
            layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        )
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):

            def taken(fused: torch.Tensor, part=part, factor=scale if name == "q_proj" else 1.0) -> torch.Tensor:
                return _row_major(fused).chunk(3)[part] * factor

            transfer.move_linear(f"{new}self_attn.{name}", f"{old}attn.c_attn", change=taken)
        for ours, theirs in {
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        }.items():
            transfer.move_linear(f"{new}{ours}", f"{old}{theirs}", change=_row_major)
        transfer.move_linear(f"{new}self_attn_branch.norm", f"{old}ln_1")
        transfer.move_linear(f"{new}mlp_branch.norm", f"{old}ln_2")
    _note_dropout(transfer, config.resid_pdrop)


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    """GPT-2 keeps its weights transposed, `[in, out]`; biases stay as they are."""
    return tensor.mT.contiguous() if tensor.ndim == 2 else tensor


# Llama


def _llama_fields(config) -> dict[str, Any]:
    rope = config.rope_parameters
    _refuse(config, pretraining_tp=1)
    turned = rope.get("partial_rotary_factor", 1.0)
    if rope.get("rope_type", "default") != "default" or turned != 1.0:
        raise ConversionError(
            f"llama can be converted with rope_type='default' and partial_rotary_factor=1 only, got {dict(rope)}"
        )
    return _common_fields(config) | {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "gated_feed_forward": True,
        "norm_type": "rms_norm",
        "norm_eps": config.rms_norm_eps,
        "attention_bias": config.attention_bias,
        "attention_out_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout or 0.0,
        "mlp_bias": config.mlp_bias,
        "position_embedding_type": "rotary",
        "rotary_emb_base": rope["rope_theta"],
        "is_decoder": True,
    }


def _move_llama(transfer, source, target, config) -> None:
    transfer.move(f"{target}embed_tokens.weight", f"{source}embed_tokens.weight")
    transfer.move(f"{target}norm.weight", f"{source}norm.weight")
    for layer in range(config.num_hidden_layers):
        old, new = f"{source}layers.{layer}.", f"{target}layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            transfer.move_linear(f"{new}self_attn.{name}", f"{old}self_attn.{name}", bias=config.attention_bias)
        for name in ("gate_proj", "up_proj", "down_proj"):
            transfer.move_linear(f"{new}mlp.{name}", f"{old}mlp.{name}", bias=config.mlp_bias)
        transfer.move(f"{new}self_attn_branch.norm.weight", f"{old}input_layernorm.weight")
        transfer.move(f"{new}mlp_branch.norm.weight", f"{old}post_attention_layernorm.weight")


# Common to the heads


def _move_causal_head(transfer, config) -> None:
    if config.tie_word_embeddings:
        transfer.drop("lm_head.weight", SECOND_NAME)
    else:
        transfer.move("lm_head.weight", "lm_head.weight")


def _note_dropout(transfer: WeightTransfer, rate: float) -> None:
    if rate:
        transfer.note(
            f"dropout {rate} behind the feed-forward has no counterpart (feed_forward_dropout acts inside and is 0)"
        )


_BERT = _Architecture(_bert_fields, _move_bert)
_GPT2 = _Architecture(_gpt2_fields, _move_gpt2)
_LLAMA = _Architecture(_llama_fields, _move_llama)
_SOURCES = {
    "BertModel": _Source(_BERT, PerformerModel),
    "BertForMaskedLM": _Source(
        _BERT,
        PerformerForMaskedLM,
        lambda config: {"mlm_head_transform": True, "lm_head_bias": True},
        _move_masked_head,
    ),
    "BertForSequenceClassification": _Source(
        _BERT, PerformerForSequenceClassification, _classifier_fields, _move_classifier
    ),
    "GPT2Model": _Source(_GPT2, PerformerModel),
    "GPT2LMHeadModel": _Source(_GPT2, PerformerForCausalLM, None, _move_causal_head),
    "LlamaModel": _Source(_LLAMA, PerformerModel),
    "LlamaForCausalLM": _Source(_LLAMA, PerformerForCausalLM, None, _move_causal_head),
}
