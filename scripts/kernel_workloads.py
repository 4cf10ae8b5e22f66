"""What `tune_kernels.py` times for a row of a launch table: a typical call of the op, forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_efficient.kernels.flash_attention import flash_attention
from hf_efficient.kernels.linear_attention import FeatureMap, linear_attention
from hf_efficient.kernels.soft_topk import soft_topk


DTYPES = {16: torch.bfloat16, 32: torch.float32}


def _scale(device: str) -> tuple[int, int, int]:
    """Batch, heads and length: enough to fill a GPU, little elsewhere."""
    return (4, 16, 4096) if device == "cuda" else (1, 2, 48)


def _results(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of its inputs, for a gradient that is the same at every call."""
    gradient = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad(output, leaves, gradient)]


def _attention_inputs(bits: int, size: int, device: str) -> list[Tensor]:
    batch, heads, length = _scale(device)
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(
            batch, heads, length, size, device=device, dtype=DTYPES[bits], generator=generator
        ).requires_grad_()
        for _ in range(3)
    ]


def softmax_attention(table: str, bits: int, size: int, device: str) -> Callable[[], list[Tensor]]:
    leaves = _attention_inputs(bits, size, device)
    options = {}
    if "BIASED" in table or "DISTANCE" in table:
        options["distance_bias"] = torch.zeros(leaves[0].shape[1], 257, device=device, requires_grad=True)
    return lambda: _results(
        flash_attention(*leaves, causal=True, backend="triton", **options), [*leaves, *options.values()]
    )


def kernel_attention(table: str, bits: int, size: int, device: str) -> Callable[[], list[Tensor]]:
    leaves = _attention_inputs(bits, size, device)
    projection = torch.randn(4 * size, size, device=device, generator=torch.Generator(device).manual_seed(1))
    feature_map = FeatureMap("exponential", projection, None, size**-0.25, 1e-6)
    if "DECODE" in table:
        token = [leaf.detach()[:, :, :1].contiguous() for leaf in leaves]
        _, state = linear_attention(*token, feature_map, causal=True, backend="triton")
        return lambda: [linear_attention(*token, feature_map, causal=True, state=state, backend="triton").output]
    return lambda: _results(linear_attention(*leaves, feature_map, causal=True, backend="triton").output, leaves)


def routing(table: str, bits: int, size: int, device: str) -> Callable[[], list[Tensor]]:
    length = size if device == "cuda" else min(size, 64)
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(16 if device == "cuda" else 2, length, device=device, generator=generator).requires_grad_()
    method = "coordinate_descent" if "DESCENT" in table else "exact"
    return lambda: _results(soft_topk(logits, max(length // 16, 1), method=method, backend="triton").scores, [logits])


WORKLOADS = {"flash_attention": softmax_attention, "linear_attention": kernel_attention, "soft_topk": routing}
