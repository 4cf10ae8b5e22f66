"""Joins the launchers of the Triton path into a differentiable operation, as `autograd.py` does for the eager path."""

import torch
from torch import Tensor

from ..custom_operator import custom_operator
from .feature_maps import EXPONENTIAL, FeatureMap
from .state import LinearAttentionState


try:  # Without Triton nobody gets here: `resolve_backend` says why.
    from .triton_backward import backward
    from .triton_decode import decode
    from .triton_forward import forward
except ImportError:
    backward = decode = forward = None


@custom_operator("linear_attention_triton_forward")
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
    cu_seqlens: Tensor | None,
    function: str,
    scale: float,
    epsilon: float,
    subtract_norm: bool,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    feature_map = FeatureMap(function, projection, bias, scale, epsilon, subtract_norm)
    state = LinearAttentionState(key_value, key_sum, log_scale)
    output, end, saved = forward(query, key, value, feature_map, mask, state, causal, cu_seqlens)
    return output, *end, *saved


@_forward.register_fake
def _(
    query, key, value, key_value, key_sum, log_scale, mask, projection, bias, cu_seqlens, function, scale, epsilon,
    norm, causal,
):  # fmt: skip
    of_queries, of_keys = query.shape[:3], key.shape[:3]
    has_scales = function == EXPONENTIAL
    return (
        query.new_empty(*of_queries, value.shape[-1]),
        *(torch.empty_like(part, memory_format=torch.contiguous_format) for part in (key_value, key_sum, log_scale)),
        key_sum.new_empty(of_queries if has_scales else 0),
        key_sum.new_empty(of_keys if has_scales else 0),
        key_sum.new_empty(of_keys if has_scales else 0),
        key_sum.new_empty(of_queries),
        key_sum.new_empty(of_queries if causal else 0),
    )


@custom_operator("linear_attention_triton_backward")
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
    cu_seqlens: Tensor | None,
    output: Tensor,
    final_key_value: Tensor,
    final_key_sum: Tensor,
    final_log_scale: Tensor,
    query_normalizers: Tensor,
    key_normalizers: Tensor,
    key_scales: Tensor,
    reciprocals: Tensor,
    running: Tensor,
    function: str,
    scale: float,
    epsilon: float,
    subtract_norm: bool,
    causal: bool,
    grad_of_projection: bool,
    grad_of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = backward(
        grad_output,
        (grad_key_value, grad_key_sum),
        query,
        key,
        value,
        FeatureMap(function, projection, bias, scale, epsilon, subtract_norm),
        (grad_of_projection, grad_of_bias),
        mask,
        LinearAttentionState(key_value, key_sum, log_scale),
        causal,
        cu_seqlens,
        output,
        LinearAttentionState(final_key_value, final_key_sum, final_log_scale),
        (query_normalizers, key_normalizers, key_scales, reciprocals, running),
    )
    # An operator returns tensors only: an empty one stands for "not wanted".
    return tuple(reciprocals.new_empty(0) if grad is None else grad for grad in grads)


@_backward.register_fake
def _(
    grad_output, grad_key_value, grad_key_sum, query, key, value, key_value, key_sum, log_scale, mask, projection,
    bias, cu_seqlens, output, final_key_value, final_key_sum, final_log_scale, query_normalizers, key_normalizers,
    key_scales, reciprocals, running, function, scale, epsilon, norm, causal, grad_of_projection, grad_of_bias,
):  # fmt: skip
    like = [query, key, value, key_value, key_sum]
    parameters = [(projection, grad_of_projection), (bias, grad_of_bias)]
    return (
        *(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like),
        *(torch.empty_like(t) if wanted else reciprocals.new_empty(0) for t, wanted in parameters),
    )


def _setup_context(ctx, inputs, output):
    *tensors, function, scale, epsilon, subtract_norm, causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = function, scale, epsilon, subtract_norm, causal
    ctx.set_materialize_grads(True)
    # The scale cancels in the output: see LinearAttentionState. The rest is for the backward pass alone.
    ctx.mark_non_differentiable(*output[3:])


def _backward_of_forward(ctx, grad_output, grad_key_value, grad_key_sum, *_):
    wanted = [ctx.needs_input_grad[7], ctx.needs_input_grad[8]]
    grads = _backward(grad_output, grad_key_value, grad_key_sum, *ctx.saved_tensors, *ctx.options, *wanted)
    query, key, value, key_value, key_sum, projection, bias = grads
    parameters = [grad if want else None for grad, want in zip((projection, bias), wanted, strict=True)]
    return query, key, value, key_value, key_sum, None, None, *parameters, *[None] * 6


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)


def linear_attention_triton(
    query,
    key,
    value,
    feature_map: FeatureMap,
    mask,
    state: LinearAttentionState,
    causal: bool,
    cu_seqlens: Tensor | None = None,
):
    """The kernels as a differentiable function: output and final state."""
    function, projection, bias, *options = feature_map
    output, *new_state = _forward(
        query, key, value, *state, mask, projection, bias, cu_seqlens, function, *options, causal
    )[:4]
    return output, LinearAttentionState(*new_state)


@custom_operator("linear_attention_triton_decode")
def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    log_scale: Tensor,
    mask: Tensor | None,
    projection: Tensor | None,
    bias: Tensor | None,
    function: str,
    scale: float,
    epsilon: float,
    subtract_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    feature_map = FeatureMap(function, projection, bias, scale, epsilon, subtract_norm)
    state = LinearAttentionState(key_value, key_sum, log_scale)
    output, state = decode(query, key, value, feature_map, mask, state, in_place=False)
    return output, *state


@_decode.register_fake
def _(query, key, value, key_value, key_sum, log_scale, *_):
    parts = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (key_value, key_sum, log_scale))
    return query.new_empty(*query.shape[:3], value.shape[-1]), *parts


def step_triton(query, key, value, feature_map: FeatureMap, mask, state: LinearAttentionState, in_place: bool):
    """One causal token without gradients: output and new state, which is `state` itself if `in_place`."""
    if in_place and not torch.compiler.is_compiling() and all(part.is_contiguous() for part in state):
        return decode(query, key, value, feature_map, mask, state, in_place=True)
    function, projection, bias, *options = feature_map
    output, *new_state = _decode(query, key, value, *state, mask, projection, bias, function, *options)
    return output, LinearAttentionState(*new_state)
