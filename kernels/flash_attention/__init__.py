"""Softmax attention without N×M tensors, for what SDPA cannot fuse. The public names of the operation."""

from .api import FlashAttentionOutput, flash_attention
from .distance_bias import t5_distance_bias
from .merge import merge_attention


__all__ = ["FlashAttentionOutput", "flash_attention", "merge_attention", "t5_distance_bias"]
