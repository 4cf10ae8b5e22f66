"""Random configurations, of all three kinds of models: what the validator lets through has to be causal, cacheable,
paddable and trainable; what it does not is refused with a reason. Which ones are drawn is the same in every run."""

import pytest
import torch
from generation_models import decisive, left_padded, tokens
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from x_transformer_models import SIZES, VOCABULARY, settled

from hf_efficient import (
    XTransformerConfig,
    XTransformerForCausalLM,
    XTransformerForConditionalGeneration,
    XTransformerForMaskedLM,
)


LENGTH = 11
CHOICES = {
    "num_key_value_heads": st.sampled_from([1, 2, 4]),
    "head_dim": st.sampled_from([4, 8]),
    "value_head_dim": st.sampled_from([None, 6]),
    "embedding_size": st.sampled_from([None, 16]),
    "l2_normalize_embeddings": st.booleans(),
    "embedding_norm": st.booleans(),
    "num_memory_tokens": st.sampled_from([0, 0, 2]),
    "absolute_positions": st.sampled_from([None, "learned", "scaled_sinusoidal"]),
    "rotary_positions": st.sampled_from([None, "rope", "xpos"]),
    "position_bias": st.sampled_from([None, "alibi", "t5", "dynamic"]),
    "norm_type": st.sampled_from(["layer_norm", "rms_norm", "simple_rms_norm", "scale_norm", "dynamic_tanh"]),
    "norm_position": st.sampled_from(["pre", "post", "sandwich", "pre_and_post"]),
    "residual_type": st.sampled_from(["sum", "gru"]),
    "residual_scale": st.sampled_from([1.0, 1.5]),
    "learned_residual_scale": st.booleans(),
    "layer_scale_init_value": st.sampled_from([None, 0.5]),
    "num_residual_streams": st.sampled_from([1, 1, 3]),
    "residual_stream_mixing": st.sampled_from(["free", "doubly_stochastic"]),
    "shift_tokens": st.sampled_from([0, 0, 1, 2, [0, 1, 2, 0]]),
    "macaron": st.booleans(),
    "sublayer_order": st.sampled_from([None, None, "afaff", "faaf"]),
    "layer_execution_order": st.sampled_from([None, None, [0, 0]]),
    "sliding_window": st.sampled_from([None, None, 3]),
    "attn_logit_softcapping": st.sampled_from([None, 3.0]),
    "num_memory_key_values": st.sampled_from([0, 2]),
    "learned_attention_sinks": st.booleans(),
    "zero_attention_sink": st.booleans(),
    "qk_norm": st.sampled_from([None, "l2", "l2_learned", "rms", "rms_key"]),
    "qk_norm_groups": st.sampled_from([1, 2]),
    "pre_softmax_talking_heads": st.sampled_from([False, False, True]),
    "post_softmax_talking_heads": st.sampled_from([False, False, True]),
    "residual_attention": st.sampled_from([False, False, True]),
    "value_residual": st.sampled_from([None, "learned", "half"]),
    "head_output_scale": st.booleans(),
    "head_gate": st.booleans(),
    "value_gate": st.sampled_from([None, "sigmoid", "silu"]),
    "value_gate_rank": st.sampled_from([None, 4]),
    "value_gate_bias": st.booleans(),
    "attention_bias": st.booleans(),
    "mem_len": st.sampled_from([0, 0, 20]),
    "attention_z_loss_coef": st.sampled_from([0.0, 1e-4]),
    "attention_on_attention": st.booleans(),
    "gated_feed_forward": st.booleans(),
    "gate_channel_scale": st.booleans(),
    "feed_forward_norm": st.booleans(),
    "hidden_act": st.sampled_from(["gelu", "silu", "relu2"]),
    "mlp_output_bias": st.sampled_from([None, False]),
    "hidden_state_softcapping": st.sampled_from([None, 5.0]),
}
# A table so small that a short sequence reads all of it.
BUCKETS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}


@st.composite
def options(draw):
    """A third of the options at a time; the rest keep their defaults."""
    names = draw(st.lists(st.sampled_from(sorted(CHOICES)), min_size=4, max_size=14, unique=True))
    return {name: draw(CHOICES[name]) for name in names}


def built(chosen, model_class=XTransformerForCausalLM):
    """A decisive model in float64, or None where the configuration is refused, which has to be with a reason."""
    torch.manual_seed(0)
    try:
        model = model_class(XTransformerConfig(**{**SIZES, **BUCKETS, **chosen}))
    except (ValueError, StrictDataclassError) as error:
        assert any(name in str(error) for name in chosen), f"{error} names none of {sorted(chosen)}"
        return None
    return settled(decisive(model))


def silent_parameters(model, **inputs) -> list[str]:
    """Those that no gradient reaches."""
    model.train()
    model(**inputs).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.eval()
    return silent


def reloaded(model, folder):
    """The model from its folder, whose weights are the same to the bit."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, dtype=torch.float64).eval()
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    return loaded


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@settings(max_examples=36, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(options())
def test_what_is_let_through_is_right(tmp_path_factory, chosen):
    model = built(chosen)
    if model is None:
        return
    ids, mask = left_padded([7, LENGTH])
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        # No leak, to the bit.
        changed = ids.clone()
        changed[:, 6] = (changed[:, 6] - 3 + 7) % (VOCABULARY - 3) + 3
        assert torch.equal(model(changed, attention_mask=mask, use_cache=False).logits[:, :6], whole[:, :6])
        # Cached == uncached, several tokens at a time.
        cache, pieces, seen = DynamicCache(config=model.config), [], 0
        for piece in ids.split([6, 1, 3, 1], dim=1):
            seen += piece.shape[1]
            pieces.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
        real = mask.bool()
        close(torch.cat(pieces, dim=1)[real], whole[real])
        # A padded row of a batch == the row alone.
        close(model(ids[:1, -7:], use_cache=False).logits, whole[:1, -7:])
        # With a memory, two segments == the whole.
        if model.config.mem_len:
            first = model(ids[1:, :5], use_cache=False)
            rest = model(ids[1:, 5:], segment_memory=first.segment_memory, use_cache=False)
            close(torch.cat([first.logits, rest.logits], dim=1), whole[1:])
        # Saved and loaded == before (sums also depend on where in memory they stand).
        loaded = reloaded(model, tmp_path_factory.mktemp("saved"))
        close(loaded(ids, attention_mask=mask, use_cache=False).logits[real], whole[real])
    text = tokens(2, LENGTH)
    assert not silent_parameters(model, input_ids=text, labels=text)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(options(), st.sampled_from(["left", "right"]))
def test_encoders(tmp_path_factory, chosen, side):
    model = built(chosen, XTransformerForMaskedLM)
    if model is None:
        return
    ids, mask = left_padded([7, LENGTH])
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    alone = ids[:1, -7:] if side == "left" else ids[:1, :7]
    with torch.no_grad():
        whole, real = model(ids, attention_mask=mask).logits, mask.bool()
        close(model(alone).logits, whole[0][real[0]][None])
        close(model(ids[1:]).logits, whole[1:])
        loaded = reloaded(model, tmp_path_factory.mktemp("saved"))
        close(loaded(ids, attention_mask=mask).logits[real], whole[real])
    assert not silent_parameters(model, input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(options())
def test_encoder_decoders(tmp_path_factory, chosen):
    chosen = {name: value for name, value in chosen.items() if name != "sublayer_order" and value != [0, 1, 2, 0]}
    chosen |= {"is_encoder_decoder": True, "decoder_start_token_id": 1}
    model = built(chosen, XTransformerForConditionalGeneration)
    if model is None:
        return
    source, target = tokens(2, 9, seed=4), tokens(2, LENGTH)
    mask = (torch.arange(9) < torch.tensor([[6], [9]])).long()
    inputs = {"input_ids": source, "attention_mask": mask}
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=target, use_cache=False).logits
        changed = target.clone()
        changed[:, 6] = (changed[:, 6] - 3 + 7) % (VOCABULARY - 3) + 3
        assert torch.equal(model(**inputs, decoder_input_ids=changed, use_cache=False).logits[:, :6], whole[:, :6])
        cache, pieces = None, []
        for piece in target.split([6, 1, 3, 1], dim=1):
            output = model(**inputs, decoder_input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        close(torch.cat(pieces, dim=1), whole)
        close(model(source[:1, :6], decoder_input_ids=target[:1], use_cache=False).logits, whole[:1])
        loaded = reloaded(model, tmp_path_factory.mktemp("saved"))
        close(loaded(**inputs, decoder_input_ids=target, use_cache=False).logits, whole)
    assert not silent_parameters(model, input_ids=source, labels=target)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_a_field(name):
    assert hasattr(XTransformerConfig(), name)
