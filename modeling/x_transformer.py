"""XTransformer: a plain Transformer (arXiv 1706.03762) whose parts are chosen one by one by its configuration.

What the default decoder computes, from here down:

    x = embed_tokens(ids)                                                     XTransformerModel.forward
    for each block:                                                           x_transformer_layer.py
        x = x + self_attn(norm(x))    rotary positions, causal softmax        x_transformer_attention.py
        x = x + mlp(norm(x))          down(gelu(up(x)))                       glu_feed_forward.py
    logits = lm_head(norm(x))                                                 XTransformerForCausalLM.forward

Every option replaces or surrounds one of these pieces and stands in a file of its own: x_transformer_embeddings.py,
rotary_embedding.py, position_bias.py, norm_family.py, residual_rules.py, hyper_connections.py, neighbour_shift.py,
query_key_norms.py, attention_gates.py, softmax_attention.py. The options are those of x-transformers;
docs/x_transformer.md has the table. The operation is `kernels/flash_attention`.

Cost of a block for N tokens and H heads of size D: O(N² D H) time, O(N w D H) with a window w; memory linear in N,
but for talking heads and residual attention, which hold all scores.
"""

from typing import Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..configuration.x_transformer import XTransformerConfig
from .attention_z_loss import attention_z_loss
from .cache_name import CACHE, takes_cache
from .checked_model import CheckedPreTrainedModel
from .encoder_decoder import PairOfStacks, Seq2SeqLMHead
from .heads import CausalLMHead, MaskedLMHead, SequenceClassificationHead, TokenClassificationHead
from .hyper_connections import join_streams, split_streams
from .input_checks import can_look, check_attention_mask, check_inputs, check_positions
from .norm_family import block_norm
from .packed_rows import PackedRows
from .padding import count_positions, real_tokens
from .position_bias import make_position_bias
from .prefix_cache import PrefixLayer  # noqa: F401  (registers itself with transformers)
from .rotary_embedding import RotaryEmbedding
from .segment_memory import check_segment_memory, recall, remember
from .softmax_attention import Visibility
from .x_transformer_attention import XTransformerAttention
from .x_transformer_embeddings import (
    Prefix,
    XTransformerEmbeddings,
    insert_prefix,
    make_token_embedding,
    read_prefix,
    remove_prefix,
)
from .x_transformer_inputs import (
    check_cache,
    check_memory_place,
    check_prepended,
    hide_at_random,
    prefix_start,
    self_visibility,
    with_prefix,
)
from .x_transformer_layer import Carried, XTransformerLayer
from .x_transformer_outputs import XTransformerCausalLMOutput, XTransformerModelOutput


class XTransformerPreTrainedModel(CheckedPreTrainedModel):
    """What every XTransformer class shares: flags for transformers, and the initial values of weights."""

    config: XTransformerConfig
    _no_split_modules = ["XTransformerLayer"]
    _supports_sdpa = True  # the name under which transformers knows the fused form; "eager" is the written-out one
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": XTransformerLayer,
        "attentions": OutputRecorder(XTransformerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(XTransformerAttention, index=1, layer_name="cross_attn"),
    }

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """The two-dimensional mask itself: no model here wants N×M masks, whatever cache it runs with."""
        return attention_mask

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "set_initial_values"):
            module.set_initial_values()
        if isinstance(module, XTransformerModel):
            for tokens in (module.memory_tokens, module.cls_tokens):
                if tokens is not None:
                    init.normal_(tokens, std=self.config.initializer_range)


class XTransformerModel(XTransformerPreTrainedModel):
    """The stack of blocks between the embeddings and the heads: an encoder, or a decoder if `config.is_decoder`."""

    def __init__(self, config: XTransformerConfig):
        super().__init__(config)
        config.check_stack()
        self.embed_tokens, self.embeddings = self.make_inputs(config)
        self.memory_tokens = self.cls_tokens = None
        if config.num_memory_tokens:
            self.memory_tokens = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        if config.num_cls_tokens:
            self.cls_tokens = nn.Parameter(torch.empty(config.num_cls_tokens, config.hidden_size))
        self.rotary = RotaryEmbedding(config) if config.rotary_positions is not None else None
        self.position_bias = make_position_bias(config)
        self.layers = nn.ModuleList([XTransformerLayer(config, index) for index in range(len(config.block_orders))])
        self.norm = block_norm(config) if config.final_norm else nn.Identity()
        # Read once: a field of a configuration costs as much as a small operation, and a cached step is made of those.
        self.cache_kind, self.keeps_prefix = config.layer_types[0], config.keeps_prefix
        self.order, self.num_streams = list(config.execution_order), config.num_residual_streams
        self.num_prefix_tokens, self.num_cls_tokens = config.num_prefix_tokens, config.num_cls_tokens
        self.reads_encoder, self.remembers = config.add_cross_attention, config.mem_len > 0
        self.gradient_checkpointing = False
        self.post_init()

    def make_inputs(self, config: XTransformerConfig) -> tuple[nn.Module, nn.Module]:
        """What makes vectors of the inputs, and what stands between those and the first block."""
        return make_token_embedding(config), XTransformerEmbeddings(config)

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
        encoder_position_ids: torch.LongTensor | None = None,
        prefix_length: int | torch.LongTensor | None = None,
        segment_memory: torch.Tensor | None = None,
        prepend_embeds: torch.Tensor | None = None,
        prepend_mask: torch.Tensor | None = None,
        keep_prepended: bool = False,
        cu_seq_lens_q: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> XTransformerModelOutput:
        """Hidden states for `[B, N]` token ids.

        Args:
            input_ids: `[B, N]`, int; or `inputs_embeds` `[B, N, embedding_size]`, exactly one of the two.
            attention_mask: `[B, everything seen]`, 1 at real tokens and 0 at padding (on either side), or None.
            position_ids: `[B or 1, N]`; counted from each row's first real token if not given.
            past_key_values: a cache made with `DynamicCache(config=model.config)`; decoders only.
            token_type_ids: `[B, N]`, if `config.type_vocab_size`; `[B, N, kinds]` if that is a list.
            encoder_hidden_states: `[B, K, cross_attention_hidden_size]`, if `config.add_cross_attention`.
            encoder_attention_mask: `[B, K]`, as `attention_mask`.
            encoder_position_ids: `[B or 1, K]`, for rotary positions in cross-attention, which has none without.
            prefix_length: how many real tokens at the start of each row see each other, one number or `[B]`, if
                `config.prefix_lm`. They have to come in one call.
            segment_memory: `[B, num_hidden_layers, M, hidden_size]`, the output of that name of the call with the
                segment before, if `config.mem_len`. With a cache it counts, and is returned, in the first call only.
            prepend_embeds: `[B, P, embedding_size]`, vectors in front of the tokens, such as those of an image. They
                have no absolute position and are no tokens to `attention_mask`, `position_ids` and the cache. With a
                cache they count in the first call only; it needs `config.prepend_embeddings`.
            prepend_mask: `[B, P]`, 1 at those that count, or None if all do; to be given in every call.
            keep_prepended: return their states too, in front of the tokens': `[B, P + N, hidden_size]`.
            cu_seq_lens_q: `[S + 1]`, int, where each of S sequences begins that stand in one row one behind the other,
                and where the last one ends: each is computed by itself. `hidden_states` and `attentions` have a row
                for each. Without masks, caches and whatever else belongs to a row.
            use_cache: return a cache (decoders only).

        Raises:
            ValueError: inputs of a wrong shape, ids or positions outside their tables, a cache of another model.
        """
        config = self.config
        rows = None
        if cu_seq_lens_q is not None:
            of_rows = (attention_mask, past_key_values, encoder_hidden_states, segment_memory, prepend_embeds)
            if any(value is not None for value in of_rows):
                raise ValueError("cu_seq_lens_q parts a row of tokens alone: no mask, cache, memory or other sequence")
            given = input_ids if inputs_embeds is None else inputs_embeds
            rows, use_cache = PackedRows(cu_seq_lens_q, given.shape[1]), False
            input_ids, inputs_embeds = rows.unpack("input_ids", input_ids), rows.unpack("inputs_embeds", inputs_embeds)
            token_type_ids = rows.unpack("token_type_ids", token_type_ids)
            position_ids = rows.unpack("position_ids", position_ids)
            attention_mask = rows.mask.long()
        check_inputs(input_ids, inputs_embeds, self.embed_tokens)
        check_cache(past_key_values, config, self.cache_kind)
        if self.reads_encoder and encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given to a model with add_cross_attention=True, got None")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None and config.is_decoder:
            past_key_values = self._new_cache()
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = inputs_embeds.shape[1]
        check_attention_mask(attention_mask, inputs_embeds, cached, all_softmax=False)
        if position_ids is None:
            position_ids = count_positions(attention_mask, cached, length, inputs_embeds.device)
        check_positions(position_ids, config)

        check_prepended(prepend_embeds, prepend_mask, inputs_embeds, past_key_values, config)
        hidden_states = self.embeddings(inputs_embeds, position_ids, token_type_ids, prepend_embeds)
        mask = attention_mask
        if mask is not None and mask.ndim == 2 and can_look(mask) and bool(mask.all()):
            mask = None  # without one, more of attention is torch's own
        mask = real_tokens(mask)
        if mask is None and prepend_mask is not None:
            mask = prepend_mask.new_ones(inputs_embeds.shape[0], cached + length, dtype=torch.bool)
        hidden_states, mask, position_ids, prefix = self._with_prefix(
            hidden_states, mask, position_ids, past_key_values, length, prepend_mask
        )
        padding = None if mask is None else mask[:, -hidden_states.shape[1] :]
        check_segment_memory(segment_memory, hidden_states.shape[0], config)
        recalled, query_position_ids = None, position_ids
        if self.remembers:
            mask, query_position_ids, recalled = recall(segment_memory, mask, position_ids, past_key_values, length)
            position_ids = recalled.key_position_ids
        if self.training and config.masked_key_probability and past_key_values is None:
            mask = hide_at_random(mask, hidden_states, config.masked_key_probability, keep_first=True)
        arguments = {
            "visibility": self._visibility(mask, prefix, cached, hidden_states, past_key_values, prefix_length),
            "encoder_visibility": self._encoder_visibility(encoder_hidden_states, encoder_attention_mask),
            "rotary": self._rotary(query_position_ids, position_ids),
            "encoder_rotary": self._encoder_rotary(query_position_ids, encoder_hidden_states, encoder_position_ids),
            "position_bias": self.position_bias,
            "written_out": config._attn_implementation == "eager",
            CACHE: past_key_values,
            "padding": padding,
            "recalled": recalled,
        }
        carried, entered = Carried(), []
        hidden_states = split_streams(hidden_states, self.num_streams)
        layers = list(self.layers)  # an index into a ModuleList costs as much as a small operation
        for layer_idx, block_idx in enumerate(self.order):
            hidden_states, *carried = layers[block_idx](
                hidden_states, encoder_hidden_states, *carried, layer_idx=layer_idx, **arguments
            )
            carried = Carried(*carried)
            if carried.entered is not None:
                entered.append(carried.entered)
                carried = carried._replace(entered=None)
        hidden_states = join_streams(hidden_states, self.num_streams)
        if config.hidden_state_softcapping is not None:
            cap = config.hidden_state_softcapping
            hidden_states = cap * torch.tanh(hidden_states / cap)
        hidden_states = self.norm(hidden_states)
        cls_states = None
        if self.num_cls_tokens:
            cls_states = read_prefix(hidden_states, prefix, config.num_memory_tokens, config.num_cls_tokens)
        if hidden_states.shape[1] != length:
            kept = hidden_states.shape[1] - length - config.num_prefix_tokens if keep_prepended else 0
            hidden_states = remove_prefix(hidden_states, prefix, kept)
        is_first = isinstance(cached, int) and cached == 0
        z_loss = None
        if carried.lse is not None:
            z_loss = config.attention_z_loss_coef * attention_z_loss(carried.lse, padding)
        return XTransformerModelOutput(
            last_hidden_state=hidden_states if rows is None else rows.pack(hidden_states),
            **{CACHE: past_key_values},
            segment_memory=remember(entered, segment_memory, config) if entered and is_first else None,
            attention_z_loss=z_loss,
            cls_states=cls_states,
        )

    def _new_cache(self) -> Cache:
        cache = DynamicCache(config=self.config)
        if not self.config.add_cross_attention:
            return cache
        return EncoderDecoderCache(cache, DynamicCache(config=self.config))

    def _with_prefix(self, hidden_states, mask, position_ids, past_key_values, length, prepend_mask):
        """States, mask and positions of learned tokens, prepended vectors and tokens; and where the first two stand.

        They come with the first call; after it, a cache holds them, and only the mask has to know.

        Args:
            hidden_states: `[B, P + N, C]`, prepended vectors before the `length` tokens.
            mask, position_ids: of tokens alone.
        """
        learned = [tokens for tokens in (self.memory_tokens, self.cls_tokens) if tokens is not None]
        prepended, hidden_states = hidden_states.split_with_sizes((hidden_states.shape[1] - length, length), dim=1)
        count = self.num_prefix_tokens + prepended.shape[1]
        is_first, first_length = True, length
        if past_key_values is not None and self.keeps_prefix:
            layers = getattr(past_key_values, "self_attention_cache", past_key_values).layers
            is_first = layers[0].first_length == 0
            for layer in layers if is_first else ():
                layer.prefix_length, layer.first_length = count, first_length
            count, first_length = layers[0].prefix_length, layers[0].first_length
        if not count:
            return hidden_states, mask, position_ids, Prefix()
        prefix = Prefix(prefix_start(mask, first_length), count)
        check_memory_place(mask, prefix.start, first_length, self.config)
        mask = with_prefix(mask, prefix, real_tokens(prepend_mask))
        position_ids = position_ids + count
        if is_first:
            rows = [tokens.to(prepended.dtype).expand(prepended.shape[0], -1, -1) for tokens in learned]
            hidden_states = insert_prefix(hidden_states, torch.cat([*rows, prepended], dim=1), prefix.start)
            places = torch.arange(count, device=position_ids.device)
            rows = position_ids if prefix.start is None else position_ids.expand(prefix.start.shape[0], -1)
            position_ids = insert_prefix(rows, places.expand(rows.shape[0], -1), prefix.start)
        return hidden_states, mask, position_ids, prefix

    def _visibility(self, mask, prefix, cached, hidden_states, past_key_values, prefix_length) -> Visibility:
        config, (batch, length) = self.config, hidden_states.shape[:2]
        prefix_lengths = None
        if prefix_length is not None:
            if not config.prefix_lm:
                raise ValueError(f"prefix_length needs config.prefix_lm=True, got {prefix_length} for a model without")
            ends = torch.as_tensor(prefix_length, device=hidden_states.device).expand(batch)
            if isinstance(cached, int) and cached == 0:
                start = prefix.start
                if start is None:
                    start = 0 if mask is None else prefix_start(mask, length)
                prefix_lengths = ends + prefix.length + start
        visibility = self_visibility(config, mask, cached, length, prefix_lengths)
        if past_key_values is not None and past_key_values.is_compileable:
            # Slots of a preallocated cache behind the last token hold nothing yet.
            seen = torch.as_tensor(cached + length, device=hidden_states.device).expand(batch)
            visibility = visibility._replace(key_lengths=seen)
        return visibility

    def _rotary(self, query_position_ids, key_position_ids):
        """Tables for the queries and for the keys, or None."""
        if self.rotary is None:
            return None
        if query_position_ids is key_position_ids:
            return self.rotary(query_position_ids)
        return self.rotary(query_position_ids)[0], self.rotary(key_position_ids)[1]

    def _encoder_rotary(self, position_ids, encoder_hidden_states, encoder_position_ids):
        """Tables for the queries and keys of cross-attention, or None."""
        if encoder_hidden_states is None or encoder_position_ids is None:
            return None
        if self.rotary is None:
            raise ValueError("encoder_position_ids needs rotary positions, got a model with rotary_positions=None")
        return self.rotary(position_ids)[0], self.rotary(encoder_position_ids)[1]

    def _encoder_visibility(self, encoder_hidden_states, encoder_attention_mask) -> Visibility | None:
        if encoder_hidden_states is None:
            return None
        mask, share = real_tokens(encoder_attention_mask, encoder_hidden_states), self.config.encoder_token_dropout
        if self.training and share:
            mask = hide_at_random(mask, encoder_hidden_states, share, keep_first=True)
        return Visibility(causal=False, key_mask=mask)


class ScaledLogits:
    """Logits times `config.logit_scale`, for the heads over the vocabulary."""

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().logits_of(hidden_states) * self.config.logit_scale


class XTransformerForCausalLM(ScaledLogits, CausalLMHead, XTransformerPreTrainedModel, GenerationMixin):
    """A decoder with a language modelling head. Makes its configuration causal."""

    body_class = XTransformerModel
    output_class = XTransformerCausalLMOutput
    passed_on = (*CausalLMHead.passed_on, "segment_memory", "attention_z_loss")

    def loss_of(self, logits, labels, outputs, **kwargs) -> torch.Tensor:
        loss = super().loss_of(logits, labels, outputs, **kwargs)
        return loss if outputs.attention_z_loss is None else loss + outputs.attention_z_loss

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        prepend_embeds: torch.Tensor | None = None,
        prepend_mask: torch.Tensor | None = None,
        segment_memory: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """As in `CausalLMHead`; what only the body takes is named because `generate` refuses names it cannot find."""
        kwargs |= {"prepend_embeds": prepend_embeds, "prepend_mask": prepend_mask, "segment_memory": segment_memory}
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, **kwargs
        )


class XTransformerForMaskedLM(ScaledLogits, MaskedLMHead, XTransformerPreTrainedModel):
    """An encoder with a head that predicts masked tokens."""

    body_class = XTransformerModel


class XTransformerForSequenceClassification(SequenceClassificationHead, XTransformerPreTrainedModel):
    """One label (or number) for a sequence, read from a pooled hidden state (`config.classifier_pooling`)."""

    body_class = XTransformerModel

    def pool(self, outputs, attention_mask, input_ids) -> torch.Tensor:
        """As in the base; of CLS tokens their states, `[B, tokens, hidden_size]` if there are several."""
        if self.config.classifier_pooling != "cls":
            return super().pool(outputs, attention_mask, input_ids)
        states = outputs.cls_states
        return states[:, 0] if states.shape[1] == 1 else states


class XTransformerForTokenClassification(TokenClassificationHead, XTransformerPreTrainedModel):
    """One label for each token."""

    body_class = XTransformerModel


class XTransformerEncoderDecoderModel(PairOfStacks, XTransformerPreTrainedModel):
    """An encoder and a decoder that reads it through cross-attention, without a head."""

    stack_class = XTransformerModel

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict:
        # Sharing the tables is a choice of its own: transformers ties nothing unless the head is tied as well.
        tied = super().get_expanded_tied_weights_keys(all_submodels)
        return tied | self._tied_weights_keys if self.config.share_embeddings else tied


class XTransformerForConditionalGeneration(ScaledLogits, Seq2SeqLMHead, XTransformerPreTrainedModel, GenerationMixin):
    """An encoder–decoder with a language modelling head."""

    body_class = XTransformerEncoderDecoderModel
