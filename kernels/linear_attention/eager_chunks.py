"""What both chunked forms are made of: chunks of the inputs, and the gradients of a chunk on their way out.

Tensors here are flat over batch and heads (B·H first), in the computation's dtype.
"""

from typing import NamedTuple

import torch

from .eager_features import ChunkFeatures, Scratch
from .feature_maps import FeatureMap
from .state import EMPTY_LOG_SCALE


# Rows of a chunk, where few heads share the cache and where many do. Measured on two cores of a Xeon with 2 MiB of
# cache each (heads of 64, m = 266): 8 heads take 3 to 5 % less time with 256 rows than with 128; 32 and 64 heads take
# a fifth more in the causal form with its backward pass, and in the other form the same to 4 %.
CHUNK, CHUNK_OF_MANY_HEADS = 256, 128
MANY_HEADS = 17


def rows_at_a_time(heads: int) -> int:
    """Rows of a chunk, for so many heads in the whole batch."""
    return CHUNK if heads < MANY_HEADS else CHUNK_OF_MANY_HEADS


class Inputs(NamedTuple):
    """Hands out chunks of the inputs, flat over batch and heads and in the computation's dtype."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keep: torch.Tensor | None  # [BH, N], True where the key counts
    dtype: torch.dtype

    @classmethod
    def of(cls, query, key, value, mask, dtype):
        keep = None if mask is None else mask.to(torch.bool).repeat_interleave(query.shape[1], dim=0)
        return cls(query, key, value, keep, dtype)

    def rows(self, name: str, here: slice) -> torch.Tensor:
        return getattr(self, name)[:, :, here].flatten(0, 1).to(self.dtype)

    def values(self, here: slice) -> torch.Tensor:
        values = self.rows("value", here)
        # `where`, not a product: what stands at a padded position may be infinite.
        return values if self.keep is None else torch.where(self.keep[:, here, None], values, 0)

    def keys(self, here: slice, chunk_features: ChunkFeatures, with_floor: bool, for_backward: bool = False):
        """The rows of the keys and their features, both zero where the key does not count."""
        rows = self.rows("key", here)
        keep = None if self.keep is None else self.keep[:, here]
        rows = rows if keep is None else torch.where(keep[..., None], rows, 0)
        features = chunk_features.keys(rows, for_backward)
        features = chunk_features.add_floor(features) if with_floor else features
        if keep is None:
            return rows, features
        # Zero, not only of the smallest scale: beside no other key, that scale would be the largest too.
        features.values.mul_(keep[..., None])
        return rows, features._replace(log_scale=torch.where(keep, features.log_scale, EMPTY_LOG_SCALE))


class InputGrads:
    """Where the gradients of the inputs are put chunk by chunk, and those of the projection and the bias summed up.

    `wanted` says which of the last two to compute; the others stay None.
    """

    def __init__(self, inputs: Inputs, feature_map: FeatureMap, wanted: tuple[bool, bool]):
        self.keep, self.scale = inputs.keep, feature_map.scale
        self.inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs[:3]]
        self.query, self.key, self.value = (grad.flatten(0, 1) for grad in self.inputs)
        self.projection = torch.zeros_like(feature_map.projection) if wanted[0] else None
        self.bias = torch.zeros_like(feature_map.bias) if wanted[1] else None

    def store_query(self, here: slice, grad_rows, grad_logits, rows) -> None:
        """Of a chunk of queries: the gradients of its rows and its logits, and the rows."""
        self.query[:, here] = grad_rows
        self._add(rows, grad_logits)

    def store_key_value(self, here: slice, grad_rows, grad_logits, rows, grad_value) -> None:
        """Of a chunk of keys and values; those that do not count get zeros."""
        if self.keep is not None:
            keep = self.keep[:, here, None]
            grad_rows, grad_value = torch.where(keep, grad_rows, 0), torch.where(keep, grad_value, 0)
            grad_logits = torch.where(keep, grad_logits, 0)
        self.key[:, here], self.value[:, here] = grad_rows, grad_value
        self._add(rows, grad_logits)

    def _add(self, rows, grad_logits):
        if self.projection is not None:
            self.projection.add_(grad_logits.flatten(0, 1).mT @ rows.flatten(0, 1), alpha=self.scale)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(dim=(0, 1)))


def joint_sums(key_value: torch.Tensor, key_sum: torch.Tensor) -> torch.Tensor:
    """Both sums of a state (or their gradients) side by side: `[BH, M, V+1]`."""
    return torch.cat([key_value, key_sum[..., None]], dim=-1).flatten(0, 1)


def store_quotient(output, denominators, here: slice, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
    """Store rows `N / den` and `den`, with 1 where no key was there (the numerator is 0 there)."""
    denominator = denominator.masked_fill_(denominator == 0, 1)
    denominators[:, here] = denominator
    torch.div(numerator, denominator[..., None], out=output[:, here])


def scaled_rows(rows: torch.Tensor, column: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`scale · [rows, column]`, as `out` `[BH, C, V+1]`."""
    torch.mul(rows, scale, out=out[..., :-1])
    torch.mul(column, scale, out=out[..., -1:])
    return out


def quotient_grads(grad_output, output, denominators, here: slice, scratch: Scratch) -> torch.Tensor:
    """Gradient of the rows `[N, den]` from that of `N / den`: `[g, -g·out] / den`."""
    grad, rows = grad_output[:, :, here].flatten(0, 1), output[:, :, here].flatten(0, 1)
    column = (grad * rows).sum(dim=-1, keepdim=True).neg_()
    joint = scratch("grads", *rows.shape[:-1], rows.shape[-1] + 1)
    # A quotient, not a product with the reciprocal: of a subnormal denominator, that is infinite.
    torch.div(grad, denominators[:, here, None], out=joint[..., :-1])
    torch.div(column, denominators[:, here, None], out=joint[..., -1:])
    return joint
