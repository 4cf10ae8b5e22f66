"""What the latents of a PerceiverFlash read: one input or several, whole or in chunks; and the latents themselves."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .streamed_attention import ContextChunk


class InputContext(NamedTuple):
    """The input of one cross-attention.

    Attributes:
        states: `[B, N, C]`; None if it comes in chunks.
        mask: bool `[B, N]`, or None.
        positions: `[B or 1, N]`.
        batch_size: B.
        chunks: an iterator of states and their mask instead.
        tokens: `[B, Z, C]`, learned tokens in front of the chunks.
    """

    states: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    batch_size: int
    chunks: Iterator[tuple[Tensor, Tensor | None]] | None = None
    tokens: Tensor | None = None

    def behind(self, tokens: Tensor) -> "InputContext":
        """This input behind learned tokens `[Z, C]`, which stand at position 0 and are never masked."""
        count = tokens.shape[0]
        tokens = tokens.expand(self.batch_size, -1, -1)
        if self.chunks is not None:
            return self._replace(tokens=tokens)
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask.new_ones(self.batch_size, count), mask], dim=1)
        zeros = self.positions.new_zeros(self.positions.shape[0], count)
        states = torch.cat([tokens.to(self.states.dtype), self.states], dim=1)
        return self._replace(states=states, mask=mask, positions=torch.cat([zeros, self.positions], dim=1))

    def chunks_with(self, make_tables) -> Iterator[ContextChunk]:
        """The chunks with what `make_tables` makes of their positions `[1, n]`."""
        if self.tokens is not None:
            zeros = torch.zeros(1, self.tokens.shape[1], dtype=torch.long, device=self.tokens.device)
            yield ContextChunk(self.tokens, None, make_tables(zeros))
        start = 0
        for states, mask in self.chunks:
            positions = torch.arange(start, start + states.shape[1], device=states.device)[None]
            start += states.shape[1]
            yield ContextChunk(states, mask, make_tables(positions))


def feature_contexts(config, inputs, attention_mask, position_ids) -> list[InputContext]:
    """The input of each cross-attention, of a tensor, a list or a dict of tensors, or an iterator of chunks.

    Raises:
        ValueError: other inputs than the configuration names, or of a wrong shape or dtype.
    """
    sizes, names = config.input_sizes, config.input_names
    if isinstance(inputs, Iterator):
        return [_chunked(config, inputs, attention_mask)]
    if isinstance(inputs, Tensor):
        if not isinstance(config.input_size, int) and len(sizes) > 1:
            raise ValueError(f"inputs must be one for each width in input_size={config.input_size}, got one tensor")
        return [_whole("inputs", inputs, sizes[0], attention_mask, position_ids)] * len(sizes)
    labels = [f"inputs[{name!r}]" for name in (names or range(len(sizes)))]
    parts = (
        _in_order("inputs", inputs, names, len(sizes)),
        _in_order("attention_mask", attention_mask, names, len(sizes)),
        _in_order("position_ids", position_ids, names, len(sizes)),
    )
    contexts = [_whole(*arguments) for arguments in zip(labels, parts[0], sizes, *parts[1:], strict=True)]
    batches = {context.batch_size for context in contexts}
    if len(batches) > 1:
        raise ValueError(f"inputs must have one batch size, got {sorted(batches)}")
    return contexts


def _in_order(name, values, names, count) -> list:
    """One value for each cross-attention: of a dict by name, of a sequence in order, of None all None."""
    if values is None:
        return [None] * count
    if isinstance(values, Mapping):
        unknown = set(values) ^ set(names or ()) if name == "inputs" else set(values) - set(names or ())
        if unknown or not names:
            raise ValueError(f"{name} must have the names {names} of config.input_size, got {list(values)}")
        return [values.get(key) for key in names]
    if not isinstance(values, Sequence) or len(values) != count:
        came = len(values) if isinstance(values, Sequence) else type(values).__name__
        raise ValueError(f"{name} must be one for each of {count} cross-attentions, got {came}")
    return list(values)


def _whole(label, states, size, mask, positions) -> InputContext:
    _check_states(label, states, size)
    return InputContext(states, checked_mask(mask, states), positions_or_range(positions, states), states.shape[0])


def _check_states(label, states, size):
    shape = tuple(states.shape)
    if len(shape) != 3 or shape[-1] != size or not states.is_floating_point():
        raise ValueError(
            f"{label} must be floating point of shape [batch, length, {size}], got {states.dtype} of shape {shape}"
        )


def checked_mask(mask: Tensor | None, states: Tensor) -> Tensor | None:
    """`mask` `[B, N]` as bool for states `[B, N, C]`.

    Raises:
        ValueError: another shape.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(states.shape[:2]):
        raise ValueError(f"attention_mask must have shape {tuple(states.shape[:2])}, got {tuple(mask.shape)}")
    return mask != 0


def _chunked(config, inputs: Iterable, attention_mask) -> InputContext:
    if config.num_cross_attention_layers != 1 or attention_mask is not None:
        raise ValueError(
            "an iterator of inputs is read once and brings its masks along: it needs num_cross_attention_layers=1 "
            f"and no attention_mask, got {config.num_cross_attention_layers} and "
            f"{'none' if attention_mask is None else 'a mask'}"
        )

    def chunks():
        for item in inputs:
            states, mask = item if isinstance(item, (tuple, list)) else (item, None)
            _check_states("each chunk of inputs", states, config.input_sizes[0])
            yield states, checked_mask(mask, states)

    found = chunks()
    first = next(found, None)
    if first is None:
        raise ValueError("inputs must hold at least one chunk, got an empty iterator")
    return InputContext(None, None, None, first[0].shape[0], chain([first], found))


def positions_or_range(positions: Tensor | None, states: Tensor, spacing: float = 1) -> Tensor:
    """`positions` `[B or 1, N]`, or 0 to N - 1, times `spacing`, for states `[B, N, C]`."""
    if positions is None:
        return torch.arange(states.shape[1], device=states.device)[None] * spacing
    return positions[None] if positions.ndim == 1 else positions


def expand_rows(rows: Tensor, batch_size: int, size: int, name: str) -> Tensor:
    """`[M, C]` or `[B or 1, M, C]` to `[B, M, C]`.

    Raises:
        ValueError: another shape.
    """
    shape = tuple(rows.shape)
    if len(shape) not in (2, 3) or shape[-1] != size or (len(shape) == 3 and shape[0] not in (1, batch_size)):
        raise ValueError(f"{name} must have shape [any, {size}] or [{batch_size}, any, {size}], got {shape}")
    return rows.expand(batch_size, -1, -1)


def drop_latents(latents: Tensor, positions: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """A random part of each row's latents `[B, M, C]`, in their order and at least one, with their positions."""
    batch_size, count, size = latents.shape
    kept = max(1, int((1 - probability) * count))
    index = torch.rand(batch_size, count, device=latents.device).topk(kept, dim=1).indices.sort(dim=1).values
    positions = positions.expand(batch_size, -1).gather(1, index)
    return latents.gather(1, index[..., None].expand(-1, -1, size)), positions
