"""The cache layer of a block with linear attention: its size does not depend on the number of tokens seen."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.linear_attention import LinearAttentionState, step_offsets
from .cache_layers import StateLayer, also_static
from .token_shift_cache import LastTokens


# Advances a state by keys, values and their mask.
Advance = Callable[[LinearAttentionState | None, Tensor, Tensor, Tensor | None], LinearAttentionState]


@also_static
class RecurrentStateLayer(StateLayer):
    """The linear attention state of the global heads, the recent keys and values of the local heads, and last tokens.

    The sums of the state live in the inherited slots: `keys` `[B, H, M, V]`, `values` `[B, H, M]`; beside them
    `log_scale` `[B, H]`. `window_keys` and `window_values` are `[B, local heads, ≤ reach, D]`; `last_tokens` is what
    token shifts read next.

    Rolling back does not subtract, which would cancel badly: while `record_past` is on, the layer keeps the state at
    the last `crop` with the keys and values since, and a crop advances that state by those that stay.
    """

    _layer_type = "performer_state"

    def _clear(self) -> None:
        super()._clear()
        self.log_scale = self._step_offsets = None
        # What the attention keeps from step to step; gone when the state is another.
        self.step_feature_map = self.joint_stamp = None
        self.last_tokens = LastTokens()
        self._forget()

    def _forget(self):
        self._base: LinearAttentionState | None = None
        self._recorded: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._advance: Advance | None = None

    @property
    def state(self) -> LinearAttentionState | None:
        """The state of the global heads, None before the first token."""
        return None if self.keys is None else LinearAttentionState(self.keys, self.values, self.log_scale)

    @property
    def owns_state(self) -> bool:
        """Whether a step may overwrite the state: there is one, and no record that leads back to it."""
        if self.keys is None or self.record_past or torch.compiler.is_compiling():
            return False
        # What inference mode made can be written to in inference mode only.
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()

    @state.setter
    def state(self, state: LinearAttentionState | None):
        self.keys, self.values, self.log_scale = (None, None, None) if state is None else state
        self._step_offsets = self.step_feature_map = None

    @property
    def step_offsets(self) -> Tensor:
        """`step_offsets` of the state, which stay as they are through plain steps."""
        if self._step_offsets is None:
            self._step_offsets = step_offsets(self.log_scale)
        return self._step_offsets

    def update_state(
        self, new_state: LinearAttentionState, key: Tensor, value: Tensor, mask: Tensor | None, advance: Advance
    ) -> None:
        """Store `new_state`, which `advance` made of the current one by `key` `[B, H, N, D]`, `value` and `mask`."""
        if self.record_past:
            if not self._recorded:
                self._base = self.state
            self._recorded.append((key, value, mask))
            self._advance = advance
        if key.shape[2] > 1:
            self.joint_stamp = None
        self.state = new_state

    def update(self, key_states: Tensor, value_states: Tensor, *, reach: int) -> tuple[Tensor, Tensor]:
        """See `add_to_window`."""
        return self.add_to_window(key_states, value_states, reach)

    def shift_in(self, name: str, tokens: Tensor) -> Tensor | None:
        """See `LastTokens.shift_in`."""
        return self.last_tokens.shift_in(name, tokens, self.record_past)

    def _take_back(self, remove: int) -> None:
        if remove and self._recorded:
            key, value, mask = self._recorded_until(self.recorded_length - remove)
            self.state = self._base if key is None else self._advance(self._base, key, value, mask)
        self.last_tokens.crop(remove)
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

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        def apply(tensor):
            return None if tensor is None else function(tensor)

        for name in ("keys", "values", "log_scale", "window_keys", "window_values"):
            setattr(self, name, apply(getattr(self, name)))
        self._step_offsets = self.step_feature_map = None
        self.last_tokens.map(function)
        if self._base is not None:
            self._base = LinearAttentionState(*map(function, self._base))
        self._recorded = [tuple(map(apply, entry)) for entry in self._recorded]
