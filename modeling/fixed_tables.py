"""Buffers that are computed from the configuration, and that no cast and no meta device can damage."""

import torch
from torch import nn
from transformers import initialization as init


class FixedTable(nn.Module):
    """A float32 `table` that subclasses compute. It is not saved, and stays float32 when the model is cast.

    `from_pretrained` builds models on the meta device and leaves such a buffer unset until `set_initial_values`.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("table", self.compute(), persistent=False)

    def compute(self) -> torch.Tensor:
        """The values of the table, float32 on the CPU."""
        raise NotImplementedError

    def set_initial_values(self) -> None:
        init.copy_(self.table, self.compute())

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.table.dtype != torch.float32:
            # Cast back, it would keep the rounding: angles of bfloat16 are wrong by radians.
            self.table = self.compute().to(self.table.device)
        return self
