"""What is Perceiver AR's own about its cache; that it changes nothing is in test_generation_contract.py."""

import pytest
import torch
from generation_models import tokens
from perceiver_flash_models import causal_model
from transformers import DynamicCache

from hf_efficient.modeling.perceiver_flash_window import window_start


def test_latents_keep_their_size_and_the_input_grows():
    model, ids = causal_model("learned positions"), tokens(1, 40)
    cache = DynamicCache(config=model.config)
    for start in range(40):
        model(ids[:, start : start + 1], past_key_values=cache)
        assert cache.layers[0].get_seq_length() == start + 1
        assert cache.layers[1].get_seq_length() == start + 1 - window_start(start + 1, 8, 4) <= 8
        assert cache.layers[0].recent.shape[1] <= 8


@pytest.mark.parametrize("count, stride", [(8, 4), (8, 1), (8, 8), (5, 2)])
def test_window_start(count, stride):
    lengths = torch.arange(60)
    starts = window_start(lengths, count, stride)
    for length in range(60):
        expected = next(start for start in range(0, 100, stride) if length - start <= count)
        assert window_start(length, count, stride) == starts[length] == expected
