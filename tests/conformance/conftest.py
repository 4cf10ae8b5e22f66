"""Holds the tests of this folder to the table in skips.py: an unlisted skip is red, so is a listed one that ran."""

from pathlib import Path

import pytest

from .skips import entries_for


HERE = Path(__file__).parent
# True while the body of the test runs: a report made then is one of a `subTest`.
IN_BODY = pytest.StashKey[bool]()
SKIPPED = pytest.StashKey[bool]()

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
    entries = entries_for(class_name, test)
    if report.skipped:
        item.stash[SKIPPED] = True
        message = report.longrepr[2]
        if not any(entry.explains(message) for entry in entries):
            _fail(report, f"{class_name}.{test} skips itself, which skips.py does not say: {message}")
    # The report of the whole test comes last, after those of its subtests.
    elif report.passed and report.when == "call" and not item.stash[IN_BODY]:
        ran = not item.stash.get(SKIPPED, False)
        if ran and any(entry.demanded() for entry in entries):
            _fail(report, f"{class_name}.{test} ran and passed: take it out of skips.py")
    return report


def _fail(report, why):
    report.outcome = "failed"
    report.longrepr = why
