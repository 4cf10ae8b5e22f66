"""docs/matrix.md says something about every head, and the recorder fails a run of which the page is not true."""

import re
import shutil

import matrix_page
import pytest
from helpers import ROOT, run_python
from tiny_heads import HEADS


PAGE_OF_ALL = matrix_page.MatrixPage()


def test_the_page_is_what_would_be_written():
    assert PAGE_OF_ALL.path.read_text(encoding="utf-8") == matrix_page.render(PAGE_OF_ALL.read()), (
        "docs/matrix.md was edited, or a head, a column or docs/conformance.md is newer: run `make matrix`"
    )


def test_the_page_decides_about_every_head():
    cells = PAGE_OF_ALL.read()
    columns = {"remote code": [name for name, head in HEADS.items() if head.auto_class]}
    columns["Hub round trip"] = columns["remote code"]
    for column in ("Trainer", "resume", "checkpointing", "bf16", "compile"):
        columns[column] = [name for name, head in HEADS.items() if head.learns]
    for column in matrix_page.GENERATION_COLUMNS:
        columns[column] = [name for name, head in HEADS.items() if head.generates]
    assert columns.keys() | {"pipeline"} == matrix_page.COLUMNS.keys() | matrix_page.GENERATION_COLUMNS.keys()
    missing = [(head, column) for column, heads in columns.items() for head in heads if (head, column) not in cells]
    assert not missing
    assert HEADS.keys() == matrix_page.common_tests().keys()


CONFTEST = """
import pathlib, sys
sys.path.insert(0, {tests!r})
import matrix_page, matrix_recorder
class Page(matrix_page.MatrixPage):
    path = pathlib.Path(__file__).parent.parent / "page.md"
def pytest_configure(config):
    config.addinivalue_line("markers", "matrix: …")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(matrix_recorder.MatrixRecorder(Page(), False))
def pytest_collection_modifyitems(items):
    matrix_recorder.note_cells(items, matrix_page.head_of)
"""
TESTS = """
import pytest
@pytest.mark.matrix("Trainer", "resume")
@pytest.mark.parametrize("head", ["A", "B"])
def test_both(head): pass
@pytest.mark.matrix("pipeline")
@pytest.mark.parametrize("head", ["A", "B"])
@pytest.mark.parametrize("option", [0, 1])
def test_refusals(head, option, record_property):
    if head == "B" or option: record_property("matrix_cell", "refused")
@pytest.mark.matrix("compile", heads=["A", "B"])
def test_many_heads(): pass
@pytest.mark.matrix("bf16")
@pytest.mark.parametrize("head", ["A"])
@pytest.mark.xfail(strict=True)
def test_known_to_fail(head): assert False
@pytest.mark.matrix("checkpointing")
@pytest.mark.parametrize("head", ["B"])
def test_not_here(head): pytest.skip("no machine")
"""
PAGE = """
| head | [Trainer](x) | resume | pipeline | compile | bf16 | checkpointing |
| --- | --- | --- | --- | --- | --- | --- |
| `A` | yes | yes | yes, some refused | yes | **no** | — |
| `B` | yes | yes | refused | yes | — | not run |
"""


@pytest.fixture
def run(tmp_path):
    """Writes page and tests, runs them, and returns what pytest says about the page (None: nothing)."""

    def run(page=PAGE, tests=TESTS, *arguments):
        folder = tmp_path / "tests"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "conftest.py").write_text(CONFTEST.format(tests=str(ROOT / "tests")))
        (folder / "test_it.py").write_text(tests)
        (tmp_path / "page.md").write_text(page)
        (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
        printed = run_python(
            *("-c", "import pytest, sys; print('ended with', int(pytest.main(sys.argv[1:])))"),
            *("-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *arguments),
            cwd=tmp_path,
            environment={"PYTHONPATH": str(ROOT)},
        )
        failed = "ended with 1" in printed
        problems = re.findall(r"^(\w+, .*): page.md says (.*), the tests say (.*)$", printed, flags=re.MULTILINE)
        assert failed == bool(problems), printed
        return problems

    return run


def test_a_page_that_is_true_passes(run):
    assert run() == []
    assert run(PAGE, TESTS, "-n", "2", "--dist", "worksteal") == []


CHANGES = (
    ("def test_both(head): pass", 'def test_both(head): pytest.skip("no time")'),
    ('@pytest.mark.matrix("compile", heads=["A", "B"])', ""),
    ("@pytest.mark.xfail(strict=True)\ndef test_known_to_fail(head): assert False", "def test_known(head): pass"),
    ('if head == "B" or option:', "if True:"),
    ('@pytest.mark.parametrize("head", ["B"])', '@pytest.mark.parametrize("head", ["B", "C"])'),
)
PROBLEMS = [
    ("A, Trainer", "yes", "not run"),
    ("A, bf16", "**no**", "yes"),
    ("A, compile", "yes", "—"),
    ("A, pipeline", "yes, some refused", "refused"),
    ("A, resume", "yes", "not run"),
    ("B, Trainer", "yes", "not run"),
    ("B, compile", "yes", "—"),
    ("B, resume", "yes", "not run"),
    ("C, checkpointing", "—", "not run"),
]


def test_a_page_that_is_not_true_fails(run):
    """Tests that are skipped, unmarked, mended, only refused now, and one that is new."""
    tests = TESTS
    for old, new in CHANGES:
        assert old in tests
        tests = tests.replace(old, new)
    assert run(PAGE, tests) == PROBLEMS
    assert run(PAGE, tests, "-n", "2", "--dist", "worksteal") == PROBLEMS


def test_a_part_of_the_tests_says_nothing_about_the_page(run):
    changed = TESTS.replace(*CHANGES[0])
    assert run(PAGE, changed, "-k", "both") == []
    assert run(PAGE, changed, "tests/test_it.py") == []
