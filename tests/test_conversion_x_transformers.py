"""Models of x-transformers 2.31.10 and what they become compute the same, option by option, to 2e-5 in float32."""

import re

import pytest
import torch
from helpers import ROOT, run_python

from hf_efficient.conversion.weight_transfer import ConversionError
from hf_efficient.conversion.x_transformers import convert_x_transformers
from hf_efficient.conversion.x_transformers_options import LAYER_FLAGS, REQUIRED, WRAPPER_FLAGS
from hf_efficient.modeling.x_transformer import (
    XTransformerForCausalLM,
    XTransformerForMaskedLM,
    XTransformerForTokenClassification,
    XTransformerModel,
)


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


@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_same_logits(name, kind):
    if kind == "Encoder" and name == "xpos":
        pytest.skip("x-transformers refuses it too")
    wrapper, layers = CASES[name]
    module, arguments = original(kind, wrapper, layers)
    theirs, ours = {}, {}
    if "embed_num_tokens" in wrapper:
        types = ids(seed=5) % 3
        theirs, ours = {"embed_ids": {"type": types}}, {"token_type_ids": types}
    model, report = convert_x_transformers(module, arguments)
    assert isinstance(model, XTransformerForCausalLM if kind == "Decoder" else XTransformerForMaskedLM)
    expected = module(ids(), **theirs)
    torch.testing.assert_close(model(ids(), **ours).logits, expected, rtol=0, atol=TOLERANCE)
    assert expected.std() > 0.05
    assert "dropped" not in str(report) or "fixed table" in str(report)


@pytest.mark.parametrize(
    "name", ["defaults", "alibi", "t5 bias", "memory keys", "memory tokens", "residual attention"]
)
@torch.no_grad()
def test_the_same_logits_beside_padding(name):
    wrapper, layers = CASES[name]
    module, arguments = original("Encoder", wrapper, layers)
    model, _ = convert_x_transformers(module, arguments)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11]])
    expected = module(ids(), mask=mask)
    actual = model(ids(), attention_mask=mask.long()).logits
    torch.testing.assert_close(actual[mask], expected[mask], rtol=0, atol=TOLERANCE)


ENCODER_DECODER = {
    "defaults": {},
    "tied tables": {"tie_token_emb": True},
    "different halves": {"enc_depth": 3, "dec_heads": 2, "enc_heads": 4, "dec_attn_dim_head": 16, "enc_ff_glu": True,
                         "enc_rel_pos_bias": True, "enc_use_rmsnorm": True, "dec_rotary_pos_emb": True},
    "all over": {"dec_attn_num_mem_kv": 2, "dec_attn_qk_norm": True, "dec_add_value_residual": True,
                 "dec_attn_gate_values": True, "dec_attn_kv_heads": 2, "dec_learned_value_residual_mix": False,
                 "dec_attn_head_learned_sink": True, "enc_num_memory_tokens": 3, "dec_macaron": True},
    "residual attention": {"dec_residual_attn": True, "dec_cross_residual_attn": True, "enc_residual_attn": True},
    "window": {"dec_attn_max_attend_past": 4, "dec_cross_attn_max_attend_past": None, "enc_attn_max_attend_past": 5},
    "post-norm": {"dec_pre_norm": False, "enc_pre_norm": False, "dec_shift_tokens": 1},
    "sinusoids": {"enc_scaled_sinu_pos_emb": True, "dec_use_abs_pos_emb": False},
}  # fmt: skip


def original_encoder_decoder(name):
    torch.manual_seed(0)
    sizes = {f"{part}_{key}": value for part in ("enc", "dec") for key, value in {
        **WRAPPER, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}.items()}  # fmt: skip
    arguments = {"dim": 32, **sizes, **ENCODER_DECODER[name]}
    return shaken(x_transformers.XTransformer(**arguments)), arguments


@pytest.mark.parametrize("name", ENCODER_DECODER)
@torch.no_grad()
def test_encoder_decoder(name):
    """Loss and logits, with a padded source."""
    module, arguments = original_encoder_decoder(name)
    model, _ = convert_x_transformers(module, arguments)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11]])
    target = ids(9, seed=2)
    encoded = module.encoder(ids(), mask=mask, return_embeddings=True)
    expected = module.decoder.net(target, context=encoded, context_mask=mask)
    output = model(ids(), attention_mask=mask.long(), decoder_input_ids=target[:, :-1], labels=target[:, 1:])
    torch.testing.assert_close(output.logits, expected[:, :-1], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(output.loss, module(ids(), target, mask=mask), rtol=1e-5, atol=1e-6)
    tables = model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight
    assert (tables[0] is tables[1]) == (name == "tied tables")


@torch.no_grad()
def test_prefix_decoder():
    module, arguments = original("PrefixDecoder", {}, {"rel_pos_bias": True})
    model, _ = convert_x_transformers(module, arguments)
    lengths = torch.tensor([4, 7])
    expected = module(ids(), prefix_attn_len=lengths)
    torch.testing.assert_close(model(ids(), prefix_length=lengths).logits, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_a_state_dict_inside_the_autoregressive_wrapper():
    module, arguments = original("Decoder", {}, {"rotary_pos_emb": True})
    wrapped = x_transformers.AutoregressiveWrapper(module)
    model, _ = convert_x_transformers(wrapped.state_dict(), arguments)
    torch.testing.assert_close(model(ids()).logits, module(ids()), rtol=0, atol=TOLERANCE)


OUTPUTS = {
    "width": ({"logits_dim": 5}, torch.Tensor),
    "several heads": ({"num_output_heads": 2, "logits_dim": 3}, tuple),
    "squeezed": ({"logits_dim": 1, "squeeze_out_last_dim": True}, torch.Tensor),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
@torch.no_grad()
def test_outputs_that_are_no_tokens(name, kind):
    """One number of ours for each of theirs, heads one behind the other."""
    wrapper, returned = OUTPUTS[name]
    module, arguments = original(kind, wrapper, {})
    model, _ = convert_x_transformers(module, arguments)
    assert type(model) is XTransformerForTokenClassification
    expected = module(ids())
    assert isinstance(expected, returned)
    expected = torch.cat(expected, dim=-1) if returned is tuple else expected
    logits = model(ids()).logits
    torch.testing.assert_close(logits.view(*expected.shape), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["defaults", "macaron", "memory keys"])
@torch.no_grad()
def test_a_stack_that_only_reads_another_sequence(name):
    module, arguments = original("CrossAttender", {}, {"cross_attn_dim_context": 24, **LAYER_CASES[name]})
    model, _ = convert_x_transformers(module, arguments)
    context, mask = torch.randn(2, 7, 24), torch.arange(7) < torch.tensor([[7], [4]])
    expected = module(ids(), context=context, context_mask=mask)
    actual = model(ids(), encoder_hidden_states=context, encoder_attention_mask=mask.long()).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
@torch.no_grad()
def test_cross_attention_with_rotary_positions(kind):
    layers = {"cross_attend": True, "rotary_pos_emb": True}
    module, arguments = original(kind, {}, layers)
    model, _ = convert_x_transformers(module, arguments)
    context, places = torch.randn(2, 7, 32), torch.tensor([2, 3, 5, 7, 11, 13, 17])
    expected = module(ids(), context=context, context_pos=places)
    plain = module(ids(), context=context)
    actual = model(ids(), encoder_hidden_states=context, encoder_position_ids=places[None]).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model(ids(), encoder_hidden_states=context).logits, plain, rtol=0, atol=TOLERANCE)
    assert (expected - plain).abs().max() > 1e-3


@torch.no_grad()
def test_an_encoder_without_a_head():
    module, arguments = original("Encoder", {"return_only_embed": True}, {})
    model, _ = convert_x_transformers(module, arguments)
    assert type(model) is XTransformerModel
    torch.testing.assert_close(model(ids()).last_hidden_state, module(ids()), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["defaults", "grouped heads, rotary, norms", "t5 bias", "glu", "gated residual"])
def test_the_same_gradient(name):
    """Of the token table, through the whole model."""
    module, arguments = original("Decoder", *CASES[name])
    model, _ = convert_x_transformers(module, arguments)
    weight = torch.randn(2, LENGTH, TOKENS)
    (module(ids()) * weight).sum().backward()
    (model(ids()).logits * weight).sum().backward()
    expected = module.token_emb.emb.weight.grad
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, expected, rtol=1e-4, atol=1e-4)


ERAS = {
    "1.26.9": {"names": "weight", "offset": 0.0, "rotary": "halves", "floor": 32},
    "1.30.16": {"names": "weight", "offset": 0.0, "rotary": "pairs", "floor": 32},
    "1.31.0": {"names": "gamma", "offset": 0.0, "rotary": "pairs", "floor": 32},
    "1.43.0": {"names": "gamma", "offset": 1.0, "rotary": "pairs", "floor": 0},
}


@pytest.mark.parametrize("version", ERAS)
@torch.no_grad()
def test_weights_of_earlier_releases(version):
    """The present model, with its weights written as that release would have had them."""
    era = ERAS[version]
    layers = {"rotary_pos_emb": True, "attn_dim_head": 64, "rotary_emb_dim": 32}
    module, arguments = original("Decoder", {}, layers)
    state = {}
    for name, tensor in module.state_dict().items():
        if name.endswith(".gamma"):
            name, tensor = name.replace("gamma", era["names"]), tensor + (1 - era["offset"])
            if version == "1.26.9":
                state[name.replace("weight", "bias")] = torch.zeros_like(tensor)
        if era["rotary"] == "halves" and name.endswith(("to_q.weight", "to_k.weight")):
            rows = tensor.unflatten(0, (4, 64))
            order = torch.cat([torch.arange(0, 32, 2), torch.arange(1, 32, 2), torch.arange(32, 64)])
            tensor = rows[:, order].flatten(0, 1)
        state[name] = tensor
    if version == "1.26.9":
        state["to_logits.bias"] = torch.zeros(TOKENS)
    if era["floor"]:  # then the default was at least 32
        arguments["attn_layers"].pop("rotary_emb_dim")
        arguments["attn_layers"]["rotary_emb_dim"] = None
    model, _ = convert_x_transformers(state, arguments, version=version)
    torch.testing.assert_close(model(ids()).logits, module(ids()), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_value_gates_had_a_bias():
    """The present model with the bias that releases before 2.26 gave it."""
    module, arguments = original("Decoder", {}, {"attn_gate_values": True})
    for name, linear in module.named_modules():
        if name.endswith("to_v_gate"):
            linear.bias = torch.nn.Parameter(torch.randn(32))
    model, _ = convert_x_transformers(module, arguments, version="2.25.0")
    torch.testing.assert_close(model(ids()).logits, module(ids()), rtol=0, atol=TOLERANCE)


REFUSED = {
    "factor of the branches": ({}, {"scale_residual": 0.5}, "constant factor"),
    "unknown activation": ({}, {"ff_custom_activation": torch.nn.Softplus()}, "Softplus"),
    "unknown flag": ({}, {"attn_wings": 2}, "attn_wings"),
    "research option": ({}, {"attn_sparse_topk": 3}, "attn_sparse_topk=3 has no counterpart"),
    "hyper-connections": ({}, {"num_residual_streams": 4}, "no paper"),
    "a value for each layer": ({}, {"attn_num_mem_kv": (1, 2)}, "for each layer"),
    "half a block": ({}, {"layers_execute_order": (0, 0, 1)}, "whole blocks"),
    "two kinds of types": ({"embed_num_tokens": {"a": 2, "b": 3}}, {}, "not several"),
    "groups and rotary": (
        {}, {"attn_qk_norm": True, "attn_qk_norm_groups": 2, "rotary_pos_emb": True}, "groups hold other channels"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused(name):
    wrapper, layers, message = REFUSED[name]
    arguments = {**WRAPPER, **wrapper, "attn_layers": {"class": "Decoder", **LAYERS, **layers}}
    with pytest.raises(ConversionError, match=message):
        convert_x_transformers({}, arguments)


def test_bad_arguments_are_refused():
    with pytest.raises(ConversionError, match="version must look like"):
        convert_x_transformers({}, {}, version="new")
    with pytest.raises(ConversionError, match="one of Decoder, Encoder, PrefixDecoder"):
        convert_x_transformers({}, {"attn_layers": {}})
    with pytest.raises(ConversionError, match="attn_layers .* or dim"):
        convert_x_transformers({}, {})
    with pytest.raises(ConversionError, match="values by their positions"):
        arguments = {**WRAPPER, "attn_layers": {"class": "Decoder", **LAYERS, "rotary_pos_emb": True}}
        convert_x_transformers({}, arguments, version="1.19.0")
    module, arguments = original("Decoder", {}, {})
    with pytest.raises(ConversionError, match="no counterpart: .*to_q"):
        convert_x_transformers({**module.state_dict(), "to_q.extra": torch.ones(1)}, arguments)


def test_the_table_knows_every_flag_that_the_cases_use():
    known = {flag.name for flag in (*LAYER_FLAGS, *WRAPPER_FLAGS)}
    assert {name for layers in LAYER_CASES.values() for name in layers} <= known
    assert {name for wrapper in WRAPPER_CASES.values() for name in wrapper} <= known


def test_every_flag_that_converts_is_in_a_case():
    used = {name for wrapper, layers in CASES.values() for name in (*wrapper, *layers)}
    used |= {name[4:] for case in ENCODER_DECODER.values() for name in case}
    open_flags = {flag.name for flag in (*LAYER_FLAGS, *WRAPPER_FLAGS)
                  if flag.where and not flag.refused and flag.default is not REQUIRED}  # fmt: skip
    without = {"cross_attend", "only_cross", "cross_attn_tokens_dropout", "cross_attn_dim_context"}
    without |= {"return_only_embed", *(name for wrapper, _ in OUTPUTS.values() for name in wrapper)}
    assert open_flags - used - without == set()


def test_the_document_is_what_the_table_says_and_its_example_runs(tmp_path):
    run_python(ROOT / "scripts" / "x_transformer_table.py", "--check", environment={"PYTHONPATH": str(ROOT)})
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "x_transformer.md").read_text(), re.S)
    printed = run_python("-c", example, cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert "Decoder of x-transformers 2.31.10 -> XTransformerForCausalLM" in printed
