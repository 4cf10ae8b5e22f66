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

from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration.colt5 import CoLT5Config
from .colt5_stacks import (
    CAUSAL,
    ENCODER_DECODER,
    ENCODER_ONLY,
    CoLT5CausalDecoder,
    CoLT5Decoder,
    CoLT5Encoder,
    CoLT5PreTrainedModel,
    RoutedModelOutput,
)
from .encoder_decoder import EncoderDecoderBody, Seq2SeqLMHead
from .few_rows import project
from .heads import CausalLMHead, QuestionAnsweringHead, SequenceClassificationHead
from .input_checks import check_inputs
from .pooling import pool_hidden_states
from .token_router import Routing


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


class CoLT5Model(EncoderDecoderBody, CoLT5PreTrainedModel):
    """Encoder and decoder without a head. Both use the encoder's token embeddings."""

    output_class = CoLT5ModelOutput
    encoder_output_class = RoutedModelOutput

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(**ENCODER_DECODER))
        self.encoder = CoLT5Encoder(self.config)
        self.decoder = CoLT5Decoder(self.config)
        self.post_init()

    def decode(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, **inputs):
        if (input_ids is None) == (inputs_embeds is None):
            came = "neither" if input_ids is None else "both"
            raise ValueError(f"exactly one of decoder_input_ids and decoder_inputs_embeds must be given, got {came}")
        check_inputs(input_ids, inputs_embeds, self.encoder.embed_tokens)
        if inputs_embeds is None:
            inputs_embeds = self.encoder.embed_tokens(input_ids)
        return self.decoder(inputs_embeds=inputs_embeds, **inputs)

    def of_encoder(self, encoder_outputs) -> dict:
        return {"encoder_router_logits": encoder_outputs.get("router_logits")}


class T5Head:
    """T5's layer over the vocabulary: without a bias, and if it is the embeddings, which have unit variance, with a
    factor of `hidden_size**-0.5`, so that the logits have it too."""

    def add_head(self, config: CoLT5Config) -> None:
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits_of(self, hidden_states: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            hidden_states = hidden_states * self.config.hidden_size**-0.5
        return project(self.lm_head, hidden_states)


class CoLT5ForConditionalGeneration(T5Head, Seq2SeqLMHead, CoLT5PreTrainedModel, GenerationMixin):
    """An encoder–decoder with a language modelling head."""

    body_class = CoLT5Model
    output_class = CoLT5LMOutput
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    @classmethod
    def head_config(cls, config: CoLT5Config) -> CoLT5Config:
        return config.part(**ENCODER_DECODER)

    def get_encoder(self, modality=None):
        return self.model.encoder

    def get_decoder(self):
        return self.model.decoder


class OnEncoder:
    """What the heads on the encoder share: their configuration, and that they load the encoder of any checkpoint."""

    body_class = CoLT5EncoderModel
    _keys_to_ignore_on_load_unexpected = [r"decoder\.", r"lm_head\."]

    @classmethod
    def head_config(cls, config: CoLT5Config) -> CoLT5Config:
        return config.part(**ENCODER_ONLY)


class CoLT5ForSequenceClassification(OnEncoder, SequenceClassificationHead, CoLT5PreTrainedModel):
    """One label (or number) for a sequence, read from the mean of the encoder's states at real tokens."""

    def pool(self, outputs, attention_mask, input_ids) -> Tensor:
        return pool_hidden_states(outputs.last_hidden_state, attention_mask, "mean")


class CoLT5ForQuestionAnswering(OnEncoder, QuestionAnsweringHead, CoLT5PreTrainedModel):
    """The first and the last token of an answer inside the input, read from the encoder's states."""


class CoLT5ForCausalLM(T5Head, CausalLMHead, CoLT5PreTrainedModel, GenerationMixin):
    """A causal stack of routed blocks with a language modelling head. Makes its configuration causal.

    Which tokens are routed depends on the past only, see `CausalTokenRouter`; so a cached step gives what the whole
    sequence gives. Positions are relative, so `position_ids` change nothing.
    """

    body_class = CoLT5CausalDecoder
    output_class = CoLT5CausalLMOutput
    passed_on = ("hidden_states", "router_logits")

    @classmethod
    def head_config(cls, config: CoLT5Config) -> CoLT5Config:
        return config.part(**CAUSAL)
