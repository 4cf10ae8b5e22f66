"""Joins the chunked forward and backward passes into one differentiable operation. No maths here.

The two passes are custom operators, so that `torch.compile` and `torch.export` see one node each instead of a loop
over chunks that they would unroll.
"""

import torch
from torch import Tensor

from ..backend import is_observed
from ..custom_operator import custom_operator
from .eager_bidirectional import bidirectional_backward, bidirectional_forward
from .eager_causal import causal_backward, causal_forward, saved_states
from .feature_maps import FeatureMap
from .state import LinearAttentionState


def _chunked_forward(
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
    causal: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        feature_map = FeatureMap(function, projection, bias, scale, epsilon, subtract_norm)
        state = LinearAttentionState(key_value, key_sum, log_scale)
        if causal:
            output, state, *saved = causal_forward(query, key, value, feature_map, mask, state, save_states)
        else:
            output, state, denominators = bidirectional_forward(query, key, value, feature_map, mask, state)
            saved = [denominators, key_value.new_empty(0), log_scale.new_empty(0)]
        return output, *state, *saved


_forward = custom_operator("linear_attention_forward")(_chunked_forward)


@_forward.register_fake
def _(
    query,
    key,
    value,
    key_value,
    key_sum,
    log_scale,
    mask,
    projection,
    bias,
    function,
    scale,
    epsilon,
    norm,
    causal,
    save,
):
    batch, heads, length, value_dim = *query.shape[:3], value.shape[-1]
    features = key_value.shape[2]
    chunks = saved_states(length) if save else 0
    saved = [(chunks, batch * heads, features, value_dim + 1), (chunks, batch * heads)] if causal else [(0,), (0,)]
    return (
        key_value.new_empty(batch, heads, length, value_dim),
        torch.empty_like(key_value, memory_format=torch.contiguous_format),
        torch.empty_like(key_sum, memory_format=torch.contiguous_format),
        torch.empty_like(log_scale, memory_format=torch.contiguous_format),
        key_value.new_empty(batch * heads, length),
        *(key_value.new_empty(shape) for shape in saved),
    )


@custom_operator("linear_attention_backward")
def _backward(
    grad_output: Tensor,
    grad_key_value: Tensor,
    grad_key_sum: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    initial_log_scale: Tensor,
    mask: Tensor | None,
    projection: Tensor | None,
    bias: Tensor | None,
    output: Tensor,
    final_key_value: Tensor,
    final_key_sum: Tensor,
    final_log_scale: Tensor,
    denominators: Tensor,
    memories: Tensor,
    maxima: Tensor,
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
        wanted = (grad_of_projection, grad_of_bias)
        common = (grad_output, (grad_key_value, grad_key_sum), query, key, value, feature_map, wanted, mask, output)
        if causal:
            grads = causal_backward(*common, denominators, memories, maxima)
        else:
            state = LinearAttentionState(final_key_value, final_key_sum, final_log_scale)
            grads = bidirectional_backward(*common, denominators, state, initial_log_scale)
        # An operator returns tensors only: an empty one stands for "not wanted".
        return tuple(denominators.new_empty(0) if g is None else g.contiguous() for g in grads)


@_backward.register_fake
def _(
    grad_output, grad_key_value, grad_key_sum, query, key, value, initial_log_scale, mask, projection, bias, output,
    final_key_value, final_key_sum, final_log_scale, denominators, memories, maxima, function, scale, epsilon, norm,
    causal, grad_of_projection, grad_of_bias,
):  # fmt: skip
    like = [query, key, value, final_key_value, final_key_sum]
    parameters = [(projection, grad_of_projection), (bias, grad_of_bias)]
    return (
        *(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like),
        *(torch.empty_like(t) if wanted else denominators.new_empty(0) for t, wanted in parameters),
    )


def _setup_context(ctx, inputs, output):
    query, key, value, _, _, log_scale, mask, projection, bias, *options, _ = inputs
    ctx.save_for_backward(query, key, value, log_scale, mask, projection, bias, *output)
    ctx.options = options
    # The states before the chunks are an output too, and a large one: nobody is to fill zeros for its gradient.
    ctx.set_materialize_grads(False)
    # The scale cancels in the output: see LinearAttentionState. The rest is for the backward pass alone.
    ctx.mark_non_differentiable(*output[3:])


def _backward_of_forward(ctx, *grads):
    wanted = [ctx.needs_input_grad[7], ctx.needs_input_grad[8]]
    saved = ctx.saved_tensors  # to be read once: checkpointing computes them again
    given = [torch.zeros_like(o) if grad is None else grad for grad, o in zip(grads[:3], saved[7:10], strict=True)]
    grads = _backward(*given, *saved, *ctx.options, *wanted)
    query, key, value, key_value, key_sum, projection, bias = grads
    parameters = [grad if want else None for grad, want in zip((projection, bias), wanted, strict=True)]
    return query, key, value, key_value, key_sum, None, None, *parameters, None, None, None, None, None, None


_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)


def linear_attention_eager(
    query, key, value, feature_map: FeatureMap, mask, state: LinearAttentionState, causal: bool
):
    """The chunked form as a differentiable function: output and final state."""
    tensors = (query, key, value, *state[:2], feature_map.projection, feature_map.bias)
    # The states between the chunks are worth their memory only if somebody will go back through them.
    save_states = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    function, projection, bias, *options = feature_map
    inputs = (query, key, value, *state, mask, projection, bias, function, *options, causal, save_states)
    if save_states or is_observed(*(t for t in tensors if t is not None)):
        output, *new_state = _forward(*inputs)[:4]
    else:
        with torch.no_grad():
            output, *new_state = _chunked_forward(*inputs)[:4]
    # Rounded out here: the backward pass divides by small differences from the output, which have to be exact.
    return output.to(value.dtype), LinearAttentionState(*new_state)
