"""Which tile sizes the kernels use, by architecture, bits of an element and head size (the larger of D and V)."""

from ..launch_config import LaunchConfig


def _blocks(block_m: int, block_n: int, num_warps: int, num_stages: int) -> LaunchConfig:
    return LaunchConfig({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps, num_stages)


def _interpreter_rows() -> dict[tuple[int, int], LaunchConfig]:
    """Blocks so small that every loop of a test runs more than once."""
    return {(bits, 256): _blocks(16, 16, 1, 1) for bits in (16, 32)}


# BLOCK_M rows are held, BLOCK_N keys pass by.
FORWARD = {
    "sm_80": {
        (16, 64): _blocks(128, 64, 8, 3),
        (16, 128): _blocks(128, 64, 8, 2),
        (16, 256): _blocks(64, 32, 4, 2),
        (32, 64): _blocks(64, 32, 4, 2),
        (32, 128): _blocks(32, 32, 4, 2),
        (32, 256): _blocks(16, 32, 4, 1),
    },
    "sm_90": {
        (16, 64): _blocks(128, 64, 4, 4),
        (16, 128): _blocks(128, 128, 8, 3),
        (16, 256): _blocks(128, 64, 8, 2),
        (32, 64): _blocks(64, 32, 4, 2),
        (32, 128): _blocks(64, 32, 4, 2),
        (32, 256): _blocks(32, 32, 4, 2),
    },
    "gfx942": {
        (16, 64): _blocks(128, 64, 4, 1),
        (16, 128): _blocks(128, 64, 4, 1),
        (16, 256): _blocks(64, 32, 4, 1),
        (32, 64): _blocks(64, 32, 4, 1),
        (32, 128): _blocks(32, 32, 4, 1),
        (32, 256): _blocks(16, 16, 4, 1),
    },
    "interpreter": _interpreter_rows(),
}

# A tile of gathered biases is rearranged in shared memory, so it has to be smaller.
FORWARD_BIASED = {
    "sm_80": FORWARD["sm_80"]
    | {
        (16, 64): _blocks(64, 64, 4, 2),
        (16, 128): _blocks(64, 64, 4, 2),
    },
    "sm_90": FORWARD["sm_90"]
    | {
        (16, 64): _blocks(128, 64, 4, 2),
        (16, 128): _blocks(128, 64, 8, 2),
    },
    "gfx942": FORWARD["gfx942"]
    | {
        (16, 64): _blocks(64, 64, 4, 1),
        (16, 128): _blocks(64, 64, 4, 1),
    },
    "interpreter": _interpreter_rows(),
}

BACKWARD_PREPARE = {
    architecture: {(bits, 256): LaunchConfig({"BLOCK_M": block}, 4, 1) for bits in (16, 32)}
    for architecture, block in (("sm_80", 64), ("sm_90", 64), ("gfx942", 64), ("interpreter", 16))
}

# As in the forward pass, with one accumulator and two products a tile.
BACKWARD_QUERY = {
    "sm_80": {
        (16, 64): _blocks(128, 64, 8, 2),
        (16, 128): _blocks(64, 64, 4, 2),
        (16, 256): _blocks(64, 32, 4, 1),
        (32, 64): _blocks(64, 32, 4, 1),
        (32, 128): _blocks(32, 32, 4, 1),
        (32, 256): _blocks(16, 32, 4, 1),
    },
    "sm_90": {
        (16, 64): _blocks(64, 64, 4, 3),
        (16, 128): _blocks(128, 64, 8, 3),
        (16, 256): _blocks(64, 64, 8, 1),
        (32, 64): _blocks(64, 32, 4, 2),
        (32, 128): _blocks(32, 32, 4, 2),
        (32, 256): _blocks(32, 32, 4, 1),
    },
    "gfx942": {
        (16, 64): _blocks(64, 64, 4, 1),
        (16, 128): _blocks(64, 32, 4, 1),
        (16, 256): _blocks(32, 32, 4, 1),
        (32, 64): _blocks(32, 32, 4, 1),
        (32, 128): _blocks(32, 16, 4, 1),
        (32, 256): _blocks(16, 16, 4, 1),
    },
    "interpreter": _interpreter_rows(),
}

# BLOCK_N keys are held with two accumulators, BLOCK_M rows pass by.
BACKWARD_KEYS = {
    "sm_80": {
        (16, 64): _blocks(32, 128, 8, 3),
        (16, 128): _blocks(32, 64, 4, 2),
        (16, 256): _blocks(32, 32, 4, 1),
        (32, 64): _blocks(32, 64, 4, 1),
        (32, 128): _blocks(32, 32, 4, 1),
        (32, 256): _blocks(16, 16, 4, 1),
    },
    "sm_90": {
        (16, 64): _blocks(64, 64, 4, 3),
        (16, 128): _blocks(32, 128, 8, 3),
        (16, 256): _blocks(32, 64, 8, 1),
        (32, 64): _blocks(32, 64, 4, 2),
        (32, 128): _blocks(32, 32, 4, 2),
        (32, 256): _blocks(16, 32, 4, 1),
    },
    "gfx942": {
        (16, 64): _blocks(32, 64, 4, 1),
        (16, 128): _blocks(32, 64, 4, 1),
        (16, 256): _blocks(16, 32, 4, 1),
        (32, 64): _blocks(32, 32, 4, 1),
        (32, 128): _blocks(16, 32, 4, 1),
        (32, 256): _blocks(16, 16, 4, 1),
    },
    "interpreter": _interpreter_rows(),
}

BACKWARD_KEYS_BIASED = {
    "sm_80": BACKWARD_KEYS["sm_80"],
    "sm_90": BACKWARD_KEYS["sm_90"] | {(16, 128): _blocks(32, 64, 8, 2)},
    "gfx942": BACKWARD_KEYS["gfx942"],
    "interpreter": _interpreter_rows(),
}

# The tile itself is the accumulator. BLOCK_M <= BLOCK_N.
BACKWARD_DISTANCE = {
    "sm_80": {
        (16, 64): _blocks(32, 64, 4, 2),
        (16, 128): _blocks(32, 64, 4, 2),
        (16, 256): _blocks(32, 32, 4, 1),
        (32, 64): _blocks(32, 32, 4, 1),
        (32, 128): _blocks(32, 32, 4, 1),
        (32, 256): _blocks(16, 16, 4, 1),
    },
    "sm_90": {
        (16, 64): _blocks(64, 128, 8, 2),
        (16, 128): _blocks(64, 128, 8, 2),
        (16, 256): _blocks(64, 64, 4, 1),
        (32, 64): _blocks(32, 64, 4, 1),
        (32, 128): _blocks(32, 32, 4, 1),
        (32, 256): _blocks(16, 32, 4, 1),
    },
    "gfx942": {
        (16, 64): _blocks(64, 64, 4, 1),
        (16, 128): _blocks(32, 64, 4, 1),
        (16, 256): _blocks(32, 32, 4, 1),
        (32, 64): _blocks(32, 32, 4, 1),
        (32, 128): _blocks(16, 32, 4, 1),
        (32, 256): _blocks(16, 16, 4, 1),
    },
    "interpreter": _interpreter_rows(),
}
