"""The public flash attention operation: signature, validation, choice of the backend."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import resolve_backend
from .autograd import attend
from .operands import UNLIMITED, Operands, Options
from .sdpa import attend_with_sdpa, part_with_sdpa


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST_HEAD_SIZE = 256  # the largest in launch_table.py


class FlashAttentionOutput(NamedTuple):
    """`output` `[B, H, N, V]` in the dtype of the query; `lse` `[B, H, N]`, float32, or float64 for float64 inputs."""

    output: Tensor
    lse: Tensor


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    distance_bias: Tensor | None = None,
    softcap: float | None = None,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | FlashAttentionOutput:
    """Softmax attention with everything SDPA cannot fuse, in memory linear in N and M, differentiable.

    Row i stands at position `p = i + M - N` of the keys, so the last row is at the last key: a cached prefix needs no
    argument. In this order:

        x_ij = scale · q_i·k_j - slope_h · |j - p| + bias_h[j - p]
        s_ij = softcap · tanh(x_ij / softcap)
        s_ij = -inf where row i does not see key j
        w_ij = exp(s_ij) / (Σ_j exp(s_ij) + Σ_r exp(s_ir) + exp(sink_h))      r over the memory keys
        out_i = Σ_j drop(w_ij) v_j + Σ_r drop(w_ir) v_r

    A memory key has no bias and no mask: `s_ir = softcap · tanh(scale · q_i·k_r / softcap)`. A row that sees nothing
    is zero, and so are the gradients through it. With a window the cost is O(N · window). Plain calls run on
    `scaled_dot_product_attention`. Sources: arXiv 2205.14135 (the operation), 2108.12409 (slopes), 1910.10683 (bias),
    2408.00118 (softcap), 1907.01470 (memory), 2508.10925 (sinks); the order is x-transformers'.

    Args:
        query: `[B, H, N, D]`, float16, bfloat16, float32 or float64.
        key: `[B, G, M, D]`, dtype of `query`. G divides H; query head h reads key head `h // (H / G)`.
        value: `[B, G, M, V]`, dtype of `query`.
        scale: factor of the products; None for `D ** -0.5`.
        causal: whether row i sees no key behind p.
        window: how far a row sees: `p - left ≤ j ≤ p + right` for `(left, right)`; an int is both, None no limit. With
            `causal`, `right` is 0.
        key_mask: `[B, M]`, bool or integer, nonzero where a key counts. What stands elsewhere is never read: it may
            be inf or NaN.
        key_lengths, query_lengths: `[B]`, integer. Batch row b is computed as if cut to its first `query_lengths[b]`
            rows and `key_lengths[b]` keys, also for p; its other rows are zero. Default N and M; clamped to them.
        alibi_slopes: `[H]` or `[B, H]`, floating point: ALiBi, symmetric around the position.
        distance_bias: `[H or 1, 2R + 1]`, floating point: entry `R + d` is added where `j - p = d`; distances beyond
            R take the entry of the end. See `t5_distance_bias`.
        softcap: bound of the logits, positive; None for none.
        memory_key, memory_value: `[G, R, D]` and `[G, R, V]`, or with B in front; dtype of `query`.
        sinks: `[H]`, floating point: a logit that takes part in the denominator only.
        dropout_p: probability of dropping a weight, from 0 to below 1; kept ones are divided by `1 - dropout_p`.
        dropout_seed: what decides which: an int, an int64 tensor of one element, or None for one drawn from torch's
            generator. The same seed drops the same weights on every backend (`operands.py` has the hash).
        return_lse: whether to return the log of the denominator too, for `merge_attention`; both have gradients.
        backend: `"auto"`, `"triton"` or `"eager"`.

    Returns:
        The output, `[B, H, N, V]` in the dtype of `query`; with `return_lse`, a `FlashAttentionOutput`. The lse of a
        row that sees nothing is -inf; sinks and memory count in it, dropout does not.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit, naming the argument.
        RuntimeError: an explicit `backend` that cannot serve this call.
    """
    validate_tensors(query, key, value)
    validate_masks(query, key, key_mask, key_lengths, query_lengths)
    _validate_parameters(query, key, value, alibi_slopes, distance_bias, memory_key, memory_value, sinks)
    options = make_options(query, scale, causal, window, softcap, dropout_p)
    operands = make_operands(
        query, key, value, key_mask, key_lengths, query_lengths, alibi_slopes, distance_bias, memory_key,
        memory_value, sinks, make_seed(dropout_seed, query.device) if options.dropout_p else None,
    )  # fmt: skip
    chosen = resolve_backend(backend, query, unsupported_reason=unsupported_reason(query, value))
    if backend == "auto" and not return_lse and (plain := attend_with_sdpa(operands, options)) is not None:
        return plain
    found = None
    if backend == "auto" and not (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    ):
        found = part_with_sdpa(operands, options)
    output = FlashAttentionOutput(*(found or attend(operands, options, chosen)))
    return output if return_lse else output.output


def unsupported_reason(query, value) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    if query.dtype == torch.float64:
        return "flash_attention has no kernel for float64"
    if max(query.shape[3], value.shape[3]) > LARGEST_HEAD_SIZE:
        return (
            f"flash_attention has kernels for sizes up to {LARGEST_HEAD_SIZE},"
            f" got {query.shape[3]} of query and {value.shape[3]} of value"
        )
    return None


def make_options(query, scale, causal, window, softcap, dropout_p) -> Options:
    sides = window if isinstance(window, (tuple, list)) else (window, window)
    if len(sides) != 2 or any(not (s is None or (_is_integer(s) and s >= 0)) for s in sides):
        raise ValueError(f"window must be an int of at least 0, a pair (left, right) of such or None, got {window!r}")
    left, right = (UNLIMITED if side is None else side for side in sides)
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return Options(float(scale), left, 0 if causal else right, float(softcap or 0), float(dropout_p))


def _is_integer(side):
    return isinstance(side, int) and not isinstance(side, bool)


def make_operands(
    query, key, value, key_mask, key_lengths, query_lengths, alibi_slopes, distance_bias, memory_key, memory_value,
    sinks, seed,
) -> Operands:  # fmt: skip
    def lengths(given, limit):
        return None if given is None else given.to(torch.int64).clamp(0, limit)

    def batched(tensor, dimensions):
        return tensor[None] if tensor is not None and tensor.ndim < dimensions else tensor

    return Operands(
        query,
        key,
        value,
        None if key_mask is None else key_mask.to(torch.bool),
        lengths(key_lengths, key.shape[2]),
        lengths(query_lengths, query.shape[2]),
        batched(alibi_slopes, 2),
        distance_bias,
        batched(memory_key, 4),
        batched(memory_value, 4),
        sinks,
        seed,
    )


def make_seed(seed, device) -> Tensor:
    if seed is None:
        # A tensor, never a number on the host: drawing stays inside a compiled graph, and gradient checkpointing,
        # which restores the generator, draws the same seed again.
        return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"dropout_seed must be one int64 on {device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
            )
        return seed.reshape(1)
    if not _is_integer(seed):
        raise ValueError(f"dropout_seed must be an int, an int64 tensor of one element or None, got {seed!r}")
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)


def validate_tensors(query, key, value):
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape [batch, heads, length, size], got {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
        _validate_like(name, tensor, query)
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have batch size {query.shape[0]} like query, got {tensor.shape[0]}")
    if not query.shape[-1]:
        raise ValueError(f"query must have a size of at least 1, got {tuple(query.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have size {query.shape[-1]} like query, got {key.shape[-1]}")
    if value.shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value must have heads and length {tuple(key.shape[1:3])} like key, got {tuple(value.shape[1:3])}"
        )
    if not key.shape[1] or query.shape[1] % key.shape[1]:
        raise ValueError(f"key must have a number of heads that divides {query.shape[1]}, got {key.shape[1]}")


def _validate_like(name, tensor, query):
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise ValueError(
            f"{name} must be like query, {query.dtype} on {query.device}, got {tensor.dtype} on {tensor.device}"
        )


def validate_masks(query, key, key_mask, key_lengths, query_lengths):
    batch, keys = key.shape[0], key.shape[2]
    for name, tensor, shape, kinds in (
        ("key_mask", key_mask, (batch, keys), "bool or integer, nonzero where a key counts"),
        ("key_lengths", key_lengths, (batch,), "integer"),
        ("query_lengths", query_lengths, (batch,), "integer"),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        wrong = tensor.is_floating_point() or tensor.is_complex()
        if wrong or (tensor.dtype == torch.bool and not kinds.startswith("bool")):
            raise ValueError(f"{name} must be {kinds}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device}, got {tensor.device}")


def _validate_parameters(query, key, value, alibi_slopes, distance_bias, memory_key, memory_value, sinks):
    batch, heads = query.shape[:2]
    for name, tensor, shapes in (
        ("alibi_slopes", alibi_slopes, ((heads,), (batch, heads))),
        ("sinks", sinks, ((heads,),)),
    ):
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}")
    if distance_bias is not None and (
        distance_bias.ndim != 2 or distance_bias.shape[0] not in (1, heads) or distance_bias.shape[1] % 2 == 0
    ):
        raise ValueError(
            f"distance_bias must have shape ({heads} or 1, odd number of distances), got {tuple(distance_bias.shape)}"
        )
    for name, tensor in (("alibi_slopes", alibi_slopes), ("distance_bias", distance_bias), ("sinks", sinks)):
        if tensor is not None and (not tensor.is_floating_point() or tensor.device != query.device):
            raise ValueError(f"{name} must be floating point on {query.device}, got {tensor.dtype} on {tensor.device}")
    if (memory_key is None) != (memory_value is None):
        raise ValueError("memory_key and memory_value must be given together, or neither of them")
    if memory_key is None:
        return
    slots = memory_key.shape[-2] if memory_key.ndim > 1 else None
    for name, tensor, like in (("memory_key", memory_key, key), ("memory_value", memory_value, value)):
        _validate_like(name, tensor, query)
        shape = (key.shape[1], slots, like.shape[-1])
        if tuple(tensor.shape) not in (shape, (batch, *shape)) or tensor.ndim != memory_key.ndim:
            raise ValueError(f"{name} must have shape {shape} or {(batch, *shape)}, got {tuple(tensor.shape)}")
