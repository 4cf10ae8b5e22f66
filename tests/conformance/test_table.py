"""The table of skips is exact: what the hooks of conftest.py do with it, and what a single run cannot see of it."""

import shutil

from helpers import run_python

from . import document
from .skips import SKIPS


CASES = document.test_cases()

TABLE = """
import dataclasses
from .real_skips import Machine, Skip

HERE, ELSEWHERE = Machine("here", lambda: True), Machine("elsewhere", lambda: False)
SKIPS = [
    Skip("test_explained.*", raised="no engine", reason=""),
    Skip("test_other_reason", raised="no engine", reason=""),
    Skip("test_ran", raised="no engine", reason=""),
    Skip("test_may_run", raised="no engine", reason="", unless=HERE),
    Skip("test_must_not_run", raised="no engine", reason="", unless=ELSEWHERE),
    Skip("test_cannot_pass.*", raised="no road", reason="", fails=True),
    Skip("test_passes_now", raised="no road", reason="", fails=True),
    Skip("test_fails_otherwise", raised="no road", reason="", fails=True),
    Skip("test_skips_now", raised="no road", reason="", fails=True),
    Skip("test_fails_instead", raised="no engine", reason=""),
]

def entries_for(class_name, test):
    return [skip for skip in SKIPS if skip.covers(class_name, test)]
"""
TESTS = """
import unittest
from .quiet_subtests import QuietSubTests

class Case(QuietSubTests, unittest.TestCase):
    def test_explained(self): self.skipTest("no engine")
    def test_explained_decorated(self): raise unittest.SkipTest("no engine")
    def test_explained_in_subtest(self):
        with self.subTest("one"): self.skipTest("no engine")
        with self.subTest("two"): pass
    def test_other_reason(self): self.skipTest("no wheels")
    def test_ran(self):
        with self.subTest("one"): pass
    def test_may_run(self): pass
    def test_must_not_run(self): pass
    def test_unlisted(self): self.skipTest("no engine")
    def test_unlisted_in_subtest(self):
        with self.subTest("one"): pass
        with self.subTest("two"): self.skipTest("no engine")
    def test_cannot_pass(self): self.fail("no road")
    def test_cannot_pass_in_subtest(self):
        with self.subTest("one"): self.fail("no road")
        with self.subTest("two"): pass
    def test_passes_now(self): pass
    def test_fails_otherwise(self): self.fail("no engine")
    def test_skips_now(self): self.skipTest("no road")
    def test_fails_instead(self): self.fail("no engine")
    def test_plain(self): pass
    def test_fails_anyway(self): self.fail("no engine")
"""
RED = {"other_reason", "ran", "must_not_run", "unlisted", "unlisted_in_subtest", "fails_anyway"}
RED |= {"passes_now", "fails_otherwise", "skips_now", "fails_instead"}


def test_a_skip_and_its_row_need_each_other(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    for name in ("conftest.py", "quiet_subtests.py"):
        shutil.copy(document.HERE / name, folder)
    shutil.copy(document.HERE / "skips.py", folder / "real_skips.py")
    (folder / "skips.py").write_text(TABLE)
    (folder / "test_case.py").write_text(TESTS)
    report = run_python(
        "-c",
        "import pytest, sys; pytest.main(sys.argv[1:])",
        *("--import-mode=importlib", "-q", "-rfs", "-p", "no:cacheprovider", "--rootdir", tmp_path, folder),
        cwd=tmp_path,
    )
    red = {line.split("::test_")[1].split(" ")[0] for line in report.splitlines() if "FAILED" in line}
    assert red == RED, report


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
