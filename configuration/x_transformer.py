# Copyright 2026 The hf_efficient authors. Licensed under the Apache License, Version 2.0.
"""Configuration of XTransformer: a Transformer whose parts are chosen one by one."""

import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .encoder_decoder_parts import part_of
from .model_card import ArchitectureFacts
from .x_transformer_inputs import XTransformerInputsConfig
from .x_transformer_rules import (
    check_at_least,
    check_attention,
    check_kind,
    check_layout,
    check_positions,
    check_sizes,
    check_stack,
)


# A cache layer that also holds what memory tokens and token shifts need, see modeling/prefix_cache.py.
PREFIX_LAYER_TYPE = "full_attention_with_prefix"


@strict
class XTransformerConfig(XTransformerInputsConfig):
    r"""
    Every choice an XTransformer is made of. The fields stand in groups; each group is one small file in modeling/.
    One configuration serves the decoder, the encoder and the encoder–decoder. Fields about images and vectors, in
    place of tokens, stand in `XTransformerInputsConfig`.

    **Sizes**

    Args:
        vocab_size (`int`, defaults to 32000): number of token ids.
        hidden_size (`int`, defaults to 512): width of the residual stream.
        num_hidden_layers (`int`, defaults to 6): number of blocks that run (of the decoder, in an encoder–decoder).
        num_attention_heads (`int`, defaults to 8): number of query heads.
        num_key_value_heads (`int`, *optional*): number of key and value heads, each shared by a group of query heads
            (arXiv 2305.13245). As many as query heads if not given.
        head_dim (`int`, *optional*): size of a head, `hidden_size // num_attention_heads` if not given.
        value_head_dim (`int`, *optional*): size of a value head, `head_dim` if not given.
        intermediate_size (`int`, *optional*): width of the feed-forward, `4 * hidden_size` if not given.
        max_position_embeddings (`int`, defaults to 8192): size of the learned position table; nothing else has a
            limit.

    **Embeddings**

        embedding_size (`int`, *optional*): width of the token table, projected to `hidden_size` where it differs
            (arXiv 1909.11942).
        type_vocab_size (`int` or `list[int]`, defaults to 0): number of token type ids; 0 has no such embedding. A
            list has one entry for each of several kinds of types, whose embeddings are summed.
        l2_normalize_embeddings (`bool`, defaults to `False`): rows of the token and learned position tables have norm
            1, and start near 0 (arXiv 1910.05895).
        embedding_norm (`bool`, defaults to `False`): LayerNorm on the sum of the embeddings (arXiv 2211.05100).
        embedding_dropout (`float`, defaults to 0): dropout on that sum.
        num_memory_tokens (`int`, defaults to 0): learned tokens in front of the sequence, which every token sees
            (arXiv 2006.11527).
        num_cls_tokens (`int`, defaults to 0): learned tokens behind those, of an encoder, whose states
            `classifier_pooling="cls"` reads (arXiv 1810.04805).

    **Positions** (any of the three may be combined)

        absolute_positions (`str`, *optional*): added to the embeddings: `"learned"`, or `"scaled_sinusoidal"`
            (sinusoids with one learned factor).
        rotary_positions (`str`, *optional*, defaults to `"rope"`): turned queries and keys: `"rope"`
            (arXiv 2104.09864), `"xpos"` (with decay, decoders only, arXiv 2212.10554) or None.
        rope_parameters (`dict`, *optional*): as in transformers: `rope_type` (`"default"`, `"linear"`, `"yarn"` or
            `"llama3"`), `rope_theta`, `partial_rotary_factor` (the share of a head that turns), `factor`, ...
        xpos_scale_base (`int`, defaults to 512): how many positions xPos takes to decay.
        position_bias (`str`, *optional*): added to the scores: `"alibi"` (arXiv 2108.12409), `"t5"` (learned
            buckets of distances, one table for all blocks, arXiv 1910.10683), `"dynamic"` (an MLP of the distance,
            arXiv 2108.00154).
        alibi_slopes (`list[float]`, *optional*): a slope for each head; the paper's if not given.
        relative_attention_num_buckets (`int`, defaults to 32), relative_attention_max_distance (`int`, defaults to
            128): of the T5 bias.
        dynamic_bias_hidden_size (`int`, *optional*), dynamic_bias_depth (`int`, defaults to 2),
            dynamic_bias_log_distance, dynamic_bias_norm (`bool`, default to `False`): of the dynamic bias: width
            (`hidden_size // 4` if not given) and number of hidden layers, logarithm of the distance as input,
            LayerNorm in the MLP.

    **Norms**

        norm_type (`str`, defaults to `"layer_norm"`): `"layer_norm"`, `"rms_norm"` (arXiv 1910.07467),
            `"simple_rms_norm"` (no weight, arXiv 2307.14995), `"scale_norm"` (one weight, arXiv 1910.05895) or
            `"dynamic_tanh"` (arXiv 2503.10622).
        norm_position (`str`, defaults to `"pre"`): `"pre"`: x + f(N(x)). `"post"`: N(x + f(x)). `"sandwich"`:
            x + N(f(N(x))) (arXiv 2105.13290). `"pre_and_post"`: N(x + f(N(x))).
        norm_bias (`bool`, defaults to `False`): biases of LayerNorms.
        layer_norm_eps (`float`, defaults to 1e-5), rms_norm_eps (`float`, defaults to 1e-6): epsilons.
        final_norm (`bool`, *optional*): a norm after the last block; where the last branch has none, if not given.
        hidden_state_softcapping (`float`, *optional*): `c·tanh(x/c)` before the final norm.

    **Residual branches and layout**

        residual_type (`str`, defaults to `"sum"`): `"sum"`, or `"gru"`: a GRU cell whose state is the stream
            (arXiv 1910.06764).
        residual_scale (`float`, defaults to 1): constant factor on the stream at each sum (arXiv 2203.00555).
        learned_residual_scale (`bool`, defaults to `False`): a learned factor for each channel there
            (arXiv 2110.09456).
        num_residual_streams (`int`, defaults to 1): hyper-connections: so many streams, which every branch reads,
            writes and mixes with weights of its own (arXiv 2409.19606). Needs norm_position `"pre"` or `"sandwich"`.
        residual_stream_mixing (`str`, defaults to `"free"`): of them: `"free"`, or `"doubly_stochastic"`
            (arXiv 2512.24880), for which sinkhorn_iterations (`int`, defaults to 20) divide rows and columns.
        layer_scale_init_value (`float`, *optional*): LayerScale on each branch, with this initial value
            (arXiv 2103.17239).
        zero_init_branches (`bool`, defaults to `False`): every branch starts as zero.
        layerdrop (`float` or `list[float]`, defaults to 0): probability of leaving a branch out of a training step
            (arXiv 1603.09382), or one for each branch of the stack, in their order.
        shift_tokens (`int` or `list[int]`, defaults to 0): how many neighbours (before; and behind, in an encoder)
            give a part of the channels that enter each branch (arXiv 2106.07477), or one number for each branch.
        macaron (`bool`, defaults to `False`): a second feed-forward before the attention, each with factor 1/2
            (arXiv 1906.02762).
        sublayer_order (`str`, *optional*): self-attentions, cross-attentions and feed-forwards in an order of one's
            own, such as `"aaafafff"` (arXiv 1911.03864). A block begins at each self-attention; or, where there are
            any, at each bar: `"a|f|af"`, so that layer_execution_order can repeat some branches without others.
        cross_attention_only (`bool`, defaults to `False`): blocks without self-attention, of an encoder with
            add_cross_attention: tokens that read another sequence and not each other.
        layer_execution_order (`list[int]`, *optional*): which block runs when, with repetitions: `[0] * 12` is one
            block twelve times (arXiv 1909.11942, 2405.15071).

    **Attention**

        attention_bias, attention_out_bias (`bool`, default to `False`): biases of query, key and value projections,
            and of the output projection.
        attention_dropout, attention_output_dropout (`float`, default to 0): on the weights; on the output.
        sliding_window (`int`, *optional*): how many tokens a token sees, itself included (arXiv 2004.05150).
        sliding_window_ahead (`int`, *optional*): how many later ones, in an encoder with a window; all if not given.
        attn_logit_softcapping (`float`, *optional*): `c·tanh(s/c)` on the scores (arXiv 2408.00118).
        num_memory_key_values (`int`, defaults to 0): learned keys and values that every token sees
            (arXiv 1907.01470).
        learned_attention_sinks (`bool`, defaults to `False`): a learned logit per head in the softmax's denominator
            (arXiv 2508.10925).
        zero_attention_sink (`bool`, defaults to `False`): a logit of 0 there: softmax off by one.
        qk_norm (`str`, *optional*): `"l2"`: cosine similarity times `qk_norm_scale` (arXiv 2010.04245).
            `"l2_learned"`: with learned factors for each channel. `"rms"`: RMSNorm of queries and keys
            (arXiv 2302.05442). `"rms_key"`: of keys.
        qk_norm_groups (`int`, defaults to 1), qk_norm_scale (`float`, defaults to 10): of the two `"l2"` norms.
        pre_softmax_talking_heads, post_softmax_talking_heads (`bool`, default to `False`): linear maps between the
            heads' scores, and weights (arXiv 2003.02436). N×M memory.
        residual_attention, cross_residual_attention (`bool`, default to `False`): scores add up over the blocks
            (arXiv 2012.11747). N×M memory.
        value_residual (`str`, *optional*): values mixed with the first block's (arXiv 2410.17897): `"learned"` for
            each token and head, or `"half"`.
        head_output_scale (`bool`, defaults to `False`): a learned factor for each head (arXiv 2110.09456).
        head_gate (`bool`, defaults to `False`): a sigmoid of the input for each head (arXiv 2306.12929).
        value_gate (`str`, *optional*): a `"sigmoid"` or `"silu"` of the input for each channel of the heads' output.
        value_gate_rank (`int`, *optional*): that gate through a bottleneck.
        value_gate_per_head (`bool`, defaults to `False`): that gate for each head.
        value_gate_bias (`bool`, defaults to `False`): that gate with a bias, which starts at 10: open.
        attention_on_attention (`bool`, defaults to `False`): a GLU as output projection (arXiv 1908.06954).
        mem_len (`int`, defaults to 0): how many states of earlier segments each block remembers (arXiv 1901.02860),
            see `segment_memory` of `forward`. Not with absolute positions, memory tokens or token shifts.
        attention_z_loss_coef (`float`, defaults to 0): factor of a penalty on the softmax' denominators
            (arXiv 2202.08906), which `XTransformerForCausalLM` adds to its loss.
        masked_key_probability (`float`, defaults to 0): share of the tokens (never the first) that no token sees in a
            training step (arXiv 2210.13432).

    **Feed-forward**

        hidden_act (`str`, defaults to `"gelu"`): a name from transformers' `ACT2FN`; `"relu2"` is arXiv 2109.08668.
        gated_feed_forward (`bool`, defaults to `False`): GLU (arXiv 2002.05202), `act(gate) * up`.
        gate_channel_scale (`bool`, defaults to `False`): a learned factor for each channel of the GLU.
        feed_forward_norm (`bool`, defaults to `False`): LayerNorm behind the activation (arXiv 2110.09456).
        mlp_bias (`bool`, defaults to `True`), mlp_output_bias (`bool`, *optional*): biases into and out of it; the
            second is the first if not given.
        feed_forward_dropout, feed_forward_output_dropout (`float`, default to 0): on the activation; on the output.
        chunk_size_feed_forward (`int`, defaults to 0): number of positions it takes at a time; 0 is all.

    **Kind, and heads**

        is_decoder (`bool`, defaults to `False`): causal attention. `XTransformerForCausalLM` sets it.
        prefix_lm (`bool`, defaults to `False`): a decoder whose first `prefix_length` tokens (an argument of
            `forward`) see each other (arXiv 1910.10683).
        add_cross_attention (`bool`, defaults to `False`): cross-attention in every block.
        cross_attention_hidden_size (`int`, *optional*): width of what it reads, `hidden_size` if not given.
        encoder_token_dropout (`float`, defaults to 0): share of those tokens hidden in a training step
            (arXiv 2202.07765).
        encoder_overrides (`dict`, *optional*): fields in which the encoder of an encoder–decoder differs.
        share_embeddings (`bool`, defaults to `False`): encoder and decoder of an encoder–decoder share their token
            table.
        classifier_pooling (`str`, defaults to `"mean"`): `"mean"`, `"first"` or `"last"` real token, or the `"cls"`
            tokens (logits for each, where there are several), for sequence classification.
        classifier_dropout (`float`, defaults to 0): dropout before a classification head.
        lm_head_bias (`bool`, defaults to `False`): bias of the language modelling head.
        logit_scale (`float`, defaults to 1): factor of its logits.
        kernel_backend (`str`, defaults to `"auto"`): `"auto"`, `"eager"` or `"triton"`, see `kernels/backend.py`.
        initializer_range (`float`, defaults to 0.02): standard deviation of initial weights.
        use_cache, tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id: as in every
            model of transformers.

    Raises:
        ValueError: fields that cannot go together; the message names them. (Wrong types raise too, see `strict`.)
    """

    model_type = "x_transformer"
    architecture_facts = ArchitectureFacts(
        description="An XTransformer: a Transformer whose parts are chosen one by one by its configuration.",
        limits="Time grows with the square of the length, unless a window limits what is seen. Positions and content "
        "beyond what it was trained on are beyond what it knows.",
        arxiv="1706.03762",
        citation="""
@inproceedings{vaswani2017attention,
  title     = {Attention Is All You Need},
  author    = {Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and
               Gomez, Aidan N. and Kaiser, {\\L}ukasz and Polosukhin, Illia},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2017},
  url       = {https://arxiv.org/abs/1706.03762}
}
""",
    )
    attribute_map = {"d_model": "hidden_size"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    # Sizes
    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 8192
    # Embeddings
    embedding_size: int | None = None
    type_vocab_size: int | list[int] = 0
    l2_normalize_embeddings: bool = False
    embedding_norm: bool = False
    embedding_dropout: float | int = 0.0
    num_memory_tokens: int = 0
    num_cls_tokens: int = 0
    # Positions
    absolute_positions: Literal["learned", "scaled_sinusoidal"] | None = None
    rotary_positions: Literal["rope", "xpos"] | None = "rope"
    rope_parameters: dict[str, Any] | None = None
    xpos_scale_base: int = 512
    position_bias: Literal["alibi", "t5", "dynamic"] | None = None
    alibi_slopes: list[float] | None = None
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dynamic_bias_hidden_size: int | None = None
    dynamic_bias_depth: int = 2
    dynamic_bias_log_distance: bool = False
    dynamic_bias_norm: bool = False
    # Norms
    norm_type: Literal["layer_norm", "rms_norm", "simple_rms_norm", "scale_norm", "dynamic_tanh"] = "layer_norm"
    norm_position: Literal["pre", "post", "sandwich", "pre_and_post"] = "pre"
    norm_bias: bool = False
    layer_norm_eps: float | int = 1e-5
    rms_norm_eps: float | int = 1e-6
    final_norm: bool | None = None
    hidden_state_softcapping: float | int | None = None
    # Residual branches and layout
    residual_type: Literal["sum", "gru"] = "sum"
    residual_scale: float | int = 1.0
    learned_residual_scale: bool = False
    num_residual_streams: int = 1
    residual_stream_mixing: Literal["free", "doubly_stochastic"] = "free"
    sinkhorn_iterations: int = 20
    layer_scale_init_value: float | int | None = None
    zero_init_branches: bool = False
    layerdrop: float | int | list[float] = 0.0
    shift_tokens: int | list[int] = 0
    macaron: bool = False
    sublayer_order: str | None = None
    cross_attention_only: bool = False
    layer_execution_order: list[int] | None = None
    # Attention
    attention_bias: bool = False
    attention_out_bias: bool = False
    attention_dropout: float | int = 0.0
    attention_output_dropout: float | int = 0.0
    sliding_window: int | None = None
    sliding_window_ahead: int | None = None
    attn_logit_softcapping: float | int | None = None
    num_memory_key_values: int = 0
    learned_attention_sinks: bool = False
    zero_attention_sink: bool = False
    qk_norm: Literal["l2", "l2_learned", "rms", "rms_key"] | None = None
    qk_norm_groups: int = 1
    qk_norm_scale: float | int = 10.0
    pre_softmax_talking_heads: bool = False
    post_softmax_talking_heads: bool = False
    residual_attention: bool = False
    cross_residual_attention: bool = False
    value_residual: Literal["learned", "half"] | None = None
    head_output_scale: bool = False
    head_gate: bool = False
    value_gate: Literal["sigmoid", "silu"] | None = None
    value_gate_rank: int | None = None
    value_gate_per_head: bool = False
    value_gate_bias: bool = False
    attention_on_attention: bool = False
    mem_len: int = 0
    attention_z_loss_coef: float | int = 0.0
    masked_key_probability: float | int = 0.0
    # Feed-forward
    hidden_act: str = "gelu"
    gated_feed_forward: bool = False
    gate_channel_scale: bool = False
    feed_forward_norm: bool = False
    mlp_bias: bool = True
    mlp_output_bias: bool | None = None
    feed_forward_dropout: float | int = 0.0
    feed_forward_output_dropout: float | int = 0.0
    # Kind, and heads
    is_decoder: bool = False
    prefix_lm: bool = False
    add_cross_attention: bool = False
    cross_attention_hidden_size: int | None = None
    encoder_token_dropout: float | int = 0.0
    encoder_overrides: dict[str, Any] | None = None
    share_embeddings: bool = False
    classifier_pooling: Literal["mean", "first", "last", "cls"] = "mean"
    classifier_dropout: float | int = 0.0
    lm_head_bias: bool = False
    logit_scale: float | int = 1.0
    kernel_backend: Literal["auto", "eager", "triton"] = "auto"
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        check_at_least(self, 1, "num_attention_heads", "hidden_size", "num_hidden_layers")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}) unless "
                    f"head_dim is given, got {self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        self.value_head_dim = self.head_dim if self.value_head_dim is None else self.value_head_dim
        if self.dynamic_bias_hidden_size is None:
            self.dynamic_bias_hidden_size = max(1, self.hidden_size // 4)
        if self.mlp_output_bias is None:
            self.mlp_output_bias = self.mlp_bias
        if self.final_norm is None:
            self.final_norm = self.norm_position in ("pre", "sandwich")
        if self.position_bias == "alibi" and self.alibi_slopes is None:
            self.alibi_slopes = alibi_slopes(self.num_attention_heads)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        super().__post_init__(**kwargs)

    # Derived, so that no model file repeats the rule.

    @property
    def block_orders(self) -> list[str]:
        """For each block that has weights, its branches in order: a(ttention), c(ross-attention), f(eed-forward)."""
        if self.sublayer_order is None:
            attentions = "a" * (not self.cross_attention_only) + "c" * self.add_cross_attention
            block = "f" * self.macaron + attentions + "f"
            count = (
                self.num_hidden_layers if self.layer_execution_order is None else max(self.layer_execution_order) + 1
            )
            return [block] * count
        if "|" in self.sublayer_order:
            return self.sublayer_order.split("|")
        first, *rest = self.sublayer_order.split("a")
        blocks = [f"a{branches}" for branches in rest]
        return [first + blocks[0], *blocks[1:]]

    def of_branch(self, name: str, branch_idx: int) -> Any:
        """The value for one branch of the stack of a field that is one value for all or a list."""
        value = getattr(self, name)
        return value[branch_idx] if isinstance(value, list) else value

    @property
    def shifts_tokens(self) -> bool:
        """Whether any branch shifts its tokens."""
        return any(self.shift_tokens) if isinstance(self.shift_tokens, list) else self.shift_tokens > 0

    @property
    def execution_order(self) -> list[int]:
        """The block that runs at each of the `num_hidden_layers` steps."""
        order = self.layer_execution_order
        return list(range(self.num_hidden_layers)) if order is None else order

    @property
    def num_prefix_tokens(self) -> int:
        """Learned tokens in front of a sequence."""
        return self.num_memory_tokens + self.num_cls_tokens

    @property
    def keeps_prefix(self) -> bool:
        """Whether a cache has to know of more than keys and values of tokens."""
        return bool(self.num_memory_tokens or self.shifts_tokens or self.prepend_embeddings)

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of each block, by transformers' names."""
        if (self.is_decoder or self.is_encoder_decoder) and (self.keeps_prefix or self.mem_len):
            kind = PREFIX_LAYER_TYPE
        elif self.sliding_window is None or self.is_encoder_decoder or self.add_cross_attention:
            # The cache of cross-attention has the same types, and must not slide.
            kind = "full_attention"
        else:
            kind = "sliding_attention"
        return [kind] * self.num_hidden_layers

    @property
    def token_size(self) -> int:
        """Width of the token table: `embedding_size`, or `hidden_size`, also where that was changed afterwards."""
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head turn."""
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    @property
    def encoder_state_size(self) -> int:
        """Width of what cross-attention reads."""
        size = self.cross_attention_hidden_size
        return self.hidden_size if size is None else size

    @property
    def position_embedding_type(self) -> str:
        """`"learned"` if there is a table that ends."""
        return "learned" if self.absolute_positions == "learned" else "none"

    @property
    def materializes_scores(self) -> bool:
        """Whether self-attention has to hold N×M scores: heads or blocks read each other's."""
        return self.pre_softmax_talking_heads or self.post_softmax_talking_heads or self.residual_attention

    def get_text_config(self, decoder=None, encoder=None):
        """This configuration: its own fields describe the decoder, whatever their prefixes."""
        return self

    def _without_cross_attention(self, overrides: dict[str, Any] | None) -> dict[str, Any]:
        changes = {**(overrides or {}), "is_decoder": False, "add_cross_attention": False}
        if self.sublayer_order is not None and "sublayer_order" not in changes:
            changes["sublayer_order"] = self.sublayer_order.replace("c", "")
            if "" in changes["sublayer_order"].split("|"):
                raise ValueError(
                    f"sublayer_order={self.sublayer_order!r} has blocks that are no blocks without cross-attention: "
                    "the encoder's sublayer_order must be given in its overrides"
                )
        return changes

    def encoder_config(self) -> "XTransformerConfig":
        """The configuration of the encoder of an encoder–decoder."""
        changes = self._without_cross_attention(self.encoder_overrides)
        return part_of(self, DERIVED_FROM, **changes)

    def decoder_config(self) -> "XTransformerConfig":
        """The configuration of the decoder of an encoder–decoder."""
        return part_of(self, {}, is_decoder=True, add_cross_attention=True)

    def image_encoder_config(self) -> "XTransformerConfig":
        """The configuration of the image encoder of a model for images and text."""
        changes = self._without_cross_attention(self.image_encoder_overrides)
        # What only tokens have.
        changes = {"absolute_positions": None, "embedding_size": None, "type_vocab_size": 0, **changes}
        return part_of(self, DERIVED_FROM, **changes)

    # Validation: the rules stand in x_transformer_rules.py.

    def check_stack(self) -> None:
        """What one stack cannot be; known only when a model is built, because `XTransformerForCausalLM` sets
        `is_decoder`.

        Raises:
            ValueError: an encoder with options of a decoder, or an encoder–decoder as one stack.
        """
        check_stack(self)

    def validate_layer_type(self):
        """Nothing to check: `layer_types` is derived."""

    def validate_architecture(self):
        """What cannot go together; each message names the field, what was expected and what came."""
        check_sizes(self)
        check_positions(self)
        check_attention(self)
        check_layout(self)
        check_kind(self)
        self.check_inputs()


def alibi_slopes(heads: int) -> list[float]:
    """The slopes of arXiv 2108.12409: `2^(-8k/n)` for the next power of two n, filled up with every other of 2n."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    finer = [2.0 ** (-4.0 * k / power) for k in range(1, 2 * power + 1)]
    return slopes + finer[::2][: heads - power]


DERIVED_FROM = {
    "hidden_size": ("head_dim", "value_head_dim", "intermediate_size", "embedding_size", "dynamic_bias_hidden_size"),
    "num_attention_heads": ("head_dim", "value_head_dim", "num_key_value_heads", "alibi_slopes"),
    "head_dim": ("value_head_dim",),
    "mlp_bias": ("mlp_output_bias",),
    "norm_position": ("final_norm",),
    "position_bias": ("alibi_slopes",),
}

__all__ = ["XTransformerConfig"]
