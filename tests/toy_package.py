"""A tiny package built like hf_efficient, to try the code writer and the registration on what ours never contains."""

from pathlib import Path

from helpers import ROOT


REGISTRY_TABLE = """
ARCHITECTURES = {
    "toy_house": Architecture(
        config="configuration.toy:ToyConfig",
        models={
            "AutoModel": "modeling.toy:ToyModel",
            "AutoModelForCausalLM": "modeling.toy:ToyForCausalLM",
            "AutoModelForMaskedLM": "modeling.toy:ToyForCausalLM",
        },
    ),
}
"""

CONFIGURATION = '''"""A configuration."""

from huggingface_hub.dataclasses import strict

from .self_contained import SelfContainedConfig


@strict
class ToyConfig(SelfContainedConfig):
    model_type = "toy_house"
    vocab_size: int = 11
    hidden_size: int = 8
    num_hidden_layers: int = 1
'''

MODELING = '''"""A model. Ünïcode before the imports, so that byte and character offsets differ."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ..configuration.toy import ToyConfig
from ..kernels.scale import (  # a comment that stays
    scale,
)


class ToyPreTrainedModel(PreTrainedModel):
    config: ToyConfig
    base_model_prefix = "model"


class ToyModel(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        from .blocks import double  # "é": indented imports travel as well

        return BaseModelOutput(last_hidden_state=double(scale(self.embed_tokens(input_ids))))


class ToyForCausalLM(ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))
'''

FILES = {
    "configuration/toy.py": CONFIGURATION,
    "modeling/toy.py": MODELING,
    "modeling/blocks.py": "def double(tensor):\n    return 2 * tensor\n",
    "modeling/unused.py": "raise RuntimeError('nobody needs this file')\n",
    "kernels/backend.py": "try:\n    import triton\nexcept ImportError:\n    triton = None\n",
    "kernels/scale/__init__.py": "from .api import scale\n",
    "kernels/scale/api.py": (
        "from ..backend import triton\n\n\ndef scale(tensor):\n    return tensor * (3 if triton is None else 3.0)\n"
    ),
}


def write_toy_package(folder: Path, name: str, changes: dict[str, str] | None = None) -> Path:
    """Write the package `name` into `folder`; `changes` replaces or adds files (path -> text)."""
    registry = (ROOT / "hf_efficient/registry.py").read_text()
    machinery = registry[: registry.index("ARCHITECTURES: ")]
    files = FILES | {
        "__init__.py": (
            "__version__ = '1.2.3'\nfrom .registration import register_with_transformers as register\nregister()\n"
        ),
        "registry.py": machinery + REGISTRY_TABLE,
        "registration.py": (ROOT / "hf_efficient/registration.py").read_text(),
        "remote_code.py": (ROOT / "hf_efficient/remote_code.py").read_text(),
        "configuration/self_contained.py": (ROOT / "configuration/self_contained.py").read_text(),
        "configuration/model_card.py": (ROOT / "configuration/model_card.py").read_text(),
    }
    package = folder / name
    for path, text in (files | (changes or {})).items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text, encoding="utf-8")
    return package
