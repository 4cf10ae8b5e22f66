"""PerceiverFlash: Perceiver (arXiv 2103.03206), Perceiver IO (arXiv 2107.14795) and Perceiver AR (arXiv 2202.07765).

What differs from a plain Transformer: a small array of latents reads the input by cross-attention, and all depth is
among the latents, so that only the reading grows with the input. Perceiver IO reads the result by as many queries as
there are outputs. Perceiver AR takes the last positions of a sequence for latents and hides what comes behind each.
Attention goes through transformers' attention interface, or over chunks of the input whose results are merged
(`streamed_attention.py`, on `kernels/flash_attention`), so that its keys and values need not fit in memory.

Cost for N inputs, M latents and L blocks: O(N M + L M²) time; memory for N keys and values, or for those of one chunk.
"""

from collections.abc import Iterator
from typing import Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.perceiver_flash import PerceiverFlashConfig
from .attention_masks import make_attention_mask
from .cache_name import CACHE, takes_cache
from .checked_model import CheckedPreTrainedModel
from .heads import CausalLMHead, HeadOnBody, LanguageModelHead
from .input_checks import check_attention_mask, check_inputs, check_positions
from .padding import count_positions
from .perceiver_flash_heads import (
    PerceiverFlashClassificationHead,
    PerceiverFlashDecoder,
    PerceiverFlashProjection,
    pool,
    pooled_size,
)
from .perceiver_flash_images import PerceiverFlashImageAdapter, PerceiverFlashImagePositions
from .perceiver_flash_inputs import (
    InputContext,
    checked_mask,
    drop_latents,
    expand_rows,
    feature_contexts,
    positions_or_range,
)
from .perceiver_flash_layer import PerceiverFlashAttention, PerceiverFlashLayer
from .perceiver_flash_outputs import PerceiverFlashHeadOutput, PerceiverFlashModelOutput
from .perceiver_flash_window import open_window
from .positions import SinusoidalPositionEmbedding
from .rotary import rotary_tables


# Numbers of keys and values of a row that a CPU reads at a time: 16 MiB, 4,096 inputs if both are 512 wide. There,
# 1,024 to 16,384 at a time took as long as each other, and the more, the more memory.
CPU_CHUNK = 2**22


class PerceiverFlashPreTrainedModel(CheckedPreTrainedModel):
    """What every PerceiverFlash class shares: flags for transformers, and the initial values of weights."""

    config: PerceiverFlashConfig
    _no_split_modules = ["PerceiverFlashLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": PerceiverFlashLayer,
        "attentions": OutputRecorder(PerceiverFlashAttention, index=1, layer_name="layers"),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PerceiverFlashImagePositions):
            module.reset()
        elif isinstance(module, PerceiverFlashModel):
            for parameter in (module.latents, *module.zero_tokens):
                if parameter is not None:
                    _truncated_normal(parameter, self.config.initializer_range)
        elif isinstance(module, PerceiverFlashDecoder) and module.queries is not None:
            _truncated_normal(module.queries, self.config.initializer_range)


def _truncated_normal(parameter, std):
    """Cut at ±2, as in arXiv 2103.03206, section C."""
    init.trunc_normal_(parameter, std=std, a=-2.0, b=2.0)


class PerceiverFlashModel(PerceiverFlashPreTrainedModel):
    """Inputs to latents: a Perceiver, the encoder of a Perceiver IO, or the stack of a Perceiver AR (`is_decoder`).

    Args:
        add_pooling_layer: whether `config.output_size` is that of `pooler_output`; a head has it for its own.
    """

    # Not the block in which a query pools.
    _can_record_outputs = PerceiverFlashPreTrainedModel._can_record_outputs | {
        "hidden_states": OutputRecorder(PerceiverFlashLayer, layer_name="layers")
    }

    def __init__(self, config: PerceiverFlashConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embed_tokens = self.embed_positions = self.image_adapter = None
        if config.modality == "text":
            self.embed_tokens = nn.Embedding(config.vocab_size, config.input_size, config.pad_token_id)
            if config.position_embedding_type == "learned":
                self.embed_positions = nn.Embedding(config.max_position_embeddings, config.input_size)
            elif config.position_embedding_type == "sinusoidal":
                self.embed_positions = SinusoidalPositionEmbedding(config.input_size, config.rotary_emb_base)
        elif config.modality == "image":
            self.image_adapter = PerceiverFlashImageAdapter(config)
        self.latents = None
        if not config.is_decoder and config.num_latents is not None:
            self.latents = nn.Parameter(torch.empty(config.num_latents, config.hidden_size))
        self.zero_tokens = nn.ParameterList(
            nn.Parameter(torch.empty(config.num_zero_tokens, size))
            for size in config.input_sizes * bool(config.num_zero_tokens)
        )
        self.layers = self._make_layers()
        self.norm = nn.Identity()
        if config.final_norm:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = None
        if add_pooling_layer and config.output_size is not None:
            if config.pooling == "query":
                self.pooler = PerceiverFlashDecoder(config, 1, config.output_size)
            else:
                self.pooler = PerceiverFlashProjection(config, pooled_size(config), config.output_size)
        self.gradient_checkpointing = False
        self.post_init()

    def _make_layers(self):
        config, layers, reads = self.config, nn.ModuleList(), 0
        for index, is_cross in config.layer_schedule:
            if index == len(layers):
                block = config.cross_block(config.input_sizes[reads]) if is_cross else config.latent_block()
                layers.append(PerceiverFlashLayer(config, block))
            reads += is_cross
        return layers

    def text_positions(self, tokens: torch.Tensor, attention_mask, position_ids, past_length: int = 0) -> torch.Tensor:
        """Positions `[B or 1, N]` of `tokens` `[B, N, …]`, counted over real ones if not given."""
        if position_ids is None:
            return count_positions(attention_mask, past_length, tokens.shape[1], tokens.device)
        return position_ids

    def _contexts(self, given, attention_mask, position_ids, past_length) -> list[InputContext]:
        """What each cross-attention reads."""
        config = self.config
        names = {"text": ("input_ids", "inputs_embeds"), "image": ("pixel_values",), "features": ("inputs",)}
        wanted = names[config.modality]
        wrong = [name for name, value in given.items() if value is not None and name not in wanted]
        if wrong or (config.modality != "text" and given[wanted[0]] is None):
            raise ValueError(
                f"modality={config.modality!r} reads {' or '.join(wanted)}, got {', '.join(wrong) or 'nothing'}"
            )
        if config.modality == "features":
            return feature_contexts(config, given["inputs"], attention_mask, position_ids)
        if config.modality == "image":
            states = self.image_adapter(given["pixel_values"])
            positions = positions_or_range(position_ids, states)
        else:
            check_inputs(given["input_ids"], given["inputs_embeds"], self.embed_tokens)
            states = given["inputs_embeds"]
            if states is None:
                states = self.embed_tokens(given["input_ids"])
            check_attention_mask(attention_mask, states, past_length, all_softmax=False)
            positions = self.text_positions(states, attention_mask, position_ids, past_length)
            check_positions(positions, config)
            if self.embed_positions is not None:
                states = states + self.embed_positions(positions).to(states.dtype)
        # A decoder's mask covers the cached tokens as well.
        mask = None if attention_mask is None else attention_mask != 0
        if config.modality == "image":
            mask = checked_mask(attention_mask, states)
        context = InputContext(states, mask, positions, states.shape[0])
        return [context] * config.num_cross_attention_layers

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | list | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        inputs: torch.Tensor | list | dict | Iterator | None = None,
        pixel_values: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        latent_position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PerceiverFlashModelOutput:
        """Latents `[B, M, hidden_size]`; exactly one of the four inputs must be given.

        Args:
            input_ids: `[B, N]`, int; or `inputs_embeds` `[B, N, input_size]`, to which positions are added.
            inputs: `[B, N, input_size]`, floating point; with several inputs a list or a dict of such, in which
                everything but the batch may differ. With one cross-attention and without gradients also an iterator
                of `[B, n, input_size]` (or pairs of that and a mask `[B, n]`), which is never in memory as a whole.
            pixel_values: `[B, C, H, W]`, or `[B, H, W, C]` with `channels_last`.
            attention_mask: `[B, N]` (`[B, everything seen]` with a cache), nonzero where an input counts, or None;
                with several inputs a list or a dict of those. A latent that sees no input reads zeros.
            position_ids: `[B or 1, N]`; counted from each row's first real token if not given.
            past_key_values: a cache made with `DynamicCache(config=model.config)`; decoders only.
            latents: `[M, hidden_size]` or `[B, M, hidden_size]`, any M, instead of the model's own.
            latent_position_ids: `[B or 1, M]`, where the latents stand for rotary positions; multiples of
                `config.latent_spacing` if not given.
            use_cache: return a cache (decoders only).

        Raises:
            ValueError: inputs that the configuration does not know, or of a wrong shape or dtype.
        """
        config = self.config
        if past_key_values is not None and not config.is_decoder:
            raise ValueError("past_key_values needs is_decoder=True, got is_decoder=False")
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        given = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "inputs": inputs,
            "pixel_values": pixel_values,
        }
        contexts = self._contexts(given, attention_mask, position_ids, past_length)
        if config.is_decoder:
            if latents is not None:
                raise ValueError("latents are the last inputs of a decoder, so none can be given, got some")
            return self._decode(contexts, past_key_values, past_length, use_cache, kwargs)

        contexts = [self._with_zero_tokens(index, context) for index, context in enumerate(contexts)]
        batch_size = contexts[0].batch_size
        latents = self.latents if latents is None else latents
        if latents is None:
            raise ValueError("latents must be given to a model with num_latents=None, got None")
        latents = expand_rows(latents, batch_size, config.hidden_size, "latents")
        positions = positions_or_range(latent_position_ids, latents, config.latent_spacing)
        if self.training and config.latent_drop:
            latents, positions = drop_latents(latents, positions, config.latent_drop)
        hidden_states = self.norm(self._run(latents, positions, contexts, None, None, kwargs))
        pooled = None
        if self.pooler is not None:
            if config.pooling == "query":
                pooled = self.pooler(hidden_states, latent_position_ids=positions)[:, 0]
            else:
                pooled = self.pooler(pool(hidden_states, config.pooling))
        positions = positions.expand(batch_size, -1) if config.query_rotary_dim else None
        return PerceiverFlashModelOutput(
            last_hidden_state=hidden_states, pooler_output=pooled, latent_position_ids=positions
        )

    def _with_zero_tokens(self, index, context):
        return context.behind(self.zero_tokens[index]) if self.config.num_zero_tokens else context

    def _decode(self, contexts, cache, past_length, use_cache, kwargs):
        config, context = self.config, contexts[0]
        recomputes = self.training and self.gradient_checkpointing
        if use_cache and cache is None and not recomputes:
            cache = DynamicCache(config=config)
        window = open_window(config, context.states, context.positions, context.mask, cache, past_length)
        hidden_states = self._run(
            window.hidden_states,
            window.positions,
            [context] * config.num_cross_attention_layers,
            window,
            cache,
            kwargs,
        )
        # Of a window that was computed anew, the latents of tokens that were there before.
        new = min(context.states.shape[1], hidden_states.shape[1])
        mask = None if window.key_mask is None else window.key_mask[:, -new:].long()
        return PerceiverFlashModelOutput(
            last_hidden_state=self.norm(hidden_states)[:, -new:], latent_mask=mask, **{CACHE: cache}
        )

    def _run(self, hidden_states, positions, contexts, window, cache, kwargs):
        """All blocks; `window` and `cache` are those of a decoder."""
        config, contexts = self.config, iter(contexts)
        causal, count = window is not None, hidden_states.shape[1]
        tables = self._rotary(positions, config.rotary_dim)
        for number, (index, is_cross) in enumerate(config.layer_schedule):
            layer, layer_past = self.layers[index], None if cache is None else cache.layers[number]
            if is_cross:
                hidden_states = self._read(layer, hidden_states, positions, next(contexts), causal, layer_past, kwargs)
                continue
            keys = count + (0 if layer_past is None else layer_past.get_seq_length())
            mask = make_attention_mask(
                config._attn_implementation,
                window.key_mask if causal else None,
                count,
                keys,
                causal=causal,
                device=hidden_states.device,
            )
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                query_rotary=tables,
                key_rotary=tables,
                layer_past=layer_past,
                **kwargs,
            )
        return hidden_states

    def _read(self, layer, hidden_states, positions, context, causal, layer_past, kwargs):
        """One cross-attention block."""
        config = self.config
        tables = self._rotary(positions, config.cross_rotary_dim)
        if context.chunks is not None:
            chunks = context.chunks_with(lambda positions: self._rotary(positions, config.cross_rotary_dim))
            return layer.stream(hidden_states, chunks, tables)
        arguments = {
            "query_rotary": tables,
            "key_rotary": self._rotary(context.positions, config.cross_rotary_dim),
            **kwargs,
        }
        size = config.cross_attention_chunk_size
        if size == "auto":
            size = self._automatic_chunk_size(context.states, kwargs)
        if size is not None and layer_past is None and context.states.shape[1] > size:
            if kwargs.get("output_attentions"):
                raise ValueError("output_attentions needs cross_attention_chunk_size=None, got a number")
            arguments |= {"chunk_size": size, "key_mask": context.mask, "causal": causal}
            return layer(hidden_states, context.states, **arguments)
        keys = context.states.shape[1] + (0 if layer_past is None else layer_past.get_seq_length())
        mask = make_attention_mask(
            config._attn_implementation,
            context.mask,
            hidden_states.shape[1],
            keys,
            causal=causal,
            device=hidden_states.device,
        )
        return layer(hidden_states, context.states, attention_mask=mask, layer_past=layer_past, **arguments)

    def _automatic_chunk_size(self, states, kwargs) -> int | None:
        """Pieces on a CPU, where they were measured (docs/perceiver_flash.md); elsewhere all is read at once."""
        config = self.config
        if config.is_decoder or config._attn_implementation != "sdpa" or kwargs.get("output_attentions"):
            return None
        if states.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        numbers = config.num_cross_attention_heads * (config.cross_head_dim + config.cross_value_head_dim)
        return max(CPU_CHUNK // numbers, 1)

    def _rotary(self, positions, size):
        return rotary_tables(positions, size, self.config.rotary_emb_base) if size else None


class OnLatents(HeadOnBody):
    """A head that reads the latents themselves, not a vector pooled of them."""

    body_class = PerceiverFlashModel

    def make_body(self, config: PerceiverFlashConfig) -> PerceiverFlashModel:
        return PerceiverFlashModel(config, add_pooling_layer=False)


class PerceiverFlashIOModel(OnLatents, PerceiverFlashPreTrainedModel):
    """Perceiver IO: any number of queries read the latents. Without queries it returns the latents."""

    _can_record_outputs = {"cross_attentions": OutputRecorder(PerceiverFlashAttention, index=1, layer_name="decoder")}

    def add_head(self, config: PerceiverFlashConfig) -> None:
        self.decoder = PerceiverFlashDecoder(config, config.num_queries, config.output_size)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | list | dict | None = None,
        queries: torch.Tensor | None = None,
        query_position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        latent_position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PerceiverFlashModelOutput:
        """Outputs `[B, Q, output_size or query_size]`; inputs as in `PerceiverFlashModel.forward`, and:

        Args:
            queries: `[Q, query_size]` or `[B, Q, query_size]`, any Q; the learned ones if not given.
            query_position_ids: `[B or 1, Q]`, for rotary positions; 0 to Q - 1 if not given.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            latent_position_ids=latent_position_ids,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if queries is not None or self.decoder.queries is not None:
            hidden_states = self.decoder(hidden_states, queries, query_position_ids, outputs.latent_position_ids)
        return PerceiverFlashModelOutput(
            last_hidden_state=hidden_states, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class PerceiverFlashForMaskedLM(OnLatents, LanguageModelHead, PerceiverFlashPreTrainedModel):
    """Perceiver IO with one learned query for each position, and a head that predicts masked tokens."""

    _fsdp_plan = {"lm_head": "keep_full_weight"}
    _can_record_outputs = PerceiverFlashIOModel._can_record_outputs

    @classmethod
    def head_config(cls, config: PerceiverFlashConfig) -> PerceiverFlashConfig:
        if config.is_decoder or config.modality != "text":
            raise ValueError(
                "PerceiverFlashForMaskedLM needs is_decoder=False and modality='text', got "
                f"is_decoder={config.is_decoder}, modality={config.modality!r}"
            )
        if config.tie_word_embeddings and config.query_size != config.input_size:
            raise ValueError(
                f"tie_word_embeddings=True needs query_size to be input_size ({config.input_size}), got "
                f"{config.query_size}"
            )
        return config

    def add_head(self, config: PerceiverFlashConfig) -> None:
        self.decoder = PerceiverFlashDecoder(config, config.max_position_embeddings, None)
        self.lm_head = nn.Linear(config.query_size, config.vocab_size, bias=config.lm_head_bias)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PerceiverFlashHeadOutput:
        """Logits `[B, N, vocab_size]`; `labels` `[B, N]` hold the original ids of masked tokens and -100 elsewhere."""
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        positions = self.model.text_positions(
            input_ids if inputs_embeds is None else inputs_embeds, attention_mask, position_ids
        )
        queries = self.decoder.queries[positions]
        hidden_states = self.decoder(outputs.last_hidden_state, queries, positions, outputs.latent_position_ids)
        logits = self.logits_of(hidden_states)
        loss = None
        if labels is not None:
            # The loss takes a view of the labels, which are often a slice.
            labels, size = labels.contiguous(), self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **loss_arguments)
        return PerceiverFlashHeadOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class PerceiverFlashForSequenceClassification(OnLatents, PerceiverFlashPreTrainedModel):
    """One label (or number) for an input, text or features, read from the latents (`config.pooling`)."""

    _can_record_outputs = {
        "cross_attentions": OutputRecorder(PerceiverFlashAttention, index=1, layer_name="classifier")
    }

    @classmethod
    def head_config(cls, config: PerceiverFlashConfig) -> PerceiverFlashConfig:
        if config.is_decoder:
            raise ValueError("a classifier reads latents of their own, so config.is_decoder must be False, got True")
        return config

    def add_head(self, config: PerceiverFlashConfig) -> None:
        self.num_labels = config.num_labels
        self.classifier = PerceiverFlashClassificationHead(config)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | list | dict | None = None,
        inputs_embeds: torch.Tensor | None = None,
        inputs: torch.Tensor | list | dict | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PerceiverFlashHeadOutput:
        """Logits `[B, num_labels]`; `labels` `[B]` ids, or floats for regression and several labels."""
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "inputs": inputs}
        return self._classify(inputs | {"attention_mask": attention_mask}, labels, kwargs)

    def _classify(self, inputs, labels, kwargs):
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        outputs = self.model(**inputs, **kwargs)
        logits = self.classifier(outputs.last_hidden_state, outputs.latent_position_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **loss_arguments)
        return PerceiverFlashHeadOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class PerceiverFlashForImageClassification(PerceiverFlashForSequenceClassification):
    """One label for an image of any height and width. Makes its configuration one of images."""

    main_input_name = "pixel_values"

    @classmethod
    def head_config(cls, config: PerceiverFlashConfig) -> PerceiverFlashConfig:
        if config.modality != "image":
            values = config.to_dict() | {"modality": "image", "input_size": None, "query_size": None}
            implementation = config._attn_implementation
            config = type(config).from_dict(values)
            config._attn_implementation = implementation
        return super().head_config(config)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> PerceiverFlashHeadOutput:
        """Logits `[B, num_labels]` for images `[B, C, H, W]` (`[B, H, W, C]` with `channels_last`)."""
        return self._classify({"pixel_values": pixel_values}, labels, kwargs)


class PerceiverFlashForCausalLM(OnLatents, CausalLMHead, PerceiverFlashPreTrainedModel, GenerationMixin):
    """Perceiver AR: the last positions of a sequence are latents, and predict what follows. Makes its config causal.

    The latents of n tokens are the positions from `window_start(n)` on (`perceiver_flash_window.py`): at most
    `num_latents` of them, of however long a context. Loss and logits are theirs: `[B, M, vocab_size]` for the last
    M ≤ `num_latents` of N positions, and labels in front of the latents are left out.
    """

    output_class = PerceiverFlashHeadOutput
    passed_on = ("hidden_states", "attentions")
    # Several tokens at once have the latents of the last one's window, so candidates cannot be judged together.
    _is_stateful = True

    @classmethod
    def head_config(cls, config: PerceiverFlashConfig) -> PerceiverFlashConfig:
        causal = super().head_config(config)
        if causal is not config:
            causal.final_norm = True
            causal.validate_architecture()
        return causal

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor, outputs, **kwargs) -> torch.Tensor:
        targets, latent_mask = kwargs.pop("shift_labels", None), outputs.latent_mask
        if targets is None:
            targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        own = targets[:, -logits.shape[1] :].contiguous()
        if latent_mask is not None:
            # A latent in front of its row's window has nothing to learn from.
            own = own.masked_fill(latent_mask[:, -logits.shape[1] :] == 0, -100)
        items = kwargs.pop("num_items_in_batch", None)
        if items is not None:
            # Trainer counts the labels in front of the latents too.
            share = (own != -100).sum().clamp(min=1) / (targets != -100).sum().clamp(min=1)
            kwargs["num_items_in_batch"] = items * share
        return super().loss_of(logits, labels, outputs, shift_labels=own, **kwargs)
