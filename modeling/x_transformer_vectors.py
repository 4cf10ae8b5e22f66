"""XTransformer for vectors: sequences of numbers in place of token ids, and numbers in place of logits.

    x = projection(vectors), then as for tokens                          XTransformerContinuousModel.forward
    prediction = head(norm(x))                                           XTransformerForContinuousPrediction.forward

An encoder predicts something at each position, a decoder the next vector (arXiv 2112.05329), which `generate` feeds
back. With `distribution_output="normal"` a prediction is a mean and a variance. Cost: that of the stack.
"""

from dataclasses import dataclass
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from ..configuration.x_transformer import XTransformerConfig
from .cache_name import CACHE, takes_cache
from .x_transformer import XTransformerModel, XTransformerPreTrainedModel
from .x_transformer_embeddings import XTransformerEmbeddings


@dataclass
class ContinuousPredictionOutput(ModelOutput):
    """What `XTransformerForContinuousPrediction` returns.

    Attributes:
        loss: a number, if labels are given.
        prediction: `[B, N, output_feature_size]`, the mean if there is a distribution.
        variance: `[B, N, output_feature_size]`, with `distribution_output="normal"`.
        cache (or past_key_values), hidden_states, attentions: as everywhere in transformers.
    """

    loss: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache


class FeatureProjection(nn.Module):
    """Vectors `[B, N, input_feature_size]` to the width of embeddings, `[B, N, embedding_size]`."""

    def __init__(self, config: XTransformerConfig):
        super().__init__()
        self.embedding_dim = config.token_size
        self.feature_size = config.token_size if config.input_feature_size is None else config.input_feature_size
        self.projection = nn.Identity()
        if config.input_feature_size is not None:
            self.projection = nn.Linear(self.feature_size, self.embedding_dim, bias=False)

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        shape = tuple(input_features.shape)
        if len(shape) != 3 or shape[-1] != self.feature_size or not input_features.is_floating_point():
            raise ValueError(
                f"input_features must be floating point of shape [batch, length, {self.feature_size}], got "
                f"{input_features.dtype} of shape {shape}"
            )
        return self.projection(input_features)


class XTransformerContinuousModel(XTransformerModel):
    """The stack of blocks over a sequence of vectors."""

    main_input_name = "input_features"
    input_modalities = ("time",)

    def make_inputs(self, config: XTransformerConfig) -> tuple[nn.Module, nn.Module]:
        return FeatureProjection(config), XTransformerEmbeddings(config)

    def forward(
        self, input_features: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """Hidden states for `input_features` `[B, N, input_feature_size]`; the rest as in `XTransformerModel`."""
        return super().forward(inputs_embeds=self.embed_tokens(input_features), **kwargs)


class XTransformerForContinuousPrediction(XTransformerPreTrainedModel):
    """Predicts vectors: at each position (an encoder), or the next one (a decoder, with `generate`)."""

    main_input_name = "input_features"
    input_modalities = ("time",)
    # The loss is a mean over numbers, which Trainer does not count.
    accepts_loss_kwargs = False

    def __init__(self, config: XTransformerConfig):
        super().__init__(config)
        self.model = XTransformerContinuousModel(config)
        self.head = nn.Identity()
        if config.output_feature_size is not None:
            parts = 1 if config.distribution_output is None else 2
            self.head = nn.Linear(config.hidden_size, parts * config.output_feature_size, bias=False)
        elif config.distribution_output is not None:
            raise ValueError("distribution_output='normal' needs output_feature_size, got None")
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ContinuousPredictionOutput:
        """Predictions `[B, N, output_feature_size]`.

        Args:
            input_features: `[B, N, input_feature_size]`, floating point.
            attention_mask: `[B, everything seen]`, 1 at real vectors and 0 at padding, on either side. Padding is not
                predicted either.
            past_key_values: a cache made with `DynamicCache(config=model.config)`; decoders only.
            labels: `[B, N, output_feature_size]`: the targets; in a decoder the sequence itself (the loss shifts it).

        Raises:
            ValueError: inputs or labels of a wrong shape.
        """
        outputs = self.model(
            input_features,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        prediction, variance = self.head(outputs.last_hidden_state), None
        if self.config.distribution_output is not None:
            prediction, log_variance = prediction.chunk(2, dim=-1)
            variance = log_variance.exp()
        return ContinuousPredictionOutput(
            loss=None if labels is None else self._loss(prediction, variance, labels, attention_mask),
            prediction=prediction,
            variance=variance,
            cache=outputs.get(CACHE),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, prediction, variance, labels, attention_mask):
        """The mean over the numbers that are real."""
        if labels.shape != prediction.shape:
            raise ValueError(f"labels must have shape {tuple(prediction.shape)}, got {tuple(labels.shape)}")
        if self.config.is_decoder:
            prediction, labels = prediction[:, :-1], labels[:, 1:]
            variance = None if variance is None else variance[:, :-1]
            attention_mask = None if attention_mask is None else attention_mask[:, 1:]
        if variance is not None:
            loss = F.gaussian_nll_loss(prediction, labels, variance, reduction="none")
        else:
            loss = (F.mse_loss if self.config.feature_loss == "mse" else F.l1_loss)(
                prediction, labels, reduction="none"
            )
        if attention_mask is None:
            return loss.mean()
        real = (attention_mask != 0)[..., None].expand_as(loss)
        return loss.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)

    @classmethod
    def can_generate(cls) -> bool:
        # Not tokens. (Of remote code, transformers takes any `generate` for its own, unless it is told.)
        return False

    @torch.no_grad()
    def generate(
        self,
        input_features: torch.Tensor,
        max_new_tokens: int,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 1.0,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The next vectors, each fed back: `[B, max_new_tokens, output_feature_size]`.

        Args:
            input_features: `[B, N, input_feature_size]`, the beginning.
            attention_mask: `[B, N]`, 0 at padding, which has to stand on the left.
            temperature: factor of the standard deviation of a distribution, from which vectors are drawn; 0 takes the
                mean. Without a distribution the prediction itself is next.
            generator: the source of randomness, torch's own if not given.

        Raises:
            ValueError: an encoder, vectors that cannot be fed back, padding on the right, or a negative temperature.
        """
        sizes = (self.model.embed_tokens.feature_size, self.config.output_feature_size or self.config.hidden_size)
        if not self.config.is_decoder:
            raise ValueError("generate needs is_decoder=True, got an encoder")
        if sizes[0] != sizes[1]:
            raise ValueError(f"generate feeds outputs back, so output_feature_size must be {sizes[0]}, got {sizes[1]}")
        if attention_mask is not None and not bool((attention_mask[:, -1] != 0).all()):
            raise ValueError("attention_mask must be 1 at the last vector of each row: padding stands on the left")
        if temperature < 0 or max_new_tokens < 1:
            name, value = ("max_new_tokens", max_new_tokens) if temperature >= 0 else ("temperature", temperature)
            raise ValueError(f"{name} must be {'at least 1' if temperature >= 0 else 'at least 0'}, got {value}")
        inputs, cache, generated = input_features, None, []
        for _ in range(max_new_tokens):
            output = self(
                inputs, attention_mask=attention_mask, past_key_values=cache, use_cache=use_cache, return_dict=True
            )
            new = output.prediction[:, -1:]
            if output.variance is not None and temperature > 0:
                noise = torch.randn(new.shape, dtype=new.dtype, device=new.device, generator=generator)
                new = new + temperature * output.variance[:, -1:].sqrt() * noise
            generated.append(new)
            cache = output.cache
            inputs = new if use_cache else torch.cat([inputs, new], dim=1)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return torch.cat(generated, dim=1)
