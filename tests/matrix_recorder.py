"""Collects what the tests marked `matrix` say about each head, and holds it to the committed docs/matrix.md.

    @pytest.mark.matrix("resume")
    def test_…(head, …)

says that the test decides about the column "resume" for its parameter `head` (or for all of `heads=[…]`). A test that
shows a clear refusal, and nothing working, says so with `record_property("matrix_cell", "refused")`. At the end of a
whole run the cells have to be those of the page: one that was "yes" and is not, because its test failed or is no
longer there, fails the run, and so does a better one, until `make matrix` has written it down.
"""

from collections import defaultdict

import pytest


class MatrixRecorder:
    """A plugin of the process that sees all reports (with pytest-xdist, the one that runs no tests)."""

    def __init__(self, page, write: bool, compare: bool = True):
        self.page, self.write, self.compare = page, write, compare
        self.said = defaultdict(set)  # (head, column): what its tests said
        self.problems: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        properties = [*getattr(report, "user_properties", ())]
        refused = ("matrix_cell", "refused") in [tuple(item) for item in properties]
        for name, value in properties:
            if name == "matrix":
                said = report.outcome if not hasattr(report, "wasxfail") else "failed"
                self.said[tuple(value)].add("refused" if refused and said == "passed" else said)

    def cells(self) -> dict[tuple[str, str], str]:
        return {cell: summary(said) for cell, said in self.said.items()}

    def pytest_sessionfinish(self, session):
        if self.write:
            # A part of the tests has a say about its own cells only.
            kept = {} if is_whole_run(session) else self.page.read()
            self.page.write(kept | self.cells())
        elif self.compare and is_whole_run(session):
            before, now = self.page.read(), self.cells()
            for head, column in sorted(before.keys() | now.keys()):
                said, says = before.get((head, column), "—"), now.get((head, column), "—")
                if said != says:
                    self.problems.append(f"{head}, {column}: {self.page.path.name} says {said}, the tests say {says}")
            if self.problems:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.problems:
            terminalreporter.section(f"{self.page.path.name} (`make matrix` writes it anew)", red=True)
            for problem in self.problems:
                terminalreporter.line(problem)


def summary(said: set[str]) -> str:
    """One word about a cell, of what all of its tests said."""
    if "failed" in said:
        return "**no**"
    said = said - {"skipped"}
    if not said:
        return "not run"
    return {("passed",): "yes", ("refused",): "refused"}.get(tuple(said), "yes, some refused")


def is_whole_run(session) -> bool:
    """Whether every test was asked for, or every one of the matrix."""
    options = session.config.option
    chosen = any(getattr(options, name, False) for name in ("keyword", "lf", "ff", "collectonly"))
    return (
        session.config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and options.markexpr in ("", "matrix")
        and not (chosen or session.shouldstop or session.shouldfail)
    )


def note_cells(items, head_of) -> None:
    """Gives each marked test its cells, which travel with its reports."""
    for item in items:
        for marker in item.iter_markers("matrix"):
            for head in marker.kwargs.get("heads") or [head_of(item.callspec.params)]:
                item.user_properties += [("matrix", (head, column)) for column in marker.args]
