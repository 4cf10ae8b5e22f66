"""What the cache layers of all architectures share, so that `generate` can move them and select their rows.

A layer stands in transformers' `DynamicCache` and `StaticCache` like any other: it registers itself for the first
under its `_layer_type`, and `also_static` registers it for the second.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin


def also_static(layer: type) -> type:
    """Class decorator: the layer that a `StaticCache` has for this `_layer_type` too."""
    STATIC_LAYER_TYPE_MAPPING[layer._layer_type] = layer
    return layer


class MovesWithRows:
    """Tensors with a batch axis beside those that a layer of transformers keeps: `map_rows` says which.

    It comes before the layer among the bases.
    """

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor held beside transformers' own by what `function` makes of it."""
        raise NotImplementedError

    def offload(self) -> None:
        super().offload()
        self.map_rows(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self.map_rows(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.map_rows(lambda tensor: tensor[indices, ...])


class _NothingOfItsOwn(CacheLayerMixin):
    """A layer all of whose tensors are in `map_rows`."""

    def offload(self) -> None:
        pass

    def prefetch(self) -> None:
        pass

    def reorder_cache(self, beam_idx: Tensor) -> None:
        pass

    def batch_repeat_interleave(self, repeats: int) -> None:
        pass

    def batch_select_indices(self, indices: Tensor) -> None:
        pass


class StateLayer(MovesWithRows, _NothingOfItsOwn):
    """A layer that keeps less than the sequence: it counts tokens, and takes back those it has recorded.

    A subclass has `_clear`, which begins a new sequence, and `_take_back`.
    """

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

    def _clear(self) -> None:
        self.keys = self.values = self.window_keys = self.window_values = None
        self.window_reach = self.cumulative_length = self.recorded_length = 0
        self.is_initialized = False

    def _take_back(self, remove: int) -> None:
        """Make the layer's own state what it was `remove` tokens ago, and drop the record, also for 0."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def count(self, hidden_states: Tensor) -> None:
        """Note that the tokens of `hidden_states` `[B, N, C]` have been seen."""
        if not self.is_initialized:
            self.lazy_initialization(hidden_states, hidden_states)
        self.cumulative_length += hidden_states.shape[1]
        if self.record_past:
            self.recorded_length += hidden_states.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; what was recorded for that is dropped, also for 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        remove = -tokens_to_remove
        if remove > self.recorded_length:
            raise RuntimeError(
                f"this cache can remove the {self.recorded_length} tokens it has recorded since the last crop, got "
                f"{remove}: call `activate_past_recording` on the cache before the tokens to be removed"
            )
        self.cumulative_length -= remove
        self._take_back(remove)
        if remove and self.window_keys is not None:
            stop = self.window_keys.shape[2] - remove
            self.window_keys, self.window_values = self.window_keys[:, :, :stop], self.window_values[:, :, :stop]
        self._trim_window()
        self.recorded_length = 0

    def add_to_window(self, key: Tensor, value: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, H, N, D]` of local heads; return them with up to `reach` that came before."""
        self.window_reach = reach
        if self.window_keys is not None:
            key = torch.cat([self.window_keys, key], dim=2)
            value = torch.cat([self.window_values, value], dim=2)
        self.window_keys, self.window_values = key, value
        if not self.record_past:
            self._trim_window()
        return key, value

    def _trim_window(self) -> None:
        if self.window_keys is not None:
            start = max(self.window_keys.shape[2] - self.window_reach, 0)
            # A copy, so that a long prompt's keys are not kept alive by a view of the last ones.
            self.window_keys = self.window_keys[:, :, start:].clone()
            self.window_values = self.window_values[:, :, start:].clone()
