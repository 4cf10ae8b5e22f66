"""Lets a benchmark run only if the tests of what it measures are green: a fast wrong result is no result."""

import hashlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from benchmark_measure import ROOT


# What has to be green, and of that, what a run that prints no real figure looks at.
TESTS = {
    "linear_attention": ["tests/test_linear_attention*.py"],
    "soft_topk": ["tests/test_soft_topk*.py"],
    "flash_attention": ["tests/test_flash_attention*.py"],
    "performer": [
        *("tests/test_performer*.py", "tests/test_generation_contract.py"),
        *("tests/test_few_rows.py", "tests/test_joint_projection.py"),
    ],
    "colt5": ["tests/test_routed_block*.py", "tests/test_row_blocks.py", "tests/test_flash_attention_band.py"],
    "perceiver_flash": [
        *("tests/test_perceiver_flash.py", "tests/test_perceiver_flash_chunks.py"),
        *("tests/test_flash_attention_parts.py", "tests/test_conversion_perceiver.py"),
    ],
    "x_transformer": ["tests/test_x_transformer*.py", "tests/test_few_rows.py", "tests/test_generation_contract.py"],
}
QUICK_TESTS = {
    "linear_attention": [
        "tests/test_linear_attention.py::test_any_split_is_the_whole",
        "tests/test_linear_attention_isolation.py::test_rows_without_any_key_are_zero",
    ],
    "performer": [],
    "colt5": ["tests/test_routed_blocks.py::test_feed_forward_is_the_formula"],
    "perceiver_flash": ["tests/test_flash_attention_parts.py::test_parts_equal_the_whole"],
    "x_transformer": ["tests/test_x_transformer.py::test_an_encoder_looks_both_ways"],
    "soft_topk": ["tests/test_soft_topk.py::test_exact_reference_solves_the_equation"],
    "flash_attention": ["tests/test_flash_attention.py::test_the_public_function_is_the_reference"],
}
OPTIONS, QUICK_OPTIONS = ["-m", "not slow", "-n", "auto", "--dist", "worksteal"], ["-m", "not slow"]
# The kernels, compiled. Most of the time goes into compiling, so several processes share the tests.
GPU_TESTS = {op: [f"tests/test_{op}_triton*.py"] for op in ("linear_attention", "soft_topk", "flash_attention")}
GPU_OPTIONS = ["-n", "8", "--dist", "worksteal"]
SOURCES = ("hf_efficient", "configuration", "modeling", "kernels", "tests")
PASSED = ROOT / ".cache/benchmark/passed"


def require_green(ops: list[str], quick: bool = False, on_gpu: bool = False) -> None:
    """Run the tests of these operations and models, and end the program if one fails.

    What passed is remembered by a hash of sources, tests and versions, so that only a change runs them again. On a GPU
    they are those of the kernels.
    """
    suite = GPU_TESTS if on_gpu else QUICK_TESTS if quick else TESTS
    selected = [test for op in ops for test in suite[op]]
    tests = [found for test in selected for found in _matching(test)]
    if not tests:
        return
    stamp = _stamp(tests)
    remembered = PASSED.read_text().split() if PASSED.exists() else []
    if stamp in remembered:
        print(f"tests of {', '.join(ops)}: these sources passed before")
        return
    print(f"tests of {', '.join(ops)}: running", flush=True)
    options = GPU_OPTIONS if on_gpu else QUICK_OPTIONS if quick else OPTIONS
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, *tests]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if finished.returncode:
        print(finished.stdout[-4000:], finished.stderr[-2000:], sep="\n", file=sys.stderr)
        sys.exit(f"The tests of {', '.join(ops)} are red: no figures. Run: pytest {' '.join(tests)}")
    PASSED.parent.mkdir(parents=True, exist_ok=True)
    PASSED.write_text("\n".join([*remembered[-20:], stamp]) + "\n")


def _matching(test: str) -> list[str]:
    if "::" in test:
        return [test]
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(test))


def _stamp(tests: list[str]) -> str:
    digest = hashlib.sha256("\0".join([*tests, version("torch"), version("transformers")]).encode())
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(_named_content(path))
    return digest.hexdigest()


def _named_content(path: Path) -> bytes:
    return str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0"
