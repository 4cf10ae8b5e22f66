"""What the launchers of the Triton path need to know of a call: chunks of rows, and the feature map's tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .feature_maps import EXPONENTIAL, FeatureMap


class Chunks(NamedTuple):
    """The rows of all sequences, cut into chunks that never cross from one sequence into the next.

    `sequences` of `per_sequence` chunks each; packed sequences have chunks of their own number, which stay on the
    device: `table` `[total, 3]` holds the sequence, the first row and the end of the rows of each chunk, `first`
    `[sequences + 1]` the number of each sequence's first chunk, `borders` the rows where sequences begin. `total` is
    then a bound; the surplus chunks have no rows. Each sequence is walked along in `segments` of `per_segment` chunks,
    the last of which may have fewer.
    """

    size: int
    length: int
    sequences: int
    per_sequence: int
    total: int
    table: Tensor | None = None
    first: Tensor | None = None
    borders: Tensor | None = None
    segments: int = 1
    per_segment: int = 2**31 - 1

    @classmethod
    def of(cls, batch: int, length: int, size: int, cu_seqlens: Tensor | None) -> "Chunks":
        per_sequence = (length + size - 1) // size
        if cu_seqlens is None:
            return cls(size, length, batch, per_sequence, batch * per_sequence)
        # On a GPU nobody has looked at the values: whatever they are, no kernel may leave its tensors.
        borders = cu_seqlens.to(torch.int64).clamp(0, length).cummax(0).values
        sequences = borders.shape[0] - 1
        total = length // size + sequences
        counts = (borders[1:] - borders[:-1] + size - 1) // size
        first = torch.cat([borders.new_zeros(1), counts.cumsum(0)])
        chunk = torch.arange(total, device=borders.device)
        sequence = torch.searchsorted(first[1:], chunk, right=True).clamp(max=sequences - 1)
        end = borders[sequence + 1]
        start = torch.minimum(borders[sequence] + (chunk - first[sequence]) * size, end)
        table = torch.stack([sequence, start, end], dim=1).contiguous()
        return cls(size, length, sequences, per_sequence, total, table, first, borders)

    def cut(self, segments: int) -> "Chunks":
        """The same in at most so many segments, none of them empty."""
        per_segment = max(-(-self.per_sequence // segments), 1)
        return self._replace(segments=-(-self.per_sequence // per_segment), per_segment=per_segment)

    def of_each(self) -> dict[str, Any]:
        """Arguments of a kernel with one program for each chunk."""
        table = self.borders if self.table is None else self.table
        return {
            "p_table": table,
            "length": self.length,
            "chunks": self.per_sequence,
            "CHUNK": self.size,
            "PACKED": self.table is not None,
        }

    def of_sequences(self) -> dict[str, Any]:
        """Arguments of a kernel whose programs walk along a sequence, or along a segment of one."""
        return {
            "p_first": self.first,
            "p_borders": self.borders,
            "length": self.length,
            "chunks": self.per_sequence,
            "segments": self.segments,
            "per_segment": self.per_segment,
            "CHUNK": self.size,
            "PACKED": self.table is not None,
        }


class MapTensors(NamedTuple):
    """The feature map as the kernels take it.

    The scale is in the projection. For inputs of 16 bits it is the sum of two matrices of their dtype: the rounding of
    one would show in an exponent (at twice the usual norms as twice the error budget) and would turn some of a ReLU's
    derivatives from 0 to 1 (as 17 times the budget).
    """

    high: Tensor | None  # [M, D]
    low: Tensor | None  # [M, D]
    bias: Tensor | None  # [M] float32
    function: str
    scale: float
    epsilon: float
    subtract_norm: bool

    @classmethod
    def of(cls, feature_map: FeatureMap, query: Tensor) -> "MapTensors":
        projection, bias, dtype = feature_map.projection, feature_map.bias, query.dtype
        if projection is None and feature_map.function == EXPONENTIAL:
            projection = torch.eye(query.shape[-1], device=query.device)
        high = low = None
        if projection is not None:
            projection = projection.to(torch.float32) * feature_map.scale
            high = projection.to(dtype).contiguous()
            if dtype != torch.float32:
                low = (projection - high.float()).to(dtype).contiguous()
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        options = feature_map.function, feature_map.scale, feature_map.epsilon, feature_map.subtract_norm
        return cls(high, low, bias, *options)

    def keywords(self) -> dict[str, Any]:
        return {
            "p_high": self.high,
            "p_low": self.low,
            "p_bias": self.bias,
            "scale": self.scale,
            "epsilon": self.epsilon,
            "FUNCTION": self.function,
            "HAS_PROJECTION": self.high is not None,
            "HAS_BIAS": self.bias is not None,
            "SPLIT": self.low is not None,
        }


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the matrix products take: weights and gradients in them span more than the exponents of float16."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def precision(dtype: torch.dtype) -> str:
    """TF32 has the digits of float16 and the range of float32; float32 itself is kept whole."""
    return "tf32" if dtype == torch.float16 else "ieee"
