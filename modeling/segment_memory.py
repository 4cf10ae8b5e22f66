"""Transformer-XL's memory (arXiv 1901.02860): tokens also see what the segment before them gave to each block.

Block l computes its keys and values from `[m_l, x_l]` and its queries from `x_l` alone, where `m_l` is what entered
its self-attention in the segments before. No gradient goes back there. In a cache, the memory is a prefix of the keys.
"""

from typing import NamedTuple

import torch

from .x_transformer_embeddings import Prefix, insert_prefix
from .x_transformer_inputs import prefix_start, with_prefix


# (Not called `mems`: transformers' `generate` takes an output of that name for a cache.)
class Recalled(NamedTuple):
    """The memory of one call.

    Attributes:
        states: `[B, L, M, C]` for L blocks, or None where there is none, or a cache holds its keys already.
        start: `[B]`, the first real token of each row, before which its memory stands; None for 0.
        key_position_ids: `[B or 1, M + N]`, positions of the keys that are new in this call.
    """

    states: torch.Tensor | None
    start: torch.Tensor | None
    key_position_ids: torch.Tensor

    def before(self, tokens: torch.Tensor, block: int, norm) -> torch.Tensor:
        """`tokens` `[B, N, C]` with the memory of a block, through `norm`, before each row's first real one."""
        if self.states is None:
            return tokens
        return insert_prefix(tokens, norm(self.states[:, block].to(tokens.dtype)), self.start)


def check_segment_memory(segment_memory: torch.Tensor | None, batch: int, config) -> None:
    """A memory of the right shape, for a model that has one.

    Raises:
        ValueError: otherwise.
    """
    if segment_memory is None:
        return
    if not config.mem_len:
        raise ValueError("segment_memory needs config.mem_len above 0, got a model without a memory")
    expected = (batch, config.num_hidden_layers, config.hidden_size)
    if (
        segment_memory.ndim != 4
        or (segment_memory.shape[0], segment_memory.shape[1], segment_memory.shape[3]) != expected
    ):
        raise ValueError(
            f"segment_memory must have shape [{batch}, {expected[1]}, any length, {expected[2]}] (batch, blocks, "
            f"tokens, channels), got {tuple(segment_memory.shape)}"
        )


def recall(segment_memory, mask, position_ids, past_key_values, length: int):
    """Mask and positions behind the memory `segment_memory` `[B, L, M, C]` (or None), and the memory itself.

    A cache takes the memory in with the first call; then `segment_memory` is not looked at any more.

    Args:
        mask: `[B, everything seen]` bool, or None.
        position_ids: `[B or 1, N]`, of the `length` new tokens.
    """
    count, is_first, first_length = 0 if segment_memory is None else segment_memory.shape[2], True, length
    if past_key_values is not None:
        layers = getattr(past_key_values, "self_attention_cache", past_key_values).layers
        is_first = layers[0].first_length == 0
        for layer in layers if is_first else ():
            layer.prefix_length, layer.first_length = count, length
        count, first_length = layers[0].prefix_length, layers[0].first_length
    if not count:
        return mask, position_ids, Recalled(None, None, position_ids)
    start = prefix_start(mask, first_length)
    mask, position_ids = with_prefix(mask, Prefix(start, count), None), position_ids + count
    if not is_first:
        return mask, position_ids, Recalled(None, start, position_ids)
    rows = position_ids if start is None else position_ids.expand(start.shape[0], -1)
    places = insert_prefix(rows, torch.arange(count, device=rows.device).expand(rows.shape[0], -1), start)
    return mask, position_ids, Recalled(segment_memory, start, places)


def remember(states: list[torch.Tensor], segment_memory: torch.Tensor | None, config) -> torch.Tensor:
    """The memory for the next segment, `[B, L, M, C]`: the last `config.mem_len` of memory and new states.

    Args:
        states: for each block, `[B, N, C]`, what entered its self-attention.
    """
    new = torch.stack(states, dim=1).detach()
    together = new if segment_memory is None else torch.cat([segment_memory.to(new.dtype), new], dim=2)
    return together[:, :, -config.mem_len :]
