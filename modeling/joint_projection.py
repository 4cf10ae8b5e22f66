"""Linear layers of the same rows as one product: a step of decoding of a small model is many small products."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.backend import is_observed
from .few_rows import is_bare, is_hooked, is_large


class _Joint(NamedTuple):
    """The weights of several layers side by side, and what they were made of."""

    weight: Tensor  # [inputs, all outputs]: the products of one row with it take less time than the other way round
    bias: Tensor | None  # [all outputs]
    sources: list[tuple[Tensor | None, int, int]]  # each weight and bias, its version and its address
    stamp: object  # what a cache is given for which the numbers were compared


# By the first layer, whose life an entry shares; not in the layer, which may be copied, pickled or saved.
_JOINTS: weakref.WeakKeyDictionary[nn.Module, _Joint] = weakref.WeakKeyDictionary()


def project_jointly(layers: tuple[nn.Module, ...], rows: Tensor, cache_layer) -> Tensor | None:
    """The outputs of several layers side by side, by one product with a copy of their weights.

    The copy is made once and kept as long as the first layer. A change of the weights that torch counts is noticed in
    every step; one that it does not count (through `.data`, say) by the first step with another cache, which compares
    all numbers.

    Args:
        layers: linear layers with the same inputs.
        rows: `[N, inputs]`.
        cache_layer: any object that lives as long as one generation; it is given an attribute `joint_stamp`.

    Returns:
        `[N, all outputs]`; None where the layers are to be called one by one: where gradients are asked for, where a
        compiler or a tracer looks on, where a layer's product is large enough for `few_rows.project` to divide, and
        where not all are layers that it may divide or only some have a bias.
    """
    if torch.is_grad_enabled() or is_observed(rows) or torch.is_autocast_enabled("cpu"):
        return None
    joint = _JOINTS.get(layers[0])
    is_seen = joint is not None and getattr(cache_layer, "joint_stamp", None) is joint.stamp
    if not (is_seen and rows.dtype == torch.float32 and _is_unchanged(joint, layers)):
        if not _may_be_joint(layers, rows):
            return None
        if joint is None or not (_is_unchanged(joint, layers) and _is_equal(joint, layers)):
            joint = _JOINTS[layers[0]] = _joined(layers)
        cache_layer.joint_stamp = joint.stamp
    if is_large(layers[0], rows.shape[0]):
        return None
    return torch.mm(rows, joint.weight) if joint.bias is None else torch.addmm(joint.bias, rows, joint.weight)


def _may_be_joint(layers: tuple[nn.Module, ...], rows: Tensor) -> bool:
    if not all(is_bare(layer, rows) and not is_large(layer, rows.shape[0]) for layer in layers):
        return False
    parameters = _parameters(layers, "weight") + _parameters(layers, "bias")
    # Of what inference mode has made, torch counts no versions.
    if any(tensor is not None and tensor.is_inference() for tensor in parameters):
        return False
    return len({tensor is None for tensor in parameters[len(layers) :]}) == 1


def _joined(layers: tuple[nn.Module, ...]) -> _Joint:
    weights, biases = _parameters(layers, "weight"), _parameters(layers, "bias")
    sources = [
        (tensor, 0, 0) if tensor is None else (tensor, tensor._version, tensor.data_ptr())
        for tensor in (layer._parameters[name] for layer in layers for name in ("weight", "bias"))
    ]
    return _Joint(
        torch.cat(weights).t().contiguous(), None if biases[0] is None else torch.cat(biases), sources, object()
    )


def _is_unchanged(joint: _Joint, layers: tuple[nn.Module, ...]) -> bool:
    """Whether these are the parameters, nobody is known to have written to them, and nobody has hooked a layer."""
    sources = iter(joint.sources)
    for layer in layers:
        parameters = layer._parameters
        for name in ("weight", "bias"):
            tensor, version, address = next(sources)
            if parameters.get(name) is not tensor:
                return False
            if tensor is not None and (tensor._version != version or tensor.data_ptr() != address):
                return False
        if is_hooked(layer):
            return False
    return True


def _is_equal(joint: _Joint, layers: tuple[nn.Module, ...]) -> bool:
    """Whether the layers' numbers are still those of the copy."""
    sizes = [layer.out_features for layer in layers]
    pairs = list(zip(joint.weight.split(sizes, dim=1), _parameters(layers, "weight"), strict=True))
    if joint.bias is not None:
        pairs += zip(joint.bias.split(sizes), _parameters(layers, "bias"), strict=True)
    return all(torch.equal(copied, own.t()) for copied, own in pairs)


def _parameters(layers: tuple[nn.Module, ...], name: str) -> list[Tensor | None]:
    return [layer._parameters[name] for layer in layers]
