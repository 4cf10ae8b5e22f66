"""Which positions of a Perceiver AR are latents, and the cache that gives exactly what a pass without it gives.

The latents of a sequence of n tokens are its positions from `window_start(n)` on. While new tokens do not move that
start, the latents stay what they were and their keys and values are kept. When it moves, every `latent_stride` tokens,
the remaining latents see less than before and are computed anew, from the inputs that the cache keeps for them; keys
and values of the whole input, which is what is long, are kept throughout.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..configuration.perceiver_flash import INPUT_LAYER_TYPE, LATENT_LAYER_TYPE
from .cache_layers import MovesWithRows, also_static


@also_static
class PerceiverLatentLayer(DynamicLayer):
    """Keys and values of the latents in the present window, in one block of self-attention."""

    _layer_type = LATENT_LAYER_TYPE
    is_croppable = False
    # Its length is that of the window: what sizes masks by the sequence has to ask a layer of the input.
    is_sliding = True
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()

    def restart(self) -> None:
        """Forget the window."""
        self.keys = self.values = None
        self.is_initialized = False

    def reset(self) -> None:
        self.restart()


@also_static
class PerceiverInputLayer(MovesWithRows, PerceiverLatentLayer):
    """Keys and values of the whole input in one cross-attention, and what the latents of the next window are made of.

    `recent` `[B, ≤ num_latents, C]` are the last inputs, `recent_positions` `[B, ≤ num_latents]` where they stand.
    """

    _layer_type = INPUT_LAYER_TYPE
    is_sliding = False

    def __init__(self, **kwargs):
        super().__init__()
        self.recent: Tensor | None = None
        self.recent_positions: Tensor | None = None

    def remember(self, inputs: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Add inputs `[B, N, C]` at positions `[B or 1, N]`; return the last `count` of all and their positions."""
        positions = positions.expand(inputs.shape[0], -1)
        if self.recent is not None:
            inputs = torch.cat([self.recent, inputs], dim=1)
            positions = torch.cat([self.recent_positions, positions], dim=1)
        # Copies, so that a long prompt is not kept alive by a view of its end.
        self.recent, self.recent_positions = inputs[:, -count:].clone(), positions[:, -count:].clone()
        return inputs, positions

    def reset(self) -> None:
        self.restart()
        self.recent = self.recent_positions = None

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.recent is not None:
            self.recent, self.recent_positions = function(self.recent), function(self.recent_positions)


class LatentWindow(NamedTuple):
    """The latents to be computed.

    Attributes:
        hidden_states: `[B, M, C]`, the inputs that become latents.
        positions: `[B or 1, M]`.
        key_mask: `[B, K]`, which of the latents that these see, older ones first, belong to the window; None for all.
    """

    hidden_states: Tensor
    positions: Tensor
    key_mask: Tensor | None


def window_start(length, num_latents: int, stride: int):
    """The first latent of a sequence: the least multiple of `stride` that leaves at most `num_latents` positions.

    Args:
        length: number of tokens, an int or an integer tensor.
    """
    excess = length - num_latents
    if isinstance(length, Tensor):
        return (excess + stride - 1).div(stride, rounding_mode="floor").clamp(min=0) * stride
    return max(0, -(-excess // stride) * stride)


def open_window(
    config, inputs: Tensor, positions: Tensor, attention_mask: Tensor | None, cache: Cache | None, past_length: int
) -> LatentWindow:
    """The latents of a sequence of which `inputs` `[B, N, C]` are new; makes the cache forget a window that has moved.

    Args:
        positions: `[B or 1, N]`.
        attention_mask: `[B, past_length + N]` or None.
    """
    count, stride = config.num_latents, config.latent_stride
    new, total = inputs.shape[1], past_length + inputs.shape[1]
    is_fresh, kept = past_length == 0, 0
    if attention_mask is None:
        start = window_start(total, count, stride)
        is_fresh = is_fresh or start != window_start(past_length, count, stride)
        wanted = total - start
    else:
        real = attention_mask.to(torch.bool)
        starts = window_start(real.sum(dim=1), count, stride)
        if not is_fresh:
            before = window_start(real[:, :past_length].sum(dim=1), count, stride)
            is_fresh = bool((starts != before).any())
        wanted = min(total, count)
    if cache is not None:
        inputs, positions = cache.layers[0].remember(inputs, positions, count)
    latent_layers = [] if cache is None else [layer for layer in cache.layers if layer.is_sliding]
    if is_fresh:
        for layer in latent_layers:
            layer.restart()
    else:
        wanted, kept = new, latent_layers[0].get_seq_length() if latent_layers else 0
    key_mask = None
    if attention_mask is not None:
        seen = slice(total - wanted - kept, None)
        key_mask = (real & (real.long().cumsum(dim=1) - 1 >= starts[:, None]))[:, seen]
    return LatentWindow(inputs[:, -wanted:], positions[:, -wanted:], key_mask)
