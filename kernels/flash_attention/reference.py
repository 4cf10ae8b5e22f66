"""The definition of flash attention: eager, differentiable, any device and dtype, with every N×M tensor in memory.

    x_ij = scale · q_i·k_j - slope · |j - p_i| + bias[j - p_i]         p_i = i + M - N
    s_ij = softcap · tanh(x_ij / softcap)
    lse_i = log(exp(sink) + Σ_r exp(s_ir) + Σ_j exp(s_ij))             j over the keys that row i sees, r over memory
    out_i = Σ_r D_ir exp(s_ir - lse_i) v_r + Σ_j D_ij exp(s_ij - lse_i) v_j

Memory keys have no bias and are seen by all rows; D is 1 without dropout, else 0 or `1 / (1 - dropout_p)`. Rows that
see nothing are zero with lse = -inf. Computes in at least float32, autocast off; returns the dtype of the query.
Sources: arXiv 2205.14135 (the operation), 2108.12409 (slopes), 1910.10683 (bias), 2408.00118 (soft clamp), 1907.01470
(memory), 2508.10925 (sinks), x-transformers (their order).
"""

import torch
from torch import Tensor

from .operands import UNLIMITED, Operands, Options, dropout_keep, dropout_row_keys


def flash_attention_reference(operands: Operands, options: Options) -> tuple[Tensor, Tensor]:
    """Output `[B, H, N, V]` in the dtype of the query, lse `[B, H, N]` in at least float32."""
    query = operands.query
    with torch.autocast(query.device.type, enabled=False):
        dtype = torch.promote_types(query.dtype, torch.float32)
        batch, heads, length = query.shape[:3]
        groups = heads // operands.key.shape[1]
        position, row_exists, key_exists = _positions(operands)
        # What stands at a key that does not count may not be a number: no product may meet it.
        exists = key_exists[:, None, :, None]
        key, value = (torch.where(exists, t.to(dtype), 0) for t in (operands.key, operands.value))
        distance = torch.arange(key.shape[2], device=query.device) - position[..., None]
        visible = key_exists[:, None, None, :] & _inside_window(distance, options)[:, None]

        q = query.to(dtype)
        logits = options.scale * (q @ key.repeat_interleave(groups, dim=1).mT) + _bias(operands, distance, dtype)
        values = value.repeat_interleave(groups, dim=1)
        if operands.memory_key is not None:
            memory_key, memory_value = (
                t.to(dtype).expand(batch, -1, -1, -1).repeat_interleave(groups, dim=1)
                for t in (operands.memory_key, operands.memory_value)
            )
            logits = torch.cat([options.scale * (q @ memory_key.mT), logits], dim=-1)
            values = torch.cat([memory_value, values], dim=2)
            seen = visible.new_ones(batch, 1, length, memory_key.shape[2])
            visible = torch.cat([seen, visible.expand(batch, -1, length, -1)], dim=-1)
        if options.softcap:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        visible = visible & row_exists[:, None, :, None]
        logits = logits.masked_fill(~visible, -torch.inf)
        if operands.sinks is not None:
            sinks = operands.sinks.to(dtype)[None, :, None, None].expand(batch, -1, length, 1)
            logits = torch.cat([logits, sinks.masked_fill(~row_exists[:, None, :, None], -torch.inf)], dim=-1)
            values = torch.cat([values, values.new_zeros(batch, heads, 1, values.shape[3])], dim=2)
        weights, lse = _softmax(logits)
        if options.dropout_p:
            weights = weights * _dropout(operands, options, weights.shape[-1]).to(dtype) / (1 - options.dropout_p)
        return (weights @ values).to(query.dtype), lse


def _positions(operands):
    """Position of each row `[B, N]`, whether it exists `[B, N]`, and which keys do `[B, M]`."""
    (batch, _, length), keys, device = operands.query.shape[:3], operands.key.shape[2], operands.query.device
    row, column = torch.arange(length, device=device)[None], torch.arange(keys, device=device)[None]
    key_lengths = torch.full((batch,), keys, device=device) if operands.key_lengths is None else operands.key_lengths
    query_lengths = operands.query_lengths
    if query_lengths is None:
        query_lengths = torch.full((batch,), length, device=device)
    position = row + (key_lengths - query_lengths)[:, None]
    key_exists = column < key_lengths[:, None]
    if operands.key_mask is not None:
        key_exists = key_exists & operands.key_mask
    return position, row < query_lengths[:, None], key_exists


def _inside_window(distance, options):
    inside = torch.ones_like(distance, dtype=torch.bool)
    if options.left != UNLIMITED:
        inside = inside & (distance >= -options.left)
    if options.right != UNLIMITED:
        inside = inside & (distance <= options.right)
    return inside


def _bias(operands, distance, dtype):
    bias = torch.zeros((), dtype=dtype, device=distance.device)
    if operands.alibi_slopes is not None:
        bias = bias - operands.alibi_slopes.to(dtype)[..., None, None] * distance.abs()[:, None]
    if operands.distance_bias is not None:
        radius = operands.distance_bias.shape[1] // 2
        table = operands.distance_bias.to(dtype)
        bias = bias + table[:, distance.clamp(-radius, radius) + radius].transpose(0, 1)
    return bias


def _softmax(logits):
    """Weights and log-sum-exp over the last dimension; zeros and -inf for a row of -inf."""
    if not logits.shape[-1]:
        return logits, logits.sum(-1).fill_(-torch.inf)
    maximum = logits.detach().amax(-1, keepdim=True)
    maximum = torch.where(maximum == -torch.inf, 0, maximum)
    exponentials = torch.exp(logits - maximum)
    total = exponentials.sum(-1, keepdim=True)
    blind = total == 0
    total = torch.where(blind, 1, total)
    return exponentials / total, torch.where(blind, -torch.inf, torch.log(total) + maximum)[..., 0]


def _dropout(operands, options, columns):
    """Which weights are kept, over memory and keys (and a column for the sink, whose value is zero)."""
    batch, heads, length = operands.query.shape[:3]
    device = operands.query.device
    batch_heads = torch.arange(batch * heads, device=device).view(batch, heads)
    row_keys = dropout_row_keys(operands.dropout_seed, torch.arange(length, device=device), batch_heads)
    return dropout_keep(row_keys, torch.arange(columns, device=device), options.dropout_p)
