"""Features of a chunk and their derivative, in as few passes as there can be: what the chunked form computes twice."""

import math
from typing import NamedTuple

import torch

from .feature_maps import EXPONENTIAL, POINTWISE_FUNCTIONS, FeatureMap


class Features(NamedTuple):
    """Features of a chunk `[BH, C, M]`, for keys their scales `[BH, C]`, and what the derivative needs besides.

    Those of an exponential map have the sum 1, unless they have the floor `ε` (`ChunkFeatures.add_floor`).
    """

    values: torch.Tensor
    log_scale: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    has_floor: bool = False


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
    """`feature_maps.query_features` and `key_features` of one map, those of an exponential one without their floor.

    In place wherever nothing else needs the tensor. What is returned is good until the same method is called again.
    """

    def __init__(self, feature_map: FeatureMap, scratch: Scratch):
        self.scratch = scratch
        self.function, projection, self.bias, self.scale, self.epsilon, subtract_norm = feature_map
        self.is_exponential = self.function == EXPONENTIAL
        # Scaled once for all chunks.
        self.projection = None if projection is None else projection * self.scale
        self.subtract_norm = subtract_norm and self.is_exponential
        self.floor = self.epsilon if self.is_exponential else 0.0
        if self.function == "relu" and projection is not None:
            self.bias_and_epsilon = (
                projection.new_full((1,), self.epsilon) if self.bias is None else self.bias + self.epsilon
            )

    def queries(self, rows: torch.Tensor, for_backward: bool = False) -> Features:
        """Features of `rows` `[BH, C, D]`, up to a factor per row."""
        if not self.is_exponential:
            return self._pointwise("query", rows, for_backward)
        logits = self._logits("query", rows)
        # In place: a number is read before it is written to.
        return Features(torch.softmax(logits, dim=-1, out=logits))

    def keys(self, rows: torch.Tensor, for_backward: bool = False) -> Features:
        """Features of `rows` `[BH, C, D]` relative to `exp(log_scale)`."""
        if not self.is_exponential:
            return self._pointwise("key", rows, for_backward)._replace(log_scale=rows.new_zeros(rows.shape[:-1]))
        logits = self._logits("key", rows)
        largest = logits.amax(dim=-1)
        values = torch.softmax(logits, dim=-1, out=logits)
        # The largest feature is one over the sum: to look for it takes less time than to write the softmax out.
        log_scale = largest.sub_(values.amax(dim=-1).log_())
        if self.subtract_norm:
            log_scale.sub_(rows.square().sum(dim=-1), alpha=0.5 * self.scale**2)
        return Features(values, log_scale)

    def _logits(self, name, rows):
        if self.projection is None:
            logits = torch.mul(rows, self.scale, out=self.scratch(name, *rows.shape))
        else:
            logits = self.scratch(name, *rows.shape[:-1], self.projection.shape[0])
            torch.bmm(rows, self.projection.t().expand(rows.shape[0], -1, -1), out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def _pointwise(self, name, rows, for_backward):
        if self.function == "relu" and self.projection is not None:
            # `relu(l) + ε` as the larger of `l + ε` and `ε`, of which the product makes the first. The features also
            # say where the derivative is 1, but for logits that are lost in epsilon's last digit.
            values = self.scratch(name, *rows.shape[:-1], self.projection.shape[0])
            projection = self.projection.t().expand(rows.shape[0], -1, -1)
            return Features(
                torch.baddbmm(self.bias_and_epsilon, rows, projection, out=values).clamp_(min=self.epsilon)
            )
        logits = self._logits(name, rows)
        in_place = self.function == "relu"  # of the inputs themselves
        values = logits.relu_() if in_place else POINTWISE_FUNCTIONS[self.function].value(logits)
        values = values.add_(self.epsilon) if self.epsilon else values
        return Features(values, logits=logits if for_backward and not in_place else None)

    def add_floor(self, features: Features) -> Features:
        """The same features with the floor of an exponential map, in place."""
        if not self.floor:
            return features
        features.values.add_(self.floor)
        return features._replace(has_floor=True)

    def add_floor_to_sums(self, sums: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Sums over tokens `[BH, M, ·]` of features without a floor times something, as if they had had it.

        `Σ_j (φ_j + ε 1) w_jᵀ = S + ε 1 (1ᵀ S)`, for features `φ_j` of the sum 1. This is symmetric, so that to do it
        once more gives queries without a floor what they would read with one; gradients go through it the same way.
        """
        return torch.add(sums, sums.sum(dim=1, keepdim=True), alpha=self.floor, out=out) if self.floor else sums

    def backward(self, features: Features, grad: torch.Tensor, rows: torch.Tensor):
        """Gradients of `rows` and of the logits, given that of the features; `grad` and `features` are used up.

        A query's features are free up to a factor per row, and a key's factor is in its scale, so in both cases
        `exp(l)` may be derived as if nothing had been taken from `l`.
        """
        if self.function == "relu":
            grad_logits = torch.ops.aten.threshold_backward.grad_input(
                grad, features.values, self.epsilon, grad_input=grad
            )
        elif not self.is_exponential:
            grad_logits = grad.mul_(POINTWISE_FUNCTIONS[self.function].derivative(features.logits))
        elif features.has_floor:
            grad.add_(grad.sum(dim=-1, keepdim=True).mul_(self.floor))
            grad_logits = grad.mul_(features.values.sub_(self.floor))
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
