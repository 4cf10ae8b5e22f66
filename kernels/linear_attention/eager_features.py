"""Features of a chunk and their derivative, in as few passes as there can be: what the chunked form computes twice.

A key's softmax is written out, because its sum is what the key's scale is made of: to compute the sum apart takes as
long as the softmax does.
"""

import math
from typing import NamedTuple

import torch

from .feature_maps import EXPONENTIAL, POINTWISE_FUNCTIONS, FeatureMap


class Features(NamedTuple):
    """Features of a chunk `[BH, C, M]`, for keys their scales `[BH, C]`, and what the derivative needs besides."""

    values: torch.Tensor
    log_scale: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Scratch:
    """Memory for what lives no longer than a chunk: the next chunk finds it where it was, warm in the cache.

    Allocated anew for every chunk, attention of 4,096 tokens takes 4 % longer (two cores of a Xeon,
    the median of eight comparisons).
    """

    def __init__(self, like: torch.Tensor):
        self.like = like
        self.held: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of this shape, with anything in it. Who asks for the same name again overwrites it."""
        tensor = self.held.get(name)
        if tensor is not None and tensor.shape == shape:
            return tensor
        count = math.prod(shape)
        if tensor is None or tensor.numel() < count:
            tensor = self.held[name] = self.like.new_empty(shape)
            return tensor
        return tensor.flatten()[:count].view(shape)


class ChunkFeatures:
    """`feature_maps.query_features` and `key_features` of one map.

    In place wherever nothing else needs the tensor. What is returned is good until the same method is called again.
    """

    def __init__(self, feature_map: FeatureMap, scratch: Scratch):
        self.scratch = scratch
        self.function, projection, self.bias, self.scale, self.epsilon, subtract_norm = feature_map
        # Scaled once for all chunks.
        self.projection = None if projection is None else projection * self.scale
        self.subtract_norm = subtract_norm and self.function == EXPONENTIAL

    def queries(self, rows: torch.Tensor, for_backward: bool = False) -> Features:
        """Features of `rows` `[BH, C, D]`, up to a factor per row."""
        if self.function != EXPONENTIAL:
            return self._pointwise("query", rows, for_backward)
        logits = self._logits("query", rows)
        values = torch.softmax(logits, dim=-1, out=logits)  # in place: a number is read before it is written to
        return Features(values.add_(self.epsilon) if self.epsilon else values)

    def keys(self, rows: torch.Tensor, for_backward: bool = False) -> Features:
        """Features of `rows` `[BH, C, D]` relative to `exp(log_scale)`."""
        if self.function != EXPONENTIAL:
            return self._pointwise("key", rows, for_backward)._replace(log_scale=rows.new_zeros(rows.shape[:-1]))
        logits = self._logits("key", rows)
        largest = logits.amax(dim=-1, keepdim=True)
        values = logits.sub_(largest).exp_()
        total = values.sum(dim=-1, keepdim=True)
        values.mul_(total.reciprocal())
        log_scale = total.log_().add_(largest).squeeze(-1)
        if self.subtract_norm:
            log_scale.sub_(rows.square().sum(dim=-1), alpha=0.5 * self.scale**2)
        return Features(values.add_(self.epsilon) if self.epsilon else values, log_scale)

    def _logits(self, name, rows):
        if self.projection is None:
            logits = rows * self.scale
        else:
            logits = self.scratch(name, *rows.shape[:-1], self.projection.shape[0])
            torch.bmm(rows, self.projection.t().expand(rows.shape[0], -1, -1), out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def _pointwise(self, name, rows, for_backward):
        logits = self._logits(name, rows)
        # A ReLU's features also say where its derivative is 1, but for logits that are lost in epsilon's last digit.
        in_place = self.function == "relu"
        values = logits.relu_() if in_place else POINTWISE_FUNCTIONS[self.function].value(logits)
        values = values.add_(self.epsilon) if self.epsilon else values
        return Features(values, logits=logits if for_backward and not in_place else None)

    def backward(self, features: Features, grad: torch.Tensor, rows: torch.Tensor):
        """Gradients of `rows` and of the logits, given that of the features; `grad` and `features` are used up.

        A query's features are free up to a factor per row, and a key's factor is in its scale, so in both cases
        `exp(l)` may be derived as if nothing had been taken from `l`.
        """
        if self.function == "relu":
            grad_logits = torch.ops.aten.threshold_backward.grad_input(
                grad, features.values, self.epsilon, grad_input=grad
            )
        elif self.function != EXPONENTIAL:
            grad_logits = grad.mul_(POINTWISE_FUNCTIONS[self.function].derivative(features.logits))
        elif self.epsilon:
            grad.add_(grad.sum(dim=-1, keepdim=True).mul_(self.epsilon))
            grad_logits = grad.mul_(features.values.sub_(self.epsilon))
        else:
            grad_logits = grad.mul_(features.values)
        if self.projection is None:
            grad_rows = grad_logits * self.scale
        else:
            projection = self.projection.expand(rows.shape[0], -1, -1)
            grad_rows = torch.bmm(grad_logits, projection, out=self.scratch("grad_rows", *rows.shape))
        if features.log_scale is not None and self.subtract_norm:
            total = grad_logits.sum(dim=-1, keepdim=True)
            grad_rows = grad_rows.addcmul_(total, rows, value=-(self.scale**2))
        return grad_rows, grad_logits
