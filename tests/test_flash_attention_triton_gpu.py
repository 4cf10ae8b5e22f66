"""What only compiled kernels show: bfloat16, the configurations that ship; and, on a GPU, sizes beyond 32-bit offsets.

Run: HF_EFFICIENT_COMPILED_FOR=sm_90 pytest tests/test_flash_attention_triton_gpu.py, or on a GPU
"""

import pytest
import torch
from flash_attention_cases import COMBINATIONS
from flash_attention_kernels import DEVICE, assert_equals_the_definition, call_of, kernels

from hf_efficient.kernels.flash_attention import flash_attention


pytest.importorskip("triton")


@pytest.mark.compiled
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_bfloat16(combination, nan_poisoned):
    assert_equals_the_definition(call_of(combination, 150, 333, torch.bfloat16, key_heads=2))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("combination", ["causal", "causal window distance bias", "decoder with dropout"])
def test_every_configuration(combination, size, dtype, nan_poisoned, monkeypatch):
    monkeypatch.setattr("flash_attention_cases.HEAD_DIM", size)
    monkeypatch.setattr("flash_attention_cases.VALUE_DIM", size)
    assert_equals_the_definition(call_of(combination, 300, 420, dtype, key_heads=2))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    """The last row of the last head, whose offset is over 2³¹."""
    query = torch.randn(1, 2, 2**24 + 64, 64, device=DEVICE, dtype=torch.bfloat16)
    assert query.numel() > 2**31
    options = {"causal": True, "window": 63, "softcap": 30.0, "backend": "triton"}
    query.requires_grad_()
    output = flash_attention(query, query, query, **options)
    output.backward(torch.ones_like(output))
    # A tail long enough for its last row to see, as a sequence of its own.
    tail = query.detach()[:, :, -256:].clone().requires_grad_()
    expected = flash_attention(tail, tail, tail, **options)
    expected.backward(torch.ones_like(expected))
    assert torch.allclose(output[:, :, -64:], expected[:, :, -64:], atol=1e-2)
    assert torch.allclose(query.grad[:, :, -64:], tail.grad[:, :, -64:], atol=3e-2)


@pytest.mark.gpu
def test_more_heads_than_a_grid_is_wide():
    """Batch times heads is over 65,535, the limit of a grid's second dimension."""
    query = torch.randn(2048, 40, 5, 16, device=DEVICE, requires_grad=True)
    output, lse = kernels({"query": query, "key": query, "value": query, "causal": True})
    output.sum().backward()
    row = query.detach()[-1:].clone().requires_grad_()
    expected, expected_lse = kernels({"query": row, "key": row, "value": row, "causal": True})
    expected.sum().backward()
    assert torch.equal(output[-1:], expected) and torch.equal(lse[-1:], expected_lse)
    assert torch.equal(query.grad[-1:], row.grad)
