"""What every implementation of flash attention is given: tensors, numbers, and the hash behind its dropout.

An implementation is two functions, the same for eager and Triton, which `autograd.py` joins:

    forward(operands: Operands, options: Options) -> (output, lse)
    backward(operands: Operands, options: Options, output, lse, grad_output, grad_lse, wanted: Wanted) -> Gradients

`output` `[B, H, N, V]` has the dtype of the query and any strides; `lse` `[B, H, N]` is float32, or float64 on the
eager path, -inf for rows that see nothing. `grad_output` is like `output` with any strides; `grad_lse` is like `lse`,
or None where nobody asked for it. Operands are never written to.
"""

from typing import NamedTuple

import torch
from torch import Tensor


UNLIMITED = -1  # a window side without an end


class Operands(NamedTuple):
    """The tensors, checked and in one form by `api.py`. None where an option is off.

    Attributes:
        query, key, value: `[B, H, N, D]`, `[B, G, M, D]`, `[B, G, M, V]` of one dtype; G divides H and query head h
            reads key head `h // (H / G)`. Any strides.
        key_mask: `[B, M]` bool, True where a key counts.
        key_lengths, query_lengths: `[B]` int64; batch row b is computed as if cut to its lengths.
        alibi_slopes: `[B or 1, H]`, any floating dtype.
        distance_bias: `[H or 1, 2R + 1]`, any floating dtype; the entry `R + clamp(j - p, -R, R)` is for key j seen
            from position p.
        memory_key, memory_value: `[B or 1, G, R, D]`, `[B or 1, G, R, V]`, dtype of `query`; seen by every row.
        sinks: `[H]`, any floating dtype.
        dropout_seed: int64 tensor of shape `[1]`; used only if `Options.dropout_p > 0`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    key_lengths: Tensor | None
    query_lengths: Tensor | None
    alibi_slopes: Tensor | None
    distance_bias: Tensor | None
    memory_key: Tensor | None
    memory_value: Tensor | None
    sinks: Tensor | None
    dropout_seed: Tensor | None


class Options(NamedTuple):
    """The numbers.

    Attributes:
        scale: factor of `q·k`.
        left, right: how far before and behind its position a row sees; `UNLIMITED` (-1) for no end. A causal call has
            `right = 0`.
        softcap: cap of the soft clamp; 0 for none.
        dropout_p: probability of dropping a weight; 0 for none.
    """

    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float


class Wanted(NamedTuple):
    """Which gradients somebody asked for besides query, key, value, memory and sinks, which are always computed."""

    alibi_slopes: bool
    distance_bias: bool


class Gradients(NamedTuple):
    """What a backward pass gives back: each like its operand in shape and dtype, or None.

    None where the operand is None, or where `Wanted` says that nobody asked.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alibi_slopes: Tensor | None
    distance_bias: Tensor | None
    memory_key: Tensor | None
    memory_value: Tensor | None
    sinks: Tensor | None


# A 32-bit mixer by Chris Wellons ("lowbias32", public domain): two odd multipliers between three shifts.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_GOLDEN = 0x9E3779B9
DROPOUT_BITS = 24


def dropout_threshold(dropout_p: float) -> int:
    """A weight is kept where the upper 24 bits of its hash, as an integer, are at least this."""
    return round(dropout_p * 2**DROPOUT_BITS)


def dropout_row_keys(seed: Tensor, rows: Tensor, batch_heads: Tensor) -> Tensor:
    """The part of the hash that belongs to a row: int32 `[*batch_heads.shape, rows]`.

    `mix(mix(mix(mix(low(seed) ^ golden) ^ high(seed)) ^ (b·H + h)) ^ i)` for row i of head h of batch row b, in
    unsigned 32-bit arithmetic; `low` and `high` are the two halves of the 64-bit seed.

    Args:
        seed: int64 `[1]`.
        rows: integer `[rows]`, the indices i.
        batch_heads: integer tensor of any shape, the numbers b·H + h.
    """
    seed = seed.to(torch.int64)
    start = _mix(_wrapped((seed & 0xFFFFFFFF) ^ _GOLDEN))
    start = _mix(start ^ _wrapped((seed >> 32) & 0xFFFFFFFF))
    heads = _mix(start ^ batch_heads.to(torch.int32))
    return _mix(heads[..., None] ^ rows.to(torch.int32))


def dropout_keep(row_keys: Tensor, columns: Tensor, dropout_p: float) -> Tensor:
    """Which weights are kept: bool `[..., rows, columns]`.

    The hash of an entry is `mix(row_key ^ (golden · column))`. Column c counts the memory keys first: memory key r is
    column r, key j is column R + j.

    Args:
        row_keys: from `dropout_row_keys`, int32 `[..., rows]`.
        columns: integer `[columns]`.
        dropout_p: probability of dropping.
    """
    hashed = row_keys[..., None] ^ _wrapped(columns.to(torch.int64) * _GOLDEN & 0xFFFFFFFF)
    return _shifted(_mix(hashed), 32 - DROPOUT_BITS) >= dropout_threshold(dropout_p)


def _mix(x: Tensor) -> Tensor:
    x = x ^ _shifted(x, 16)
    x = x * _signed(_FIRST)
    x = x ^ _shifted(x, 15)
    x = x * _signed(_SECOND)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's is arithmetic for int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _wrapped(x: Tensor) -> Tensor:
    """Unsigned 32-bit numbers in int64 as int32 with the same bits."""
    return torch.where(x > 0x7FFFFFFF, x - 0x100000000, x).to(torch.int32)


def _signed(number: int) -> int:
    return number - 0x100000000 if number > 0x7FFFFFFF else number
