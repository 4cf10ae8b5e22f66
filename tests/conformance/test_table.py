"""The table of skips is exact in the direction that a run cannot see: no row without a test, no test with two rows."""

from . import document
from .skips import SKIPS


CASES = document.test_cases()


def test_every_row_is_about_a_test():
    idle = [skip for skip in SKIPS if not any(skip.covers(case, test) for case, tests in CASES for test in tests)]
    assert not idle, f"rows of skips.py that match no test: {idle}"


def test_no_test_has_two_rows():
    for case, tests in CASES:
        for test in tests:
            rows = [skip for skip in SKIPS if skip.covers(case, test)]
            assert len(rows) < 2, f"{case}.{test} is in skips.py {len(rows)} times: {rows}"


def test_document_is_up_to_date():
    assert document.PATH.read_text(encoding="utf-8") == document.render(), (
        "docs/conformance.md differs from what tests/conformance/skips.py says: run `python -m "
        "tests.conformance.document` at the root"
    )
