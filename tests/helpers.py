"""What several test files share: the error budget and a process in which hf_efficient does not exist."""

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from warm_process import Fork, WarmProcess


ROOT = Path(__file__).resolve().parent.parent

# Hides packages as if they were not installed: `find_spec` gives None, `import` raises ModuleNotFoundError.
HIDING = """
import sys
class _Hiding:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}: return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [_Hiding(finder) for finder in sys.meta_path]
"""
WITHOUT_THE_PACKAGE = ("hf_efficient",)
_warm = WarmProcess()


def assert_within_budget(actual: Tensor, oracle: Tensor, eager: Tensor, name: str) -> None:
    """The one tolerance: at most twice the error of the same-dtype eager computation, plus one ulp.

    Args:
        actual: the result under test.
        oracle: the same quantity computed in float64.
        eager: the same quantity computed the plain way in the dtype of `actual`.
        name: what is compared, for the message.
    """
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, got {oracle.dtype}"
    assert actual.dtype == eager.dtype, f"{name}: got {actual.dtype}, the eager computation {eager.dtype}"
    assert actual.shape == oracle.shape == eager.shape, (
        f"{name}: shapes differ: {tuple(actual.shape)}, oracle {tuple(oracle.shape)}, eager {tuple(eager.shape)}"
    )
    actual_64, oracle, eager_64 = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, oracle, eager))
    for label, tensor in (("actual", actual_64), ("oracle", oracle), ("eager", eager_64)):
        assert torch.isfinite(tensor).all(), (
            f"{name}: {label} holds {(~torch.isfinite(tensor)).sum()} non-finite values"
        )
    if not oracle.numel():
        return
    error = (actual_64 - oracle).abs().max().item()
    eager_error = (eager_64 - oracle).abs().max().item()
    budget = 2 * eager_error + _ulp(oracle.abs().max().item(), actual.dtype)
    assert error <= budget, f"{name}: error {error:.3e} exceeds {budget:.3e} (eager computation: {eager_error:.3e})"


def _ulp(value: float, dtype: torch.dtype) -> float:
    """The distance from `value` to the next number of this dtype."""
    exponent = math.frexp(value)[1] - 1
    return torch.finfo(dtype).eps * 2.0**exponent if value else torch.finfo(dtype).tiny


def subprocess_without_package(
    code: str,
    *arguments: object,
    hidden: tuple[str, ...] = WITHOUT_THE_PACKAGE,
    environment: dict[str, str] | None = None,
    timeout: float = 300,
) -> str:
    """Run `code` (its arguments in `sys.argv[1:]`) where the packages named in `hidden` cannot be imported.

    The process is isolated (`python -I`: no PYTHONPATH, no working directory on the path) and starts in an empty
    folder. Returns what it printed; fails the test with its standard error if it does not end well.

    It may be the fork of a process that imported torch and transformers, but never hf_efficient (warm_process.py);
    with other packages hidden, or in another environment, it is started from nothing.
    """
    hide = HIDING.format(hidden=set(hidden))
    variables = variables_of(environment)
    with tempfile.TemporaryDirectory() as empty:
        if hidden == WITHOUT_THE_PACKAGE and _warm.fits(variables):
            words = ("-c", code, *map(str, arguments))
            return output_of(*_warm.start(words, empty, variables, before=hide, isolated=True).wait(timeout))
        return run_python("-I", "-c", hide + code, *arguments, cwd=empty, environment=environment, timeout=timeout)


def run_python(
    *arguments: object,
    cwd: Path | str = ROOT,
    environment: dict[str, str | None] | None = None,
    python: Path | str = sys.executable,
    timeout: float = 300,
) -> str:
    """Run a Python process and return its standard output; an environment value of None removes the variable."""
    finished = subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=cwd,
        env=variables_of(environment),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return output_of(finished.returncode, finished.stdout, finished.stderr)


def run_warm_python(
    *arguments: object,
    cwd: Path | str = ROOT,
    environment: dict[str, str | None] | None = None,
    timeout: float = 300,
) -> str:
    """As `run_python`, in the fork of a process that imported torch and transformers, but never hf_efficient.

    For what does not ask whether a program finds everything that it imports, or how long that takes. In an environment
    other than that of the tests it is started from nothing.
    """
    if not _warm.fits(variables_of(environment)):
        return run_python(*arguments, cwd=cwd, environment=environment, timeout=timeout)
    return output_of(*start_warm_python(*arguments, cwd=cwd, environment=environment).wait(timeout))


def start_warm_python(
    *arguments: object, cwd: Path | str = ROOT, environment: dict[str, str | None] | None = None
) -> Fork:
    """Start what `run_warm_python` runs: it has a process id, and `wait`."""
    variables = variables_of(environment)
    assert _warm.fits(variables), "the environment must be that of the tests, but for PYTHONPATH and OMP_NUM_THREADS"
    return _warm.start(tuple(map(str, arguments)), str(cwd), variables)


def variables_of(environment: dict[str, str | None] | None) -> dict[str, str]:
    variables = os.environ | (environment or {})
    return {name: value for name, value in variables.items() if value is not None}


def output_of(status: int, stdout: str, stderr: str) -> str:
    assert status == 0, f"python ended with {status}:\n{stdout}\n{stderr}"
    return stdout
