"""The operations on a GPU, beside what else computes the same: times, share of the roofline, peak memory.

Called by `benchmark.py --device cuda`. The roofline is measured, not read off a data sheet: the copy bandwidth of a
1 GiB tensor and the rate of an 8192³ product in bfloat16. A row's `roofline` is the least time that its products or
its inputs and outputs could take at these rates, whichever is more, over the time it took.

An operation is measured twice: as replays of a CUDA graph, which is the device's own time, and under its name with
`_calls` behind it call by call, as Python makes them. What needs the host in between has the second row alone.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from benchmark_gpu_models import measure_decoding, measure_encoders, measure_perceivers, measure_training
from benchmark_gpu_work import WORK, Work, lengths_of, on_gpu
from benchmark_measure import ROOT, Row, summary


MODES = ("forward", "forward+backward")
BACKWARD = 3.5  # products of forward and backward over those of the forward pass: five to two, one recomputed
COLD_OPERATIONS = ("linear_attention", "soft_topk", "flash_attention")


class Rates(NamedTuple):
    """Bytes and floating-point operations per second that this device was seen to reach."""

    bandwidth: float
    matrix: float


def measure(device: torch.device, lengths: list[int], repeats: int) -> Iterator[Row]:
    """Rows of the device's own rates, of every operation and provider, and of the first call in a fresh process."""
    rates, rows = measure_rates(device, repeats)
    yield from rows
    for works in WORK:
        for length in lengths_of(works, lengths, device):
            for work in works(length, device):
                yield from rows_of(work, device, rates, repeats)
    for length in dict.fromkeys((min(lengths), max(lengths))):
        for part in (measure_training, measure_decoding, measure_encoders, measure_perceivers):
            yield from part(length, device, repeats, milliseconds)
            gc.collect()
    for operation in COLD_OPERATIONS if on_gpu(device) else ():
        yield from cold_rows(operation, device)


def measure_rates(device: torch.device, repeats: int) -> tuple[Rates, list[Row]]:
    """Copy bandwidth (read plus written bytes) and the rate of a square product in bfloat16."""
    big = on_gpu(device)
    source = torch.empty(2**30 if big else 2**20, dtype=torch.uint8, device=device)
    target, size = torch.empty_like(source), 8192 if big else 128
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rows = []
    for name, length, call in (
        ("copy", source.numel(), lambda: target.copy_(source)),
        ("product", size, lambda: left @ right),
    ):
        samples = milliseconds(call, device, max(repeats, 10))
        rows.append(Row(name, "torch", "forward", length, **summary(samples), dtype="bfloat16"))
    return Rates(2e3 * source.numel() / rows[0].median, 2e3 * size**3 / rows[1].median), rows


def rows_of(work: Work, device: torch.device, rates: Rates, repeats: int) -> Iterator[Row]:
    """Both modes of one piece of work; none where the provider cannot do it or memory does not suffice."""
    for mode in MODES if work.differentiable else MODES[:1]:
        call, replay = None, None
        try:
            call = work.prepare(mode == MODES[1])
            samples = {f"{work.name}_calls": milliseconds(call, device, repeats)}
            peak = peak_mib(call, device)
            replay = captured(call, device)
            if replay is not None:
                samples[work.name] = milliseconds(replay, device, repeats)
        except torch.cuda.OutOfMemoryError:
            print(f"{work.name} {work.provider} {mode} {work.length}: out of memory", flush=True)
            continue
        finally:
            call, replay = None, None
            if on_gpu(device):
                gc.collect()
        factor = BACKWARD if mode == MODES[1] else 1
        floor = max(factor * work.operations / rates.matrix, (3 if factor > 1 else 1) * work.bytes / rates.bandwidth)
        for name, times in samples.items():
            row = Row(name, work.provider, mode, work.length, **summary(times), peak_mib=peak, sizes=work.sizes)
            row.dtype, row.peer = work.dtype, work.peer
            row.roofline = 1e3 * floor / row.median if work.operations or work.bytes else None
            yield row


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """The call as a CUDA graph that replays it without Python; None if it cannot do without the host."""
    if not on_gpu(device):
        return call
    try:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what torch raises for a copy or a synchronisation while a graph is captured
        print(f"not as a graph: {str(error).splitlines()[0][:100]}", flush=True)
        torch.cuda.synchronize(device)
        return None
    return graph.replay


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Times of single calls, each behind a second-level cache that other data went through."""
    for _ in range(3):
        call()
    if not on_gpu(device):
        return [_wall(call) for _ in range(repeats)]
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)
    events = []
    for _ in range(max(repeats, 10)):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _wall(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that one call allocates at its highest point; None where there is no such counter."""
    if not on_gpu(device):
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


COLD = """
import sys
sys.path.insert(0, {scripts!r})
from benchmark_gpu_work import first_calls
print(*first_calls({operation!r}, {device!r}))
"""


def cold_rows(operation: str, device: torch.device) -> Iterator[Row]:
    """Forward, then backward, once in a fresh process with an empty Triton cache: what a user waits for at first."""
    with tempfile.TemporaryDirectory() as cache:
        code = COLD.format(scripts=str(ROOT / "scripts"), operation=operation, device=str(device))
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        finished = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
    for mode, taken in zip(("forward", "backward"), finished.stdout.split()[-2:], strict=True):
        dtype = "float32" if operation == "soft_topk" else "bfloat16"
        yield Row(f"{operation}_first_call", "ours", mode, 0, **summary([float(taken)]), dtype=dtype)
