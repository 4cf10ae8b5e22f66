"""BERT, GPT-2 and Llama become Performers with the same weights."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from hf_efficient.conversion.softmax_transformers import convert_softmax_transformer
from hf_efficient.conversion.weight_transfer import ConversionError


VOCABULARY, LENGTH = 41, 24
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA = {
    **BERT,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
MODELS = {
    "BERT base": (BertModel, BertConfig, BERT),
    "BERT masked": (BertForMaskedLM, BertConfig, BERT),
    "BERT masked untied": (BertForMaskedLM, BertConfig, {**BERT, "tie_word_embeddings": False, "hidden_act": "relu"}),
    "BERT classifier": (BertForSequenceClassification, BertConfig, {**BERT, "num_labels": 3}),
    "GPT-2 base": (GPT2Model, GPT2Config, GPT2),
    "GPT-2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "GPT-2 options": (
        GPT2LMHeadModel,
        GPT2Config,
        {**GPT2, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_inner": 40},
    ),
    "Llama base": (LlamaModel, LlamaConfig, LLAMA),
    "Llama": (LlamaForCausalLM, LlamaConfig, LLAMA),
    "Llama options": (
        LlamaForCausalLM,
        LlamaConfig,
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True},
    ),
}
HEADS = ["BERT masked", "GPT-2", "Llama"]


def build(name: str, spread: float = 0.1):
    """A random model in which every weight matters."""
    model_class, config_class, fields = MODELS[name]
    model = model_class(config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def result(model, *args, **kwargs) -> torch.Tensor:
    outputs = model(*args, **kwargs)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_full_attention_is_the_original(name):
    original = build(name)
    model, _ = convert_softmax_transformer(original, layer_types="full_attention")
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -7:] = 0
    extra = {"token_type_ids": torch.randint(2, (2, LENGTH))} if name.startswith("BERT") else {}
    for arguments in ({}, {"attention_mask": mask}, {"attention_mask": mask, **extra}):
        theirs, ours = result(original, ids, **arguments), result(model, ids, **arguments)
        if "attention_mask" in arguments and theirs.ndim == 3:
            theirs, ours = theirs[mask.bool()], ours[mask.bool()]
        assert (theirs - ours).abs().max() <= 1e-5, f"outputs reach {theirs.abs().max():.2f}"


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_linear_attention_approaches_the_original(name):
    """Same weights; the error falls with the number of features (queries and keys are small here)."""
    original = build(name, spread=0.05)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    theirs = original(ids).logits
    errors = []
    for features in (16, 64, 256, 1024):
        converted = [
            convert_softmax_transformer(original, num_random_features=features, feature_seed=seed)[0]
            for seed in range(4)
        ]
        errors.append(sum((model(ids).logits - theirs).square().mean() for model in converted).sqrt() / 2)
    print(name, [f"{error:.1e}" for error in errors])
    assert all(more < less for less, more in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < errors[0] / 4
    assert errors[-1] < 0.02 * theirs.std()


@pytest.mark.parametrize("name", HEADS)
def test_weights_are_the_same(name):
    original = build(name)
    linear, report = convert_softmax_transformer(original)
    full, _ = convert_softmax_transformer(original, layer_types="full_attention")
    for parameter, weight in full.named_parameters():
        assert torch.equal(weight, linear.get_parameter(parameter)), parameter
    assert sum(p.numel() for p in linear.parameters()) == sum(p.numel() for p in original.parameters())
    assert {report.fresh[name] for name in report.fresh if "projection" in name} == {"random features, new here"}
    assert not any(name in report.moved.values() for name in report.dropped)


@pytest.mark.parametrize("name", HEADS)
def test_fine_tuning_lowers_the_loss(name):
    model, _ = convert_softmax_transformer(build(name), feature_redraw_interval=4)
    model.train()
    ids = torch.randint(3, VOCABULARY, (4, LENGTH))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_generation(name):
    """Full attention continues as the original does; linear attention with a cache as without one."""
    original = build(name)
    prompt = torch.randint(3, VOCABULARY, (2, 5))
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    full, _ = convert_softmax_transformer(original, layer_types="full_attention")
    assert torch.equal(original.generate(prompt, **arguments), full.generate(prompt, **arguments))
    linear, _ = convert_softmax_transformer(original, layer_types=["linear_attention", "full_attention"])
    cached, uncached = (linear.generate(prompt, **arguments, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached)
    assert linear.generation_config.eos_token_id == original.generation_config.eos_token_id


@pytest.mark.parametrize("name", ["BERT classifier", "GPT-2", "Llama"])
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model, _ = convert_softmax_transformer(build(name))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_what_is_dropped_is_reported():
    _, report = convert_softmax_transformer(build("BERT base"))
    assert "the pooler" in report.dropped["pooler.dense.weight"]
    assert "pooler.dense.weight" in str(report)
    assert "dropout 0.1 behind the feed-forward" in str(report)


def test_refused():
    with pytest.raises(ConversionError, match="must be one of BertModel, .* got BertForTokenClassification"):
        convert_softmax_transformer(BertForTokenClassification(BertConfig(**BERT)))
    with pytest.raises(ConversionError, match="hidden_size must stay what the LlamaForCausalLM has"):
        convert_softmax_transformer(build("Llama"), hidden_size=64)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ConversionError, match="rope_type='default' .* only, got .*linear"):
        convert_softmax_transformer(LlamaForCausalLM(LlamaConfig(**{**LLAMA, "rope_parameters": rope})))
    with pytest.raises(ConversionError, match="is_decoder=False only, got True"):
        convert_softmax_transformer(BertModel(BertConfig(**BERT, is_decoder=True)))
    model = build("GPT-2")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConversionError, match="no counterpart: extra.bias, extra.weight"):
        convert_softmax_transformer(model)
