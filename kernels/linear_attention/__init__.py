"""Linear attention: softmax-free attention whose state has a constant size. The public names of the operation."""

from .api import LinearAttentionOutput, linear_attention
from .eager_step import plain_step, step_offsets
from .feature_maps import EXPONENTIAL, POINTWISE_FUNCTIONS, FeatureMap
from .state import LinearAttentionState


__all__ = [
    "EXPONENTIAL",
    "POINTWISE_FUNCTIONS",
    "FeatureMap",
    "LinearAttentionOutput",
    "LinearAttentionState",
    "linear_attention",
    "plain_step",
    "step_offsets",
]
