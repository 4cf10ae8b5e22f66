"""The options of performer-pytorch 1.1.4, as its constructors take them, and the fields of our config they mean."""

import math
from collections.abc import Mapping
from typing import Any

from ..configuration.performer import PerformerConfig
from .weight_transfer import ConversionError


LANGUAGE_MODEL, STACK, ENCODER_DECODER = "PerformerLM", "Performer", "PerformerEncDec"

_REQUIRED = object()
# The constructor of the original's `Performer`; `PerformerLM` has the same arguments, these differ or come on top.
_STACK_ARGUMENTS = {
    "dim": _REQUIRED,
    "depth": _REQUIRED,
    "heads": _REQUIRED,
    "dim_head": _REQUIRED,
    "local_attn_heads": 0,
    "local_window_size": 256,
    "causal": False,
    "ff_mult": 4,
    "nb_features": None,
    "feature_redraw_interval": 1000,
    "reversible": False,
    "ff_chunks": 1,
    "generalized_attention": False,
    "kernel_fn": "relu",
    "use_scalenorm": False,
    "use_rezero": False,
    "ff_glu": False,
    "ff_dropout": 0.0,
    "attn_dropout": 0.0,
    "cross_attend": False,
    "no_projection": False,
    "auto_check_redraw": True,
    "qkv_bias": True,
    "attn_out_bias": True,
    "shift_tokens": False,
}
_LANGUAGE_MODEL_ARGUMENTS = _STACK_ARGUMENTS | {
    "num_tokens": _REQUIRED,
    "max_seq_len": _REQUIRED,
    "dim_head": 64,
    "emb_dropout": 0.0,
    "tie_embed": False,
    "rotary_position_emb": True,
    "axial_position_emb": False,
    "axial_position_shape": None,
    "qkv_bias": False,
    "attn_out_bias": False,
}
_ENCODER_DECODER_ARGUMENTS = {
    "dim": _REQUIRED,
    "ignore_index": 0,
    "pad_value": 0,
    "tie_token_embeds": False,
    "no_projection": False,
}
# The original adds this to every component of a causal normaliser.
CAUSAL_EPSILON = 1e-6

_KERNELS = {
    "relu": "relu",
    "ReLU": "relu",
    "gelu": "gelu",
    "GELU": "gelu",
    "silu": "silu",
    "SiLU": "silu",
    "sigmoid": "sigmoid",
    "Sigmoid": "sigmoid",
    "softplus": "softplus",
    "Softplus": "softplus",
}


def complete_arguments(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the original's defaults filled in.

    Raises:
        ConversionError: an argument that the constructor does not have, or one missing that it needs.
    """
    known = _LANGUAGE_MODEL_ARGUMENTS if kind == LANGUAGE_MODEL else _STACK_ARGUMENTS
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ConversionError(f"{kind} has no argument {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    complete = {**known, **arguments}
    missing = [name for name, value in complete.items() if value is _REQUIRED]
    if missing:
        raise ConversionError(f"the arguments of {kind} must hold {', '.join(missing)}, got {sorted(arguments)}")
    if complete["dim_head"] is None:
        complete["dim_head"] = complete["dim"] // complete["heads"]
    if complete["nb_features"] is None:
        complete["nb_features"] = int(complete["dim_head"] * math.log(complete["dim_head"]))
    local = complete["local_attn_heads"]
    local = list(local) if isinstance(local, (list, tuple)) else [local]
    complete["local_attn_heads"] = local * complete["depth"] if len(local) == 1 else local
    return complete


def split_encoder_decoder_arguments(arguments: Mapping[str, Any]) -> tuple[dict, dict, dict]:
    """The encoder's, the decoder's and the remaining arguments of `PerformerEncDec`, the first two complete.

    Raises:
        ConversionError: as in `complete_arguments`, also for arguments that the original would swallow unused.
    """
    parts = {"enc_": {}, "dec_": {}}
    rest = {}
    for name, value in arguments.items():
        prefix = name[:4]
        if prefix in parts:
            parts[prefix][name[4:]] = value
        else:
            rest[name] = value
    unknown = sorted(set(rest) - set(_ENCODER_DECODER_ARGUMENTS))
    if unknown:
        raise ConversionError(
            f"{ENCODER_DECODER} has no argument {', '.join(unknown)}; it has "
            f"{', '.join(sorted(_ENCODER_DECODER_ARGUMENTS))} and those of {LANGUAGE_MODEL} behind enc_ and dec_"
        )
    rest = _ENCODER_DECODER_ARGUMENTS | rest
    if rest["dim"] is _REQUIRED:
        raise ConversionError(f"the arguments of {ENCODER_DECODER} must hold dim, got {sorted(arguments)}")
    shared = {"dim": rest["dim"], "no_projection": rest["no_projection"]}
    encoder = complete_arguments(LANGUAGE_MODEL, {**parts["enc_"], **shared})
    decoder = complete_arguments(LANGUAGE_MODEL, {**parts["dec_"], **shared, "causal": True, "cross_attend": True})
    return encoder, decoder, rest


def kernel_name(kernel_fn: Any) -> str:
    """Our name of a kernel function, given as a name, a module of torch.nn or a function.

    Raises:
        ConversionError: a function that no feature map of ours computes.
    """
    name = kernel_fn if isinstance(kernel_fn, str) else getattr(kernel_fn, "__name__", type(kernel_fn).__name__)
    plain = getattr(kernel_fn, "approximate", "none") == "none" and getattr(kernel_fn, "beta", 1) == 1
    if name not in _KERNELS or not plain:
        raise ConversionError(
            f"kernel_fn must be one of {', '.join(sorted(set(_KERNELS.values())))} as torch defines them, got "
            f"{kernel_fn}"
        )
    return _KERNELS[name]


def stack_fields(arguments: Mapping[str, Any], kind: str, rotary: bool = False) -> dict[str, Any]:
    """The fields of `PerformerConfig` that complete `arguments` of one stack stand for.

    Args:
        arguments: from `complete_arguments`.
        kind: `"PerformerLM"` or `"Performer"`.
        rotary: whether a bare `Performer` was called with `pos_emb` (a language model knows by itself).
    """
    causal, language_model = arguments["causal"], kind == LANGUAGE_MODEL
    # Where both are given, the original takes ScaleNorm.
    norm = "scale_norm" if arguments["use_scalenorm"] else "rezero" if arguments["use_rezero"] else "layer_norm"
    fields = {
        "hidden_size": arguments["dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["heads"],
        "head_dim": arguments["dim_head"],
        "intermediate_size": arguments["dim"] * arguments["ff_mult"],
        "gated_feed_forward": arguments["ff_glu"],
        "norm_type": norm,
        "final_norm_type": "layer_norm" if language_model else "none",
        "attention_bias": arguments["qkv_bias"],
        "attention_out_bias": arguments["attn_out_bias"],
        "feed_forward_dropout": arguments["ff_dropout"],
        "attention_dropout": arguments["attn_dropout"],
        "attention_output_dropout": arguments["attn_dropout"],
        "num_random_features": arguments["nb_features"],
        "feature_redraw_interval": _redraw_interval(arguments),
        "masked_keys_in_normalizer": True,
        "causal_normalizer_epsilon": CAUSAL_EPSILON if causal else 0.0,
        "num_local_attention_heads": list(arguments["local_attn_heads"]),
        "local_window_size": arguments["local_window_size"],
        "local_attention_type": "bucketed",
        "shifted_local_rotary": not causal,
        "position_embedding_type": "rotary" if rotary else "none",
        "shift_tokens": arguments["shift_tokens"],
        "reversible": arguments["reversible"],
        "is_decoder": causal,
        "add_cross_attention": arguments["cross_attend"],
        "cross_attention_feed_forward": arguments["cross_attend"],
        **_feature_fields(arguments),
    }
    if language_model:
        fields |= {
            "vocab_size": arguments["num_tokens"],
            "embedding_dropout": arguments["emb_dropout"],
            "tie_word_embeddings": arguments["tie_embed"],
            "lm_head_bias": not arguments["tie_embed"],
            # Chunks only bound memory; the original counts them, we give their size at full length.
            "chunk_size_feed_forward": math.ceil(arguments["max_seq_len"] / arguments["ff_chunks"])
            if arguments["ff_chunks"] > 1
            else 0,
            **_position_fields(arguments),
        }
    return fields


def encoder_decoder_config(encoder: Mapping, decoder: Mapping, rest: Mapping) -> PerformerConfig:
    """The config of a `PerformerEncDec`: the decoder's fields, and those in which the encoder differs."""
    encoder_fields, decoder_fields = (stack_fields(part, LANGUAGE_MODEL) for part in (encoder, decoder))
    own = ("is_decoder", "add_cross_attention", "cross_attention_feed_forward", "tie_word_embeddings", "lm_head_bias")
    overrides = {name: value for name, value in encoder_fields.items() if name not in own}
    # Where they agree nothing is overridden, except what would otherwise be derived from a field that is.
    differing = {name for name, value in overrides.items() if decoder_fields.get(name) != value}
    linked = {"hidden_size", "head_dim", "num_random_features", "axial_position_shape", "feature_epsilon"}
    if differing:
        overrides = {name: value for name, value in overrides.items() if name in differing | linked}
    return PerformerConfig(
        **decoder_fields,
        is_encoder_decoder=True,
        encoder_overrides=overrides if differing else None,
        share_embeddings=rest["tie_token_embeds"] and decoder["tie_embed"],
    )


def _redraw_interval(arguments: Mapping[str, Any]) -> int | None:
    """Forwards from draw to draw: the original counts from 0 up to its interval, which takes one more."""
    interval = arguments["feature_redraw_interval"]
    return interval + 1 if interval is not None and arguments["auto_check_redraw"] else None


def _feature_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if arguments["no_projection"]:
        return {"feature_map": "no_projection", "feature_epsilon": 0.0, "feature_stabilizer": "running"}
    if arguments["generalized_attention"]:
        name = kernel_name(arguments["kernel_fn"])
        return {"feature_map": name, "feature_epsilon": 1e-3, "feature_stabilizer": "running"}
    # Its maximum over the sequence cannot be cached.
    return {
        "feature_map": "softmax",
        "feature_epsilon": 1e-4,
        "feature_stabilizer": "sequence",
        "use_cache": False,
        "feature_scaling": "sqrt_dim" if arguments.get("ortho_scaling", 0) == 1 else "chi",
    }


def _position_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    length = arguments["max_seq_len"]
    if arguments["rotary_position_emb"]:
        return {"position_embedding_type": "rotary_and_sinusoidal", "max_position_embeddings": length}
    if not arguments["axial_position_emb"]:
        return {"position_embedding_type": "learned", "max_position_embeddings": length}
    shape = list(arguments["axial_position_shape"] or (math.ceil(length / 64), 64))
    return {
        "position_embedding_type": "axial",
        # The original's table may be smaller than the length it is given: the smaller one is its limit.
        "max_position_embeddings": min(length, math.prod(shape)),
        "axial_position_shape": [math.prod(shape[:-1]), shape[-1]],
    }
