"""What is Performer's own about its cache; that it changes nothing is in test_generation_contract.py."""

import pytest
import torch
from generation_models import CAUSAL, CONSTANT_STATE, causal_model, tokens
from transformers import DynamicCache


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_crop_of_what_was_not_recorded(name):
    """A sum does not know its summands; saying so beats a wrong state. (Every decoder here has a linear block.)"""
    model = causal_model(name)
    cache = DynamicCache(config=model.config)
    for piece in tokens(2, 7).split([4, 3], dim=1):
        model(piece, past_key_values=cache)
    with pytest.raises((RuntimeError, ValueError), match="crop|record"):
        cache.crop(-2)


@pytest.mark.parametrize("name", CONSTANT_STATE)
@torch.no_grad()
def test_cache_has_constant_size(name):
    model, sizes = causal_model(name), []
    cache = DynamicCache(config=model.config)
    for token, piece in enumerate(tokens(1, 80).split(1, dim=1), start=1):
        model(piece, past_key_values=cache)
        if token % 20 == 0:
            sizes.append(sum(tensor_bytes(layer) for layer in cache.layers))
    assert len(set(sizes)) == 1 and sizes[0] > 0, f"bytes after 20, 40, 60 and 80 tokens: {sizes}"


@torch.no_grad()
def test_a_step_writes_its_state_in_place():
    """One state exists, not two; but what a crop comes back to is left alone."""
    model = causal_model(CONSTANT_STATE[0])
    cache = DynamicCache(config=model.config)
    model(tokens(2, 5), past_key_values=cache)
    layer, token = cache.layers[0], tokens(2, 1)

    def storages():
        return [part.data_ptr() for part in layer.state]

    before = storages()
    model(token, past_key_values=cache)
    assert storages() == before
    cache.activate_past_recording()
    kept = [part.clone() for part in layer.state]
    model(token, past_key_values=cache)
    assert storages() != before
    cache.crop(-1)
    assert storages() == before
    assert all(torch.equal(part, known) for part, known in zip(layer.state, kept, strict=True))


def test_a_prompt_read_in_inference_mode_goes_on_outside_it():
    """Tensors of inference mode cannot be written to outside it."""
    model = causal_model(CONSTANT_STATE[0])
    prompt, token = tokens(2, 6).split([5, 1], dim=1)
    with torch.inference_mode():
        cache = model(prompt, use_cache=True).past_key_values
        expected = model(token.clone(), past_key_values=model(prompt, use_cache=True).past_key_values).logits
    with torch.no_grad():
        actual = model(token, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected.clone())


def tensor_bytes(value) -> int:
    """Bytes of storage of every tensor inside, views counted with all that they keep alive."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    return sum(map(tensor_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0
