"""CoLT5 (arXiv 2303.09752): an encoder–decoder for long inputs, through conditional computation.

Every token of the input goes through a light branch: attention of few heads to its neighbours, and a narrow
feed-forward. A learned router picks the tokens that matter; these also go through a heavy branch, global attention
among themselves and a wide feed-forward (`token_router.py`, `routed_attention.py`, `routed_feed_forward.py`; the
operations are `kernels/soft_topk` and `kernels/flash_attention`). The decoder is T5.1.1's, with multi-query
cross-attention. `output_router_logits=True` returns which tokens each layer picked and how much they count.

Cost of an encoder layer for n tokens of width d, with the paper's widths: 7.25 n d² + n² d / 84 multiplications, where
T5 needs 12 n d² + 2 n² d (section 3.4).
"""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration.colt5 import CoLT5Config
from .colt5_stacks import (
    CoLT5CausalDecoder,
    CoLT5Decoder,
    CoLT5Encoder,
    CoLT5ImageEncoder,
    CoLT5PreTrainedModel,
    RoutedModelOutput,
)
from .input_checks import check_inputs
from .token_router import Routing


ENCODER_ONLY = {"is_encoder_decoder": False, "is_decoder": False}
CAUSAL = {"is_encoder_decoder": False, "is_decoder": True}
ENCODER_DECODER = {"is_encoder_decoder": True, "is_decoder": False}


@dataclass
class CoLT5ModelOutput(Seq2SeqModelOutput):
    """With `encoder_router_logits`, if `output_router_logits=True`: see `RoutedModelOutput`."""

    encoder_router_logits: tuple[Routing, ...] | None = None


@dataclass
class CoLT5CausalLMOutput(CausalLMOutputWithPast):
    """With `router_logits`, if `output_router_logits=True`: see `RoutedModelOutput`."""

    router_logits: tuple[Routing, ...] | None = None


@dataclass
class CoLT5LMOutput(Seq2SeqLMOutput):
    """With `encoder_router_logits`, if `output_router_logits=True`: see `RoutedModelOutput`."""

    encoder_router_logits: tuple[Routing, ...] | None = None


class CoLT5EncoderModel(CoLT5PreTrainedModel):
    """The encoder alone. It loads the encoder of any CoLT5 checkpoint."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(**ENCODER_ONLY))
        self.encoder = CoLT5Encoder(self.config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RoutedModelOutput:
        """Hidden states `[B, N, hidden_size]` for `[B, N]` token ids.

        Args:
            input_ids: `[B, N]`, int; or `inputs_embeds` `[B, N, hidden_size]`, exactly one of the two.
            attention_mask: `[B, N]`, 1 at real tokens and 0 at padding (on either side), or None. A padded row routes
                as many tokens as it would alone.

        Raises:
            ValueError: inputs of a wrong shape, ids outside the table.
        """
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class CoLT5Model(CoLT5PreTrainedModel):
    """Encoder and decoder without a head. Both use the encoder's token embeddings."""

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(**ENCODER_DECODER))
        self.encoder = CoLT5Encoder(self.config)
        self.decoder = CoLT5Decoder(self.config)
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: RoutedModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CoLT5ModelOutput:
        """The decoder's hidden states `[B, N, hidden_size]`.

        Args:
            input_ids, attention_mask, inputs_embeds: the encoder's, see `CoLT5EncoderModel.forward`.
            decoder_input_ids: `[B, N]`, int; or `decoder_inputs_embeds` `[B, N, hidden_size]`, exactly one of the two.
            decoder_attention_mask: `[B, everything seen]`, 1 at real tokens.
            encoder_outputs: what the encoder returned before, instead of its inputs.
            past_key_values: a cache of the decoder.
            use_cache: return a cache.

        Raises:
            ValueError: inputs of a wrong shape, ids outside the table.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = RoutedModelOutput(*encoder_outputs)
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            came = "neither" if decoder_input_ids is None else "both"
            raise ValueError(f"exactly one of decoder_input_ids and decoder_inputs_embeds must be given, got {came}")
        check_inputs(decoder_input_ids, decoder_inputs_embeds, self.encoder.embed_tokens)
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.encoder.embed_tokens(decoder_input_ids)
        outputs = self.decoder(
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return CoLT5ModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_router_logits=encoder_outputs.get("router_logits"),
        )


class CoLT5ForConditionalGeneration(CoLT5PreTrainedModel, GenerationMixin):
    """An encoder–decoder with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(**ENCODER_DECODER))
        self.model = CoLT5Model(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality=None):
        return self.model.encoder

    def get_decoder(self):
        return self.model.decoder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: RoutedModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CoLT5LMOutput:
        """Logits `[B, N, vocab_size]` of the decoder; arguments as in `CoLT5Model.forward`, and:

        Args:
            decoder_input_ids: the labels moved right by one behind `decoder_start_token_id` if not given.
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
        hidden_states = outputs.last_hidden_state
        if self.config.tie_word_embeddings:
            # Embeddings have unit variance; so have the logits then, as in T5.
            hidden_states = hidden_states * self.config.hidden_size**-0.5
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            # The labels already stand where they are predicted: the masked loss is the one that does not shift.
            loss = ForMaskedLMLoss(logits, labels.contiguous(), self.config.vocab_size, **kwargs)
        shared = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CoLT5LMOutput(loss=loss, logits=logits, **shared)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's inputs for `labels` `[B, N]`: moved right by one behind the start token, -100 as padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "decoder_input_ids are made of labels with config.decoder_start_token_id and config.pad_token_id, got "
                f"{start} and {pad}"
            )
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, pad)


class CoLT5ForSequenceClassification(CoLT5PreTrainedModel):
    """One label (or number) for a sequence, read from the mean of the encoder's states at real tokens."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(**ENCODER_ONLY))
        self.num_labels = config.num_labels
        self.model = CoLT5EncoderModel(self.config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Logits `[B, num_labels]`; `labels` `[B]` ids, or floats for regression and several labels."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        if attention_mask is None:
            pooled = hidden_states.mean(dim=1)
        else:
            mask = attention_mask[..., None].to(hidden_states.dtype)
            pooled = (hidden_states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class CoLT5ForQuestionAnswering(CoLT5PreTrainedModel):
    """The first and the last token of an answer inside the input, read from the encoder's states."""

    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(**ENCODER_ONLY))
        self.model = CoLT5EncoderModel(self.config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits `[B, N]`; `start_positions` and `end_positions` `[B]`, ignored if outside the input."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=outputs.hidden_states
        )


class CoLT5ForCausalLM(CoLT5PreTrainedModel, GenerationMixin):
    """A causal stack of routed blocks with a language modelling head. Makes its configuration causal.

    Which tokens are routed depends on the past only, see `CausalTokenRouter`; so a cached step gives what the whole
    sequence gives.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(**CAUSAL))
        self.model = CoLT5CausalDecoder(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CoLT5CausalLMOutput:
        """Next-token logits `[B, N, vocab_size]`.

        Args:
            input_ids: `[B, N]`, int; or `inputs_embeds` `[B, N, hidden_size]`, exactly one of the two.
            attention_mask: `[B, everything seen]`, 1 at real tokens and 0 at padding, or None.
            past_key_values: a cache made with `DynamicCache(config=model.config)`.
            labels: `[B, N]`, the input ids themselves (the loss shifts them), -100 where nothing is to be learned.
            use_cache: return a cache.
            logits_to_keep: the last so many positions, or a tensor of positions; 0 is all.

        Raises:
            ValueError: inputs of a wrong shape, ids outside the table, a cache of another model.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        if self.config.tie_word_embeddings:
            hidden_states = hidden_states * self.config.hidden_size**-0.5
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CoLT5CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.get("router_logits"),
        )


class CoLT5ForImageClassification(CoLT5PreTrainedModel):
    """One label for an image: routed blocks over its patches, the mean of their states, a norm and a linear layer."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(**ENCODER_ONLY))
        self.num_labels = config.num_labels
        check_image_sizes(config)
        self.model = CoLT5ImageEncoder(self.config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """Logits `[B, num_labels]` for `pixel_values` `[B, num_channels, height, width]`; `labels` `[B]` ids."""
        outputs = self.model(pixel_values, **kwargs)
        pooled = self.model.norm(outputs.last_hidden_state.mean(dim=(1, 2)))
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def check_image_sizes(config: CoLT5Config) -> None:
    """Patches and windows divide the images.

    Raises:
        ValueError: otherwise.
    """
    size = config.patch_size * config.image_window_size
    if config.image_size % size:
        raise ValueError(
            f"image_size must be a multiple of patch_size · image_window_size ({size}), got {config.image_size}"
        )
