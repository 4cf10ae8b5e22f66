"""XTransformer for images and text: an image encoder, and a decoder that writes about what it saw.

`config.image_fusion` says how the two meet:

    cross_attention   the decoder reads the image's states through cross-attention: a captioner
    prepended         the image's states stand in front of the tokens of a text encoder, and the decoder reads both
                      through cross-attention: PaLI (arXiv 2209.06794)

Cost: that of an encoder–decoder whose encoder has the patches (and the source's tokens) as its input.
"""

from typing import Unpack

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration.x_transformer import XTransformerConfig
from .cache_name import takes_cache
from .encoder_decoder import Seq2SeqLMHead
from .x_transformer import (
    ScaledLogits,
    XTransformerEncoderDecoderModel,
    XTransformerModel,
    XTransformerPreTrainedModel,
)
from .x_transformer_images import XTransformerImageEncoder


class XTransformerImageTextEncoder(XTransformerModel):
    """An encoder of text in front of whose tokens stand the states of an image."""

    input_modalities = ("image", "text")

    def __init__(self, config: XTransformerConfig, image_config: XTransformerConfig):
        super().__init__(config)
        self.vision_tower = XTransformerImageEncoder(image_config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        """States `[B, P + N, hidden_size]` of P patches and N tokens; without an image, of the tokens.

        Args:
            input_ids, attention_mask, inputs_embeds: of the text, as in `XTransformerModel.forward`.
            pixel_values: `[B, num_channels, height, width]`; or `image_embeds` `[B, P, C]`, what the image encoder
                makes of it.

        Raises:
            ValueError: both of them are given.
        """
        if pixel_values is not None and image_embeds is not None:
            raise ValueError("at most one of pixel_values and image_embeds must be given, got both")
        if pixel_values is not None:
            image_embeds = self.vision_tower(pixel_values).last_hidden_state
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            prepend_embeds=image_embeds,
            keep_prepended=True,
            **kwargs,
        )
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class XTransformerImageTextModel(XTransformerEncoderDecoderModel):
    """Image encoder, text encoder (if images are prepended to one) and decoder, without a head."""

    input_modalities = ("image", "text")

    def make_encoder(self, config: XTransformerConfig) -> XTransformerModel:
        config.check_image_and_text()
        if config.image_fusion == "prepended":
            return XTransformerImageTextEncoder(config.encoder_config(), config.image_encoder_config())
        return XTransformerImageEncoder(config.image_encoder_config())

    def get_input_embeddings(self):
        return (self.encoder if self.config.image_fusion == "prepended" else self.decoder).embed_tokens

    def set_input_embeddings(self, new_embeddings):
        if self.config.image_fusion == "prepended":
            super().set_input_embeddings(new_embeddings)
        else:
            self.decoder.embed_tokens = new_embeddings

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqModelOutput:
        """The decoder's hidden states `[B, N, hidden_size]`; see `XTransformerForImageTextToText.forward`."""
        reads_text = self.config.image_fusion == "prepended"
        if encoder_outputs is None and reads_text:
            encoder_outputs = self.encoder(
                input_ids, attention_mask, inputs_embeds, pixel_values, image_embeds, return_dict=True, **kwargs
            )
        elif encoder_outputs is None:
            if input_ids is not None or inputs_embeds is not None:
                raise ValueError(
                    "input_ids and inputs_embeds are the source text of a model with image_fusion='prepended'; a "
                    "captioner reads images: pass the caption as decoder_input_ids"
                )
            if (pixel_values is None) == (image_embeds is None):
                came = "neither" if pixel_values is None else "both"
                raise ValueError(f"exactly one of pixel_values and image_embeds must be given, got {came}")
            if image_embeds is not None:
                encoder_outputs = BaseModelOutput(last_hidden_state=image_embeds)
            else:
                encoder_outputs = self.encoder(pixel_values, **kwargs)
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if not reads_text:
            attention_mask = None
        elif attention_mask is not None:
            # Patches stand in front of the tokens and all of them count.
            patches = encoder_outputs[0].shape[1] - attention_mask.shape[1]
            attention_mask = nn.functional.pad(attention_mask, (patches, 0), value=1)
        return super().forward(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class XTransformerForImageTextToText(ScaledLogits, Seq2SeqLMHead, XTransformerPreTrainedModel, GenerationMixin):
    """Writes text about images: a captioner, or an answer to a text and an image (`config.image_fusion`)."""

    body_class = XTransformerImageTextModel
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    output_modalities = ("text",)

    def add_head(self, config: XTransformerConfig) -> None:
        super().add_head(config)
        if config.image_fusion == "prepended":
            self.main_input_name = "input_ids"

    @takes_cache
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Seq2SeqLMOutput:
        """Logits `[B, N, vocab_size]` of the decoder.

        Args:
            pixel_values: `[B, num_channels, height, width]`, floating point; `patch_size` divides height and width.
            input_ids, attention_mask, inputs_embeds: the source text `[B, M]`, if images are prepended to one (which
                then needs no image). A captioner has none and does not look at `attention_mask`: images are seen
                whole. (`generate` takes a captioner's `input_ids` for the beginning of the caption.)
            decoder_input_ids: `[B, N]`; the labels moved right by one behind `decoder_start_token_id` if not given.
            decoder_attention_mask: `[B, everything seen]`, 1 at real tokens.
            encoder_outputs: what the encoder returned before, instead of its inputs.
            image_embeds: `[B, P, C]`, states of the image encoder, instead of `pixel_values`.
            labels: `[B, N]`, the tokens to produce at each position (not shifted), -100 where nothing is learned.

        Raises:
            ValueError: inputs that do not go together, or of a wrong shape.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_embeds=image_embeds,
            **kwargs,
        )

    def _prepare_decoder_input_ids_for_generation(self, batch_size, model_input_name, model_kwargs, **kwargs):
        ids, mask = model_kwargs.get("input_ids"), model_kwargs.get("attention_mask")
        if model_input_name == "pixel_values" and ids is not None and mask is not None and mask.shape == ids.shape:
            # The beginning of a caption, and its mask.
            model_kwargs["decoder_attention_mask"] = model_kwargs.pop("attention_mask")
        return super()._prepare_decoder_input_ids_for_generation(batch_size, model_input_name, model_kwargs, **kwargs)
