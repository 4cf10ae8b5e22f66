"""Models of x-transformers 2.31.10 and what they become compute the same, option by option, to 2e-5 in float32."""

import re

import pytest
import torch
from helpers import ROOT, run_warm_python
from x_transformers_originals import (
    CASES,
    LAYER_CASES,
    LENGTH,
    TOKENS,
    TOLERANCE,
    WRAPPER,
    WRAPPER_CASES,
    ids,
    original,
    shaken,
    x_transformers,
)

from hf_efficient.conversion.x_transformers import convert_x_transformers
from hf_efficient.conversion.x_transformers_options import LAYER_FLAGS, REQUIRED, WRAPPER_FLAGS
from hf_efficient.modeling.x_transformer import (
    XTransformerForCausalLM,
    XTransformerForMaskedLM,
    XTransformerForSequenceClassification,
    XTransformerForTokenClassification,
    XTransformerModel,
)


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
        types = {name: ids(seed=5 + count) % count for name, count in wrapper["embed_num_tokens"].items()}
        theirs = {"embed_ids": types}
        ours = {"token_type_ids": torch.stack(list(types.values()), -1) if len(types) > 1 else types["type"]}
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


@torch.no_grad()
def test_packing_is_no_matter_of_weights():
    """The original packs with flash-attn, on a GPU; here the same weights take packed rows anywhere."""
    module, arguments = original("Decoder", {}, {"rotary_pos_emb": True})
    layers = {**arguments["attn_layers"], "attn_flash": True, "attn_flash_pack_seq": True}
    model, _ = convert_x_transformers(module.state_dict(), {**arguments, "attn_layers": layers})
    packed = model(ids().view(1, -1), cu_seq_lens_q=torch.tensor([0, LENGTH, 2 * LENGTH])).logits
    torch.testing.assert_close(packed.view(2, LENGTH, -1), module(ids()), rtol=0, atol=TOLERANCE)


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


POOLED = {
    "one cls token": {"use_cls_token": True, "logits_dim": 5},
    "two cls tokens, memory": {"use_cls_token": True, "num_cls_tokens": 2, "num_memory_tokens": 3},
    "average": {"average_pool_embed": True, "logits_dim": 5},
}


@pytest.mark.parametrize("name", POOLED)
@torch.no_grad()
def test_outputs_of_whole_sequences(name):
    """With rotary positions, which the CLS tokens take too, and padding."""
    module, arguments = original("Encoder", POOLED[name], {"rotary_pos_emb": True})
    model, _ = convert_x_transformers(module, arguments)
    assert type(model) is XTransformerForSequenceClassification
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [11]])
    logits = model(ids(), attention_mask=mask.long()).logits
    torch.testing.assert_close(logits, module(ids(), mask=mask), rtol=0, atol=TOLERANCE)


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
    without |= {"attn_flash_pack_seq"}  # the original needs a GPU for it: see test_x_transformer_layout.py
    without |= {"max_mem_len", *(name for wrapper in POOLED.values() for name in wrapper)}  # the first: see the memory
    assert open_flags - used - without == set()


def test_the_document_is_what_the_table_says_and_its_example_runs(tmp_path):
    run_warm_python(ROOT / "scripts" / "x_transformer_table.py", "--check", environment={"PYTHONPATH": str(ROOT)})
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "x_transformer.md").read_text(), re.S)
    printed = run_warm_python("-c", example, cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert "Decoder of x-transformers 2.31.10 -> XTransformerForCausalLM" in printed
