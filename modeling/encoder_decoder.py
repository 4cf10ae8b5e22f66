"""An encoder–decoder of two stacks, and its language modelling head, written once for all architectures.

As in `heads.py`, the classes come before an architecture's `…PreTrainedModel` among the bases of a model.
"""

from typing import Unpack

import torch
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import TransformersKwargs, can_return_tuple

from .cache_name import CACHE, takes_cache
from .heads import LanguageModelHead
from .shifted_labels import shift_labels_right


class EncoderDecoderBody:
    """`forward` of an `encoder`, and a `decoder` that reads it through cross-attention."""

    output_class = Seq2SeqModelOutput
    encoder_output_class = BaseModelOutput

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, new_embeddings):
        self.encoder.embed_tokens = new_embeddings

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """The decoder's hidden states `[B, N, hidden_size]`.

        Args:
            input_ids, attention_mask, inputs_embeds: the encoder's, as in its own `forward`.
            decoder_input_ids: `[B, N]`, int; or `decoder_inputs_embeds` `[B, N, hidden_size]`, exactly one of the two.
            decoder_attention_mask: `[B, everything seen]`, 1 at real tokens and 0 at padding, or None.
            encoder_outputs: what the encoder returned before, instead of its inputs.
            past_key_values: a cache of the decoder.
            use_cache: return a cache.

        Raises:
            ValueError: inputs of a wrong shape, ids or positions outside their tables.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = self.encoder_output_class(*encoder_outputs)
        outputs = self.decode(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return self.output_class(
            last_hidden_state=outputs.last_hidden_state,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
            **self.of_encoder(encoder_outputs),
        )

    def decode(self, **inputs):
        """The decoder's output; its `input_ids` and `inputs_embeds` are those of the decoder."""
        return self.decoder(**inputs)

    def of_encoder(self, encoder_outputs) -> dict:
        """What the encoder gave beside hidden states and attention weights, by its name in `output_class`."""
        return {}


class PairOfStacks(EncoderDecoderBody):
    """Encoder and decoder are two stacks of one class; their token embeddings may be one table."""

    stack_class: type

    def __init__(self, config):
        super().__init__(config)
        if not config.is_encoder_decoder:
            raise ValueError(f"{type(self).__name__} needs config.is_encoder_decoder=True, got False")
        if config.share_embeddings:
            self._tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}
        self.encoder = self.make_encoder(config)
        self.decoder = self.stack_class(config.decoder_config())
        self.post_init()

    def make_encoder(self, config):
        """What the decoder reads."""
        return self.stack_class(config.encoder_config())

    def set_input_embeddings(self, new_embeddings):
        super().set_input_embeddings(new_embeddings)
        if self.config.share_embeddings:
            self.decoder.embed_tokens = new_embeddings


class Seq2SeqLMHead(LanguageModelHead):
    """An encoder–decoder that predicts tokens. As in `CausalLMHead`, `GenerationMixin` comes beside it."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    output_class = Seq2SeqLMOutput

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """Logits `[B, N, vocab_size]` of the decoder; arguments as in `EncoderDecoderBody.forward`, and:

        Args:
            decoder_input_ids: `[B, N]`; the labels moved right by one behind `decoder_start_token_id` if not given.
            labels: `[B, N]`, the tokens to produce at each position (not shifted), -100 where nothing is learned.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.logits_of(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            # The labels already stand where they are predicted: the masked loss is the one that does not shift.
            loss = ForMaskedLMLoss(logits, labels.contiguous(), self.config.vocab_size, **kwargs)
        shared = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return self.output_class(loss=loss, logits=logits, **shared)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """The decoder's inputs for `labels` `[B, N]`: see `shift_labels_right`."""
        return shift_labels_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)
