"""THE table of x-transformers' flags: what each means in our configuration, and which file computes it.

The converter reads it, and scripts/x_transformer_table.py writes docs/x_transformer.md from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .weight_transfer import ConversionError


REQUIRED = object()
Fields = dict[str, Any]


@dataclass(frozen=True)
class Flag:
    """One argument of a constructor of x-transformers.

    Attributes:
        name: with its prefix (`attn_`, `ff_`).
        default: the original's; a flag that has it is not looked at.
        fields: our field, or what there is instead, for the reader of the table.
        where: the file that computes it.
        convert: fields for a value (and all flags of the stack); None is a plain copy to `fields`.
        refused: why a value other than the default cannot be converted, if it cannot.
        form: `"fused"`, or `"written out"` where N×M scores are held.
        cached: whether decoding with a cache gives what decoding without one does.
        takes_list: whether a list is one value of it, and not a value for each layer.
    """

    name: str
    default: Any
    fields: str = ""
    where: str = ""
    convert: Callable[[Any, Mapping[str, Any]], Fields] | None = None
    refused: str = ""
    form: str = "fused"
    cached: str = "yes"
    takes_list: bool = False

    def to_fields(self, value: Any, flags: Mapping[str, Any]) -> Fields:
        """Our fields for `value`.

        Raises:
            ConversionError: the flag has no counterpart.
        """
        if self.refused and value != self.default:
            raise ConversionError(f"{self.name}={value!r} has no counterpart: {self.refused}")
        if isinstance(value, (tuple, list)) and not self.takes_list:
            raise ConversionError(f"{self.name}={value!r}: a value for each layer has no counterpart (all are alike)")
        if self.convert is not None:
            return self.convert(value, flags)
        return {self.fields: value} if self.fields else {}


def _named(field: str, name: Any) -> Callable[[Any, Mapping[str, Any]], Fields]:
    """`field` is `name` where the flag is on."""
    return lambda value, flags: {field: name} if value else {}


def _nothing(value, flags) -> Fields:
    return {}


RESEARCH, INITIAL = "a research option that is not built", "only about initial weights or speed"
ATTENTION, LAYER, INPUTS = "x_transformer_attention.py", "x_transformer_layer.py", "x_transformer_embeddings.py"
BIAS, ROTARY, NORMS, RULES = "position_bias.py", "rotary_embedding.py", "norm_family.py", "residual_rules.py"
SOFTMAX, GATES, QK, MLP = "softmax_attention.py", "attention_gates.py", "query_key_norms.py", "glu_feed_forward.py"


def _rope(flags) -> Fields:
    dim_head = flags["attn_dim_head"]
    size = flags["rotary_emb_dim"] or flags["default_rotary_dim"]
    theta = 10000.0 * flags["rotary_base_rescale_factor"] ** (size / (size - 2))
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": size / dim_head}
    if flags["rotary_interpolation_factor"] != 1:
        rope |= {"rope_type": "linear", "factor": float(flags["rotary_interpolation_factor"])}
    return {"rope_parameters": rope}


def _rotary(value, flags) -> Fields:
    return {"rotary_positions": "xpos" if flags["rotary_xpos"] else "rope", **_rope(flags)} if value else {}


def _alibi(value, flags) -> Fields:
    from ..configuration.x_transformer import alibi_slopes

    if not value:
        return {}
    heads = flags["alibi_num_heads"] or flags["heads"]
    slopes = [*alibi_slopes(heads), *[0.0] * (flags["heads"] - heads)]
    return {"position_bias": "alibi", "alibi_slopes": [slopes[head] for head in head_order(flags)]}


def head_order(flags) -> list[int]:
    """Their query head for each of ours: they share a key head among every kv-th query head, we among neighbours."""
    heads, shared = flags["heads"], key_value_heads(flags)
    return [turn * shared + group for group in range(shared) for turn in range(heads // shared)]


def key_value_heads(flags) -> int:
    """The number of key and value heads."""
    return 1 if flags["attn_one_kv_head"] else flags["attn_kv_heads"] or flags["heads"]


def _qk_norm(value, flags) -> Fields:
    if not value:
        return {}
    kind = "l2_learned" if flags["attn_qk_norm_dim_scale"] else "l2"
    return {
        "qk_norm": kind,
        "qk_norm_groups": flags["attn_qk_norm_groups"],
        "qk_norm_scale": flags["attn_qk_norm_scale"],
    }


def _gate(value, flags) -> Fields:
    return {"value_gate": "silu" if flags["attn_swiglu_values"] else "sigmoid"} if value else {}


def _order(value, flags) -> Fields:
    return {"sublayer_order": "".join(value), "num_hidden_layers": list(value).count("a")}


def _sandwich(value, flags) -> Fields:
    return _order("a" * value + _block(flags) * (flags["depth"] - value) + "f" * value, flags)


def _par(value, flags) -> Fields:
    block = _block(flags)
    total, attentions = flags["depth"] * len(block), block.replace("f", "")
    count = total // value
    cut = total * 2 // 3
    width = (cut + cut // count) // count
    head = (attentions + "f" * (width - len(attentions))) * count
    return _order(head + "f" * (total - len(head)), flags)


def _block(flags) -> str:
    attentions = "a" * (not flags["only_cross"]) + "c" * flags["cross_attend"]
    return "f" * flags["macaron"] + attentions + "f"


def _each_branch(field: str) -> Callable[[Any, Mapping[str, Any]], Fields]:
    """`field` is one value, or the list of one for each branch."""
    return lambda value, flags: {field: list(value) if isinstance(value, (tuple, list)) else value}


def _scale_residual(value, flags) -> Fields:
    if not isinstance(value, bool):
        raise ConversionError(f"scale_residual={value!r}: a constant factor of the branches has no counterpart")
    return {"learned_residual_scale": value}


# What torch's activations are called in transformers.
ACTIVATIONS = {"GELU": "gelu", "SiLU": "silu", "ReLU": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Mish": "mish",
               "LeakyReLU": "leaky_relu", "ReLU6": "relu6", "Identity": "linear"}  # fmt: skip


def _activation(value, flags) -> Fields:
    name = value if isinstance(value, str) else type(value).__name__  # files hold names
    if name not in ACTIVATIONS:
        raise ConversionError(
            f"ff_custom_activation={value!r} has no counterpart: transformers knows {', '.join(ACTIVATIONS)}"
        )
    return {"hidden_act": ACTIVATIONS[name]}


def _execution(value, flags) -> Fields:
    """Indices of branches: as indices of blocks where whole blocks run, else of blocks of one branch each."""
    order, block = flags["custom_layers"], _block(flags)
    for name in ("sandwich_coef", "par_ratio"):
        if flags[name] is not None:
            raise ConversionError(f"layers_execute_order={value!r} with {name}: use custom_layers for the order")
    size = len(block)
    blocks = [value[i] // size for i in range(0, len(value), size)]
    whole = [index for block in blocks for index in range(block * size, (block + 1) * size)]
    if order is None and list(value) == whole:
        return {"layer_execution_order": blocks, "num_hidden_layers": len(blocks)}
    branches = "|".join(order or block * flags["depth"])
    return {"sublayer_order": branches, "layer_execution_order": list(value), "num_hidden_layers": len(value)}


# `AttentionLayers`: Encoder, Decoder, PrefixDecoder
LAYER_FLAGS = (
    Flag("dim", REQUIRED, "hidden_size", "x_transformer.py"),
    Flag("depth", None, "num_hidden_layers", "x_transformer.py", lambda v, f: {"num_hidden_layers": v} if v else {}),
    Flag("heads", 8, "num_attention_heads", ATTENTION),
    Flag("cross_attend", False, "add_cross_attention", LAYER),
    Flag("only_cross", False, "cross_attention_only", LAYER, cached="no: nothing is causal"),
    Flag("only_attn", False, refused=RESEARCH),
    Flag("use_scalenorm", False, "norm_type='scale_norm'", NORMS, _named("norm_type", "scale_norm")),
    Flag("use_rmsnorm", False, "norm_type='rms_norm'", NORMS, _named("norm_type", "rms_norm")),
    Flag("use_simple_rmsnorm", False, "norm_type='simple_rms_norm'", NORMS, _named("norm_type", "simple_rms_norm")),
    Flag("use_dynamic_tanh", False, "norm_type='dynamic_tanh'", NORMS, _named("norm_type", "dynamic_tanh")),
    Flag("dynamic_tanh_init_alpha", 1.0, "(folded into the weight)", NORMS, _nothing),
    Flag("norm_add_unit_offset", True, "(folded into the weights)", NORMS, _nothing),
    *(
        Flag(name, False, refused=RESEARCH)
        for name in ("use_derf", "use_adaptive_layernorm", "use_adaptive_rmsnorm", "use_adaptive_layerscale")
    ),
    Flag("alibi_pos_bias", False, "position_bias='alibi'", BIAS, _alibi),
    Flag("alibi_num_heads", None, "alibi_slopes", BIAS, _nothing),
    Flag("rel_pos_bias", False, "position_bias='t5'", BIAS, _named("position_bias", "t5")),
    Flag("rel_pos_num_buckets", 32, "relative_attention_num_buckets", BIAS),
    Flag("rel_pos_max_distance", 128, "relative_attention_max_distance", BIAS),
    Flag("dynamic_pos_bias", False, "position_bias='dynamic'", BIAS, _named("position_bias", "dynamic")),
    Flag("dynamic_pos_bias_log_distance", False, "dynamic_bias_log_distance", BIAS),
    Flag("dynamic_pos_bias_mlp_depth", 2, "dynamic_bias_depth", BIAS),
    Flag("dynamic_pos_bias_norm", False, "dynamic_bias_norm", BIAS),
    Flag("rotary_pos_emb", False, "rotary_positions='rope'", ROTARY, _rotary),
    Flag("rotary_xpos", False, "rotary_positions='xpos'", ROTARY, _rotary),
    Flag("rotary_emb_dim", None, "rope_parameters['partial_rotary_factor']", ROTARY, _nothing),
    Flag("rotary_interpolation_factor", 1.0, "rope_parameters['factor'], type 'linear'", ROTARY, _nothing),
    Flag("rotary_xpos_scale_base", 512, "xpos_scale_base", ROTARY),
    Flag("rotary_base_rescale_factor", 1.0, "rope_parameters['rope_theta']", ROTARY, _nothing),
    Flag("disable_abs_pos_emb", None, "absolute_positions=None", INPUTS, _nothing),
    Flag("weight_tie_layers", False, "layer_execution_order=[0, 0, ...]", "x_transformer.py",
         lambda v, f: {"layer_execution_order": [0] * f["depth"]} if v else {}),
    Flag("custom_layers", None, "sublayer_order", LAYER, _order, takes_list=True),
    Flag("layers_execute_order", None, "layer_execution_order, sublayer_order", "x_transformer.py", _execution,
         takes_list=True),
    Flag("sandwich_coef", None, "sublayer_order", LAYER, _sandwich),
    Flag("par_ratio", None, "sublayer_order", LAYER, _par),
    Flag("residual_attn", False, "residual_attention", SOFTMAX, form="written out"),
    Flag("cross_residual_attn", False, "cross_residual_attention", SOFTMAX, form="written out"),
    Flag("macaron", False, "macaron", LAYER),
    Flag("pre_norm", True, "norm_position='post' if off", LAYER, lambda v, f: {} if v else {"norm_position": "post"}),
    Flag("pre_norm_has_final_norm", True, "final_norm", "x_transformer.py",
         lambda v, f: {} if v else {"final_norm": False}),
    Flag("pre_and_post_norm", False, "norm_position='pre_and_post'", LAYER, _named("norm_position", "pre_and_post")),
    Flag("sandwich_norm", False, "norm_position='sandwich'", LAYER, _named("norm_position", "sandwich")),
    Flag("gate_residual", False, "residual_type='gru'", RULES, _named("residual_type", "gru")),
    Flag("scale_residual", False, "learned_residual_scale", RULES, _scale_residual),
    Flag("scale_residual_constant", 1.0, "residual_scale", RULES),
    Flag("shift_tokens", 0, "shift_tokens", "neighbour_shift.py", _each_branch("shift_tokens"), takes_list=True),
    Flag("softclamp_output", False, "hidden_state_softcapping", "x_transformer.py",
         lambda v, f: {"hidden_state_softcapping": float(f["softclamp_output_value"])} if v else {}),
    Flag("softclamp_output_value", 30.0, "hidden_state_softcapping", "x_transformer.py", _nothing),
    Flag("zero_init_branch_output", False, "zero_init_branches", RULES),
    Flag("layer_dropout", 0.0, "layerdrop", LAYER, _each_branch("layerdrop"), takes_list=True),
    Flag("cross_attn_tokens_dropout", 0.0, "encoder_token_dropout", "x_transformer_inputs.py"),
    Flag("use_layerscale", False, "layer_scale_init_value", RULES,
         lambda v, f: {"layer_scale_init_value": float(f["layerscale_init_value"])} if v else {}),
    Flag("layerscale_init_value", 0.0, "layer_scale_init_value", RULES, _nothing),
    Flag("add_value_residual", False, "value_residual", ATTENTION,
         lambda v, f: {"value_residual": "learned" if f["learned_value_residual_mix"] else "half"} if v else {}),
    Flag("learned_value_residual_mix", True, "value_residual", ATTENTION, _nothing),
    Flag("verbose", True, "", "", _nothing),
    *(
        Flag(name, default, refused=RESEARCH)
        for name, default in {
            "dim_condition": None, "adaptive_condition_mlp": False, "rotate_num_heads": None, "polar_pos_emb": False,
            "attn_aggregated_residuals": False, "orthog_residual": False, "mv_split_residual": False,
            "gated_multi_residual": False, "depth_scale_residual": False, "unet_skips": False,
            "integrate_layers": False, "reinject_input": False,
            "learned_reinject_input_gate": False, "rel_pos_kwargs": {}, "residual_fn_kwargs": {},
        }.items()
    ),
    Flag("qkv_receive_diff_residuals", False, refused="it belongs to num_residual_streams"),
    Flag("num_residual_streams", 1, refused="since 2.14.1 its hyper-connections add all streams up, as no paper does"),
    # Attention
    Flag("attn_dim_head", 64, "head_dim", ATTENTION),
    Flag("attn_value_dim_head", None, "value_head_dim", ATTENTION),
    Flag("attn_kv_heads", None, "num_key_value_heads", ATTENTION),
    Flag("attn_one_kv_head", False, "num_key_value_heads=1", ATTENTION, _named("num_key_value_heads", 1)),
    Flag("attn_dropout", 0.0, "attention_dropout", SOFTMAX),
    Flag("attn_sublayer_dropout", 0.0, "attention_output_dropout", ATTENTION),
    Flag("attn_num_mem_kv", 0, "num_memory_key_values", SOFTMAX),
    Flag("attn_qk_norm", False, "qk_norm='l2'", QK, _qk_norm),
    Flag("attn_qk_norm_groups", 1, "qk_norm_groups", QK, _nothing),
    Flag("attn_qk_norm_scale", 10, "qk_norm_scale", QK, _nothing),
    Flag("attn_qk_norm_dim_scale", False, "qk_norm='l2_learned'", QK, _nothing),
    Flag("attn_qk_rmsnorm", False, "qk_norm='rms'", QK, _named("qk_norm", "rms")),
    Flag("attn_k_rmsnorm", False, "qk_norm='rms_key'", QK, _named("qk_norm", "rms_key")),
    Flag("attn_max_attend_past", None, "sliding_window (itself counts too: + 1)", SOFTMAX,
         lambda v, f: {} if v is None else {"sliding_window": v + 1}),
    Flag("attn_softclamp_logits", False, "attn_logit_softcapping", SOFTMAX,
         lambda v, f: {"attn_logit_softcapping": float(f["attn_logit_softclamp_value"])} if v else {}),
    Flag("attn_logit_softclamp_value", 50.0, "attn_logit_softcapping", SOFTMAX, _nothing),
    Flag("attn_pre_talking_heads", False, "pre_softmax_talking_heads", SOFTMAX, form="written out"),
    Flag("attn_post_talking_heads", False, "post_softmax_talking_heads", SOFTMAX, form="written out"),
    Flag("attn_head_learned_sink", False, "learned_attention_sinks", SOFTMAX),
    Flag("attn_add_zero_kv", False, "zero_attention_sink", SOFTMAX),
    Flag("attn_head_scale", False, "head_output_scale", ATTENTION),
    Flag("attn_on_attn", False, "attention_on_attention", ATTENTION),
    Flag("attn_gate_value_heads", False, "head_gate", GATES),
    Flag("attn_gate_values", False, "value_gate='sigmoid'", GATES, _gate),
    Flag("attn_swiglu_values", False, "value_gate='silu'", GATES, _nothing),
    Flag("attn_gate_values_rank", None, "value_gate_rank", GATES),
    Flag("attn_gate_values_headwise", False, "value_gate_per_head", GATES),
    *(
        Flag(f"attn_{name}", default, f"({INITIAL})", "", _nothing)
        for name, default in {"flash": False, "zero_init_output": False, "onnxable": False, "sdp_kwargs": None}.items()
    ),
    *(
        Flag(f"attn_{name}", default, refused=RESEARCH)
        for name, default in {
            "pre_scale_post_talking_heads": False, "sparse_topk": None, "output_gate": False,
            "output_gate_rank": None, "output_gate_headwise": False, "low_rank_silu_gates": True, "hard": False,
            "value_rmsnorm": False, "l2_distance": False, "sigmoid": False, "gumbel_softmax": False,
            "selective": False, "cog_signed": False, "custom_attn_fn": None, "hybrid_module": None, "dim_out": None,
            "data_dependent_alibi": False, "use_rel_proj_pos_bias": False, "use_cope": False,
            "orthog_projected_values": False, "orthog_projected_values_per_head": False, "laser": False,
            "project_out": None, "use_latent_q": False, "use_latent_kv": False, "inverted_attention": False,
            "dim_context": None,
        }.items()
    ),
    Flag("attn_flash_pack_seq", False, "(cu_seq_lens_q of forward)", "packed_rows.py", _nothing, cached="no: one row"),
    Flag("cross_attn_dim_context", None, "cross_attention_hidden_size", ATTENTION),
    # Feed-forward
    Flag("ff_mult", 4, "intermediate_size", MLP, lambda v, f: {"intermediate_size": int(f["dim"] * v)}),
    Flag("ff_glu", False, "gated_feed_forward", MLP),
    Flag("ff_glu_mult_bias", False, "gate_channel_scale", MLP),
    Flag("ff_swish", False, "hidden_act='silu'", MLP, _named("hidden_act", "silu")),
    Flag("ff_relu_squared", False, "hidden_act='relu2'", MLP, _named("hidden_act", "relu2")),
    Flag("ff_custom_activation", None, "hidden_act", MLP, _activation),
    Flag("ff_post_act_ln", False, "feed_forward_norm", MLP),
    Flag("ff_dropout", 0.0, "feed_forward_dropout", MLP),
    Flag("ff_sublayer_dropout", 0.0, "feed_forward_output_dropout", MLP),
    # The original's GLU keeps the biases of its input projection.
    Flag("ff_no_bias", False, "mlp_bias, mlp_output_bias", MLP,
         lambda v, f: {"mlp_bias": bool(f["ff_glu"]), "mlp_output_bias": False} if v else {}),
    Flag("ff_zero_init_output", False, f"({INITIAL})", "", _nothing),
    *(
        Flag(f"ff_{name}", default, refused=RESEARCH)
        for name, default in {
            "solu": False, "softclamp_value": None, "glu_softclamp": False, "dim_out": None,
        }.items()
    ),
)  # fmt: skip

# `TransformerWrapper`
WRAPPER_FLAGS = (
    Flag("num_tokens", REQUIRED, "vocab_size", "x_transformer.py"),
    Flag("max_seq_len", REQUIRED, "max_position_embeddings", INPUTS,
         lambda v, f: {"max_position_embeddings": max(v, 1)}),
    Flag("emb_dim", None, "embedding_size", INPUTS),
    Flag("emb_dropout", 0.0, "embedding_dropout", INPUTS),
    Flag("post_emb_norm", False, "embedding_norm", INPUTS),
    Flag("num_memory_tokens", None, "num_memory_tokens", INPUTS, lambda v, f: {"num_memory_tokens": v or 0}),
    Flag("tie_embedding", False, "tie_word_embeddings", "x_transformer.py"),
    Flag("tie_embedding_scale", None, "logit_scale", "x_transformer.py", _nothing),
    Flag("use_abs_pos_emb", True, "absolute_positions='learned'", INPUTS, _nothing),
    Flag("scaled_sinu_pos_emb", False, "absolute_positions='scaled_sinusoidal'", INPUTS, _nothing),
    Flag("l2norm_embed", False, "l2_normalize_embeddings", INPUTS),
    Flag("embed_num_tokens", {}, "type_vocab_size", INPUTS,
         lambda v, f: {"type_vocab_size": list(v.values()) if len(v) > 1 else next(iter(v.values()))}),
    Flag("logits_dim", None, "num_labels (XTransformerForTokenClassification)", "x_transformer.py", _nothing),
    Flag("num_output_heads", 1, "num_labels (their heads one behind the other)", "x_transformer.py", _nothing),
    Flag("squeeze_out_last_dim", False, "(the last axis stays)", "x_transformer.py", _nothing),
    Flag("return_only_embed", False, "(XTransformerModel)", "x_transformer.py", _nothing),
    Flag("average_pool_embed", False, "classifier_pooling='mean' (...ForSequenceClassification)", "pooling.py",
         _named("classifier_pooling", "mean")),
    Flag("use_cls_token", False, "classifier_pooling='cls' (...ForSequenceClassification)", INPUTS,
         lambda v, f: {"classifier_pooling": "cls", "num_cls_tokens": f["num_cls_tokens"]} if v else {}),
    Flag("num_cls_tokens", 1, "num_cls_tokens", INPUTS, _nothing),
    Flag("max_mem_len", 0, "mem_len", "segment_memory.py"),
    Flag("attn_z_loss_weight", 1e-4, "(unused by the original; see attention_z_loss_coef)", "", _nothing),
    Flag("input_not_include_cache", False, "(what a cache always means here)", "", _nothing),
    *(
        Flag(name, default, refused=RESEARCH)
        for name, default in {
            "memory_tokens_interspersed_every": None, "recycling": False, "looped": False, "emb_frac_gradient": 1.0,
            "attn_pool": False,
            "token_emb": None, "mixture_of_softmax": False, "sigsoftmax_logits": False, "ff_deep_embed": False,
            "to_logits": None, "add_continuous_pred_head": False, "shift_mem_down": 0,
        }.items()
    ),
)  # fmt: skip


def complete(table: tuple[Flag, ...], given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """All flags of a table, with the original's defaults where nothing is given.

    Raises:
        ConversionError: a flag that the constructor does not have, or one missing that it needs.
    """
    known = {flag.name: flag.default for flag in table}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConversionError(f"{what} has no argument {', '.join(unknown)} that is known here")
    flags = {**known, **given}
    missing = [name for name, value in flags.items() if value is REQUIRED]
    if missing:
        raise ConversionError(f"the arguments of {what} must hold {', '.join(missing)}, got {sorted(given)}")
    return flags


def translate(table: tuple[Flag, ...], flags: Mapping[str, Any]) -> Fields:
    """Our fields for what differs from the original's defaults in `flags`."""
    fields: Fields = {}
    for flag in table:
        value = flags[flag.name]
        always = flag.default is REQUIRED or flag.name in ("depth", "heads", "attn_dim_head", "ff_mult")
        if always or value != flag.default:
            fields |= flag.to_fields(value, flags)
    return fields
