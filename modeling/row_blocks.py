"""Going through many rows on a processor a few at a time, so that its cache holds them from operator to operator."""

from collections.abc import Iterator

import torch
from torch import Tensor


# Numbers of a block: half a MiB in float32, of which a few fit into a core's cache.
BLOCK = 2**17
# Fewer numbers are in the cache anyhow.
LEAST = 2**18


def worth_blocks(states: Tensor) -> bool:
    """Whether `states` are so many numbers, and where, that going through them in blocks saves time.

    Not inside `torch.compile`, which makes one pass out of many by itself.
    """
    return states.device.type == "cpu" and states.numel() >= LEAST and not torch.compiler.is_compiling()


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of `rows` `[N, C]`."""
    step = max(BLOCK // rows.shape[1], 1)
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)
