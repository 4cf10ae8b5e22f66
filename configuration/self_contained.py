"""The base class of every configuration here: a saved folder carries the code it needs.

Every way of saving in transformers (`model.save_pretrained`, `push_to_hub`, a `Trainer` checkpoint, a bare
`config.save_pretrained`) goes through the configuration's `save_pretrained` before anything is uploaded, so this
one override is the whole hook.
"""

import importlib

from transformers import PreTrainedConfig


class SelfContainedConfig(PreTrainedConfig):
    """A configuration whose `save_pretrained` also writes the code of its models next to `config.json`."""

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
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _without_repository(classes):
    """`"someone/repo--modeling_x.XModel"` -> `"modeling_x.XModel"`, also inside (slow, fast) tokenizer pairs."""
    if isinstance(classes, str):
        return classes.rpartition("--")[2]
    if isinstance(classes, (list, tuple)):
        return [_without_repository(name) for name in classes]
    return classes
