"""Soft top-k: scores in [0, 1] that sum to k, and the k best positions. The public names of the operation."""

from .api import METHODS, SORT_ORDERS, SoftTopkOutput, soft_topk


__all__ = ["METHODS", "SORT_ORDERS", "SoftTopkOutput", "soft_topk"]
