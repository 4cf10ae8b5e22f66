"""What the PerceiverFlash models return."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class PerceiverFlashModelOutput(ModelOutput):
    """What the models without a head return.

    Attributes:
        last_hidden_state: latents `[B, M, hidden_size]`, or outputs `[B, Q, query_size or output_size]`.
        pooler_output: `[B, output_size]`, with `output_size`.
        past_key_values: the cache of a decoder.
        hidden_states: latents before each block and behind the last one.
        attentions: `[B, H, M, K]` for each block that ran, in order: cross-attention, then the self-attentions.
        cross_attentions: `[B, H, Q, M]`, where the queries looked.
        latent_mask: int64 `[B, M]`, 1 for latents of a decoder that belong to their row's window; None if all do.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    latent_mask: torch.Tensor | None = None


@dataclass
class PerceiverFlashHeadOutput(ModelOutput):
    """What the models with a head return: `loss`, `logits`, and the rest as in `PerceiverFlashModelOutput`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
