"""What a token shift keeps of the past, and the cache layer of a softmax block that has one."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .cache_layers import MovesWithRows, also_static


class LastTokens:
    """By name, the `[B, 1, C]` that a token shift reads next; while recording, all tokens since the last `crop`."""

    def __init__(self):
        self.tokens: dict[str, Tensor] = {}

    def shift_in(self, name: str, tokens: Tensor, record: bool) -> Tensor | None:
        """Store the tokens `[B, N, C]` of one token shift; return the `[B, 1, C]` before them, None at the start."""
        stored = self.tokens.get(name)
        if not record:
            # A copy, so that the last token does not keep the whole prompt alive.
            self.tokens[name] = tokens[:, -1:].clone()
        else:
            self.tokens[name] = tokens if stored is None else torch.cat([stored, tokens], dim=1)
        return None if stored is None else stored[:, -1:]

    def crop(self, remove: int) -> None:
        """Forget the last `remove` recorded tokens, and the record."""
        kept = {name: tokens[:, : tokens.shape[1] - remove][:, -1:] for name, tokens in self.tokens.items()}
        # Nothing left means that the sequence begins again.
        self.tokens = {name: tokens for name, tokens in kept.items() if tokens.shape[1]}

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of the batch axis to every tensor held."""
        self.tokens = {name: function(tokens) for name, tokens in self.tokens.items()}


@also_static
class FullAttentionShiftLayer(MovesWithRows, DynamicLayer):
    """Transformers' growing layer of keys and values, with the last tokens of a token shift beside them."""

    _layer_type = "full_attention_with_shift"
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        self.last_tokens = LastTokens()

    def shift_in(self, name: str, tokens: Tensor) -> Tensor | None:
        return self.last_tokens.shift_in(name, tokens, self.record_past)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.last_tokens.crop(-tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.last_tokens = LastTokens()

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        self.last_tokens.map(function)
