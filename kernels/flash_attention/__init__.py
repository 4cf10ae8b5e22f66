"""Softmax attention without N×M tensors, for what SDPA cannot fuse. The public names of the operation."""

from .api import FlashAttentionOutput, flash_attention
from .distance_bias import t5_distance_bias
from .merge import merge_attention
from .part import PartGradients, part_gradients


__all__ = [
    "FlashAttentionOutput",
    "PartGradients",
    "flash_attention",
    "merge_attention",
    "part_gradients",
    "t5_distance_bias",
]
