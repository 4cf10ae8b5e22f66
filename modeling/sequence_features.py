"""The features of performer-pytorch, to the letter: for checkpoints that were trained with them.

    φ(q) = (exp(l_q - |q'|²/2 - max_f l_q) + ε) / sqrt(M)          one maximum per query
    φ(k) = (exp(l_k - |k'|²/2 - max_{f,j} l_k) + ε) / sqrt(M)      one maximum per head, over the whole sequence

Adding ε after the maximum of the sequence was taken out lets a later key change what an earlier row sees, so a causal
model with these features leaks the future. New models have no use for them.
"""

import torch
from torch import Tensor


def sequence_stabilized_features(
    query: Tensor, key: Tensor, projection: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Features of `query` `[B, H, N, D]` and `key` `[B, H, K, D]` for `projection` `[M, D]`: `[B, H, ·, M]` each."""
    scale = query.shape[-1] ** -0.25
    ratio = projection.shape[0] ** -0.5

    def features(states: Tensor, dims: tuple[int, ...]) -> Tensor:
        states = states.to(projection.dtype) * scale
        logits = states @ projection.mT
        half_norm = 0.5 * states.square().sum(dim=-1, keepdim=True)
        return ratio * (torch.exp(logits - half_norm - logits.amax(dim=dims, keepdim=True).detach()) + epsilon)

    return features(query, (-1,)), features(key, (-1, -2))
