"""The base class of every model here: bad weights and bad places to save to are refused at the door."""

import os
import re
import tempfile

from safetensors import SafetensorError
from transformers.modeling_utils import PreTrainedModel

from ..configuration.model_card import DescribesItself
from .cache_name import CACHE


class CheckedPreTrainedModel(DescribesItself, PreTrainedModel):
    """`PreTrainedModel` whose `from_pretrained` names a broken weight file's folder, and whose `save_pretrained`
    refuses a place that cannot be written to before it writes anything.

    Every model here keeps its body in `model` and checkpoints its blocks.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]

    def init_parallel_plans(self) -> None:
        """A configuration's plans name all that its models may have; keep the entries for what this model has."""
        super().init_parallel_plans()
        modules = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in self.named_modules()}
        self._tp_plan = {name: style for name, style in self._tp_plan.items() if name in modules}
        self._fsdp_plan = {name: style for name, style in self._fsdp_plan.items() if name in modules}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, but that pickled weights (`pytorch_model.bin`) are read only with
        `use_safetensors=False`.

        Raises:
            OSError: there are no safetensors.
            ValueError: the weights are truncated or no safetensors file at all.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {str(pretrained_model_name_or_path)!r} must be whole safetensors files, got one that "
                f"cannot be read ({error}): it is truncated or of another format"
            ) from error

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers.

        Raises:
            ValueError: `save_directory` is a file or cannot be written to.
        """
        try:
            os.makedirs(save_directory, exist_ok=True)
            tempfile.TemporaryFile(dir=save_directory).close()
        except OSError as error:
            raise ValueError(
                f"save_directory must be a folder that can be written to, got {str(save_directory)!r} ({error})"
            ) from error
        return super().save_pretrained(save_directory, *args, **kwargs)
