"""Rotary positions: the turn by the formula, and its matrix for a single position."""

import pytest
import torch
from helpers import assert_within_budget
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_efficient.modeling.rotary import apply_rotary, rotary_tables


SIZE, BASE = 16, 10_000.0


def turned(states, positions):
    """Pairs (i, i + d/2) as complex numbers times `exp(i · position · frequency)`, in float64."""
    states, half = states.double(), states.shape[-1] // 2
    pairs = torch.complex(states[..., :half], states[..., half:])
    frequencies = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    pairs = pairs * torch.polar(torch.ones(()).double(), positions[:, None, :, None] * frequencies)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def by_tables(states, positions):
    return apply_rotary(states, rotary_tables(positions, SIZE, BASE)._replace(matrix=None))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_it_is_the_formula(shape, dtype, gradients):
    torch.manual_seed(0)
    positions = torch.randint(100, shape)
    states = torch.randn(3, 4, shape[1], SIZE).to(dtype)
    with torch.set_grad_enabled(gradients):
        tables = rotary_tables(positions, SIZE, BASE)
        assert (tables.matrix is not None) == (shape == (1, 1) and not gradients)
        output = apply_rotary(states, tables)
    assert output.dtype == dtype
    assert_within_budget(output, turned(states, positions), by_tables(states, positions), "states")


@torch.no_grad()
def test_a_step_stays_exact_under_autocast_and_low_precision():
    torch.manual_seed(0)
    positions, states = torch.tensor([[1003]]), torch.randn(1, 4, 1, SIZE)
    expected = by_tables(states, positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(apply_rotary(states, rotary_tables(positions, SIZE, BASE)), expected)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(apply_rotary(states, rotary_tables(positions, SIZE, BASE)), expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def test_nothing_is_left_behind_when_somebody_looks_on():
    positions, states = torch.tensor([[5]]), torch.ones(1, 1, 1, 2 * SIZE)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert apply_rotary(states, rotary_tables(positions, 2 * SIZE, BASE)).shape == states.shape
        found = apply_rotary(states, rotary_tables(positions, 2 * SIZE, BASE))
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, turned(states, positions).float())
