"""The stacks of blocks that the classes of CoLT5 are made of: encoder, decoder and causal decoder."""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.colt5 import CoLT5Config
from .cache_name import CACHE
from .checked_model import CheckedPreTrainedModel
from .colt5_layers import CoLT5CausalLayer, CoLT5DecoderLayer, CoLT5EncoderLayer
from .heavy_attention import HeavyAttention
from .input_checks import check_attention_mask, check_inputs
from .norms import make_norm
from .relative_position_bias import RelativePositionBias
from .routed_cache import RoutedStateLayer
from .token_router import Routing, TokenRouter


# Which part of the whole a class is.
ENCODER_ONLY = {"is_encoder_decoder": False, "is_decoder": False}
CAUSAL = {"is_encoder_decoder": False, "is_decoder": True}
ENCODER_DECODER = {"is_encoder_decoder": True, "is_decoder": False}

# Every router's decisions, in the order in which a block makes them: queries, keys, feed-forward.
ROUTER_RECORDER = OutputRecorder(TokenRouter, index=0)


@dataclass
class RoutedModelOutput(BaseModelOutput):
    """With `router_logits`, if `output_router_logits=True`: a `Routing` for the queries, the keys and the feed-forward
    of each layer, in this order."""

    router_logits: tuple[Routing, ...] | None = None


@dataclass
class RoutedModelOutputWithPast(BaseModelOutputWithPastAndCrossAttentions):
    """As `RoutedModelOutput`, with a cache."""

    router_logits: tuple[Routing, ...] | None = None


class CoLT5PreTrainedModel(CheckedPreTrainedModel):
    """What every CoLT5 class shares: flags for transformers, and the initial values of weights.

    Matrices keep the variance of what they multiply, as T5's do; where T5 leaves out the `1 / sqrt(head_dim)` of the
    attention and makes up for it in the initial queries, it stands here in the attention.
    """

    config: CoLT5Config
    _no_split_modules = ["CoLT5EncoderLayer", "CoLT5DecoderLayer", "CoLT5CausalLayer", "CoLT5ImageLayer"]
    _can_record_outputs = {}
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        factor = self.config.initializer_factor
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=factor * module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=factor)
        elif isinstance(module, RelativePositionBias):
            init.normal_(module.weight, std=factor * self.config.hidden_size**-0.5)
        elif isinstance(module, TokenRouter):
            if module.routing_vectors is not None:
                init.normal_(module.routing_vectors, std=module.hidden_size**-0.5)
        elif isinstance(module, HeavyAttention):
            for vector in (module.null_query_token, module.null_key, module.null_value):
                if vector is not None:
                    init.normal_(vector)
        else:
            super()._init_weights(module)


class RoutedStack(CoLT5PreTrainedModel):
    """What encoder and causal decoder share: embeddings, the position biases of both branches, the last norm."""

    def __init__(self, config: CoLT5Config, *, bidirectional: bool):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        table = (config.relative_attention_num_buckets, config.relative_attention_max_distance)
        self.light_position_bias = RelativePositionBias(
            table[0], config.num_light_attention_heads, table[1], bidirectional=bidirectional
        )
        self.heavy_position_bias = None
        if config.heavy_position_embedding_type == "relative_bias":
            self.heavy_position_bias = RelativePositionBias(
                table[0], config.num_heavy_attention_heads, table[1], bidirectional=bidirectional
            )
        self.dropout = nn.Dropout(config.dropout_rate)
        self.norm = make_norm("rms_norm", config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Embeddings `[B, N, C]` of ids `[B, N]`, or those given, after their check."""
        check_inputs(input_ids, inputs_embeds, self.embed_tokens)
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def biases(self) -> tuple[Tensor, Tensor | None]:
        """The distance biases of the light and the heavy heads."""
        return self.light_position_bias(), None if self.heavy_position_bias is None else self.heavy_position_bias()


class CoLT5Encoder(RoutedStack):
    """The encoder: conditional computation in every block."""

    _can_record_outputs = {"hidden_states": CoLT5EncoderLayer, "router_logits": ROUTER_RECORDER}

    def __init__(self, config: CoLT5Config):
        super().__init__(config.part(is_encoder_decoder=False, is_decoder=False), bidirectional=True)
        self.layers = nn.ModuleList([CoLT5EncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RoutedModelOutput:
        """See `CoLT5EncoderModel.forward`."""
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        check_attention_mask(attention_mask, inputs_embeds, 0, False)
        mask = None if attention_mask is None else attention_mask.to(torch.bool)
        hidden_states = self.dropout(inputs_embeds)
        light_bias, heavy_bias = self.biases()
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, light_bias, heavy_bias)
        return RoutedModelOutput(last_hidden_state=self.dropout(self.norm(hidden_states)))


class CoLT5Decoder(CoLT5PreTrainedModel):
    """The decoder: T5.1.1's, with multi-query cross-attention. It has no embeddings of its own."""

    _can_record_outputs = {"hidden_states": CoLT5DecoderLayer}

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.position_bias = RelativePositionBias(
            config.relative_attention_num_buckets,
            config.num_attention_heads,
            config.relative_attention_max_distance,
            bidirectional=False,
        )
        self.layers = nn.ModuleList([CoLT5DecoderLayer(config, index) for index in range(config.num_decoder_layers)])
        self.dropout = nn.Dropout(config.dropout_rate)
        self.norm = make_norm("rms_norm", config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Hidden states `[B, N, C]` for embeddings `[B, N, C]`; see `CoLT5Model.forward` for the rest."""
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = attention_mask
        if isinstance(mask, dict):
            # Made ahead by `generate` for a preallocated cache, as an addend: what the last query sees is what counts.
            mask = mask["full_attention"]
            mask = None if mask is None else mask[:, 0, -1] == 0
        else:
            check_attention_mask(mask, inputs_embeds, past_length, False)
            mask = None if mask is None else mask.to(torch.bool)
        encoder_mask = None if encoder_attention_mask is None else encoder_attention_mask.to(torch.bool)
        hidden_states, distance_bias = self.dropout(inputs_embeds), self.position_bias()
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                mask,
                encoder_mask,
                distance_bias,
                **{CACHE: past_key_values},
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.dropout(self.norm(hidden_states)), **{CACHE: past_key_values}
        )


class CoLT5CausalDecoder(RoutedStack):
    """A causal stack with conditional computation in every block; its routers know the past only."""

    _can_record_outputs = {"hidden_states": CoLT5CausalLayer, "router_logits": ROUTER_RECORDER}

    def __init__(self, config: CoLT5Config):
        super().__init__(config, bidirectional=False)
        self.layers = nn.ModuleList([CoLT5CausalLayer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> RoutedModelOutputWithPast:
        """See `CoLT5ForCausalLM.forward`."""
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and not all(
            isinstance(layer, RoutedStateLayer) for layer in past_key_values.layers or [None]
        ):
            raise ValueError("past_key_values must be made for this model, with DynamicCache(config=model.config)")
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        check_attention_mask(attention_mask, inputs_embeds, past_length, False)
        mask = None if attention_mask is None else attention_mask.to(torch.bool)
        hidden_states = self.dropout(inputs_embeds)
        light_bias, heavy_bias = self.biases()
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, light_bias, heavy_bias, **{CACHE: past_key_values})
        return RoutedModelOutputWithPast(
            last_hidden_state=self.dropout(self.norm(hidden_states)), **{CACHE: past_key_values}
        )
