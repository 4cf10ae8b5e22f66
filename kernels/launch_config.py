"""How a kernel is launched: tables of chosen configurations, one row per architecture, element size and head size.

Nothing is tuned at the first call, which would stall it for seconds and differ between processes. The tables stand in
each op's `launch_table.py`; `scripts/tune_kernels.py` measures other configurations and writes new ones.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .backend import gpu_architecture


class LaunchConfig(NamedTuple):
    """`blocks`: constexpr arguments of the kernel by name. `num_warps`, `num_stages`: Triton's launch options."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int

    def keywords(self) -> dict[str, Any]:
        """What to pass at the launch: `kernel[grid](..., **config.keywords())`."""
        # Fused multiply-add is said aloud because Triton is about to change what it does unasked.
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


# architecture → (bits of an element, largest size of the head or whatever bounds the tile) → configuration
LaunchTable = Mapping[str, Mapping[tuple[int, int], LaunchConfig]]


def choose_config(table: LaunchTable, element_bits: int, size: int) -> LaunchConfig:
    """The row of this machine's architecture for elements of `element_bits` with the least bound that `size` meets.

    Raises:
        ValueError: no row is large enough; the message names the largest. An op refuses such sizes at the door.
    """
    rows = {bound: config for (bits, bound), config in table[gpu_architecture()].items() if bits == element_bits}
    sufficient = [bound for bound in rows if bound >= size]
    if not sufficient:
        largest = max(rows, default=0)
        raise ValueError(f"size must be at most {largest} for elements of {element_bits} bits, got {size}")
    return rows[min(sufficient)]
