# Copyright 2026 The hf_efficient authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Performer (arXiv 2009.14794): attention in linear time through random features."""

import dataclasses
import math
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .model_card import ArchitectureFacts
from .self_contained import SelfContainedConfig


# What `layer_types` may hold. The first is also the name under which the cache of such a layer is registered.
LINEAR_LAYER_TYPE = "performer_state"
FULL_LAYER_TYPE = "full_attention"
# A softmax block whose cache also keeps what a token shift reads: see modeling/token_shift_cache.py.
SHIFTED_FULL_LAYER_TYPE = "full_attention_with_shift"

EXPONENTIAL_FEATURE_MAPS = ("softmax", "hyperbolic", "optimal_positive")
PROJECTION_FREE_FEATURE_MAPS = ("elu", "no_projection")
# Feature maps whose features may be negative, so that a row's normaliser may vanish.
SIGNED_FEATURE_MAPS = ("gelu", "silu")


@strict
class PerformerConfig(SelfContainedConfig):
    r"""
    Everything that a Performer is made of. One configuration serves the decoder, the encoder and the encoder–decoder.

    Args:
        vocab_size (`int`, defaults to 32000): number of token ids.
        hidden_size (`int`, defaults to 512): width of the model.
        num_hidden_layers (`int`, defaults to 6): number of blocks (of the decoder, in an encoder–decoder).
        num_attention_heads (`int`, defaults to 8): number of attention heads.
        num_key_value_heads (`int`, *optional*): number of key and value heads, each shared by a group of query heads
            (arXiv 2305.13245). As many as query heads if not given.
        head_dim (`int`, *optional*): size of a head, `hidden_size // num_attention_heads` if not given.
        intermediate_size (`int`, *optional*): width of the feed-forward, `4 * hidden_size` if not given.
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward, a name from transformers' `ACT2FN`.
        gated_feed_forward (`bool`, defaults to `False`): GLU feed-forward (arXiv 2002.05202), `act(gate) * up`.
        chunk_size_feed_forward (`int`, defaults to 0): number of positions the feed-forward takes at a time; 0 is all.
            Changes memory, not results.
        norm_type (`str`, defaults to `"layer_norm"`): `"layer_norm"`, `"rms_norm"`, `"scale_norm"` (arXiv 1910.05895)
            or `"rezero"` (arXiv 2003.04887: no norm, a learned factor on each branch).
        norm_position (`str`, defaults to `"pre"`): `"pre"` (before each branch) or `"post"` (after each residual sum).
        norm_eps (`float`, defaults to 1e-5): epsilon of the norms.
        final_norm_type (`str`, *optional*): norm after the last block, one of the three norms or `"none"`. The blocks'
            own (LayerNorm for ReZero; none for post-norm) if not given.
        embedding_norm (`bool`, defaults to `False`): a norm on the embeddings, as BERT has it.
        attention_bias (`bool`, defaults to `False`): biases of the query, key and value projections.
        attention_out_bias (`bool`, defaults to `False`): bias of the output projection.
        mlp_bias (`bool`, defaults to `True`): biases of the feed-forward.
        lm_head_bias (`bool`, defaults to `False`): bias of the language modelling head.
        mlm_head_transform (`bool`, defaults to `False`): a dense layer, activation and norm before the masked language
            modelling head, as BERT has them.
        type_vocab_size (`int`, defaults to 0): number of token type ids; 0 has no such embedding.
        embedding_dropout, feed_forward_dropout, attention_dropout, attention_output_dropout (`float`, default to 0):
            dropout on the embeddings; inside the feed-forward after the activation; on the weights of softmax heads
            (linear heads have no weights to drop); after the attention's output projection.
        classifier_dropout (`float`, defaults to 0): dropout before a classification head.
        classifier_pooling (`str`, *optional*): `"mean"`, `"first"` or `"last"` unpadded position for sequence
            classification; `"last"` for a decoder, `"mean"` for an encoder if not given.
        classifier_transform (`bool`, defaults to `False`): a dense layer and tanh between the pooled state and the
            head of sequence classification, as BERT has them.
        classifier_bias (`bool`, defaults to `False`): bias of the head of sequence classification.

        feature_map (`str`, defaults to `"softmax"`): `"softmax"`: positive random features (arXiv 2009.14794, eq. 6).
            `"hyperbolic"`: its variant with half as many projections and both signs (ibid., below eq. 6).
            `"optimal_positive"`: the features of least variance of arXiv 2205.15317.
            `"relu"`, `"squared_relu"`, `"gelu"`, `"silu"`, `"sigmoid"`, `"softplus"`: generalised attention, that
            function of the projected input. `"elu"`: `elu(x) + 1` without a projection (arXiv 2006.16236).
            `"no_projection"`: softmax over the features of a query and over the sequence of a key (arXiv 1812.01243;
            in a decoder `exp` of a key).
        num_random_features (`int`, *optional*): number of features, `int(head_dim * ln(head_dim))` if not given. Even
            for `"hyperbolic"`; without effect for the maps without a projection.
        orthogonal_features (`bool`, defaults to `True`): rows of the projection orthogonal in blocks of `head_dim`.
        feature_scaling (`str`, defaults to `"chi"`): norm of the orthogonal rows: `"chi"` (that of Gaussian rows,
            hence unbiased) or `"sqrt_dim"` (all `sqrt(head_dim)`, the paper's SMREG).
        feature_redraw_interval (`int`, *optional*, defaults to 1000): number of training forwards between two draws of
            the projections; None never draws again.
        feature_seed (`int`, defaults to 0): with layer and number of draws, decides every projection.
        feature_epsilon (`float`, *optional*): the stabiliser, 1e-6 for the exponential maps (relative to the sum of
            the token's features), 1e-3 for the pointwise ones if not given.
        expected_pair_norm (`float`, *optional*): what `"optimal_positive"` takes `E|q + k|²/sqrt(head_dim)` for,
            `2 * sqrt(head_dim)` (standard normal queries and keys) if not given. `calibrate_features` measures it.
        feature_stabilizer (`str`, defaults to `"running"`): `"running"` is causal and exact. `"sequence"` is
            performer-pytorch's maximum over the whole sequence, which lets a causal model see the future and cannot be
            cached: for converted checkpoints.
        masked_keys_in_normalizer (`bool`, defaults to `False`): performer-pytorch's padding, which removes the values
            of padded keys but leaves the keys in the normaliser, counts padding as positions and lets the
            feed-forward's token shift read it: for converted checkpoints.
        causal_normalizer_epsilon (`float`, *optional*): what performer-pytorch adds to every component of a causal
            normaliser; 1e-6 with its stabiliser, otherwise 0, if not given: for converted checkpoints.
        layer_types (`list[str]`, *optional*): for each block `"linear_attention"` (in memory under the name of its
            cache layer, `"performer_state"`) or `"full_attention"` (softmax attention). All linear if not given.
        num_local_attention_heads (`int` or `list[int]`, defaults to 0): how many heads of each linear block (the last
            ones) are softmax heads over a window instead; a list gives each block's number.
        local_window_size (`int`, defaults to 256): window of the local heads.
        local_attention_type (`str`, defaults to `"sliding"`): `"sliding"`: a position and the `window - 1` before it
            (and after it, in an encoder). `"bucketed"`: its own bucket of `window` positions and the previous one (and
            the next), as in performer-pytorch.
        local_rotary (`bool`, defaults to `True`): rotary positions in the local heads.
        shifted_local_rotary (`bool`, defaults to `False`): performer-pytorch's rotary positions of bidirectional
            bucketed heads, where every query sits one window too far right: for converted checkpoints.
        position_embedding_type (`str`, defaults to `"rotary"`): `"rotary"` (arXiv 2104.09864), `"sinusoidal"`,
            `"learned"`, `"axial"` (sum of learned row and column tables, arXiv 1912.12180), `"none"`, or
            `"rotary_and_sinusoidal"` (performer-pytorch's default).
        rotary_emb_base (`float`, defaults to 10000): base of the rotary and sinusoidal wavelengths.
        max_position_embeddings (`int`, defaults to 8192): size of the learned tables; the others have no limit.
        axial_position_shape (`list[int]`, *optional*): rows and columns, `(ceil(max_position_embeddings / 64), 64)` if
            not given.
        shift_tokens (`bool`, defaults to `False`): half of the channels come from the previous token (a third each
            from both neighbours in an encoder) before each self-attention and its feed-forward.
        reversible (`bool`, defaults to `False`): reversible residual stack (arXiv 2001.04451) whose activations are
            computed again in the backward pass. Hidden states of its blocks cannot be recorded.
        is_decoder (`bool`, defaults to `False`): causal attention. `PerformerForCausalLM` sets it.
        add_cross_attention (`bool`, defaults to `False`): cross-attention in every block.
        cross_attention_feed_forward (`bool`, defaults to `False`): a second feed-forward per block, so that self- and
            cross-attention each have one, as in performer-pytorch.
        encoder_overrides (`dict`, *optional*): fields of this class in which the encoder of an encoder–decoder
            differs.
        share_embeddings (`bool`, defaults to `True`): encoder and decoder share their token embeddings, if those are
            tied to the head as well (`tie_word_embeddings`).
        kernel_backend (`str`, defaults to `"auto"`): `"auto"`, `"eager"` or `"triton"`, see `kernels/backend.py`.
        initializer_range (`float`, defaults to 0.02): standard deviation of initial weights.
        use_cache, tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id: as in every
            model of transformers.

    Raises:
        ValueError: fields that cannot go together; the message names them. (Wrong types raise too, see `strict`.)
    """

    model_type = "performer"
    architecture_facts = ArchitectureFacts(
        description="A Performer: a Transformer whose attention costs time and memory linear in the input's length.",
        limits="Attention through random features approximates softmax attention, and worst where few tokens take all "
        "the weight: exact recall over long distances is better left to a hybrid with softmax layers. Positions and "
        "content beyond what it was trained on are beyond what it knows.",
        arxiv="2009.14794",
        citation="""
@inproceedings{choromanski2021rethinking,
  title     = {Rethinking Attention with Performers},
  author    = {Choromanski, Krzysztof and Likhosherstov, Valerii and Dohan, David and Song, Xingyou and Gane, Andreea
               and Sarlos, Tamas and Hawkins, Peter and Davis, Jared and Mohiuddin, Afroz and Kaiser, Lukasz and
               Belanger, David and Colwell, Lucy and Weller, Adrian},
  booktitle = {International Conference on Learning Representations},
  year      = {2021},
  url       = {https://arxiv.org/abs/2009.14794}
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

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    gated_feed_forward: bool = False
    norm_type: Literal["layer_norm", "rms_norm", "scale_norm", "rezero"] = "layer_norm"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float | int = 1e-5
    final_norm_type: Literal["layer_norm", "rms_norm", "scale_norm", "none"] | None = None
    embedding_norm: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = True
    lm_head_bias: bool = False
    mlm_head_transform: bool = False
    type_vocab_size: int = 0
    embedding_dropout: float | int = 0.0
    feed_forward_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    attention_output_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    classifier_pooling: Literal["mean", "first", "last"] | None = None
    classifier_transform: bool = False
    classifier_bias: bool = False

    feature_map: Literal[
        "softmax",
        "hyperbolic",
        "optimal_positive",
        "relu",
        "squared_relu",
        "gelu",
        "silu",
        "sigmoid",
        "softplus",
        "elu",
        "no_projection",
    ] = "softmax"
    num_random_features: int | None = None
    orthogonal_features: bool = True
    feature_scaling: Literal["chi", "sqrt_dim"] = "chi"
    feature_redraw_interval: int | None = 1000
    feature_seed: int = 0
    feature_epsilon: float | int | None = None
    expected_pair_norm: float | int | None = None
    feature_stabilizer: Literal["running", "sequence"] = "running"
    masked_keys_in_normalizer: bool = False
    causal_normalizer_epsilon: float | int | None = None
    layer_types: list[str] | None = None
    num_local_attention_heads: int | list[int] = 0
    local_window_size: int = 256
    local_attention_type: Literal["sliding", "bucketed"] = "sliding"
    local_rotary: bool = True
    shifted_local_rotary: bool = False
    position_embedding_type: Literal["rotary", "sinusoidal", "learned", "axial", "none", "rotary_and_sinusoidal"] = (
        "rotary"
    )
    rotary_emb_base: float | int = 10000.0
    max_position_embeddings: int = 8192
    axial_position_shape: list[int] | None = None
    shift_tokens: bool = False
    reversible: bool = False
    is_decoder: bool = False
    add_cross_attention: bool = False
    cross_attention_feed_forward: bool = False
    encoder_overrides: dict[str, Any] | None = None
    share_embeddings: bool = True
    kernel_backend: Literal["auto", "eager", "triton"] = "auto"
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self._check_positive("num_attention_heads", "hidden_size", "num_hidden_layers")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads ({self.num_attention_heads}) unless "
                    f"head_dim is given, got {self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_positive("head_dim")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_random_features is None:
            count = max(2, int(self.head_dim * math.log(self.head_dim)))
            self.num_random_features = count - count % 2 if self.feature_map == "hyperbolic" else count
        if self.feature_epsilon is None:
            exponential = self.feature_map in (*EXPONENTIAL_FEATURE_MAPS, "no_projection")
            # The original's floor, in its own units, belongs to its own stabiliser.
            self.feature_epsilon = (1e-4 if self.feature_stabilizer == "sequence" else 1e-6) if exponential else 1e-3
            if self.feature_map in PROJECTION_FREE_FEATURE_MAPS:
                self.feature_epsilon = 0.0
        if self.causal_normalizer_epsilon is None:
            self.causal_normalizer_epsilon = 1e-6 if self.feature_stabilizer == "sequence" else 0.0
        if self.expected_pair_norm is None:
            self.expected_pair_norm = 2.0 * math.sqrt(self.head_dim)
        if self.layer_types is None:
            self.layer_types = [LINEAR_LAYER_TYPE] * self.num_hidden_layers
        full = SHIFTED_FULL_LAYER_TYPE if self.shift_tokens else FULL_LAYER_TYPE
        stored = {"linear_attention": LINEAR_LAYER_TYPE, FULL_LAYER_TYPE: full, SHIFTED_FULL_LAYER_TYPE: full}
        self.layer_types = [stored.get(kind, kind) for kind in self.layer_types]
        if self.final_norm_type is None:
            from_blocks = {"rezero": "layer_norm"}.get(self.norm_type, self.norm_type)
            self.final_norm_type = "none" if self.norm_position == "post" else from_blocks
        if self.axial_position_shape is None:
            self.axial_position_shape = [math.ceil(self.max_position_embeddings / 64), 64]
        if self.classifier_pooling is None:
            self.classifier_pooling = "last" if self.is_decoder else "mean"
        super().__post_init__(**kwargs)

    def to_dict(self):
        """The fields as they are saved, with the layer types that transformers knows.

        `Trainer` reads a checkpoint's config as a plain `PreTrainedConfig` when it resumes, which accepts no others;
        `__post_init__` maps them back.
        """
        values = super().to_dict()
        full = [self.is_full_attention(index) for index in range(len(self.layer_types))]
        values["layer_types"] = [FULL_LAYER_TYPE if is_full else "linear_attention" for is_full in full]
        return values

    # Derived, so that no model file repeats the rule.

    def local_heads(self, layer_idx: int) -> int:
        """Number of local softmax heads of block `layer_idx`."""
        heads = self.num_local_attention_heads
        return heads if isinstance(heads, int) else heads[layer_idx]

    def is_full_attention(self, layer_idx: int) -> bool:
        """Whether block `layer_idx` is softmax attention over everything."""
        return self.layer_types[layer_idx] != LINEAR_LAYER_TYPE

    @property
    def uses_rotary(self) -> bool:
        """Whether the global heads have rotary positions."""
        return self.position_embedding_type in ("rotary", "rotary_and_sinusoidal")

    def get_text_config(self, decoder=None, encoder=None):
        """This configuration: its own fields describe the decoder, whatever their prefixes."""
        return self

    def encoder_config(self) -> "PerformerConfig":
        """The configuration of the encoder of an encoder–decoder."""
        return self._part(**(self.encoder_overrides or {}), is_decoder=False, add_cross_attention=False)

    def decoder_config(self) -> "PerformerConfig":
        """The configuration of the decoder of an encoder–decoder."""
        return self._part(is_decoder=True, add_cross_attention=True)

    def _part(self, **changes) -> "PerformerConfig":
        names = {field.name for field in dataclasses.fields(PerformerConfig)} - {"encoder_overrides"}
        values = {name: getattr(self, name) for name in names}
        # What was derived from an overridden field is derived anew, unless it is overridden itself.
        for changed, derived in _DERIVED_FROM.items():
            if changed in changes:
                values.update(dict.fromkeys(derived, None))
        part = type(self)(**{**values, **changes, "is_encoder_decoder": False, "architectures": None})
        part._attn_implementation = self._attn_implementation
        return part

    # Validation

    def _check_positive(self, *names: str, minimum: int = 1) -> None:
        for name in names:
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")

    def validate_layer_type(self):
        allowed = (LINEAR_LAYER_TYPE, FULL_LAYER_TYPE, SHIFTED_FULL_LAYER_TYPE)
        unknown = sorted(set(self.layer_types) - set(allowed))
        if unknown:
            raise ValueError(f"layer_types must hold 'linear_attention' or 'full_attention', got {unknown}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have num_hidden_layers ({self.num_hidden_layers}) entries, got "
                f"{len(self.layer_types)}"
            )

    def validate_architecture(self):
        """What cannot go together; each message names the field, what was expected and what came."""
        self._check_positive("vocab_size", "intermediate_size", "num_random_features", "local_window_size")
        self._check_positive("num_key_value_heads", "max_position_embeddings")
        self._check_positive("type_vocab_size", "chunk_size_feed_forward", minimum=0)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}), got "
                f"{self.num_key_value_heads}"
            )
        for name in ("embedding", "feed_forward", "attention", "attention_output", "classifier"):
            value = getattr(self, f"{name}_dropout")
            if not 0 <= value < 1:
                raise ValueError(f"{name}_dropout must be in [0, 1), got {value}")
        self._validate_features()
        self._validate_local_heads()
        self._validate_positions()
        if self.norm_position == "post" and self.norm_type == "rezero":
            raise ValueError("norm_position='post' needs a norm, got norm_type='rezero'")
        if self.reversible and self.norm_position == "post":
            raise ValueError("reversible=True needs norm_position='pre', got 'post'")
        if self.reversible and self.add_cross_attention and not self.cross_attention_feed_forward:
            raise ValueError(
                "reversible=True pairs each attention with a feed-forward, so add_cross_attention=True needs "
                "cross_attention_feed_forward=True, got False"
            )
        if self.encoder_overrides:
            known = {field.name for field in dataclasses.fields(PerformerConfig)}
            unknown = sorted(set(self.encoder_overrides) - known)
            if unknown:
                raise ValueError(f"encoder_overrides must hold fields of PerformerConfig, got {unknown}")
            if not self.is_encoder_decoder:
                raise ValueError("encoder_overrides needs is_encoder_decoder=True, got False")
            if self.encoder_overrides.get("hidden_size", self.hidden_size) != self.hidden_size:
                raise ValueError(
                    f"encoder_overrides must keep hidden_size ({self.hidden_size}), which cross-attention reads, got "
                    f"{self.encoder_overrides['hidden_size']}"
                )
            vocabulary = self.encoder_overrides.get("vocab_size", self.vocab_size)
            if vocabulary != self.vocab_size and self.share_embeddings and self.tie_word_embeddings:
                raise ValueError(
                    f"share_embeddings=True needs one vocabulary ({self.vocab_size}), got encoder_overrides with "
                    f"vocab_size={vocabulary}"
                )

    def _validate_features(self):
        if self.feature_map == "hyperbolic" and self.num_random_features % 2:
            raise ValueError(
                f"num_random_features must be even for feature_map='hyperbolic', got {self.num_random_features}"
            )
        if self.feature_redraw_interval is not None and self.feature_redraw_interval < 1:
            raise ValueError(f"feature_redraw_interval must be None or at least 1, got {self.feature_redraw_interval}")
        if self.feature_epsilon < 0:
            raise ValueError(f"feature_epsilon must not be negative, got {self.feature_epsilon}")
        if self.causal_normalizer_epsilon < 0:
            raise ValueError(f"causal_normalizer_epsilon must not be negative, got {self.causal_normalizer_epsilon}")
        if self.expected_pair_norm <= 0:
            raise ValueError(f"expected_pair_norm must be positive, got {self.expected_pair_norm}")
        if self.feature_stabilizer == "sequence":
            if self.feature_map != "softmax":
                raise ValueError(
                    f"feature_stabilizer='sequence' belongs to feature_map='softmax', got {self.feature_map!r}"
                )
            if self.use_cache and (self.is_decoder or self.is_encoder_decoder):
                raise ValueError(
                    "feature_stabilizer='sequence' rescales every key by the whole sequence and cannot be cached: "
                    "use_cache must be False, got True"
                )

    def _validate_local_heads(self):
        heads = self.num_local_attention_heads
        if not isinstance(heads, int) and len(heads) != self.num_hidden_layers:
            raise ValueError(
                f"num_local_attention_heads must be a number or have num_hidden_layers ({self.num_hidden_layers}) "
                f"entries, got {len(heads)}"
            )
        for count in [heads] if isinstance(heads, int) else heads:
            if not 0 <= count <= self.num_attention_heads:
                raise ValueError(
                    f"num_local_attention_heads must be between 0 and num_attention_heads "
                    f"({self.num_attention_heads}), got {count}"
                )
            if count and self.num_key_value_heads != self.num_attention_heads:
                raise ValueError(
                    "num_local_attention_heads splits the heads into two kinds, so num_key_value_heads must be "
                    f"{self.num_attention_heads}, got {self.num_key_value_heads}"
                )
        if self.shifted_local_rotary and (self.local_attention_type != "bucketed" or self.is_decoder):
            raise ValueError(
                "shifted_local_rotary=True belongs to the bucketed heads of an encoder, got local_attention_type="
                f"{self.local_attention_type!r}, is_decoder={self.is_decoder}"
            )

    def _validate_positions(self):
        rotary_heads = self.uses_rotary or (self.num_local_attention_heads and self.local_rotary)
        if rotary_heads and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if "sinusoidal" in self.position_embedding_type and self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even for sinusoidal positions, got {self.hidden_size}")
        shape = self.axial_position_shape
        if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] < self.max_position_embeddings:
            raise ValueError(
                "axial_position_shape must be two numbers whose product is at least max_position_embeddings "
                f"({self.max_position_embeddings}), got {shape}"
            )


_DERIVED_FROM = {
    "hidden_size": ("head_dim", "intermediate_size", "num_random_features", "expected_pair_norm"),
    "num_attention_heads": ("head_dim", "num_key_value_heads", "num_random_features", "expected_pair_norm"),
    "head_dim": ("num_random_features", "expected_pair_norm"),
    "num_hidden_layers": ("layer_types",),
    "feature_map": ("feature_epsilon",),
    "norm_type": ("final_norm_type",),
    "norm_position": ("final_norm_type",),
    "max_position_embeddings": ("axial_position_shape",),
    "is_decoder": ("classifier_pooling",),
}

__all__ = ["PerformerConfig"]
