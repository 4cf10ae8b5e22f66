"""Rotary position embeddings (arXiv 2104.09864): pairs (i, i + d/2) of a head turn with the position."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.backend import is_observed


class RotaryTables(NamedTuple):
    """How much each channel turns, for N positions of B rows or of all rows; all float32.

    Attributes:
        cos: `[B or 1, 1, N, D]`.
        sin: the same; negative in the first half.
        matrix: `[D, D]`, the turn of a single position as a matrix, or None. On a CPU a product with it is quicker
            than what it stands for, several operators on a handful of numbers.
    """

    cos: Tensor
    sin: Tensor
    matrix: Tensor | None = None

    @classmethod
    def of(cls, angles: Tensor, factor: float = 1.0) -> "RotaryTables":
        """Tables for `angles` `[B or 1, 1, N, D]`, negative in the first half; cosines and sines times `factor`."""
        cos, sin = angles.cos(), angles.sin()
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        if angles.numel() != angles.shape[-1] or not _may_be_a_product(angles):
            return cls(cos, sin)
        straight, crossed = _patterns(angles.shape[-1])
        return cls(cos, sin, torch.addcmul(straight * cos.view(-1), crossed, sin.view(-1)))


def rotary_tables(position_ids: Tensor, dim: int, base: float) -> RotaryTables:
    """Tables for `position_ids` `[B or 1, N]` and `dim` channels.

    Computed where they are needed, so there is no buffer that could be lost or cast to a low precision.
    """
    known = position_ids.is_cpu and not is_observed(position_ids)
    frequencies = _known_frequencies(dim, base) if known else _frequencies(dim, base, position_ids.device)
    return RotaryTables.of(position_ids.to(torch.float32)[:, None, :, None] * frequencies)


def apply_rotary(states: Tensor, tables: RotaryTables) -> Tensor:
    """Turn `states` `[B, H, N, D]` by the tables' angles; computed in float32, returned in the dtype of `states`."""
    cos, sin, matrix = tables
    if matrix is not None and states.dtype == matrix.dtype:
        return torch.matmul(states, matrix)
    swapped = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * cos, swapped, sin).to(states.dtype)


def both_halves(frequencies: Tensor) -> Tensor:
    """Frequencies `[D / 2]` of the pairs as those of the channels `[D]`: what `RotaryTables.of` wants of angles."""
    return torch.cat([-frequencies, frequencies])


def _may_be_a_product(angles: Tensor) -> bool:
    """Whether a product of matrices computes in float32 here, and nobody looks on."""
    exact = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
    return exact and angles.is_cpu and not torch.is_grad_enabled() and not is_observed(angles)


def _frequencies(dim: int, base: float, device: torch.device | str) -> Tensor:
    exponents = -torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    return both_halves(base**exponents)


@functools.cache
def _known_frequencies(dim: int, base: float) -> Tensor:
    with torch.inference_mode(False):
        return _frequencies(dim, base, "cpu")


@functools.cache
def _patterns(dim: int) -> tuple[Tensor, Tensor]:
    """Where a turn's cosines and sines stand in its matrix: two of `[D, D]`, ones among zeros."""
    with torch.inference_mode(False):
        identity = torch.eye(dim, dtype=torch.float32, device="cpu")
        return identity, identity.roll(dim // 2, dims=1)
