"""The one place that asks about device, driver, Triton and interpreter."""

import functools
import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


try:  # Optional: without it every op runs its eager path.
    import triton
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

# With MKL, the first `exp` of a process may be off by 1.5e-4 in the part of one thread, if two threads share it: in 15
# of 40 processes (two cores of a Xeon, torch 2.13), in none of 40 after this call, which one thread makes alone.
torch.exp(torch.zeros(1, device="cpu"))

BACKENDS = ("auto", "triton", "eager")
GPU_TYPES = ("cuda", "xpu")  # ROCm devices call themselves "cuda" as well
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))  # what is a tensor and nothing more

_explained: set[str] = set()


def resolve_backend(backend: str, *tensors: Tensor, unsupported_reason: str | None = None) -> str:
    """Decide whether an op runs its Triton kernels or its eager path.

    Args:
        backend: `"auto"`, `"triton"` or `"eager"`. `"auto"` takes Triton where it can run and otherwise eager, and
            logs why, each reason once. `"triton"` never falls back.
        *tensors: the tensors the op computes with; they have to share one device.
        unsupported_reason: why the op's kernels cannot take this call, naming the op ("soft_topk has no kernel for
            float64"); None if they can.

    Returns:
        `"triton"` or `"eager"`.

    Raises:
        ValueError: `backend` is unknown, or the tensors are not all on one device.
        RuntimeError: `"triton"` was asked for and cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"the tensors must all be on one device, got {found}")
    if backend == "eager":
        return "eager"

    (device,) = devices
    problem = unsupported_reason or _triton_problem(device.type, allow_interpreter=backend == "triton")
    if problem is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {problem}; pass backend='auto' or 'eager'")
    _explain_once(problem, surprising=device.type in GPU_TYPES)
    return "eager"


def _triton_problem(device_type: str, allow_interpreter: bool) -> str | None:
    """Why no Triton kernel at all can run on this kind of device; None if one can."""
    if triton is None:
        return "Triton is not installed"
    if device_type not in GPU_TYPES:
        # The interpreter is for checking kernels, thousands of times slower than eager: only on request.
        if allow_interpreter and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"the tensors are on {device_type!r}, not on a GPU"
    return None if torch.compiler.is_compiling() else _driver_problem()


def _driver_problem() -> str | None:
    try:
        _current_target()
    except Exception as error:  # each Triton driver fails in its own way; the reason is passed on
        return f"Triton has no live GPU driver ({type(error).__name__}: {error})"
    return None


def in_function_transform() -> bool:
    """Whether a transform of `torch.func` (`grad`, `vmap`, …) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_observed(*tensors: Tensor) -> bool:
    """Whether something looks on that has to see one operator where plain Python would compute with the numbers.

    That is a compiler, a tracer, a function transform, a dispatch mode, or a subclass of tensors. Calling an operator
    that is defined in Python costs tens of microseconds, so eager code goes without wherever nobody looks.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or in_function_transform()
        or not PLAIN_TENSORS.issuperset(map(type, tensors))  # of `any`, the generator alone takes as long as all this
    )


def gpu_architecture() -> str:
    """The architecture whose launch tables this machine uses: `"sm_80"`, `"sm_90"`, `"gfx942"` or `"interpreter"`.

    An architecture without tables of its own takes its nearest. `"sm_90"` means large shared memory and asynchronous
    tensor cores (data-centre chips from Hopper on); every other NVIDIA chip gets the tables of `"sm_80"`, whose
    configurations also fit the smaller shared memory of consumer cards.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    target = _current_target()
    if target.backend == "hip":
        return "gfx942"
    return "sm_90" if target.backend == "cuda" and target.arch in (90, 100, 103) else "sm_80"


def _current_target():
    driver = triton.runtime.driver.active
    return _target_of(driver, driver.get_current_device())


@functools.lru_cache(maxsize=64)
def _target_of(driver, device):
    """Kept: a call asks for each of its tables, soft_topk 17 times."""
    return driver.get_current_target()


def device_guard(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches there, wherever the tensors are."""
    if tensor.device.type not in GPU_TYPES:
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def multiprocessor_count(tensor: Tensor) -> int:
    """How many programs the tensor's GPU runs at a time; 2 under the interpreter, so that work is split there too."""
    if tensor.device.type == "cpu":
        return 2
    if tensor.device.type not in GPU_TYPES:  # meta tensors: a compilation ahead of time, for no machine in particular
        return 132
    return torch.get_device_module(tensor.device).get_device_properties(tensor.device).multi_processor_count


def _explain_once(problem: str, surprising: bool) -> None:
    """Eager is what one expects on a CPU (info), but not with tensors on a GPU (warning)."""
    # Logging would break the graph under torch.compile; a run outside of it explains.
    if torch.compiler.is_compiling() or problem in _explained:
        return
    _explained.add(problem)
    logger.log(logging.WARNING if surprising else logging.INFO, "Running on the eager path: %s", problem)
