"""The blocked form for a window that slides over one sequence, as light attention in an encoder has it.

Every block of rows meets the same stretch of keys around it, and what depends on the distance is one small matrix for
all of them. So many blocks are one product of a batch, whose keys are overlapping views of a padded copy:

    rows i of block b:  j B … j B + B - 1        keys c of block b:  j B - left … j B + B - 1 + right

The gradients of overlapping keys are summed up in as many shifted additions as blocks a stretch covers. The formulas
are those of `eager.py`; there is one tile per row, hence no running maximum.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .eager_tiles import LOG2_E, TILE, bias_gradients, bias_over_distances, empty_output, exponentiate
from .operands import UNLIMITED, Gradients, Operands, Options, Wanted


BLOCK = 64
# A wider window has little to gain: its tiles are large by themselves.
WIDEST = 512


class Band(NamedTuple):
    """A call in the dtype of the computation; C counts batch and heads together, W = BLOCK + left + right.

    Attributes:
        query: `[C, N, D]`.
        key, value: `[C, left + N' + right, ·]`, N' the length in whole blocks; zeros where there is no key.
        bias: `[Cb, BLOCK, W]`, times log2(e); -inf outside of the window. Cb is 1, H or C.
        mask: `[C or 1, left + N' + right]`, 0 or -inf where there is no key.
        biased: whether there is more in `bias` than the window.
        masked: whether a mask was given, so that every block has to look at it.
        start, stop: where the keys themselves begin and end.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    mask: Tensor
    biased: bool
    masked: bool
    start: int
    stop: int


class Group(NamedTuple):
    """Blocks of rows that are computed together: `count` whole blocks from `first` on of head `head`, or the cut one.

    `head` is a slice of C: one head, or all of them for the last block, which has `rows` rows.
    """

    head: slice
    first: int
    count: int
    rows: int


def suits(operands: Operands, options: Options) -> bool:
    """Whether a call is of this kind, on a CPU and long enough; nothing that is not finite may stand in it."""
    query, key, value = operands[:3]
    left, right = options.left, options.right
    if query.device.type != "cpu" or query.shape[1:3] != key.shape[1:3] or query.shape[2] < 4 * BLOCK:
        return False
    if (
        UNLIMITED in (left, right)
        or left + right > min(WIDEST, query.shape[2])
        or options.softcap
        or options.dropout_p
    ):
        return False
    others = (operands.key_lengths, operands.query_lengths, operands.memory_key, operands.sinks)
    if any(tensor is not None for tensor in others):
        return False
    # 0 · inf would carry a key into a row that does not see it; the sum is finite only if every number is.
    return bool(torch.isfinite(query.sum() + key.sum() + value.sum()))


def forward(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """As `eager.forward`."""
    band, query = _prepare(operands, options), operands.query
    count, length, _ = band.query.shape
    output = empty_output(query.to(band.query.dtype), band.value.shape[2])
    rows_out = (
        output.view(count, length, -1) if len(query) == 1 else band.query.new_empty(count, length, output.shape[3])
    )
    lse = band.query.new_empty(count, length, 1, dtype=torch.float64)
    buffer = band.query.new_empty(_largest(band))
    for group in _groups(band):
        weights = _logits(band, group, options, buffer)
        maximum = weights.amax(-1, keepdim=True)
        maximum.masked_fill_(maximum == -torch.inf, 0)
        exponentiate(weights.sub_(maximum), band.biased)
        total = weights.sum(-1, keepdim=True)
        found = torch.bmm(weights, _windows(band.value, band, group))
        _rows(rows_out, group).copy_(found.div_(total.masked_fill(total == 0, 1)))
        _rows(lse, group).copy_((maximum.double() + total.double().log2()) / LOG2_E)
    if len(query) > 1:
        output.copy_(rows_out.view(output.shape))
    return output.to(query.dtype), lse.view(query.shape[:3])


def backward(
    operands: Operands,
    options: Options,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """As `eager.backward`, in the dtype of the computation."""
    band = _prepare(operands, options)
    count, length, size = band.query.shape
    output, grad_output = (t.reshape(count, length, -1) for t in (output, grad_output))
    grad_lse = None if grad_lse is None else grad_lse.reshape(count, length, 1)
    # As in eager.py: weights below a whole power of two, the rest of the normaliser goes to the rows.
    lse_2 = torch.where(lse == -torch.inf, 0, lse).double().reshape(count, length, 1) * LOG2_E
    powers = lse_2.round()
    rest, bases = torch.exp2(powers - lse_2).to(band.query.dtype), powers.to(band.query.dtype)

    grad_query = empty_output(operands.query.to(band.query.dtype), size)
    rows_query = grad_query.view(count, length, size) if len(operands.query) == 1 else torch.empty_like(band.query)
    grad_key, grad_value = torch.zeros_like(band.key), torch.zeros_like(band.value)
    grad_bias = torch.zeros_like(band.bias) if any(wanted) else None
    buffers = band.query.new_empty(2, _largest(band))
    for group in _groups(band):
        key, value = (_windows(t, band, group) for t in (band.key, band.value))
        query, rest_rows = _rows(band.query, group), _rows(rest, group)
        grad_rows = _rows(grad_output, group).to(band.query.dtype)
        delta = (grad_rows * _rows(output, group)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = (delta - _rows(grad_lse, group)).to(delta.dtype)
        grad_rows, delta = grad_rows * rest_rows, delta.mul_(rest_rows)
        weights = _logits(band, group, options, buffers[0]).sub_(_rows(bases, group))
        exponentiate(weights, band.biased)
        slopes = buffers[1, : weights.numel()].view(weights.shape)
        torch.bmm(grad_rows, value.mT, out=slopes)
        _add_windows(grad_value, group, torch.bmm(weights.mT, grad_rows), 1.0)
        slopes.sub_(delta).mul_(weights)
        _rows(rows_query, group).copy_(torch.bmm(slopes, key).mul_(options.scale))
        _add_windows(grad_key, group, torch.bmm(slopes.mT, query), options.scale)
        if grad_bias is not None:
            _add_bias(grad_bias, group, slopes)
    if len(operands.query) > 1:
        grad_query.copy_(rows_query.view(grad_query.shape))

    def unpadded(tensor):
        return tensor[:, options.left : options.left + length].view(*operands.query.shape[:3], -1)

    slopes, table = (None, None) if grad_bias is None else _over_distances(operands, options, grad_bias)
    return Gradients(grad_query, unpadded(grad_key), unpadded(grad_value), slopes, table, None, None, None)


def _prepare(operands: Operands, options: Options) -> Band:
    query, key, value = operands[:3]
    batch, heads, length = query.shape[:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    left, right = options.left, options.right
    behind = -length % BLOCK + right
    span = left + right + 1
    mask = torch.full((1, left + length + behind), -torch.inf, dtype=dtype)
    mask[:, left : left + length] = 0
    if operands.key_mask is not None:
        counts = operands.key_mask[:, None, :, None]
        key, value = torch.where(counts, key, 0), torch.where(counts, value, 0)
        hidden = ~operands.key_mask.repeat_interleave(heads, dim=0)
        mask = mask.repeat(batch * heads, 1)
        mask[:, left : left + length].masked_fill_(hidden, -torch.inf)

    def padded(tensor):
        found = tensor.new_zeros(batch * heads, left + length + behind, tensor.shape[3], dtype=dtype)
        found[:, left : left + length].view(tensor.shape).copy_(tensor)
        return found

    found = bias_over_distances(operands, dtype)
    over_span = torch.zeros(1, span, dtype=dtype)
    if found is not None:
        over_span = found.expand(len(found), heads, -1).flatten(0, 1)[:, length - 1 - left : length + right] * LOG2_E
    bias = torch.full((len(over_span), BLOCK, BLOCK + span - 1), -torch.inf, dtype=dtype)
    _diagonals(bias, span).copy_(over_span[:, None])
    return Band(
        query.to(dtype).reshape(batch * heads, length, -1), padded(key), padded(value), bias, mask,
        found is not None, operands.key_mask is not None, left, left + length,
    )  # fmt: skip


def _diagonals(matrices: Tensor, span: int) -> Tensor:
    """`[·, BLOCK, span]`: of row i of `[·, BLOCK, W]` the columns from i on, as a view."""
    rows, width = matrices.shape[1:]
    return matrices.as_strided((len(matrices), rows, span), (rows * width, width + 1, 1))


def _groups(band: Band) -> Iterator[Group]:
    count, length = band.query.shape[:2]
    whole, cut = divmod(length, BLOCK)
    step = max(TILE["cpu"] // (BLOCK * band.bias.shape[2]), 1)
    for head in range(count):
        for first in range(0, whole, step):
            yield Group(slice(head, head + 1), first, min(step, whole - first), BLOCK)
    if cut:
        for head in range(0, count, step):
            yield Group(slice(head, min(head + step, count)), whole, 1, cut)


def _largest(band: Band) -> int:
    """Numbers in the logits of the largest group."""
    return max(TILE["cpu"], BLOCK * band.bias.shape[2])


def _rows(tensor: Tensor, group: Group) -> Tensor:
    """The rows of a group out of `[C, N, ·]`, as a view `[blocks, rows, ·]`."""
    first = group.first * BLOCK
    part = tensor[group.head, first : first + group.count * group.rows]
    return part if group.rows < BLOCK else part[0].unflatten(0, (group.count, BLOCK))


def _windows(tensor: Tensor, band: Band, group: Group) -> Tensor:
    """The keys that the rows of a group meet out of `[C, left + N' + right, ·]`: `[blocks, W, ·]`, a view."""
    width, size = band.bias.shape[2], tensor.shape[-1]
    part = tensor[group.head, group.first * BLOCK :]
    if group.rows < BLOCK:
        return part[:, :width]
    return part.as_strided((group.count, width, size), (BLOCK * size, size, 1), part.storage_offset())


def _logits(band: Band, group: Group, options: Options, buffer: Tensor) -> Tensor:
    """Logits in base 2, `[blocks, rows, W]`, in `buffer`."""
    query, key = _rows(band.query, group), _windows(band.key, band, group)
    logits = buffer[: len(query) * group.rows * key.shape[1]].view(len(query), group.rows, -1)
    bias = band.bias[:, : group.rows] if len(band.bias) == 1 else _of_heads(band.bias, group)[:, : group.rows]
    torch.baddbmm(bias.expand_as(logits), query, key.mT, alpha=options.scale * LOG2_E, out=logits)
    last = (group.first + group.count - 1) * BLOCK + key.shape[1]
    if band.masked or group.first * BLOCK < band.start or last > band.stop:
        mask = band.mask if len(band.mask) > 1 else band.mask.expand(len(band.key), -1)
        part = mask[group.head, group.first * BLOCK :]
        if group.rows < BLOCK:
            logits.add_(part[:, None, : key.shape[1]])
        else:
            logits.add_(part[0].unfold(0, key.shape[1], BLOCK)[: group.count, None])
    return logits


def _of_heads(per_head: Tensor, group: Group) -> Tensor:
    """The matrices of a group's heads out of `[H or C, BLOCK, W]`."""
    heads = torch.arange(group.head.start, group.head.stop) % len(per_head)
    return per_head[heads] if len(heads) > 1 else per_head[int(heads[0]) :][:1]


def _add_windows(total: Tensor, group: Group, windows: Tensor, factor: float) -> None:
    """Add `windows` `[blocks, W, ·]` times `factor` to the places that `_windows` took them from."""
    width, size = windows.shape[1:]
    part = total[group.head, group.first * BLOCK :]
    if group.rows < BLOCK:
        part[:, :width].add_(windows, alpha=factor)
        return
    for start in range(0, width, BLOCK):
        columns = min(BLOCK, width - start)
        shape, strides = (group.count, columns, size), (BLOCK * size, size, 1)
        place = part.as_strided(shape, strides, part.storage_offset() + start * size)
        place.add_(windows[:, start : start + columns], alpha=factor)


def _add_bias(total: Tensor, group: Group, slopes: Tensor) -> None:
    """Add the gradients of a group's logits to those of the matrices that they had in common."""
    if group.rows == BLOCK:
        total[group.head.start % len(total)] += slopes.sum(0)
    else:
        heads = torch.arange(group.head.start, group.head.stop) % len(total)
        total[:, : group.rows].index_add_(0, heads, slopes)


def _over_distances(operands: Operands, options: Options, grad_bias: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of slopes and distance bias from those of `Band.bias`."""
    heads, length = operands.query.shape[1:3]
    over_span = _diagonals(grad_bias, options.left + options.right + 1).sum(1).unflatten(0, (-1, heads))
    over_all = over_span.new_zeros(*over_span.shape[:2], 2 * length - 1)
    over_all[..., length - 1 - options.left : length + options.right] = over_span
    return bias_gradients(operands, over_all)
