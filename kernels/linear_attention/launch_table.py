"""Chosen launch configurations of linear attention, by architecture, bits of an element and head size.

Rows of a chunk, and tiles: BLOCK_HEAD of the head size where rows are projected, BLOCK_FEATURES and BLOCK_VALUES of
the state. Every size is served: what exceeds a tile is looped over.
"""

from ..launch_config import LaunchConfig


ANY = 2**31 - 1


def _row(num_warps: int, num_stages: int, **blocks: int) -> LaunchConfig:
    return LaunchConfig(blocks, num_warps, num_stages)


def _tiles(num_warps: int, num_stages: int, head: int, features: int, values: int, **more: int) -> LaunchConfig:
    return _row(num_warps, num_stages, BLOCK_HEAD=head, BLOCK_FEATURES=features, BLOCK_VALUES=values, **more)


# Rows in a chunk, the same for all kernels of a call.
CHUNKS = {
    "sm_80": {(16, ANY): 32, (32, ANY): 32},
    "sm_90": {(16, ANY): 64, (32, ANY): 32},
    "gfx942": {(16, ANY): 32, (32, ANY): 32},
    "interpreter": {(16, ANY): 16, (32, ANY): 16},
}

# The fewest chunks that are worth a program of their own where a walk along the chunks is shared.
SEGMENT_CHUNKS = {"sm_80": 8, "sm_90": 8, "gfx942": 8, "interpreter": 2}

_INTERPRETER = {(16, ANY): _tiles(4, 1, 16, 16, 16), (32, ANY): _tiles(4, 1, 16, 16, 16)}

NORMALIZERS = {
    "sm_80": {
        (16, 64): _row(4, 2, CHUNK=128, BLOCK_HEAD=64, BLOCK_FEATURES=64),
        (16, ANY): _row(4, 2, CHUNK=64, BLOCK_HEAD=64, BLOCK_FEATURES=64),
        (32, ANY): _row(4, 2, CHUNK=32, BLOCK_HEAD=32, BLOCK_FEATURES=32),
    },
    "interpreter": {
        (16, ANY): _row(4, 1, CHUNK=32, BLOCK_HEAD=16, BLOCK_FEATURES=16),
        (32, ANY): _row(4, 1, CHUNK=32, BLOCK_HEAD=16, BLOCK_FEATURES=16),
    },
}
NORMALIZERS |= {"sm_90": NORMALIZERS["sm_80"], "gfx942": NORMALIZERS["sm_80"]}

STATES = {
    "sm_80": {
        (16, 128): _tiles(4, 2, 64, 64, 64),
        (16, ANY): _tiles(4, 1, 64, 64, 64),
        (32, ANY): _tiles(4, 2, 32, 32, 32),
    },
    "sm_90": {
        (16, 64): _tiles(4, 3, 64, 64, 64),
        (16, 128): _tiles(4, 3, 64, 64, 128),
        (16, ANY): _tiles(4, 2, 64, 64, 64),
        (32, ANY): _tiles(4, 2, 32, 32, 32),
    },
    "gfx942": {(16, ANY): _tiles(4, 1, 64, 64, 64), (32, ANY): _tiles(4, 1, 32, 32, 32)},
    "interpreter": _INTERPRETER,
}

OUTPUTS = {
    "sm_80": {
        (16, ANY): _tiles(4, 2, 64, 32, 64),
        (32, 128): _tiles(4, 2, 32, 32, 32),
        (32, ANY): _tiles(4, 1, 32, 32, 32),
    },
    "sm_90": {
        (16, 64): _tiles(4, 3, 64, 32, 64),
        (16, 128): _tiles(4, 2, 64, 64, 128),
        (16, ANY): _tiles(4, 2, 64, 32, 64),
        (32, ANY): _tiles(4, 2, 32, 32, 32),
    },
    "gfx942": {(16, ANY): _tiles(8, 1, 64, 32, 64), (32, ANY): _tiles(4, 1, 32, 32, 32)},
    "interpreter": _INTERPRETER,
}

ROW_PRODUCTS = {
    "sm_80": {(16, ANY): _row(4, 1, CHUNK=64, BLOCK_VALUES=64), (32, ANY): _row(4, 1, CHUNK=64, BLOCK_VALUES=64)},
    "interpreter": {
        (16, ANY): _row(4, 1, CHUNK=32, BLOCK_VALUES=16),
        (32, ANY): _row(4, 1, CHUNK=32, BLOCK_VALUES=16),
    },
}
ROW_PRODUCTS |= {"sm_90": ROW_PRODUCTS["sm_80"], "gfx942": ROW_PRODUCTS["sm_80"]}

STATE_GRADIENTS = {
    "sm_80": {
        (16, 128): _tiles(4, 2, 64, 64, 64),
        (16, ANY): _tiles(4, 1, 64, 64, 64),
        (32, ANY): _tiles(4, 2, 32, 32, 32),
    },
    "sm_90": {
        (16, 64): _tiles(8, 2, 64, 64, 64),  # (8, 3, 64, 128, 64) takes half as long, and spills under Triton 3.9
        (16, 128): _tiles(4, 2, 64, 64, 64),
        (16, ANY): _tiles(8, 2, 64, 64, 64),
        (32, ANY): _tiles(4, 2, 32, 32, 32),
    },
    "gfx942": {(16, ANY): _tiles(4, 1, 64, 64, 64), (32, ANY): _tiles(4, 1, 32, 32, 32)},
    "interpreter": _INTERPRETER,
}

VALUE_GRADIENTS = OUTPUTS | {
    "sm_90": OUTPUTS["sm_90"] | {(16, 64): _tiles(4, 2, 64, 64, 64), (16, 128): _tiles(4, 3, 64, 32, 128)}
}

FEATURE_GRADIENTS = {
    "sm_80": {
        (16, 64): _tiles(4, 1, 64, 32, 64, BLOCK_OUT=64),
        (16, ANY): _tiles(8, 1, 64, 32, 64, BLOCK_OUT=128),
        (32, ANY): _tiles(4, 1, 32, 32, 32, BLOCK_OUT=64),
    },
    # Not fewer features: with 16 and 32 in bfloat16, Triton 3.6 gave wrong sums on Hopper, or read elsewhere
    # (docs/benchmarks_gpu.md).
    "sm_90": {
        (16, 64): _tiles(4, 2, 64, 64, 64, BLOCK_OUT=64),
        (16, 128): _tiles(4, 1, 64, 64, 64, BLOCK_OUT=64),
        (16, ANY): _tiles(8, 1, 64, 64, 64, BLOCK_OUT=128),
        (32, ANY): _tiles(4, 1, 32, 32, 32, BLOCK_OUT=64),
    },
    "gfx942": {
        (16, 64): _tiles(8, 1, 32, 16, 32, BLOCK_OUT=64),
        (16, ANY): _tiles(8, 1, 64, 32, 64, BLOCK_OUT=128),
        (32, ANY): _tiles(4, 1, 32, 32, 32, BLOCK_OUT=64),
    },
    "interpreter": {
        (16, ANY): _tiles(4, 1, 16, 16, 16, BLOCK_OUT=16),
        (32, ANY): _tiles(4, 1, 16, 16, 16, BLOCK_OUT=16),
    },
}

# One token: float32 whatever the inputs are.
DECODE = {
    "sm_80": {(32, 64): _tiles(4, 1, 64, 64, 64), (32, ANY): _tiles(8, 1, 64, 64, 128)},
    "interpreter": {(32, ANY): _tiles(4, 1, 16, 16, 16)},
}
DECODE |= {"sm_90": DECODE["sm_80"], "gfx942": DECODE["sm_80"]}
