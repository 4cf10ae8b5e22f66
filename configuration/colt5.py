# Copyright 2026 The hf_efficient authors. Licensed under the Apache License, Version 2.0.
"""Configuration of CoLT5 (arXiv 2303.09752): long inputs through conditional computation."""

import copy
from typing import Literal

from huggingface_hub.dataclasses import strict

from .model_card import ArchitectureFacts
from .self_contained import SelfContainedConfig


# The name under which the cache layer of a causal block is registered: see modeling/routed_cache.py.
ROUTED_LAYER_TYPE = "colt5_state"
# Light heads of the paper's sizes where they are not a quarter: its Base has 4 and 8 of 12.
LIGHT_HEADS = {12: 4}


@strict
class CoLT5Config(SelfContainedConfig):
    r"""
    Everything that a CoLT5 is made of; the defaults are the paper's Base. One configuration serves the
    encoder–decoder, the encoder, the causal decoder and the image classifier; each class takes what concerns it.

    Args:
        vocab_size (`int`, defaults to 32128): number of token ids.
        hidden_size (`int`, defaults to 768): width of the model.
        num_hidden_layers (`int`, defaults to 12): blocks of the encoder, or of the one stack there is.
        num_decoder_layers (`int`, *optional*): blocks of the decoder, as many as of the encoder if not given.
        num_attention_heads (`int`, defaults to 12): heads of the decoder.
        head_dim (`int`, defaults to 64): size of every head.
        num_light_attention_heads (`int`, *optional*): heads of the light branch, a quarter of `num_attention_heads`
            (4 of 12) if not given.
        num_heavy_attention_heads (`int`, *optional*): heads of the heavy branch, the remaining ones if not given.
        cross_attention_key_value_heads (`int`, defaults to 1): key and value heads of the decoder's cross-attention;
            1 is multi-query attention (arXiv 1911.02150), the paper's choice.
        intermediate_size (`int`, defaults to 2048): inner width of the decoder's feed-forward.
        light_intermediate_size, heavy_intermediate_size (`int`, *optional*): inner widths of the light and the heavy
            feed-forward, 1/2 and 4 times `intermediate_size` if not given.
        hidden_act (`str`, defaults to `"gelu_new"`): activation of the feed-forward, a name from `ACT2FN`.
        gated_feed_forward (`bool`, defaults to `True`): `act(gate) * up` (arXiv 2002.05202).
        mlp_bias (`bool`, defaults to `False`): biases of the feed-forward.
        norm_eps (`float`, defaults to 1e-6): epsilon of the root mean square norms.
        dropout_rate (`float`, defaults to 0.1): dropout on embeddings, branches, attention weights, inside the
            feed-forward and behind the last norm.
        classifier_dropout (`float`, defaults to 0): dropout before a classification head.
        light_attention_radius (`int`, defaults to 127): how many tokens to either side the light branch sees.
        relative_attention_num_buckets (`int`, defaults to 32), relative_attention_max_distance (`int`, defaults to
            128): T5's position bias, of the light branch and of the decoder.
        heavy_position_embedding_type (`str`, defaults to `"rotary"`): positions of the heavy branch: `"rotary"`
            (arXiv 2104.09864), which needs no queries × keys matrix; `"relative_bias"`, T5's, for upcycled
            checkpoints; or `"none"`.
        rotary_emb_base (`float`, defaults to 10000): base of the rotary wavelengths.
        num_routed_tokens, num_routed_queries, num_routed_keys (`int` or `float`, default to 1/16, 1/16 and 1/8): how
            many tokens go through the heavy feed-forward, ask in the heavy attention and are asked there. A float is a
            fraction of the real tokens of a row, an int a number. (Of the last `routing_window` in a causal stack.)
        num_key_value_sets (`int`, defaults to 1): sets of heavy keys, each routed by itself and read by its own heads.
        routing_window (`int`, defaults to 128): how far back a causal router looks, see `CausalTokenRouter`.
        routing_score_ratio (`float`, defaults to 9/8), routing_temperature (`float`, defaults to 1.0), routing_method
            (`str`, defaults to `"exact"`), routing_iterations (`int`, defaults to 50), routing_initial_temperature
            (`float`, *optional*), routing_temperature_decay (`float`, defaults to 1.0), straight_through_routing
            (`bool`, defaults to `False`), routing_normalization (`str`, defaults to `"rms"`), static_routing (`bool`,
            defaults to `False`): see `RouterOptions`.
        multiply_keys_by_score (`bool`, defaults to `True`), null_query_token, null_key_value (`bool`, default to
            `False`): see `HeavyAttention`; the other values are CoLT5-attention's.
        image_size (`int`, defaults to 224), patch_size (`int`, defaults to 16), num_channels (`int`, defaults to 3),
            image_window_size (`int`, defaults to 7): of the image classifier: its images, and the side of the windows
            of its light attention, in patches.
        heavy_attention_in_windows (`bool`, defaults to `False`): see `RoutedImageAttention`.
        initializer_factor (`float`, defaults to 1.0): factor on the standard deviations of initial weights, which keep
            variances as T5's do.
        is_decoder (`bool`, defaults to `False`): a causal stack. `CoLT5ForCausalLM` sets it.
        use_cache, tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id, decoder_start_token_id: as in T5.1.1.

    Raises:
        ValueError: fields that cannot go together; the message names them. (Wrong types raise too, see `strict`.)
    """

    model_type = "colt5"
    architecture_facts = ArchitectureFacts(
        description="A CoLT5: every token goes through a light branch, those that a learned router picks also "
        "through a heavy one, so that long inputs cost little.",
        limits="The routers decide which tokens are looked at closely; they pick as many of a text that needs "
        "more as of one that needs less. Content beyond what it was trained on is beyond what it knows.",
        arxiv="2303.09752",
        citation="""
@inproceedings{ainslie2023colt5,
  title     = {{CoLT5}: Faster Long-Range Transformers with Conditional Computation},
  author    = {Ainslie, Joshua and Lei, Tao and de Jong, Michiel and Onta{\\~n}{\\'o}n, Santiago and Brahma, Siddhartha
               and Zemlyanskiy, Yury and Uthus, David and Guo, Mandy and Lee-Thorp, James and Tay, Yi and
               Sung, Yun-Hsuan and Sanghai, Sumit},
  booktitle = {Conference on Empirical Methods in Natural Language Processing},
  year      = {2023},
  url       = {https://arxiv.org/abs/2303.09752}
}
""",
    )
    attribute_map = {"d_model": "hidden_size", "encoder_layers": "num_hidden_layers"}
    # The feed-forwards, five sixths of a layer's weights and work. Attention stays whole: its heads share position
    # biases, and each set of routed keys has heads of its own.
    base_model_tp_plan = {
        f"layers.*.mlp.{branch}{projection}": style
        for branch in ("light_mlp.", "heavy_mlp.", "")
        for projection, style in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise"))
    }

    vocab_size: int = 32128
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_decoder_layers: int | None = None
    num_attention_heads: int = 12
    head_dim: int = 64
    num_light_attention_heads: int | None = None
    num_heavy_attention_heads: int | None = None
    cross_attention_key_value_heads: int = 1
    intermediate_size: int = 2048
    light_intermediate_size: int | None = None
    heavy_intermediate_size: int | None = None
    hidden_act: str = "gelu_new"
    gated_feed_forward: bool = True
    mlp_bias: bool = False
    norm_eps: float | int = 1e-6
    dropout_rate: float | int = 0.1
    classifier_dropout: float | int = 0.0

    light_attention_radius: int = 127
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    heavy_position_embedding_type: Literal["rotary", "relative_bias", "none"] = "rotary"
    rotary_emb_base: float | int = 10000.0
    num_routed_tokens: int | float = 1 / 16
    num_routed_queries: int | float = 1 / 16
    num_routed_keys: int | float = 1 / 8
    num_key_value_sets: int = 1
    routing_window: int = 128
    routing_score_ratio: float | int = 9 / 8
    routing_temperature: float | int = 1.0
    routing_method: Literal["exact", "coordinate_descent"] = "exact"
    routing_iterations: int = 50
    routing_initial_temperature: float | int | None = None
    routing_temperature_decay: float | int = 1.0
    straight_through_routing: bool = False
    routing_normalization: Literal["rms", "none", "cosine"] = "rms"
    static_routing: bool = False
    multiply_keys_by_score: bool = True
    null_query_token: bool = False
    null_key_value: bool = False

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    image_window_size: int = 7
    heavy_attention_in_windows: bool = False

    initializer_factor: float | int = 1.0
    is_encoder_decoder: bool = True
    is_decoder: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        heads = self.num_attention_heads
        if self.num_light_attention_heads is None:
            self.num_light_attention_heads = LIGHT_HEADS.get(heads, max(heads // 4, 1))
        if self.num_heavy_attention_heads is None:
            self.num_heavy_attention_heads = max(heads - self.num_light_attention_heads, 1)
        if self.light_intermediate_size is None:
            self.light_intermediate_size = max(self.intermediate_size // 2, 1)
        if self.heavy_intermediate_size is None:
            self.heavy_intermediate_size = 4 * self.intermediate_size
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache layer of each block that has one."""
        if self.is_decoder and not self.is_encoder_decoder:
            return [ROUTED_LAYER_TYPE] * self.num_hidden_layers
        return ["full_attention"] * self.num_decoder_layers

    def get_text_config(self, decoder=None, encoder=None):
        """This configuration, for a decoder of another depth with that depth, which caches are made by."""
        if not decoder or encoder or not self.is_encoder_decoder or self.num_decoder_layers == self.num_hidden_layers:
            return self
        decoder_config = copy.deepcopy(self)
        decoder_config.num_hidden_layers = self.num_decoder_layers
        return decoder_config

    def part(self, **changes) -> "CoLT5Config":
        """A copy for a class that is a part, or another use, of the whole."""
        part = copy.deepcopy(self)
        for name, value in changes.items():
            setattr(part, name, value)
        return part

    # Validation

    def validate_layer_type(self):
        """`layer_types` is derived."""

    def validate_architecture(self):
        """What cannot go together; each message names the field, what was expected and what came."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout_rate", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("num_routed_tokens", "num_routed_queries", "num_routed_keys"):
            value = getattr(self, name)
            if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
                raise ValueError(
                    f"{name} must be a number of tokens (an int of at least 1) or a fraction of them (a float above 0 "
                    f"and at most 1.0), got {value!r}"
                )
        if self.num_attention_heads % self.cross_attention_key_value_heads:
            raise ValueError(
                f"cross_attention_key_value_heads must divide num_attention_heads ({self.num_attention_heads}), got "
                f"{self.cross_attention_key_value_heads}"
            )
        if self.num_heavy_attention_heads % self.num_key_value_sets:
            raise ValueError(
                f"num_key_value_sets must divide num_heavy_attention_heads ({self.num_heavy_attention_heads}), got "
                f"{self.num_key_value_sets}"
            )
        if self.heavy_position_embedding_type == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        buckets = self.relative_attention_num_buckets
        if buckets % 2 or buckets < 4:
            raise ValueError(f"relative_attention_num_buckets must be even and at least 4, got {buckets}")
        if self.relative_attention_max_distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance must be above half of relative_attention_num_buckets ({buckets}), "
                f"got {self.relative_attention_max_distance}"
            )
        if self.static_routing and self.is_decoder and not self.is_encoder_decoder:
            raise ValueError("static_routing=True belongs to an encoder, got is_decoder=True")
        if self.routing_score_ratio < 1:
            raise ValueError(f"routing_score_ratio must be at least 1, got {self.routing_score_ratio}")
        if self.routing_temperature <= 0:
            raise ValueError(f"routing_temperature must be above 0, got {self.routing_temperature}")


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_decoder_layers",
    "num_attention_heads",
    "head_dim",
    "num_light_attention_heads",
    "num_heavy_attention_heads",
    "cross_attention_key_value_heads",
    "intermediate_size",
    "light_intermediate_size",
    "heavy_intermediate_size",
    "light_attention_radius",
    "num_key_value_sets",
    "routing_window",
    "routing_iterations",
    "image_size",
    "patch_size",
    "num_channels",
    "image_window_size",
)

__all__ = ["CoLT5Config"]
