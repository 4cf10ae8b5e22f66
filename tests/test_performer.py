"""What must hold of a Performer, whatever its options: causality, padding, the cache's size, gradients, heads.

Equalities of cached and uncached generation are in test_generation_contract.py, of the operation itself in
test_linear_attention.py, of converted checkpoints in test_conversion_*.py.
"""

import pytest
import torch
from generation_models import CAUSAL, CONSTANT_STATE, SIZES, VOCABULARY
from transformers import DynamicCache

from hf_efficient import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForConditionalGeneration,
    PerformerForMaskedLM,
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerModel,
)


LENGTH = 19
ENCODERS = {name: options for name, options in CAUSAL.items() if "reversible" not in name}


def make(model_class, dtype=torch.float32, **options):
    config = {**SIZES, "initializer_range": 0.2, **options}
    return model_class(PerformerConfig(**config)).to(dtype).eval()


def ids(rows=2, length=LENGTH):
    return torch.randint(3, VOCABULARY, (rows, length))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_means_causal(name):
    """Changing token t changes no logit before t, to the bit, and every one from t on."""
    model, tokens = make(PerformerForCausalLM, **CAUSAL[name]), ids()
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        for t in (1, 8, LENGTH - 1):
            changed = tokens.clone()
            changed[:, t] = (changed[:, t] + 7) % VOCABULARY
            after = model(changed, use_cache=False).logits
            assert torch.equal(before[:, :t], after[:, :t])
            assert (before[:, t] != after[:, t]).any()


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_looks_both_ways(name):
    model, tokens = make(PerformerModel, **ENCODERS[name]), ids()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 7) % VOCABULARY
    with torch.no_grad():
        before, after = (model(x).last_hidden_state for x in (tokens, changed))
    assert (before[:, -2] != after[:, -2]).any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_class", [PerformerForCausalLM, PerformerForMaskedLM])
@pytest.mark.parametrize("name", CAUSAL)
def test_padding_is_masked_exactly(name, model_class, side):
    """A padded row gives what it gives alone, and the ids under the padding do not matter at all."""
    model, tokens = make(model_class, torch.float64, **CAUSAL[name]), ids(1)
    padding = ids(1, 6)
    parts = (padding, tokens) if side == "left" else (tokens, padding)
    real = slice(6, None) if side == "left" else slice(LENGTH)
    mask = torch.zeros(1, LENGTH + 6, dtype=torch.long)
    mask[:, real] = 1
    padded = torch.cat(parts, dim=1)
    with torch.no_grad():
        alone = model(tokens).logits
        together = model(padded, attention_mask=mask).logits[:, real]
        other = model(torch.where(mask == 0, 5, padded), attention_mask=mask).logits[:, real]
    assert torch.allclose(alone, together, atol=1e-10)
    assert torch.equal(together, other)


@pytest.mark.parametrize("name", CONSTANT_STATE)
def test_cache_has_constant_size(name):
    """The state per layer and head does not grow; a local head's window stops growing at its reach."""
    model = make(PerformerForCausalLM, **CAUSAL[name])
    sizes = []
    with torch.no_grad():
        for length in (20, 60):
            layers = model(ids(1, length)).past_key_values.layers
            assert [layer.get_seq_length() for layer in layers] == [length] * len(layers)
            tensors = [
                tensor
                for layer in layers
                for tensor in (
                    layer.keys,
                    layer.values,
                    layer.log_scale,
                    layer.window_keys,
                    *layer.last_tokens.tokens.values(),
                )
                if tensor is not None
            ]
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors), (
                "a view keeps more alive"
            )
            sizes.append(sum(tensor.numel() for tensor in tensors))
    assert sizes[0] == sizes[1] > 0


def test_plain_dynamic_cache_is_refused():
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        make(PerformerForCausalLM)(ids(), past_key_values=DynamicCache())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["softmax", "local heads in one layer", "full attention last", "token shift"])
def test_checkpointed_gradients_are_the_plain_ones(name, reentrant):
    tokens, gradients = ids(), []
    model = make(PerformerForCausalLM, attention_output_dropout=0.1, feed_forward_dropout=0.1, **CAUSAL[name]).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(1)
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seq2seq", [False, True])
def test_reversible_gradients_are_those_of_autograd(seq2seq, training, monkeypatch):
    """In training (with dropout) and in evaluation, through `torch.autograd.grad`, also into the encoder's states."""
    options = {"reversible": True, "attention_output_dropout": 0.2, "feed_forward_dropout": 0.2}
    if seq2seq:
        options |= {"is_encoder_decoder": True, "cross_attention_feed_forward": True, "decoder_start_token_id": 1}
    model = make(
        PerformerForConditionalGeneration if seq2seq else PerformerForCausalLM, torch.float64, **options
    ).train(training)
    tokens = ids()

    def gradients():
        torch.manual_seed(2)
        loss = model(tokens, labels=tokens).loss
        return torch.autograd.grad(loss, list(model.parameters()))

    recomputed = gradients()
    from hf_efficient.modeling import performer, reversible

    def keeping_activations(hidden_states, context, blocks, parameters, recompute):
        return reversible._forward(hidden_states, context, blocks, None)[0]

    monkeypatch.setattr(performer, "reversible_stack", keeping_activations)
    for ours, expected in zip(recomputed, gradients(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-10)


def test_reversible_stack_stores_no_activations_per_block():
    """What a forward keeps for its backward does not grow with the depth; in a plain stack it does."""
    tokens = ids()

    def kept_numbers(**options):
        model, kept = make(PerformerForCausalLM, **options).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model(tokens, labels=tokens)
        return sum(t.numel() for t in kept if not isinstance(t, torch.nn.Parameter))

    sizes = {
        reversible: [kept_numbers(reversible=reversible, num_hidden_layers=layers) for layers in (2, 8)]
        for reversible in (True, False)
    }
    assert sizes[True][0] == sizes[True][1]
    assert sizes[False][1] > 3 * sizes[False][0]


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "scale_norm", "rezero"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["softmax", "relu", "optimal_positive", "local heads in one layer"])
def test_every_parameter_gets_a_gradient(name, gated, norm):
    options = {**CAUSAL[name], "norm_type": norm, "gated_feed_forward": gated}
    model, tokens = make(PerformerForCausalLM, **options).train(), ids()
    model(tokens, labels=tokens).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_feed_forward_chunks_change_nothing():
    torch.manual_seed(0)
    whole = make(PerformerForCausalLM)
    torch.manual_seed(0)
    chunked = make(PerformerForCausalLM, chunk_size_feed_forward=4)
    tokens = ids()
    with torch.no_grad():
        assert torch.allclose(whole(tokens).logits, chunked(tokens).logits, atol=1e-6)


def test_labels_of_every_head():
    tokens = ids()
    encoder = {"num_labels": 3}
    cases = [
        (make(PerformerForCausalLM), {"labels": tokens}, (2, LENGTH, VOCABULARY)),
        (make(PerformerForMaskedLM), {"labels": tokens}, (2, LENGTH, VOCABULARY)),
        (make(PerformerForMaskedLM, mlm_head_transform=True), {"labels": tokens}, (2, LENGTH, VOCABULARY)),
        (make(PerformerForSequenceClassification, **encoder), {"labels": torch.tensor([0, 2])}, (2, 3)),
        (make(PerformerForTokenClassification, **encoder), {"labels": tokens % 3}, (2, LENGTH, 3)),
    ]
    for model, labels, shape in cases:
        output = model(tokens, **labels)
        assert output.logits.shape == shape
        targets = labels["labels"]
        logits = output.logits
        if isinstance(model, PerformerForCausalLM):
            logits, targets = logits[:, :-1], targets[:, 1:]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        assert torch.allclose(output.loss, expected, atol=1e-5)
    model = make(PerformerForQuestionAnswering)
    start, end = torch.tensor([1, 4]), torch.tensor([3, LENGTH + 5])
    output = model(tokens, start_positions=start, end_positions=end)
    expected = torch.nn.functional.cross_entropy(output.start_logits, start)
    expected = (
        expected + torch.nn.functional.cross_entropy(output.end_logits[:1], end[:1])
    ) / 2  # the other is outside
    assert torch.allclose(output.loss, expected, atol=1e-5)


def test_seq2seq_loss_does_not_shift_twice():
    model = make(PerformerForConditionalGeneration, is_encoder_decoder=True, decoder_start_token_id=1)
    tokens, labels = ids(), ids(2, 7)
    labels[1, 4:] = -100
    output = model(tokens, labels=labels)
    inputs = torch.cat([torch.ones(2, 1, dtype=torch.long), labels[:, :-1]], dim=1)
    inputs[inputs == -100] = SIZES["pad_token_id"]
    logits = model(tokens, decoder_input_ids=inputs).logits
    assert torch.allclose(logits, output.logits, atol=1e-5)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_ignores_padding(pooling, side):
    model = make(PerformerForSequenceClassification, torch.float64, classifier_pooling=pooling, num_labels=3)
    tokens, padding = ids(1), torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((padding, tokens) if side == "left" else (tokens, padding), dim=1)
    with torch.no_grad():
        alone = model(tokens).logits
        assert torch.allclose(alone, model(padded, attention_mask=(padded != 0).long()).logits, atol=1e-10)
        # Without a mask the pooling still finds the padding by its id, but the attention looks at it.
        assert not torch.allclose(alone, model(padded).logits, atol=1e-10)


def test_sharing_and_tying_of_embeddings():
    options = {"is_encoder_decoder": True, "decoder_start_token_id": 1, "tie_word_embeddings": True}
    model = make(PerformerForConditionalGeneration, **options)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight is model.model.encoder.embed_tokens.weight
    model = make(PerformerForConditionalGeneration, **options, share_embeddings=False)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.model.encoder.embed_tokens.weight is not model.model.decoder.embed_tokens.weight
