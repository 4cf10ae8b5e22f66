"""PerceiverFlash: inputs, options and the promises of its attention."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers import assert_within_budget
from perceiver_flash_models import FEATURES, IMAGES, SIZES, VOCABULARY, build, features, padded
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from hf_efficient import (
    PerceiverFlashConfig,
    PerceiverFlashForCausalLM,
    PerceiverFlashForImageClassification,
    PerceiverFlashForMaskedLM,
    PerceiverFlashForSequenceClassification,
    PerceiverFlashIOModel,
    PerceiverFlashModel,
)


# The code that torch (2.13) generated for it on an EPYC without AVX-512 did not compile (an undeclared variable), or
# gave rows of NaN and rows off by 4.5. The same models pass on a Xeon with AVX-512.
NO_FLEX = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2", reason="torch's own went wrong on a CPU without AVX-512"
)
IMPLEMENTATIONS = ["sdpa", pytest.param("flex_attention", marks=NO_FLEX), "hf_efficient"]


# The block, written out


def attend(attention, query, context, head_dim):
    heads = [
        t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (attention.q_proj(query), attention.k_proj(context))
    ]
    value = attention.v_proj(context).unflatten(-1, (-1, attention.value_head_dim)).transpose(1, 2)
    weights = (heads[0] @ heads[1].mT / head_dim**0.5).softmax(-1)
    return attention.o_proj((weights @ value).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("skip", [True, False])
def test_blocks_are_those_of_the_paper_or_of_flash_perceiver(skip):
    """x + Attn(LN x, LN c), then y + MLP(LN y). Without `mlp_residual` no y, without `normalize_context` plain c."""
    model = build(PerceiverFlashModel, double=True, **FEATURES, mlp_residual=skip, normalize_context=skip)
    inputs = features().double()
    x = model.latents.expand(3, -1, -1)
    for index, layer in enumerate(model.layers):
        y = layer.attention_norm(x)
        context = y if index else (torch.nn.functional.layer_norm(inputs, (6,)) if skip else inputs)
        y = x + attend(layer.attention, y, context, layer.attention.head_dim)
        x = layer.mlp(layer.mlp_norm(y)) + (y if skip else 0)
    torch.testing.assert_close(model(inputs=inputs).last_hidden_state, x)


# Inputs


def test_several_inputs_as_list_and_dict():
    sizes = {"sound": 6, "picture": 9}
    options = {**FEATURES, "num_cross_attention_layers": 2}
    by_name = build(PerceiverFlashModel, **options | {"input_size": sizes})
    by_order = build(PerceiverFlashModel, **options | {"input_size": [6, 9]})
    parts = {"picture": features(length=5, size=9), "sound": features(length=11, size=6)}
    mask = padded()
    named = by_name(inputs=parts, attention_mask={"sound": mask}).last_hidden_state
    in_order = [parts["sound"], parts["picture"]]
    ordered = by_order(inputs=in_order, attention_mask=[mask, None]).last_hidden_state
    assert torch.equal(named, ordered)
    other = by_order(inputs=in_order).last_hidden_state
    assert not torch.equal(other, ordered), "the mask did nothing"
    with pytest.raises(ValueError, match=r"inputs must have the names \['sound', 'picture'\].*\['sound'\]"):
        by_name(inputs={"sound": parts["sound"]})
    with pytest.raises(ValueError, match="inputs must be one for each of 2 cross-attentions, got 1"):
        by_order(inputs=in_order[:1])
    with pytest.raises(ValueError, match=r"inputs\[1\] must be floating point of shape \[batch, length, 9\]"):
        by_order(inputs=in_order[:1] * 2)


def test_one_tensor_is_read_by_every_cross_attention():
    model = build(PerceiverFlashModel, **FEATURES, num_cross_attention_layers=3, num_zero_tokens=2)
    inputs = features().requires_grad_()
    model(inputs=inputs).last_hidden_state.sum().backward()
    assert all(token.grad.abs().sum() > 0 for token in model.zero_tokens), "each layer reads its own zero tokens"
    assert len(model.zero_tokens) == 3 and inputs.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(3, 32), (5, 32), (2, 13, 32)])
def test_custom_latents_of_any_number(shape):
    model = build(PerceiverFlashModel, **FEATURES | {"num_latents": None, "pooling": "mean"})
    latents = torch.randn(shape, requires_grad=True)
    output = model(inputs=features(rows=2), latents=latents)
    assert output.last_hidden_state.shape == (2, shape[-2], 32) and output.pooler_output.shape == (2, 5)
    output.pooler_output.sum().backward()
    assert latents.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="latents must be given to a model with num_latents=None"):
        model(inputs=features())
    with pytest.raises(ValueError, match=r"latents must have shape \[any, 32\] or \[2, any, 32\], got \(3, 31\)"):
        model(inputs=features(rows=2), latents=torch.randn(3, 31))


@pytest.mark.parametrize("shape", [(7, 10), (2, 1, 10), (2, 40, 10)])
def test_queries_of_any_number_with_gradients_into_them(shape):
    model = build(PerceiverFlashIOModel, **FEATURES)
    queries = torch.randn(shape, requires_grad=True)
    output = model(inputs=features(rows=2), queries=queries).last_hidden_state
    assert output.shape == (2, shape[-2], 5)
    output.square().sum().backward()
    assert queries.grad.abs().sum() > 0
    assert model(inputs=features(rows=2)).last_hidden_state.shape == (2, 8, 32), "without queries: the latents"


def test_wrong_inputs_are_refused():
    text = build(PerceiverFlashModel, **SIZES)
    ids = torch.randint(3, VOCABULARY, (2, 5))
    for arguments, message in (
        ({}, "exactly one of input_ids and inputs_embeds must be given, got neither"),
        ({"inputs": features()}, "modality='text' reads input_ids or inputs_embeds, got inputs"),
        ({"input_ids": ids + VOCABULARY}, "input_ids must be between 0 and 60"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 4)}, r"shape \(2, 5\) .*got \(2, 4\)"),
        ({"input_ids": ids.repeat(1, 13)}, "before position 64"),
        ({"input_ids": ids, "past_key_values": object()}, "past_key_values needs is_decoder=True"),
    ):
        with pytest.raises(ValueError, match=message):
            text(**arguments)


# Attention


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_decoder", [False, True])
def test_implementations_agree(implementation, is_decoder):
    """Within the error budget, with padding on either side, at lengths over and under the number of latents."""
    model_class = PerceiverFlashForCausalLM if is_decoder else PerceiverFlashForMaskedLM
    ids = torch.randint(3, VOCABULARY, (3, 11))
    eager = build(model_class, **SIZES)
    other = build(model_class, implementation=implementation, **SIZES)
    oracle = build(model_class, double=True, **SIZES)
    for mask in (None, padded(), padded().flip(1)):
        with torch.no_grad():
            results = [model(input_ids=ids, attention_mask=mask).logits for model in (other, oracle, eager)]
        assert_within_budget(*results, implementation)


def varlen_attention(module, query, key, value, attention_mask, scaling, is_causal, **kwargs):
    """What flash-attn's functions compute, written out: packed rows, the last query at the last key."""
    assert attention_mask is None
    if "cu_seq_lens_k" not in kwargs:
        parts = zip(query, key, value, strict=True)
    else:
        edges = [kwargs[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
        rows, keys = ([slice(*pair) for pair in pairwise(cut)] for cut in edges)
        assert kwargs["max_length_k"] == max(k.stop - k.start for k in keys)
        parts = [(query[0, :, r], key[0, :, k], value[0, :, k]) for r, k in zip(rows, keys, strict=True)]
    results = []
    for q, k, v in parts:
        scores = q @ k.mT * scaling
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            scores = scores.masked_fill(~seen, -torch.inf)
        results.append((scores.softmax(-1).nan_to_num() @ v).transpose(0, 1))
    return (torch.cat(results)[None] if "cu_seq_lens_k" in kwargs else torch.stack(results)), None


@pytest.mark.parametrize("is_decoder", [False, True])
def test_flash_attention_2_gets_packed_rows(is_decoder, monkeypatch):
    """The package cannot run here: a function that computes what its functions do stands in its place."""
    model_class = PerceiverFlashForCausalLM if is_decoder else PerceiverFlashForMaskedLM
    ids = torch.randint(3, VOCABULARY, (3, 11))
    eager, packed = (build(model_class, double=True, **SIZES) for _ in range(2))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen_attention)
    for module in packed.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flash_attention_2"
    for mask in (None, padded(), padded().flip(1), padded((11, 0, 7))):
        with torch.no_grad():
            first, second = (model(input_ids=ids, attention_mask=mask).logits for model in (eager, packed))
        if mask is not None:
            seen = (mask == 1)[:, -first.shape[1] :]
            first, second = first[seen], second[seen]
        torch.testing.assert_close(second, first)


@pytest.mark.skipif(is_flash_attn_2_available(), reason="the package is installed")
def test_flash_attention_2_is_refused_without_its_package():
    with pytest.raises(ImportError, match="FlashAttention2"):
        build(PerceiverFlashModel, implementation="flash_attention_2", **SIZES)


def test_padding_is_masked_exactly():
    """What stands at masked positions, NaN apart, changes no bit; and the rest equals the row without padding."""
    for implementation in ("eager", "sdpa"):
        model = build(PerceiverFlashModel, implementation=implementation, **FEATURES, num_cross_attention_layers=2)
        inputs, mask = features(), padded()
        noisy = torch.where(mask[..., None] == 1, inputs, 100 * torch.randn_like(inputs))
        with torch.no_grad():
            first, second = (model(inputs=x, attention_mask=mask).last_hidden_state for x in (inputs, noisy))
            alone = model(inputs=inputs[1:2, :4]).last_hidden_state
        assert torch.equal(first, second), implementation
        torch.testing.assert_close(first[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", *IMPLEMENTATIONS])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_rows_that_see_nothing_are_zeros_with_finite_gradients(implementation, chunk_size):
    model = build(
        PerceiverFlashModel, implementation=implementation, **FEATURES, cross_attention_chunk_size=chunk_size
    )
    attention = model.layers[0].attention
    seen = []
    attention.o_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    mask = padded((11, 0, 7))
    inputs = features().requires_grad_(implementation != "flex_attention")  # which has no gradients on a CPU
    with torch.set_grad_enabled(inputs.requires_grad):
        output = model(inputs=inputs, attention_mask=mask).last_hidden_state
    assert seen[0][1].abs().max() == 0 and seen[0][0].abs().max() > 0 and output.isfinite().all()
    if inputs.requires_grad:
        output.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert inputs.grad.isfinite().all() and inputs.grad[1].abs().max() == 0


def test_a_padding_mask_costs_no_tensor_of_queries_times_keys(monkeypatch):
    """The mask that reaches SDPA has one row for all queries."""
    shapes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **options):
        shapes.append(None if attn_mask is None else tuple(attn_mask.shape))
        return original(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    build(PerceiverFlashModel, implementation="sdpa", **FEATURES)(inputs=features(), attention_mask=padded())
    assert shapes == [(3, 1, 1, 11), None, None]


def test_attention_weights_come_in_the_order_of_the_blocks():
    options = {**FEATURES, "num_cross_attention_layers": 2, "self_attention_repeats": 2, "num_zero_tokens": 3}
    model = build(PerceiverFlashIOModel, **options)
    output = model(inputs=features(), queries=torch.randn(7, 10), output_attentions=True, output_hidden_states=True)
    cross, latent = (3, 2, 8, 14), (3, 4, 8, 8)
    assert [tuple(weights.shape) for weights in output.attentions] == [cross, *[latent] * 4] * 2
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(3, 2, 7, 8)]
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1 == 11
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


# Options


@pytest.mark.parametrize("first", [False, True])
def test_tied_layers_are_the_same_modules(first):
    config = PerceiverFlashConfig(
        **FEATURES, num_cross_attention_layers=4, weight_tie_layers=True, tie_first_layer=first
    )
    group = [(0, True), (1, False), (2, False)]
    later = group if first else [(3, True), (4, False), (5, False)]
    assert config.layer_schedule == group + later * 3
    assert len(PerceiverFlashModel(config).layers) == (3 if first else 6)


def test_dropped_latents_are_left_out_in_training_only():
    model = build(PerceiverFlashModel, **FEATURES, latent_drop=0.6, position_embedding_type="rotary")
    assert model(inputs=features()).last_hidden_state.shape == (3, 8, 32)
    model.train()
    assert model(inputs=features()).last_hidden_state.shape == (3, 3, 32)
    model.config.latent_drop = 0.99
    assert model(inputs=features()).last_hidden_state.shape == (3, 1, 32)


@pytest.mark.parametrize("pooling, size", [("mean", 32), ("first", 32), ("concat", 8 * 32)])
def test_pooling(pooling, size):
    model = build(PerceiverFlashModel, **FEATURES, pooling=pooling)
    output = model(inputs=features())
    latents = output.last_hidden_state
    pooled = {"mean": latents.mean(1), "first": latents[:, 0], "concat": latents.reshape(3, -1)}[pooling]
    assert pooled.shape == (3, size)
    torch.testing.assert_close(output.pooler_output, model.pooler(pooled))


def test_rotary_depends_on_distances_alone():
    """Cross- and query attention turn as well: moving all positions together changes nothing, moving some does."""
    options = {**FEATURES, "position_embedding_type": "rotary", "cross_rotary_dim": 8, "query_rotary_dim": 4}
    model = build(PerceiverFlashIOModel, double=True, **options)
    inputs, queries = features().double(), torch.randn(7, 10).double()

    def output(shift, of=("inputs", "latents", "queries")):
        moved = {
            name: torch.arange(count) + shift * (name in of)
            for name, count in (("inputs", 11), ("latents", 8), ("queries", 7))
        }
        return model(
            inputs=inputs,
            queries=queries,
            position_ids=moved["inputs"][None],
            latent_position_ids=moved["latents"][None],
            query_position_ids=moved["queries"][None],
        ).last_hidden_state

    plain = output(0)
    torch.testing.assert_close(model(inputs=inputs, queries=queries).last_hidden_state, plain)
    # Angles are float32.
    torch.testing.assert_close(output(100), plain, rtol=1e-4, atol=1e-4)
    for name in ("inputs", "queries"):
        assert (output(100, (name,)) - plain).abs().max() > 1e-3, name


CONFIGURATIONS = {
    "no width": ({"modality": "features"}, "input_size must be given for modality='features'"),
    "too few widths": (
        {"modality": "features", "input_size": [4, 5]},
        r"one for each of num_cross_attention_layers \(1\), got \[4, 5\]",
    ),
    "tied widths": (
        {
            "modality": "features",
            "input_size": [4, 5, 6],
            "num_cross_attention_layers": 3,
            "weight_tie_layers": True,
        },
        "weight_tie_layers=True needs inputs of one width",
    ),
    "texts": ({"input_size": [4], "modality": "text"}, "several inputs need modality='features'"),
    "concat": ({"pooling": "concat", "latent_drop": 0.5}, "pooling='concat' needs a fixed number of latents"),
    "latent spacing": ({"latent_spacing": 0.0}, "latent_spacing must be greater than 0, got 0.0"),
    "latent drop": ({"latent_drop": 1.0}, r"latent_drop must be in \[0, 1\), got 1.0"),
    "rotary": ({"rotary_dim": 66}, r"rotary_dim must be even and at most head_dim \(64\), got 66"),
    "heads": ({"num_attention_heads": 7}, "num_attention_heads must divide the width of its queries"),
    "decoder of another width": ({"is_decoder": True, "input_size": 64}, "input_size must be 512, got 64"),
    "decoder without latents": ({"is_decoder": True, "num_latents": None}, "is_decoder=True needs num_latents"),
    "a wrong type": ({"num_latents": "8"}, "num_latents"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_that_cannot_be(name):
    arguments, message = CONFIGURATIONS[name]
    with pytest.raises(Exception, match=message):
        PerceiverFlashConfig(**arguments)


# Images


@pytest.mark.parametrize("encoding", ["fourier", "gaussian_fourier", "nerf", "learned", "none"])
@pytest.mark.parametrize("options", [{}, {"patch_size": 2, "project_image": True, "input_size": 20}], ids=str)
def test_images_of_other_sizes_and_orders(encoding, options):
    model = build(PerceiverFlashForImageClassification, **IMAGES, image_position_encoding=encoding, **options)
    for height, width in ((8, 12), (12, 8), (4, 16)):
        images = torch.randn(2, 2, height, width)
        logits = model(pixel_values=images).logits
        assert logits.shape == (2, 2)
        torch.testing.assert_close(model(pixel_values=images[1:]).logits, logits[1:])
        last = copy.deepcopy(model)
        last.model.image_adapter.config.channels_last = True
        torch.testing.assert_close(last(pixel_values=images.permute(0, 2, 3, 1)).logits, logits)
    with pytest.raises(ValueError, match="pixel_values must be floating point .* with 2 channels"):
        model(pixel_values=torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("stem, inputs", [("conv1x1", 8 * 12), ("conv", 1 * 2)])
def test_image_stems(stem, inputs):
    model = build(PerceiverFlashForImageClassification, **IMAGES, image_stem=stem, image_stem_channels=5)
    adapter = model.model.image_adapter
    assert adapter(torch.randn(2, 2, 8, 12)).shape == (2, inputs, model.config.input_size)
    assert model.config.image_grid(8, 12)[0] * model.config.image_grid(8, 12)[1] == inputs


def test_fourier_positions_are_those_of_the_paper():
    model = build(PerceiverFlashForImageClassification, **IMAGES)
    positions = model.model.image_adapter.positions(8, 12, torch.zeros(1))
    assert positions.shape == (96, 2 * (2 * 3 + 1))
    x, y = -1 + 2 * 3 / 7, -1 + 2 * 5 / 11  # row 3, column 5
    angles = [torch.pi * f * x for f in (1, 2.5, 4)] + [torch.pi * f * y for f in (1, 3.5, 6)]
    angles = torch.tensor(angles)
    expected = torch.cat([torch.tensor([x, y]), angles.sin(), angles.cos()])
    torch.testing.assert_close(positions[3 * 12 + 5], expected, rtol=1e-4, atol=1e-5)


def test_sequence_classification_reads_features_and_text():
    labels = torch.tensor([0, 1, 1])
    text = build(PerceiverFlashForSequenceClassification, **SIZES, pooling="query")
    assert text(torch.randint(3, VOCABULARY, (3, 9)), labels=labels).loss.isfinite()
    other = build(PerceiverFlashForSequenceClassification, **FEATURES)
    assert other(inputs=features(), attention_mask=padded(), labels=labels).loss.isfinite()
