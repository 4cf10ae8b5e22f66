"""A configuration's plan for parallelism names all that its models may have; a model keeps what it has."""

import re

from torch import nn


def entries_that_exist(plan: dict, model: nn.Module) -> dict:
    """The entries of `plan` whose module pattern (`layers.*.mlp.up_proj`) is in `model`."""
    modules = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_modules()}
    return {name: style for name, style in plan.items() if name in modules}
