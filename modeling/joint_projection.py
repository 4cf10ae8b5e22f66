"""Linear layers of the same rows as one product: a step of decoding of a small model is many small products."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.backend import is_observed
from .few_rows import is_bare, is_hooked, is_large


# After so many copies in one sequence, none of which a step came back to, the weights are taken for others in every
# step, as some wrappers have it.
IN_VAIN = 3


class _Copy(NamedTuple):
    """The weights of several layers side by side, and what they were made of."""

    weight: Tensor  # [inputs, all outputs]: the products of one row with it take less time than the other way round
    bias: Tensor | None  # [all outputs]
    layers: tuple[nn.Linear, ...]
    sources: list[tuple[Tensor | None, int, int]]  # each weight and bias, its version and its address
    largest: int  # elements of one weight
    stamp: object  # what a cache is given for which the numbers were compared

    @classmethod
    def of(cls, layers: tuple[nn.Linear, ...]) -> "_Copy":
        weights, biases = _parameters(layers, "weight"), _parameters(layers, "bias")
        sources = [
            (tensor, 0, 0) if tensor is None else (tensor, tensor._version, tensor.data_ptr())
            for tensor in (layer._parameters[name] for layer in layers for name in ("weight", "bias"))
        ]
        weight, bias = torch.cat(weights).t().contiguous(), None if biases[0] is None else torch.cat(biases)
        return cls(weight, bias, layers, sources, max(weight.numel() for weight in weights), object())

    def is_up_to_date(self, layers: tuple[nn.Module, ...]) -> bool:
        """Whether these are the layers, unhooked, with their parameters as far as is known without a look at them."""
        sources = iter(self.sources)
        for layer, known in zip(layers, self.layers, strict=True):
            if layer is not known or is_hooked(layer):
                return False
            parameters = layer._parameters
            for name in ("weight", "bias"):
                tensor, version, address = next(sources)
                if parameters.get(name) is not tensor:
                    return False
                if tensor is not None and not (
                    tensor._version == version and tensor.data_ptr() == address and tensor.is_contiguous()
                ):
                    return False
        return True

    def equals(self, layers: tuple[nn.Linear, ...]) -> bool:
        """Whether the layers' numbers are those of the copy, to the bit."""
        sizes = [layer.out_features for layer in layers]
        pairs = list(zip(self.weight.t().split(sizes), _parameters(layers, "weight"), strict=True))
        if self.bias is not None:
            pairs += zip(self.bias.split(sizes), _parameters(layers, "bias"), strict=True)
        # As integers: of numbers, NaN would be equal to nothing.
        return all(torch.equal(copied.view(torch.int32), own.view(torch.int32)) for copied, own in pairs)


class JointProjection:
    """Multiplies few rows by several linear layers' weights at once; an attribute of the module that has the layers.

    It keeps a copy of their weights, which is nobody's state: it is not in a `state_dict`, and a copy or a pickle of
    the module goes without.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget the copy."""
        self._copy: _Copy | None = None
        self._in_vain = 0

    def __deepcopy__(self, memo) -> "JointProjection":
        return type(self)()

    def __reduce__(self):
        return type(self), ()

    def __call__(self, layers: tuple[nn.Module, ...], rows: Tensor, cache_layer) -> Tensor | None:
        """The outputs of several layers side by side.

        A change of the weights that torch counts, or that moves them, is noticed in every step. One that it does not
        count (through `.data`, by another process) is noticed by the next step whose `cache_layer` has taken its
        `joint_stamp` back to None, as it has to where a sequence begins or goes on with several tokens: that step
        compares all numbers.

        Args:
            layers: linear layers with the same inputs, the same ones in every call.
            rows: `[N, inputs]`.
            cache_layer: has an attribute `joint_stamp`, None at first.

        Returns:
            `[N, all outputs]`; None where the layers are to be called one by one: where gradients are asked for or
            somebody looks on (`is_observed`), where so many rows make one of the products large (`is_large`), where
            a layer is not bare (`is_bare`) or only some have a bias, where the weights are others in every step, and
            for a cache layer without the attribute.
        """
        if torch.is_grad_enabled() or is_observed(rows) or torch.is_autocast_enabled("cpu"):
            return None
        copy, stamp = self._copy, getattr(cache_layer, "joint_stamp", self)
        known = copy is not None and stamp is copy.stamp and rows.dtype == torch.float32 and copy.is_up_to_date(layers)
        if known or stamp is None:
            self._in_vain = 0
        if not known:
            # (An older copy of this code has cache layers that never take a stamp back.)
            copy = None if stamp is self else self._compared(layers, rows)
            if copy is None:
                return None
            cache_layer.joint_stamp = copy.stamp
        if is_large(rows.shape[0], copy.largest):
            return None
        return torch.mm(rows, copy.weight) if copy.bias is None else torch.addmm(copy.bias, rows, copy.weight)

    def _compared(self, layers: tuple[nn.Module, ...], rows: Tensor) -> _Copy | None:
        """A copy of the layers as they are, if possible the one there is; None where none can be, and none is kept."""
        if self._in_vain >= IN_VAIN or not _can_be_joint(layers, rows):
            self._copy = None
        elif self._copy is None or not (self._copy.is_up_to_date(layers) and self._copy.equals(layers)):
            self._in_vain += 1
            self._copy = _Copy.of(layers)
        return self._copy


def _can_be_joint(layers: tuple[nn.Module, ...], rows: Tensor) -> bool:
    if not all(is_bare(layer, rows) and not is_large(1, layer._parameters["weight"].numel()) for layer in layers):
        return False
    parameters = _parameters(layers, "weight") + _parameters(layers, "bias")
    # Of what inference mode has made, torch counts no versions.
    if any(tensor is not None and tensor.is_inference() for tensor in parameters):
        return False
    return len({tensor is None for tensor in parameters[len(layers) :]}) == 1


def _parameters(layers: tuple[nn.Module, ...], name: str) -> list[Tensor | None]:
    return [layer._parameters[name] for layer in layers]
