"""Sequences that stand in one row, one behind the other, as rows of a batch; and back."""

import torch
from torch import Tensor


class PackedRows:
    """Where each of S sequences stands in a row.

    Args:
        cu_seq_lens: `[S + 1]`, int: where each begins, and the length of the row; as transformers'
            `DataCollatorWithFlattening` gives it.
        length: that of the row.

    Attributes:
        mask: bool `[S, longest]`, True at tokens: the rows are padded on the right.

    Raises:
        ValueError: borders that do not part a row of this length.
    """

    def __init__(self, cu_seq_lens: Tensor, length: int):
        lengths = cu_seq_lens.diff() if cu_seq_lens.ndim == 1 else cu_seq_lens
        if cu_seq_lens.ndim != 1 or lengths.numel() < 1 or bool((lengths < 1).any()):
            raise ValueError(f"cu_seq_lens_q must be rising numbers [sequences + 1], got {cu_seq_lens.tolist()}")
        if int(cu_seq_lens[0]) != 0 or int(cu_seq_lens[-1]) != length:
            raise ValueError(f"cu_seq_lens_q must lead from 0 to the length {length}, got {cu_seq_lens.tolist()}")
        self.mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]

    def unpack(self, name: str, packed: Tensor | None) -> Tensor | None:
        """`[1, N, …]` to `[S, longest, …]`, zeros at padding; None stays None.

        Raises:
            ValueError: more rows than one.
        """
        if packed is None:
            return None
        if packed.shape[0] != 1:
            raise ValueError(f"{name} must be one row where cu_seq_lens_q is given, got {packed.shape[0]} rows")
        rows = packed.new_zeros(*self.mask.shape, *packed.shape[2:])
        return rows.masked_scatter(self.mask.view(*self.mask.shape, *[1] * (packed.ndim - 2)), packed)

    def pack(self, rows: Tensor) -> Tensor:
        """`[S, longest, …]` to `[1, N, …]`."""
        return rows[self.mask][None]
