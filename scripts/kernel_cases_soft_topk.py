"""What `kernel_report.py` compiles for soft_topk: both methods, forward and backward, short rows and long ones."""

import torch
from kernel_case import KernelCase

from hf_efficient.kernels.soft_topk import triton_backward, triton_forward


STEPS = 20
ROWS = 8
# One length for each row of the launch tables; the last two are split.
LENGTHS = (1024, 4096, 16384, 32768, 1_048_576)


def cases() -> list[KernelCase]:
    """The exact method is hot; coordinate descent is there for parity.

    A mask adds one load, and half precision one conversion: they are compiled where they meet the most kernels.
    """
    found = []
    for dtype, lengths, masks in (
        (torch.float32, LENGTHS, (False,)),
        (torch.float32, LENGTHS[-1:], (True,)),
        (torch.bfloat16, (LENGTHS[0], LENGTHS[-1]), (True,)),
    ):
        for length in lengths:
            for masked in masks:
                name = f"{str(dtype).removeprefix('torch.')} n{length}{' masked' if masked else ''}"
                sizes = dtype, length, masked
                found.append(KernelCase(f"exact forward {name}", True, lambda s=sizes: exact_forward(*s)))
                found.append(KernelCase(f"exact backward {name}", True, lambda s=sizes: exact_backward(*s)))
                if dtype == torch.float32 and length in (LENGTHS[0], LENGTHS[-1]):
                    found.append(KernelCase(f"descent forward {name}", False, lambda s=sizes: descent_forward(*s)))
                    found.append(KernelCase(f"descent backward {name}", False, lambda s=sizes: descent_backward(*s)))
    sizes = torch.float32, LENGTHS[-1], False
    found.append(KernelCase("exact forward, no indices", True, lambda: exact_forward(*sizes, num_selected=0)))
    return found


def inputs(dtype, length, masked):
    """Logits, k and mask on the meta device."""
    logits = torch.empty(ROWS, length, dtype=dtype, device="meta")
    mask = torch.empty(ROWS, length, dtype=torch.bool, device="meta") if masked else None
    return logits, torch.empty(ROWS, device="meta"), mask


def exact_forward(*sizes, num_selected=64):
    triton_forward.exact_forward(*inputs(*sizes), 1.0, num_selected)


def exact_backward(*sizes):
    logits, scalar, mask = inputs(*sizes)
    triton_backward.exact_backward(logits, logits, mask, scalar, scalar, 1.0)


def descent_forward(*sizes):
    triton_forward.descent_forward(*inputs(*sizes), [1.0] * (STEPS + 1), 64)


def descent_backward(*sizes):
    logits, k, mask = inputs(*sizes)
    duals = torch.empty(ROWS, STEPS, dtype=torch.float64, device="meta")
    triton_backward.descent_backward(logits, logits, k, mask, duals, [1.0] * (STEPS + 1))
