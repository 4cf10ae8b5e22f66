"""Writes docs/conformance.md from the table of skips: `python -m tests.conformance.document` at the root."""

import importlib
import importlib.metadata
import re
import unittest
from collections import Counter
from pathlib import Path

from .skips import SKIPS, Skip


HERE = Path(__file__).parent
PATH = HERE.parent.parent / "docs" / "conformance.md"

HEAD = """# transformers' own tests, run on our models

Written by `python -m tests.conformance.document` from `tests/conformance/skips.py`; `tests/conformance/test_table.py`
keeps it up to date.

`tests/conformance/` runs the common model tests of transformers {version} (ModelTesterMixin, ConfigTester,
TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin and its monkey-patching tests, taken from its sdist on
PyPI when the tests are set up) on every head of every architecture. Tensor-parallel and FSDP tests start two or four
gloo processes on the CPU. No test is switched off: those listed below skip themselves, or are run and fail because
they assume what is not so for our models ("fails"). The list is exact: a skip or failure that is not in it is red, and
so is an entry whose test passes. "unless" names the machines where a test runs after all; CI has a CPU only.

22 of each class's passing tests (`get_*_features_*`) find nothing to test in a text model and pass all the same.

    pytest tests/conformance -n 2

What else each model is held to is in [matrix.md](matrix.md).
"""

ABSENT = """
## What transformers has and its sdist has not

| mixin | what stands in its place |
|---|---|
| GenerationTesterMixin | `tests/test_generation_contract.py` |
| PipelineTesterMixin (needs a list of models on the Hub) | `tests/test_pipelines.py` |
| ExportTesterMixin | `tests/test_perceiver_flash_training.py` for PerceiverFlash |
"""


def test_classes() -> dict[str, type[unittest.TestCase]]:
    """Every test class of this folder."""
    classes = {}
    for path in sorted(set(HERE.glob("test_*.py")) - {HERE / "test_table.py"}):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, unittest.TestCase):
                classes[name] = value
    return classes


def test_cases() -> list[tuple[str, list[str]]]:
    """Every test class of this folder with the names of its tests."""
    return [(name, unittest.TestLoader().getTestCaseNames(case)) for name, case in test_classes().items()]


def counts(case: str, tests: list[str]) -> tuple[int, int, int]:
    """How many tests of a class pass, skip themselves, and fail as skips.py says."""
    rows = [skip for test in tests for skip in SKIPS if skip.covers(case, test)]
    failing = sum(skip.fails for skip in rows)
    return len(tests) - len(rows), len(rows) - failing, failing


def models(case: type[unittest.TestCase]) -> str:
    """The model classes that a test class tries."""
    classes = getattr(getattr(case, "tester", None), "model_classes", ())
    return ", ".join(f"`{model.__name__}`" for model in classes)


def render() -> str:
    cases, classes = test_cases(), test_classes()
    lines = [HEAD.format(version=importlib.metadata.version("transformers"))]
    lines += ["| test class | models | tests | pass | skip themselves | fail |", "|---|---|---|---|---|---|"]
    for case, tests in cases:
        row = [case, models(classes[case]), len(tests), *counts(case, tests)]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += ["", "## The tests that do not pass", "", "| why | tests | in | unless |", "|---|---|---|---|"]
    lines += [_row(skip, cases) for skip in SKIPS]
    return "\n".join(lines) + "\n" + ABSENT


def _row(skip: Skip, cases: list[tuple[str, list[str]]]) -> str:
    covered = {case: [test for test in tests if skip.covers(case, test)] for case, tests in cases}
    # A parameterised test has one name per case, told apart by `_<number>` or `_<number>_<what>` at the end.
    stems = Counter(
        re.sub(r"(?<!attn)_\d+(_\w*)?$", "", test.removeprefix("test_"))
        for test in sorted(set().union(*covered.values()))
    )
    names = ", ".join(f"`{stem}`" + (f" ({count} cases)" if count > 1 else "") for stem, count in stems.items())
    places = [case for case, tests in covered.items() if tests]
    model_tests = [case for case, _ in cases if case != "MonkeyPatchTest"]
    where = "all" if places == model_tests else ", ".join(places)
    return (
        f"| {'fails: ' * skip.fails}{skip.reason} | {names} | {where} | {skip.unless.words if skip.unless else ''} |"
    )


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render(), encoding="utf-8")
