"""Attention to the input in chunks equals attention to all of it at once, and so do its gradients."""

import pytest
import torch
from helpers import assert_within_budget
from perceiver_flash_models import FEATURES, SIZES, VOCABULARY, build, features, padded

from hf_efficient import PerceiverFlashForCausalLM, PerceiverFlashModel
from hf_efficient.modeling import perceiver_flash


@pytest.mark.parametrize("mask", [None, padded()])
@pytest.mark.parametrize("chunk_size", [1, 4, 10])
def test_chunks_change_neither_result_nor_gradients(mask, chunk_size):
    options = {**FEATURES, "num_zero_tokens": 2, "num_cross_attention_layers": 2, "position_embedding_type": "rotary"}
    oracle = build(PerceiverFlashModel, double=True, **options)
    whole = build(PerceiverFlashModel, **options)
    chunked = build(PerceiverFlashModel, **options, cross_attention_chunk_size=chunk_size)
    with torch.no_grad():
        arguments = {"inputs": features(), "attention_mask": mask}
        results = [model(**arguments).last_hidden_state for model in (chunked, whole)]
        exact = oracle(inputs=features().double(), attention_mask=mask).last_hidden_state
    assert_within_budget(results[0], exact, results[1], "output")
    gradients = []
    for model in (chunked.double(), oracle):
        inputs = features().double().requires_grad_()
        model(inputs=inputs, attention_mask=mask).last_hidden_state.square().sum().backward()
        parameters = {name: parameter.grad for name, parameter in model.named_parameters() if "pooler" not in name}
        gradients.append({"inputs": inputs.grad, **parameters})
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12 * expected.abs().max().item(), msg=name)


def test_long_inputs_come_in_chunks_by_themselves(monkeypatch):
    """On a CPU, if nobody asks for what chunks do not have."""
    numbers = build(PerceiverFlashModel, **FEATURES).layers[0].attention.k_proj.out_features * 2
    monkeypatch.setattr(perceiver_flash, "CPU_CHUNK", 4 * numbers)
    options = {**FEATURES, "position_embedding_type": "rotary", "implementation": "sdpa"}
    model, whole = (build(PerceiverFlashModel, **options, cross_attention_chunk_size=size) for size in ("auto", None))
    assert build(PerceiverFlashModel, **options).config.cross_attention_chunk_size == "auto"
    sizes = []
    model.layers[0].register_forward_pre_hook(lambda *call: sizes.append(call[2].get("chunk_size")), with_kwargs=True)
    expected = whole(inputs=features()).last_hidden_state
    torch.testing.assert_close(model(inputs=features()).last_hidden_state, expected)
    model(inputs=features()[:, :4])
    assert sizes == [4, None]
    model.set_attn_implementation("eager")
    output = model(inputs=features(), output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state, expected)
    assert sizes == [4, None, None] and output.attentions[0].shape[-1] == features().shape[1]


def test_chunks_of_a_causal_prefix():
    options = {**SIZES, "position_embedding_type": "rotary"}
    whole, chunked = (
        build(PerceiverFlashForCausalLM, double=True, **options, cross_attention_chunk_size=size) for size in (None, 4)
    )
    ids = torch.randint(3, VOCABULARY, (3, 19))
    for mask in (None, padded((19, 12, 15), 19), padded((19, 12, 15), 19).flip(1)):
        losses = [model(ids, attention_mask=mask, labels=ids, use_cache=False).loss for model in (whole, chunked)]
        torch.testing.assert_close(*losses)
        for model, loss in zip((whole, chunked), losses, strict=True):
            model.zero_grad()
            loss.backward()
        for (name, one), two in zip(whole.named_parameters(), chunked.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_drops_the_same_weights_in_the_backward_pass():
    """A step along the gradient changes the loss as the gradient says, with the same seed."""
    options = {**FEATURES, "cross_attention_chunk_size": 4, "cross_attention_dropout": 0.5}
    model = build(PerceiverFlashModel, double=True, **options).train()
    inputs = features().double().requires_grad_()

    def loss(x):
        torch.manual_seed(7)
        return model(inputs=x).last_hidden_state.sin().sum()

    loss(inputs).backward()
    direction = torch.randn_like(inputs)
    with torch.no_grad():
        slope = (loss(inputs + 1e-6 * direction) - loss(inputs - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((inputs.grad * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_iterator_of_chunks_is_never_whole():
    options = {**FEATURES, "num_zero_tokens": 2, "position_embedding_type": "rotary"}
    model = build(PerceiverFlashModel, **options)
    inputs, mask = features(), padded()
    whole = model(inputs=inputs, attention_mask=mask).last_hidden_state
    pieces = iter(zip(inputs.split(4, dim=1), mask.split(4, dim=1), strict=True))
    positions = model(inputs=pieces).last_hidden_state
    torch.testing.assert_close(positions, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="inputs must hold at least one chunk"):
        model(inputs=iter([]))
    with torch.enable_grad(), pytest.raises(ValueError, match=r"needs torch.no_grad\(\)"):
        model(inputs=iter([inputs]))
