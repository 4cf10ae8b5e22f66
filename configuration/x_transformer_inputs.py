# Copyright 2026 The hf_efficient authors. Licensed under the Apache License, Version 2.0.
"""The fields of an XTransformer that reads something other than tokens: images, or vectors of numbers."""

import dataclasses
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .self_contained import SelfContainedConfig
from .x_transformer_rules import check_at_least, refuse


@strict
class XTransformerInputsConfig(SelfContainedConfig):
    r"""
    What an XTransformer reads in place of tokens, or beside them. `XTransformerConfig` has these fields too.

    **Images** (`XTransformerForImageClassification`, `XTransformerForImageTextToText`)

    Args:
        image_size (`int` or `list[int]`, defaults to 224): side of the images, or height and width. Other sizes work
            too: learned positions are interpolated.
        patch_size (`int`, defaults to 16): side of a patch.
        num_channels (`int`, defaults to 3): channels of the images.
        image_positions (`str`, *optional*, defaults to `"sincos"`): added to the patches: `"sincos"` (fixed sines and
            cosines of row and column, arXiv 2205.01580), `"learned"` (a table), or None. Rotary positions and position
            biases, where there are any, count patches in reading order.
        num_register_tokens (`int`, defaults to 0): learned tokens behind the patches, which are not pooled
            (arXiv 2309.16588).
        image_encoder_overrides (`dict`, *optional*): fields in which the image encoder of a model for images and text
            differs.
        image_fusion (`str`, defaults to `"cross_attention"`): how that model reads an image: the decoder reads it
            through `"cross_attention"` (a captioner), or it is `"prepended"` to the tokens of the text encoder
            (PaLI, arXiv 2209.06794).

    **Vectors in front of tokens**

        prepend_embeddings (`bool`, defaults to `False`): the cache of a decoder that is given `prepend_embeds` knows
            them from tokens. Without a cache, and in encoders, they need no such promise.

    **Vectors** (`XTransformerForContinuousPrediction`)

        input_feature_size (`int`, *optional*): size of the input vectors; `hidden_size`, without a projection, if not
            given.
        output_feature_size (`int`, *optional*): size of the predicted ones; `hidden_size`, without a projection, if
            not given.
        distribution_output (`str`, *optional*): `"normal"` predicts a mean and a variance for each number.
        feature_loss (`str`, defaults to `"mse"`): `"mse"` or `"l1"`, without a distribution. With one, the loss is its
            negative log-likelihood.
    """

    # Images
    image_size: int | list[int] = 224
    patch_size: int = 16
    num_channels: int = 3
    image_positions: Literal["sincos", "learned"] | None = "sincos"
    num_register_tokens: int = 0
    image_encoder_overrides: dict[str, Any] | None = None
    image_fusion: Literal["cross_attention", "prepended"] = "cross_attention"
    # Vectors in front of tokens
    prepend_embeddings: bool = False
    # Vectors
    input_feature_size: int | None = None
    output_feature_size: int | None = None
    distribution_output: Literal["normal"] | None = None
    feature_loss: Literal["mse", "l1"] = "mse"

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`."""
        height, width = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def check_inputs(self) -> None:
        """Ranges of the fields above.

        Raises:
            ValueError: the field, what was expected and what came.
        """
        check_at_least(self, 1, "patch_size", "num_channels", "input_feature_size", "output_feature_size")
        check_at_least(self, 0, "num_register_tokens")
        sides = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"image_size must be a positive number, or height and width, got {self.image_size}")
        if self.distribution_output is not None and self.feature_loss != "mse":
            refuse(self, "feature_loss", "distribution_output=None", "a distribution's loss is its log-likelihood")
        if self.image_encoder_overrides:
            unknown = sorted(set(self.image_encoder_overrides) - {field.name for field in dataclasses.fields(self)})
            if unknown:
                raise ValueError(f"image_encoder_overrides must hold fields of XTransformerConfig, got {unknown}")
            if not self.is_encoder_decoder:
                raise ValueError("image_encoder_overrides needs is_encoder_decoder=True, got False")

    def check_image_encoder(self) -> None:
        """What the fields of an image encoder cannot be; known only when one is built.

        Raises:
            ValueError: a decoder, patches that do not divide the image, or a width without sines and cosines.
        """
        if self.is_decoder or self.is_encoder_decoder:
            name = "is_decoder" if self.is_decoder else "is_encoder_decoder"
            raise ValueError(f"{name} must be False in the encoder of an image, got True")
        if self.absolute_positions is not None:
            refuse(self, "absolute_positions", "image_positions in its place", "patches stand in rows and columns")
        if self.embedding_size is not None or self.type_vocab_size:
            name = "type_vocab_size" if self.type_vocab_size else "embedding_size"
            refuse(self, name, "tokens", "an image has patches")
        sides = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        if any(side % self.patch_size for side in sides):
            raise ValueError(f"image_size must be a multiple of patch_size ({self.patch_size}), got {self.image_size}")
        if self.image_positions == "sincos" and (self.hidden_size % 4 or self.hidden_size < 8):
            refuse(self, "image_positions", "a hidden_size that 4 divides, of at least 8", f"got {self.hidden_size}")

    def check_image_and_text(self) -> None:
        """What a model for images and text cannot be; known only when one is built.

        Raises:
            ValueError: one stack; or widths of image encoder, text encoder and decoder that do not fit together.
        """
        if not self.is_encoder_decoder:
            raise ValueError("a model for images and text needs is_encoder_decoder=True, got False")
        size = self.image_encoder_config().hidden_size
        if self.image_fusion == "prepended":
            wanted, name = self.encoder_config().token_size, "the width of the text encoder's embeddings"
        else:
            wanted, name = self.encoder_state_size, "cross_attention_hidden_size"
            for of_text in ("encoder_overrides", "share_embeddings"):
                if getattr(self, of_text):
                    refuse(self, of_text, "image_fusion='prepended'", "a captioner has no encoder of text")
        if size != wanted:
            raise ValueError(f"the image encoder's hidden_size must be {name} ({wanted}), got {size}")
