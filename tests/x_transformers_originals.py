"""Models of x-transformers, option by option, that the tests of their conversion share."""

import pytest
import torch


x_transformers = pytest.importorskip("x_transformers")

TOLERANCE, LENGTH, TOKENS = 2e-5, 17, 41
WRAPPER = {"num_tokens": TOKENS, "max_seq_len": 24}
LAYERS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
GROUPED = {
    "attn_kv_heads": 2,
    "attn_num_mem_kv": 2,
    "attn_head_scale": True,
    "attn_gate_values": True,
    "attn_gate_value_heads": True,
    "attn_head_learned_sink": True,
    "attn_pre_talking_heads": True,
    "attn_post_talking_heads": True,
}
LAYER_CASES = {
    "defaults": {},
    "head size": {"attn_dim_head": 16},
    "value head size": {"attn_value_dim_head": 12},
    "one head without output projection": {"heads": 1, "attn_dim_head": 32},
    # norms
    "scalenorm": {"use_scalenorm": True},
    "rmsnorm": {"use_rmsnorm": True},
    "simple rmsnorm": {"use_simple_rmsnorm": True},
    "dynamic tanh": {"use_dynamic_tanh": True, "dynamic_tanh_init_alpha": 0.7},
    "norms without offset": {"norm_add_unit_offset": False, "use_layerscale": True, "layerscale_init_value": 0.3},
    "post-norm": {"pre_norm": False},
    "no final norm": {"pre_norm_has_final_norm": False},
    "sandwich norm": {"sandwich_norm": True},
    "pre- and post-norm": {"pre_and_post_norm": True},
    "capped output": {"softclamp_output": True, "softclamp_output_value": 2.0},
    # residual branches and layout
    "scaled residual": {"scale_residual": True},
    "constant residual scale": {"scale_residual_constant": 1.7, "pre_norm": False},
    "gated residual": {"gate_residual": True, "scale_residual": True},
    "layer scale": {"use_layerscale": True, "layerscale_init_value": 0.3},
    "layer scale, shift, macaron": {"use_layerscale": True, "shift_tokens": 1, "macaron": True},
    "macaron": {"macaron": True},
    "token shift": {"shift_tokens": 1},
    "token shift over two": {"shift_tokens": 2},
    "token shift of some branches": {"shift_tokens": (1, 0, 0, 2)},
    "stochastic depth of its own for each branch": {"layer_dropout": (0.0, 0.1, 0.1, 0.2)},
    "sandwich coefficient": {"sandwich_coef": 1, "depth": 3},
    "par ratio": {"par_ratio": 3, "depth": 6},
    "custom layers": {"custom_layers": ("a", "f", "f", "a"), "depth": None},
    "tied layers": {"weight_tie_layers": True},
    "execution order": {"layers_execute_order": (0, 1, 2, 3, 0, 1)},
    "execution order of branches": {"layers_execute_order": (0, 1, 1, 2, 0, 3), "add_value_residual": True,
                                    "rotary_pos_emb": True, "residual_attn": True},
    "execution order of custom layers": {"custom_layers": ("a", "f", "f", "a"), "depth": None,
                                         "layers_execute_order": (0, 2, 1, 1, 3)},
    "value residual": {"add_value_residual": True},
    "half value residual": {"add_value_residual": True, "learned_value_residual_mix": False},
    # attention
    "grouped heads": {"attn_kv_heads": 2},
    "one key head": {"attn_one_kv_head": True},
    "grouped heads, alibi": {**GROUPED, "alibi_pos_bias": True},
    "grouped heads, t5": {**GROUPED, "rel_pos_bias": True},
    "grouped heads, dynamic": {**GROUPED, "dynamic_pos_bias": True},
    "grouped heads, rotary, norms": {**GROUPED, "rotary_pos_emb": True, "attn_qk_rmsnorm": True},
    "grouped heads, learned l2": {**GROUPED, "rotary_pos_emb": True, "attn_qk_norm": True,
                                  "attn_qk_norm_dim_scale": True},
    "memory keys": {"attn_num_mem_kv": 3},
    "flash": {"attn_flash": True},
    "window": {"attn_max_attend_past": 3},
    "window and memory keys": {"attn_max_attend_past": 3, "attn_num_mem_kv": 2},
    "capped scores": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0},
    "l2 norm": {"attn_qk_norm": True, "attn_qk_norm_scale": 8},
    "l2 norm in groups, memory": {"attn_qk_norm": True, "attn_qk_norm_groups": 2, "attn_num_mem_kv": 2},
    "learned l2 norm": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "qk rmsnorm, memory": {"attn_qk_rmsnorm": True, "attn_num_mem_kv": 2},
    "key rmsnorm": {"attn_k_rmsnorm": True},
    "pre talking heads": {"attn_pre_talking_heads": True},
    "post talking heads": {"attn_post_talking_heads": True},
    "residual attention": {"residual_attn": True},
    "residual attention, all of it": {"residual_attn": True, "attn_num_mem_kv": 2, "attn_softclamp_logits": True,
                                      "alibi_pos_bias": True, "attn_pre_talking_heads": True},
    "sinks": {"attn_head_learned_sink": True},
    "zero key": {"attn_add_zero_kv": True},
    "sinks and zero key": {"attn_head_learned_sink": True, "attn_add_zero_kv": True},
    "head scale": {"attn_head_scale": True},
    "attention on attention": {"attn_on_attn": True},
    "value gate": {"attn_gate_values": True},
    "silu gate": {"attn_gate_values": True, "attn_swiglu_values": True},
    "low-rank gate": {"attn_gate_values": True, "attn_gate_values_rank": 4},
    "gate per head": {"attn_gate_values": True, "attn_gate_values_headwise": True},
    "head gate": {"attn_gate_value_heads": True},
    # positions
    "rotary": {"rotary_pos_emb": True},
    "rotary dimension": {"rotary_pos_emb": True, "rotary_emb_dim": 8},
    "interpolated rotary": {"rotary_pos_emb": True, "rotary_interpolation_factor": 2.0},
    "ntk rotary": {"rotary_pos_emb": True, "rotary_base_rescale_factor": 4.0, "rotary_emb_dim": 6},
    "rotary and absolute": {"rotary_pos_emb": True, "disable_abs_pos_emb": False},
    "xpos": {"rotary_xpos": True, "rotary_xpos_scale_base": 8},
    "alibi": {"alibi_pos_bias": True},
    "alibi in three heads": {"alibi_pos_bias": True, "alibi_num_heads": 3},
    "alibi without absolute": {"alibi_pos_bias": True, "disable_abs_pos_emb": True},
    "t5 bias": {"rel_pos_bias": True},
    "t5 bias with few buckets": {"rel_pos_bias": True, "rel_pos_num_buckets": 8, "rel_pos_max_distance": 12},
    "dynamic bias": {"dynamic_pos_bias": True},
    "dynamic bias, deep": {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": True,
                           "dynamic_pos_bias_mlp_depth": 3, "dynamic_pos_bias_norm": True},
    # feed-forward
    "feed-forward width": {"ff_mult": 2.5},
    "glu": {"ff_glu": True},
    "scaled glu": {"ff_glu": True, "ff_glu_mult_bias": True},
    "swiglu": {"ff_swish": True, "ff_glu": True},
    "relu squared": {"ff_relu_squared": True},
    "an activation of torch's": {"ff_custom_activation": torch.nn.Tanh(), "ff_glu": True},
    "no bias": {"ff_no_bias": True},
    "glu without bias": {"ff_no_bias": True, "ff_glu": True, "ff_post_act_ln": True},
    "norm behind activation": {"ff_post_act_ln": True},
    "dropouts": {"attn_dropout": 0.1, "ff_dropout": 0.2, "attn_sublayer_dropout": 0.1, "ff_sublayer_dropout": 0.1,
                 "layer_dropout": 0.1, "zero_init_branch_output": True},
}  # fmt: skip
WRAPPER_CASES = {
    "unit embeddings": {"l2norm_embed": True},
    "sinusoids": {"scaled_sinu_pos_emb": True},
    "factorised embeddings": {"emb_dim": 16},
    "tied embeddings": {"tie_embedding": True},
    "tied embeddings, scaled": {"tie_embedding": True, "tie_embedding_scale": 0.5},
    "embedding norm and dropout": {"post_emb_norm": True, "emb_dropout": 0.1},
    "memory tokens": {"num_memory_tokens": 3},
    "no positions": {"use_abs_pos_emb": False},
    "token types": {"embed_num_tokens": {"type": 3}},
    "several token types": {"embed_num_tokens": {"type": 3, "speaker": 2}},
}
CASES = {name: ({}, layers) for name, layers in LAYER_CASES.items()}
CASES |= {name: (wrapper, {}) for name, wrapper in WRAPPER_CASES.items()}
CASES["memory tokens, rotary, shift"] = ({"num_memory_tokens": 3}, {"rotary_pos_emb": True, "shift_tokens": 1})
CASES["memory tokens, alibi, window"] = (
    {"num_memory_tokens": 3},
    {"alibi_pos_bias": True, "attn_max_attend_past": 9, "add_value_residual": True},
)


def shaken(module):
    """With values other than the initial ones, at which half of the options do nothing."""
    for name, parameter in module.named_parameters():
        if "token_emb" not in name and "pos_emb.emb" not in name:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def ids(length=LENGTH, seed=1):
    return torch.randint(0, TOKENS, (2, length), generator=torch.Generator().manual_seed(seed))


def original(kind, wrapper, layers):
    torch.manual_seed(0)
    layers = {name: value for name, value in {**LAYERS, **layers}.items() if value is not None}
    module = x_transformers.TransformerWrapper(
        **WRAPPER, **wrapper, attn_layers=getattr(x_transformers, kind)(**layers)
    )
    return shaken(module), {**WRAPPER, **wrapper, "attn_layers": {"class": kind, **layers}}
