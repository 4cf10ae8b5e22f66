"""The helpers that other tests rely on can say no."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import assert_within_budget, run_python, run_warm_python, subprocess_without_package
from warm_process import WarmProcess


def test_the_budget_is_twice_the_eager_error_plus_one_ulp():
    oracle = torch.tensor([1.5, -0.25], dtype=torch.float64)
    eager = oracle.float() + 1e-3
    ulp = torch.finfo(torch.float32).eps  # of 1.5
    assert_within_budget(oracle.float() + 1.99e-3, oracle, eager, "inside")
    with pytest.raises(AssertionError, match="outside: error 2.1"):
        assert_within_budget(oracle.float() - 2.1e-3, oracle, eager, "outside")
    # Where eager is exact, the last bit may still differ, and no more.
    exact = oracle.float()
    assert_within_budget(exact + torch.tensor([ulp, 0]), oracle, exact, "last bit")
    with pytest.raises(AssertionError, match="two bits"):
        assert_within_budget(exact + torch.tensor([2 * ulp, 0]), oracle, exact, "two bits")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_budget_admits_no_nan_and_no_infinity(value, place):
    tensors = [torch.ones(3), torch.ones(3, dtype=torch.float64), torch.ones(3)]
    tensors[place][1] = value
    with pytest.raises(AssertionError, match="holds 1 non-finite values"):
        assert_within_budget(*tensors, "values")


def test_the_budget_compares_like_with_like():
    oracle = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="the oracle must be float64"):
        assert_within_budget(torch.ones(3), torch.ones(3), torch.ones(3), "oracle")
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_within_budget(torch.ones(1), oracle, torch.ones(3), "broadcast")
    with pytest.raises(AssertionError, match="torch.float16"):
        assert_within_budget(torch.ones(3), oracle, torch.ones(3, dtype=torch.float16), "dtype")


def test_poisoned_allocations_are_nan(nan_poisoned):
    assert torch.empty(1000).isnan().all()
    assert torch.ones(3).new_empty(1000).isnan().all()


def test_poison_does_not_outlive_its_test():
    assert not torch.are_deterministic_algorithms_enabled()


def test_hidden_packages_look_uninstalled():
    printed = subprocess_without_package(
        """
import importlib.util, sys
for name in ("hf_efficient", "triton"):
    assert importlib.util.find_spec(name) is None
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error.name)
import torch
print(*sys.argv[1:])
""",
        "an argument",
        hidden=("hf_efficient", "triton"),
    )
    assert printed.split("\n") == ["hf_efficient", "triton", "an argument", ""]


def test_a_failing_process_fails_the_test_with_its_error():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_python("-c", "1 / 0")


@pytest.fixture(scope="module")
def warm():
    """Without torch and transformers, to save time."""
    process = WarmProcess(imports="")
    yield process
    process.stop()


def test_forks_of_a_warm_process_know_nothing_of_each_other(warm, tmp_path, monkeypatch):
    change = "import os, sys\nos.environ['LEFT'] = 'behind'\nos.left = 1\nprint(os.getpid(), *sys.argv[1:])"
    look = "import os\nprint(os.getpid(), hasattr(os, 'left'), 'LEFT' in os.environ, os.getcwd())"

    def run(code, *words, timeout=60):
        return warm.start(("-c", code, *words), str(tmp_path), dict(os.environ)).wait(timeout)

    status, first, _ = run(change, "an argument")
    assert status == 0 and first.endswith(" an argument\n")
    status, second, _ = run(look)
    assert second.split()[1:] == ["False", "False", str(tmp_path)] and first.split()[0] != second.split()[0]

    status, _, error = run("1 / 0")
    assert status == 1 and "ZeroDivisionError" in error
    assert run("import sys; sys.exit(3)")[0] == 3
    assert warm.fits(os.environ) and not warm.fits(os.environ | {"HF_HOME": "elsewhere"})
    assert warm.fits(os.environ | {"PYTHONPATH": "elsewhere", "OMP_NUM_THREADS": "3"})

    monkeypatch.setenv("LEFT", "by another test")
    assert not warm.fits({}) and warm.fits(os.environ)
    assert run("import os; print(os.environ['LEFT'])")[1] == "by another test\n"

    asleep = warm.start(("-c", "import time; time.sleep(60)"), str(tmp_path), dict(os.environ))
    assert asleep.is_running()
    os.kill(asleep.pid, signal.SIGKILL)
    assert asleep.wait(60)[0] == -signal.SIGKILL
    with pytest.raises(subprocess.TimeoutExpired):
        run("import time; time.sleep(60)", timeout=0.5)
    assert run("print(1)")[:2] == (0, "1\n")  # by a server of its own
    warm.start(("-c", "import time; time.sleep(60)"), str(tmp_path), dict(os.environ))
    assert run("print(2)")[:2] == (0, "2\n")  # nobody waited for the one before


PROGRAM = """
import os, sys
import beside, elsewhere
main = sys.modules["__main__"]
print(__name__, main.__dict__ is globals(), getattr(main, "__file__", None), sys.argv, os.getcwd())
print(sys.path[:2], beside.__file__, elsewhere.__file__, os.environ["GIVEN"], "REMOVED" in os.environ)
print("hf_efficient" in sys.modules, sys.stdin.read(), file=sys.stderr)
sys.exit(3 if "fail" in sys.argv else 0)
"""


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_a_warm_process_is_a_cold_one_to_the_program(kind, warm, tmp_path):
    """What it is told, what it finds, and how it ends."""
    for folder in ("cwd", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "elsewhere.py").touch()
    program = tmp_path / "cwd" / "program.py"
    program.write_text(PROGRAM)
    program.with_name("beside.py").touch()
    words = {"-c": ("-c", PROGRAM), "-m": ("-m", "program"), "script": ("program.py",)}[kind]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "other"), "GIVEN": "a value"}
    for more in ((), ("fail", "--flag")):
        cold = subprocess.run(
            [sys.executable, *words, *more],
            cwd=program.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        forked = warm.start((*words, *more), str(program.parent), environment).wait(60)
        assert forked == (cold.returncode, cold.stdout, cold.stderr)
        assert cold.returncode == 3 * len(more[:1]) and str(tmp_path) in cold.stdout, cold.stderr


def test_the_package_is_new_to_a_warm_process():
    code = "import sys, torch; print('hf_efficient' in sys.modules, 'transformers' in sys.modules)"
    more = "\nfrom hf_efficient import PerformerConfig; print(PerformerConfig.__module__, torch.get_num_threads())"
    printed = run_warm_python("-c", code + more, environment={"OMP_NUM_THREADS": "3"})
    assert printed.split() == ["False", "True", "hf_efficient.configuration.performer", "3"]
