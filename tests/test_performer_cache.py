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


def tensor_bytes(value) -> int:
    """Bytes of storage of every tensor inside, views counted with all that they keep alive."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    return sum(map(tensor_bytes, vars(value).values())) if hasattr(value, "__dict__") else 0
