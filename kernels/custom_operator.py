"""Operators of our own, each under a name that nothing else in the process holds.

torch lets a later definition of a name destroy the earlier one, and whoever holds that calls freed memory. A process
may hold this code several times: the package, and the copy beside each checkpoint that was loaded with its own code.
"""

from collections.abc import Callable, Iterable

import torch
from torch.utils.flop_counter import register_flop_formula


def custom_operator(
    name: str, mutates_args: Iterable[str] = (), flops: Callable[..., int] | None = None
) -> Callable[[Callable], torch.library.CustomOpDef]:
    """`torch.library.custom_op` as `hf_efficient::name`, or `name_2`, `name_3`, … where a copy of this code has that.

    Args:
        name: of the operator, without a namespace.
        mutates_args: names of the arguments that it writes to.
        flops: its number of floating point operations, for `torch.utils.flop_counter`, from arguments that have shapes
            in the place of tensors.
    """
    free, number = name, 1
    while hasattr(torch.ops.hf_efficient, free):
        number += 1
        free = f"{name}_{number}"

    def define(function: Callable) -> torch.library.CustomOpDef:
        operator = torch.library.custom_op(f"hf_efficient::{free}", function, mutates_args=tuple(mutates_args))
        if flops is not None:
            register_flop_formula(getattr(torch.ops.hf_efficient, free))(flops)
        return operator

    return define
