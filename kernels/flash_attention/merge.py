"""Puts the attention over parts of the keys together, by their log-sum-exp."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The attention over all keys from the attention over disjoint parts of them, differentiable.

    `out = Σ_c exp(lse_c - lse) · out_c` with `lse = log Σ_c exp(lse_c)`. A part that a row sees nothing of has
    `lse_c = -inf` and takes no part. Sinks are in the `lse` of the call that was given them: give them to one part.

    Args:
        outputs: one `[..., N, V]` per part, floating point.
        lses: one `[..., N]` per part, natural logarithm, float32 or float64.

    Returns:
        The output `[..., N, V]` in the dtype of the first part, and its lse `[..., N]`; zeros and -inf for rows that
        see nothing in any part.

    Raises:
        ValueError: not as many lses as outputs, none at all, or shapes that do not fit.
    """
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"outputs and lses must be equally many and not none, got {len(outputs)} and {len(lses)}")
    for name, tensors, shape in (("outputs", outputs, outputs[0].shape), ("lses", lses, outputs[0].shape[:-1])):
        for i, tensor in enumerate(tensors):
            if tensor.shape != shape:
                raise ValueError(f"{name}[{i}] must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    stacked = torch.stack(list(lses))
    maximum = stacked.detach().amax(0)
    maximum = torch.where(maximum == -torch.inf, 0, maximum)
    weights = torch.exp(stacked - maximum)
    total = weights.sum(0)
    blind = total == 0
    total = torch.where(blind, 1, total)
    merged = sum(
        (weight / total)[..., None] * part.to(weight.dtype) for weight, part in zip(weights, outputs, strict=True)
    )
    lse = torch.where(blind, -torch.inf, torch.log(total) + maximum)
    return merged.to(outputs[0].dtype), lse
