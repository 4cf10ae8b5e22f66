"""`torch.topk` with a gradient that says which of the values should be among the largest."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.soft_topk import soft_topk


class TopkOutput(NamedTuple):
    """All `[..., k]`: `values` and `indices` as of `torch.topk`, soft `scores` in [0, 1], and `gates`, which are 1."""

    values: Tensor
    indices: Tensor
    scores: Tensor
    gates: Tensor


def topk(
    values: Tensor,
    k: int,
    *,
    score_ratio: float = 9 / 8,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    method: str = "exact",
    num_iterations: int = 50,
    initial_temperature: float | None = None,
    temperature_decay: float = 1.0,
) -> TopkOutput:
    """The k largest along the last axis, largest first, differentiable in the choice.

    The gates are 1 and have the gradient of the soft top-k scores; the values are multiplied by them. The scores sum
    to `score_ratio * k` over the whole axis. Source: CoLT5, arXiv 2303.09752, section 3.1.

    Args:
        values: `[..., N]`, floating point, N ≥ k.
        k: how many, at least 1.
        mask: `[..., N]`, bool, True where a value counts. Others are chosen only when no value is left: their values,
            scores and gates are zero, whatever stood there.
        score_ratio, temperature, method, num_iterations, initial_temperature, temperature_decay: see `RouterOptions`.

    Raises:
        ValueError: k out of range, or what `soft_topk` does not accept.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= values.shape[-1]:
        raise ValueError(f"k must be an integer from 1 to N = {values.shape[-1]}, got {k!r}")
    if score_ratio < 1:
        raise ValueError(f"score_ratio must be at least 1, got {score_ratio}")
    scores, indices, _ = soft_topk(
        values,
        min(score_ratio * k, values.shape[-1]),
        method=method,
        eps=temperature,
        mask=mask,
        num_selected=k,
        sorted_by="logit",
        n_iters=num_iterations,
        eps_init=initial_temperature,
        eps_decay=temperature_decay,
    )
    scores, chosen = scores.gather(-1, indices), values.gather(-1, indices)
    gates = scores + (1 - scores).detach()
    if mask is not None:
        real = mask.gather(-1, indices)
        gates, chosen = torch.where(real, gates, 0), torch.where(real, chosen, 0)
    return TopkOutput(chosen * gates, indices, scores, gates)
