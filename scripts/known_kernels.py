"""What the compiler said of kernels before: a table of their resources, in which a kernel is found by its content.

The content is the source of the kernel and of every function that it calls, the types and constants that it was
specialised for, the options, the target and Triton's version. Where a kernel stands in its file is not part of it, nor
is how its resources are read (`offline_compiler.resources`): when that changes, delete the tables, `make kernels`.
"""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction


class Resources(NamedTuple):
    """What one compiled kernel needs: registers and spilled bytes per thread, shared bytes per program.

    `matrix_instruction` is the widest kind found in the code: wgmma, mma, mfma, or empty. `loops` are the numbers of
    instructions of the loops without a loop inside, in their order: what a warp issues for each tile. Empty for AMD.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    matrix_instruction: str
    loops: str


class KnownKernel(NamedTuple):
    """Stands for a kernel that does not have to be compiled again."""

    content_key: str
    resources: Resources


def read_known(path: Path | None) -> dict[str, Resources]:
    """The resources of a table's kernels by their keys; nothing without a table."""
    if path is None or not path.exists():
        return {}
    kinds = Resources.__annotations__
    with path.open(newline="") as file:
        return {
            row["key"]: Resources(**{name: kind(row[name]) for name, kind in kinds.items()})
            for row in csv.DictReader(file)
            if row["key"]
        }


def content_key(source, target, options: dict) -> str:
    """The key of one compilation: of what `triton.compile` is given, and of what else Triton looks at."""
    backend = make_backend(target)
    # Libraries by name: they come with Triton, and their paths differ from machine to machine.
    options = dict(vars(backend.parse_options(dict(options))))
    options = {
        name: [library for library, _ in value] if name == "extern_libs" else value for name, value in options.items()
    }
    parts = (
        triton.__version__,
        backend.hash(),
        sorted(get_cache_invalidating_env_vars().items()),
        str(target),
        _content(source.fn),
        sorted(source.signature.items()),
        [(name, _content(value)) for name, value in sorted(source.constants.items())],
        source.attrs,
        sorted(options.items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _content(value) -> str:
    """Of a constant itself; of a jitted function a hash of its source and of whatever it calls."""
    if not isinstance(value, JITFunction):
        return repr(value)
    # Triton's own hash of a function contains its line, and so do those of the functions that it calls.
    functions = _reachable(value, {})
    before = [(function, function.hash, function.starting_line_number) for function in functions]
    for function in functions:
        function.hash, function.starting_line_number = None, 0
    try:
        return value.cache_key
    finally:
        for function, key, line in before:
            function.hash, function.starting_line_number = key, line


def _reachable(function: JITFunction, found: dict[int, JITFunction]) -> list[JITFunction]:
    """The function and those that it, or one of those, knows by name."""
    found[id(function)] = function
    for other in function.fn.__globals__.values():
        if issubclass(type(other), JITFunction) and id(other) not in found:
            _reachable(other, found)
    return list(found.values())
