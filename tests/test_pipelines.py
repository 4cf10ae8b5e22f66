"""transformers' pipelines take our models like any other (its own tests of pipelines need models on the Hub)."""

import pytest
import torch
from generation_models import decisive
from transformers import ByT5Tokenizer, pipeline

from hf_efficient import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerModel,
)


TEXTS = ["Gold is where you find it.", "Yes."]
SIZES = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return ByT5Tokenizer(mask_token="<extra_id_0>")


def make(task, model_class, tokenizer, **options):
    torch.manual_seed(0)
    return pipeline(task, model=model_class(PerformerConfig(**SIZES)).eval(), tokenizer=tokenizer, **options)


def test_text_generation(tokenizer, caplog):
    torch.manual_seed(0)
    model = decisive(PerformerForCausalLM(PerformerConfig(**SIZES, tie_word_embeddings=False)))
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    # A batch is padded on the left and has to give what each text gives alone.
    tokenizer.padding_side = "left"
    options = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True}
    together = generate(TEXTS, batch_size=2, **options)
    alone = [generate(text, **options) for text in TEXTS]
    for batched, single in zip(together, alone, strict=True):
        assert batched[0]["generated_token_ids"][-8:] == single[0]["generated_token_ids"][-8:]
    assert "not supported" not in caplog.text


def test_fill_mask(tokenizer):
    candidates = make("fill-mask", PerformerForMaskedLM, tokenizer)(f"G{tokenizer.mask_token}ld", top_k=3)
    assert len(candidates) == 3
    assert candidates[0]["score"] >= candidates[1]["score"] >= candidates[2]["score"] > 0


@pytest.mark.parametrize(
    "task, model_class, keys",
    [
        ("text-classification", PerformerForSequenceClassification, {"label", "score"}),
        ("token-classification", PerformerForTokenClassification, {"entity", "score", "word"}),
    ],
)
def test_classification(tokenizer, task, model_class, keys):
    classify = make(task, model_class, tokenizer)
    together, alone = classify(TEXTS, batch_size=2), [classify(text) for text in TEXTS]
    for batched, single in zip(together, alone, strict=True):
        batched, single = (value if isinstance(value, list) else [value] for value in (batched, single))
        assert len(batched) == len(single) > 0
        for one, other in zip(batched, single, strict=True):
            assert keys <= one.keys()
            assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_feature_extraction(tokenizer):
    together = make("feature-extraction", PerformerModel, tokenizer)(TEXTS, batch_size=2)
    assert [torch.tensor(features).shape[-1] for features in together] == [32, 32]
