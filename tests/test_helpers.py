"""The helpers that other tests rely on can say no."""

import math
import os
import subprocess

import pytest
import torch
from helpers import assert_within_budget, run_python, subprocess_without_package
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


def test_forks_of_a_warm_process_know_nothing_of_each_other(tmp_path):
    warm = WarmProcess("import sys, unittest.mock\nsys.modules['transformers'] = unittest.mock.Mock()\n")  # saves time
    change = "import os, sys, torch\nos.environ['LEFT'] = 'behind'\ntorch.left = 1\nprint(os.getpid(), *sys.argv[1:])"
    look = "import os, torch\nprint(os.getpid(), hasattr(torch, 'left'), 'LEFT' in os.environ, os.getcwd())"
    try:
        status, first, _ = warm.run(change, ("an argument",), str(tmp_path), 60)
        assert status == 0 and first.endswith(" an argument\n")
        status, second, _ = warm.run(look, (), str(tmp_path), 60)
        assert second.split()[1:] == ["False", "False", str(tmp_path)] and first.split()[0] != second.split()[0]

        status, _, error = warm.run("1 / 0", (), str(tmp_path), 60)
        assert status == 1 and "ZeroDivisionError" in error
        assert warm.run("import sys; sys.exit(3)", (), str(tmp_path), 60)[0] == 3
        assert warm.fits(os.environ) and not warm.fits(os.environ | {"HF_HOME": "elsewhere"})

        with pytest.raises(subprocess.TimeoutExpired):
            warm.run("import time; time.sleep(60)", (), str(tmp_path), 0.5)
        assert warm.run("print(1)", (), str(tmp_path), 60)[:2] == (0, "1\n")  # by a server of its own
    finally:
        warm.stop()
