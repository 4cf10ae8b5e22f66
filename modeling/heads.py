"""Heads: what stands on a body to make it a model for one task, written once for all architectures.

Each class here comes before an architecture's `…PreTrainedModel` among the bases of a public model, which names its
body and says what it does differently:

    class PerformerForTokenClassification(TokenClassificationHead, PerformerPreTrainedModel):
        body_class = PerformerModel

The body stands in `model`. `forward` hands on to the body, and to the loss, whatever else it is given. (transformers
has such mixins too. They look the body up through the Auto classes, which fails where the code comes with the
checkpoint.)
"""

import copy
from typing import Unpack

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    ImageClassifierOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import TransformersKwargs, can_return_tuple

from .cache_name import CACHE, takes_cache
from .few_rows import project
from .pooling import pool_hidden_states


class HeadOnBody:
    """A body in `model`, and beside it what `add_head` creates."""

    body_class: type

    def __init__(self, config):
        super().__init__(self.head_config(config))
        self.model = self.make_body(self.config)
        self.add_head(self.config)
        self.post_init()

    @classmethod
    def head_config(cls, config):
        """The configuration of this model, made of one that may have been written for another head."""
        return config

    def make_body(self, config):
        return self.body_class(config)

    def add_head(self, config) -> None:
        """Create the modules that stand on the body."""
        raise NotImplementedError


class LanguageModelHead(HeadOnBody):
    """A linear layer from hidden states to the vocabulary, whose weight may be that of the token embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def add_head(self, config) -> None:
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[B, N, vocab_size]` of the body's `hidden_states` `[B, N, hidden_size]`."""
        return project(self.lm_head, hidden_states)


class CausalLMHead(LanguageModelHead):
    """A decoder that predicts the next token. Makes its configuration causal.

    (A public model also has `GenerationMixin` among its own bases: transformers looks for it there.)
    """

    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    output_class = CausalLMOutputWithCrossAttentions
    passed_on = ("hidden_states", "attentions", "cross_attentions")  # of the body's output, beside the cache

    @classmethod
    def head_config(cls, config):
        if config.is_decoder:
            return config
        config = copy.deepcopy(config)
        config.is_decoder = True
        return config

    @takes_cache
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
    ):
        """Next-token logits `[B, N, vocab_size]`; arguments as for the body, and:

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
        logits = self.logits_of(outputs.last_hidden_state[:, kept])
        return self.output_class(
            loss=None if labels is None else self.loss_of(logits, labels, outputs, **kwargs),
            logits=logits,
            **{name: outputs.get(name) for name in (CACHE, *self.passed_on)},
        )

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor, outputs, **kwargs) -> torch.Tensor:
        """The loss of `logits` `[B, N, vocab_size]` and `labels` `[B, N]`; `outputs` are the body's."""
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)


class MaskedLMHead(LanguageModelHead):
    """An encoder that predicts masked tokens."""

    _fsdp_plan = {"lm_head": "keep_full_weight"}

    @classmethod
    def head_config(cls, config):
        if config.is_decoder:
            raise ValueError(f"{cls.__name__} looks both ways, so config.is_decoder must be False, got True")
        return config

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Logits `[B, N, vocab_size]`; `labels` `[B, N]` hold the original ids of masked tokens and -100 elsewhere."""
        kwargs["use_cache"] = False
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.logits_of(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            # The loss takes a view of the labels, which are often a slice.
            labels = labels.contiguous()
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.get("attentions")
        )


class ClassificationHead(HeadOnBody):
    """Dropout and a linear layer from hidden states to labels."""

    def add_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)


class SequenceClassificationHead(ClassificationHead):
    """One label (or number) for a sequence, read from a pooled hidden state (`config.classifier_pooling`)."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Logits `[B, num_labels]`; `labels` `[B]` ids, or floats for regression and several labels."""
        kwargs["use_cache"] = False
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(self.dropout(self.pool(outputs, attention_mask, input_ids)))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.get("attentions")
        )

    def pool(self, outputs, attention_mask, input_ids) -> torch.Tensor:
        """`[B, hidden_size]` of the real ones among the body's last hidden states `[B, N, hidden_size]`.

        Without a mask `[B, N]`, those are real whose `input_ids` are not `config.pad_token_id`.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        return pool_hidden_states(outputs.last_hidden_state, attention_mask, self.config.classifier_pooling)


class TokenClassificationHead(ClassificationHead):
    """One label for each token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Logits `[B, N, num_labels]`; `labels` `[B, N]`, -100 where there is none."""
        kwargs["use_cache"] = False
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels.contiguous(), self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.get("attentions")
        )


class ImageClassificationHead(ClassificationHead):
    """One label for an image, read from the pooled states of its patches (`config.classifier_pooling`)."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """Logits `[B, num_labels]` for `pixel_values` `[B, num_channels, height, width]`.

        Args:
            labels: `[B]` ids, or floats for regression and several labels.
        """
        outputs = self.model(pixel_values, **kwargs)
        logits = self.classify(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.get("attentions")
        )

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `[B, num_labels]` of the states of the patches."""
        return self.score(self.dropout(pool_hidden_states(hidden_states, None, self.config.classifier_pooling)))


class QuestionAnsweringHead(HeadOnBody):
    """The first and the last token of an answer inside the input."""

    def add_head(self, config) -> None:
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
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
            attentions=outputs.get("attentions"),
        )
