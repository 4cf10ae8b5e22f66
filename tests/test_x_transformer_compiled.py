"""An XTransformer under `torch.compile`, and what its fused attention holds in memory."""

import pytest
import torch
from generation_models import left_padded, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from x_transformer_models import SIZES, causal_model

from hf_efficient import XTransformerConfig, XTransformerForCausalLM


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rope", "much at once"])
@torch.no_grad()
def test_compiles_as_one_graph(name):
    model, (ids, mask) = causal_model(name), left_padded([9, 13])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(ids, attention_mask=mask, use_cache=False).logits
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-10)


OPTIONS = {
    "alibi": {"position_bias": "alibi", "rotary_positions": None},
    "t5 bias": {"position_bias": "t5", "rotary_positions": None},
    "cap, sinks, memory, groups": {
        "attn_logit_softcapping": 5.0,
        "learned_attention_sinks": True,
        "num_memory_key_values": 2,
        "num_key_value_heads": 2,
    },
    "window": {"sliding_window": 64},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_backward_pass_keeps_nothing_of_the_size_of_the_scores(name):
    """Neither the forward pass' tensors that wait for the backward pass, nor any single one of them."""
    length = 512
    model = XTransformerForCausalLM(XTransformerConfig(**{**SIZES, "num_hidden_layers": 1, **OPTIONS[name]})).train()
    ids, kept = tokens(1, length), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(ids, labels=ids)
    assert max(kept) < length * length / 4


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that any operation makes, forward and backward."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("name", OPTIONS)
def test_no_tensor_of_a_training_step_grows_with_the_square_of_the_length(name):
    """Twice as long, the largest tensor is at most twice as large; scores would be four times."""
    largest = []
    for length in (512, 1024):
        model = XTransformerForCausalLM(XTransformerConfig(**{**SIZES, "num_hidden_layers": 1, **OPTIONS[name]}))
        ids = tokens(1, length)
        with LargestTensor() as watcher:
            model.train()(ids, labels=ids).loss.backward()
        largest.append(watcher.largest)
    assert largest[1] <= 2.1 * largest[0] and largest[1] < 1024 * 1024
