"""What XTransformers return beside what every model of transformers does."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)


@dataclass
class XTransformerModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """`segment_memory` `[B, blocks, M, hidden_size]`: the memory for the next segment, with `config.mem_len`.

    `attention_z_loss`: a number to be added to the loss, with `config.attention_z_loss_coef`.
    `cls_states` `[B, num_cls_tokens, hidden_size]`: the last states of the CLS tokens.
    """

    segment_memory: torch.Tensor | None = None
    attention_z_loss: torch.Tensor | None = None
    cls_states: torch.Tensor | None = None


@dataclass
class XTransformerCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """`segment_memory` and `attention_z_loss` as in `XTransformerModelOutput`; `loss` has the latter in it."""

    segment_memory: torch.Tensor | None = None
    attention_z_loss: torch.Tensor | None = None
