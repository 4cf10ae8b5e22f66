"""The backward pass of attention over a part of the keys, when the whole was put together by `merge_attention`."""

from typing import NamedTuple

from torch import Tensor

from ..backend import resolve_backend
from .api import make_operands, make_options, make_seed, unsupported_reason, validate_masks, validate_tensors
from .autograd import gradients
from .sdpa import part_gradients_with_sdpa


class PartGradients(NamedTuple):
    """`query` `[B, H, N, D]`, of this part alone; `key` `[B, G, M, D]`; `value` `[B, G, M, V]`."""

    query: Tensor
    key: Tensor
    value: Tensor


def part_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> PartGradients:
    """What this part of the keys contributes to the gradients of attention over all of them.

    With `w_ij = exp(s_ij - lse_i)`, the weights in the whole, everything is local to the part (arXiv 2205.14135,
    section B.2), so that its own output is not needed and not computed:

        dv = wᵀ do      ds = w ∘ (do vᵀ - do·out)      dq = scale · ds k      dk = scale · dsᵀ q

    The gradient of the query is the sum over the parts.

    Args:
        query, key, value, scale, causal, key_mask, dropout_p, dropout_seed, backend: as `flash_attention` was given
            them for this part.
        output: `[B, H, N, V]`, over all parts.
        lse: `[B, H, N]`, over all parts, float32 or float64; -inf for rows that see nothing.
        grad_output: `[B, H, N, V]`, the gradient of `output`.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, naming the argument.
        RuntimeError: an explicit `backend` that cannot serve this call.
    """
    validate_tensors(query, key, value)
    validate_masks(query, key, key_mask, None, None)
    shape = (*query.shape[:3], value.shape[3])
    for name, tensor, expected in (
        ("output", output, shape),
        ("lse", lse, shape[:3]),
        ("grad_output", grad_output, shape),
    ):
        if tuple(tensor.shape) != expected or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be floating point of shape {expected}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    options = make_options(query, scale, causal, None, None, dropout_p)
    seed = make_seed(dropout_seed, query.device) if options.dropout_p else None
    operands = make_operands(query, key, value, key_mask, None, None, None, None, None, None, None, seed)
    if backend == "auto":
        found = part_gradients_with_sdpa(operands, options, output, lse, grad_output)
        if found is not None:
            return PartGradients(*found)
    chosen = resolve_backend(backend, query, unsupported_reason=unsupported_reason(query, value))
    return PartGradients(*gradients(operands, options, output, lse, grad_output, chosen)[:3])
