"""The base class of every configuration here: a saved folder carries the code it needs, and a card.

Every way of saving in transformers (`model.save_pretrained`, `push_to_hub`, a `Trainer` checkpoint, a bare
`config.save_pretrained`) goes through the configuration's `save_pretrained` before anything is uploaded, so this
one override is the whole hook.
"""

import filecmp
import importlib
import os
import re
import shutil
from typing import ClassVar

from transformers import PreTrainedConfig

from .model_card import ArchitectureFacts, DescribesItself, make_card, write_card


class SelfContainedConfig(DescribesItself, PreTrainedConfig):
    """A configuration whose `save_pretrained` also writes the code of its models next to `config.json`, and README.md
    where there is none."""

    architecture_facts: ClassVar[ArchitectureFacts | None] = None
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # a cache, before and from transformers 5.24

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        package, in_package, _ = __name__.rpartition(".configuration.")
        if in_package:
            # By name and not by an import statement: transformers makes each package imported by remote code a
            # requirement of the checkpoint, and this file travels with it.
            importlib.import_module(f"{package}.remote_code").write_code(self, save_directory)
        elif self._auto_class is not None:
            # Loaded as remote code: transformers copies the files itself, all of them (see remote_code.py). An entry
            # that names the repository it came from would make the saved folder depend on that repository.
            auto_map = getattr(self, "auto_map", None) or {}
            self.auto_map = {auto: _without_repository(classes) for auto, classes in auto_map.items()}
        if self.architecture_facts is not None:
            os.makedirs(save_directory, exist_ok=True)
            write_card(save_directory, make_card(self))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if re.fullmatch(r"checkpoint-\d+", os.path.basename(os.path.abspath(save_directory))):
            _share_with_output_folder(save_directory)


def _share_with_output_folder(checkpoint) -> None:
    """Copy code and card of a Trainer's checkpoint to the folder it is in.

    With `hub_strategy="every_save"`, Trainer pushes that folder with configuration and weights of the checkpoint, but
    it does not know of the code, without which they cannot be loaded.
    """
    for name in os.listdir(checkpoint):
        source, target = (os.path.join(folder, name) for folder in (checkpoint, os.path.join(checkpoint, os.pardir)))
        if name.endswith(".py") and not (os.path.exists(target) and filecmp.cmp(source, target, shallow=False)):
            shutil.copyfile(source, f"{target}.new")
            os.replace(f"{target}.new", target)
        elif name == "README.md":
            with open(source, encoding="utf-8") as file:
                write_card(os.path.dirname(target), file.read())


def _without_repository(classes):
    """`"someone/repo--modeling_x.XModel"` -> `"modeling_x.XModel"`, also inside (slow, fast) tokenizer pairs."""
    if isinstance(classes, str):
        return classes.rpartition("--")[2]
    if isinstance(classes, (list, tuple)):
        return [_without_repository(name) for name in classes]
    return classes
