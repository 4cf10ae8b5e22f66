"""What `kernel_report.py` compiles of flash attention."""

from collections.abc import Iterator

import torch
from kernel_case import KernelCase

from hf_efficient.kernels.flash_attention.operands import UNLIMITED, Operands, Options, Wanted
from hf_efficient.kernels.flash_attention.triton_backward import backward
from hf_efficient.kernels.flash_attention.triton_forward import forward


# What is on, by name: numbers in `Options`, the rest in `operands`.
HOT = {
    "plain": {},
    "causal": {"right": 0},
    "window": {"left": 256, "right": 0},
    "alibi": {"right": 0, "alibi": True},
    "bias": {"right": 0, "bias": True},
    "softcap": {"right": 0, "softcap": 50.0},
}
OTHERS = {
    "mask": {"mask": True},
    "lengths": {"right": 0, "lengths": True},
    "memory and sinks": {"right": 0, "memory": 16, "sinks": True},
    "dropout": {"right": 0, "dropout_p": 0.1},
    "everything": {
        "left": 256, "right": 0, "alibi": True, "bias": True, "softcap": 50.0, "mask": True, "lengths": True,
        "memory": 16, "sinks": True, "dropout_p": 0.1,
    },
}  # fmt: skip


def cases() -> list[KernelCase]:
    """Every row of the tables; every option in half precision at the usual head sizes."""
    found = [*_pair("causal", HOT["causal"], True, torch.float16, 64)]
    for size in (64, 128):
        for name, on in HOT.items():
            found += _pair(name, on, True, torch.bfloat16, size)
    for name, on in OTHERS.items():
        found += _pair(name, on, False, torch.bfloat16, 64)
    found += _pair("everything", OTHERS["everything"], False, torch.bfloat16, 128)
    for dtype, sizes in ((torch.bfloat16, (16, 256)), (torch.float32, (64, 128, 256))):
        for size in sizes:
            found += _pair("causal", HOT["causal"], False, dtype, size)
            found += _pair("bias", HOT["bias"], False, dtype, size)
    found += _pair("causal ragged", HOT["causal"], False, torch.bfloat16, 80, 96)
    found += _pair("memory and sinks", OTHERS["memory and sinks"], False, torch.float32, 64)
    return found


def _pair(name: str, on: dict, hot: bool, dtype: torch.dtype, size: int, value_size: int = 0) -> Iterator[KernelCase]:
    value_size = value_size or size
    given = operands(dtype, size, value_size, on)
    options = Options(
        scale=size**-0.5,
        left=on.get("left", UNLIMITED),
        right=on.get("right", UNLIMITED),
        softcap=on.get("softcap", 0.0),
        dropout_p=on.get("dropout_p", 0.0),
    )
    output = torch.empty(*given.query.shape[:3], value_size, dtype=dtype, device="meta")
    lse = torch.empty(given.query.shape[:3], device="meta")
    wanted = Wanted(given.alibi_slopes is not None, given.distance_bias is not None)
    suffix = f"{name} {str(dtype).removeprefix('torch.')} d{size}"
    yield KernelCase(f"forward {suffix}", hot, lambda: forward(given, options))
    yield KernelCase(f"backward {suffix}", hot, lambda: backward(given, options, output, lse, output, lse, wanted))


def operands(dtype: torch.dtype, size: int, value_size: int, on: dict) -> Operands:
    """Two sequences of 1,024 rows, eight heads that share four key heads."""
    batch, heads, key_heads, length = 2, 8, 4, 1024

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def only(name, *shape, dtype=dtype):
        return tensor(*shape, dtype=dtype) if on.get(name) else None

    return Operands(
        query=tensor(batch, heads, length, size),
        key=tensor(batch, key_heads, length, size),
        value=tensor(batch, key_heads, length, value_size),
        key_mask=only("mask", batch, length, dtype=torch.bool),
        key_lengths=only("lengths", batch, dtype=torch.int64),
        query_lengths=only("lengths", batch, dtype=torch.int64),
        alibi_slopes=only("alibi", 1, heads, dtype=torch.float32),
        distance_bias=only("bias", heads, 257, dtype=torch.float32),
        memory_key=only("memory", 1, key_heads, on.get("memory", 0), size),
        memory_value=only("memory", 1, key_heads, on.get("memory", 0), value_size),
        sinks=only("sinks", heads, dtype=torch.float32),
        dropout_seed=only("dropout_p", 1, dtype=torch.int64),
    )
