"""The constant-size state that linear attention carries along a sequence."""

from typing import NamedTuple

import torch


# Stands for "no key seen yet". Finite on purpose: the difference of two of them is 0, not NaN, and the exponential of
# its distance to any real logarithm underflows to exactly 0. It fits float32, which the state never goes below.
EMPTY_LOG_SCALE = -1.0e30


class LinearAttentionState(NamedTuple):
    """Sums over the keys seen so far, relative to `exp(log_scale)`.

    With key features `φ(k_j)` and values `v_j`, the true sums are `exp(log_scale) · key_value` and
    `exp(log_scale) · key_sum`. `log_scale` is the running maximum of the keys' own scales, or below it by a
    factor of a million at most (`plain_step`), so that the stored sums neither overflow nor vanish; it cancels in the
    output and therefore has no gradient.

    Shapes (B batch, H heads, M features, V value size), all in the computation's dtype (at least float32):
        key_value: `[B, H, M, V]`, `Σ_j φ(k_j) v_jᵀ`.
        key_sum: `[B, H, M]`, `Σ_j φ(k_j)`.
        log_scale: `[B, H]`.
    """

    key_value: torch.Tensor
    key_sum: torch.Tensor
    log_scale: torch.Tensor

    @classmethod
    def empty(cls, batch_size, num_heads, num_features, value_dim, *, dtype=torch.float32, device=None):
        """The state before the first key: zero sums at the smallest scale."""
        return cls(
            torch.zeros(batch_size, num_heads, num_features, value_dim, dtype=dtype, device=device),
            torch.zeros(batch_size, num_heads, num_features, dtype=dtype, device=device),
            torch.full((batch_size, num_heads), EMPTY_LOG_SCALE, dtype=dtype, device=device),
        )
