"""Joins the forward and backward passes into one differentiable operation. No maths here.

The two passes are custom operators, so that `torch.compile` and `torch.export` see one node each instead of loops over
tiles. `operands.py` has the signature that the passes of every backend share; the choice between the backends is the
one `if` of `_passes`.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from ..custom_operator import custom_operator
from .eager import backward as eager_backward
from .eager import forward as eager_forward
from .eager_tiles import empty_output as eager_output
from .flops import backward_flops, forward_flops
from .operands import Gradients, Operands, Options, Wanted


try:
    from .triton_backward import backward as triton_backward
    from .triton_forward import forward as triton_forward
except ImportError:  # without Triton, `resolve_backend` never answers "triton"
    triton_backward = triton_forward = None


# Heads mostly come out of the last dimension of a projection, and their gradients go back there: a copy less.
GRADIENT_FORMATS = {"eager": torch.preserve_format, "triton": torch.contiguous_format}


def _passes(backend: str):
    """The forward and the backward function of a backend, `"eager"` or `"triton"`."""
    if backend == "triton":
        return triton_forward, triton_backward
    return eager_forward, eager_backward


@custom_operator("flash_attention_forward", flops=forward_flops)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    distance_bias: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    operands = Operands(
        query, key, value, key_mask, key_lengths, query_lengths, alibi_slopes, distance_bias, memory_key,
        memory_value, sinks, dropout_seed,
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        return _passes(backend)[0](operands, Options(scale, left, right, softcap, dropout_p))


@_forward.register_fake
def _(query, key, value, *rest):
    shape = query.shape[:3]
    if rest[-1] == "eager":
        return eager_output(query, value.shape[3]), query.new_empty(shape, dtype=torch.float64)
    return query.new_empty(*shape, value.shape[3]), query.new_empty(shape, dtype=torch.float32)


@custom_operator("flash_attention_backward", flops=backward_flops)
def _backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    distance_bias: Tensor | None,
    memory_key: Tensor | None,
    memory_value: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    backend: str,
    grad_of_slopes: bool,
    grad_of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = Operands(
        query, key, value, key_mask, key_lengths, query_lengths, alibi_slopes, distance_bias, memory_key,
        memory_value, sinks, dropout_seed,
    )  # fmt: skip
    options, wanted = Options(scale, left, right, softcap, dropout_p), Wanted(grad_of_slopes, grad_of_bias)
    with torch.autocast(query.device.type, enabled=False):
        gradients = _passes(backend)[1](operands, options, output, lse, grad_output, grad_lse, wanted)
    # An operator returns tensors only: an empty one stands for "not wanted".
    found = zip(gradients, (getattr(operands, name) for name in Gradients._fields), strict=True)
    return tuple(query.new_empty(0) if g is None else _laid_out(g, t, backend) for g, t in found)


@_backward.register_fake
def _(
    grad_output, grad_lse, output, lse, query, key, value, key_mask, key_lengths, query_lengths, alibi_slopes,
    distance_bias, memory_key, memory_value, sinks, dropout_seed, scale, left, right, softcap, dropout_p, backend,
    grad_of_slopes, grad_of_bias,
):  # fmt: skip
    slopes = alibi_slopes if grad_of_slopes else None
    bias = distance_bias if grad_of_bias else None
    like = query, key, value, slopes, bias, memory_key, memory_value, sinks
    return tuple(
        query.new_empty(0) if t is None else torch.empty_like(t, memory_format=GRADIENT_FORMATS[backend]) for t in like
    )


def _laid_out(gradient: Tensor, operand: Tensor, backend: str) -> Tensor:
    """The gradient with the strides that the operator promises: the eager path's are those of the operand."""
    empty = torch.empty_like(operand, memory_format=GRADIENT_FORMATS[backend], device="meta")
    return (
        gradient
        if gradient.stride() == empty.stride()
        else gradient.new_empty_strided(empty.shape, empty.stride()).copy_(gradient)
    )


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[: len(Operands._fields)], inputs[len(Operands._fields) :]
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(True)


def _backward_of_forward(ctx, grad_output, grad_lse):
    wanted = [ctx.needs_input_grad[Operands._fields.index(name)] for name in Wanted._fields]
    found = _backward(grad_output, grad_lse, *ctx.saved_tensors, *ctx.options, *wanted)
    gradients = dict(zip(Gradients._fields, found, strict=True))
    operands = [
        gradients[name] if name in gradients and needed else None
        for name, needed in zip(Operands._fields, ctx.needs_input_grad, strict=False)
    ]
    return (*operands, *(None for _ in ctx.options))


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)


def attend(operands: Operands, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """Output and lse on a backend, as a differentiable function."""
    query = operands.query
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    if differentiable or torch.compiler.is_compiling():
        output, lse = _forward(*operands, *options, backend)
    else:  # an operator costs as much as a step of decoding
        autocast = torch.is_autocast_enabled(query.device.type)
        with torch.autocast(query.device.type, enabled=False) if autocast else nullcontext():
            output, lse = _passes(backend)[0](operands, options)
    return output, lse.to(torch.promote_types(query.dtype, torch.float32))


def gradients(
    operands: Operands, options: Options, output: Tensor, lse: Tensor, grad_output: Tensor, backend: str
) -> Gradients:
    """Gradients of an output that is given, not computed; itself not differentiable."""
    with torch.no_grad(), torch.autocast(operands.query.device.type, enabled=False):
        return _passes(backend)[1](operands, options, output, lse, grad_output, None, Wanted(False, False))
