"""The package and copies of its code in one process, as loaded checkpoints bring them, do not disturb each other."""

import pytest
import torch
from helpers import ROOT
from process_with_torch import run_python_with_torch
from torch.utils.flop_counter import FlopCounterMode

from hf_efficient.kernels.flash_attention import flash_attention
from hf_efficient.kernels.flash_attention.flops import visible_pairs


def test_copies_of_an_operator_live_side_by_side():
    """In a checkout `kernels` is such a copy. Under one name, using the first would be a call of freed memory."""
    code = """
import torch
from hf_efficient.kernels.flash_attention import flash_attention as first_attention
from hf_efficient.kernels.soft_topk import soft_topk as first_topk
from kernels.flash_attention import flash_attention
from kernels.soft_topk import soft_topk
gradients = []
for attend, choose in ((first_attention, first_topk), (flash_attention, soft_topk)) * 2:
    states = torch.linspace(-1, 1, 2 * 40 * 4).view(1, 2, 40, 4).requires_grad_()
    (attend(states, states, states, window=3).sum() + choose(states, 2).scores[..., 0].sum()).backward()
    gradients.append(states.grad)
assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
print(sorted(name for name in dir(torch.ops.hf_efficient) if name.startswith("flash")))
"""
    printed = run_python_with_torch("-c", code, environment={"PYTHONPATH": str(ROOT)})
    names = ["flash_attention_backward", "flash_attention_forward"]
    assert printed.strip() == str(sorted(names + [f"{name}_2" for name in names]))


@pytest.mark.parametrize("left", [-1, 0, 2, 20])
@pytest.mark.parametrize("right", [-1, 0, 3, 20])
def test_the_pairs_inside_a_window(left, right):
    for length in (1, 3, 7):
        for keys in (1, 2, 5, 9):
            distance = torch.arange(keys) - (torch.arange(length) + keys - length)[:, None]
            visible = torch.ones_like(distance, dtype=torch.bool)
            visible = visible & (distance >= -left) if left >= 0 else visible
            visible = visible & (distance <= right) if right >= 0 else visible
            assert visible_pairs(length, keys, left, right) == visible.sum()


def test_floating_point_operations_are_counted():
    query = torch.randn(2, 4, 10, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 16)
    with FlopCounterMode(display=False) as counter:
        output = flash_attention(query, key, value, causal=True, softcap=5.0)
    pairs = sum(range(3, 13))
    assert counter.get_total_flops() == 2 * 2 * 4 * pairs * (8 + 16)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * pairs * (3 * 8 + 2 * 16)
