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
