"""Launches of Triton kernels as runs of their compiled code, for a GPU that is not there, by `ptx_machine.py`."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import ptx_machine
from load_script import load_script
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_efficient.kernels import backend


TARGETS = ("sm_80", "sm_90")


def _parts(value, kind):
    """What a kernel is handed of an argument: nothing of a constant, each part of a tuple."""
    if isinstance(kind, tuple):
        for part, its_kind in zip(value, kind, strict=True):
            yield from _parts(part, its_kind)
    elif kind != "constexpr":
        yield value


def _problem(device_type: str, allow_interpreter: bool) -> str | None:
    """In place of `backend._triton_problem`: on a CPU the kernels run where they are asked for by name."""
    return None if device_type == "cpu" and allow_interpreter else f"the tensors are on {device_type!r}"


@contextmanager
def executing_for(name: str) -> Iterator[None]:
    """Triton compiles for the target called `name`, up to PTX, and a launch with tensors of the CPU runs that.

    Raises:
        ValueError: there is no such target.
    """
    if name not in TARGETS:
        raise ValueError(f"name must be one of {', '.join(TARGETS)}, got {name!r}")
    offline = load_script("offline_compiler")
    compile_only, add_stages, set_up = JITFunction.run, CUDABackend.add_stages, CUDABackend.__init__
    own_hash = CUDABackend.hash

    def without_machine_code(self, stages, *arguments, **options):
        add_stages(self, stages, *arguments, **options)
        stages.pop("cubin", None)

    def set_up_for_ptx(self, *arguments, **options):
        set_up(self, *arguments, **options)
        self.binary_ext = "ptx"

    def hash_of_ptx(self):
        """Triton keeps what it compiled on the disk: without machine code it must not be found by others."""
        return f"{own_hash(self)} up to PTX"

    def launch(self, *arguments, grid, warmup, **options):
        kernel = compile_only(self, *arguments, grid=grid, warmup=True, **options)
        signature = inspect.signature(self.fn)
        named = {key: value for key, value in options.items() if key in signature.parameters}
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        sizes = (*(grid(bound.arguments) if callable(grid) else grid), 1, 1)[:3]
        kinds = kernel.src.signature.items()
        given = [part for key, kind in kinds for part in _parts(bound.arguments[key], kind)]
        if kernel.metadata.shared > offline.SHARED_MEMORY[name]:
            raise RuntimeError(f"{kernel.metadata.name} needs {kernel.metadata.shared} bytes of shared memory")
        if min(sizes) > 0:
            ptx_machine.launch(kernel.asm["ptx"], kernel.metadata.shared, sizes, given)
        return kernel

    with (
        patch.object(JITFunction, "run", launch),
        patch.object(CUDABackend, "add_stages", without_machine_code),
        patch.object(CUDABackend, "__init__", set_up_for_ptx),
        patch.object(CUDABackend, "hash", hash_of_ptx),
        patch.object(backend, "_triton_problem", _problem),
    ):
        driver.set_active(offline.OfflineDriver(name, device="cpu"))
        try:
            yield
        finally:
            driver._active = None  # `reset_active` would look for a GPU
