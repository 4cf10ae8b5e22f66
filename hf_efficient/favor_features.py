"""The random features behind `attn_implementation="favor"`: drawn once for each layer and device."""

import math

import torch
from torch import Tensor

from .kernels.linear_attention import FeatureMap
from .modeling.random_features import draw_projection, optimal_positive_constants


# The stabiliser's share of a token's features, all of them together: it must not grow with their number, or more
# features would not always mean less error. That of the pointwise maps is an absolute floor of each feature.
EXPONENTIAL_EPSILON, POINTWISE_EPSILON = 1e-6, 1e-3


class FavorFeatures:
    """Projections by size of head, layer and device.

    Args:
        num_features, seed, orthogonal, kind: see `register_favor_attention` (`kind` is its `feature_map`).
    """

    def __init__(self, num_features: int | None, seed: int, orthogonal: bool, kind: str):
        self.num_features, self.seed, self.orthogonal, self.kind = num_features, seed, orthogonal, kind
        self._projections: dict[tuple[int, int, torch.device], Tensor] = {}

    def count(self, head_dim: int) -> int:
        """The number of features for heads of this size."""
        if self.num_features is not None:
            return self.num_features
        count = max(2, int(head_dim * math.log(head_dim)))
        return count - count % 2 if self.kind == "hyperbolic" else count

    def projection(self, head_dim: int, layer_idx: int, device: torch.device) -> Tensor:
        """`[rows, head_dim]` float32, the same one at every call and in every process."""
        where = (head_dim, layer_idx, device)
        if where not in self._projections:
            rows = self.count(head_dim) // (2 if self.kind == "hyperbolic" else 1)
            # Not under the inference mode of a first call: later ones may want gradients.
            with torch.inference_mode(False):
                drawn = draw_projection(
                    rows, head_dim, seed=self.seed, layer_idx=layer_idx, draw=0, orthogonal=self.orthogonal
                )
                self._projections[where] = drawn.to(device)
        return self._projections[where]

    def feature_map(self, query: Tensor, layer_idx: int, scaling: float) -> FeatureMap:
        """The feature map for `query` `[B, H, N, D]` whose products approximate `exp(scaling · q·k)`."""
        head_dim, scale = query.shape[-1], scaling**0.5
        rows = self.projection(head_dim, layer_idx, query.device)
        epsilon = EXPONENTIAL_EPSILON / self.count(head_dim)
        if self.kind == "softmax":
            return FeatureMap("exponential", rows, None, scale, epsilon)
        if self.kind == "hyperbolic":
            return FeatureMap("exponential", torch.cat([rows, -rows]), None, scale, epsilon)
        if self.kind == "optimal_positive":
            # What the constants suppose changes the variance, never the mean: standard normal queries and keys.
            pair_norm = torch.tensor(2.0 * head_dim * scaling, device=rows.device)
            a, b = optimal_positive_constants(head_dim, pair_norm)
            bias = a * rows.square().sum(dim=-1)
            return FeatureMap("exponential", b * rows, bias, scale, epsilon)
        return FeatureMap(self.kind, rows, None, scale, POINTWISE_EPSILON)
