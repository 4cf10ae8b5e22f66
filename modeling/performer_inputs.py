"""What a Performer's blocks need beside hidden states: a mask for each way a block may look."""

import torch
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from ..configuration.performer import LINEAR_LAYER_TYPE
from .cache_name import CACHE
from .padding import padding_among_new_tokens


def make_attention_masks(
    config, kinds, hidden_states, mask, position_ids, past_key_values, encoder_hidden_states, encoder_mask
) -> dict[str, torch.Tensor | None]:
    """The masks that the blocks choose from, each None where nothing is masked or no block needs it.

    Args:
        kinds: the set of `config.layer_types`.

    Returns:
        `"padding"` `[B, N]`: real tokens among the new ones, for linear heads and the token shift.
        `"window"` `[B, everything seen]`: the same over all tokens, for local heads, which also see cached keys.
        `"full"`: whatever transformers makes for softmax layers, in the form that their implementation wants.
        `"encoder_padding"` `[B, K]`, `"encoder_full"`: the same two for cross-attention.
    """
    masks = dict.fromkeys(("padding", "window", "full", "encoder_padding", "encoder_full"))
    if isinstance(
        mask, dict
    ):  # generate made them ahead of a compiled step, which happens to pure softmax stacks only
        return {**masks, "full": mask["full_attention"]}
    if LINEAR_LAYER_TYPE in kinds or config.shift_tokens:
        masks["padding"] = padding_among_new_tokens(mask, hidden_states.shape[1])
        masks["window"] = mask
        masks["encoder_padding"] = encoder_mask
    if kinds != {LINEAR_LAYER_TYPE}:
        common = {"config": config, "inputs_embeds": hidden_states, "attention_mask": mask}
        if config.is_decoder:
            # Of a preallocated cache, the slots not yet filled have to be masked even for a single new token.
            preallocated = past_key_values is not None and past_key_values.get_max_length() != -1
            masks["full"] = create_causal_mask(
                **common,
                **{CACHE: past_key_values},
                position_ids=position_ids,
                allow_is_causal_skip=not preallocated,
            )
        else:
            masks["full"] = create_bidirectional_mask(**common)
        if encoder_hidden_states is not None:
            common["attention_mask"] = encoder_mask
            masks["encoder_full"] = create_bidirectional_mask(**common, encoder_hidden_states=encoder_hidden_states)
    return masks
