"""Weights in: CoLT5-attention's modules compute the same here; T5 v1.1 and LongT5 become CoLT5."""

import pytest
import torch
from colt5_models import T5_SIZES as SIZES
from transformers import LongT5Config, LongT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from hf_efficient.conversion.colt5_attention import convert_colt5_attention
from hf_efficient.conversion.upcycled_t5 import upcycle_t5
from hf_efficient.conversion.weight_transfer import ConversionError


peer = pytest.importorskip("colt5_attention")
SMALL = {"light_dim_head": 8, "light_heads": 2, "heavy_dim_head": 8, "heavy_heads": 4}
COUNTS = {"num_heavy_tokens_q": 6, "num_heavy_tokens_kv": 9}
# Logits of unit size: larger ones saturate the original's scores, and ties then decide what it routes.
ROUTER = {"router_kwargs": {"eps": 1.0, "eps_init": 1.0, "eps_decay": 1.0, "n_iters": 50}}
PEERS = {
    "feed-forward": lambda: peer.ConditionalRoutedFeedForward(16, num_heavy_tokens=6, **ROUTER),
    "scores as weights": lambda: peer.ConditionalRoutedFeedForward(
        16, num_heavy_tokens=6, router_straight_through=False, **ROUTER
    ),
    "default router": lambda: peer.ConditionalRoutedFeedForward(16, num_heavy_tokens=6),
    "cosine": lambda: peer.ConditionalRoutedFeedForward(
        16, num_heavy_tokens=6, router_kwargs={**ROUTER["router_kwargs"], "cosine_sim_routing": True}
    ),
    "attention": lambda: peer.ConditionalRoutedAttention(16, light_window_size=8, **COUNTS, **SMALL, **ROUTER),
    "attention, options": lambda: peer.ConditionalRoutedAttention(
        16,
        light_window_size=8,
        router_straight_through=False,
        multiply_keys_by_score=True,
        multiply_queries_by_score=True,
        use_null_q_tokens=False,
        rotary_emb=True,
        **COUNTS,
        **SMALL,
        **ROUTER,
    ),
    "heavy alone": lambda: peer.ConditionalRoutedAttention(16, has_light_attn=False, **COUNTS, **SMALL, **ROUTER),
    "two sets of keys": lambda: peer.ConditionalRoutedAttention(
        16, light_window_size=8, num_routed_kv=2, **COUNTS, **SMALL, **ROUTER
    ),
    "block": lambda: peer.ConditionalRoutedTransformerBlock(
        16,
        num_heavy_attn_tokens_q=6,
        num_heavy_attn_tokens_kv=9,
        num_heavy_ff_tokens=5,
        light_window_size=8,
        **SMALL,
        **ROUTER,
    ),
    "image attention": lambda: peer.ConditionalRoutedImageAttention(
        16, light_window_size=4, channel_first=True, **COUNTS, **SMALL, **ROUTER
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_a_converted_block_computes_what_the_original_computes(name):
    torch.manual_seed(0)
    original = PEERS[name]()
    with torch.no_grad():
        for key, weight in original.named_parameters():
            if "routing_token" in key:
                weight.mul_(0.25)
    block, report = convert_colt5_attention(original.double())
    shape = (1, 16, 8, 12) if name == "image attention" else (1, 32, 16)
    tokens = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(tokens), original(tokens), rtol=0, atol=1e-5 if "options" in name else 1e-7)
    assert set(original.state_dict()) == {
        source for sources in report.moved.values() for source in sources.split(" + ")
    } | set(report.dropped)


@pytest.mark.parametrize("kind", ["ConditionalRoutedCrossAttention", "ConditionalRoutedAutoregressiveAttention"])
def test_weights_of_blocks_that_cannot_be_compared_load(kind):
    """The first cannot run as it is shipped, the second sees the future."""
    if "Cross" in kind:
        original = peer.transformer_block.ConditionalRoutedCrossAttention(
            16, num_tokens_q=6, num_tokens_kv=9, dim_head=8, heads=4, kv_routing_tokens=2
        )
        block, _ = convert_colt5_attention(original)
        assert block(torch.randn(2, 10, 16), torch.randn(2, 30, 16)).shape == (2, 10, 16)
    else:
        original = peer.ConditionalRoutedAutoregressiveAttention(16, light_window_size=8, **COUNTS, **SMALL)
        block, _ = convert_colt5_attention(original)
        assert block(torch.randn(2, 30, 16)).shape == (2, 30, 16)
    heavy = original.heavy_attn.to_kv.weight.view(4, 2, 8, 16)
    assert torch.equal(block.heavy_attn.v_proj.weight.view(4, 8, 16), heavy[:, 1])


def test_what_cannot_be_converted():
    with pytest.raises(ConversionError, match="must be one of ConditionalRoutedFeedForward.*got Linear"):
        convert_colt5_attention(torch.nn.Linear(2, 2))
    original = peer.ConditionalRoutedFeedForward(16, num_heavy_tokens=4, router_kwargs={"route_block_size": 8})
    with pytest.raises(ConversionError, match="route_block_size must be None, got 8"):
        convert_colt5_attention(original)


EVERYTHING = {"num_routed_tokens": 1.0, "num_routed_queries": 1.0, "num_routed_keys": 1.0}


def t5(**options):
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**{**SIZES, **options})).double().eval()


def inputs():
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    return {
        "input_ids": torch.randint(3, 61, (2, 40)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 61, (2, 9)),
    }


@pytest.mark.parametrize("options", [{}, {"num_decoder_layers": 3}, {"tie_word_embeddings": False}], ids=str)
@torch.no_grad()
def test_with_everything_routed_an_upcycled_t5_is_the_t5(options):
    original = t5(**options)
    model, report = upcycle_t5(original, **EVERYTHING)
    given = inputs()
    # T5 takes its root mean squares in float32, whatever the model's dtype.
    torch.testing.assert_close(model(**given).logits, original(**given).logits, rtol=0, atol=1e-4)
    assert all("routing_vectors" in name for name in report.fresh)
    if "num_decoder_layers" in options:
        return  # T5 itself makes a cache of the encoder's depth and fails
    del given["decoder_input_ids"]
    expected = original.generate(**given, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**given, max_new_tokens=8, do_sample=False), expected)


@torch.no_grad()
def test_without_a_start_token_decoding_starts_with_padding():
    """A configuration that was not made from a checkpoint has none, and `generate` then wants it said."""
    sizes = {name: value for name, value in SIZES.items() if name != "decoder_start_token_id"}
    original = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=3)).eval()
    model, _ = upcycle_t5(original, **EVERYTHING)
    assert model.config.decoder_start_token_id == 3
    ids = torch.randint(4, 61, (1, 12))
    expected = original.generate(ids, max_new_tokens=4, do_sample=False, decoder_start_token_id=3)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


@torch.no_grad()
def test_light_branches_may_start_as_copies():
    original = t5()
    model, _ = upcycle_t5(original, light="copy", num_light_attention_heads=2, light_intermediate_size=6)
    layer, block = model.model.encoder.layers[1], original.encoder.block[1].layer
    assert torch.equal(layer.mlp.light_mlp.down_proj.weight, block[1].DenseReluDense.wo.weight[:, :6])
    assert torch.equal(layer.self_attn.light_attn.o_proj.weight, block[0].SelfAttention.o.weight[:, :16])
    assert model(**inputs()).logits.isfinite().all()


@torch.no_grad()
def test_key_heads_of_the_cross_attention_become_means():
    original = t5()
    model, _ = upcycle_t5(original, cross_attention_key_value_heads=1)
    keys = original.decoder.block[0].layer[1].EncDecAttention.k.weight.view(4, 8, 32)
    torch.testing.assert_close(model.model.decoder.layers[0].cross_attn.k_proj.weight, keys.mean(0))


@pytest.mark.parametrize("kind", ["local", "transient-global"])
@torch.no_grad()
def test_longt5(kind):
    """On inputs within its window its local attention sees all that the heavy branch sees."""
    torch.manual_seed(0)
    config = LongT5Config(**SIZES, encoder_attention_type=kind, local_radius=63, tie_word_embeddings=False)
    original = LongT5ForConditionalGeneration(config).double().eval()
    model, report = upcycle_t5(original, **EVERYTHING)
    given = inputs()
    if kind == "local":
        torch.testing.assert_close(model(**given).logits, original(**given).logits, rtol=0, atol=1e-4)
    else:
        assert all("global" in name for name in report.dropped if "embed_tokens" not in name)
        assert model(**given).logits.isfinite().all()


def test_what_cannot_be_upcycled():
    with pytest.raises(ConversionError, match="gated feed-forward only.*got feed_forward_proj='relu'"):
        upcycle_t5(t5(feed_forward_proj="relu"))
    with pytest.raises(ConversionError, match="hidden_size must stay what the T5ForConditionalGeneration has"):
        upcycle_t5(t5(), hidden_size=8)
    with pytest.raises(ConversionError, match="light branch must not be larger"):
        upcycle_t5(t5(), light_intermediate_size=99)
    with pytest.raises(ConversionError, match="must be one of T5ForConditionalGeneration.*got Linear"):
        upcycle_t5(torch.nn.Linear(2, 2))
