"""Linear layers of few rows on a CPU: what a step of decoding spends most of its time in."""

import torch
from torch import Tensor, nn

from ..kernels.backend import is_observed


# With more rows, a product of matrices keeps the threads busy by itself.
FEW = 16
# Products of fewer multiplications take less time than dividing them does.
LARGE = 2**19
# A block has at least as many outputs; threads beyond that get none. (A guess: two cores never ask.)
LEAST = 32
# A subclass that only starts from other weights has it too; a layer that somebody has replaced has another.
_LINEAR = nn.Linear.forward


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
    rows = hidden_states.reshape(-1, inputs)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    even = outputs // blocks * blocks
    product = _in_blocks(rows, weight[:even], None if bias is None else bias[:even], blocks)
    if even < outputs:
        rest = nn.functional.linear(rows, weight[even:], None if bias is None else bias[even:])
        product = torch.cat([product, rest], dim=-1)
    return product.view(*hidden_states.shape[:-1], outputs)


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


def _blocks(layer: nn.Module, hidden_states: Tensor) -> int:
    """How many blocks of outputs to multiply at once; 1 leaves all to the layer."""
    if torch.is_grad_enabled() or type(layer).forward is not _LINEAR or not torch._C.has_mkl:
        return 1
    # Before any size is looked at: a tracer would write down what comes of it.
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or "bias" not in layer._parameters or is_observed(hidden_states, weight):
        return 1
    inputs, outputs, elements = layer.in_features, layer.out_features, hidden_states.numel()
    if elements > FEW * inputs or elements * outputs < LARGE:
        return 1
    whole = (
        not (_is_plain(hidden_states) and _is_plain(weight) and weight.is_contiguous())
        or weight.shape != (outputs, inputs)
        or hidden_states.shape[-1] != inputs
        or (bias is not None and not (_is_plain(bias) and bias.shape == (outputs,)))
        or torch.is_autocast_enabled("cpu")
        or _is_hooked(layer)
    )
    return 1 if whole else max(1, min(torch.get_num_threads(), outputs // LEAST))


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.layout is torch.strided


def _is_hooked(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or "forward" in layer.__dict__  # as accelerate hooks itself in
        or torch.nn.modules.module._has_any_global_hook()
    )
