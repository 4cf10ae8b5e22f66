"""What a benchmark row is made of: times, peak memory, and where the figure comes from."""

import ctypes
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
WARM_UP_LIMIT = 2.0  # seconds; a first call longer than this has nothing left to warm up, and counts
SHORT = 0.4  # seconds; quick calls are repeated until they filled this
PEAKS, PEAKS_LIMIT = 5, 10.0  # calls whose memory is looked at, and the seconds after which there are no more


@dataclass
class Row:
    """One line of the CSV file. Times in ms, memory in MiB; an empty field was not measured.

    `roofline`: the least time that the device's measured rates allow over the median, on GPUs. `gflops`: counted
    floating point operations, in thousands of millions.
    """

    name: str
    provider: str
    mode: str
    length: int
    median: float
    p20: float
    p80: float
    repeats: int
    peak_mib: float | None = None
    tokens_per_second: float | None = None
    cache_bytes: int | None = None
    error: float | None = None
    error_length: int | None = None
    roofline: float | None = None
    gflops: float | None = None
    sizes: str = ""
    dtype: str = "float32"
    allocator: str = "default"
    threads: int = 0
    device: str = ""
    load: float = 0.0
    torch: str = ""
    transformers: str = ""
    peer: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple:
        """What identifies the measurement, for finding the row to compare with."""
        return self.name, self.provider, self.mode, self.length, self.allocator

    @classmethod
    def from_text(cls, texts: dict[str, str]) -> "Row":
        """A row as the csv module reads it."""
        kinds = {f.name: f.type for f in fields(cls)}
        convert = {int: int, float: float, str: str, float | None: float, int | None: int}
        return cls(
            **{n: None if t == "" and kinds[n] not in (str,) else convert[kinds[n]](t) for n, t in texts.items()}
        )


def provenance(allocator: str, threads: int) -> dict:
    """The fields of a row that say on what, with what and from what it was measured."""
    return {
        "allocator": allocator,
        "threads": threads,
        "device": _processor(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "load": round(_load(), 2),
    }


def peer_version(package: str) -> str:
    """`package 1.2.3` for the row of another library."""
    return f"{package} {_version(package)}"


def time_rounds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each function, at least `repeats` of each, taken in turns.

    In turns, because on a shared machine the disturbance changes by the minute: what is compared with each other has
    to be measured in the same minutes. Every function is called once beforehand, and again at each of its turns, for
    what the one before left of the caches and the heap is not its own; such a call counts only where it is so long
    that page faults, caches and thread pools cannot matter.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for name, function in functions.items():
        elapsed = _timed(function)
        if elapsed > 1e3 * WARM_UP_LIMIT:
            times[name].append(elapsed)
    long = {name for name, samples in times.items() if samples}
    while any(len(samples) < repeats for samples in times.values()):
        for name, function in functions.items():
            if len(times[name]) < repeats:
                if name not in long:
                    function()
                times[name].append(_timed(function))
    for name, function in functions.items():  # quick calls scatter most, and cost least
        while sum(times[name]) < 1e3 * SHORT and len(times[name]) < 10 * repeats:
            times[name].append(_timed(function))
    return times


def summary(samples: list[float]) -> dict:
    """Median, 20 % and 80 % quantiles and number of the samples, as fields of a row."""
    ordered = sorted(samples)

    def quantile(fraction):
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]

    return {
        "median": statistics.median(ordered),
        "p20": quantile(0.2),
        "p80": quantile(0.8),
        "repeats": len(ordered),
    }


def peak_memory(function: Callable[[], object]) -> float | None:
    """MiB by which one call raises the process's resident memory at its highest point; None where Linux is not.

    The kernel keeps that high-water mark itself, exactly; it is set back just before the call. Memory that earlier
    calls freed is returned first, so that a call cannot hide in it.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        reset.write_text("5")
    except OSError:
        return None
    before = _status_kib(status, "VmRSS")
    function()
    return (_status_kib(status, "VmHWM") - before) / 1024


def typical_peak_memory(function: Callable[[], object]) -> float | None:
    """The median of `peak_memory` over `PEAKS` calls, or as many as begin within `PEAKS_LIMIT`.

    How much a call takes from the system depends on the holes that earlier ones left in the heap: calls of one peer
    took between 230 and 1,440 MiB. Of an even number it is the smaller of the two in the middle.
    """
    peaks, start = [], time.perf_counter()
    while len(peaks) < PEAKS and (not peaks or time.perf_counter() - start < PEAKS_LIMIT):
        peak = peak_memory(function)
        if peak is None:
            return None
        peaks.append(peak)
    return statistics.median_low(peaks)


def _status_kib(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{field}:"))


def _timed(function):
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit():
    """The commit, with a plus sign if the sources that the figures depend on have changed since."""
    sources = ["hf_efficient", "modeling", "configuration", "kernels", "scripts"]
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no", "--", *sources) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _load():
    """How many other processes wanted the processor in the last minute: what to doubt a figure by."""
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return 0.0
