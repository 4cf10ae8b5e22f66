"""The cache layer of a block with linear attention: its size does not depend on the number of tokens seen.

It stands in transformers' `DynamicCache` and `StaticCache` like any other layer (it registers itself under its
`_layer_type`), so that `generate` can reorder it for beams, select from it, and roll it back in assisted decoding.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from ..kernels.linear_attention import LinearAttentionState
from .token_shift_cache import LastTokens


# Advances a state by keys, values and their mask.
Advance = Callable[[LinearAttentionState | None, Tensor, Tensor, Tensor | None], LinearAttentionState]


class RecurrentStateLayer(CacheLayerMixin):
    """The linear attention state of the global heads, the recent keys and values of the local heads, and last tokens.

    The sums of the state live in the inherited slots: `keys` `[B, H, M, V]`, `values` `[B, H, M]`; beside them
    `log_scale` `[B, H]`. `window_keys` and `window_values` are `[B, local heads, ≤ reach, D]`; `last_tokens` is what
    token shifts read next.

    Rolling back does not subtract, which would cancel badly: while `record_past` is on, the layer keeps the state at
    the last `crop` with the keys and values since, and a crop advances that state by those that stay.
    """

    _layer_type = "performer_state"
    is_croppable = True
    is_compileable = False
    supports_early_init = False
    # What the masks of softmax layers are sized by must be one of those layers, not this one; and a cache of constant
    # size is not worth offloading. Both are what transformers does with a sliding layer.
    is_sliding = True

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        self._clear()

    def _clear(self):
        self.keys = self.values = self.log_scale = self.window_keys = self.window_values = None
        self.last_tokens = LastTokens()
        self.cumulative_length = 0
        self.window_reach = 0
        self.is_initialized = False
        self._forget()

    def _forget(self):
        self._base: LinearAttentionState | None = None
        self._recorded: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._advance: Advance | None = None
        self._recorded_length = 0

    # What the attention uses

    @property
    def state(self) -> LinearAttentionState | None:
        """The state of the global heads, None before the first token."""
        return None if self.keys is None else LinearAttentionState(self.keys, self.values, self.log_scale)

    @state.setter
    def state(self, state: LinearAttentionState | None):
        self.keys, self.values, self.log_scale = (None, None, None) if state is None else state

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def count(self, hidden_states: Tensor) -> None:
        """Note that the tokens of `hidden_states` `[B, N, C]` have been seen."""
        if not self.is_initialized:
            self.lazy_initialization(hidden_states, hidden_states)
        self.cumulative_length += hidden_states.shape[1]
        if self.record_past:
            self._recorded_length += hidden_states.shape[1]

    def update_state(
        self, new_state: LinearAttentionState, key: Tensor, value: Tensor, mask: Tensor | None, advance: Advance
    ) -> None:
        """Store `new_state`, which `advance` made of the current one by `key` `[B, H, N, D]`, `value` and `mask`."""
        if self.record_past:
            if not self._recorded:
                self._base = self.state
            self._recorded.append((key, value, mask))
            self._advance = advance
        self.state = new_state

    def update(self, key_states: Tensor, value_states: Tensor, *, reach: int) -> tuple[Tensor, Tensor]:
        """Add the local heads' keys and values `[B, H, N, D]`; return them with up to `reach` that came before."""
        self.window_reach = reach
        if self.window_keys is not None:
            key_states = torch.cat([self.window_keys, key_states], dim=2)
            value_states = torch.cat([self.window_values, value_states], dim=2)
        self.window_keys, self.window_values = key_states, value_states
        if not self.record_past:
            self._trim()
        return key_states, value_states

    def shift_in(self, name: str, tokens: Tensor) -> Tensor | None:
        """See `LastTokens.shift_in`."""
        return self.last_tokens.shift_in(name, tokens, self.record_past)

    # What `Cache` uses

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
            if self._recorded:
                key, value, mask = self._recorded_until(self._recorded_length - remove)
                self.state = self._base if key is None else self._advance(self._base, key, value, mask)
            if self.window_keys is not None:
                stop = self.window_keys.shape[2] - remove
                self.window_keys, self.window_values = self.window_keys[:, :, :stop], self.window_values[:, :, :stop]
            self.cumulative_length -= remove
        self.last_tokens.crop(remove)
        self._trim()
        self._forget()

    def _recorded_until(self, count: int):
        if count == 0:
            return None, None, None
        key, value = (torch.cat([entry[i] for entry in self._recorded], dim=2)[:, :, :count] for i in (0, 1))
        masks = [entry[2] for entry in self._recorded]
        if all(mask is None for mask in masks):
            return key, value, None
        lengths = [entry[0].shape[2] for entry in self._recorded]
        full = [
            key.new_ones(key.shape[0], length, dtype=torch.bool) if mask is None else mask.to(torch.bool)
            for mask, length in zip(masks, lengths, strict=True)
        ]
        return key, value, torch.cat(full, dim=1)[:, :count]

    def _trim(self):
        if self.window_keys is not None:
            start = max(self.window_keys.shape[2] - self.window_reach, 0)
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

        def apply(tensor):
            return None if tensor is None else function(tensor)

        for name in ("keys", "values", "log_scale", "window_keys", "window_values"):
            setattr(self, name, apply(getattr(self, name)))
        self.last_tokens.map(function)
        if self._base is not None:
            self._base = LinearAttentionState(*map(function, self._base))
        self._recorded = [tuple(map(apply, entry)) for entry in self._recorded]


STATIC_LAYER_TYPE_MAPPING[RecurrentStateLayer._layer_type] = RecurrentStateLayer
