"""A penalty on the size of attention's normalisers (arXiv 2202.08906, as x-transformers applies it to attention)."""

import torch


def attention_z_loss(lse: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """The mean over real tokens of `Σ_h (Σ_l lse_hl)²`.

    Args:
        lse: `[B, H, N]`, the logarithms of the softmax' denominators, summed over all attentions of the stack.
        real: `[B, N]` bool, the tokens that count, or None for all. Padding may see nothing and have -inf.
    """
    if real is None:
        return lse.square().sum(dim=1).mean()
    per_token = lse.masked_fill(~real[:, None], 0.0).square().sum(dim=1)
    return per_token.sum() / real.sum().clamp(min=1)
