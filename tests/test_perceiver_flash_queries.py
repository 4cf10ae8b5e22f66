"""PerceiverFlash: queries that pool, and models without any."""

import pytest
import torch
from perceiver_flash_models import FEATURES, build, features

from hf_efficient import (
    PerceiverFlashConfig,
    PerceiverFlashForSequenceClassification,
    PerceiverFlashIOModel,
    PerceiverFlashModel,
)


def test_a_query_can_pool():
    """What `PerceiverFlashModel` returns with `output_size`, as with the other ways of pooling."""
    model = build(PerceiverFlashModel, **FEATURES, pooling="query")
    output = model(inputs=features(), output_hidden_states=True)
    expected = model.pooler(output.last_hidden_state)
    assert output.pooler_output.shape == (3, 5) and expected.shape == (3, 1, 5)
    torch.testing.assert_close(output.pooler_output, expected[:, 0])
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    output.pooler_output.sum().backward()
    assert model.pooler.queries.grad.abs().sum() > 0


def test_heads_of_queries_matter_where_there_are_queries():
    sizes = {**FEATURES, "hidden_size": 20, "num_attention_heads": 2, "num_cross_attention_heads": 2}
    sizes |= {"num_query_attention_heads": 8}
    config = build(PerceiverFlashModel, **sizes).config
    assert config.query_head_dim is None and PerceiverFlashConfig.from_dict(config.to_dict()).query_head_dim is None
    assert build(PerceiverFlashForSequenceClassification, **sizes)(inputs=features()).logits.isfinite().all()
    message = r"num_query_attention_heads must divide the width of its queries \(10\) .*, got 8"
    for kind, options in (
        (PerceiverFlashIOModel, {}),
        (PerceiverFlashForSequenceClassification, {"pooling": "query"}),
    ):
        with pytest.raises(ValueError, match=message):
            build(kind, **sizes, **options)
        build(kind, **sizes, **options, query_head_dim=4)


ROTARY = {**FEATURES, "position_embedding_type": "rotary", "query_rotary_dim": 4}


def test_latents_stand_apart():
    """`latent_spacing` is where they stand if nobody says so, for the inputs they read and the queries they answer."""
    model = build(PerceiverFlashIOModel, **ROTARY, latent_spacing=1.5)
    inputs, queries = features(), torch.randn(7, 10)
    positions = torch.arange(8)[None] * 1.5
    output = model(inputs=inputs, queries=queries).last_hidden_state
    torch.testing.assert_close(
        model(inputs=inputs, queries=queries, latent_position_ids=positions).last_hidden_state, output
    )
    model.config.latent_spacing = 1.0
    assert (model(inputs=inputs, queries=queries).last_hidden_state - output).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [PerceiverFlashIOModel, PerceiverFlashForSequenceClassification])
def test_latents_that_stay_keep_their_positions(kind):
    """Queries find the latents that `latent_drop` leaves where they stood."""
    model = build(kind, **ROTARY, latent_drop=0.5, latent_spacing=3, pooling="query").train()
    inputs = {"inputs": features()}
    torch.manual_seed(0)
    latents = model.model(**inputs)
    assert latents.latent_position_ids.shape == (3, 4)
    assert (latents.latent_position_ids % 3 == 0).all() and latents.latent_position_ids.max() > 4 * 3 - 1
    torch.manual_seed(0)
    states, positions = latents.last_hidden_state, latents.latent_position_ids
    if kind is PerceiverFlashIOModel:
        queries = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
        output, decoder = model(**inputs, queries=queries).last_hidden_state, model.decoder
        expected = decoder(states, queries, None, positions)
        without = decoder(states, queries)
    else:
        output, decoder = model(**inputs).logits, model.classifier.decoder
        expected = decoder(states, latent_position_ids=positions)[:, 0]
        without = decoder(states)[:, 0]
    torch.testing.assert_close(output, expected)
    assert (without - expected).abs().max() > 1e-5
