"""Random valid configurations: what the validator lets through has to be causal, cacheable, paddable and trainable."""

import pytest
import torch
from generation_models import decisive, left_padded, tokens
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from x_transformer_models import SIZES, VOCABULARY, settled

from hf_efficient import XTransformerConfig, XTransformerForCausalLM


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
    "shift_tokens": st.sampled_from([0, 0, 1, 2]),
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


def built(chosen):
    """A decisive model in float64, or None where the configuration is refused, which has to be with a reason."""
    try:
        config = XTransformerConfig(**{**SIZES, **BUCKETS, **chosen})
    except (ValueError, StrictDataclassError) as error:
        assert any(name in str(error) for name in chosen), f"{error} names none of {sorted(chosen)}"
        return None
    torch.manual_seed(0)
    return settled(decisive(XTransformerForCausalLM(config)))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9 * expected.abs().max().item())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
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
        # Saved and loaded == before: weights to the bit (sums also depend on where in memory they stand).
        folder = tmp_path_factory.mktemp("saved")
        model.save_pretrained(folder)
        loaded = XTransformerForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
        close(loaded(ids, attention_mask=mask, use_cache=False).logits[real], whole[real])
    # A gradient reaches every parameter.
    model.train()
    text = tokens(2, LENGTH)
    model(text, labels=text).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_a_field(name):
    assert hasattr(XTransformerConfig(), name)
