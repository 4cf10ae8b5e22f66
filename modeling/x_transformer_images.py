"""XTransformer for images: patches in place of tokens, then the blocks of an encoder (Simple ViT, arXiv 2205.01580).

    x = embedding of the patches + positions                             XTransformerImageEmbeddings.forward
    x = blocks([x, registers])                                           XTransformerModel.forward
    logits = classifier(mean over patches of norm(x))                    XTransformerForImageClassification.forward

Cost: that of an encoder for `(height / patch_size) · (width / patch_size)` tokens.
"""

from typing import Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration.x_transformer import XTransformerConfig
from .heads import ImageClassificationHead
from .image_patches import PatchEmbedding, resized_positions, sincos_positions
from .norm_family import layer_norm
from .x_transformer import XTransformerModel, XTransformerPreTrainedModel


class XTransformerImageEmbeddings(nn.Module):
    """Images `[B, channels, height, width]` to patches in reading order, with registers behind them."""

    def __init__(self, config: XTransformerConfig):
        super().__init__()
        size = self.embedding_dim = config.hidden_size
        self.kind, self.grid = config.image_positions, config.image_grid
        self.patches = PatchEmbedding(
            config.patch_size, config.num_channels, size, eps=config.layer_norm_eps, norm_bias=config.norm_bias
        )
        self.positions = self.registers = None
        if self.kind == "learned":
            self.positions = nn.Parameter(torch.empty(self.grid[0] * self.grid[1], size))
        self.norm = layer_norm(config, size) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embedding_dropout)
        if config.num_register_tokens:
            self.registers = nn.Parameter(torch.empty(config.num_register_tokens, size))
        self.initializer_range = config.initializer_range

    def set_initial_values(self) -> None:
        for table in (self.positions, self.registers):
            if table is not None:
                init.normal_(table, std=self.initializer_range)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, patches + registers, hidden_size]` for `pixel_values` `[B, channels, height, width]`."""
        maps = self.patches(pixel_values)
        rows, columns, size = maps.shape[1:]
        hidden_states = maps.flatten(1, 2)
        if self.kind == "learned":
            hidden_states = hidden_states + resized_positions(self.positions, self.grid, (rows, columns))
        elif self.kind == "sincos":
            positions = sincos_positions(rows, columns, size, device=maps.device, dtype=maps.dtype)
            hidden_states = hidden_states + positions.flatten(0, 1)
        hidden_states = self.dropout(self.norm(hidden_states))
        if self.registers is None:
            return hidden_states
        registers = self.registers.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
        return torch.cat([hidden_states, registers], dim=1)


class Unchanged(nn.Module):
    """In place of `XTransformerEmbeddings`: patches have their positions already."""

    def forward(self, inputs_embeds: torch.Tensor, *_) -> torch.Tensor:
        return inputs_embeds


class XTransformerImageEncoder(XTransformerModel):
    """The stack of an encoder over the patches of an image."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def make_inputs(self, config: XTransformerConfig) -> tuple[nn.Module, nn.Module]:
        config.check_image_encoder()
        return XTransformerImageEmbeddings(config), Unchanged()

    @can_return_tuple
    # Not called `kwargs`: an encoder with those is given all that `generate` was given, the decoder's ids as well.
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **options: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """Normed hidden states `[B, patches, hidden_size]`, without the registers.

        Args:
            pixel_values: `[B, num_channels, height, width]`, floating point; `patch_size` divides height and width.
            output_attentions, output_hidden_states: as everywhere in transformers.

        Raises:
            ValueError: another shape or dtype.
        """
        recorded = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        options |= {name: wish for name, wish in recorded.items() if wish is not None}
        registers = self.config.num_register_tokens
        outputs = super().forward(inputs_embeds=self.embed_tokens(pixel_values), **options)
        hidden_states = outputs.last_hidden_state
        return BaseModelOutput(
            last_hidden_state=hidden_states[:, :-registers] if registers else hidden_states,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class XTransformerForImageClassification(ImageClassificationHead, XTransformerPreTrainedModel):
    """One label for an image, read from the pooled patches (`config.classifier_pooling`)."""

    body_class = XTransformerImageEncoder
