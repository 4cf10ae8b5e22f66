"""Efficient-attention architectures as first-class Hugging Face models.

    import hf_efficient  # registers the architectures with AutoConfig, AutoModel and their kin, and "favor" attention
    model = hf_efficient.PerformerForCausalLM(hf_efficient.PerformerConfig())

Importing this package imports neither torch nor Triton; each public name does so when it is first used.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING


# In a checkout modeling/, configuration/ and kernels/ stand beside this folder, in a wheel inside it.
_CHECKOUT = _Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "modeling").is_dir():
    __path__.append(str(_CHECKOUT))

from .registration import register_with_transformers as _register_with_transformers  # noqa: E402
from .registry import ARCHITECTURES as _ARCHITECTURES  # noqa: E402


if _TYPE_CHECKING:
    from .configuration.colt5 import CoLT5Config as CoLT5Config
    from .configuration.perceiver_flash import PerceiverFlashConfig as PerceiverFlashConfig
    from .configuration.performer import PerformerConfig as PerformerConfig
    from .configuration.x_transformer import XTransformerConfig as XTransformerConfig
    from .modeling.colt5 import CoLT5EncoderModel as CoLT5EncoderModel
    from .modeling.colt5 import CoLT5ForCausalLM as CoLT5ForCausalLM
    from .modeling.colt5 import CoLT5ForConditionalGeneration as CoLT5ForConditionalGeneration
    from .modeling.colt5 import CoLT5ForQuestionAnswering as CoLT5ForQuestionAnswering
    from .modeling.colt5 import CoLT5ForSequenceClassification as CoLT5ForSequenceClassification
    from .modeling.colt5 import CoLT5Model as CoLT5Model
    from .modeling.colt5_images import CoLT5ForImageClassification as CoLT5ForImageClassification
    from .modeling.perceiver_flash import PerceiverFlashForCausalLM as PerceiverFlashForCausalLM
    from .modeling.perceiver_flash import PerceiverFlashForImageClassification as PerceiverFlashForImageClassification
    from .modeling.perceiver_flash import PerceiverFlashForMaskedLM as PerceiverFlashForMaskedLM
    from .modeling.perceiver_flash import (
        PerceiverFlashForSequenceClassification as PerceiverFlashForSequenceClassification,
    )
    from .modeling.perceiver_flash import PerceiverFlashIOModel as PerceiverFlashIOModel
    from .modeling.perceiver_flash import PerceiverFlashModel as PerceiverFlashModel
    from .modeling.performer import PerformerForCausalLM as PerformerForCausalLM
    from .modeling.performer import PerformerForConditionalGeneration as PerformerForConditionalGeneration
    from .modeling.performer import PerformerForMaskedLM as PerformerForMaskedLM
    from .modeling.performer import PerformerForQuestionAnswering as PerformerForQuestionAnswering
    from .modeling.performer import PerformerForSequenceClassification as PerformerForSequenceClassification
    from .modeling.performer import PerformerForTokenClassification as PerformerForTokenClassification
    from .modeling.performer import PerformerModel as PerformerModel
    from .modeling.x_transformer import XTransformerForCausalLM as XTransformerForCausalLM
    from .modeling.x_transformer import XTransformerForConditionalGeneration as XTransformerForConditionalGeneration
    from .modeling.x_transformer import XTransformerForMaskedLM as XTransformerForMaskedLM
    from .modeling.x_transformer import XTransformerForSequenceClassification as XTransformerForSequenceClassification
    from .modeling.x_transformer import XTransformerForTokenClassification as XTransformerForTokenClassification
    from .modeling.x_transformer import XTransformerModel as XTransformerModel
    from .modeling.x_transformer_image_text import XTransformerForImageTextToText as XTransformerForImageTextToText
    from .modeling.x_transformer_images import XTransformerForImageClassification as XTransformerForImageClassification
    from .modeling.x_transformer_images import XTransformerImageEncoder as XTransformerImageEncoder
    from .modeling.x_transformer_vectors import (
        XTransformerForContinuousPrediction as XTransformerForContinuousPrediction,
    )

__version__ = "0.1.0"

# Public name -> "module:name" inside this package.
_PUBLIC = {
    reference.rpartition(":")[2]: reference
    for architecture in _ARCHITECTURES.values()
    for reference in (architecture.config, *architecture.models.values(), *architecture.others)
}
__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    value = globals()[name] = getattr(_import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})


_register_with_transformers(attention="attention:register_favor_attention")
