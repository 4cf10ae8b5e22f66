"""The logits of a router: each token's product with each routing vector, if wanted over its root mean square."""

import torch
from torch import Tensor

from .row_blocks import row_blocks, worth_blocks


def routing_logits(tokens: Tensor, vectors: Tensor, eps: float | None) -> Tensor:
    """`x·v / sqrt(mean(x²) + eps)`, or `x·v` if `eps` is None: `[B, R, N]`, in at least float32.

    Not a product of matrices: equal tokens must get equal logits to the bit, whatever stands beside them, since ties
    go by position. In the first layer every repeated token is a tie.

    Args:
        tokens: `[B, N, C]`.
        vectors: `[R, C]`.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if worth_blocks(tokens):
        logits = _BlockedLogits.apply(tokens.reshape(-1, tokens.shape[-1]), vectors.to(wide), eps)[0]
        return logits.unflatten(1, tokens.shape[:2]).transpose(0, 1)
    tokens, vectors = tokens.to(wide), vectors.to(wide)
    logits = torch.stack([(tokens * vector).sum(dim=-1) for vector in vectors], dim=1)
    if eps is None:
        return logits
    # The norms of the tokens, without a normalised copy of them.
    return logits * torch.rsqrt(tokens.square().mean(dim=-1)[:, None] + eps)


class _BlockedLogits(torch.autograd.Function):
    """Rows `[N, C]` and vectors `[R, C]` -> logits `[R, N]` and one over the root mean squares `[N]` (ones)."""

    @staticmethod
    def forward(rows: Tensor, vectors: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
        logits = vectors.new_empty(len(vectors), len(rows))
        scales = vectors.new_ones(len(rows))
        for here in row_blocks(rows):
            block = rows[here].to(vectors.dtype)
            product = torch.empty_like(block)
            for vector, row in zip(vectors, logits, strict=True):
                torch.sum(torch.mul(block, vector, out=product), dim=-1, out=row[here])
            if eps is not None:
                mean = torch.mul(block, block, out=product).mean(dim=-1)
                scales[here] = mean.add_(eps).rsqrt_()
        return logits.mul_(scales), scales

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, vectors, ctx.eps = inputs
        ctx.save_for_backward(rows, vectors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
        """With s = 1 / rms and the logits l_r: `dx = s Σ_r dl_r v_r - s² x Σ_r dl_r l_r / C`, `dv_r = Σ s dl_r x`."""
        rows, vectors, logits, scales = ctx.saved_tensors
        scaled = grad * scales
        shrinking = (grad * logits).sum(0).mul_(scales.square()).div_(-rows.shape[1])[:, None]
        gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
        vector_gradient = torch.zeros_like(vectors)
        for here in row_blocks(rows):
            block = rows[here].to(vectors.dtype)
            vector_gradient += scaled[:, here] @ block
            found = scaled[:, here].T @ vectors
            if ctx.eps is not None:
                found.addcmul_(block, shrinking[here])
            gradient[here] = found
        return gradient, vector_gradient, None
