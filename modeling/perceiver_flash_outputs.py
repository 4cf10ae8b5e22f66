"""What the PerceiverFlash models return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)


@dataclass
class PerceiverFlashModelOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """What the models without a head return: transformers' fields, and the mask of the latents.

    Attributes:
        last_hidden_state: latents `[B, M, hidden_size]`, or outputs `[B, Q, query_size or output_size]`.
        pooler_output: `[B, output_size]`, with `output_size`.
        hidden_states: latents before each block and behind the last one.
        past_key_values: the cache of a decoder.
        attentions: `[B, H, M, K]` for each block that ran, in order: cross-attention, then the self-attentions.
        cross_attentions: `[B, H, Q, M]`, where the queries looked.
        latent_mask: int64 `[B, M]`, 1 for latents of a decoder that belong to their row's window; None if all do.
        latent_position_ids: `[B, M]`, where the latents stand for queries that turn (`query_rotary_dim`).
    """

    latent_mask: torch.Tensor | None = None
    latent_position_ids: torch.Tensor | None = None


@dataclass
class PerceiverFlashHeadOutput(CausalLMOutputWithCrossAttentions):
    """What the models with a head return: `loss`, `logits`, and the rest as in `PerceiverFlashModelOutput`."""
