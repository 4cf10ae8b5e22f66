"""The cache layer of causal routed attention: a window, the routed keys, and what the routers remember."""

from collections.abc import Callable

import torch
from torch import Tensor

from .cache_layers import StateLayer, also_static
from .causal_router import RouterHistory


@also_static
class RoutedStateLayer(StateLayer):
    """What one block needs of its past.

    Attributes:
        window_keys, window_values: `[B, H, ≤ radius, D]`, of the light heads.
        keys, values: `[B, R, H / R, K, D]`, of the heavy heads, routed tokens only. K grows with the number of tokens
            that the routers may choose, not with the number of tokens.
        slots, filled: `[B, R, K]`, the place in the sequence of each of them, and whether there is one.
        histories: what each router remembers.
    """

    _layer_type = "colt5_state"

    def _clear(self) -> None:
        super()._clear()
        self.slots = self.filled = None
        self.histories: dict[str, RouterHistory] = {}
        self.history_length = 0

    def history(self, name: str) -> RouterHistory | None:
        """What the router called `name` remembers."""
        return self.histories.get(name)

    def remember(self, name: str, history: RouterHistory, length: int) -> None:
        """Keep the last `length` tokens of `history`, and longer while tokens may still be taken back."""
        self.history_length = length
        self.histories[name] = history if self.record_past else history.last(length)

    def update(
        self, key_states: Tensor, value_states: Tensor, *, slots: Tensor, filled: Tensor, room: int
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, R, H / R, K, D]` of routed tokens; return all of them.

        Args:
            slots, filled: `[B, R, K]`, the places of the tokens in the sequence, and which of them are routed.
            room: how many routed tokens there can be by now.
        """
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

    def _take_back(self, remove: int) -> None:
        if remove:
            self.filled = self.filled & (self.slots < self.cumulative_length)
            self.histories = {
                name: history.map(lambda t: t[..., : t.shape[-1] - remove]) for name, history in self.histories.items()
            }
        self.histories = {name: history.last(self.history_length) for name, history in self.histories.items()}

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "slots", "filled", "window_keys", "window_values"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else function(tensor))
        self.histories = {name: history.map(function) for name, history in self.histories.items()}
