"""What the compiler said of kernels before: a table of their resources, in which a kernel is found by its content.

The content is the source of the kernel and of every function that it calls, the types and constants that it was
specialised for, the options, the target and Triton's version. Where a kernel stands in its file is not part of it.
"""

import csv
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import triton
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction


class Resources(NamedTuple):
    """What one compiled kernel needs: registers and spilled bytes per thread, shared bytes per program.

    `matrix_instruction` is the widest kind found in the code: wgmma, mma, mfma, or empty.
    """

    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    matrix_instruction: str


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
    """The key of one compilation: of what `triton.compile` is given."""
    backend = make_backend(target)
    parts = (
        triton.__version__,
        str(target),
        _content(source.fn),
        sorted(source.signature.items()),
        [(name, _content(value)) for name, value in sorted(source.constants.items())],
        source.attrs,
        backend.parse_options(dict(options)).hash(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _content(value) -> str:
    """Of a constant itself; of a jitted function a hash of its source and of whatever it calls."""
    if not isinstance(value, JITFunction):
        return repr(value)
    # Triton's own hash of a function contains its line, and so do those of the functions that it calls.
    functions = [
        function
        for name, module in list(sys.modules.items())
        if not name.startswith("triton.")
        for function in list(vars(module).values())
        if isinstance(function, JITFunction)
    ]
    before = [(function, function.hash, function.starting_line_number) for function in functions]
    for function in functions:
        function.hash, function.starting_line_number = None, 0
    try:
        return value.cache_key
    finally:
        for function, key, line in before:
            function.hash, function.starting_line_number = key, line
