"""The root mean square norm (arXiv 1910.07467), which on a processor goes through its rows once.

PyTorch's own is a dozen operators there, forward and backward, each of which reads and writes all of the rows. Of a
few rows, as in a step of decoding, the number of operators is what takes time: five do.
"""

import functools

import torch
from torch import Tensor, nn

from ..kernels.backend import is_observed
from .row_blocks import row_blocks, worth_blocks


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x²) + eps) · weight`: `torch.nn.RMSNorm`, faster on a CPU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, eps = self.weight, self.eps
        if weight is None or eps is None:
            return super().forward(hidden_states)
        if worth_blocks(hidden_states):
            rows = hidden_states.reshape(-1, hidden_states.shape[-1])
            return _BlockedNorm.apply(rows, weight, eps)[0].view(hidden_states.shape)
        if _is_plain_inference(hidden_states, weight):
            lengths = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
            mean_squares = torch.addcmul(_scalar(eps), lengths, lengths, value=1 / hidden_states.shape[-1])
            return (hidden_states * mean_squares.rsqrt_()).mul_(weight)
        return super().forward(hidden_states)


def _is_plain_inference(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether nothing but numbers is asked for: no gradient, no wider type inside, nobody who looks on."""
    return (
        not torch.is_grad_enabled()
        and hidden_states.is_cpu
        and hidden_states.dtype == weight.dtype == torch.float32
        and not is_observed(hidden_states, weight)
    )


@functools.cache
def _scalar(number: float) -> Tensor:
    """A tensor of one number: made anew from a Python number, it would take as long as the operator that reads it."""
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.float32, device="cpu")


class _BlockedNorm(torch.autograd.Function):
    """Rows `[N, C]` -> the normed rows `[N, C]`, and one over their root mean squares `[N, 1]`."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(rows.dtype, torch.float32)
        scales, weight = rows.new_empty(len(rows), 1, dtype=wide), weight.to(wide)
        output = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for here in row_blocks(rows):
            block = rows[here]
            lengths = torch.linalg.vector_norm(block, dim=-1, keepdim=True, dtype=wide)
            scale = torch.rsqrt(lengths.square_().div_(rows.shape[1]).add_(eps))
            scales[here] = scale
            if wide == rows.dtype:
                torch.mul(block, scale, out=output[here]).mul_(weight)
            else:
                output[here] = (block * scale).mul_(weight)
        return output, scales

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, weight, _ = inputs
        ctx.save_for_backward(rows, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, Tensor, None]:
        """With x̂ = x / rms: `dx = (dy ∘ weight - x̂ · mean(dy ∘ weight ∘ x̂)) / rms`, `dweight = Σ dy ∘ x̂`."""
        rows, weight, scales = ctx.saved_tensors
        wide = scales.dtype
        weight_gradient, factor = torch.zeros_like(weight, dtype=wide), weight.to(wide)
        gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for here in row_blocks(rows):
            normed = rows[here] * scales[here]
            product = normed * grad[here]
            weight_gradient += product.sum(0)
            mean = torch.mv(product, factor).div_(rows.shape[1])[:, None]
            block = torch.mul(grad[here], factor, out=product)
            gradient[here] = block.addcmul_(normed, mean, value=-1).mul_(scales[here])
        return gradient, weight_gradient.to(weight.dtype), None
