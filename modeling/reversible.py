"""Reversible residual stacks (arXiv 1707.04585, arXiv 2001.04451): depth without stored activations.

    y1 = x1 + f(x2),  y2 = x2 + g(y1)        so        x2 = y2 - g(y1),  x1 = y1 - f(x2)

The stack is one autograd function that takes every parameter as an input and returns its gradient. It never
accumulates gradients behind autograd's back, so `torch.autograd.grad`, hooks and DDP see what they expect; random
states are kept in training and in evaluation alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


# A branch maps a stream `[B, N, C]` to its update, reading its side inputs (masks, positions, …) from a closure and
# the differentiable context (encoder states, or None) from its second argument.
Branch = Callable[[Tensor, Tensor | None], Tensor]


def reversible_stack(
    hidden_states: Tensor,
    context: Tensor | None,
    blocks: list[tuple[Branch, Branch]],
    parameters: list[Tensor],
    recompute: bool = True,
) -> Tensor:
    """Run `blocks` on two copies of `hidden_states` `[B, N, C]` and return the sum of the two streams.

    Args:
        hidden_states: the input of both streams.
        context: a tensor that the branches read and that needs a gradient, or None.
        blocks: pairs `(f, g)` of branches.
        parameters: every parameter that the branches use, so that autograd hears of them.
        recompute: False keeps the activations instead, for branches that must run once only (they fill a cache).
    """
    if not (recompute and torch.is_grad_enabled()):
        return _forward(hidden_states, context, blocks, None)[0]
    return _ReversibleStack.apply(blocks, hidden_states, context, *parameters)


class _RandomState:
    """The random state before a branch, put back for its recomputation."""

    def __init__(self, tensor: Tensor):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(tensor)

    def replay(self):
        return _Replay(self)


class _Replay:
    def __init__(self, state: _RandomState):
        self.state = state
        self.fork = torch.random.fork_rng(devices=state.devices)

    def __enter__(self):
        self.fork.__enter__()
        torch.set_rng_state(self.state.cpu)
        set_device_states(self.state.devices, self.state.states)

    def __exit__(self, *error):
        self.fork.__exit__(*error)


def _forward(hidden_states, context, blocks, random_states):
    x1 = x2 = hidden_states
    for f, g in blocks:
        if random_states is not None:
            random_states.append(_RandomState(hidden_states))
        x1 = x1 + f(x2, context)
        if random_states is not None:
            random_states.append(_RandomState(hidden_states))
        x2 = x2 + g(x1, context)
    return x1 + x2, x1, x2


class _ReversibleStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks, hidden_states, context, *parameters):
        ctx.blocks, ctx.parameters, ctx.random_states = blocks, parameters, []
        ctx.autocast = _autocast_arguments(hidden_states.device.type)
        with torch.no_grad():
            output, x1, x2 = _forward(hidden_states, context, blocks, ctx.random_states)
        ctx.save_for_backward(x1, x2, context)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        y1, y2, context = ctx.saved_tensors
        grad1 = grad2 = grad_output
        totals: dict[int, Tensor] = {}
        grad_context = None
        random_states = list(ctx.random_states)
        wanted = [p for p, needed in zip(ctx.parameters, ctx.needs_input_grad[3:], strict=True) if needed]

        def pull_back(branch, stream, grad):
            """The branch's value, and the gradient into its stream; parameters and context accumulate."""
            nonlocal grad_context
            stream = stream.detach().requires_grad_()
            inner_context = None
            if context is not None:
                inner_context = context.detach().requires_grad_(ctx.needs_input_grad[2])
            with torch.enable_grad(), random_states.pop().replay(), torch.autocast(**ctx.autocast):
                value = branch(stream, inner_context)
            with_context = [inner_context] if inner_context is not None and inner_context.requires_grad else []
            grads = torch.autograd.grad(value, [stream, *with_context, *wanted], grad, allow_unused=True)
            if with_context and grads[1] is not None:
                grad_context = grads[1] if grad_context is None else grad_context + grads[1]
            for parameter, gradient in zip(wanted, grads[1 + len(with_context) :], strict=True):
                if gradient is not None:
                    key = id(parameter)
                    totals[key] = gradient if key not in totals else totals[key] + gradient
            return value.detach(), grads[0]

        for f, g in reversed(ctx.blocks):
            value, grad = pull_back(g, y1, grad2)
            y2, grad1 = y2 - value, grad1 + grad
            value, grad = pull_back(f, y2, grad1)
            y1, grad2 = y1 - value, grad2 + grad
        return None, grad1 + grad2, grad_context, *(totals.get(id(p)) for p in ctx.parameters)


def _autocast_arguments(device_type: str) -> dict:
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
