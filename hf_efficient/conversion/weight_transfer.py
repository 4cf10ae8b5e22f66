"""The ledger of a conversion: which weight went where, what was dropped on purpose, and what is missing."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class ConversionError(ValueError):
    """Something of the source has no exact counterpart; the message names it."""


@dataclass
class ConversionReport:
    """What became of every weight.

    Attributes:
        source, target: what was converted into what.
        moved: the source's name of each of the target's weights.
        dropped: source weights without a counterpart on purpose, with the reason.
        fresh: target weights that the source has nothing for on purpose, with the reason.
        notes: what else differs from the source.
    """

    source: str
    target: str
    moved: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.target}: {len(self.moved)} weights mapped"]
        for title, entries in (("dropped", self.dropped), ("not in the source", self.fresh)):
            for reason in dict.fromkeys(entries.values()):
                names = [name for name, its_reason in entries.items() if its_reason == reason]
                lines.append(f"  {title}: {_shortened(names)}: {reason}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


class WeightTransfer:
    """Moves tensors from a source's state dict into a model, and refuses to end with anything unaccounted for.

    Args:
        source: the state dict of the outside model.
        source_name, target_name: for the report.
    """

    def __init__(self, source: Mapping[str, Tensor], source_name: str, target_name: str):
        self.source = dict(source)
        self.report = ConversionReport(source_name, target_name)
        self._tensors: dict[str, Tensor] = {}
        self._absent: list[str] = []

    def read(self, source: str) -> Tensor | None:
        """The tensor called `source`, or None, which is remembered as a failure."""
        tensor = self.source.get(source)
        if tensor is None:
            self._absent.append(source)
        return tensor

    def move(self, target: str, source: str, change: Callable[[Tensor], Tensor] | None = None) -> None:
        """Carry `source` over to `target`, through `change` if given."""
        tensor = self.read(source)
        if tensor is not None:
            self.put(target, tensor if change is None else change(tensor), [source])

    def move_linear(
        self, target: str, source: str, bias: bool = True, change: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Carry the weight of a layer over, and its bias if it has one; `change` acts on rows and hence on both."""
        for name in ("weight", "bias") if bias else ("weight",):
            self.move(f"{target}.{name}", f"{source}.{name}", change)

    def put(self, target: str, tensor: Tensor, sources: Iterable[str]) -> None:
        """Set `target` to a tensor that was made of `sources`."""
        self._tensors[target] = tensor
        self.report.moved[target] = " + ".join(sources)

    def drop(self, source: str, reason: str) -> None:
        """Leave `source` behind on purpose."""
        self.report.dropped[source] = reason

    def drop_matching(self, matches: Callable[[str], bool], reason: str) -> None:
        """Leave behind every source weight whose name `matches` and that was not moved."""
        used = self._used()
        for name in self.source:
            if name not in used and matches(name):
                self.drop(name, reason)

    def leave(self, target: str, reason: str) -> None:
        """Let `target` keep its initial value on purpose."""
        self.report.fresh[target] = reason

    def note(self, text: str) -> None:
        self.report.notes.append(text)

    def load_into(self, model: nn.Module) -> ConversionReport:
        """Put the tensors into `model`, which takes on the source's dtype.

        Raises:
            ConversionError: a source weight nobody asked for, a weight that either side lacks, a shape that differs.
        """
        expected = model.state_dict(keep_vars=True)
        problems = [
            *self._listed("weights of the source that have no counterpart", set(self.source) - self._used()),
            *self._listed("weights that the source should have and has not", self._absent),
            *self._listed("weights that the converted model does not have", set(self._tensors) - set(expected)),
            *self._listed("weights of the converted model that nothing was found for", self._unfilled(expected)),
        ]
        for name, tensor in self._tensors.items():
            if name in expected and tensor.shape != expected[name].shape:
                problems.append(
                    f"{self.report.moved[name]} has shape {tuple(tensor.shape)}, {name} needs "
                    f"{tuple(expected[name].shape)}: do the arguments belong to these weights?"
                )
        if problems:
            raise ConversionError(
                f"{self.report.source} cannot be converted to {self.report.target}:\n  " + "\n  ".join(problems)
            )
        dtypes = {tensor.dtype for tensor in self._tensors.values() if tensor.is_floating_point()}
        if len(dtypes) == 1:
            model.to(dtypes.pop())
        with torch.no_grad():
            model.load_state_dict(self._tensors, strict=False)
        return self.report

    def _used(self) -> set[str]:
        moved = {name for sources in self.report.moved.values() for name in sources.split(" + ")}
        return moved | set(self.report.dropped)

    def _unfilled(self, expected: Mapping[str, Tensor]) -> list[str]:
        """Names without a tensor, other than those that share their storage with a name that has one."""
        known = {id(expected[name]) for name in (*self._tensors, *self.report.fresh) if name in expected}
        return [name for name, tensor in expected.items() if id(tensor) not in known]

    @staticmethod
    def _listed(title: str, names: Iterable[str]) -> list[str]:
        names = sorted(set(names))
        return [f"{title}: {', '.join(names)}"] if names else []


def _shortened(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
