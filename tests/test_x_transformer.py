"""What must hold of an XTransformer, whatever its options: causality, padding, caches, both forms of attention,
gradients.

What the options compute is in test_conversion_x_transformers.py, which compares them with x-transformers.
"""

import copy

import pytest
import torch
from generation_models import left_padded, run, tokens
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache
from x_transformer_models import BOTH, CAUSAL, SIZES, SOME, VOCABULARY, causal_model, encoder_decoder_model

from hf_efficient import (
    XTransformerConfig,
    XTransformerForCausalLM,
    XTransformerForConditionalGeneration,
    XTransformerForMaskedLM,
    XTransformerForSequenceClassification,
    XTransformerForTokenClassification,
    XTransformerModel,
)


LENGTH = 13


def make(model_class, **options):
    return model_class(XTransformerConfig(**SIZES, **options))


def encoder(name):
    torch.manual_seed(0)
    model = make(XTransformerForMaskedLM, **BOTH[name], initializer_range=0.3)
    return model.double().eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_causal_means_causal(name):
    """Changing token t changes no logit before t, to the bit, and every row from t on."""
    model, ids = causal_model(name), tokens(2, LENGTH)
    before = model(ids, use_cache=False).logits
    for t in (1, 7, LENGTH - 1):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] - 3 + 7) % (VOCABULARY - 3) + 3
        after = model(changed, use_cache=False).logits
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).any()


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_an_encoder_looks_both_ways(name):
    model, ids = encoder(name), tokens(2, LENGTH)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] - 3 + 7) % (VOCABULARY - 3) + 3
    assert (model(ids).logits[:, -2] != model(changed).logits[:, -2]).any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_padding_is_masked_exactly(name, kind, side):
    """A padded row gives what it gives alone, and the ids under the padding do not matter at all."""
    if kind == "encoder" and name not in BOTH:
        pytest.skip("for decoders only")
    model = encoder(name) if kind == "encoder" else causal_model(name)
    ids, padding = tokens(1, LENGTH), tokens(1, 5, seed=3)
    padded = torch.cat((padding, ids) if side == "left" else (ids, padding), dim=1)
    real = slice(5, None) if side == "left" else slice(LENGTH)
    mask = torch.zeros_like(padded)
    mask[:, real] = 1
    options = {} if kind == "encoder" else {"use_cache": False}
    alone = model(ids, **options).logits
    together = model(padded, attention_mask=mask, **options).logits[:, real]
    other = model(torch.where(mask == 0, 5, padded), attention_mask=mask, **options).logits[:, real]
    close(together, alone)
    assert torch.equal(together, other)


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(name):
    model, ids = causal_model(name), tokens(3, LENGTH)
    together = model(ids, use_cache=False).logits
    close(torch.cat([model(row[None], use_cache=False).logits for row in ids]), together)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_both_forms_of_attention_agree(name):
    """The fused one and the one written out, which also gives the weights."""
    model, ids = causal_model(name), left_padded([9, LENGTH])
    mask = ids[1]
    written_out = copy.deepcopy(model)
    written_out.set_attn_implementation("eager")
    fused = model(ids[0], attention_mask=mask, use_cache=False).logits
    eager = written_out(ids[0], attention_mask=mask, use_cache=False, output_attentions=True)
    close(eager.logits[mask.bool()], fused[mask.bool()])
    weights = eager.attentions[0]
    assert weights.shape[:2] == (2, 4) and len(eager.attentions) == 2
    assert (weights.sum(-1) <= 1 + 1e-9).all()


def test_a_window_bounds_the_cache():
    cache = run(causal_model("window"), tokens(1, 7), max_new_tokens=20).cache
    assert all(layer.keys.shape[2] == 3 for layer in cache.layers)


@torch.no_grad()
def test_a_prefix_sees_itself_and_nothing_later():
    model, ids = causal_model("prefix lm"), tokens(2, LENGTH)
    lengths = torch.tensor([4, 6])
    before = model(ids, prefix_length=lengths, use_cache=False).logits
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] - 3 + 7) % (VOCABULARY - 3) + 3
    after = model(changed, prefix_length=lengths, use_cache=False).logits
    assert (before[:, 0] != after[:, 0]).any(dim=-1).all()
    changed = ids.clone()
    changed[:, 6] = (changed[:, 6] - 3 + 7) % (VOCABULARY - 3) + 3
    after = model(changed, prefix_length=lengths, use_cache=False).logits
    assert torch.equal(before[:, :6], after[:, :6])


@torch.no_grad()
def test_a_prefix_can_be_cached_and_padded():
    model, (ids, mask) = causal_model("prefix lm"), left_padded([9, LENGTH])
    lengths = torch.tensor([4, 6])
    whole = model(ids, attention_mask=mask, prefix_length=lengths, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :10], attention_mask=mask[:, :10], prefix_length=lengths, past_key_values=cache).logits
    rest = model(ids[:, 10:], attention_mask=mask, prefix_length=lengths, past_key_values=cache).logits
    close(torch.cat([first, rest], dim=1)[mask.bool()], whole[mask.bool()])
    alone = model(ids[:1, -9:], prefix_length=4, use_cache=False).logits
    close(whole[:1, -9:], alone)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    close(eager(ids, attention_mask=mask, prefix_length=lengths, use_cache=False).logits[mask.bool()],
          whole[mask.bool()])  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_every_parameter_gets_a_gradient(name):
    model = encoder_decoder_model(name).train()
    ids, labels = tokens(2, LENGTH), tokens(2, 9, seed=2)
    model.zero_grad()
    model(ids, labels=labels).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.eval()
    assert not silent


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_checkpointed_gradients_are_the_plain_ones(name, reentrant):
    ids, gradients = tokens(2, LENGTH), []
    options = {"attention_dropout": 0.1, "feed_forward_dropout": 0.1, "layerdrop": 0.2, **CAUSAL[name]}
    model = make(XTransformerForCausalLM, **options, initializer_range=0.2).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_saved_and_loaded_to_the_bit(name, tmp_path):
    model, ids = causal_model(name).float(), tokens(2, LENGTH)
    before = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    loaded = XTransformerForCausalLM.from_pretrained(tmp_path).eval()
    after = loaded(ids, use_cache=False).logits
    model.double()
    assert torch.equal(before, after)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tie", [False, True])
def test_sharing_and_tying_survive_copies_and_folders(share, tie, tmp_path):
    options = {"is_encoder_decoder": True, "share_embeddings": share, "tie_word_embeddings": tie}
    model = make(XTransformerForConditionalGeneration, **options, decoder_start_token_id=1)
    model.save_pretrained(tmp_path)
    loaded = XTransformerForConditionalGeneration.from_pretrained(tmp_path)
    for one in (model, copy.deepcopy(model), loaded):
        tables = one.model.encoder.embed_tokens.weight, one.model.decoder.embed_tokens.weight, one.lm_head.weight
        assert (tables[0] is tables[1]) == share
        assert (tables[1] is tables[2]) == tie


def test_angles_and_slopes_stay_exact_in_bfloat16():
    model = make(XTransformerModel, position_bias="alibi").bfloat16()
    exact = make(XTransformerModel, position_bias="alibi")
    for one, other in ((model.rotary, exact.rotary), (model.position_bias, exact.position_bias)):
        assert one.table.dtype == torch.float32
        assert torch.equal(one.table, other.table)
    assert model(tokens(1, 5)).last_hidden_state.dtype == torch.bfloat16


def test_initial_values():
    options = {"head_gate": True, "value_gate": "sigmoid", "layer_scale_init_value": 0.1, "norm_type": "scale_norm",
               "zero_init_branches": True, "l2_normalize_embeddings": True, "num_memory_key_values": 2}  # fmt: skip
    model = make(XTransformerModel, **options)
    block = model.layers[0]
    assert block.self_attn.head_gate.proj.bias.eq(10).all() and block.self_attn.value_gate.proj.weight.eq(0).all()
    assert block.self_attn_branch.layer_scale.weight.eq(0.1).all() and model.norm.g.item() == pytest.approx(32**0.5)
    assert block.mlp.down_proj.weight.eq(0).all() and block.self_attn.o_proj.weight.eq(0).all()
    assert 0 < model.embed_tokens.weight.std() < 1e-4 and block.self_attn.memory_key.std() > 0.5


@torch.no_grad()
def test_masked_keys_hide_tokens_in_training_but_never_the_first():
    model = make(XTransformerForCausalLM, masked_key_probability=0.6, initializer_range=0.3)
    ids = tokens(1, LENGTH)
    quiet = model.eval()(ids, use_cache=False).logits
    assert torch.equal(quiet, model(ids, use_cache=False).logits)
    noisy = model.train()(ids, use_cache=False).logits
    torch.testing.assert_close(noisy[:, 0], quiet[:, 0])
    assert not torch.allclose(noisy[:, -1], quiet[:, -1])


@torch.no_grad()
def test_layerdrop_leaves_branches_out():
    model = make(XTransformerModel, layerdrop=0.999, final_norm=False).train()
    ids = tokens(1, LENGTH)
    torch.testing.assert_close(model(ids).last_hidden_state, model.embed_tokens(ids))


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "cls"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_pooling_ignores_padding(pooling, side):
    options = {"classifier_pooling": pooling, "num_labels": 3, "num_cls_tokens": 2 * (pooling == "cls")}
    model = make(XTransformerForSequenceClassification, **options).double().eval()
    ids, padding = tokens(1, LENGTH), torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((padding, ids) if side == "left" else (ids, padding), dim=1)
    alone = model(ids).logits
    close(model(padded, attention_mask=(padded != 0).long()).logits, alone)


def test_labels_of_the_classification_heads():
    ids, labels = tokens(2, LENGTH), torch.tensor([0, 2])
    output = make(XTransformerForSequenceClassification, num_labels=3)(ids, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    output = make(XTransformerForTokenClassification, num_labels=3)(ids, labels=ids % 3)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), (ids % 3).flatten())
    torch.testing.assert_close(output.loss, expected)


REFUSED = {
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
    "head size": ({"num_attention_heads": 5}, "multiple of num_attention_heads"),
    "dynamic rope": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    "odd rope": ({"head_dim": 5}, "even"),
    "sinusoids": ({"embedding_size": 15, "absolute_positions": "scaled_sinusoidal"}, "embedding_size must be even"),
    "unit sinusoids": ({"l2_normalize_embeddings": True, "absolute_positions": "scaled_sinusoidal"}, "no table"),
    "slopes": ({"position_bias": "alibi", "alibi_slopes": [1.0]}, "alibi_slopes"),
    "buckets": ({"position_bias": "t5", "relative_attention_num_buckets": 7}, "even"),
    "groups": ({"qk_norm": "l2", "qk_norm_groups": 3}, "qk_norm_groups must divide"),
    "groups of nothing": ({"qk_norm_groups": 2}, "no other norm has groups"),
    "rank of no gate": ({"value_gate_rank": 3}, "no gate to shape"),
    "rank and heads": ({"value_gate": "silu", "value_gate_rank": 3, "value_gate_per_head": True}, "no bottleneck"),
    "window ahead": ({"sliding_window_ahead": 3}, "needs sliding_window"),
    "gate scale": ({"gate_channel_scale": True}, "no gate to scale"),
    "gru scale": ({"residual_type": "gru", "residual_scale": 2.0}, "does not sum"),
    "streams and norms": ({"num_residual_streams": 2, "norm_position": "post"}, "streams are summed"),
    "streams and rules": ({"num_residual_streams": 2, "residual_type": "gru"}, "residual rule themselves"),
    "mixing of one stream": ({"residual_stream_mixing": "doubly_stochastic"}, "mixes with nothing"),
    "too few shifts": ({"shift_tokens": [1]}, "each of the 4 branches"),
    "too wide a shift": ({"shift_tokens": 16}, "from 0 to 15"),
    "only cross-attention": ({"cross_attention_only": True}, "else nothing is read"),
    "bias of no gate": ({"value_gate_bias": True}, "no gate to shape"),
    "order": ({"sublayer_order": "fff"}, "at least one 'a'"),
    "order and blocks": ({"sublayer_order": "afafaf"}, "num_hidden_layers"),
    "macaron order": ({"sublayer_order": "afaf", "macaron": True}, "already says"),
    "execution": ({"layer_execution_order": [0, 2]}, "every block"),
    "an empty block": ({"sublayer_order": "a||f", "num_hidden_layers": 3}, "branches between its bars"),
    "two attentions in a block": ({"sublayer_order": "a|afa"}, "at most one 'a' each"),
    "blocks beside bars": ({"sublayer_order": "a|f|f"}, r"num_hidden_layers \(2\) bars and one block more"),
    "a first block of feed-forwards": ({"sublayer_order": "f|a"}, "'a' in its first block"),
    "feed-forwards that run first": ({"sublayer_order": "a|f", "layer_execution_order": [1, 0]}, "runs first"),
    "shift of a block": ({"sublayer_order": "a|f", "shift_tokens": 1}, "cache keeps the tokens before"),
    "memory of a block": ({"sublayer_order": "a|f", "mem_len": 3}, "the states before each"),
    "token types": ({"type_vocab_size": [2, 0]}, "type_vocab_size must be at least 0, or a list"),
    "prefix shift": ({"prefix_lm": True, "shift_tokens": 1}, "comes before"),
    "prefix xpos": ({"prefix_lm": True, "rotary_positions": "xpos"}, "later keys"),
    "tied factors": ({"tie_word_embeddings": True, "embedding_size": 16}, "embedding_size=32"),
    "gpu scores": ({"kernel_backend": "triton", "residual_attention": True}, "scores"),
    "dropout": ({"attention_dropout": 1.0}, r"in \[0, 1\)"),
    "no cls token": ({"classifier_pooling": "cls"}, "no token to read"),
    "overrides": ({"is_encoder_decoder": True, "encoder_overrides": {"colour": 1}}, "colour"),
    "wrong type": ({"norm_type": "batch"}, "norm_type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_together_is_refused_with_the_reason(name):
    options, message = REFUSED[name]
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        XTransformerConfig(**{**SIZES, **options})


def test_an_encoder_refuses_what_only_decoders_have():
    with pytest.raises(ValueError, match="later keys"):
        make(XTransformerModel, rotary_positions="xpos")
    with pytest.raises(ValueError, match="see each other"):
        make(XTransformerForMaskedLM, prefix_lm=True)
    with pytest.raises(ValueError, match="see nothing of it"):
        make(XTransformerForCausalLM, num_cls_tokens=1)
    with pytest.raises(ValueError, match="nothing is causal"):
        make(XTransformerForCausalLM, cross_attention_only=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="past_key_values needs is_decoder"):
        make(XTransformerModel)(tokens(1, 5), past_key_values=DynamicCache())


def test_a_cache_that_forgets_memory_tokens_is_refused():
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        causal_model("memory tokens")(tokens(1, 5), past_key_values=DynamicCache())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_nothing_in_is_nothing_out(shape):
    config = XTransformerConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = XTransformerForMaskedLM(config).eval()
    assert model(torch.zeros(shape, dtype=torch.long)).logits.shape == (*shape, 20)
