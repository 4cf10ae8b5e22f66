"""One compilation that `kernel_report.py` does ahead of time."""

from collections.abc import Callable
from typing import NamedTuple


class KernelCase(NamedTuple):
    """A launch as users cause it, on meta tensors.

    Args:
        name: what is launched, for instance `"causal float16 d64"`; unique within an operation.
        hot: whether this configuration carries the op's usual work, where a spilled register would cost speed.
        launch: calls one launcher of the op with tensors on the meta device.
        tight: fills the shared memory: also compiled with the oldest Triton, whose code takes more of it.
    """

    name: str
    hot: bool
    launch: Callable[[], object]
    tight: bool = False
