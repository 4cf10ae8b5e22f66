"""Packed sequences on the eager path: one after the other, each on its own rows and with its own row of the state.

Operators of their own, as in `autograd.py`, so that the compiler need not know how many sequences there are. The
backward pass runs each sequence's forward pass again: what a sequence has to keep depends on its length, and the
shapes of an operator's outputs may not depend on the numbers in `cu_seqlens`.
"""

import torch
from torch import Tensor

from ..custom_operator import custom_operator
from .eager_bidirectional import bidirectional_backward, bidirectional_forward
from .eager_causal import causal_backward, causal_forward
from .feature_maps import FeatureMap
from .state import LinearAttentionState


def _sequences(cu_seqlens: Tensor):
    """The rows of each sequence. Waits for the device, if `cu_seqlens` is on one."""
    borders = cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(borders, borders[1:], strict=False)]


def _rows_of(index: int, here: slice, tensors, mask, state):
    """What belongs to one sequence: its rows of the tensors and of the mask, and its state."""
    rows = [t[:, :, here] for t in tensors]
    of_mask = None if mask is None else mask[:, here]
    return rows, of_mask, LinearAttentionState(*(part[index : index + 1] for part in state))


def _sequence_forward(query, key, value, feature_map, mask, state, causal):
    """Output, final state, and the last arguments of the backward pass after its `output`."""
    if causal:
        output, end, *saved = causal_forward(query, key, value, feature_map, mask, state, True)
        return output, end, saved
    output, end, denominators = bidirectional_forward(query, key, value, feature_map, mask, state)
    return output, end, (denominators, end, state.log_scale)


def _packed_forward(query, key, value, feature_map, mask, state, causal, cu_seqlens):
    """Output `[1, H, N, V]` (not rounded yet) and the final states, one row for each sequence."""
    output = state.key_value.new_zeros(*query.shape[:3], value.shape[-1])
    end = LinearAttentionState(*(torch.empty_like(part, memory_format=torch.contiguous_format) for part in state))
    for index, here in enumerate(_sequences(cu_seqlens)):
        rows, of_mask, start = _rows_of(index, here, (query, key, value), mask, state)
        output[:, :, here], final, _ = _sequence_forward(*rows, feature_map, of_mask, start, causal)
        for part, of_sequence in zip(end, final, strict=True):
            part[index] = of_sequence[0]
    return output, end


def _packed_backward(grad_output, grad_state, query, key, value, feature_map, wanted, mask, state, causal, cu_seqlens):
    """Gradients of query, key, value, of the initial sums, of projection and bias, as `causal_backward` has them."""
    backward = causal_backward if causal else bidirectional_backward
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    grads_of_sums = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in state[:2]]
    parameters = [
        torch.zeros_like(t) if want else None
        for t, want in zip((feature_map.projection, feature_map.bias), wanted, strict=True)
    ]
    for index, here in enumerate(_sequences(cu_seqlens)):
        rows, of_mask, start = _rows_of(index, here, (query, key, value), mask, state)
        output, _, saved = _sequence_forward(*rows, feature_map, of_mask, start, causal)
        of_state = [grad[index : index + 1] for grad in grad_state]
        *of_rows, of_sum, of_total, of_projection, of_bias = backward(
            grad_output[:, :, here], of_state, *rows, feature_map, wanted, of_mask, output, *saved
        )
        for grad, of_sequence in zip(grads, of_rows, strict=True):
            grad[:, :, here] = of_sequence
        for grad, of_sequence in zip(grads_of_sums, (of_sum, of_total), strict=True):
            grad[index] = of_sequence[0]
        for grad, of_sequence in zip(parameters, (of_projection, of_bias), strict=True):
            if grad is not None:
                grad += of_sequence
    return *grads, *grads_of_sums, *parameters


@custom_operator("linear_attention_packed_forward")
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    log_scale: Tensor,
    mask: Tensor | None,
    projection: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    function: str,
    scale: float,
    epsilon: float,
    subtract_norm: bool,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        feature_map = FeatureMap(function, projection, bias, scale, epsilon, subtract_norm)
        state = LinearAttentionState(key_value, key_sum, log_scale)
        output, end = _packed_forward(query, key, value, feature_map, mask, state, causal, cu_seqlens)
        return output, *end


@_forward.register_fake
def _(query, key, value, key_value, key_sum, log_scale, *_):
    parts = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (key_value, key_sum, log_scale))
    return key_value.new_empty(*query.shape[:3], value.shape[-1]), *parts


@custom_operator("linear_attention_packed_backward")
def _backward(
    grad_output: Tensor,
    grad_key_value: Tensor,
    grad_key_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    log_scale: Tensor,
    mask: Tensor | None,
    projection: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    function: str,
    scale: float,
    epsilon: float,
    subtract_norm: bool,
    causal: bool,
    grad_of_projection: bool,
    grad_of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        feature_map = FeatureMap(function, projection, bias, scale, epsilon, subtract_norm)
        state = LinearAttentionState(key_value, key_sum, log_scale)
        wanted = (grad_of_projection, grad_of_bias)
        grad_state = (grad_key_value, grad_key_sum)
        grads = _packed_backward(
            grad_output, grad_state, query, key, value, feature_map, wanted, mask, state, causal, cu_seqlens
        )
        # An operator returns tensors only: an empty one stands for "not wanted".
        return tuple(key_sum.new_empty(0) if grad is None else grad for grad in grads)


@_backward.register_fake
def _(
    grad_output, grad_key_value, grad_key_sum, query, key, value, key_value, key_sum, log_scale, mask, projection,
    bias, cu_seqlens, function, scale, epsilon, norm, causal, grad_of_projection, grad_of_bias,
):  # fmt: skip
    like = [query, key, value, key_value, key_sum]
    parameters = [(projection, grad_of_projection), (bias, grad_of_bias)]
    return (
        *(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like),
        *(torch.empty_like(t) if wanted else key_sum.new_empty(0) for t, wanted in parameters),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(output[3])  # the scale cancels in the output: see LinearAttentionState


def _backward_of_forward(ctx, grad_output, grad_key_value, grad_key_sum, _):
    wanted = [ctx.needs_input_grad[7], ctx.needs_input_grad[8]]
    grads = _backward(grad_output, grad_key_value, grad_key_sum, *ctx.saved_tensors, *ctx.options, *wanted)
    query, key, value, key_value, key_sum, projection, bias = grads
    parameters = [grad if want else None for grad, want in zip((projection, bias), wanted, strict=True)]
    return query, key, value, key_value, key_sum, None, None, *parameters, *[None] * 6


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)


def linear_attention_packed(
    query, key, value, feature_map: FeatureMap, mask, state: LinearAttentionState, causal: bool, cu_seqlens: Tensor
):
    """Packed sequences as a differentiable function: output and final states."""
    function, projection, bias, *options = feature_map
    output, *new_state = _forward(
        query, key, value, *state, mask, projection, bias, cu_seqlens, function, *options, causal
    )
    return output.to(value.dtype), LinearAttentionState(*new_state)
