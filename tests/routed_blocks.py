"""Small routed blocks, all float64, and the soft top-k by bisection, that several test files share."""

import pytest
import torch

from hf_efficient.modeling.routed_attention import RoutedAttention, RoutedCrossAttention
from hf_efficient.modeling.routed_autoregressive_attention import RoutedAutoregressiveAttention
from hf_efficient.modeling.routed_feed_forward import RoutedFeedForward
from hf_efficient.modeling.routed_image_attention import RoutedImageAttention
from hf_efficient.modeling.token_router import RouterOptions


WIDTH = 32
HEADS = {"light_heads": 2, "light_head_dim": 8, "heavy_heads": 4, "heavy_head_dim": 8}
COUNTS = {"num_routed_queries": 5, "num_routed_keys": 7}


def feed_forward(**options):
    sizes = {"light_intermediate_size": 16, "heavy_intermediate_size": 48, "num_routed": 6}
    return RoutedFeedForward(WIDTH, **{**sizes, **options}).double()


def attention(**options):
    return RoutedAttention(WIDTH, radius=4, **{**HEADS, **COUNTS, **options}).double()


def cross_attention(**options):
    return RoutedCrossAttention(WIDTH, num_heads=4, head_dim=8, **{**COUNTS, **options}).double()


def autoregressive_attention(**options):
    counts = {"num_routed_queries": 3, "num_routed_keys": 4, "routing_window": 8}
    return RoutedAutoregressiveAttention(WIDTH, radius=4, **HEADS, **{**counts, **options}).double()


def image_attention(**options):
    return RoutedImageAttention(WIDTH, window_size=4, **HEADS, **{**COUNTS, **options}).double()


ONE_SEQUENCE = {
    "feed-forward": feed_forward,
    "attention": attention,
    "two sets of keys": lambda: attention(num_key_value_sets=2),
    "null tokens": lambda: attention(null_query_token=True, null_key_value=True, num_key_value_sets=2),
    "fractions": lambda: attention(num_routed_queries=0.2, num_routed_keys=0.3),
    "iterations": lambda: attention(router_options=RouterOptions(method="coordinate_descent")),
    "static": lambda: attention(router_options=RouterOptions(static=True)),
    "autoregressive": lambda: autoregressive_attention(num_key_value_sets=2),
}
one_sequence = pytest.mark.parametrize("make", ONE_SEQUENCE.values(), ids=ONE_SEQUENCE)


def states(rows=3, length=40, seed=0):
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masks(*lengths, total=40):
    """`[B, total]`, ones for the first so many tokens of each row."""
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).long()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def soft_scores(logits, k, temperature):
    """`min(1, exp((s - τ) / ε))` with τ found by bisection."""
    low, high = logits.min() - 40 * temperature, logits.max() + 40 * temperature
    for _ in range(200):
        middle = (low + high) / 2
        total = ((logits - middle) / temperature).exp().clamp(max=1).sum()
        low, high = (middle, high) if total > k else (low, middle)
    return ((logits - high) / temperature).exp().clamp(max=1)
