"""T5's learned position bias (arXiv 1910.10683, section 2.1) as a vector over distances."""

import torch
from torch import Tensor, nn

from ..kernels.flash_attention import t5_distance_bias


class RelativePositionBias(nn.Module):
    """One learned number for each head and bucket of distances, which all layers of a stack share.

    Args:
        num_buckets: of distances.
        num_heads: H.
        max_distance: the distance from which on all share the last bucket.
        bidirectional: whether later keys have buckets of their own.
    """

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int, *, bidirectional: bool):
        super().__init__()
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))

    def forward(self) -> Tensor:
        """`[H, 2 · max_distance + 1]`, the `distance_bias` of `flash_attention`."""
        return t5_distance_bias(self.weight, bidirectional=self.bidirectional, max_distance=self.max_distance)
