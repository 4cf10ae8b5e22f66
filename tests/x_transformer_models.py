"""XTransformers that the tests share: every option by itself, and some together, in tiny decisive models."""

from functools import cache

import torch
from generation_models import decisive

from hf_efficient import XTransformerConfig, XTransformerForCausalLM, XTransformerForConditionalGeneration


VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
NO_ROPE = {"rotary_positions": None}
T5 = {"position_bias": "t5", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}

# What encoders and decoders have alike.
POSITIONS = {
    "rope": {},
    "partial rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "interpolated rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "learned positions": {"absolute_positions": "learned", **NO_ROPE},
    "sinusoidal positions": {"absolute_positions": "scaled_sinusoidal", **NO_ROPE},
    "alibi": {"position_bias": "alibi", **NO_ROPE},
    "t5 bias": {**T5, **NO_ROPE},
    "dynamic bias": {"position_bias": "dynamic", "dynamic_bias_log_distance": True, "dynamic_bias_norm": True},
    "rope and t5 bias": T5,
}
EMBEDDINGS = {
    "unit embeddings": {"l2_normalize_embeddings": True, "absolute_positions": "learned", **NO_ROPE},
    "factorised embeddings": {"embedding_size": 16, "embedding_norm": True, "norm_bias": True},
    "memory tokens": {"num_memory_tokens": 3},
    "memory tokens, alibi": {"num_memory_tokens": 3, "position_bias": "alibi", **NO_ROPE},
}
BLOCKS = {
    "rms norm": {"norm_type": "rms_norm"},
    "simple rms norm": {"norm_type": "simple_rms_norm"},
    "scale norm": {"norm_type": "scale_norm"},
    "dynamic tanh": {"norm_type": "dynamic_tanh"},
    "post-norm": {"norm_position": "post", "residual_scale": 1.5},
    "sandwich norm": {"norm_position": "sandwich"},
    "pre- and post-norm": {"norm_position": "pre_and_post"},
    "capped output": {"hidden_state_softcapping": 3.0},
    "gru": {"residual_type": "gru", "learned_residual_scale": True},
    "hyper-connections": {"num_residual_streams": 3},
    "doubly stochastic": {
        "num_residual_streams": 2,
        "residual_stream_mixing": "doubly_stochastic",
        "sinkhorn_iterations": 5,
    },
    "layer scale": {"layer_scale_init_value": 0.5},
    "token shift": {"shift_tokens": 1},
    "token shift over three": {"shift_tokens": 3},
    "token shift in two branches": {"shift_tokens": [0, 2, 1, 0]},
    "macaron": {"macaron": True},
    "order of one's own": {"sublayer_order": "afaffff"},
    "one block twice": {"layer_execution_order": [0, 0]},
    "glu": {"gated_feed_forward": True, "hidden_act": "silu", "gate_channel_scale": True, "feed_forward_norm": True},
    "relu squared": {"hidden_act": "relu2", "mlp_output_bias": False},
}
ATTENTION = {
    "grouped heads": {"num_key_value_heads": 2, "attention_bias": True, "attention_out_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "head sizes": {"head_dim": 12, "value_head_dim": 6},
    "window": {"sliding_window": 4},
    "capped scores": {"attn_logit_softcapping": 2.0},
    "memory keys": {"num_memory_key_values": 3},
    "sinks": {"learned_attention_sinks": True, "zero_attention_sink": True},
    "l2 queries and keys": {"qk_norm": "l2", "num_memory_key_values": 2},
    "learned l2 in groups": {"qk_norm": "l2_learned", "qk_norm_groups": 2},
    "rms queries and keys": {"qk_norm": "rms"},
    "rms keys": {"qk_norm": "rms_key"},
    "talking heads": {"pre_softmax_talking_heads": True, "post_softmax_talking_heads": True},
    "residual attention": {"residual_attention": True, "num_memory_key_values": 2},
    "value residual": {"value_residual": "learned", "num_key_value_heads": 2},
    "half value residual": {"value_residual": "half"},
    "head gates": {"head_gate": True, "head_output_scale": True},
    "value gates": {"value_gate": "sigmoid"},
    "low-rank gates": {"value_gate": "silu", "value_gate_rank": 4},
    "gates per head": {"value_gate": "sigmoid", "value_gate_per_head": True, "value_gate_bias": True},
    "attention on attention": {"attention_on_attention": True},
}
TOGETHER = {
    "much at once": {
        "num_memory_tokens": 2,
        "shift_tokens": 1,
        **T5,
        "num_key_value_heads": 2,
        "num_memory_key_values": 2,
        "learned_attention_sinks": True,
        "sliding_window": 6,
        "qk_norm": "l2_learned",
        "attn_logit_softcapping": 5.0,
        "value_residual": "learned",
        "value_gate": "silu",
        "norm_position": "sandwich",
        "residual_type": "gru",
        "macaron": True,
    },
    "window and scores": {"sliding_window": 4, "residual_attention": True, "position_bias": "alibi"},
}
BOTH = POSITIONS | EMBEDDINGS | BLOCKS | ATTENTION | TOGETHER
CAUSAL = BOTH | {"xpos": {"rotary_positions": "xpos"}, "prefix lm": {"prefix_lm": True, **T5}}
# A tenth of them, for what costs seconds for each.
SOME = (
    "rope", "t5 bias", "memory tokens, alibi", "token shift over three", "one block twice", "window", "talking heads",
    "value residual", "much at once", "window and scores",
)  # fmt: skip


@cache
def causal_model(name: str) -> XTransformerForCausalLM:
    torch.manual_seed(0)
    return settled(decisive(XTransformerForCausalLM(XTransformerConfig(**SIZES, **CAUSAL[name]))))


@cache
def encoder_decoder_model(name: str) -> XTransformerForConditionalGeneration:
    torch.manual_seed(0)
    options = {**BOTH[name], "is_encoder_decoder": True, "decoder_start_token_id": 1}
    if "sublayer_order" in options:
        options["sublayer_order"] = options["sublayer_order"].replace("a", "ac")
    if isinstance(options.get("shift_tokens"), list):  # the decoder has a branch more in each of its two blocks
        options |= {"encoder_overrides": {"shift_tokens": options["shift_tokens"]}}
        options |= {"shift_tokens": [*options["shift_tokens"], 0, 1]}
    return settled(decisive(XTransformerForConditionalGeneration(XTransformerConfig(**SIZES, **options))))


def settled(model):
    """With values other than those that options begin with: a gate at zero tests nothing."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model
