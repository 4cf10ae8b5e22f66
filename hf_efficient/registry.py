"""The table of architectures. Nothing else in the project lists the models.

References are strings of the form "module:name", relative to this package, so that reading the table imports nothing.
"""

from dataclasses import dataclass, field
from importlib import import_module


def resolve(reference: str) -> type:
    """The class a "module:name" reference of the table stands for."""
    module, _, name = reference.partition(":")
    return getattr(import_module(f"{__package__}.{module}"), name)


@dataclass(frozen=True)
class Architecture:
    """One row: the configuration, and for each Auto class of transformers the model that it gives.

    Several Auto classes may name one model; an Auto class that the architecture has nothing for is left out. `others`
    are public models that no Auto class gives.
    """

    config: str
    models: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def config_class(self) -> type:
        return resolve(self.config)

    def model_classes(self) -> dict[str, type]:
        """Auto class name -> model class."""
        return {auto_class: resolve(reference) for auto_class, reference in self.models.items()}


ARCHITECTURES: dict[str, Architecture] = {
    "colt5": Architecture(
        config="configuration.colt5:CoLT5Config",
        models={
            "AutoModel": "modeling.colt5:CoLT5Model",
            "AutoModelForTextEncoding": "modeling.colt5:CoLT5EncoderModel",
            "AutoModelForSeq2SeqLM": "modeling.colt5:CoLT5ForConditionalGeneration",
            "AutoModelForCausalLM": "modeling.colt5:CoLT5ForCausalLM",
            "AutoModelForSequenceClassification": "modeling.colt5:CoLT5ForSequenceClassification",
            "AutoModelForQuestionAnswering": "modeling.colt5:CoLT5ForQuestionAnswering",
            "AutoModelForImageClassification": "modeling.colt5_images:CoLT5ForImageClassification",
        },
    ),
    "performer": Architecture(
        config="configuration.performer:PerformerConfig",
        models={
            "AutoModel": "modeling.performer:PerformerModel",
            "AutoModelForCausalLM": "modeling.performer:PerformerForCausalLM",
            "AutoModelForMaskedLM": "modeling.performer:PerformerForMaskedLM",
            "AutoModelForSequenceClassification": "modeling.performer:PerformerForSequenceClassification",
            "AutoModelForTokenClassification": "modeling.performer:PerformerForTokenClassification",
            "AutoModelForQuestionAnswering": "modeling.performer:PerformerForQuestionAnswering",
            "AutoModelForSeq2SeqLM": "modeling.performer:PerformerForConditionalGeneration",
        },
    ),
    "x_transformer": Architecture(
        config="configuration.x_transformer:XTransformerConfig",
        models={
            "AutoModel": "modeling.x_transformer:XTransformerModel",
            "AutoModelForCausalLM": "modeling.x_transformer:XTransformerForCausalLM",
            "AutoModelForMaskedLM": "modeling.x_transformer:XTransformerForMaskedLM",
            "AutoModelForSequenceClassification": "modeling.x_transformer:XTransformerForSequenceClassification",
            "AutoModelForTokenClassification": "modeling.x_transformer:XTransformerForTokenClassification",
            "AutoModelForSeq2SeqLM": "modeling.x_transformer:XTransformerForConditionalGeneration",
            "AutoModelForImageClassification": "modeling.x_transformer_images:XTransformerForImageClassification",
            "AutoModelForImageTextToText": "modeling.x_transformer_image_text:XTransformerForImageTextToText",
            "AutoModelForTimeSeriesPrediction": "modeling.x_transformer_vectors:XTransformerForContinuousPrediction",
        },
        others=("modeling.x_transformer_images:XTransformerImageEncoder",),
    ),
    "perceiver_flash": Architecture(
        config="configuration.perceiver_flash:PerceiverFlashConfig",
        models={
            "AutoModel": "modeling.perceiver_flash:PerceiverFlashModel",
            "AutoModelForCausalLM": "modeling.perceiver_flash:PerceiverFlashForCausalLM",
            "AutoModelForMaskedLM": "modeling.perceiver_flash:PerceiverFlashForMaskedLM",
            "AutoModelForSequenceClassification": "modeling.perceiver_flash:PerceiverFlashForSequenceClassification",
            "AutoModelForImageClassification": "modeling.perceiver_flash:PerceiverFlashForImageClassification",
        },
        others=("modeling.perceiver_flash:PerceiverFlashIOModel",),
    ),
}
