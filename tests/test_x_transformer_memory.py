"""Transformer-XL's memory and the penalty on attention's denominators, against x-transformers and by themselves."""

import copy

import pytest
import torch
from generation_models import NEW_TOKENS, assert_same, decisive, left_padded, run, tokens
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache
from x_transformer_models import NO_ROPE, SIZES, T5, settled
from x_transformers_originals import TOLERANCE, ids, original

from hf_efficient import XTransformerConfig, XTransformerForCausalLM, XTransformerForMaskedLM, XTransformerModel
from hf_efficient.conversion.x_transformers import convert_x_transformers


MEMORY = 24
OPTIONS = {
    "rope": {},
    "alibi": {"position_bias": "alibi", **NO_ROPE},
    "t5, memory keys, groups": {**T5, **NO_ROPE, "num_memory_key_values": 2, "num_key_value_heads": 2},
    "xpos, window": {"rotary_positions": "xpos", "sliding_window": 6},
    "value residual": {"value_residual": "learned", "norm_position": "sandwich"},
    "streams": {"num_residual_streams": 2, "layer_execution_order": [0, 0]},
    "scores of the block before": {"residual_attention": True, "post_softmax_talking_heads": True},
}
# Theirs does not give in segments what it gives for the whole with rotary positions and memory keys together.
THEIRS = {
    "rotary": {"rotary_pos_emb": True},
    "t5 bias, memory keys": {"rel_pos_bias": True, "attn_num_mem_kv": 2},
    "t5 bias": {"rel_pos_bias": True, "attn_kv_heads": 2},
    "alibi": {"alibi_pos_bias": True, "disable_abs_pos_emb": True, "residual_attn": True},
    "sandwich": {"rotary_pos_emb": True, "sandwich_norm": True, "attn_qk_norm": True},
}


def model_with(name, model_class=XTransformerForCausalLM):
    torch.manual_seed(0)
    options = {**OPTIONS[name], "is_decoder": model_class is XTransformerForCausalLM}
    return settled(decisive(model_class(XTransformerConfig(**SIZES, **options, mem_len=MEMORY))))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def pad_first_row(row_ids, padding):
    """Two rows, of which the first begins with that many tokens of padding."""
    mask = torch.ones_like(row_ids)
    mask[0, :padding] = 0
    return row_ids * mask, mask


@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_three_segments_as_in_x_transformers(name, kind):
    module, arguments = original(kind, {"max_mem_len": 9}, THEIRS[name])
    model, _ = convert_x_transformers(module, arguments)
    assert model.config.mem_len == 9
    body, head = (model.model, model.lm_head)
    theirs = ours = None
    for seed in range(3):
        segment = ids(7, seed)
        expected, theirs = module(segment, mems=theirs, return_mems=True)
        output = body(segment, segment_memory=ours, use_cache=False)
        ours = output.segment_memory
        torch.testing.assert_close(head(output.last_hidden_state), expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(ours, torch.stack(theirs, dim=1), rtol=0, atol=TOLERANCE)
    assert ours.shape[2] == 9


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_segments_give_what_the_whole_gives(name):
    model, text = model_with(name), tokens(2, 18)
    whole, segment_memory, pieces = model(text, use_cache=False).logits, None, []
    for segment in text.split([7, 5, 6], dim=1):
        output = model(segment, segment_memory=segment_memory, use_cache=False)
        segment_memory = output.segment_memory
        pieces.append(output.logits)
    close(torch.cat(pieces, dim=1), whole)
    assert segment_memory.shape == (2, 2, 18, SIZES["hidden_size"]) and not segment_memory.requires_grad


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_memory_can_be_cached_and_rows_padded(name):
    model = model_with(name)
    segment_memory = model(tokens(2, 8, seed=4), use_cache=False).segment_memory
    segment, mask = pad_first_row(tokens(2, 11), 4)
    whole = model(segment, attention_mask=mask, segment_memory=segment_memory, use_cache=False).logits
    close(whole[:1, 4:], model(segment[:1, 4:], segment_memory=segment_memory[:1], use_cache=False).logits)
    assert not torch.allclose(whole[1], model(segment[1:], use_cache=False).logits[0])
    cache, pieces, seen = DynamicCache(config=model.config), [], 0
    for piece in segment.split([6, 1, 4], dim=1):
        seen += piece.shape[1]
        output = model(piece, attention_mask=mask[:, :seen], segment_memory=segment_memory, past_key_values=cache)
        pieces.append(output.logits)
        assert (output.segment_memory is None) == (seen > 6) and cache.get_seq_length() == seen
    close(torch.cat(pieces, dim=1)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["rope", "t5, memory keys, groups"])
def test_generation_goes_on_from_a_memory(name, strategy):
    model = model_with(name)
    with torch.no_grad():
        segment_memory = model(tokens(2, 8, seed=4), use_cache=False).segment_memory
    prompt, mask = pad_first_row(tokens(2, 7), 3)
    options = {"attention_mask": mask, "segment_memory": segment_memory, **strategy}
    cached = run(model, prompt, **options)
    assert_same(cached, run(model, prompt, use_cache=False, **options), name)
    forgetful = run(model, prompt, attention_mask=mask, **strategy)
    assert forgetful.sequences[:, -NEW_TOKENS:].tolist() != cached.sequences[:, -NEW_TOKENS:].tolist()


def test_a_memory_is_kept_while_training_and_checkpointing():
    model, text, gradients = model_with("rope").train(), tokens(2, 12), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        segment_memory = model(text[:, :6], use_cache=False).segment_memory
        output = model(text[:, 6:], labels=text[:, 6:], segment_memory=segment_memory, use_cache=False)
        output.loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
        assert output.segment_memory.shape[2] == 12
    torch.testing.assert_close(*gradients)


REFUSED = {
    "positions": ({"absolute_positions": "learned"}, "begin anew"),
    "memory tokens": ({"num_memory_tokens": 2}, "num_memory_tokens=2 needs mem_len=0"),
    "shift": ({"shift_tokens": 1}, "neighbours"),
    "prefix": ({"prefix_lm": True}, "first segment"),
    "encoder-decoder": ({"is_encoder_decoder": True}, "each source"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_memory_cannot_be_combined_with(name):
    options, message = REFUSED[name]
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        XTransformerConfig(**SIZES, mem_len=4, **options)


def test_a_memory_of_another_shape_is_refused():
    model = model_with("rope")
    with pytest.raises(ValueError, match="segment_memory must have shape"):
        model(tokens(2, 5), segment_memory=torch.zeros(2, 3, 4, 32))
    with pytest.raises(ValueError, match="without a memory"):
        XTransformerModel(XTransformerConfig(**SIZES))(tokens(2, 5), segment_memory=torch.zeros(2, 2, 4, 32))


Z_LOSS = {"rotary_pos_emb": True, "attn_head_learned_sink": True, "attn_num_mem_kv": 2, "attn_softclamp_logits": True}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_z_loss_and_its_gradient_as_in_x_transformers(implementation):
    module, arguments = original("Decoder", {}, Z_LOSS)
    model, _ = convert_x_transformers(module, arguments)
    model.config.attention_z_loss_coef = 1e-3
    model = XTransformerForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    model.set_attn_implementation(implementation)
    _, intermediates = module(ids(), return_attn_z_loss=True, attn_z_loss_weight=1e-3)
    output = model(ids(), labels=ids())
    torch.testing.assert_close(output.attention_z_loss, intermediates.attn_z_loss, rtol=1e-5, atol=1e-7)
    plain = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    torch.testing.assert_close(output.loss, plain + output.attention_z_loss)
    output.attention_z_loss.backward()
    intermediates.attn_z_loss.backward()
    actual, expected = model.model.embed_tokens.weight.grad, module.token_emb.emb.weight.grad
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_z_loss_counts_no_padding():
    config = XTransformerConfig(**SIZES, attention_z_loss_coef=1.0)
    model = settled(decisive(XTransformerForCausalLM(config)))
    text, mask = left_padded([7, 11])
    both = model(text, attention_mask=mask).attention_z_loss
    alone = [model(text[:1, -7:]).attention_z_loss, model(text[1:]).attention_z_loss]
    close(both, (7 * alone[0] + 11 * alone[1]) / 18)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    close(eager(text, attention_mask=mask).attention_z_loss, both)


def test_z_loss_is_refused_where_nothing_adds_it():
    with pytest.raises(ValueError, match="only the causal model"):
        XTransformerForMaskedLM(XTransformerConfig(**SIZES, attention_z_loss_coef=1e-4))
