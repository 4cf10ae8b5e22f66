"""Joins the forward and backward passes of both methods into differentiable operations. No maths here.

Each pass is a custom operator, so that `torch.compile` and `torch.export` see one node.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from ..backend import in_function_transform, is_observed
from ..custom_operator import custom_operator
from .eager import descent_backward, descent_forward, exact_backward, exact_forward


try:  # Without Triton nobody gets as far as asking for these: see resolve_backend.
    from .triton_backward import descent_backward as descent_backward_triton
    from .triton_backward import exact_backward as exact_backward_triton
    from .triton_forward import descent_forward as descent_forward_triton
    from .triton_forward import exact_forward as exact_forward_triton
except ImportError:
    pass


def _exact(
    logits: Tensor, k: Tensor, mask: Tensor | None, eps: float, num_selected: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, indices, pivot and offset of logits `[R, N]`: see `eager.exact_forward`."""
    with _no_autocast(logits):
        forward = exact_forward_triton if backend == "triton" else exact_forward
        return forward(logits, k, mask, eps, num_selected)


soft_topk_exact_operator = custom_operator("soft_topk_exact")(_exact)


@soft_topk_exact_operator.register_fake
def _(logits, k, mask, eps, num_selected, backend):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores, indices = _fake_outputs(logits, num_selected)
    return scores, indices, *(logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2))


@custom_operator("soft_topk_exact_backward")
def soft_topk_exact_backward(
    grad: Tensor, logits: Tensor, mask: Tensor | None, pivot: Tensor, offset: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and k, in the dtypes of logits and pivot."""
    with _no_autocast(logits):
        grad_logits, grad_k = (exact_backward_triton if backend == "triton" else exact_backward)(
            grad, logits, mask, pivot, offset, eps
        )
    return grad_logits.to(logits.dtype), grad_k


@soft_topk_exact_backward.register_fake
def _(grad, logits, mask, pivot, offset, eps, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format), torch.empty_like(pivot)


@custom_operator("soft_topk_descent")
def soft_topk_descent_operator(
    logits: Tensor, k: Tensor, mask: Tensor | None, temperatures: list[float], num_selected: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, indices and duals of logits `[R, N]`: see `eager.descent_forward`."""
    with _no_autocast(logits):
        return (descent_forward_triton if backend == "triton" else descent_forward)(
            logits, k, mask, temperatures, num_selected
        )


@soft_topk_descent_operator.register_fake
def _(logits, k, mask, temperatures, num_selected, backend):
    duals = logits.new_empty(logits.shape[0], len(temperatures) - 1, dtype=torch.float64)
    return *_fake_outputs(logits, num_selected), duals


@custom_operator("soft_topk_descent_backward")
def soft_topk_descent_backward(
    grad: Tensor,
    logits: Tensor,
    k: Tensor,
    mask: Tensor | None,
    duals: Tensor,
    temperatures: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and k, in the dtypes of both."""
    with _no_autocast(logits):
        grad_logits, grad_k = (descent_backward_triton if backend == "triton" else descent_backward)(
            grad, logits, k, mask, duals, temperatures
        )
    return grad_logits.to(logits.dtype), grad_k.to(k.dtype)


@soft_topk_descent_backward.register_fake
def _(grad, logits, k, mask, duals, temperatures, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format), torch.empty_like(k)


def _no_autocast(tensor):
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _fake_outputs(logits, num_selected):
    scores = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return scores, logits.new_empty(logits.shape[0], num_selected, dtype=torch.int64)


def _setup_exact(ctx, inputs, output):
    logits, _, mask, *options = inputs
    ctx.save_for_backward(logits, mask, *output[2:])
    ctx.eps, ctx.backend = options[0], options[-1]
    ctx.mark_non_differentiable(*output[1:])


def _backward_of_exact(ctx, grad, *_):
    backward = _TransformedExactBackward.apply if in_function_transform() else soft_topk_exact_backward
    grad_logits, grad_k = backward(grad, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return grad_logits, grad_k, None, None, None, None


def _setup_descent(ctx, inputs, output):
    logits, k, mask, *options = inputs
    ctx.save_for_backward(logits, k, mask, output[2])
    ctx.temperatures, ctx.backend = options[0], options[-1]
    ctx.mark_non_differentiable(*output[1:])


def _backward_of_descent(ctx, grad, *_):
    backward = _TransformedDescentBackward.apply if in_function_transform() else soft_topk_descent_backward
    grad_logits, grad_k = backward(grad, *ctx.saved_tensors, ctx.temperatures, ctx.backend)
    return grad_logits, grad_k, None, None, None, None


soft_topk_exact_operator.register_autograd(_backward_of_exact, setup_context=_setup_exact)
soft_topk_descent_operator.register_autograd(_backward_of_descent, setup_context=_setup_descent)


def _vmap_over_rows(operator) -> None:
    """Rows are independent of each other: a batch of calls is one call with all their rows."""

    def fold(info, in_dims, *inputs):
        def rows_of(value, dim):
            if not isinstance(value, Tensor):
                return value
            batched = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            return batched.flatten(0, 1)

        outputs = operator(*map(rows_of, inputs, in_dims))
        calls = tuple(output.unflatten(0, (info.batch_size, len(output) // info.batch_size)) for output in outputs)
        return calls, (0,) * len(calls)

    operator.register_vmap(fold)


for _operator in (
    soft_topk_exact_operator,
    soft_topk_exact_backward,
    soft_topk_descent_operator,
    soft_topk_descent_backward,
):
    _vmap_over_rows(_operator)


def _setup_nothing(ctx, inputs, output):
    """For a derivative that is refused."""


def _refuse(ctx, *grads):
    raise NotImplementedError("soft_topk has a first derivative only")


# The operators once more for `torch.func`, which knows no derivatives that are registered with an operator. Their
# arguments are written out and the operators named: torch.compile follows neither a star nor a closure here.


class _TransformedExact(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context, backward = staticmethod(_setup_exact), staticmethod(_backward_of_exact)

    @staticmethod
    def forward(logits, k, mask, eps, num_selected, backend):
        return soft_topk_exact_operator(logits, k, mask, eps, num_selected, backend)


class _TransformedExactBackward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context, backward = staticmethod(_setup_nothing), staticmethod(_refuse)

    @staticmethod
    def forward(grad, logits, mask, pivot, offset, eps, backend):
        return soft_topk_exact_backward(grad, logits, mask, pivot, offset, eps, backend)


class _TransformedDescent(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context, backward = staticmethod(_setup_descent), staticmethod(_backward_of_descent)

    @staticmethod
    def forward(logits, k, mask, temperatures, num_selected, backend):
        return soft_topk_descent_operator(logits, k, mask, temperatures, num_selected, backend)


class _TransformedDescentBackward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context, backward = staticmethod(_setup_nothing), staticmethod(_refuse)

    @staticmethod
    def forward(grad, logits, k, mask, duals, temperatures, backend):
        return soft_topk_descent_backward(grad, logits, k, mask, duals, temperatures, backend)


class _ExactFunction(torch.autograd.Function):
    """The operator's two passes without an operator around them.

    The scores are its only output, as all that has a gradient: autograd would spend time on each of the others, which
    go into the list `others`.
    """

    @staticmethod
    def forward(ctx, others, logits, k, mask, eps, num_selected, backend):
        scores, *rest = _exact(logits, k, mask, eps, num_selected, backend)
        others += rest
        ctx.save_for_backward(logits, mask, *rest[1:])
        ctx.eps, ctx.backend = eps, backend
        return scores

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # to be differentiated again, which the operator refuses
            return None, *_backward_of_exact(ctx, grad)
        logits, *saved = ctx.saved_tensors
        backward = exact_backward_triton if ctx.backend == "triton" else exact_backward
        with _no_autocast(logits):
            grad_logits, grad_k = backward(grad, logits, *saved, ctx.eps)
        return None, grad_logits.to(logits.dtype), grad_k, None, None, None, None


def soft_topk_exact(
    logits: Tensor, k: Tensor, mask: Tensor | None, eps: float, num_selected: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `soft_topk_exact_operator`, which in a short row takes a quarter of the time: left out where nobody looks."""
    inputs = (logits, k, mask, eps, num_selected, backend)
    if in_function_transform():
        return _TransformedExact.apply(*inputs)
    if is_observed(logits, k):
        return soft_topk_exact_operator(*inputs)
    if not torch.is_grad_enabled():
        return _exact(*inputs)
    others = []
    return _ExactFunction.apply(others, *inputs), *others


def soft_topk_descent(
    logits: Tensor, k: Tensor, mask: Tensor | None, temperatures: list[float], num_selected: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `soft_topk_descent_operator`, also inside `torch.func`."""
    descend = _TransformedDescent.apply if in_function_transform() else soft_topk_descent_operator
    return descend(logits, k, mask, temperatures, num_selected, backend)
