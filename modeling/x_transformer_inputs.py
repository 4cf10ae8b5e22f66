"""What an XTransformer's blocks need beside hidden states: positions, what each token sees, and memory tokens."""

import torch

from .input_checks import can_look
from .softmax_attention import Visibility
from .x_transformer_embeddings import Prefix, insert_prefix


def check_cache(past_key_values, config, kind: str) -> None:
    """A cache of layers of this kind, for a model that can use one.

    Raises:
        ValueError: otherwise.
    """
    if past_key_values is None:
        return
    if not config.is_decoder:
        raise ValueError("past_key_values needs is_decoder=True, got an encoder, whose tokens all see each other")
    cache = getattr(past_key_values, "self_attention_cache", past_key_values)
    if kind != "full_attention_with_prefix":
        return
    # By name: the cache may have been made by another copy of this code.
    if any(layer._layer_type != kind for layer in cache.layers) or len(cache.layers) != config.num_hidden_layers:
        raise ValueError(
            "past_key_values must also keep memory tokens and shifted tokens: create it with "
            "DynamicCache(config=model.config)"
        )


def prefix_start(mask: torch.Tensor | None, first_length: int) -> torch.Tensor | None:
    """Where memory tokens stand in each row `[B]`: behind the left padding of the first `first_length` tokens."""
    if mask is None:
        return None
    # The first real token; a row that begins with nothing but padding has its prefix behind that.
    first = torch.cat([mask[:, :first_length], mask.new_ones(mask.shape[0], 1)], dim=1)
    return first.int().argmax(dim=1)


def check_memory_place(mask: torch.Tensor | None, start: torch.Tensor | None, first_length: int, config) -> None:
    """The first call, of `first_length` tokens, has reached the first real token of every row.

    Raises:
        ValueError: otherwise: memory tokens stand right before that token and cannot be moved in a cache, which
            biases, windows and token shifts would notice (rotary positions are told apart from slots).
    """
    if not (config.position_bias or config.sliding_window or config.shift_tokens):
        return
    if mask is None or not can_look(mask) or first_length >= mask.shape[1]:
        return
    late = (start == first_length) & ~mask[:, first_length]
    if late.any():
        raise ValueError(
            "memory tokens and prepended vectors stand right before the first real token of each row, so the first "
            f"call must reach it; row {int(late.int().argmax())} begins with more padding than that call had tokens "
            f"({first_length}): use a larger prefill_chunk_size"
        )


def with_prefix(mask: torch.Tensor | None, prefix: Prefix, prepend_mask: torch.Tensor | None) -> torch.Tensor | None:
    """`mask` `[B, tokens]` with that of the prefix inserted, of which only prepended vectors may be unreal."""
    if mask is None:
        return None
    front = mask.new_ones(mask.shape[0], prefix.length)
    if prepend_mask is not None:
        front = torch.cat([front[:, prepend_mask.shape[1] :], prepend_mask], dim=1)
    return insert_prefix(mask, front, prefix.start)


def check_prepended(prepend_embeds, prepend_mask, inputs_embeds, past_key_values, config) -> None:
    """Vectors of the width of the token table, and a cache that can tell them from tokens.

    Raises:
        ValueError: otherwise.
    """
    if prepend_embeds is None:
        if prepend_mask is not None:
            raise ValueError("prepend_mask needs prepend_embeds, got None")
        return
    batch, _, size = inputs_embeds.shape
    if prepend_embeds.ndim != 3 or (prepend_embeds.shape[0], prepend_embeds.shape[2]) != (batch, size):
        raise ValueError(
            f"prepend_embeds must have shape [{batch}, length, {size}] (batch, prepended, embedding_size), got "
            f"{tuple(prepend_embeds.shape)}"
        )
    if prepend_mask is not None and prepend_mask.shape != prepend_embeds.shape[:2]:
        raise ValueError(
            f"prepend_mask must have shape {tuple(prepend_embeds.shape[:2])}, got {tuple(prepend_mask.shape)}"
        )
    if past_key_values is not None and not config.prepend_embeddings:
        raise ValueError(
            "prepend_embeds with a cache need a model with prepend_embeddings=True, whose cache knows them from "
            "tokens; got False (use_cache=False does without)"
        )


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
