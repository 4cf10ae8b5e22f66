"""The definition of soft top-k: eager, differentiable, any device and dtype, at the price of a full sort.

    y_i = min(1, exp((s_i - τ) / ε)),    with τ such that  Σ_i y_i = k                                   ("exact")

The solution has a closed form: with the j largest logits saturated, `τ_j = ε (LSE_{i>j}(s_i / ε) - log(k - j))`, and
the smallest j whose next logit is not above τ_j is the right one. Autograd through that line is the implicit gradient.
"Coordinate descent" is the iteration of CoLT5 (arXiv 2303.09752; ε-scaling from arXiv 2304.04947) written out, whose
fixed point is the formula above. Both compute in at least float32 with autocast off.
"""

import torch

from .selection import select_by_position


def soft_topk_exact_reference(
    logits: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, eps: float, num_selected: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores `[R, N]`, indices `[R, num_selected]` and threshold τ `[R]`, of logits `[R, N]` and k `[R]`."""
    with torch.autocast(logits.device.type, enabled=False):
        values, keep = _values(logits, mask)
        k = k.to(values.dtype)[:, None]
        x, order = torch.sort(values.masked_fill(~keep, -torch.inf) / eps, dim=-1, descending=True)
        real = torch.gather(keep, -1, order)
        finite = x.masked_fill(~real, torch.finfo(x.dtype).min)
        tail = torch.logcumsumexp(finite.flip(-1), dim=-1).flip(-1)  # LSE over i ≥ j
        saturated = torch.arange(x.shape[-1], device=x.device)
        solvable = real & (saturated < k)
        room = torch.where(solvable, k - saturated, 1)
        thresholds = tail - torch.log(room)  # τ_j / ε
        right = solvable & (finite <= thresholds)
        first = right.to(torch.uint8).argmax(-1, keepdim=True)
        threshold = torch.gather(thresholds, -1, first)
        # Too few logits for k: all of them. Nothing to give: none.
        threshold = torch.where(k < keep.sum(-1, keepdim=True), threshold, -torch.inf)
        threshold = torch.where(k > 0, threshold, torch.inf)
        inside = keep & threshold.isfinite()
        exponent = torch.where(inside, values / eps - torch.where(inside, threshold, 0), 0)
        scores = torch.where(inside, torch.exp(exponent.clamp(max=0)), (keep & (threshold < 0)).to(values.dtype))
        indices = select_by_position(values.detach().masked_fill(~keep, -torch.inf), num_selected)
    return scores.to(logits.dtype), indices, (eps * threshold[:, 0]).detach()


def soft_topk_descent_reference(
    logits: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    temperatures: list[float],
    num_selected: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As above; one temperature per iteration, and a last one for the exponent of the scores."""
    with torch.autocast(logits.device.type, enabled=False):
        values, keep = _values(logits, mask)
        log_k = torch.log(k.to(values.dtype).clamp(min=1e-20))[:, None]
        empty = ~keep.any(-1, keepdim=True)
        correction = -values
        for temperature in temperatures[:-1]:
            shifted = ((values + correction) / temperature).masked_fill(~keep, torch.finfo(values.dtype).min)
            dual = temperature * (log_k - torch.logsumexp(shifted, dim=-1, keepdim=True))
            dual = torch.where(empty, 0, dual)
            correction = -torch.relu(values + dual)
        scores = torch.exp((values + dual + correction) / temperatures[-1]).masked_fill(~keep, 0)
        indices = select_by_position(values.detach().masked_fill(~keep, -torch.inf), num_selected)
    return scores.to(logits.dtype), indices, -dual[:, 0].detach()


def _values(logits, mask):
    """Logits in the computation's dtype, zero where they do not count, and where they count."""
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    keep = values != -torch.inf
    if mask is not None:
        keep = keep & mask
    # `where`, not a product: what stands at a masked position may not be a number.
    return torch.where(keep, values, 0), keep
