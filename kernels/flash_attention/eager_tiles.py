"""How the eager path cuts attention into tiles, and what a tile is computed from.

Rows are taken in reverse. Row r then stands for query `N - 1 - r`, which sees key j at distance `r + j - (M - 1)`:
what depends on the distance alone is a vector over `t = r + j`, and its values over a tile are a view of it with
strides (1, 1), which costs no memory and no index. Query heads that share a key head are rows of one matrix.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .operands import UNLIMITED, Operands, Options, dropout_keep, dropout_row_keys


LOG2_E = math.log2(math.e)
# Rows of a product, and logits of all heads in a tile: 2 MiB in float32, which two of fit into a cache. Smaller ones
# pay for Python; larger ones go through memory.
ROWS, LEAST_ROWS = 256, 16
TILE = {"cpu": 2**19}
TILE_ELSEWHERE = 2**24
# Below the rounding of every sum that holds the largest weight, 1, and far enough above the least normal number that
# products with it stay normal, too: processors are slow with those that do not (docs/kernels/flash_attention.md).
LEAST_EXPONENT = -100.0
# In base 2: a bias that differs by less makes no more such weights than products alone do.
LOW_BIAS = 50.0


class Part(NamedTuple):
    """A call, or a batch row of it cut to its lengths, in the dtype of the computation.

    C counts batch and key heads together, U the query heads of a key head, N rows, M keys.

    Attributes:
        query: `[C, U, N, D]`, in the order given; `rows_of` and `put_rows` turn it around.
        key, value: `[C, M, D]`, `[C, M, V]`; zeros at masked keys.
        memory_key, memory_value: `[C, R, D]`, `[C, R, V]`, R may be 0.
        bias: `[C, U, N + M - 1]` over t, times `logit_factor`, or None.
        before, behind: up to the one and from the other t on the bias is the same for all.
        is_low: whether the bias takes some keys far below others.
        mask: `[C, 1, M]`, 0 or -inf, or None.
        edges: `[N + M - 1]` over t, 0 inside of the window and -inf outside, or None.
        first, last: the t inside of the window.
        row_keys: `[C, U, N]` for `dropout_keep`, or None.
        options: as given.
        logit_factor: what logits are multiplied with, to be in base 2, or ready for tanh.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    memory_key: Tensor
    memory_value: Tensor
    bias: Tensor | None
    before: int
    behind: int
    is_low: bool
    mask: Tensor | None
    edges: Tensor | None
    first: int
    last: int
    row_keys: Tensor | None
    options: Options
    logit_factor: float


class Tile(NamedTuple):
    """Rows `[top, bottom)` of heads `[start, stop)` against keys, or memory keys, `[left, right)`."""

    start: int
    stop: int
    top: int
    bottom: int
    left: int
    right: int
    memory: bool

    @property
    def over_t(self) -> slice:
        """The t of its rows and keys."""
        return slice(self.top + self.left, self.bottom - 1 + self.right)


def prepare(operands: Operands, options: Options, batch_row: int = 0) -> Part:
    """The operands of equal lengths as a `Part`; `batch_row` is the number of the first batch row (for dropout)."""
    query, key, value = operands[:3]
    batch, heads, length, size = query.shape
    key_heads, keys = key.shape[1:3]
    shared = heads // key_heads
    dtype, device = torch.promote_types(query.dtype, torch.float32), query.device
    if operands.key_mask is not None:
        # What stands at a key that does not count may not be a number: no product may meet it.
        counts = operands.key_mask[:, None, :, None]
        key, value = torch.where(counts, key, 0), torch.where(counts, value, 0)

    def flat(tensor):
        return tensor.to(dtype).expand(batch, *tensor.shape[1:]).reshape(batch * key_heads, *tensor.shape[2:])

    logit_factor = 1 / options.softcap if options.softcap else LOG2_E
    first = 0 if options.left == UNLIMITED else max(keys - 1 - options.left, 0)
    last = length + keys - 2 if options.right == UNLIMITED else min(keys - 1 + options.right, length + keys - 2)
    edges = mask = row_keys = None
    if first > 0 or last < length + keys - 2:
        edges = torch.full((max(length + keys - 1, 0),), -torch.inf, dtype=dtype, device=device)
        edges[first : last + 1] = 0
    if operands.key_mask is not None:
        mask = torch.zeros(operands.key_mask.shape, dtype=dtype, device=device)
        mask = mask.masked_fill_(~operands.key_mask, -torch.inf).repeat_interleave(key_heads, dim=0)[:, None]
    if options.dropout_p:
        numbers = torch.arange(batch * heads, device=device) + batch_row * heads
        rows = torch.arange(length - 1, -1, -1, device=device)
        row_keys = dropout_row_keys(operands.dropout_seed, rows, numbers.view(batch * key_heads, shared))
    bias = bias_over_distances(operands, dtype)
    before, behind, is_low = -1, length + keys, bias is not None
    if bias is not None:
        if operands.alibi_slopes is None:
            radius = operands.distance_bias.shape[1] // 2
            before, behind = keys - 1 - radius, keys - 1 + radius
        if device.type == "cpu" and bias.numel():  # elsewhere to look at a number is to wait for it
            is_low = bool((bias.amax() - bias.amin()) * LOG2_E > LOW_BIAS)
        bias = (bias * logit_factor).expand(batch, heads, -1).reshape(batch * key_heads, shared, -1)
    nothing = (key.new_empty(batch, key_heads, 0, size), value.new_empty(batch, key_heads, 0, value.shape[3]))
    memory = nothing if operands.memory_key is None else (operands.memory_key, operands.memory_value)
    return Part(
        query.to(dtype).reshape(batch * key_heads, shared, length, size),
        flat(key), flat(value), flat(memory[0]), flat(memory[1]), bias, before, behind, is_low, mask, edges, first,
        last, row_keys, options, logit_factor,
    )  # fmt: skip


def distances(operands: Operands) -> Tensor:
    """Distance of each t: int64 `[N + M - 1]`."""
    length, keys = operands.query.shape[2], operands.key.shape[2]
    return torch.arange(1 - keys, length, device=operands.query.device)


def bias_over_distances(operands: Operands, dtype) -> Tensor | None:
    """The sum of both biases over t: `[B or 1, H or 1, N + M - 1]`."""
    bias = None
    if operands.distance_bias is not None:
        radius = operands.distance_bias.shape[1] // 2
        index = distances(operands).clamp(-radius, radius) + radius
        bias = operands.distance_bias.to(dtype)[None, :, index]
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.to(dtype)[..., None] * distances(operands).abs()
        bias = -slopes if bias is None else bias - slopes
    return bias


def bias_gradients(operands: Operands, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of slopes and distance bias from that of `bias_over_distances` `[B, H, N + M - 1]`."""
    slopes = table = None
    if operands.alibi_slopes is not None:
        slopes = -(gradient * distances(operands).abs()).sum(-1)
        slopes = slopes if operands.alibi_slopes.shape[0] > 1 else slopes.sum(0, keepdim=True)
    if operands.distance_bias is not None:
        radius = operands.distance_bias.shape[1] // 2
        summed = gradient.sum(0)
        summed = summed if operands.distance_bias.shape[0] > 1 else summed.sum(0, keepdim=True)
        table = summed.new_zeros(operands.distance_bias.shape)
        table.index_add_(1, distances(operands).clamp(-radius, radius) + radius, summed)
    return slopes, table


def row_blocks(part: Part) -> Iterator[tuple[Tile, list[Tile]]]:
    """Blocks of rows, each with its tiles; those outside of the window are not visited."""
    count, shared, length = part.query.shape[:3]
    keys, slots = part.key.shape[1], part.memory_key.shape[1]
    chunk, rows, columns = _sizes(part)
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        for top in range(0, length, rows):
            bottom = min(top + rows, length)
            first, last = max(part.first - (bottom - 1), 0), min(part.last - top + 1, keys)
            tiles = [
                Tile(start, stop, top, bottom, left, min(left + columns, slots), True)
                for left in range(0, slots, columns)
            ]
            tiles += [
                Tile(start, stop, top, bottom, left, min(left + columns, last), False)
                for left in range(first, last, columns)
            ]
            yield Tile(start, stop, top, bottom, 0, 0, False), tiles


def _sizes(part):
    """Heads, rows and columns of a tile."""
    count, shared, length = part.query.shape[:3]
    keys = max(part.key.shape[1], part.memory_key.shape[1], 1)
    if _rows_alone(part):
        # Row by row, tiles hold visible keys only, so that nothing else meets a product.
        return count, 1, keys
    budget = TILE.get(part.query.device.type, TILE_ELSEWHERE)
    span = max(part.last - part.first, 0)  # keys that a row sees, less one
    # Rows of a block see different ends of the window: the fewer rows, the fewer columns in vain.
    rows = min(max(ROWS // shared, LEAST_ROWS), max(span // 2, LEAST_ROWS), max(length, 1))
    wanted = min(span + rows, keys) if span + rows <= 2 * ROWS else ROWS
    chunk = min(max(budget // (shared * rows * wanted), 1), max(count, 1))
    return chunk, rows, max(wanted, budget // (chunk * shared * rows))


def _rows_alone(part):
    """Whether 0 · inf could carry a key that a row does not see into it: its sum is finite only if all of it is."""
    if part.edges is None or part.query.device.type != "cpu" or part.query.shape[2] == 1:
        return False
    return not torch.isfinite(part.query.sum() + part.key.sum() + part.value.sum())


def empty_output(query: Tensor, size: int) -> Tensor:
    """`[B, H, N, size]` like `query` `[B, H, N, D]`, the heads of a row side by side: as a projection wants it."""
    batch, heads, length = query.shape[:3]
    return query.new_empty(batch, length, heads, size).transpose(1, 2)


def keys_of(part: Part, tile: Tile) -> tuple[Tensor, Tensor]:
    """Keys and values of a tile, `[c, columns, D]` and `[c, columns, V]`."""
    key, value = (part.memory_key, part.memory_value) if tile.memory else (part.key, part.value)
    here = slice(tile.start, tile.stop), slice(tile.left, tile.right)
    return key[here], value[here]


def rows_of(tensor: Tensor, tile: Tile) -> Tensor:
    """A copy of the rows of a tile out of `[C, U, N, ·]`, in reverse, as `[c, U · rows, ·]`."""
    length = tensor.shape[2]
    part = tensor[tile.start : tile.stop, :, length - tile.bottom : length - tile.top].flip(2)
    return part.reshape(part.shape[0], -1, part.shape[-1])


def put_rows(tensor: Tensor, tile: Tile, rows: Tensor) -> None:
    """Write what stands in the form of `rows_of` back to its place in `[C, U, N, ·]`."""
    length = tensor.shape[2]
    place = tensor[tile.start : tile.stop, :, length - tile.bottom : length - tile.top]
    place.copy_(rows.view(place.shape[0], place.shape[1], -1, place.shape[3]).flip(2))


def compute_logits(
    part: Part, tile: Tile, query: Tensor, key: Tensor, buffer: Tensor
) -> tuple[Tensor, Tensor | float]:
    """Logits of a tile over `unit(part)`, `[c, U · rows, columns]` in `buffer`, and what is to be added to those of a
    row, `[c, U · rows, 1]` or 0: a bias that is one number for each head on all of the tile."""
    rows, columns = tile.bottom - tile.top, tile.right - tile.left
    logits = buffer[: query.shape[0] * query.shape[1] * columns].view(*query.shape[:2], columns)
    factor = part.options.scale * part.logit_factor
    offset = 0.0
    if part.bias is None or tile.memory or (is_far(part, tile) and not part.options.softcap):
        if part.bias is not None and not tile.memory:
            heads = part.bias[tile.start : tile.stop, :, tile.over_t.start, None]  # [c, U, 1]
            offset = heads.expand(-1, -1, rows).reshape(*query.shape[:2], 1)
        torch.baddbmm(logits, query, key.mT, beta=0, alpha=factor, out=logits)
    else:
        by_row = logits.view(query.shape[0], -1, rows, columns)
        by_row.copy_(part.bias[tile.start : tile.stop, :, tile.over_t].unfold(-1, columns, 1))
        logits.baddbmm_(query, key.mT, alpha=factor)
    if part.options.softcap:
        logits.tanh_()
    return logits, offset


def unit(part: Part) -> float:
    """What the numbers of `compute_logits` are multiplied with to be logits in base 2."""
    return part.options.softcap * LOG2_E if part.options.softcap else 1.0


def hide(part: Part, tile: Tile, logits: Tensor) -> None:
    """Takes keys that do not count, or that a row does not see, to -inf."""
    if tile.memory:
        return
    if part.mask is not None:
        logits.add_(part.mask[tile.start : tile.stop, :, tile.left : tile.right])
    rows, columns, over_t = tile.bottom - tile.top, tile.right - tile.left, tile.over_t
    if part.edges is not None and (over_t.start < part.first or over_t.stop - 1 > part.last):
        logits.view(logits.shape[0], -1, rows, columns).add_(part.edges[over_t].unfold(-1, columns, 1))


def is_far(part: Part, tile: Tile) -> bool:
    """Whether the bias is one number for each head on all of the tile."""
    return tile.over_t.stop - 1 <= part.before or tile.over_t.start >= part.behind


def exponentiate(logits: Tensor, is_low: bool) -> Tensor:
    """Powers of two, in place. With a bias that takes keys far down, those below the least weight are 0."""
    if is_low:
        torch.threshold_(logits, LEAST_EXPONENT, -torch.inf)
    return logits.exp2_()


def kept(part: Part, tile: Tile) -> Tensor:
    """Which weights of a tile dropout keeps: bool `[c, U · rows, columns]`."""
    before = 0 if tile.memory else part.memory_key.shape[1]
    columns = torch.arange(before + tile.left, before + tile.right, device=part.query.device)
    row_keys = part.row_keys[tile.start : tile.stop, :, tile.top : tile.bottom].flatten(1)
    return dropout_keep(row_keys, columns, part.options.dropout_p)


def largest_tile(part: Part) -> int:
    """Numbers in the largest tile, for the buffers."""
    chunk, rows, columns = _sizes(part)
    widest = min(columns, max(part.key.shape[1], part.memory_key.shape[1]))
    return chunk * part.query.shape[1] * rows * widest
