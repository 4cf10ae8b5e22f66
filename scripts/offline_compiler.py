"""Compiles Triton kernels for GPUs that this machine does not have, through the launchers that users run.

`compiling_for(target)` puts a driver in place that knows the target and nothing else. A launch then compiles the
kernel with exactly the specialisation that it would use, and ends there; `resources` reads what the compiler reports.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from known_kernels import KnownKernel, Resources, content_key
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that one program may use. The tables of sm_80 also serve consumer cards (sm_86, sm_89, sm_120): theirs holds.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


class OfflineDriver:
    """As much of a Triton driver as a compilation asks for. `device`: where the tensors of a launch are."""

    def __init__(self, name: str, device: str = "meta"):
        self.name, self.device = name, torch.device(device)

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name  # kernels are cached per device: a device per target keeps them apart

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return self.device


@contextmanager
def compiling_for(name: str, known: Mapping[str, Resources] | None = None) -> Iterator[list]:
    """Launches compile for the target called `name` instead of running; the list receives the compiled kernels.

    Those whose content is `known` are not compiled: a `KnownKernel` takes their place.
    """
    compiled, launched, run, compile_new = [], [], JITFunction.run, triton.compiler.compile

    def compile_only(self, *args, grid, warmup, **options):
        launched.append(self)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    def compile_unknown(source, target, options, **others):
        key = content_key(source, target, options)
        if known and key in known:
            return KnownKernel(key, known[key])
        kernel = compile_new(source, target=target, options=options, **others)
        kernel.content_key = key
        return kernel

    JITFunction.run, triton.compiler.compile = compile_only, compile_unknown
    driver.set_active(OfflineDriver(name))
    try:
        yield compiled
    finally:
        JITFunction.run, triton.compiler.compile = run, compile_new
        for kernel in launched:  # each looks for its compiler when it is first launched for a device
            kernel.device_caches.pop(name, None)
        driver._active = None  # `reset_active` would look for a GPU


def resources(kernel) -> Resources:
    """Reads what a compiled kernel takes, and how long its loops are; or says what is known of it."""
    if isinstance(kernel, KnownKernel):
        return kernel.resources
    read = _from_cubin if "cubin" in kernel.asm else _from_amdgcn
    registers, spilled, static_shared, instruction, loops = read(kernel.asm)
    metadata = kernel.metadata
    return Resources(
        metadata.name, registers, spilled, max(metadata.shared, static_shared), metadata.num_warps, instruction, loops
    )


def innermost_loops(listing: str) -> list[int]:
    """How many instructions each loop without a loop inside has, in the order of a listing of `cuobjdump -sass`.

    A loop is what lies between a branch and an earlier place that it leads to; several branches may lead there.
    """
    places = [int(place, 16) for place in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/", listing, re.MULTILINE)]
    ends = {}
    branch = r"^\s+/\*([0-9a-f]{4,})\*/\s[^;]*\bBRA(?:\.\w+)*\s[^;]*?0x([0-9a-f]+)\s*;"
    for place, target in re.findall(branch, listing, re.MULTILINE):
        if int(target, 16) < int(place, 16):
            start = int(target, 16)
            ends[start] = max(ends.get(start, 0), int(place, 16))
    loops = sorted(ends.items())
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= other and last <= end and (start, end) != (other, last) for other, last in loops)
    ]
    return [sum(start <= place <= end for place in places) for start, end in inner]


def _from_cubin(asm) -> tuple[int, int, int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text, listing = (
            subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    ptx = asm["ptx"]
    instruction = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    # ptxas counts what it spills as stack, beside what the code itself declares there, in units of 8 bytes.
    declared = sum(int(size) for size in re.findall(r"__local_depot\d+\[(\d+)\];", ptx))
    spilled = max(usage["STACK"] - -(-declared // 8) * 8, 0) + usage["LOCAL"]
    loops = " ".join(str(count) for count in innermost_loops(listing))
    return usage["REG"], spilled, usage["SHARED"], instruction, loops


def _from_amdgcn(asm) -> tuple[int, int, int, str, str]:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        return max(int(found) for found in re.findall(rf"\.{name}:\s+(\d+)", text))

    # A scalar register goes to a lane of a vector register, not to memory: that costs next to nothing.
    return (
        number("vgpr_count"),
        4 * number("vgpr_spill_count"),
        number("group_segment_fixed_size"),
        "mfma" if "v_mfma" in text else "",
        "",
    )
