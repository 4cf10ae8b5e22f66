"""The hard top-k: which positions hold the largest values, ties going to the smaller position."""

import math
from typing import NamedTuple

import torch


# Elements at a time on a CPU: they stay in its cache, and torch starts no threads for so few.
CACHED_ELEMENTS = 32768
# From this length on, on a CPU, a shortlist made after a glance at a sample is faster than a top-k of the whole row.
LONG_ROW = 16384
SAMPLE = 2048


class Largest(NamedTuple):
    """The largest values `[R, n]` in descending order, and their positions `[R, n]`, which may break ties anyhow.

    `shortlists`, if the rows are long, has for each row the ascending positions of all values that are not below some
    bound; the largest are among them.
    """

    values: torch.Tensor
    positions: torch.Tensor
    shortlists: list[torch.Tensor] | None


def blocks_of(values: torch.Tensor):
    """Slices (rows, columns) that cover `values` `[R, N]` in row-major order, small enough for a processor's cache."""
    rows, columns = values.shape
    if values.device.type != "cpu":
        yield slice(0, rows), slice(0, columns)
        return
    # With more threads than two, larger blocks, which torch then divides.
    elements = CACHED_ELEMENTS * max(1, torch.get_num_threads() // 4)
    height = max(1, elements // columns)
    for row in range(0, rows, height):
        for column in range(0, columns, elements):
            yield slice(row, row + height), slice(column, column + elements)


def largest_values(values: torch.Tensor, number: int) -> Largest:
    """`torch.topk` of `values` `[R, N]`, through shortlists where the rows are long and the number is small."""
    rows, columns = values.shape
    if values.device.type != "cpu" or columns < LONG_ROW or 4 * number > columns or not rows:
        return Largest(*torch.topk(values, number, dim=-1), None)
    found, positions, shortlists = [], [], []
    for row in range(rows):
        shortlist = _shortlist(values[row : row + 1], number)
        if shortlist is None:
            return Largest(*torch.topk(values, number, dim=-1), None)
        best, order = torch.topk(values[row].take(shortlist), number)
        found.append(best)
        positions.append(shortlist.take(order))
        shortlists.append(shortlist)
    return Largest(torch.stack(found), torch.stack(positions), shortlists)


def _shortlist(row: torch.Tensor, number: int) -> torch.Tensor | None:
    """Ascending positions of a few more than `number` of the largest in `[1, N]`; None if the sample misled."""
    columns = row.shape[1]
    sample = row[0, :: max(1, columns // SAMPLE)]
    share = number / columns
    # Four standard deviations more than the number's share of the sample.
    rank = sample.numel() * share + 4 * math.sqrt(sample.numel() * share * (1 - share)) + 2
    bound = torch.topk(sample, min(int(rank), sample.numel())).values[-1]
    parts = []
    for _, column in blocks_of(row):
        part = (row[0, column] >= bound).nonzero()[:, 0]
        parts.append(part.add_(column.start) if column.start else part)
    shortlist = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return shortlist if shortlist.numel() >= number else None


def select_by_position(values: torch.Tensor, num_selected: int, largest: Largest | None = None) -> torch.Tensor:
    """Ascending positions `[R, num_selected]`, int64, of the largest `values` `[R, N]`.

    `largest` has at least num_selected of them, if they are known already.
    """
    rows, columns = values.shape
    if num_selected in (0, columns) or rows == 0:
        return torch.arange(num_selected, device=values.device).expand(rows, num_selected).contiguous()
    largest = largest_values(values, num_selected) if largest is None else largest
    last = largest.values[:, num_selected - 1 : num_selected]
    if largest.shortlists is None:
        selected = values >= last
        if (selected.sum(-1) == num_selected).all():
            return selected.nonzero()[:, 1].clone().view(rows, num_selected)
    else:
        pairs = zip(values, largest.shortlists, last, strict=True)
        found = [shortlist[row.take(shortlist) >= bound] for row, shortlist, bound in pairs]
        if all(positions.numel() == num_selected for positions in found):
            return torch.stack(found)

    # There are ties, or something that is not a number and compares with nothing: it comes last.
    values = values.masked_fill(values.isnan(), -torch.inf)
    last = torch.topk(values, num_selected, dim=-1).values[:, -1:]
    larger, equal = values > last, values == last
    room = num_selected - larger.sum(-1, keepdim=True)
    selected = larger | (equal & (equal.cumsum(-1) <= room))
    return selected.nonzero()[:, 1].clone().view(rows, num_selected)
