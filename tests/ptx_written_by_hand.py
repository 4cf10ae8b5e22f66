"""Kernels of a few lines of PTX, for the tests of what runs them."""

import torch
from ptx_machine import launch


THREADS = 64


def run(body, *arguments, threads=THREADS, grid=(1, 1, 1), shared=4096, programs=None):
    """A launch of what is between the braces of a kernel."""
    kinds = ["u64" if isinstance(argument, torch.Tensor) else "u32" for argument in arguments]
    parameters = ",\n".join(f"\t.param .{kind} kernel_param_{place}" for place, kind in enumerate(kinds))
    registers = ".reg .pred %p<9>;\n.reg .b16 %rs<9>;\n.reg .b32 %r<99>;\n.reg .b64 %rd<9>;\n"
    text = f".visible .entry kernel(\n{parameters}\n)\n.reqntid {threads}\n{{\n{registers}{body}\n}}\n"
    launch(text, shared, grid, list(arguments), programs)
