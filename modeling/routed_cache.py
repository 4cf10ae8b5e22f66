"""The cache layer of causal routed attention: a window, the routed keys, and what the routers remember.

It stands in transformers' `DynamicCache` and `StaticCache` like any other layer (it registers itself under its
`_layer_type`), so that `generate` can reorder it for beams, select from it, and roll it back in assisted decoding.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from .causal_router import RouterHistory


class RoutedStateLayer(CacheLayerMixin):
    """What one block needs of its past.

    Attributes:
        window_keys, window_values: `[B, H, ≤ radius, D]`, of the light heads.
        keys, values: `[B, R, H / R, K, D]`, of the heavy heads, routed tokens only. K grows with the number of tokens
            that the routers may choose, not with the number of tokens.
        slots, filled: `[B, R, K]`, the place in the sequence of each of them, and whether there is one.
        histories: what each router remembers.
    """

    _layer_type = "colt5_state"
    is_croppable = True
    is_compileable = False
    supports_early_init = False
    # As for other layers that hold less than the sequence: it must not decide the size of masks, or be offloaded.
    is_sliding = True

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        self._clear()

    def _clear(self):
        self.keys = self.values = self.slots = self.filled = self.window_keys = self.window_values = None
        self.histories: dict[str, RouterHistory] = {}
        self.history_length = self.radius = self.cumulative_length = self._recorded_length = 0
        self.is_initialized = False

    # What the block uses

    def history(self, name: str) -> RouterHistory | None:
        """What the router called `name` remembers."""
        return self.histories.get(name)

    def remember(self, name: str, history: RouterHistory, length: int) -> None:
        """Keep the last `length` tokens of `history`, and longer while tokens may still be taken back."""
        self.history_length = length
        self.histories[name] = history if self.record_past else history.last(length)

    def update_window(self, key: Tensor, value: Tensor, radius: int) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, H, N, D]` of the light heads; return them with those up to `radius` before."""
        self.radius = radius
        if self.window_keys is not None:
            key, value = torch.cat([self.window_keys, key], dim=2), torch.cat([self.window_values, value], dim=2)
        self.window_keys, self.window_values = key, value
        if not self.record_past:
            self._trim()
        return key, value

    def update(
        self, key_states: Tensor, value_states: Tensor, *, slots: Tensor, filled: Tensor, room: int
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, R, H / R, K, D]` of routed tokens; return all of them.

        Args:
            slots, filled: `[B, R, K]`, the places of the tokens in the sequence, and which of them are routed.
            room: how many routed tokens there can be by now.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys is not None:
            key_states = torch.cat([self.keys, key_states], dim=3)
            value_states = torch.cat([self.values, value_states], dim=3)
            slots, filled = torch.cat([self.slots, slots], dim=2), torch.cat([self.filled, filled], dim=2)
        if filled.shape[2] > room:
            # Rows route different numbers of tokens: the places that hold none are closed up.
            order = (~filled).to(torch.uint8).argsort(dim=-1, stable=True)[..., :room]
            slots, filled = slots.gather(2, order), filled.gather(2, order)
            order = order[:, :, None, :, None].expand(*key_states.shape[:3], room, key_states.shape[-1])
            key_states, value_states = key_states.gather(3, order), value_states.gather(3, order)
        self.keys, self.values, self.slots, self.filled = key_states, value_states, slots, filled
        return key_states, value_states

    def count(self, length: int) -> None:
        """Note that the block has seen `length` more tokens."""
        self.cumulative_length += length
        if self.record_past:
            self._recorded_length += length

    # What `Cache` uses

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; what was recorded for that is dropped, also for 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        remove = -tokens_to_remove
        if remove > self._recorded_length:
            raise RuntimeError(
                f"this cache can remove the {self._recorded_length} tokens it has recorded since the last crop, got "
                f"{remove}: call `activate_past_recording` on the cache before the tokens to be removed"
            )
        if remove:
            self.cumulative_length -= remove
            self.filled = self.filled & (self.slots < self.cumulative_length)
            stop = self.window_keys.shape[2] - remove
            self.window_keys, self.window_values = self.window_keys[:, :, :stop], self.window_values[:, :, :stop]
            self.histories = {
                name: history.map(lambda t: t[..., : t.shape[-1] - remove]) for name, history in self.histories.items()
            }
        self.histories = {name: history.last(self.history_length) for name, history in self.histories.items()}
        self._trim()
        self._recorded_length = 0

    def _trim(self):
        if self.window_keys is not None:
            start = max(self.window_keys.shape[2] - self.radius, 0)
            # A copy, so that a long prompt's keys are not kept alive by a view of the last ones.
            self.window_keys = self.window_keys[:, :, start:].clone()
            self.window_values = self.window_values[:, :, start:].clone()

    def reset(self) -> None:
        self._clear()

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices, ...])

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a function of the batch axis to every tensor held."""
        for name in ("keys", "values", "slots", "filled", "window_keys", "window_values"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else function(tensor))
        self.histories = {name: history.map(function) for name, history in self.histories.items()}


STATIC_LAYER_TYPE_MAPPING[RoutedStateLayer._layer_type] = RoutedStateLayer
