"""XTransformers that read vectors, and vectors in front of tokens: causality, padding, caches, losses, refusals.

What they compute is compared with x-transformers in test_conversion_x_transformers_continuous.py and _images.py.
"""

import pytest
import torch
from generation_models import NEW_TOKENS, left_padded, tokens
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache, Trainer, TrainingArguments
from x_transformer_models import SIZES, T5, settled

from hf_efficient import XTransformerConfig, XTransformerForCausalLM, XTransformerForContinuousPrediction


LENGTH, SIZE = 9, 3
VECTORS = {"input_feature_size": SIZE, "output_feature_size": SIZE}
CASES = {
    "rope": {},
    "learned positions, norm": {"absolute_positions": "learned", "rotary_positions": None, "embedding_norm": True},
    "t5, memory tokens, shift": {**T5, "num_memory_tokens": 2, "shift_tokens": 1, "rotary_positions": None},
    "window": {"sliding_window": 4, "embedding_size": 16},
    "mean and variance": {"distribution_output": "normal"},
}


def make(name, is_decoder=True):
    torch.manual_seed(0)
    config = XTransformerConfig(**SIZES, **VECTORS, **CASES[name], is_decoder=is_decoder, initializer_range=0.3)
    return settled(XTransformerForContinuousPrediction(config)).double().eval()


def vectors(batch=2, length=LENGTH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, SIZE, generator=generator, dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_causal_means_causal(name):
    model = make(name)
    before, changed = model(vectors()).prediction, vectors()
    changed[:, 5] += 1
    after = model(changed).prediction
    assert torch.equal(before[:, :5], after[:, :5]) and (before[:, 5] != after[:, 5]).any()


@pytest.mark.parametrize("is_decoder", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_padding_is_masked_exactly(name, side, is_decoder):
    model, alone, padding = make(name, is_decoder), vectors(1), vectors(1, 4, seed=3)
    padded = torch.cat((padding, alone) if side == "left" else (alone, padding), dim=1)
    real = slice(4, None) if side == "left" else slice(LENGTH)
    mask = torch.zeros(1, LENGTH + 4)
    mask[:, real] = 1
    close(model(padded, attention_mask=mask).prediction[:, real], model(alone).prediction)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_generating_with_a_cache_gives_what_it_gives_without(name):
    """Left-padded, drawn from the distribution where there is one."""
    model = make(name)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    options = {"max_new_tokens": NEW_TOKENS, "attention_mask": mask}
    sequences = [
        model.generate(vectors(), **options, use_cache=use_cache, generator=torch.Generator().manual_seed(1))
        for use_cache in (True, False)
    ]
    close(*sequences)
    alone = model.generate(vectors()[1:, 4:], NEW_TOKENS, temperature=0)
    close(model.generate(vectors(), **options, temperature=0)[1:], alone)
    drawn = (sequences[0] != model.generate(vectors(), **options, temperature=0)).any()
    assert bool(drawn) == (name == "mean and variance")


@torch.no_grad()
def test_draws_have_the_predicted_mean_and_variance():
    model = make("mean and variance")
    output = model(vectors(1))
    many = vectors(1).expand(4000, -1, -1)
    drawn = model.generate(many, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    mean, variance = output.prediction[0, -1], output.variance[0, -1]
    error = (drawn.mean(0) - mean).abs() / variance.sqrt()
    assert (error < 5 / 4000**0.5).all()
    assert ((drawn.var(0) / variance - 1).abs() < 0.15).all()


@pytest.mark.parametrize("kind", ["mse", "l1", "normal"])
@pytest.mark.parametrize("is_decoder", [True, False])
@torch.no_grad()
def test_the_loss_is_the_mean_over_what_is_real(kind, is_decoder):
    model = make("mean and variance" if kind == "normal" else "rope", is_decoder)
    if kind == "l1":
        model.config.feature_loss = "l1"
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 6:] = 0
    labels = vectors(seed=2)
    loss = model(vectors(), attention_mask=mask, labels=labels).loss
    parts = []
    for row, length in ((0, LENGTH), (1, 6)):
        output = model(vectors()[row, None, :length])
        shift = 1 if is_decoder else 0
        mean, target = output.prediction[0, : length - shift], labels[row, shift:length]
        if kind == "normal":
            variance = output.variance[0, : length - shift]
            parts.append(0.5 * (variance.log() + (mean - target) ** 2 / variance))
        else:
            parts.append((mean - target).abs() ** (2 if kind == "mse" else 1))
    torch.testing.assert_close(loss, torch.cat(parts).mean())
    other = torch.where(mask[..., None] == 0, 7.0, labels)
    assert torch.equal(model(vectors(), attention_mask=mask, labels=other).loss, loss)


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter(name):
    model = make(name).train()
    model(vectors(), labels=vectors()).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_trainer_learns_a_circle_and_generate_goes_on_with_it(tmp_path):
    """Points on a circle, in steps of a fixed angle: the next one follows from the last two."""
    torch.manual_seed(0)
    model = XTransformerForContinuousPrediction(
        XTransformerConfig(**SIZES, input_feature_size=2, output_feature_size=2, is_decoder=True)
    )
    angles = torch.rand(64, 1) * 6.28 + torch.arange(16) * 0.5
    circles = torch.stack([angles.cos(), angles.sin()], dim=-1)
    rows = [{"input_features": circle, "labels": circle} for circle in circles]
    arguments = TrainingArguments(
        tmp_path, max_steps=150, learning_rate=3e-3, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=32, save_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    start = torch.tensor([0.3]) + torch.arange(14) * 0.5
    sequence = torch.stack([start.cos(), start.sin()], dim=-1)[None]
    assert (model.eval().generate(sequence[:, :8], 6) - sequence[:, 8:]).abs().max() < 0.25


def test_saved_and_loaded_to_the_bit(tmp_path):
    model = make("mean and variance")
    model.save_pretrained(tmp_path)
    again = XTransformerForContinuousPrediction.from_pretrained(tmp_path, dtype=torch.float64)
    for parameter in again.parameters():
        # Weights stand in the mapped file at any address, and on some processors MKL's sums depend on where.
        parameter.data = parameter.data.clone()
    assert torch.equal(again(vectors()).variance, model(vectors()).variance)


def test_bad_inputs_are_refused():
    decoder, encoder = make("rope"), make("rope", is_decoder=False)
    for call, message in (
        (lambda: decoder(vectors()[..., :2]), "input_features must be floating point of shape .batch, length, 3"),
        (lambda: decoder(vectors().long()), "floating point"),
        (lambda: decoder(vectors(), labels=vectors()[:, 1:]), r"labels must have shape \(2, 9, 3\)"),
        (lambda: encoder.generate(vectors(), 2), "needs is_decoder=True"),
        (lambda: decoder.generate(vectors(), 0), "max_new_tokens must be at least 1, got 0"),
        (lambda: decoder.generate(vectors(), 1, temperature=-1), "temperature must be at least 0, got -1"),
        (lambda: decoder.generate(vectors(), 1, torch.tensor([[1] * 8 + [0]] * 2)), "padding stands on the left"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    sizes = {**SIZES, "is_decoder": True}
    uneven = XTransformerForContinuousPrediction(
        XTransformerConfig(**sizes, input_feature_size=3, output_feature_size=2)
    )
    with pytest.raises(ValueError, match="output_feature_size must be 3, got 2"):
        uneven.generate(vectors().float(), 1)
    with pytest.raises(ValueError, match="needs output_feature_size, got None"):
        XTransformerForContinuousPrediction(XTransformerConfig(**sizes, distribution_output="normal"))
    with pytest.raises(StrictDataclassError, match="needs distribution_output=None"):
        XTransformerConfig(**sizes, distribution_output="normal", feature_loss="l1")


# Vectors in front of tokens

PREPENDING = {
    "rope": {},
    "learned positions": {"absolute_positions": "learned", "rotary_positions": None},
    "t5, memory tokens": {**T5, "num_memory_tokens": 2},
    "factorised, alibi": {"embedding_size": 16, "position_bias": "alibi", "rotary_positions": None},
}


def prepending(name, **more):
    torch.manual_seed(0)
    config = XTransformerConfig(**SIZES, **PREPENDING[name], prepend_embeddings=True, initializer_range=0.3, **more)
    return settled(XTransformerForCausalLM(config)).double().eval()


def in_front(model, length=4):
    return torch.randn(
        2, length, model.config.token_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", PREPENDING)
@torch.no_grad()
def test_generating_behind_prepended_vectors(name, options):
    """Some of them masked, the tokens padded on the left; and a row is what it is alone, without its padding."""
    model, (ids, mask) = prepending(name), left_padded([4, 7])
    front = in_front(model)
    seen = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    given = {"prepend_embeds": front, "prepend_mask": seen, "max_new_tokens": 6, "min_new_tokens": 6, **options}
    written = [model.generate(ids, attention_mask=mask, use_cache=cached, **given) for cached in (True, False)]
    assert torch.equal(*written)
    given |= {"prepend_embeds": front[:1], "prepend_mask": seen[:1]}
    alone = model.generate(ids[:1, 3:], **given)
    assert torch.equal(written[0][:1, 3:], alone)
    if not model.config.num_memory_tokens:  # which would stand nearer
        without = {**given, "prepend_embeds": front[1:, 2:], "prepend_mask": None}
        assert torch.equal(written[0][1:], model.generate(ids[1:], **without))
    given["prepend_embeds"] = -front[:1]
    assert not torch.equal(alone, model.generate(ids[:1, 3:], **given))


@pytest.mark.parametrize("name", PREPENDING)
@torch.no_grad()
def test_any_split_behind_prepended_vectors(name):
    model, ids = prepending(name), tokens(2, LENGTH)
    front = in_front(model)
    whole = model(ids, prepend_embeds=front, use_cache=False).logits
    cache, pieces, seen = DynamicCache(config=model.config), [], 0
    for count in (3, 1, 5):
        given = {"prepend_embeds": front} if seen == 0 else {}
        pieces.append(model(ids[:, seen : seen + count], past_key_values=cache, **given).logits)
        seen += count
    close(torch.cat(pieces, dim=1), whole)


@torch.no_grad()
def test_prepended_states_can_be_kept():
    model = prepending("t5, memory tokens")
    front, ids = in_front(model), left_padded([5, 7])
    arguments = {"attention_mask": ids[1], "prepend_embeds": front, "use_cache": False}
    without = model.model(ids[0], **arguments).last_hidden_state
    kept = model.model(ids[0], **arguments, keep_prepended=True).last_hidden_state
    assert kept.shape == (2, 4 + 7, 32)
    assert torch.equal(kept[:, 4:], without)
    alone = model.model(ids[0][:1, 2:], prepend_embeds=front[:1], use_cache=False, keep_prepended=True)
    close(kept[:1, :4], alone.last_hidden_state[:, :4])


def test_prepended_vectors_that_do_not_fit_are_refused():
    model, ids = prepending("rope"), tokens(2, LENGTH)
    plain = XTransformerForCausalLM(XTransformerConfig(**SIZES)).double()
    front = in_front(model)
    for call, message in (
        (lambda: model(ids, prepend_embeds=front[:1]), r"prepend_embeds must have shape \[2, length, 32\]"),
        (lambda: model(ids, prepend_mask=torch.ones(2, 4)), "prepend_mask needs prepend_embeds"),
        (lambda: model(ids, prepend_embeds=front, prepend_mask=torch.ones(2, 3)), r"must have shape \(2, 4\)"),
        (lambda: plain(ids, prepend_embeds=front, use_cache=True), "needs? a model with prepend_embeddings=True"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
