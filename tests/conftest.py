"""What every test relies on: set before transformers or a kernel is imported, hence at the top of this file."""

import gc
import importlib.util
import os
import random
import shutil
import tempfile


# Until all tests are collected, hardly anything dies: to search a growing heap for it again and again costs seconds.
gc.disable()

# No test may reach the network or leave modules of remote code in the user's cache. Nor may it find code there that
# torch.compile generated for an operator as it was before: its cache does not notice a changed one.
HF_HOME = tempfile.mkdtemp(prefix="hf_efficient_tests_")
os.environ |= {
    "HF_HOME": HF_HOME,
    "HF_MODULES_CACHE": os.path.join(HF_HOME, "modules"),
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(HF_HOME, "inductor"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRACKIO_DISABLED": "1",
}
# Dozens of processes import what is here: they need not compile it each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
UNDER_XDIST = "PYTEST_XDIST_WORKER" in os.environ
if UNDER_XDIST:  # the workers share the cores; also for the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


# `sm_80` or `sm_90`: Triton's kernels run as the code that is compiled for such a GPU, without one (`ptx_driver.py`).
COMPILED_FOR = os.environ.get("HF_EFFICIENT_COMPILED_FOR")
if COMPILED_FOR:
    os.environ["TRITON_INTERPRET"] = "0"
if not torch.cuda.is_available():  # Triton reads it when a kernel is decorated, that is, when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
if UNDER_XDIST:
    torch.set_num_threads(1)


from matrix_page import MatrixPage, head_of  # noqa: E402
from matrix_recorder import MatrixRecorder, note_cells  # noqa: E402
from triton_interpreter import check_operands_quickly, patch_once_per_launch, remember_shapes  # noqa: E402


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_once_per_launch()
    remember_shapes()
    check_operands_quickly()


def pytest_addoption(parser):
    parser.addoption("--write-matrix", action="store_true", help="write docs/matrix.md (see `make matrix`)")


def pytest_configure(config):
    if COMPILED_FOR:
        from ptx_driver import TARGETS, executing_for

        if COMPILED_FOR not in TARGETS or torch.cuda.is_available():
            found = f"{COMPILED_FOR!r}{' beside a GPU' if torch.cuda.is_available() else ''}"
            raise pytest.UsageError(f"HF_EFFICIENT_COMPILED_FOR must be one of {', '.join(TARGETS)}, got {found}")
        compiled = executing_for(COMPILED_FOR)
        compiled.__enter__()
        config.add_cleanup(lambda: compiled.__exit__(None, None, None))
    if not hasattr(config, "workerinput"):
        # The page is that of a machine without a GPU.
        page = MatrixPage()
        compare = page.path.exists() and not torch.cuda.is_available()
        config.pluginmanager.register(MatrixRecorder(page, config.option.write_matrix, compare))


def pytest_collection_modifyitems(items):
    note_cells(items, head_of)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is there by now stays: accelerate has all garbage collected before each training."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_runtest_setup(item):
    if torch.cuda.is_available():
        return
    if item.get_closest_marker("gpu"):
        pytest.skip("needs a GPU")
    if item.get_closest_marker("compiled") and not COMPILED_FOR:
        pytest.skip("needs a GPU, or HF_EFFICIENT_COMPILED_FOR=sm_80 or sm_90")


def pytest_unconfigure(config):
    gc.unfreeze()  # Triton's bindings take what is frozen for leaks
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    numpy.random.seed(0)
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # not also those of GPUs that are not there: with a trace of the stack for each, more than some tests take
        torch.default_generator.manual_seed(0)
    return 0


@pytest.fixture
def nan_poisoned():
    """`torch.empty` and its kin come filled with NaN, so a value that nobody wrote cannot pass for a small one."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filling
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
