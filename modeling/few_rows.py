"""Linear layers of few rows on a CPU: what a step of decoding spends most of its time in."""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

from ..kernels.backend import PLAIN_TENSORS, is_observed


# With more rows, a product of matrices keeps the threads busy by itself.
FEW = 16
# Products of fewer multiplications take less time than dividing them does.
LARGE = 2**19
# Products of one row and fewer weights take less time than writing them out does. (On an EPYC, by MKL and so: 128 to
# 256 35 and 41 µs, 256 to 256 48 and 37, 256 to 1,024 131 and 89.)
MIDDLE = 2**16
# A block has at least as many outputs; threads beyond that get none. (A guess: two cores never ask.)
LEAST = 32
# A subclass that only starts from other weights has it too; a layer that somebody has replaced has another.
_LINEAR = nn.Linear.forward


def project(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """`layer(hidden_states)`; few rows on a CPU are multiplied by all threads.

    A few rows times a weight take as long as reading the weight does, and MKL, which is behind
    `nn.functional.linear` where there is MKL, may read it in one thread. Here the outputs of a large weight are
    divided into as many blocks as there are threads, of which `torch.bmm` gives one to each. What is too small for
    that, but not tiny, is multiplied number by number and summed up, if it is one row and the processor is AMD's. The
    result is the layer's up to the order of its sums.

    Args:
        layer: any module. Taken for its weight is a bare one (`is_bare`), where there is MKL and more than one thread,
            no gradient is asked for, and rows times weights are at least `LARGE`, or `MIDDLE` for a single row.
        hidden_states: `[..., in_features]`, of at most `FEW` rows; more are the layer's.

    Returns:
        `[..., out_features]`.
    """
    blocks = _blocks(layer, hidden_states)
    if blocks == 1:
        return layer(hidden_states)
    rows = hidden_states.reshape(-1, layer.in_features)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    product = _divided(rows, weight, bias, blocks) if blocks else _written_out(rows, weight, bias)
    return product.view(*hidden_states.shape[:-1], layer.out_features)


def is_bare(layer: nn.Module, hidden_states: Tensor) -> bool:
    """Whether `layer(hidden_states)` is the product with a weight in float32 on a CPU and nothing but that.

    It looks at sizes: to be asked behind `is_observed`, for a tracer would write down what comes of that.
    """
    if type(layer).forward is not _LINEAR or "bias" not in layer._parameters:
        return False
    weight, bias = layer._parameters.get("weight"), layer._parameters["bias"]
    return (
        _is_plain(hidden_states)
        and _is_plain(weight)
        and weight.is_contiguous()
        and weight.shape == (layer.out_features, layer.in_features)
        and hidden_states.shape[-1] == layer.in_features
        and (bias is None or (_is_plain(bias) and bias.shape == (layer.out_features,)))
        and not torch.is_autocast_enabled("cpu")
        and not is_hooked(layer)
    )


def is_large(rows: int, weights: int) -> bool:
    """Whether a product of so many rows with so many weights is worth dividing."""
    return rows * weights >= LARGE


def is_hooked(layer: nn.Module) -> bool:
    """Whether more happens when this layer is called than its class's `forward`."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in layer.__dict__  # as accelerate hooks itself in
        or torch.nn.modules.module._has_any_global_hook()
    )


def _blocks(layer: nn.Module, hidden_states: Tensor) -> int:
    """How many blocks of outputs to multiply at once; 0 writes the product out, 1 leaves all to the layer."""
    if torch.is_grad_enabled() or type(layer).forward is not _LINEAR or not torch._C.has_mkl:
        return 1
    if is_observed(hidden_states):
        return 1
    inputs, outputs, elements = layer.in_features, layer.out_features, hidden_states.numel()
    large, threads = is_large(elements, outputs), torch.get_num_threads()
    middling = elements == inputs and inputs * outputs >= MIDDLE and threads > 1 and _reads_slowly()
    if elements > FEW * inputs or not (large or middling) or not is_bare(layer, hidden_states):
        return 1
    return max(1, min(threads, outputs // LEAST)) if large else 0


@functools.cache
def _reads_slowly() -> bool:
    """Whether this is a processor on which MKL was seen to read weights slowly; an EPYC is all that was measured."""
    try:
        processor = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        processor = platform.processor()
    return "AuthenticAMD" in processor


def _written_out(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`row` `[1, in]` times `weight` `[out, in]`, whose products fit the cache: `[out]`."""
    product = torch.mul(weight, row).sum(dim=-1)
    return product if bias is None else product.add_(bias)


def _divided(rows: Tensor, weight: Tensor, bias: Tensor | None, blocks: int) -> Tensor:
    """`rows` `[N, in]` times `weight` `[out, in]`, in so many blocks of outputs and what is left: `[N, out]`."""
    outputs = weight.shape[0]
    even = outputs // blocks * blocks
    product = _in_blocks(rows, weight[:even], None if bias is None else bias[:even], blocks)
    if even < outputs:
        rest = nn.functional.linear(rows, weight[even:], None if bias is None else bias[even:])
        product = torch.cat([product, rest], dim=-1)
    return product


def _in_blocks(rows: Tensor, weight: Tensor, bias: Tensor | None, blocks: int) -> Tensor:
    """`rows` `[N, in]` times `weight` `[out, in]`, whose outputs come in so many blocks: `[N, out]`."""
    (count, inputs), outputs = rows.shape, weight.shape[0]
    rows, weight = rows.expand(blocks, count, inputs), weight.view(blocks, -1, inputs)
    if count <= 2 and inputs > outputs:
        # Long sums of one or two rows: 3,072 to 768 on an EPYC 0.42 ms, weights on the left 0.53, undivided 0.56.
        product = _multiply(rows, weight.mT, None if bias is None else bias.view(blocks, 1, -1))
        return product.transpose(0, 1).reshape(count, outputs)
    product = _multiply(weight, rows.mT, None if bias is None else bias.view(blocks, -1, 1))
    return product.view(outputs, count).t().contiguous()


def _multiply(left: Tensor, right: Tensor, summand: Tensor | None) -> Tensor:
    return torch.bmm(left, right) if summand is None else torch.baddbmm(summand, left, right)


def _is_plain(tensor: object) -> bool:
    known = type(tensor) in PLAIN_TENSORS
    return known and tensor.is_cpu and tensor.dtype == torch.float32 and tensor.layout is torch.strided
