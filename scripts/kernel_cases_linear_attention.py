"""What `kernel_report.py` compiles for linear attention: each dtype and size class, options that change the code."""

from functools import partial

import torch
from kernel_case import KernelCase

from hf_efficient.kernels.linear_attention import FeatureMap, LinearAttentionState
from hf_efficient.kernels.linear_attention.triton_backward import backward
from hf_efficient.kernels.linear_attention.triton_decode import decode
from hf_efficient.kernels.linear_attention.triton_forward import forward


NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
HEADS = 16


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def make_call(dtype, head_dim, function, features, length, sequences, bias=False, heads=HEADS):
    """Query, key, value, feature map and state."""
    batch = 1 if sequences else 2
    query, key, value = (meta(batch, heads, length, head_dim, dtype=dtype) for _ in range(3))
    projection = None if features is None else meta(features, head_dim)
    features = features or head_dim
    feature_map = FeatureMap(function, projection, meta(features) if bias else None, head_dim**-0.25, 1e-6)
    rows = sequences or batch
    state = LinearAttentionState(meta(rows, heads, features, head_dim), meta(rows, heads, features), meta(rows, heads))
    return query, key, value, feature_map, state


def attend(dtype, head_dim, function, features, causal, gradients, options=False, length=1024, heads=HEADS):
    """Forward, or backward; `options`: padding, packing, a bias, and the gradients of the parameters."""
    sequences = 3 if options else 0
    query, key, value, feature_map, state = make_call(
        dtype, head_dim, function, features, length, sequences, options, heads
    )
    mask = meta(1, length, dtype=torch.bool) if options else None
    cu_seqlens = meta(sequences + 1, dtype=torch.int32) if options else None
    if not gradients:
        forward(query, key, value, feature_map, mask, state, causal, cu_seqlens)
        return
    rows = meta(*query.shape[:3])
    backward(
        torch.empty_like(value),
        state[:2],
        query,
        key,
        value,
        feature_map,
        (options and features is not None, options),
        mask,
        state,
        causal,
        cu_seqlens,
        torch.empty_like(value),
        state,
        (rows, rows, rows, rows, rows),
    )


def step(dtype, head_dim, function, features):
    query, key, value, feature_map, state = make_call(dtype, head_dim, function, features, 1, 0)
    decode(query, key, value, feature_map, None, state, in_place=True)


def cases():
    found = []
    # Few heads and a long sequence, along which several programs walk: the rest of these kernels is as below.
    call = partial(attend, torch.bfloat16, 64, "exponential", 256, True, True, length=16384, heads=2)
    found.append(KernelCase("causal backward bfloat16 d64 exponential, walks shared", True, call))
    for dtype, name in NAMES.items():
        for head_dim, function, features in ((64, "exponential", 256), (128, "identity", None)):
            shape = dtype, head_dim, function, features
            for causal in (True, False):
                for gradients in (False, True):
                    what = f"{'causal' if causal else 'bidirectional'} {'backward' if gradients else 'forward'}"
                    call = partial(attend, *shape, causal, gradients)
                    found.append(KernelCase(f"{what} {name} d{head_dim} {function}", dtype == torch.bfloat16, call))
            found.append(KernelCase(f"decode {name} d{head_dim} {function}", True, partial(step, *shape)))
        for gradients in (False, True):
            what = f"{'backward' if gradients else 'forward'} {name}"
            call = partial(attend, dtype, 128, "exponential", 256, True, gradients)
            found.append(KernelCase(f"causal {what} d128 exponential", False, call, tight=dtype == torch.float16))
            # What a head takes in shared memory may not grow with it.
            for head_dim in (256, 512):
                call = partial(attend, dtype, head_dim, "exponential", 256, True, gradients)
                found.append(KernelCase(f"causal {what} d{head_dim} exponential", False, call))
            call = partial(attend, dtype, 256, "gelu", 266, True, gradients, True)
            found.append(KernelCase(f"causal {what} d256 gelu, every option", False, call))
    return found
