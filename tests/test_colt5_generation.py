"""What is CoLT5's own about its cache; that it changes nothing is in test_generation_contract.py."""

import pytest
import torch
from colt5_models import CAUSAL, causal_model
from generation_models import tokens
from transformers import DynamicCache, StaticCache


causal = pytest.mark.parametrize("model", [pytest.param(name, id=name) for name in CAUSAL], indirect=True)


@pytest.fixture
def model(request):
    return causal_model(request.param)


@causal
@torch.no_grad()
def test_the_cache_is_cropped_reordered_selected_and_static(model):
    ids, order = tokens(3, 30), torch.tensor([2, 0, 0])
    whole = model(ids, use_cache=False).logits
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=64)):
        first = model(ids[:, :21], past_key_values=cache).logits
        torch.testing.assert_close(first, whole[:, :21], rtol=0, atol=1e-10)
        cache.activate_past_recording()
        model(tokens(3, 5, seed=7), past_key_values=cache)
        cache.crop(-5)
        model(torch.cat([ids[:, 21:23], tokens(3, 2, seed=8)], dim=1), past_key_values=cache)
        cache.crop(-2)
        assert cache.get_seq_length() == 23
        cache.reorder_cache(order)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 5]))
        rest = model(ids[order][:, 23:], past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[order][:, 23:], rtol=0, atol=1e-10)
        with pytest.raises(RuntimeError, match="can remove the 7 tokens it has recorded.*got 8"):
            cache.crop(-8)
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_heavy_cache_holds_the_routed_tokens_only():
    model, ids = causal_model("paper"), tokens(1, 200)
    cache = DynamicCache(config=model.config)
    for piece in ids.split(1, dim=1):
        model(piece, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.window_keys.shape[2] == 3 and layer.histories["queries"].mask.shape[1] == 7
    assert layer.keys.shape[3] <= 5 * (200 // 8 + 2)  # 9/8 of half a window of 8, rounded up
    assert all(history.logits.untyped_storage().nbytes() == 8 * 7 for history in layer.histories.values()), [
        (name, history.logits.shape, history.logits.dtype) for name, history in layer.histories.items()
    ]


def test_a_cache_of_another_model_is_refused():
    model = causal_model("paper")
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(tokens(2, 7), past_key_values=DynamicCache())


@causal
@torch.no_grad()
def test_repeated_tokens_are_ties_that_always_go_the_same_way(model):
    """In the first layer equal tokens have equal logits: rounding must not decide which of them is routed."""
    ids = torch.tensor([[5] * 30, [5, 5, 9] * 10, [7] * 15 + [5] * 15])
    whole, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([1, 1, 1, 9, 1, 3, 14], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-10)
    for row in range(3):
        alone = model(ids[row : row + 1], use_cache=False).logits[0]
        torch.testing.assert_close(alone, whole[row], rtol=0, atol=1e-10)
