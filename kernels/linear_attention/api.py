"""The public linear attention operation: signature, validation, choice of the backend."""

from contextlib import nullcontext
from typing import NamedTuple

import torch

from ..backend import resolve_backend
from .autograd import linear_attention_eager
from .eager import step
from .feature_maps import FeatureMap
from .packing import linear_attention_packed
from .state import LinearAttentionState
from .triton_autograd import linear_attention_triton, step_triton
from .validation import validate


class LinearAttentionOutput(NamedTuple):
    """`output` `[B, H, N, V]` in the dtype of the values, and the state after the last key."""

    output: torch.Tensor
    state: LinearAttentionState


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    state: LinearAttentionState | None = None,
    cu_seqlens: torch.Tensor | None = None,
    update_state_in_place: bool = False,
    backend: str = "auto",
) -> LinearAttentionOutput:
    """`out_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)` in time and memory linear in the length.

    The sums run over the unmasked keys, over those with `j ≤ i` if `causal`, and over all that `state` has seen. A row
    that sees no key is zero. Features are computed inside (`feature_maps.py`), in at least float32, and never stored.
    Sources: arXiv 2009.14794 (FAVOR+), arXiv 2006.16236 (recurrent form).

    Args:
        query: `[B, H, N, D]`, float16, bfloat16, float32 or float64.
        key: `[B, H, K, D]`, dtype of `query`; K = N if `causal`. None, with `value` None, reads `state` alone.
        value: `[B, H, K, V]`, dtype of `query`.
        feature_map: what turns queries and keys into features, see `FeatureMap`; its tensors on the same device.
        causal: whether row i sees the keys up to i only. A change of a later row leaves row i as it is, to the bit.
        mask: `[B, K]`, bool or integer, nonzero where a key counts. Masked keys are in no sum at all.
        state: what was seen before, from an earlier call with the same feature map, or None.
        cu_seqlens: `[S + 1]`, int32 or int64, for S sequences packed along the length of a batch of 1: sequence i has
            the rows from `cu_seqlens[i]` to `cu_seqlens[i + 1]` of queries and keys, knows of no other, may be empty,
            and has row i of the states (B = S there). From 0 to N and never falling, which is checked on a CPU only:
            on a GPU that would wait for the device.
        update_state_in_place: the new state is written into the tensors of `state`, which are returned. For decoding
            without gradients; saves the memory of a second state.
        backend: `"auto"`, `"triton"` (no float64) or `"eager"`.

    Returns:
        `LinearAttentionOutput`. The state has a gradient in its two sums, none in its scale, which cancels.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit, naming the argument.
        RuntimeError: an explicit `backend` that cannot serve this call.
    """
    decoding = causal and query.shape[-2] == 1 and cu_seqlens is None
    known = decoding and state is not None and not torch.compiler.is_compiling()
    signature = _signature(query, key, value, feature_map, mask, state, backend) if known else None
    chosen = None if signature is None else _CHECKED_STEPS.get(signature)
    if chosen is None:
        validate(query, key, value, feature_map, causal, mask, state, cu_seqlens)
        chosen = resolve_backend(backend, query, unsupported_reason=_unsupported(query, value))
        if known:
            _CHECKED_STEPS[signature] = chosen
    dtype = torch.promote_types(query.dtype, torch.float32)
    feature_map = feature_map.to(dtype)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (query, key, value, *(state or ())[:2], feature_map.projection, feature_map.bias)
    )
    if update_state_in_place and (state is None or differentiable):
        raise ValueError("update_state_in_place needs a state, and tensors that require no gradient")
    if key is None:
        # No keys: the operation that has a gradient, and one node for the compiler, reads the state all the same.
        key, value = query[:, :, :0], query.new_empty(*query.shape[:2], 0, state.key_value.shape[-1])
        output, _ = _attend(chosen, query, key, value, feature_map, None, state, False, cu_seqlens)
        return LinearAttentionOutput(output, state)
    if state is None:
        sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        sizes = query.shape[1], feature_map.num_features(query.shape[-1]), value.shape[-1]
        state = LinearAttentionState.empty(sequences, *sizes, dtype=dtype, device=query.device)
    if not decoding or differentiable:
        output, new_state = _attend(chosen, query, key, value, feature_map, mask, state, causal, cu_seqlens)
    elif chosen == "triton":
        output, new_state = step_triton(query, key, value, feature_map, mask, state, update_state_in_place)
    else:
        autocast = torch.is_autocast_enabled(query.device.type)
        with torch.autocast(query.device.type, enabled=False) if autocast else nullcontext():
            output, new_state = step(query, key, value, feature_map, mask, state, update_state_in_place)
    if update_state_in_place:
        for part, new_part in zip(state, new_state, strict=True):
            if part is not new_part:
                part.copy_(new_part)
        new_state = state
    return LinearAttentionOutput(output, new_state)


def _attend(chosen, query, key, value, feature_map, mask, state, causal, cu_seqlens):
    if chosen == "triton":
        return linear_attention_triton(query, key, value, feature_map, mask, state, causal, cu_seqlens)
    if cu_seqlens is not None:
        return linear_attention_packed(query, key, value, feature_map, mask, state, causal, cu_seqlens)
    return linear_attention_eager(query, key, value, feature_map, mask, state, causal)


def _unsupported(query, value) -> str | None:
    """Why the Triton kernels cannot take this call."""
    if query.dtype == torch.float64:
        return "linear_attention has no Triton kernels for torch.float64"
    if not query.shape[-1] or value is not None and not value.shape[-1]:
        return "linear_attention has no Triton kernels for heads or values of size 0"
    return None


# Checking costs as much as a step of decoding takes, and the next step looks like this one: what was found right is
# remembered, with the backend. One token at a time has few shapes, so there is little to remember.
_CHECKED_STEPS: dict[tuple, str] = {}


def _signature(query, key, value, feature_map, mask, state, backend) -> tuple:
    """Everything that `_validate` and `resolve_backend` look at."""
    tensors = (query, key, value, mask, *state, feature_map.projection, feature_map.bias)
    properties = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    return (backend, feature_map.function, feature_map.epsilon, *properties)
