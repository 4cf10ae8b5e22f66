"""Bad input stops at the door of a model, with a message that says what was expected and what came."""

import torch


def can_look(tensor: torch.Tensor) -> bool:
    """Whether values may be read: not while tracing, and not where it would make the host wait for a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel() > 0


def check_inputs(input_ids, inputs_embeds, embed_tokens) -> None:
    """Exactly one of `input_ids` `[B, N]` (ids inside the table) and `inputs_embeds` `[B, N, C]`.

    Raises:
        ValueError: otherwise.
    """
    if (input_ids is None) == (inputs_embeds is None):
        came = "neither" if input_ids is None else "both"
        raise ValueError(f"exactly one of input_ids and inputs_embeds must be given, got {came}")
    size = embed_tokens.embedding_dim
    if inputs_embeds is not None:
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != size or not inputs_embeds.is_floating_point():
            raise ValueError(
                f"inputs_embeds must be floating point of shape [batch, length, {size}], got {inputs_embeds.dtype} of "
                f"shape {tuple(inputs_embeds.shape)}"
            )
        return
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids must be int64 or int32 of shape [batch, length], got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}"
        )
    if can_look(input_ids):
        # Of a few ids, as in a step of decoding, the numbers themselves are quicker than operators that look.
        numbers = input_ids.flatten().tolist() if input_ids.numel() <= 16 else [*map(int, torch.aminmax(input_ids))]
        low, high, count = min(numbers), max(numbers), embed_tokens.num_embeddings
        if low < 0 or high >= count:
            raise ValueError(f"input_ids must be between 0 and {count - 1}, got {low if low < 0 else high}")


def check_attention_mask(attention_mask, inputs_embeds, past_length: int, all_softmax: bool) -> None:
    """A mask `[B, past_length + N]`; other forms only where every layer is softmax attention.

    Raises:
        ValueError: otherwise.
    """
    if attention_mask is None or isinstance(attention_mask, dict) or (all_softmax and attention_mask.ndim == 4):
        return
    batch, length = inputs_embeds.shape[:2]
    expected = (batch, past_length + length)
    # A static cache counts on the device; its masks are as long as the cache.
    if isinstance(past_length, int) and tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask must have shape {expected} (batch, cached and new tokens), got "
            f"{tuple(attention_mask.shape)}"
        )


def check_positions(position_ids, config) -> None:
    """Positions inside the learned tables, where there are any.

    Raises:
        ValueError: otherwise.
    """
    if config.position_embedding_type not in ("learned", "axial") or not can_look(position_ids):
        return
    last = int(position_ids.max())
    if last >= config.max_position_embeddings:
        raise ValueError(
            f"the sequence must end before position {config.max_position_embeddings} (max_position_embeddings, the "
            f"size of the learned position table), got position {last}"
        )
