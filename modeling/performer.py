"""Performer (arXiv 2009.14794): a Transformer whose attention costs time and memory linear in the length.

What differs from a plain Transformer is the attention: softmax weights `exp(q·k)` are replaced by products of
non-negative random features `φ(q)·φ(k)` (FAVOR+), so that the sums over the keys can be formed once and read by every
query. A decoder carries those sums as a state of constant size instead of a cache that grows. The operation is
`kernels/linear_attention`; blocks are in `performer_layer.py`, attention in `performer_attention.py`. Blocks may mix
in softmax heads over a window or be full softmax attention, which exact recall over long distances needs
(arXiv 2507.06457).

Cost of a block for N tokens, M features, H heads of size D: O(N M D H) time; O(M D H) state.
"""

from typing import Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.performer import PerformerConfig
from .cache_name import CACHE, takes_cache
from .checked_model import CheckedPreTrainedModel
from .encoder_decoder import PairOfStacks, Seq2SeqLMHead
from .feature_calibration import calibrate_features
from .feature_redraw import redraw_and_capture
from .few_rows import project
from .heads import (
    CausalLMHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
)
from .input_checks import check_attention_mask, check_inputs, check_positions
from .norms import ReZeroScale, ScaleNorm, make_norm
from .padding import count_positions
from .performer_attention import PerformerAttention, PerformerSoftmaxAttention
from .performer_inputs import make_attention_masks
from .performer_layer import PerformerLayer
from .positions import make_position_embedding
from .reversible import reversible_stack
from .rotary import rotary_tables


class PerformerPreTrainedModel(CheckedPreTrainedModel):
    """What every Performer class shares: flags for transformers, and the initial values of weights and buffers."""

    config: PerformerConfig
    _no_split_modules = ["PerformerLayer"]
    _supports_sdpa = True  # the softmax layers of hybrids
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PerformerLayer,
        "attentions": OutputRecorder(PerformerSoftmaxAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(PerformerSoftmaxAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: PerformerConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.feature_stabilizer == "sequence" and self.can_generate():
            self.generation_config.use_cache = False

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
        # Read once: a field of a configuration costs as much as a small operation, and a cached step is made of those.
        self.layer_kinds = frozenset(config.layer_types)
        self.reads_encoder, self.is_reversible = config.add_cross_attention, config.reversible
        self.can_cache = config.is_decoder and config.feature_stabilizer != "sequence"
        self.rotary_arguments = (config.head_dim, config.rotary_emb_base) if config.uses_rotary else None
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
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
        if self.reads_encoder and encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given to a model with add_cross_attention=True, got None")
        if past_key_values is not None and not self.can_cache:
            raise ValueError(
                "past_key_values needs is_decoder=True and feature_stabilizer='running', got "
                f"is_decoder={config.is_decoder}, feature_stabilizer={config.feature_stabilizer!r}"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # A reversible stack runs its blocks again in the backward pass, when a cache would already hold their tokens.
        recomputes = self.is_reversible and torch.is_grad_enabled() and past_key_values is None
        if use_cache and past_key_values is None and config.is_decoder and not recomputes:
            past_key_values = self._new_cache()

        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = inputs_embeds.shape[1]
        check_attention_mask(attention_mask, inputs_embeds, past_length, self.layer_kinds == {"full_attention"})
        if position_ids is None:
            # The original counts padding as positions.
            counted = None if config.masked_keys_in_normalizer else attention_mask
            position_ids = count_positions(counted, past_length, length, inputs_embeds.device)
        check_positions(position_ids, config)

        hidden_states = self._embed(inputs_embeds, position_ids, token_type_ids)
        arguments = {
            "attention_masks": make_attention_masks(
                config,
                self.layer_kinds,
                hidden_states,
                attention_mask,
                position_ids,
                past_key_values,
                encoder_hidden_states,
                encoder_attention_mask,
            ),
            "position_ids": position_ids,
            "rotary": None if self.rotary_arguments is None else rotary_tables(position_ids, *self.rotary_arguments),
            CACHE: past_key_values,
        }
        projections = redraw_and_capture(self)
        if self.is_reversible:
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
            last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values}
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


class PerformerForCausalLM(CausalLMHead, PerformerPreTrainedModel, GenerationMixin):
    """A decoder with a language modelling head. Makes its configuration causal."""

    body_class = PerformerModel

    @classmethod
    def head_config(cls, config: PerformerConfig) -> PerformerConfig:
        causal = super().head_config(config)
        if causal is not config:
            causal.classifier_pooling = "last"
        return causal


class PerformerForMaskedLM(MaskedLMHead, PerformerPreTrainedModel):
    """An encoder with a head that predicts masked tokens, behind a dense layer with `config.mlm_head_transform`."""

    body_class = PerformerModel

    def add_head(self, config: PerformerConfig) -> None:
        self.transform = None
        if config.mlm_head_transform:
            norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
            dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.transform = nn.Sequential(dense, ACT2FN[config.hidden_act], norm)
        super().add_head(config)

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return project(self.lm_head, hidden_states if self.transform is None else self.transform(hidden_states))


class PerformerForSequenceClassification(SequenceClassificationHead, PerformerPreTrainedModel):
    """One label (or number) for a sequence, read from a pooled hidden state (`config.classifier_pooling`)."""

    body_class = PerformerModel

    def add_head(self, config: PerformerConfig) -> None:
        self.num_labels = config.num_labels
        self.transform = None
        if config.classifier_transform:
            self.transform = nn.Sequential(nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh())
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=config.classifier_bias)

    def pool(self, outputs, attention_mask, input_ids) -> torch.Tensor:
        pooled = super().pool(outputs, attention_mask, input_ids)
        return pooled if self.transform is None else self.transform(pooled)


class PerformerForTokenClassification(TokenClassificationHead, PerformerPreTrainedModel):
    """One label for each token."""

    body_class = PerformerModel


class PerformerForQuestionAnswering(QuestionAnsweringHead, PerformerPreTrainedModel):
    """The first and the last token of an answer inside the input."""

    body_class = PerformerModel


class PerformerEncoderDecoderModel(PairOfStacks, PerformerPreTrainedModel):
    """An encoder and a decoder that reads it through linear cross-attention, without a head."""

    stack_class = PerformerModel


class PerformerForConditionalGeneration(Seq2SeqLMHead, PerformerPreTrainedModel, GenerationMixin):
    """An encoder–decoder with a language modelling head."""

    body_class = PerformerEncoderDecoderModel
