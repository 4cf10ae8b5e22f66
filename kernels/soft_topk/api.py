"""The public soft top-k operation: signature, validation, choice of the backend."""

import math
from typing import NamedTuple

import torch

from ..backend import resolve_backend
from .autograd import soft_topk_descent, soft_topk_exact


METHODS = ("exact", "coordinate_descent")
SORT_ORDERS = ("position", "logit")


class SoftTopkOutput(NamedTuple):
    """`scores` `[..., N]` like the logits, `indices` `[..., num_selected]` int64, `threshold` τ `[...]`."""

    scores: torch.Tensor
    indices: torch.Tensor
    threshold: torch.Tensor


def soft_topk(
    logits: torch.Tensor,
    k: int | float | torch.Tensor,
    *,
    method: str = "exact",
    eps: float = 1.0,
    mask: torch.Tensor | None = None,
    num_selected: int | None = None,
    sorted_by: str = "position",
    n_iters: int = 50,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    backend: str = "auto",
) -> SoftTopkOutput:
    """`y_i = min(1, exp((s_i - τ) / ε))` with τ such that `Σ_i y_i = k`: a top-k of the logits s that has a gradient.

    The scores are in [0, 1], grow with the logit, and become the indicator of the k largest as ε goes to zero.
    `"exact"` solves for τ and has the implicit gradient. `"coordinate_descent"` runs the iterations of the source
    instead, which have the exact scores for their limit: after few of them the sum may be far from k. The hard choice
    is by logits, not by scores (of which many are exactly 1), ties go to the smaller position.
    Source: CoLT5, arXiv 2303.09752, and for `eps_init` and `eps_decay` CoDA, arXiv 2304.04947.

    Args:
        logits: `[..., N]`, float16, bfloat16, float32 or float64, N ≥ 1. −inf stands for a masked entry; a row with
            NaN or +inf has scores without a meaning, and leaves other rows alone.
        k: what the scores of a row sum to: a number, or a tensor `[...]` (or of no dimension), one for each row, which
            may require a gradient. Rows with as many unmasked logits or fewer have the score 1 for each of them; rows
            with k ≤ 0 have zeros.
        method: `"exact"` or `"coordinate_descent"`.
        eps: the temperature ε, above zero; of coordinate descent, the lowest one.
        mask: `[..., N]`, bool, True where a logit counts. Masked scores are zero, whatever the logits there.
        num_selected: the length of `indices`, at most N. The default is k (or N, if that is less) where k is an
            integer, and 0 otherwise. Masked positions are chosen only when no unmasked one is left, the first ones
            first: their scores are zero.
        sorted_by: `"position"`: ascending indices, as a gather wants them; or `"logit"`: the largest logit first.
        n_iters: iterations of coordinate descent.
        eps_init: the temperature of its first iteration, if that is to be above `eps`.
        eps_decay: the factor from each temperature to the next, as long as that is above `eps`.
        backend: `"auto"`, `"triton"` (no float64) or `"eager"`.

    Returns:
        `SoftTopkOutput`. The scores have the dtype of the logits and are computed in at least float32. The threshold
        has no gradient; it is −inf where all scores are 1 for want of logits, and +inf where k ≤ 0.

    Raises:
        ValueError: a shape, dtype, device, number or name that does not fit, naming the argument.
        RuntimeError: an explicit `backend` that cannot serve this call.
    """
    num_selected = _validate(logits, k, method, eps, mask, num_selected, sorted_by, n_iters, eps_init, eps_decay)
    backend = resolve_backend(backend, logits, unsupported_reason=_unsupported(logits))
    leading, columns = logits.shape[:-1], logits.shape[-1]
    rows = math.prod(leading)
    # The compiler needs the view: without it, it loses sight of a transform of `torch.func` inside of its graph.
    is_flat = logits.ndim == 2 and not torch.compiler.is_compiling()
    flat = logits if is_flat else logits.reshape(rows, columns)
    flat_mask = None if mask is None else mask.reshape(rows, columns)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(k, torch.Tensor):
        k = k.to(dtype).expand(leading).reshape(rows)
    else:
        k = torch.full((rows,), float(k), dtype=dtype, device=logits.device)

    if method == "exact":
        scores, indices, pivot, offset = soft_topk_exact(flat, k, flat_mask, float(eps), num_selected, backend)
        # A pivot at either end of the range stands for "all" and "none".
        threshold = torch.add(pivot, offset, alpha=eps) / (pivot.abs() < torch.finfo(dtype).max)
    else:
        temperatures = _temperatures(n_iters, eps, eps_init, eps_decay)
        scores, indices, duals = soft_topk_descent(flat, k, flat_mask, temperatures, num_selected, backend)
        threshold = -duals[:, -1].to(dtype)
    if sorted_by == "logit" and num_selected > 1:
        chosen = flat.detach().gather(-1, indices)
        if flat_mask is not None:
            chosen = chosen.masked_fill(~flat_mask.gather(-1, indices), -torch.inf)
        indices = indices.gather(-1, chosen.sort(dim=-1, descending=True, stable=True).indices)
    if is_flat:
        return SoftTopkOutput(scores, indices, threshold)
    return SoftTopkOutput(scores.view(logits.shape), indices.view(*leading, num_selected), threshold.view(leading))


def _unsupported(logits) -> str | None:
    return "soft_topk has no kernel for float64" if logits.dtype == torch.float64 else None


def _temperatures(n_iters, eps, eps_init, eps_decay) -> list[float]:
    """One for each iteration, and one for the scores: the temperature after the last decay."""
    temperatures = [max(eps if eps_init is None else eps_init, eps)]
    for _ in range(n_iters):
        temperatures.append(max(temperatures[-1] * eps_decay, eps))
    return [float(temperature) for temperature in temperatures]


def _validate(logits, k, method, eps, mask, num_selected, sorted_by, n_iters, eps_init, eps_decay) -> int:
    """Raises for what does not fit; the number of indices otherwise."""
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., N] with N at least 1, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    columns = logits.shape[-1]
    if isinstance(k, torch.Tensor):
        if k.ndim and k.shape != logits.shape[:-1]:
            raise ValueError(
                f"k must be a number or a tensor of shape {tuple(logits.shape[:-1])} or (), got {tuple(k.shape)}"
            )
        if k.dtype == torch.bool or k.is_complex():
            raise ValueError(f"k must be integer or floating point, got {k.dtype}")
        if k.device != logits.device:
            raise ValueError(f"k must be on {logits.device}, got {k.device}")
    elif isinstance(k, bool) or not isinstance(k, (int, float)) or not 0 <= k < math.inf:
        raise ValueError(f"k must be a number, finite and not negative, or a tensor, got {k!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if sorted_by not in SORT_ORDERS:
        raise ValueError(f"sorted_by must be one of {', '.join(map(repr, SORT_ORDERS))}, got {sorted_by!r}")
    for name, value in (("eps", eps), ("eps_init", eps_init), ("eps_decay", eps_decay)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above zero, got {value!r}")
    if eps_decay > 1:
        raise ValueError(f"eps_decay must not be above 1, got {eps_decay!r}")
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(f"n_iters must be an integer of at least 1, got {n_iters!r}")
    if mask is not None:
        if mask.shape != logits.shape:
            raise ValueError(f"mask must have shape {tuple(logits.shape)}, got {tuple(mask.shape)}")
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, True where a logit counts, got {mask.dtype}")
        if mask.device != logits.device:
            raise ValueError(f"mask must be on {logits.device}, got {mask.device}")
    if num_selected is None:
        return min(k, columns) if isinstance(k, int) else 0
    if isinstance(num_selected, bool) or not isinstance(num_selected, int) or not 0 <= num_selected <= columns:
        raise ValueError(f"num_selected must be an integer from 0 to N = {columns}, got {num_selected!r}")
    return num_selected
