"""Chosen launch configurations, one table for each kind of kernel: bits of a logit, then the longest row.

`SOLVE`: one program walks over the shortlist of its row, of which BLOCK values are in registers at a time. A short
row is walked over itself, whole. `STREAM`: kernels that read the row once, cut into splits.
"""

from ..launch_config import LaunchConfig


ANY_LENGTH = 2**62

_SOLVE = {
    (bits, size): LaunchConfig({"BLOCK": block, "WIDTH": width}, warps, 1)
    for bits in (16, 32)
    for size, block, width, warps in (
        (1024, 1024, 1024, 4),
        (4096, 4096, 4096, 8),
        (16384, 4096, 4096, 8),
        (32768, 8192, 512, 16),
        (ANY_LENGTH, 8192, 256, 16),
    )
}
_STREAM = {
    (bits, size): LaunchConfig({"BLOCK": block}, warps, 1)
    for bits in (16, 32)
    for size, block, warps in ((1024, 1024, 4), (ANY_LENGTH, 2048, 8))
}
# Blocks so small that rows of a test are long, and every loop runs more than once.
_SMALL_SOLVE = {
    (bits, size): LaunchConfig({"BLOCK": block, "WIDTH": width}, 1, 1)
    for bits in (16, 32)
    for size, block, width in ((64, 32, 32), (ANY_LENGTH, 32, 8))
}
_SMALL_STREAM = {(bits, ANY_LENGTH): LaunchConfig({"BLOCK": 16}, 1, 1) for bits in (16, 32)}

SOLVE = {"sm_80": _SOLVE, "sm_90": _SOLVE, "gfx942": _SOLVE, "interpreter": _SMALL_SOLVE}
STREAM = {"sm_80": _STREAM, "sm_90": _STREAM, "gfx942": _STREAM, "interpreter": _SMALL_STREAM}

# Rows up to here are solved without a shortlist, and are not split.
SHORT_ROW = {"sm_80": 16384, "sm_90": 16384, "gfx942": 16384, "interpreter": 64}
# Programs that share a row; what they hand on is summed in the order of the splits, on any machine.
MOST_SPLITS = {"sm_80": 128, "sm_90": 128, "gfx942": 128, "interpreter": 5}
# Logits that a long row's bound is guessed from.
SAMPLE = {"sm_80": 4096, "sm_90": 4096, "gfx942": 4096, "interpreter": 64}
