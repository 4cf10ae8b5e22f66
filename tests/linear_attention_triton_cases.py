"""What the tests of the Triton path share: the device, calls that go through the kernels, and true low precision.

Triton's interpreter takes the bits of bfloat16 for integers in a matrix product, and computes TF32 as float32. So
`tensor_core_products` puts a product in its place that rounds as a GPU does.
"""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from kernel_device import DEVICE, INTERPRETED
from linear_attention_cases import doubled, empty_state, prefix_sums, reference, several, token_by_token
from ptx_arithmetic import from_bf16, to_bf16, to_tf32

from hf_efficient.kernels.linear_attention import POINTWISE_FUNCTIONS, LinearAttentionState, linear_attention


def on_device(thing):
    """Tensors, and tuples of them, where the kernels run; everything else as it is."""
    if isinstance(thing, torch.Tensor):
        return thing.to(DEVICE)
    if isinstance(thing, tuple):
        return type(thing)(*map(on_device, thing)) if hasattr(thing, "_fields") else tuple(map(on_device, thing))
    return thing


def triton_attention(query, key, value, feature_map, **options):
    """`linear_attention` through the kernels, given and returning tensors on the CPU. Differentiable."""
    arguments = [on_device(t) for t in (query, key, value, feature_map)]
    options = {name: on_device(option) for name, option in options.items()}
    output, state = linear_attention(*arguments, backend="triton", **options)
    return output.cpu(), LinearAttentionState(*(part.cpu() for part in state))


@pytest.fixture
def tensor_core_products(monkeypatch):
    """bfloat16 and TF32 under the interpreter as they are on a GPU; nothing to do where there is one."""
    if not INTERPRETED:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain_cast = builder.cast_impl

    def cast(self, source, target):
        types = source.dtype.scalar, target.scalar
        if types == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(from_bf16(source.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(to_bf16(source.data), tl.bfloat16)
        return plain_cast(self, source, target)

    def dot(self, a, b, accumulator, input_precision, _):
        left, right = (
            from_bf16(t.data) if t.dtype.scalar == tl.bfloat16 else t.data.astype(np.float32) for t in (a, b)
        )
        if a.dtype.scalar == tl.float32 and "TF32" in str(input_precision):
            left, right = to_tf32(left), to_tf32(right)
        return interpreter.TensorHandle(np.matmul(left, right) + accumulator.data, accumulator.dtype.scalar)

    monkeypatch.setattr(builder, "cast_impl", cast)
    monkeypatch.setattr(builder, "create_dot", dot)
    for name in ("create_fp_ext", "create_fp_trunc", "create_fp_to_fp"):
        monkeypatch.setattr(builder, name, lambda self, source, target, *_: cast(self, source, target))


def record_launches(monkeypatch):
    """A list to which each launch that carries sums over segments adds how many, and whether backwards.

    A CPU is given room for some.
    """
    from hf_efficient.kernels.linear_attention import triton_segments  # not at the top: there may be no Triton

    if DEVICE == "cpu":
        monkeypatch.setattr(triton_segments, "multiprocessor_count", lambda tensor: 16)
    seen, carry = [], triton_segments._carry

    class Spy:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append((arguments[5], options["REVERSE"]))
                return carry[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(triton_segments, "_carry", Spy())
    return seen


def _round(block, dtype):
    """To the digits that a matrix product sees of its operands: those of bfloat16, or of TF32 for float16."""
    if dtype == torch.bfloat16:
        return block.bfloat16().float()
    if dtype == torch.float16:
        high = block * 8193
        return high - (high - block)
    return block


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right, dtype):
        left, right = _round(left, dtype), _round(right, dtype)
        ctx.save_for_backward(left, right)
        ctx.dtype = dtype
        return left @ right

    @staticmethod
    def backward(ctx, gradient):
        left, right = ctx.saved_tensors
        gradient = _round(gradient, ctx.dtype)
        return gradient @ right.mT, left.mT @ gradient, None


class _Logits(torch.autograd.Function):
    """`x Pᵀ` with all digits; the gradients are products of the gradient of the logits as a product sees it."""

    @staticmethod
    def forward(ctx, rows, projection, dtype):
        ctx.save_for_backward(rows, projection)
        ctx.dtype = dtype
        return rows @ projection.mT

    @staticmethod
    def backward(ctx, gradient):
        rows, projection = ctx.saved_tensors
        gradient = _round(gradient, ctx.dtype)
        of_projection = gradient.flatten(0, -2).mT @ rows.flatten(0, -2)
        return gradient @ _round(projection, ctx.dtype), of_projection, None


def _features(rows, feature_map, dtype):
    """Features and the logarithms of their scales (`feature_maps.key_features`)."""
    logits = rows = rows.float() * feature_map.scale
    if feature_map.projection is not None:
        logits = _Logits.apply(rows, feature_map.projection, dtype)
    if feature_map.bias is not None:
        logits = logits + feature_map.bias
    if feature_map.function != "exponential":
        values = POINTWISE_FUNCTIONS[feature_map.function].value(logits)
        return values + feature_map.epsilon, torch.zeros_like(logits[..., 0])
    norm = rows.square().sum(-1) / 2 if feature_map.subtract_norm else 0
    return logits.softmax(-1) + feature_map.epsilon, logits.logsumexp(-1) - norm


class _Quotient(torch.autograd.Function):
    """Keeps its result as it is given out, which halves what a layer keeps in memory: the usual bargain."""

    @staticmethod
    def forward(ctx, numerator, denominator, dtype):
        quotient = (numerator / denominator).to(dtype)
        ctx.save_for_backward(quotient, denominator)
        return quotient

    @staticmethod
    def backward(ctx, gradient):
        quotient, denominator = ctx.saved_tensors
        gradient = gradient.float() / denominator
        return gradient, -(gradient * quotient.float()).sum(-1, keepdim=True), None


def quadratic_with_rounded_products(query, key, value, feature_map, *, causal=False, mask=None, state=None):
    """The definition, computed plainly, whose matrix products take operands of the inputs' precision."""
    dtype = query.dtype
    state = empty_state(query, value, feature_map) if state is None else state
    keep = torch.ones(key.shape[0], 1, key.shape[2]) if mask is None else mask[:, None].float()
    q, _ = _features(query, feature_map, dtype)
    k, scales = _features(key, feature_map, dtype)
    k, v = k * keep[..., None], value.float() * keep[..., None]
    scales = torch.where(keep.bool(), scales, -1e30)
    final = torch.maximum(scales.amax(-1), state.log_scale).detach()
    k = k * torch.exp(scales - final[..., None])[..., None]
    decay = torch.exp(state.log_scale - final)
    key_value, key_sum = state.key_value * decay[..., None, None], state.key_sum * decay[..., None]
    weights = _Product.apply(q, k.mT, dtype)
    weights = weights.tril() if causal else weights
    numerator = _Product.apply(weights, v, dtype) + _Product.apply(q, key_value, dtype)
    denominator = weights.sum(-1) + (q * key_sum[..., None, :]).sum(-1)
    ones = torch.ones_like(v[..., :1])
    key_sum = key_sum + _Product.apply(k.mT, ones, dtype)[..., 0]
    end = LinearAttentionState(key_value + _Product.apply(k.mT, v, dtype), key_sum, final)
    return _Quotient.apply(numerator, denominator[..., None], dtype), end


def with_powers_of_two(function):
    """The same with `exp(x)` as `2^(x log₂ e)`, the product rounded: on a GPU every exponential is one of these."""

    def run(*arguments, **options):
        exp = torch.exp

        def power(x):
            return torch.exp2(x * 1.4426950408889634) if x.dtype == torch.float32 else exp(x)

        with patch.object(torch, "exp", power), patch.object(torch.Tensor, "exp", power):
            return function(*arguments, **options)

    return run


def plain_computations(dtype, of_sums, orders=6):
    """What a result is compared with, in the same dtype: several orders, on a GPU with its exponentials as well.

    `of_sums`: whether it is one that the kernels keep in float32 although they make it from products of `dtype`.
    """
    plain = [*several(reference, prefix_sums, orders=orders), token_by_token]
    if of_sums and dtype != torch.float32:
        plain = several(quadratic_with_rounded_products, orders=orders)
    return plain if INTERPRETED else [*plain, *map(with_powers_of_two, plain)]


def in_double(query, key, value, feature_map, state):
    """Everything in float64, as `reference` takes it."""
    state = None if state is None else LinearAttentionState(*doubled(*state))
    return (*doubled(query, key, value, feature_map), state)
