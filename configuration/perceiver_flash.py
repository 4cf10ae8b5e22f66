# Copyright 2026 The hf_efficient authors. Licensed under the Apache License, Version 2.0.
"""Configuration of PerceiverFlash: Perceiver (arXiv 2103.03206), its IO (2107.14795) and its AR (2202.07765)."""

import dataclasses
import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from .model_card import ArchitectureFacts
from .self_contained import SelfContainedConfig


# The cache layers of a Perceiver AR, see modeling/perceiver_flash_window.py.
INPUT_LAYER_TYPE = "perceiver_inputs"
LATENT_LAYER_TYPE = "perceiver_latents"


@dataclasses.dataclass(frozen=True)
class PerceiverFlashBlock:
    """The sizes and options of one block: what `modeling/perceiver_flash_layer.py` reads.

    Attributes:
        hidden_size: width of the queries, which is that of the result.
        context_size: width of what is attended to, None for self-attention.
        query_residual, mlp_residual: whether the two branches are added to their input.
        normalize_context: whether what is attended to passes a LayerNorm.
        The others are as in `PerceiverFlashConfig`.
    """

    hidden_size: int
    context_size: int | None
    num_heads: int
    head_dim: int
    value_head_dim: int
    attention_bias: bool
    attention_dropout: float
    rotary_dim: int
    intermediate_size: int
    query_residual: bool
    mlp_residual: bool
    normalize_context: bool
    layer_norm_eps: float
    hidden_act: str
    gated_feed_forward: bool
    mlp_bias: bool
    feed_forward_dropout: float
    chunk_size_feed_forward: int


@strict
class PerceiverFlashConfig(SelfContainedConfig):
    r"""
    Everything that a PerceiverFlash is made of.

    Args:
        vocab_size (`int`, defaults to 262): number of token ids; the default is that of transformers' byte tokenizer
            for Perceiver.
        modality (`str`, defaults to `"text"`): what the model reads: `"text"` (`input_ids`), `"image"`
            (`pixel_values`) or `"features"` (`inputs`, floating point).
        input_size (`int`, `list[int]` or `dict[str, int]`, *optional*): width of the inputs. A list or a dict gives
            each cross-attention an input of its own, in this order. For text `hidden_size` if not given; for images
            it follows from the adapter unless `project_image`.
        hidden_size (`int`, defaults to 512): width of the latents.
        num_latents (`int`, *optional*, defaults to 512): number of latents; None has no latents of its own, so they
            must be given at each call. In a decoder, the largest number of last positions that are computed.
        num_cross_attention_layers (`int`, defaults to 1): how often the latents look at the input (`depth`).
        num_self_attention_layers (`int`, defaults to 6): self-attention blocks behind each of those.
        self_attention_repeats (`int`, defaults to 1): how many times each such group of blocks is applied.
        weight_tie_layers (`bool`, defaults to `False`): all cross-attentions share their weights, and all groups of
            self-attention blocks share theirs; the first of each stays apart unless `tie_first_layer`.
        tie_first_layer (`bool`, defaults to `False`): see there. (The paper has it both ways.)
        num_attention_heads, num_cross_attention_heads, num_query_attention_heads (`int`, default to 8): heads of
            self-attention, of the attention to the input, and of the queries to the latents.
        head_dim, cross_head_dim, query_head_dim (`int`, *optional*): size of a head; width divided by heads if not
            given.
        value_head_dim, cross_value_head_dim, query_value_head_dim (`int`, *optional*): size of a head of the values;
            the same if not given.
        attention_bias (`bool`, defaults to `False`): biases of the query, key and value projections of
            self-attention; the output projection always has one.
        cross_attention_bias (`bool`, defaults to `False`): the same for the other two kinds of attention.
        attention_dropout, cross_attention_dropout, query_attention_dropout (`float`, default to 0): on the weights.
        rotary_dim, cross_rotary_dim, query_rotary_dim (`int`, *optional*): how many channels of a head turn with the
            position (arXiv 2104.09864); 0 for none. With `position_embedding_type="rotary"` whole heads of self- and
            cross-attention if not given, otherwise 0.
        latent_spacing (`float`, defaults to 1): latents of their own stand at multiples of it for rotary positions:
            inputs divided by latents spreads them over the whole input.
        rotary_emb_base (`float`, defaults to 10000): base of the rotary and sinusoidal wavelengths.
        intermediate_size, cross_intermediate_size, query_intermediate_size (`int`, *optional*): width of the
            feed-forwards, four times that of their input if not given. (arXiv 2103.03206 has it as wide as that.)
        hidden_act (`str`, defaults to `"gelu"`): their activation, a name from transformers' `ACT2FN`.
        gated_feed_forward (`bool`, defaults to `False`): `act(gate) * up` (arXiv 2002.05202).
        mlp_bias (`bool`, defaults to `True`): their biases.
        feed_forward_dropout (`float`, defaults to 0): dropout after the activation.
        mlp_residual (`bool`, defaults to `True`): a skip around each feed-forward. `False` is flash-perceiver's
            block: for converted checkpoints.
        normalize_context (`bool`, defaults to `True`): a LayerNorm on what is attended to. `False`: flash-perceiver.
        cross_query_residual (`bool`, defaults to `True`): the latents are added to what they read of the input.
        query_residual (`bool`, defaults to `True`): the same for the queries.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the norms.
        final_norm (`bool`, *optional*): a LayerNorm behind the last block; only in a decoder if not given.
        num_zero_tokens (`int`, defaults to 0): learned tokens in front of the input of each cross-attention.
        latent_drop (`float`, defaults to 0): the part of the latents that a training step leaves out.
        cross_attention_chunk_size (`int`, *optional*, defaults to `"auto"`): read the input in pieces of this many
            positions, so that keys and values of the whole input are never in memory at once; None reads it at once.
            Changes memory, not results. `"auto"` takes pieces on a CPU, outside of `torch.compile`, if nobody asks for
            attention maps: time is the same for wide keys and values (docs/perceiver_flash.md).

        pooling (`str`, defaults to `"mean"`): how the latents become one vector: their `"mean"`, the `"first"`, all
            behind one another (`"concat"`); or `"query"`: one learned query reads them (arXiv 2107.14795).
        output_size (`int`, *optional*): width of `pooler_output` of `PerceiverFlashModel`, or of the outputs of
            `PerceiverFlashIOModel`; None pools (projects) nothing.
        output_norm (`bool`, defaults to `True`): a LayerNorm in front of that projection and of classifiers.
        classifier_dropout (`float`, defaults to 0): dropout in front of a classifier.
        query_size (`int`, *optional*): width of the queries; that of the input for text, otherwise `hidden_size`, if
            not given.
        num_queries (`int`, *optional*): number of learned queries; None has none, so they must be given at each call.
            `PerceiverFlashForMaskedLM` has one for each position (`max_position_embeddings`).
        lm_head_bias (`bool`, defaults to `False`): bias of the language modelling heads.

        position_embedding_type (`str`, defaults to `"learned"`): of text: `"learned"`, `"sinusoidal"`, `"rotary"` or
            `"none"`.
        max_position_embeddings (`int`, defaults to 2048): size of the learned table.
        image_size (`int` or `list[int]`, defaults to 224): height and width. Other sizes work too.
        num_channels (`int`, defaults to 3): channels of an image.
        channels_last (`bool`, defaults to `False`): images are `[B, H, W, C]`.
        patch_size (`int`, defaults to 1): side of the squares of pixels that make one input.
        image_stem (`str`, defaults to `"none"`): what comes before the patches: `"conv1x1"`, or `"conv"`, a
            convolution with batch norm and a maximum that make the image four times smaller (arXiv 2107.14795).
        image_stem_channels (`int`, defaults to 64): its channels.
        image_position_encoding (`str`, defaults to `"fourier"`): `"fourier"` (arXiv 2103.03206), `"gaussian_fourier"`
            (arXiv 2006.10739), `"nerf"` (arXiv 2003.08934), `"learned"` or `"none"`; appended to the channels.
        num_frequency_bands (`int`, defaults to 64): frequencies per axis, or in all for `"gaussian_fourier"`.
        image_max_resolution (`list[int]`, *optional*): rows and columns whose Nyquist frequency is the highest of
            `"fourier"`; those of the grid of `image_size` if not given.
        fourier_scale (`float`, defaults to 1): standard deviation of the frequencies of `"gaussian_fourier"`.
        position_size (`int`, *optional*): width of `"learned"` positions (64 if not given), or, with
            `project_positions`, of the projected ones.
        project_positions (`bool`, defaults to `False`): a linear layer on the positions of images.
        project_image (`bool`, defaults to `False`): LayerNorm, linear layer to `input_size`, LayerNorm.

        is_decoder (`bool`, defaults to `False`): Perceiver AR: the latents are the last positions of the input, and
            nothing sees what comes behind it. `PerceiverFlashForCausalLM` sets it.
        latent_stride (`int`, *optional*): in a decoder, the latents begin at a multiple of it: the first one that
            leaves at most `num_latents` positions. Half of `num_latents` if not given. 1 always computes the last
            `num_latents` positions, and computes all of them anew for each generated token.
        initializer_range (`float`, defaults to 0.02): standard deviation of initial weights.
        use_cache, tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id: as in every model of transformers.

    Raises:
        ValueError: fields that cannot go together; the message names them. (Wrong types raise too, see `strict`.)
    """

    model_type = "perceiver_flash"
    architecture_facts = ArchitectureFacts(
        description="A Perceiver: a small array of latents reads the input by cross-attention, and all depth is among "
        "the latents.",
        limits="Everything that is read passes through the latents, whose number bounds what they can hold. Content "
        "beyond what it was trained on is beyond what it knows.",
        arxiv="2103.03206",
        citation="""
@inproceedings{jaegle2021perceiver,
  title     = {Perceiver: General Perception with Iterative Attention},
  author    = {Jaegle, Andrew and Gimeno, Felix and Brock, Andrew and Zisserman, Andrew and Vinyals, Oriol and
               Carreira, Jo{\\~a}o},
  booktitle = {International Conference on Machine Learning},
  year      = {2021},
  url       = {https://arxiv.org/abs/2103.03206}
}
""",
    )
    attribute_map = {"d_latents": "hidden_size"}
    base_model_tp_plan = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 262
    modality: Literal["text", "image", "features"] = "text"
    input_size: int | list[int] | dict[str, int] | None = None
    hidden_size: int = 512
    num_latents: int | None = 512
    num_cross_attention_layers: int = 1
    num_self_attention_layers: int = 6
    self_attention_repeats: int = 1
    weight_tie_layers: bool = False
    tie_first_layer: bool = False
    num_attention_heads: int = 8
    num_cross_attention_heads: int = 8
    num_query_attention_heads: int = 8
    head_dim: int | None = None
    cross_head_dim: int | None = None
    query_head_dim: int | None = None
    value_head_dim: int | None = None
    cross_value_head_dim: int | None = None
    query_value_head_dim: int | None = None
    attention_bias: bool = False
    cross_attention_bias: bool = False
    attention_dropout: float | int = 0.0
    cross_attention_dropout: float | int = 0.0
    query_attention_dropout: float | int = 0.0
    rotary_dim: int | None = None
    cross_rotary_dim: int | None = None
    query_rotary_dim: int | None = None
    latent_spacing: float | int = 1.0
    rotary_emb_base: float | int = 10000.0
    intermediate_size: int | None = None
    cross_intermediate_size: int | None = None
    query_intermediate_size: int | None = None
    hidden_act: str = "gelu"
    gated_feed_forward: bool = False
    mlp_bias: bool = True
    feed_forward_dropout: float | int = 0.0
    mlp_residual: bool = True
    normalize_context: bool = True
    cross_query_residual: bool = True
    query_residual: bool = True
    layer_norm_eps: float | int = 1e-5
    final_norm: bool | None = None
    num_zero_tokens: int = 0
    latent_drop: float | int = 0.0
    cross_attention_chunk_size: int | Literal["auto"] | None = "auto"
    pooling: Literal["mean", "first", "concat", "query"] = "mean"
    output_size: int | None = None
    output_norm: bool = True
    classifier_dropout: float | int = 0.0
    query_size: int | None = None
    num_queries: int | None = None
    lm_head_bias: bool = False
    position_embedding_type: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    max_position_embeddings: int = 2048
    image_size: int | list[int] = 224
    num_channels: int = 3
    channels_last: bool = False
    patch_size: int = 1
    image_stem: Literal["none", "conv1x1", "conv"] = "none"
    image_stem_channels: int = 64
    image_position_encoding: Literal["fourier", "gaussian_fourier", "nerf", "learned", "none"] = "fourier"
    num_frequency_bands: int = 64
    image_max_resolution: list[int] | None = None
    fourier_scale: float | int = 1.0
    position_size: int | None = None
    project_positions: bool = False
    project_image: bool = False
    is_decoder: bool = False
    latent_stride: int | None = None
    initializer_range: float | int = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._check_at_least(1, "hidden_size", "num_cross_attention_layers", "num_latents", "max_position_embeddings")
        self._check_at_least(1, "num_attention_heads", "num_cross_attention_heads", "num_query_attention_heads")
        self._check_at_least(1, "self_attention_repeats", "num_channels", "patch_size", "num_frequency_bands")
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size, self.image_size]
        if self.image_max_resolution is None:
            self.image_max_resolution = list(self.image_grid(*self.image_size))
        if self.modality == "image" and not self.project_image:
            self.input_size = self.image_channels
        elif self.input_size is None and self.modality == "text":
            self.input_size = self.hidden_size
        if self.query_size is None:
            text = self.modality == "text" and isinstance(self.input_size, int)
            self.query_size = self.input_size if text else self.hidden_size
        self._derive_heads("", "num_attention_heads", self.hidden_size)
        self._derive_heads("cross_", "num_cross_attention_heads", self.hidden_size)
        self._derive_heads("query_", "num_query_attention_heads", self.query_size)
        self._check_heads("", "num_attention_heads", self.hidden_size)
        self._check_heads("cross_", "num_cross_attention_heads", self.hidden_size)
        for name, width in (("", self.hidden_size), ("cross_", self.hidden_size), ("query_", self.query_size)):
            if getattr(self, f"{name}intermediate_size") is None:
                setattr(self, f"{name}intermediate_size", 4 * width)
        rotary = self.position_embedding_type == "rotary"
        for name, default in (("", self.head_dim), ("cross_", self.cross_head_dim), ("query_", 0)):
            if getattr(self, f"{name}rotary_dim") is None:
                setattr(self, f"{name}rotary_dim", default if rotary else 0)
        if self.final_norm is None:
            self.final_norm = self.is_decoder
        if self.latent_stride is None and self.num_latents is not None:
            self.latent_stride = max(1, self.num_latents // 2)
        super().__post_init__(**kwargs)

    def _derive_heads(self, name: str, heads_name: str, width: int) -> None:
        heads = getattr(self, heads_name)
        if getattr(self, f"{name}head_dim") is None:
            if width % heads:
                return  # refused where such attention is built: few models have queries
            setattr(self, f"{name}head_dim", width // heads)
        if getattr(self, f"{name}value_head_dim") is None:
            setattr(self, f"{name}value_head_dim", getattr(self, f"{name}head_dim"))

    def _check_heads(self, name: str, heads_name: str, width: int) -> None:
        if getattr(self, f"{name}head_dim") is None:
            raise ValueError(
                f"{heads_name} must divide the width of its queries ({width}) unless {name}head_dim is given, got "
                f"{getattr(self, heads_name)}"
            )

    # What the models are built of

    @property
    def input_sizes(self) -> list[int]:
        """Width of the input of each cross-attention."""
        size = self.input_size
        if isinstance(size, int):
            return [size] * self.num_cross_attention_layers
        return list(size.values()) if isinstance(size, dict) else list(size)

    @property
    def input_names(self) -> list[str] | None:
        """Names of the inputs in the order of their cross-attentions, if they have names."""
        return list(self.input_size) if isinstance(self.input_size, dict) else None

    @property
    def layer_schedule(self) -> list[tuple[int, bool]]:
        """For each block that runs, in order: its index in `layers`, and whether it is a cross-attention."""
        schedule: list[tuple[int, bool]] = []
        count = 0
        shared: list[tuple[int, bool]] | None = None
        for index in range(self.num_cross_attention_layers):
            if shared is None:
                group = [(count, True)]
                group += [(count + 1 + inner, False) for inner in range(self.num_self_attention_layers)]
                count += len(group)
                if self.weight_tie_layers and (index > 0 or self.tie_first_layer):
                    shared = group
            else:
                group = shared
            schedule += group[:1] + group[1:] * self.self_attention_repeats
        return schedule

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks that run: how many attention maps and hidden states there are (of the latter one more)."""
        return self.num_cross_attention_layers * (1 + self.num_self_attention_layers * self.self_attention_repeats)

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache layer of each block that runs."""
        return [INPUT_LAYER_TYPE if is_cross else LATENT_LAYER_TYPE for _, is_cross in self.layer_schedule]

    def validate_layer_type(self):
        """`layer_types` follows from the other fields."""

    def _block(self, name: str, width: int, context: int | None, heads: int, **options) -> PerceiverFlashBlock:
        return PerceiverFlashBlock(
            hidden_size=width,
            context_size=context,
            num_heads=heads,
            head_dim=getattr(self, f"{name}head_dim"),
            value_head_dim=getattr(self, f"{name}value_head_dim"),
            rotary_dim=getattr(self, f"{name}rotary_dim"),
            intermediate_size=getattr(self, f"{name}intermediate_size"),
            attention_dropout=getattr(self, f"{name}attention_dropout"),
            mlp_residual=self.mlp_residual,
            normalize_context=self.normalize_context and context is not None,
            layer_norm_eps=self.layer_norm_eps,
            hidden_act=self.hidden_act,
            gated_feed_forward=self.gated_feed_forward,
            mlp_bias=self.mlp_bias,
            feed_forward_dropout=self.feed_forward_dropout,
            chunk_size_feed_forward=self.chunk_size_feed_forward,
            **options,
        )

    def cross_block(self, input_size: int) -> PerceiverFlashBlock:
        """The block in which the latents read an input of this width."""
        options = {"attention_bias": self.cross_attention_bias, "query_residual": self.cross_query_residual}
        return self._block("cross_", self.hidden_size, input_size, self.num_cross_attention_heads, **options)

    def latent_block(self) -> PerceiverFlashBlock:
        """A block of self-attention among the latents."""
        options = {"attention_bias": self.attention_bias, "query_residual": True}
        return self._block("", self.hidden_size, None, self.num_attention_heads, **options)

    def query_block(self) -> PerceiverFlashBlock:
        """The block in which queries read the latents.

        Raises:
            ValueError: the heads do not divide the queries.
        """
        self._check_heads("query_", "num_query_attention_heads", self.query_size)
        options = {"attention_bias": self.cross_attention_bias, "query_residual": self.query_residual}
        return self._block("query_", self.query_size, self.hidden_size, self.num_query_attention_heads, **options)

    def image_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of inputs that an image of this size becomes."""
        if self.image_stem == "conv":  # a convolution of stride 2, and a maximum over 3x3 of stride 2 without padding
            height, width = ((math.ceil(size / 2) - 3) // 2 + 1 for size in (height, width))
        return height // self.patch_size, width // self.patch_size

    @property
    def position_channels(self) -> int:
        """Width of the positions of images before they are projected."""
        return {
            "fourier": 2 * (2 * self.num_frequency_bands + 1),
            "gaussian_fourier": self.num_frequency_bands,
            "nerf": 4 * self.num_frequency_bands,
            "learned": self.position_size or 64,
            "none": 0,
        }[self.image_position_encoding]

    @property
    def image_channels(self) -> int:
        """Width of an input that is made of an image, before `project_image`."""
        channels = self.num_channels if self.image_stem == "none" else self.image_stem_channels
        positions = self.position_channels
        if self.project_positions and positions:
            positions = self.position_size or positions
        return channels * self.patch_size**2 + positions

    # Validation

    def _check_at_least(self, minimum: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")

    def validate_architecture(self):
        """What cannot go together; each message names the field, what was expected and what came."""
        self._check_at_least(0, "num_self_attention_layers", "num_zero_tokens", "chunk_size_feed_forward")
        self._check_at_least(1, "vocab_size", "latent_stride", "num_queries")
        if self.cross_attention_chunk_size != "auto":
            self._check_at_least(1, "cross_attention_chunk_size")
        self._check_at_least(1, "output_size", "query_size", "image_stem_channels")
        for name in ("attention", "cross_attention", "query_attention", "feed_forward", "classifier"):
            value = getattr(self, f"{name}_dropout")
            if not 0 <= value < 1:
                raise ValueError(f"{name}_dropout must be in [0, 1), got {value}")
        if not 0 <= self.latent_drop < 1:
            raise ValueError(f"latent_drop must be in [0, 1), got {self.latent_drop}")
        if self.latent_spacing <= 0:
            raise ValueError(f"latent_spacing must be greater than 0, got {self.latent_spacing}")
        for name in ("", "cross_", "query_"):
            self._check_at_least(1, f"{name}head_dim", f"{name}value_head_dim", f"{name}intermediate_size")
            turned, size = getattr(self, f"{name}rotary_dim"), getattr(self, f"{name}head_dim")
            if turned % 2 or turned < 0 or (size is not None and turned > size):
                raise ValueError(f"{name}rotary_dim must be even and at most {name}head_dim ({size}), got {turned}")
        self._validate_inputs()
        if self.pooling == "concat" and (self.num_latents is None or self.latent_drop):
            raise ValueError(
                "pooling='concat' needs a fixed number of latents, got "
                f"num_latents={self.num_latents}, latent_drop={self.latent_drop}"
            )
        if len(self.image_size) != 2 or len(self.image_max_resolution) != 2:
            raise ValueError(
                "image_size and image_max_resolution must be rows and columns, got "
                f"{self.image_size} and {self.image_max_resolution}"
            )
        if self.is_decoder:
            self._validate_decoder()

    def _validate_inputs(self):
        if self.input_size is None:
            raise ValueError(f"input_size must be given for modality={self.modality!r}, got None")
        if min(self.input_sizes, default=0) < 1 or len(self.input_sizes) != self.num_cross_attention_layers:
            raise ValueError(
                "input_size must be a width, or one for each of num_cross_attention_layers "
                f"({self.num_cross_attention_layers}), got {self.input_size}"
            )
        if isinstance(self.input_size, int):
            return
        if self.modality != "features":
            raise ValueError(f"several inputs need modality='features', got {self.modality!r}")
        if self.weight_tie_layers and len(set(self.input_sizes[0 if self.tie_first_layer else 1 :])) > 1:
            raise ValueError(
                f"weight_tie_layers=True needs inputs of one width to share weights, got input_size={self.input_size}"
            )

    def _validate_decoder(self):
        needed = {
            "modality": ("text", self.modality),
            "input_size": (self.hidden_size, self.input_size),
            "num_zero_tokens": (0, self.num_zero_tokens),
            "latent_drop": (0, self.latent_drop),
            "latent_spacing": (1, self.latent_spacing),
        }
        for name, (expected, came) in needed.items():
            if came != expected:
                raise ValueError(f"is_decoder=True makes latents of the input: {name} must be {expected}, got {came}")
        if self.num_latents is None or self.latent_stride > self.num_latents:
            raise ValueError(
                "is_decoder=True needs num_latents, and latent_stride of at most as many, got "
                f"num_latents={self.num_latents}, latent_stride={self.latent_stride}"
            )


__all__ = ["PerceiverFlashConfig"]
