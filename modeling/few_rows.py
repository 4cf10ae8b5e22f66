"""Linear layers of few rows on a CPU: what a step of decoding spends most of its time in."""

import functools

import torch
from torch import Tensor, nn

from ..kernels.backend import is_observed


# With more rows, a product of matrices keeps the threads busy by itself.
FEW = 16
# Products of fewer multiplications take less time than dividing them does.
LARGE = 2**19


def project(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    """`layer(hidden_states)`; few rows on a CPU are multiplied by all threads.

    A few rows times a weight take as long as reading the weight does, and the BLAS behind `nn.functional.linear` may
    read it in one thread. Here the weight's outputs are divided into as many blocks as there are threads, of which
    `torch.bmm` gives one to each. No sum is divided, so the result is the layer's up to the order of its sums.

    Args:
        layer: any module. Divided is an `nn.Linear` in float32 that nobody has hooked, wrapped or replaced, where no
            gradient is asked for and rows times weights are at least `LARGE`.
        hidden_states: `[..., in_features]`, of at most `FEW` rows to be divided.

    Returns:
        `[..., out_features]`.
    """
    blocks = _blocks(layer, hidden_states)
    if blocks == 1:
        return layer(hidden_states)
    inputs, outputs = layer.in_features, layer.out_features
    count = hidden_states.numel() // inputs
    rows = hidden_states.reshape(count, inputs).expand(blocks, count, inputs)
    weight, bias = layer._parameters["weight"].view(blocks, -1, inputs), layer._parameters["bias"]
    if count <= 2 and inputs > outputs:
        # Long sums of one or two rows: 3,072 to 768 on an EPYC 0.42 ms, weights on the left 0.53, undivided 0.56.
        product = _multiply(rows, weight.mT, None if bias is None else bias.view(blocks, 1, -1))
        product = product.transpose(0, 1)
    else:
        product = _multiply(weight, rows.mT, None if bias is None else bias.view(blocks, -1, 1))
        product = product.view(outputs, count).t()
    return product.reshape(*hidden_states.shape[:-1], outputs).contiguous()


def _multiply(left: Tensor, right: Tensor, summand: Tensor | None) -> Tensor:
    return torch.bmm(left, right) if summand is None else torch.baddbmm(summand, left, right)


def _blocks(layer: nn.Module, hidden_states: Tensor) -> int:
    """How many blocks of outputs to multiply at once; 1 leaves all to the layer."""
    # In the order of what it costs to ask, and of how often it decides.
    if type(layer) is not nn.Linear or torch.is_grad_enabled() or not torch._C.has_mkl:
        return 1
    inputs, outputs = layer.in_features, layer.out_features
    elements = hidden_states.numel()
    if elements > FEW * inputs or elements * outputs < LARGE:
        return 1
    weight = layer._parameters.get("weight")
    whole = (
        weight is None
        or not hidden_states.is_cpu
        or not hidden_states.dtype == weight.dtype == torch.float32
        or weight.shape != (outputs, inputs)
        or hidden_states.shape[-1] != inputs
        or not weight.is_contiguous()
        or torch.is_autocast_enabled("cpu")
        or _is_hooked(layer)
        or is_observed(hidden_states, weight)
    )
    return 1 if whole else _divisor(outputs, torch.get_num_threads())


def _is_hooked(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in layer.__dict__  # as accelerate hooks itself in
        or torch.nn.modules.module._has_any_global_hook()
    )


@functools.cache
def _divisor(outputs: int, threads: int) -> int:
    """The most blocks of the same size, not more than one for each thread."""
    return next(blocks for blocks in range(threads, 0, -1) if outputs % blocks == 0)
