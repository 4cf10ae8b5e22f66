"""What an XTransformer's blocks need beside hidden states: positions, what each token sees, and memory tokens."""

import torch

from .input_checks import can_look
from .softmax_attention import Visibility
from .x_transformer_embeddings import insert_prefix


def check_cache(past_key_values, config) -> None:
    """A cache of the right layers, for a model that can use one.

    Raises:
        ValueError: otherwise.
    """
    if past_key_values is None:
        return
    if not config.is_decoder:
        raise ValueError("past_key_values needs is_decoder=True, got an encoder, whose tokens all see each other")
    cache = getattr(past_key_values, "self_attention_cache", past_key_values)
    kind = config.layer_types[0]
    if kind != "full_attention_with_prefix":
        return
    # By name: the cache may have been made by another copy of this code.
    if any(layer._layer_type != kind for layer in cache.layers) or len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            "past_key_values must also keep memory tokens and shifted tokens: create it with "
            "DynamicCache(config=model.config)"
        )


def check_encoder_mask(encoder_attention_mask: torch.Tensor | None, encoder_hidden_states: torch.Tensor) -> None:
    """One value for each of the encoder's states.

    Raises:
        ValueError: otherwise.
    """
    expected = tuple(encoder_hidden_states.shape[:2])
    if encoder_attention_mask is not None and tuple(encoder_attention_mask.shape) != expected:
        raise ValueError(
            f"encoder_attention_mask must have shape {expected} (batch, encoder tokens), got "
            f"{tuple(encoder_attention_mask.shape)}"
        )


def real_tokens(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """`[B, everything seen]` bool, or None where there is no padding."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must have shape [batch, cached and new tokens], got {tuple(attention_mask.shape)}"
        )
    return attention_mask != 0


def prefix_start(mask: torch.Tensor | None, first_length: int) -> torch.Tensor | None:
    """Where memory tokens stand in each row `[B]`: behind the left padding of the first `first_length` tokens."""
    if mask is None:
        return None
    # The first real token; a row that begins with nothing but padding has its prefix behind that.
    first = torch.cat([mask[:, :first_length], mask.new_ones(mask.shape[0], 1)], dim=1)
    return first.int().argmax(dim=1)


def check_memory_place(mask: torch.Tensor | None, start: torch.Tensor | None, first_length: int) -> None:
    """The first call, of `first_length` tokens, has reached the first real token of every row.

    Raises:
        ValueError: otherwise: memory tokens stand right before that token and cannot be moved in a cache, which
            biases, windows and token shifts would notice (rotary positions are told apart from slots).
    """
    if mask is None or not can_look(mask) or first_length >= mask.shape[1]:
        return
    late = (start == first_length) & ~mask[:, first_length]
    if late.any():
        raise ValueError(
            "memory tokens stand right before the first real token of each row, so the first call must reach it; row "
            f"{int(late.int().argmax())} begins with more padding than that call had tokens ({first_length}): use a "
            "larger prefill_chunk_size"
        )


def with_memory(mask: torch.Tensor | None, memory: int, start: torch.Tensor | None) -> torch.Tensor | None:
    """`mask` with `memory` real tokens inserted at `start`."""
    return None if mask is None else insert_prefix(mask, mask.new_ones(memory), start)


def hide_at_random(mask: torch.Tensor | None, states: torch.Tensor, probability: float, keep_first: bool):
    """`mask` `[B, N]` (None: all real) without a random share of the tokens of `states` `[B, N, C]`.

    `keep_first` keeps the first real token of each row, so that no row of causal attention is empty.
    """
    kept = torch.rand(states.shape[:2], device=states.device) >= probability
    mask = torch.ones_like(kept) if mask is None else mask
    if keep_first:
        kept = kept | (mask.int().cumsum(dim=1) == 1)
    return mask & kept


def self_visibility(config, mask, cached, length: int, prefix_lengths) -> Visibility:
    """What tokens see of their own sequence.

    Args:
        mask: `[B, everything seen]` bool, memory tokens included, or None.
        cached: number of tokens seen before, an int, or a tensor where a preallocated cache counts on the device.
        length: number of new tokens.
        prefix_lengths: `[B]`, from `forward`'s `prefix_length`, or None.
    """
    window = None
    if config.sliding_window is not None:
        window = (config.sliding_window - 1, 0 if config.is_decoder else config.sliding_window_ahead)
        if prefix_lengths is not None:
            window = (window[0], None)
    return Visibility(config.is_decoder, window, mask, None, prefix_lengths)
