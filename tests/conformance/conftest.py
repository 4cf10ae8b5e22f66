"""Holds the tests of this folder to the table in skips.py: an unlisted skip is red, so is a listed one that passed."""

import sys
from pathlib import Path

import pytest
import torch

from .skips import entries_for


HERE = Path(__file__).parent
# True while the body of the test runs: a report made then is one of a `subTest`.
IN_BODY = pytest.StashKey[bool]()
# A skip or failure that the table explains, of the test or of one of its subtests, has been seen.
EXPLAINED = pytest.StashKey[bool]()

UPSTREAM_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
)

# The plain asserts of the mixins then show their operands, as ours do.
pytest.register_assert_rewrite("transformers_tests")


@pytest.fixture(autouse=True)
def short_tensors():
    """The mixins write tensors into messages that nobody reads: without their elements, in a tenth of the time."""
    torch.set_printoptions(edgeitems=0, threshold=0)
    yield
    torch.set_printoptions(profile="default")


@pytest.fixture(autouse=True, scope="module")
def no_idle_ranks():
    """The mixins see distributed_testing_utils.py as a module of their own package, if they are there at all."""
    yield
    if utilities := sys.modules.get("transformers_tests.distributed_testing_utils"):
        utilities.ranks.stop()


def pytest_configure(config):
    for marker in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' own test mixins")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent != HERE:
            continue
        if any(item.iter_markers("is_tensor_parallel_test")) or any(item.iter_markers("is_fsdp_test")):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    item.stash[IN_BODY] = True
    try:
        return (yield)
    finally:
        item.stash[IN_BODY] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.path.parent != HERE or report.when == "teardown" or hasattr(report, "wasxfail"):
        return report
    class_name, test = (item.cls.__name__ if item.cls else ""), item.originalname or item.name
    rows = entries_for(class_name, test)
    if report.skipped:
        item.stash[EXPLAINED] = True
        message = report.longrepr[2]
        if not any(row.explains(message) for row in rows if not row.fails):
            _fail(report, f"{class_name}.{test} skips itself, which skips.py does not say: {message}")
    elif report.failed and any(row.explains(report.longreprtext) for row in rows if row.fails):
        item.stash[EXPLAINED] = True
        report.outcome, report.wasxfail = "skipped", "in skips.py"
    # The report of the whole test comes last, after those of its subtests.
    elif report.passed and report.when == "call" and not item.stash[IN_BODY]:
        passed = not item.stash.get(EXPLAINED, False)
        if passed and any(row.demanded() for row in rows):
            _fail(report, f"{class_name}.{test} ran and passed: take it out of skips.py")
    return report


def _fail(report, why):
    report.outcome = "failed"
    report.longrepr = why
