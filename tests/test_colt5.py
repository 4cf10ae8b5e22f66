"""What must hold of a CoLT5: the paper's sizes, padding, what it tells of its routing, gradients, heads, loading."""

import pytest
import torch
from colt5_models import CAUSAL, ENCODERS, SIZES, VOCABULARY, causal_model, make
from huggingface_hub.errors import StrictDataclassError

from hf_efficient import (
    CoLT5Config,
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForImageClassification,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5Model,
)


LENGTH = 40
HEADS = {
    CoLT5ForConditionalGeneration: {"labels": (2, 7)},
    CoLT5ForCausalLM: {"labels": (2, LENGTH)},
    CoLT5ForSequenceClassification: {"num_labels": 3},
    CoLT5ForQuestionAnswering: {},
    CoLT5ForImageClassification: {"num_labels": 3},
}


def ids(rows=2, length=LENGTH):
    return torch.randint(3, VOCABULARY, (rows, length))


def training_inputs(model_class):
    if model_class is CoLT5ForImageClassification:
        return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    if model_class is CoLT5ForSequenceClassification:
        return {"input_ids": ids(), "labels": torch.tensor([0, 1])}
    if model_class is CoLT5ForQuestionAnswering:
        return {"input_ids": ids(), "start_positions": torch.tensor([1, 5]), "end_positions": torch.tensor([4, 9])}
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens if model_class is CoLT5ForCausalLM else ids(2, 7)}


@pytest.mark.parametrize(
    ("millions", "sizes"),
    [
        (433, {}),
        (1462, {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2816}),
        (5297, {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 32, "intermediate_size": 5120}),
    ],
    ids=["base", "large", "xl"],
)
def test_sizes_are_the_papers(millions, sizes):
    with torch.device("meta"):
        model = CoLT5ForConditionalGeneration(CoLT5Config(**sizes))
    # The paper does not say what it counts; norms and biases are less than a million.
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_padded_batches_equal_single_rows(name, side):
    model = make(CoLT5EncoderModel, torch.float64, **ENCODERS[name])
    lengths, tokens = (LENGTH, 23, 1), ids(3)
    mask = torch.zeros(3, LENGTH, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(LENGTH - length, None) if side == "left" else slice(length)] = 1
    with torch.no_grad():
        together = model(tokens, attention_mask=mask).last_hidden_state
        other = model(torch.where(mask == 0, 5, tokens), attention_mask=mask).last_hidden_state
        assert torch.equal(together[mask == 1], other[mask == 1])
        flipped = model(tokens.flip(0), attention_mask=mask.flip(0)).last_hidden_state.flip(0)
        torch.testing.assert_close(flipped[mask == 1], together[mask == 1], rtol=0, atol=1e-10)
        # The angles of rotary positions are float32, and padding on the left moves them.
        tolerance = 1e-5 if side == "left" else 1e-10
        for row in range(3):
            alone = model(tokens[row, mask[row] == 1][None]).last_hidden_state[0]
            torch.testing.assert_close(together[row, mask[row] == 1], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("model_class", [CoLT5Model, CoLT5EncoderModel, *HEADS], ids=lambda c: c.__name__)
@torch.no_grad()
def test_neighbours_in_a_batch_and_their_order_do_not_matter(model_class, sets):
    """Every class: a padded batch, its reverse, and each of its rows alone, whatever stands at the padding."""
    model = make(model_class, torch.float64, num_key_value_sets=sets)
    if model_class is CoLT5ForImageClassification:
        inputs, lengths = {"pixel_values": torch.randn(3, 3, 16, 16, dtype=torch.float64)}, None
    else:
        lengths = torch.tensor([LENGTH, 23, 1])
        inputs = {"input_ids": ids(3), "attention_mask": (torch.arange(LENGTH) < lengths[:, None]).long()}
    if model_class in (CoLT5Model, CoLT5ForConditionalGeneration):
        inputs["decoder_input_ids"] = ids(3, 6)
    together = model(**inputs)[0]
    torch.testing.assert_close(
        model(**{name: tensor.flip(0) for name, tensor in inputs.items()})[0].flip(0), together, rtol=0, atol=1e-10
    )
    if lengths is not None:
        garbage = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 5)
        assert torch.equal(model(**inputs | {"input_ids": garbage})[0][0], together[0])
    by_token = model_class in (CoLT5EncoderModel, CoLT5ForCausalLM, CoLT5ForQuestionAnswering)
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        length = None if lengths is None else int(lengths[row])
        if length is not None:
            alone = {**alone, "input_ids": alone["input_ids"][:, :length], "attention_mask": None}
        expected = model(**alone)[0][0]
        found = together[row, :length] if by_token else together[row]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["paper", "two sets of keys", "numbers of tokens"])
@torch.no_grad()
def test_left_padded_causal_batches_equal_single_rows(name):
    model, tokens, lengths = causal_model(name), ids(3), (LENGTH, 23, 2)
    mask = (torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]).long()
    together = model(tokens, attention_mask=mask).logits
    flipped = model(tokens.flip(0), attention_mask=mask.flip(0)).logits.flip(0)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, -length:]).logits[0]
        for batch in (together, flipped):
            torch.testing.assert_close(batch[row, -length:], alone, rtol=0, atol=1e-8 * alone.abs().max().item())


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_causal_means_causal(name):
    model, tokens = causal_model(name), ids()
    before = model(tokens, use_cache=False).logits
    for t in (1, 8, LENGTH - 1):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 7) % VOCABULARY
        after = model(changed, use_cache=False).logits
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).any()


@torch.no_grad()
def test_the_encoder_looks_everywhere():
    model, tokens = make(CoLT5EncoderModel, num_routed_queries=1.0, num_routed_keys=1.0), ids()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 7) % VOCABULARY
    before, after = (model(x).last_hidden_state for x in (tokens, changed))
    assert (before[:, 0] != after[:, 0]).any()


@torch.no_grad()
def test_the_routing_is_returned():
    """Per layer: the routing of queries, keys and feed-forward, as the blocks used them."""
    model, tokens = make(CoLT5ForConditionalGeneration, num_key_value_sets=3), ids()
    mask = torch.ones_like(tokens)
    mask[1, 20:] = 0
    output = model(tokens, attention_mask=mask, decoder_input_ids=ids(2, 3), output_router_logits=True)
    assert len(output.encoder_router_logits) == 3 * 2
    assert model(tokens, decoder_input_ids=ids(2, 3)).encoder_router_logits is None
    for index, routing in enumerate(output.encoder_router_logits):
        kind = index % 3
        count, routes = ((10, 1), (20, 3), (10, 1))[kind]
        assert routing.indices.shape == routing.scores.shape == routing.mask.shape == (2, routes, count)
        assert routing.mask.sum(-1).tolist() == [[count] * routes, [count // 2] * routes]
        assert (routing.indices[1][routing.mask[1]] < 20).all()
        best = routing.logits[0].topk(count).values
        assert torch.equal(routing.logits[0].gather(-1, routing.indices[0]).sort(descending=True).values, best)
    states = model.get_encoder()(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    again = model.model.encoder.layers[0].self_attn.heavy_attn.q_router.logits(states[0])
    assert torch.equal(again, output.encoder_router_logits[0].logits)
    causal = make(CoLT5ForCausalLM)(tokens, output_router_logits=True)
    assert len(causal.router_logits) == 6 and causal.router_logits[0].logits.shape == (2, 1, LENGTH)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_class", HEADS, ids=lambda c: c.__name__)
def test_checkpointed_gradients_are_the_plain_ones(model_class, reentrant):
    model, inputs, gradients = make(model_class, dropout_rate=0.1).train(), training_inputs(model_class), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant and "input_ids" not in inputs:
                model.get_input_embeddings().weight.requires_grad_()
        model.zero_grad()
        torch.manual_seed(1)
        model(**inputs).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        # Reentrant checkpoints add up what the decoder's layers say of the encoder's states in another order.
        assert torch.allclose(plain, again, atol=1e-6) if reentrant else torch.equal(plain, again)


@pytest.mark.parametrize("name", ["paper", "relative bias", "null tokens"])
@pytest.mark.parametrize("model_class", HEADS, ids=lambda c: c.__name__)
def test_every_parameter_gets_a_gradient(model_class, name):
    model = make(model_class, **ENCODERS[name]).train()
    model(**training_inputs(model_class)).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_losses_of_the_heads():
    tokens = ids()
    output = make(CoLT5ForCausalLM)(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    model = make(CoLT5ForConditionalGeneration)
    labels = ids(2, 7)
    labels[1, 4:] = -100
    output = model(tokens, labels=labels)
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]], dim=1)
    logits = model(tokens, decoder_input_ids=shifted.masked_fill(shifted == -100, 0)).logits
    torch.testing.assert_close(logits, output.logits)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    for model_class in (CoLT5ForSequenceClassification, CoLT5ForImageClassification):
        inputs = training_inputs(model_class)
        output = make(model_class, num_labels=3)(**inputs)
        assert output.logits.shape == (2, 3)
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, inputs["labels"]))


def test_pooling_ignores_padding():
    model, tokens = make(CoLT5ForSequenceClassification, torch.float64, num_labels=3), ids(1)
    mask = torch.zeros(1, LENGTH + 4, dtype=torch.long)
    mask[:, :LENGTH] = 1
    with torch.no_grad():
        padded = model(torch.cat([tokens, ids(1, 4)], dim=1), attention_mask=mask).logits
        torch.testing.assert_close(padded, model(tokens).logits, rtol=0, atol=1e-10)


def test_the_encoder_of_a_pretrained_model_becomes_a_classifier(tmp_path):
    whole = make(CoLT5ForConditionalGeneration)
    whole.save_pretrained(tmp_path)
    for model_class in (CoLT5EncoderModel, CoLT5ForSequenceClassification, CoLT5ForQuestionAnswering):
        model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["unexpected_keys"] and not [key for key in report["missing_keys"] if "encoder" in key]
        encoder = model.encoder if model_class is CoLT5EncoderModel else model.model.encoder
        for name, tensor in whole.model.encoder.state_dict().items():
            assert torch.equal(tensor, encoder.state_dict()[name]), name


@pytest.mark.parametrize("model_class", [CoLT5ForConditionalGeneration, CoLT5ForCausalLM], ids=lambda c: c.__name__)
def test_bf16_and_autocast(model_class):
    inputs = training_inputs(model_class)
    oracle = make(model_class, torch.float64)(**inputs).loss
    half = make(model_class, torch.bfloat16)
    half(**inputs).loss.backward()
    assert abs(half(**inputs).loss - oracle) < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        mixed = make(model_class)(**inputs).loss
    mixed.backward()
    assert abs(mixed - oracle) < 0.3


CONFIGURATIONS = {
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    "a wrong type": ({"hidden_size": "32"}, "hidden_size.*expected int, got str"),
    "an unknown method": ({"routing_method": "sinkhorn"}, "routing_method.*sinkhorn"),
    "no tokens": ({"num_routed_queries": 0}, "num_routed_queries must be a number of tokens.*got 0"),
    "too large a fraction": ({"num_routed_tokens": 1.5}, "num_routed_tokens must be .*got 1.5"),
    "a sure dropout": ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
    "key heads that do not divide": (
        {"cross_attention_key_value_heads": 3},
        r"cross_attention_key_value_heads must divide num_attention_heads \(4\), got 3",
    ),
    "sets that do not divide": (
        {"num_key_value_sets": 2},
        r"num_key_value_sets must divide num_heavy_attention_heads \(3\), got 2",
    ),
    "an odd rotary head": ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
    "odd buckets": ({"relative_attention_num_buckets": 7}, "must be even and at least 4, got 7"),
    "near buckets": ({"relative_attention_max_distance": 16}, r"must be above half of .*\(32\), got 16"),
    "a static decoder": (
        {"static_routing": True, "is_decoder": True, "is_encoder_decoder": False},
        "static_routing=True belongs to an encoder",
    ),
    "a cold router": ({"routing_temperature": 0}, "routing_temperature must be above 0, got 0"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(name):
    options, message = CONFIGURATIONS[name]
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        CoLT5Config(**{**SIZES, **options})


def test_bad_inputs():
    model = make(CoLT5ForConditionalGeneration)
    with pytest.raises(ValueError, match="input_ids must be between 0 and 60"):
        model(ids() + VOCABULARY, decoder_input_ids=ids(2, 3))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 40\).*got \(2, 39\)"):
        model(ids(), attention_mask=torch.ones(2, 39), decoder_input_ids=ids(2, 3))
    with pytest.raises(
        ValueError, match="exactly one of decoder_input_ids and decoder_inputs_embeds must be given, got neither"
    ):
        model(ids())
    with pytest.raises(ValueError, match=r"image_size must be a multiple of .*\(8\), got 12"):
        make(CoLT5ForImageClassification, image_size=12)
    with pytest.raises(ValueError, match="that 2 divides, got 15 and 16"):
        make(CoLT5ForImageClassification)(torch.zeros(1, 3, 15, 16))
