"""The blocked form that runs without a GPU: memory linear in N and M, tiles outside of the window never touched.

Forward, for each block of rows, tile by tile of keys (arXiv 2205.14135, algorithm 1): a running maximum, the sum and
the weighted values below it, rescaled when the maximum grows. Backward recomputes each tile from the log-sum-exp:

    w = exp(s - lse)      dv = wᵀ do      ds = w ∘ (do vᵀ - δ)      δ = Σ_j w_j (do vᵀ)_j - dlse = do·o - dlse
    dx = ds (1 - (s / softcap)²)      dq = scale · dx k      dk = scale · dxᵀ q      dbias[t] = Σ dx over r + j = t

Logits are in base 2: exp2 takes a third of the time of exp.
"""

import torch
from torch import Tensor

from .eager_band import backward as band_backward
from .eager_band import forward as band_forward
from .eager_band import suits as is_band
from .eager_tiles import (
    LOG2_E,
    bias_gradients,
    compute_logits,
    empty_output,
    exponentiate,
    hide,
    is_far,
    kept,
    keys_of,
    largest_tile,
    prepare,
    put_rows,
    row_blocks,
    rows_of,
    unit,
)
from .operands import Gradients, Operands, Options, Wanted


def forward(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Output `[B, H, N, V]` in the dtype of the query and lse `[B, H, N]` in float64; see `operands.py`."""
    query = operands.query
    if not (_has_lengths(operands) or query.numel() == 0):
        return _forward(operands, options)
    output = empty_output(query, operands.value.shape[3]).zero_()
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for b, rows, columns in _lengths(operands):
        here = slice(b, b + 1), slice(None), slice(0, rows)
        output[here], lse[here] = _forward(_cut(operands, b, rows, columns), options, b)
    return output, lse


def backward(
    operands: Operands,
    options: Options,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    wanted: Wanted,
) -> Gradients:
    """Gradients of the operands; see `operands.py`."""
    results = output, lse, grad_output, grad_lse
    if _has_lengths(operands) or operands.query.numel() == 0:
        dtype = torch.promote_types(output.dtype, torch.float32)
        gradients = operands._replace(
            **{n: None if t is None else torch.zeros_like(t, dtype=dtype) for n, t in _differentiable(operands)}
        )
        for b, rows, columns in _lengths(operands):
            here = slice(b, b + 1), slice(None), slice(0, rows)
            own = (None if t is None else t[here] for t in results)
            part = _backward(_cut(operands, b, rows, columns), options, *own, wanted, b)
            for name, total in _differentiable(_cut(gradients, b, rows, columns)):
                if (gradient := getattr(part, name)) is not None:
                    total += gradient
    else:
        gradients = _backward(operands, options, *results, wanted)

    def finished(name, operand):
        unwanted = operand is None or not getattr(wanted, name, True)
        return None if unwanted else getattr(gradients, name).to(operand.dtype)

    return Gradients(*(finished(name, operand) for name, operand in _differentiable(operands)))


def _forward(operands, options, batch_row=0):
    if is_band(operands, options):
        return band_forward(operands, options)
    part = prepare(operands, options, batch_row)
    count, shared, length = part.query.shape[:3]
    batch, heads = operands.query.shape[:2]
    output = empty_output(part.query.view(batch, heads, length, -1), part.value.shape[2])
    rows_out = (
        output.view(count, shared, length, -1)
        if batch == 1
        else part.query.new_empty(count, shared, length, output.shape[3])
    )
    lse = part.query.new_empty(count, shared, length, 1, dtype=torch.float64)
    buffer = part.query.new_empty(largest_tile(part))
    sinks = None if operands.sinks is None else _per_row(operands.sinks, operands, part) * LOG2_E
    for block, tiles in row_blocks(part):
        rows = rows_of(part.query, block)
        accumulated = rows.new_zeros(*rows.shape[:2], part.value.shape[2])
        if sinks is None:
            maximum, total = rows.new_full((*rows.shape[:2], 1), -torch.inf), rows.new_zeros(*rows.shape[:2], 1)
        else:  # a key without a value, seen first
            maximum, total = rows_of(sinks, block), rows.new_ones(*rows.shape[:2], 1)
        for tile in tiles:
            key, value = keys_of(part, tile)
            weights, offset = compute_logits(part, tile, rows, key, buffer)
            hide(part, tile, weights)
            grown = torch.maximum(maximum, weights.amax(-1, keepdim=True) * unit(part) + offset)
            grown.masked_fill_(grown == -torch.inf, 0)  # a row that has seen nothing yet
            torch.add(offset - grown, weights, alpha=unit(part), out=weights)
            exponentiate(weights, part.is_low)
            shrunk = (maximum - grown).exp2_()
            maximum, total = grown, total.mul_(shrunk).add_(weights.sum(-1, keepdim=True))
            if part.row_keys is not None:
                weights.mul_(kept(part, tile))
            accumulated.mul_(shrunk).baddbmm_(weights, value)
        maximum = torch.where(total == 0, -torch.inf, maximum)
        accumulated.div_(total.masked_fill(total == 0, 1).mul_(1 - options.dropout_p))
        put_rows(rows_out, block, accumulated)
        put_rows(lse, block, (maximum.double() + total.double().log2()) / LOG2_E)
    if batch > 1:
        output.copy_(rows_out.view(output.shape))
    return output.to(operands.query.dtype), lse.view(batch, heads, length)


def _backward(operands, options, output, lse, grad_output, grad_lse, wanted, batch_row=0):
    if is_band(operands, options):
        return band_backward(operands, options, output, lse, grad_output, grad_lse, wanted)
    part = prepare(operands, options, batch_row)
    dtype, shape = part.query.dtype, part.query.shape

    def per_row(tensor):
        return tensor.reshape(*shape[:3], -1)

    output, grad_output = per_row(output), per_row(grad_output)
    grad_lse = None if grad_lse is None else per_row(grad_lse)
    deltas = part.query.new_empty(*shape[:3], 1)
    # Weights are taken below a whole power of two, and the rest of the normaliser goes to what the rows are multiplied
    # with: the lse, rounded to float32, would be the largest error of all.
    lse_2 = per_row(torch.where(lse == -torch.inf, 0, lse).double() * LOG2_E)
    powers = lse_2.round()
    rest, bases = torch.exp2(powers - lse_2), powers.to(dtype)

    grad_query = torch.empty_like(part.query)
    grad_keys = tuple(torch.zeros_like(t) for t in (part.key, part.value))
    grad_memories = tuple(torch.zeros_like(t) for t in (part.memory_key, part.memory_value))
    grad_bias = None
    if part.bias is not None and any(wanted):
        grad_bias = torch.zeros_like(part.bias)
    buffers = part.query.new_empty(3 if options.softcap else 2, largest_tile(part))
    skewed = part.query.new_zeros(0)

    for block, tiles in row_blocks(part):
        rows, base, rest_rows = (rows_of(t, block) for t in (part.query, bases, rest))
        grad_rows = rows_of(grad_output, block).to(dtype)
        delta_rows = (grad_rows * rows_of(output, block)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta_rows = delta_rows - rows_of(grad_lse, block)
        put_rows(deltas, block, delta_rows)
        delta_rows = (delta_rows * rest_rows).to(dtype)
        grad_rows.mul_((rest_rows / (1 - options.dropout_p)).to(dtype))
        grad_own = torch.zeros_like(rows)
        for tile in tiles:
            key, value = keys_of(part, tile)
            logits, offset = compute_logits(part, tile, rows, key, buffers[0])
            # With a soft clamp they are its tanh, which its derivative needs.
            weights = buffers[2, : logits.numel()].view(logits.shape) if options.softcap else logits
            torch.add(offset - base, logits, alpha=unit(part), out=weights)
            hide(part, tile, weights)
            exponentiate(weights, part.is_low)
            slopes = buffers[1, : weights.numel()].view(weights.shape)
            torch.bmm(grad_rows, value.mT, out=slopes)
            here = slice(tile.start, tile.stop), slice(tile.left, tile.right)
            grad_key, grad_value = (t[here] for t in (grad_memories if tile.memory else grad_keys))
            if part.row_keys is None:
                grad_value.baddbmm_(weights.mT, grad_rows)
            else:
                keep = kept(part, tile)
                grad_value.baddbmm_((weights * keep).mT, grad_rows)
                slopes.mul_(keep)
            slopes.sub_(delta_rows).mul_(weights)
            if options.softcap:  # one pass for slopes · (1 - tanh²)
                torch.ops.aten.tanh_backward.grad_input(slopes, logits, grad_input=slopes)
            grad_own.baddbmm_(slopes, key)
            grad_key.baddbmm_(slopes.mT, rows)
            if grad_bias is not None and not tile.memory:
                total, first = grad_bias[tile.start : tile.stop], tile.over_t.start
                by_row = slopes.view(*total.shape[:2], tile.bottom - tile.top, tile.right - tile.left)
                if is_far(part, tile):  # all of it belongs to one end of the bias
                    total[..., first] += by_row.flatten(2).sum(-1)
                else:
                    skewed = _add_along_distances(total, by_row, first, skewed)
        put_rows(grad_query, block, grad_own.mul_(options.scale))

    def unflattened(tensor, operand, factor=1.0):
        tensor = tensor.view(*operands.key.shape[:2], *tensor.shape[1:]).mul_(factor)
        return tensor if operand.shape[0] == tensor.shape[0] else tensor.sum(0, keepdim=True)

    memory = operands.memory_key, operands.memory_value
    has_memory = memory[0] is not None
    slopes, table = (None, None)
    if grad_bias is not None:
        slopes, table = bias_gradients(operands, grad_bias.view(*operands.query.shape[:2], -1))
    sinks = None
    if operands.sinks is not None:
        sinks = -(torch.exp(operands.sinks.to(dtype)[:, None] - lse) * deltas.view(lse.shape)).sum((0, 2))
    return Gradients(
        grad_query.view(operands.query.shape),
        unflattened(grad_keys[0], operands.key, options.scale),
        unflattened(grad_keys[1], operands.value),
        slopes,
        table,
        unflattened(grad_memories[0], memory[0], options.scale) if has_memory else None,
        unflattened(grad_memories[1], memory[1]) if has_memory else None,
        sinks,
    )


def _add_along_distances(total, tile, first, skewed):
    """Add the sums of `tile` `[c, U, rows, columns]` over `r + j = t` to `total[..., first:]`; returns the buffer.

    Row r is written r places further to the right in a buffer of zeros, whose columns are then the t.
    """
    rows, columns = tile.shape[2:]
    width = rows + columns - 1
    shape = (*tile.shape[:2], rows, width)
    if skewed.shape != shape:  # the corners that no row covers have to be zeros
        skewed = tile.new_zeros(shape)
    strides = skewed.stride()
    skewed.as_strided(tile.shape, (*strides[:2], width + 1, 1)).copy_(tile)
    total[..., first : first + width] += skewed.sum(2)
    return skewed


def _per_row(per_head, operands, part):
    """`[H]` as `[C, U, N, 1]`."""
    batch, heads, length = operands.query.shape[:3]
    expanded = per_head.to(part.query.dtype)[None, :, None].expand(batch, heads, length)
    return expanded.reshape(*part.query.shape[:3], 1)


def _differentiable(operands):
    return [(name, getattr(operands, name)) for name in Gradients._fields]


def _has_lengths(operands):
    return operands.key_lengths is not None or operands.query_lengths is not None


def _lengths(operands):
    """Number, rows and keys of each batch row that has rows."""
    batch, keys = operands.key.shape[0], operands.key.shape[2]
    rows = [operands.query.shape[2]] * batch if operands.query_lengths is None else operands.query_lengths.tolist()
    columns = [keys] * batch if operands.key_lengths is None else operands.key_lengths.tolist()
    return [(b, n, m) for b, (n, m) in enumerate(zip(rows, columns, strict=True)) if n]


def _cut(operands, b, rows, columns):
    """Batch row b, to its lengths; what batch rows share stays."""

    def own(tensor):
        return tensor if tensor is None or tensor.shape[0] == 1 else tensor[b : b + 1]

    return operands._replace(
        query=operands.query[b : b + 1, :, :rows],
        key=operands.key[b : b + 1, :, :columns],
        value=operands.value[b : b + 1, :, :columns],
        key_mask=None if operands.key_mask is None else operands.key_mask[b : b + 1, :columns],
        key_lengths=None,
        query_lengths=None,
        alibi_slopes=own(operands.alibi_slopes),
        memory_key=own(operands.memory_key),
        memory_value=own(operands.memory_value),
    )
