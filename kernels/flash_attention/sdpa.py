"""Hands over to `scaled_dot_product_attention` what it computes exactly, and without an N×M tensor.

It holds N×M tensors where values are not as wide as keys or the last dimension is spaced, and where a bias needs a
gradient; outside of CPUs it expands key masks (torch 2.13, measured). Neither must happen here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import UNLIMITED, Operands, Options


def attend_with_sdpa(operands: Operands, options: Options) -> Tensor | None:
    """The output `[B, H, N, V]`; None if the call is none for SDPA."""
    query, key, value, key_mask, key_lengths, query_lengths, slopes, table, *others = operands
    lengths = (key_lengths, query_lengths)
    if options.softcap or any(tensor is not None for tensor in (*lengths, *others)):
        return None
    if query.shape[-1] != value.shape[-1] or any(t.stride(-1) != 1 for t in (query, key, value)):
        return None
    length, keys, on_cpu = query.shape[2], key.shape[2], query.device.type == "cpu"
    if not query.numel() or not keys:
        return None
    if length == 1 and on_cpu:
        return _decode(operands, options)
    if slopes is not None or table is not None or options.left != UNLIMITED:
        return None
    if options.right == UNLIMITED and (on_cpu or key_mask is None):
        return _attend(query, key, value, key_mask, None, options.scale)
    if options.right or length != keys or key_mask is not None:
        return None
    # 0 · inf would carry a later key into an earlier row; the sum is finite only if every number is.
    if not on_cpu or torch.compiler.is_compiling() or torch.isfinite(query.sum() + key.sum() + value.sum()):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=options.scale, enable_gqa=True)
    return None


def part_with_sdpa(operands: Operands, options: Options) -> tuple[Tensor, Tensor] | None:
    """Output `[B, H, N, V]` and lse `[B, H, N]` by the kernel behind SDPA on CPUs, whose public form keeps the lse.

    Without gradients; None if the call is none for it. Heads of 8 take 0.6 of the time of tiles in PyTorch.
    """
    if not _is_plain_part(operands, options):
        return None
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*operands[:3], scale=options.scale)
    return output, lse.contiguous()


def part_gradients_with_sdpa(
    operands: Operands, options: Options, output: Tensor, lse: Tensor, grad_output: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of query, key and value of a part, for the output and lse of the whole; None if none for it."""
    if not _is_plain_part(operands, options) or {output.dtype, lse.dtype, grad_output.dtype} != {torch.float32}:
        return None
    # The kernel takes rows that lie as it left its own output, [B, N, H, V], and their lse likewise.
    rows = (_heads_inside(tensor) for tensor in (output, lse))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _heads_inside(grad_output), *operands[:3], *rows, 0.0, False, scale=options.scale
    )


def _is_plain_part(operands, options):
    query, key, value, *others = operands
    if options.softcap or options.dropout_p or (options.left, options.right) != (UNLIMITED, UNLIMITED):
        return False
    if any(tensor is not None for tensor in others) or query.device.type != "cpu" or query.dtype != torch.float32:
        return False
    if torch.compiler.is_compiling() or any(t.stride(-1) != 1 or not t.numel() for t in (query, key, value)):
        return False
    return query.shape[1] == key.shape[1] and query.shape[-1] == value.shape[-1]


def _heads_inside(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _decode(operands, options):
    """One row: it stands at the last key, and sees a slice of the keys."""
    slopes, table = operands.alibi_slopes, operands.distance_bias
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (slopes, table)):
        return None
    keys = operands.key.shape[2]
    first = 0 if options.left == UNLIMITED else max(keys - 1 - options.left, 0)
    bias, distance = None, torch.arange(first + 1 - keys, 1, device=operands.query.device)
    dtype = torch.promote_types(operands.query.dtype, torch.float32)
    if table is not None:
        radius = table.shape[1] // 2
        bias = table[:, distance.clamp(min=-radius) + radius][None]
    if slopes is not None:
        alibi = slopes[..., None] * distance
        bias = alibi if bias is None else bias + alibi
    if bias is not None:
        bias = bias[:, :, None].to(dtype)
    key, value = operands.key[:, :, first:], operands.value[:, :, first:]
    mask = None if operands.key_mask is None else operands.key_mask[:, first:]
    return _attend(operands.query, key, value, mask, bias, options.scale)


def _attend(query, key, value, key_mask, bias, scale):
    """All rows see all keys that count."""
    mask = bias
    if key_mask is not None:
        counts = key_mask[:, None, :, None]  # a weight of zero does not hide what is no number
        key, value = torch.where(counts, key, 0), torch.where(counts, value, 0)
        mask = key_mask[:, None, None]
        if bias is not None:
            mask = bias.masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
