"""The smallest model of every head in the registry, and what it is fed: for tests that every head has to pass.

A new head is covered by itself; a new architecture needs its sizes here.
"""

import inspect
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from hf_efficient.registry import ARCHITECTURES, resolve


ENCODER_DECODERS = ("AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")
TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
TINY = {
    "performer": TEXT,
    "x_transformer": {
        **TEXT,
        # Something of every file.
        "position_bias": "t5",
        "shift_tokens": 1,
        "value_gate": "sigmoid",
        "norm_type": "scale_norm",
        "image_size": 8,
        "num_channels": 1,
        "patch_size": 2,
        "num_register_tokens": 1,
        "image_fusion": "prepended",
        "input_feature_size": 3,
        "output_feature_size": 2,
    },
    "perceiver_flash": {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_latents": 6,
        "num_self_attention_layers": 1,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "num_query_attention_heads": 2,
        "max_position_embeddings": 32,
        "image_size": 8,
        "num_channels": 1,
        "num_frequency_bands": 3,
        "num_labels": 3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "colt5": {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "routing_window": 4,
        "image_size": 8,
        "num_channels": 1,
        "patch_size": 2,
        "image_window_size": 2,
        "num_labels": 3,
        "eos_token_id": 2,
    },
}


@dataclass(frozen=True)
class Head:
    """A public model class: its architecture, and the Auto class that gives it (None: none does)."""

    model_class: type[PreTrainedModel]
    model_type: str
    auto_class: str | None

    @property
    def name(self) -> str:
        return self.model_class.__name__

    @property
    def learns(self) -> bool:
        """Whether `forward` gives a loss."""
        return bool({"labels", "start_positions"} & inspect.signature(self.model_class.forward).parameters.keys())

    @property
    def generates(self) -> bool:
        return issubclass(self.model_class, GenerationMixin)

    def inputs(self) -> dict[str, torch.Tensor]:
        """A batch of two for the tiny model: texts or images or both, of the smallest kind that means something."""
        tokens = torch.arange(3, 27).reshape(2, 12)
        text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        images = {"pixel_values": torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)}
        if self.auto_class == "AutoModelForTimeSeriesPrediction":
            return {"input_features": torch.linspace(-1, 1, 72).reshape(2, 12, 3)}
        if "ImageTextToText" in self.name:
            return text | images | {"decoder_input_ids": tokens[:, :5]}
        if "Image" in self.name:
            return images
        return text | ({"decoder_input_ids": tokens[:, :5]} if self.config().is_encoder_decoder else {})

    def labels(self) -> dict[str, torch.Tensor]:
        """What the model is to learn of these inputs; nothing for a model without a loss."""
        if not self.learns:
            return {}
        tokens, classes = self.inputs().get("input_ids"), torch.tensor([0, 2])
        match self.auto_class.removeprefix("AutoModelFor"):
            case "CausalLM" | "MaskedLM":
                return {"labels": tokens}
            case "Seq2SeqLM" | "ImageTextToText":
                return {"labels": tokens[:, :5].contiguous()}
            case "TokenClassification":
                return {"labels": tokens % 3}
            case "QuestionAnswering":
                return {"start_positions": classes, "end_positions": classes}
            case "TimeSeriesPrediction":
                return {"labels": torch.linspace(0, 1, 48).reshape(2, 12, 2)}
            case _:
                return {"labels": classes}

    def config(self, **options) -> PreTrainedConfig:
        kind = {"is_encoder_decoder": True} if self.auto_class in ENCODER_DECODERS else {}
        return ARCHITECTURES[self.model_type].config_class()(**{**TINY[self.model_type], **kind, **options})


def _heads():
    for model_type, architecture in ARCHITECTURES.items():
        for auto_class, reference in architecture.models.items():
            yield Head(resolve(reference), model_type, auto_class)
        for reference in architecture.others:
            yield Head(resolve(reference), model_type, None)


# By class name; of several Auto classes that give one model, the first counts.
HEADS: dict[str, Head] = {}
for _head in _heads():
    HEADS.setdefault(_head.name, _head)
