"""The hard top-k by position: which positions hold the largest values, ties going to the smaller position."""

import torch


# Elements at a time on a CPU: they stay in its cache, and torch starts no threads for so few.
CACHED_ELEMENTS = 32768


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


def select_by_position(
    values: torch.Tensor, num_selected: int, smallest_selected: torch.Tensor | None = None
) -> torch.Tensor:
    """Ascending positions `[R, num_selected]`, int64, of the largest `values` `[R, N]`.

    `smallest_selected` `[R, 1]` is the num_selected-th largest value of each row, where it is known already.
    """
    rows, columns = values.shape
    if num_selected in (0, columns) or rows == 0:
        return torch.arange(num_selected, device=values.device).expand(rows, num_selected).contiguous()
    if smallest_selected is None:
        smallest_selected = torch.topk(values, num_selected, dim=-1).values[:, -1:]
    found = []
    for row, column in blocks_of(values):
        found.append((values[row, column] >= smallest_selected[row]).nonzero())
        found[-1] += found[-1].new_tensor([row.start, column.start])
    found = torch.cat(found)
    if found.shape[0] == rows * num_selected:
        row, position = found.view(rows, num_selected, 2).unbind(-1)
        if rows == 1 or torch.equal(row, torch.arange(rows, device=row.device)[:, None].expand_as(row)):
            return position.contiguous()

    # There are ties, or something that is not a number and compares with nothing: it comes last.
    values = values.masked_fill(values.isnan(), -torch.inf)
    smallest_selected = torch.topk(values, num_selected, dim=-1).values[:, -1:]
    larger, equal = values > smallest_selected, values == smallest_selected
    room = num_selected - larger.sum(-1, keepdim=True)
    selected = larger | (equal & (equal.cumsum(-1) <= room))
    return selected.nonzero()[:, 1].view(rows, num_selected)
