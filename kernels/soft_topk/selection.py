"""The hard top-k: which positions hold the largest values, ties going to the smaller position.

On a CPU numpy does it: its partition and its sort are vectorised, 8 to 10 times as fast as `torch.topk` on one core.
"""

from types import ModuleType

import numpy as np
import torch


# Elements at a time on a CPU: they stay in its cache, and torch starts no threads for so few, but for `torch.exp`.
CACHED_ELEMENTS = 32768
# With so many threads and more, torch computes in place of numpy.
MANY_THREADS = 8


def in_blocks(values: torch.Tensor | np.ndarray, *others: torch.Tensor | np.ndarray):
    """Tuples of views that cover `values` `[R, N]` in row-major order, small enough for a processor's cache.

    The `others` are `[R, N]` or `[R, 1]`, tensors or arrays, and are cut in the same way.
    """
    rows, columns = values.shape
    # With many threads larger blocks, which torch then divides.
    shared = torch.is_tensor(values)
    elements = CACHED_ELEMENTS * max(1, torch.get_num_threads() // 4) if shared else CACHED_ELEMENTS
    if rows * columns <= elements or (shared and values.device.type != "cpu"):
        yield values, *others
        return
    height = max(1, elements // columns)
    for row in range(0, rows, height):
        for column in range(0, columns, elements):
            yield tuple(
                tensor[row : row + height, column : column + elements]
                if tensor.shape[1] == columns
                # One number a row: the same ones for all the columns.
                else tensor[row : row + height]
                for tensor in (values, *others)
            )


def library_for(values: torch.Tensor) -> ModuleType:
    """numpy on a processor, because its functions start sooner; torch elsewhere, or with threads to share a row."""
    return np if values.device.type == "cpu" and torch.get_num_threads() < MANY_THREADS else torch


def in_library(library: ModuleType, *tensors: torch.Tensor) -> tuple:
    """The same memory as this library takes it."""
    return tuple([tensor.numpy() for tensor in tensors]) if library is np else tensors


def as_tensor(numbers: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The same as a tensor where it is; `torch.as_tensor` would take it to the default device."""
    return numbers if torch.is_tensor(numbers) else torch.from_numpy(numbers)


def on_host(numbers: torch.Tensor | np.ndarray) -> np.ndarray:
    """The same as an array."""
    return numbers.numpy(force=True) if torch.is_tensor(numbers) else numbers


def split_largest(values: torch.Tensor, number: int) -> tuple[np.ndarray, torch.Tensor]:
    """The `number` (at least 1) largest of each row `[R, number]`, ascending, and copies of the others, in any order.

    The largest are on the host, the others where `values` `[R, N]` are.
    """
    place = values.shape[-1] - number
    if values.device.type != "cpu":
        ordered = values.sort(dim=-1).values
        return ordered[:, place:].cpu().numpy(), ordered[:, :place]
    parts = np.partition(values.detach().numpy(), place, axis=-1)
    largest = parts[:, place:]
    largest.sort(axis=-1)
    return largest, torch.from_numpy(parts[:, :place])


def select_by_position(values: torch.Tensor, num_selected: int, smallest: np.ndarray | None = None) -> torch.Tensor:
    """Ascending positions `[R, num_selected]`, int64, of the largest `values` `[R, N]`; NaN counts as the smallest.

    `smallest` `[R, 1]` is the smallest value among these, if it is known already.
    """
    rows, columns = values.shape
    if num_selected in (0, columns) or rows == 0:
        return torch.arange(num_selected, device=values.device).expand(rows, num_selected).contiguous()
    if values.device.type != "cpu":
        ordered = values.masked_fill(values.isnan(), -torch.inf).sort(dim=-1, descending=True, stable=True)
        return ordered.indices[:, :num_selected].sort(dim=-1).values

    host = values.detach().numpy()
    smallest = _nth_largest(host, num_selected) if smallest is None else smallest
    selected = _positions(host >= smallest, num_selected)
    if selected is None:  # there are ties, or something that is not a number and compares with nothing
        host = np.where(np.isnan(host), -np.inf, host)
        smallest = _nth_largest(host, num_selected)
        larger, equal = host > smallest, host == smallest
        room = num_selected - np.count_nonzero(larger, axis=-1, keepdims=True)
        selected = _positions(larger | (equal & (np.cumsum(equal, axis=-1) <= room)), num_selected)
    return torch.from_numpy(selected)


def _nth_largest(values: np.ndarray, number: int) -> np.ndarray:
    """`[R, 1]` of `values` `[R, N]`."""
    place = values.shape[-1] - number
    return np.partition(values, place, axis=-1)[:, place : place + 1]


def _positions(flags: np.ndarray, number: int) -> np.ndarray | None:
    """Where `flags` `[R, N]` are set, `[R, number]`, if that many are in each row."""
    rows, columns = flags.shape
    found = np.flatnonzero(flags)
    if found.size != rows * number:
        return None
    if rows == 1:
        return found[None]
    found = found.reshape(rows, number) - np.arange(0, rows * columns, columns)[:, None]
    return found if (found[:, 0] >= 0).all() and (found[:, -1] < columns).all() else None
