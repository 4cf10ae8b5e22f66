"""Feature maps of linear attention: what turns a query or a key into non-negative features.

Notation: `x' = scale · x`, `l = x' Pᵀ + b` with a projection `P` `[M, D]` (absent: `l = x'`) and a bias `b` `[M]`.

*Exponential* maps (FAVOR+, arXiv 2009.14794, eq. 6; the hyperbolic variant stacks `P` and `-P`; the optimal positive
features of arXiv 2205.15317 scale `P` and add `b`):

    φ(x)_f = exp(-|x'|²/2) · (exp(l_f) + ε Σ_g exp(l_g))

`ε` is the paper's stabiliser, taken relative to the token's own features instead of to a maximum over the sequence, so
that no token depends on a later one. A query's features may be multiplied by any number (it cancels in the output),
and a key's are returned as `exp(log_scale) · features` with `Σ_f features = 1 + M ε`, so nothing overflows.

*Pointwise* maps ("generalised attention"): `φ(x)_f = f(l_f) + ε`, with no scale of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


EXPONENTIAL = "exponential"


class FeatureMap(NamedTuple):
    """How queries and keys become features.

    Args:
        function: `"exponential"` or a name from `POINTWISE_FUNCTIONS` (`"identity"`: the inputs are the features).
        projection: `[M, D]`, float, or None for one feature per input channel (M = D).
        bias: `[M]`, float, added to the projected input, or None.
        scale: multiplies queries and keys before everything else, `D^(-1/4)` for softmax attention.
        epsilon: the floor `ε` of the formulas above, ≥ 0.
        subtract_norm: the factor `exp(-|x'|²/2)` of the exponential map; False leaves `exp(l)`.
    """

    function: str = EXPONENTIAL
    projection: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    epsilon: float = 0.0
    subtract_norm: bool = True

    def num_features(self, head_dim: int) -> int:
        """M, the number of features for inputs of size `head_dim`."""
        return head_dim if self.projection is None else self.projection.shape[0]

    def to(self, dtype: torch.dtype) -> "FeatureMap":
        """The same map with its tensors in `dtype`."""
        if all(t is None or t.dtype == dtype for t in (self.projection, self.bias)):
            return self
        cast = [None if t is None else t.to(dtype) for t in (self.projection, self.bias)]
        return self._replace(projection=cast[0], bias=cast[1])


class PointwiseFunction(NamedTuple):
    """A function and its derivative, both of the logits `l`."""

    value: Callable[[torch.Tensor], torch.Tensor]
    derivative: Callable[[torch.Tensor], torch.Tensor]


def _gelu_derivative(logits):
    density = torch.exp(-0.5 * logits.square()) * 0.3989422804014327
    return 0.5 * (1 + torch.erf(logits * 0.7071067811865476)) + logits * density


def _silu_derivative(logits):
    gate = torch.sigmoid(logits)
    return gate * (1 + logits * (1 - gate))


def _sigmoid_derivative(logits):
    gate = torch.sigmoid(logits)
    return gate * (1 - gate)


# The derivatives are written out because the backward pass of the chunked form runs below autograd.
POINTWISE_FUNCTIONS = {
    "identity": PointwiseFunction(lambda x: x, torch.ones_like),
    "relu": PointwiseFunction(torch.relu, lambda x: (x > 0).to(x.dtype)),
    "squared_relu": PointwiseFunction(lambda x: torch.relu(x).square(), lambda x: 2 * torch.relu(x)),
    "elu_plus_one": PointwiseFunction(lambda x: F.elu(x) + 1, lambda x: torch.exp(x.clamp(max=0))),
    "gelu": PointwiseFunction(F.gelu, _gelu_derivative),
    "silu": PointwiseFunction(F.silu, _silu_derivative),
    "sigmoid": PointwiseFunction(torch.sigmoid, _sigmoid_derivative),
    "softplus": PointwiseFunction(F.softplus, torch.sigmoid),
}


def project(inputs: torch.Tensor, feature_map: FeatureMap) -> torch.Tensor:
    """The logits `l` of `inputs` `[..., D]`: `[..., M]`."""
    if feature_map.projection is None:
        logits = inputs * feature_map.scale
    elif feature_map.scale == 1:
        logits = F.linear(inputs, feature_map.projection)
    elif inputs.numel() < feature_map.projection.numel():
        logits = F.linear(inputs * feature_map.scale, feature_map.projection)
    else:
        # The scale goes into whichever is smaller, which saves a pass over the other.
        logits = F.linear(inputs, feature_map.projection * feature_map.scale)
    return logits if feature_map.bias is None else logits + feature_map.bias


def query_features(query: torch.Tensor, feature_map: FeatureMap) -> torch.Tensor:
    """Features of `query` `[..., D]`, up to a factor per row: `[..., M]`."""
    logits = project(query, feature_map)
    if feature_map.function != EXPONENTIAL:
        return POINTWISE_FUNCTIONS[feature_map.function].value(logits) + feature_map.epsilon
    return torch.softmax(logits, dim=-1) + feature_map.epsilon


def key_features(key: torch.Tensor, feature_map: FeatureMap) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of `key` `[..., D]` and the logarithm of their scale: `[..., M]` and `[...]`."""
    logits = project(key, feature_map)
    if feature_map.function != EXPONENTIAL:
        features = POINTWISE_FUNCTIONS[feature_map.function].value(logits) + feature_map.epsilon
        return features, logits.new_zeros(logits.shape[:-1])
    features = torch.softmax(logits, dim=-1) + feature_map.epsilon
    log_scale = torch.logsumexp(logits, dim=-1)
    if feature_map.subtract_norm:
        log_scale = log_scale - 0.5 * (feature_map.scale * key).square().sum(dim=-1)
    return features, log_scale
