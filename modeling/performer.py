"""Performer (arXiv 2009.14794): a Transformer whose attention costs time and memory linear in the length.

What differs from a plain Transformer is the attention: softmax weights `exp(q·k)` are replaced by products of
non-negative random features `φ(q)·φ(k)` (FAVOR+), so that the sums over the keys can be formed once and read by every
query. A decoder carries those sums as a state of constant size instead of a cache that grows. The operation is
`kernels/linear_attention`; blocks are in `performer_layer.py`, attention in `performer_attention.py`. Blocks may mix
in softmax heads over a window or be full softmax attention, which exact recall over long distances needs
(arXiv 2507.06457).

Cost of a block for N tokens, M features, H heads of size D: O(N M D H) time; O(M D H) state.
"""

import copy
from typing import Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.performer import PerformerConfig
from .checked_model import CheckedPreTrainedModel
from .feature_calibration import calibrate_features
from .feature_redraw import redraw_and_capture
from .input_checks import check_attention_mask, check_inputs, check_positions
from .norms import ReZeroScale, ScaleNorm, make_norm
from .performer_attention import PerformerAttention, PerformerSoftmaxAttention
from .performer_inputs import count_positions, make_attention_masks
from .performer_layer import PerformerLayer
from .positions import make_position_embedding
from .reversible import reversible_stack
from .rotary import rotary_tables


class PerformerPreTrainedModel(CheckedPreTrainedModel):
    """What every Performer class shares: flags for transformers, and the initial values of weights and buffers."""

    config: PerformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PerformerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True  # the softmax layers of hybrids
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PerformerLayer,
        "attentions": OutputRecorder(PerformerSoftmaxAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(PerformerSoftmaxAttention, index=1, layer_name="cross_attn"),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ScaleNorm):
            init.ones_(module.g)
        elif isinstance(module, ReZeroScale):
            init.constant_(module.g, ReZeroScale.INITIAL)
        elif isinstance(module, PerformerAttention):
            if module.projection_matrix is not None:
                init.copy_(module.projection_matrix, module.initial_projection())
            if module.pair_norm is not None:
                init.constant_(module.pair_norm, module.config.expected_pair_norm)
        elif isinstance(module, PerformerModel):
            init.zeros_(module.forwards_since_redraw)
            init.zeros_(module.num_redraws)


class PerformerModel(PerformerPreTrainedModel):
    """The stack of blocks between the embeddings and the heads: an encoder, or a decoder if `config.is_decoder`."""

    def __init__(self, config: PerformerConfig):
        super().__init__(config)
        if config.is_encoder_decoder:
            raise ValueError(
                "PerformerModel is one stack, so config.is_encoder_decoder must be False, got True: use "
                "PerformerForConditionalGeneration"
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_token_types = None
        if config.type_vocab_size:
            self.embed_token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embed_positions = make_position_embedding(config)
        norm_size = (config.hidden_size, config.norm_eps)
        self.embedding_norm = make_norm(config.norm_type if config.embedding_norm else "none", *norm_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([PerformerLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = make_norm(config.final_norm_type, *norm_size)
        # Saved with the weights, so that a resumed run draws when the uninterrupted one would have drawn.
        self.register_buffer("forwards_since_redraw", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_redraws", torch.zeros((), dtype=torch.int64))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Hidden states for `[B, N]` token ids.

        Args:
            input_ids: `[B, N]`, int; or `inputs_embeds` `[B, N, hidden_size]`, exactly one of the two.
            attention_mask: `[B, everything seen]`, 1 at real tokens and 0 at padding (on either side), or None.
            position_ids: `[B or 1, N]`; counted from each row's first real token if not given.
            past_key_values: a cache made with `DynamicCache(config=model.config)`; decoders only.
            token_type_ids: `[B, N]`, if `config.type_vocab_size`.
            encoder_hidden_states: `[B, K, hidden_size]`, if `config.add_cross_attention`.
            encoder_attention_mask: `[B, K]`, as `attention_mask`.
            use_cache: return a cache (decoders only).

        Raises:
            ValueError: inputs of a wrong shape, ids or positions outside their tables, a cache of another model.
        """
        config = self.config
        check_inputs(input_ids, inputs_embeds, self.embed_tokens)
        if config.add_cross_attention and encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given to a model with add_cross_attention=True, got None")
        if past_key_values is not None and (not config.is_decoder or config.feature_stabilizer == "sequence"):
            raise ValueError(
                "past_key_values needs is_decoder=True and feature_stabilizer='running', got "
                f"is_decoder={config.is_decoder}, feature_stabilizer={config.feature_stabilizer!r}"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # A reversible stack runs its blocks again in the backward pass, when a cache would already hold their tokens.
        recomputes = config.reversible and torch.is_grad_enabled() and past_key_values is None
        if use_cache and past_key_values is None and config.is_decoder and not recomputes:
            past_key_values = self._new_cache()

        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = inputs_embeds.shape[1]
        check_attention_mask(attention_mask, inputs_embeds, past_length, set(config.layer_types) == {"full_attention"})
        if position_ids is None:
            # The original counts padding as positions.
            counted = None if config.masked_keys_in_normalizer else attention_mask
            position_ids = count_positions(counted, past_length, length, inputs_embeds.device)
        check_positions(position_ids, config)

        hidden_states = self._embed(inputs_embeds, position_ids, token_type_ids)
        arguments = {
            "attention_masks": make_attention_masks(
                config,
                hidden_states,
                attention_mask,
                position_ids,
                past_key_values,
                encoder_hidden_states,
                encoder_attention_mask,
            ),
            "position_ids": position_ids,
            "rotary": rotary_tables(position_ids, config.head_dim, config.rotary_emb_base)
            if config.uses_rotary
            else None,
            "past_key_values": past_key_values,
        }
        projections = redraw_and_capture(self)
        if config.reversible:
            blocks = []
            for layer, captured in zip(self.layers, projections, strict=True):
                blocks += layer.reversible_blocks(projections=captured, **arguments, **kwargs)
            parameters = [p for p in self.layers.parameters() if p.requires_grad]
            hidden_states = reversible_stack(hidden_states, encoder_hidden_states, blocks, parameters, recomputes)
        else:
            for layer, captured in zip(self.layers, projections, strict=True):
                hidden_states = layer(
                    hidden_states, encoder_hidden_states, projections=captured, **arguments, **kwargs
                )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def _new_cache(self) -> Cache:
        cache = DynamicCache(config=self.config)
        if not self.config.add_cross_attention:
            return cache
        return EncoderDecoderCache(cache, DynamicCache(config=self.config))

    def _embed(self, inputs_embeds, position_ids, token_type_ids):
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids).to(hidden_states.dtype)
        if self.embed_token_types is not None:
            types = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
            hidden_states = hidden_states + self.embed_token_types(types)
        return self.embedding_dropout(self.embedding_norm(hidden_states))

    def calibrate_features(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> None:
        """Measure `E|q + k|²` in every layer on a batch, for `feature_map="optimal_positive"`.

        The features are unbiased whatever the value is; a measured one makes their variance smallest.

        Args:
            input_ids, attention_mask: `[B, N]` each, as in `forward`.

        Raises:
            ValueError: another feature map, which has nothing to calibrate.
        """
        calibrate_features(self, input_ids, attention_mask)


class PerformerForCausalLM(PerformerPreTrainedModel, GenerationMixin):
    """A decoder with a language modelling head. Makes its configuration causal."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PerformerConfig):
        if not config.is_decoder:
            config = copy.deepcopy(config)
            config.is_decoder = True
            config.classifier_pooling = "last"
        super().__init__(config)
        self.model = PerformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()
        if config.feature_stabilizer == "sequence":
            self.generation_config.use_cache = False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithCrossAttentions:
        """Next-token logits `[B, N, vocab_size]`; arguments as in `PerformerModel.forward`, and:

        Args:
            labels: `[B, N]`, the input ids themselves (the loss shifts them), -100 where nothing is to be learned.
            logits_to_keep: the last so many positions, or a tensor of positions; 0 is all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


class PerformerForMaskedLM(PerformerPreTrainedModel):
    """An encoder with a head that predicts masked tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PerformerConfig):
        super().__init__(config)
        if config.is_decoder:
            raise ValueError("PerformerForMaskedLM looks both ways, so config.is_decoder must be False, got True")
        self.model = PerformerModel(config)
        self.transform = None
        if config.mlm_head_transform:
            norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
            dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.transform = nn.Sequential(dense, ACT2FN[config.hidden_act], norm)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Logits `[B, N, vocab_size]`; `labels` `[B, N]` hold the original ids of masked tokens and -100 elsewhere."""
        kwargs["use_cache"] = False
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states if self.transform is None else self.transform(hidden_states))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class PerformerForSequenceClassification(PerformerPreTrainedModel):
    """One label (or number) for a sequence, read from a pooled hidden state (`config.classifier_pooling`)."""

    def __init__(self, config: PerformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = PerformerModel(config)
        self.transform = None
        if config.classifier_transform:
            self.transform = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Logits `[B, num_labels]`; `labels` `[B]` ids, or floats for regression and several labels."""
        kwargs["use_cache"] = False
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        mask = attention_mask
        if mask is None and input_ids is not None and self.config.pad_token_id is not None:
            mask = input_ids != self.config.pad_token_id
        pooled = self._pool(outputs.last_hidden_state, mask)
        logits = self.score(self.dropout(pooled if self.transform is None else self.transform(pooled)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _pool(self, hidden_states, mask):
        if mask is None:
            mask = torch.ones(hidden_states.shape[:2], device=hidden_states.device)
        mask = mask.to(hidden_states.dtype)
        if self.config.classifier_pooling == "mean":
            total = mask.sum(dim=1, keepdim=True).clamp(min=1)
            return (hidden_states * mask[..., None]).sum(dim=1) / total
        order = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        order = order if self.config.classifier_pooling == "last" else order.flip(0)
        index = ((mask != 0) * order).argmax(dim=1)
        return hidden_states[torch.arange(len(index), device=index.device), index]


class PerformerForTokenClassification(PerformerPreTrainedModel):
    """One label for each token."""

    def __init__(self, config: PerformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = PerformerModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Logits `[B, N, num_labels]`; `labels` `[B, N]`, -100 where there is none."""
        kwargs["use_cache"] = False
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class PerformerForQuestionAnswering(PerformerPreTrainedModel):
    """The first and the last token of an answer inside the input."""

    def __init__(self, config: PerformerConfig):
        super().__init__(config)
        self.model = PerformerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        start_positions=None,
        end_positions=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Start and end logits `[B, N]`; `start_positions` and `end_positions` `[B]`, ignored if outside the input."""
        kwargs["use_cache"] = False
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PerformerEncoderDecoderModel(PerformerPreTrainedModel):
    """An encoder and a decoder that reads it through linear cross-attention, without a head."""

    def __init__(self, config: PerformerConfig):
        super().__init__(config)
        if not config.is_encoder_decoder:
            raise ValueError(f"{type(self).__name__} needs config.is_encoder_decoder=True, got False")
        if config.share_embeddings:
            self._tied_weights_keys = {"encoder.embed_tokens.weight": "decoder.embed_tokens.weight"}
        self.encoder = PerformerModel(config.encoder_config())
        self.decoder = PerformerModel(config.decoder_config())
        self.post_init()

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, new_embeddings):
        self.encoder.embed_tokens = new_embeddings
        if self.config.share_embeddings:
            self.decoder.embed_tokens = new_embeddings

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
    ) -> Seq2SeqModelOutput:
        """The decoder's hidden states `[B, N, hidden_size]`; arguments as in `PerformerModel.forward`, and:

        Args:
            encoder_outputs: what the encoder returned before, instead of its inputs.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
            )
        elif isinstance(encoder_outputs, tuple):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            past_key_values=past_key_values,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            decoder_attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )


class PerformerForConditionalGeneration(PerformerPreTrainedModel, GenerationMixin):
    """An encoder–decoder with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PerformerConfig):
        super().__init__(config)
        self.model = PerformerEncoderDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()
        if config.feature_stabilizer == "sequence":
            self.generation_config.use_cache = False

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
    ) -> Seq2SeqLMOutput:
        """Logits `[B, N, vocab_size]` of the decoder; arguments as in `PerformerEncoderDecoderModel.forward`, and:

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
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            # The labels already stand where they are predicted: the masked loss is the one that does not shift.
            loss = ForMaskedLMLoss(logits, labels, self.config.vocab_size, **kwargs)
        shared = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return Seq2SeqLMOutput(loss=loss, logits=logits, **shared)

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """The decoder's inputs for `labels` `[B, N]`: moved right by one behind the start token, -100 as padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                "decoder_input_ids are made of labels with config.decoder_start_token_id and config.pad_token_id, got "
                f"{start} and {pad}"
            )
        shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, pad)
