"""ScaleNorm: its definition, and vectors of zeros."""

import pytest
import torch
from helpers import assert_within_budget

from hf_efficient import PerformerConfig, PerformerForMaskedLM
from hf_efficient.modeling.norms import ScaleNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_norm_is_its_definition(dtype):
    states, norm = torch.randn(3, 5, 16, dtype=torch.float64).to(dtype), ScaleNorm(1e-5).to(dtype)
    norm.g.data.fill_(1.5)
    oracle = 1.5 * states.double() / states.double().square().sum(-1, keepdim=True).sqrt()
    eager = (1.5 * states.float() / states.float().norm(dim=-1, keepdim=True)).to(dtype)
    if dtype == torch.float64:
        torch.testing.assert_close(norm(states), oracle, rtol=1e-14, atol=0)
        norm.double().requires_grad_(False)
        assert torch.autograd.gradcheck(norm, states[:1, :2].requires_grad_())
    else:
        assert_within_budget(norm(states), oracle, eager, "scale norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_norm_gives_vectors_of_zeros_no_gradient(dtype):
    states = torch.zeros(2, 3, 4, dtype=dtype)
    states[0, 0] = 1
    states.requires_grad_()
    norm = ScaleNorm(1e-5).to(dtype)
    norm(states).cumsum(dim=-1).sum().backward()
    assert not states.grad[0, 1:].any() and not states.grad[1].any()
    assert states.grad[0, 0].any() and torch.isfinite(states.grad).all() and torch.isfinite(norm.g.grad).all()


def test_a_deep_model_trains_on_inputs_that_are_zero():
    config = PerformerConfig(
        vocab_size=16, hidden_size=16, num_attention_heads=2, num_hidden_layers=12, norm_type="scale_norm"
    )
    model = PerformerForMaskedLM(config)
    inputs = torch.randn(1, 6, 16)
    inputs[:, 2:4] = 0
    inputs.requires_grad_()
    model(inputs_embeds=inputs, labels=torch.arange(6)[None]).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 12 * 6
    for name, gradient in (gradients | {"inputs": inputs.grad}).items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e4, name
