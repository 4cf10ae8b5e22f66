"""Compiles every Triton kernel in every shipped configuration for GPUs that need not be here, and says what it takes.

    python scripts/kernel_report.py                              every op, every target
    python scripts/kernel_report.py --operations soft_topk --targets sm_90 --hot-only
    python scripts/kernel_report.py --triton 3.6.0               the same under another Triton, fetched with pip once
    python scripts/kernel_report.py --known docs/benchmarks/kernel_resources.csv    only what has changed since
    make kernels                                                                   writes these tables

One row per compiled kernel: registers per thread, bytes spilled per thread, shared memory per program, the matrix
instruction found, and how many instructions its innermost loops have (NVIDIA only). Ends with status 1 if a kernel
does not compile, needs more shared memory than its target has, or spills in a hot configuration.

One operation for one target took up to 705 s on a core of an EPYC, so what the compiler said is kept in tables
(`known_kernels.py`): with `--known` a kernel whose content stands there is not compiled again, but for those of the
first `--recompile` cases of each operation and target, of which it is a problem if the table says otherwise.
"""

import argparse
import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = sorted(
    path.stem.removeprefix("kernel_cases_") for path in Path(__file__).parent.glob("kernel_cases_*.py")
)
TARGETS = ("sm_80", "sm_90", "gfx942")
COLUMNS = (
    "operation", "case", "hot", "target", "kernel", "registers", "spilled_bytes", "shared_bytes", "num_warps",
    "matrix_instruction", "loops", "triton", "key", "problem",
)  # fmt: skip


def other_triton(version: str) -> Path:
    """A folder that holds this version of Triton alone, under .cache; fetched if it is not there yet."""
    folder = ROOT / f".cache/triton-{version}"
    finished = folder / ".installed"
    if not finished.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder]
        subprocess.run([*command, f"triton=={version}"], check=True)
        finished.touch()
    return folder


def run_with(version: str) -> int:
    """This script once more, in a process that finds the other Triton first."""
    arguments = list(sys.argv[1:])
    position = arguments.index("--triton")
    del arguments[position : position + 2]
    path = os.pathsep.join(filter(None, (str(other_triton(version)), os.environ.get("PYTHONPATH"))))
    return subprocess.run([sys.executable, __file__, *arguments], env=os.environ | {"PYTHONPATH": path}).returncode


def rows(
    operation: str,
    target: str,
    hot_only: bool,
    ignore_spills: bool = False,
    known: Path | None = None,
    recompile: int = 0,
):
    """One row per kernel that the cases of this operation compile; a case that fails gives one row with the reason."""
    import triton
    from known_kernels import read_known
    from offline_compiler import SHARED_MEMORY, compiling_for, resources

    table = read_known(known)
    cases = importlib.import_module(f"kernel_cases_{operation}").cases()
    cases = [case for case in cases if case.hot or case.tight or not hot_only]
    for index, case in enumerate(cases):
        row = {"operation": operation, "case": case.name, "hot": case.hot, "target": target, "problem": ""}
        with compiling_for(target, table if index >= recompile else None) as compiled:
            try:
                case.launch()
            except Exception as error:  # the row says what went wrong; the other cases still count
                yield row | {"problem": f"{type(error).__name__}: {str(error).strip()[:300]}"}
                continue
        if not compiled:
            yield row | {"problem": "no kernel was launched"}
        for kernel in compiled:
            used = resources(kernel)
            problems = []
            if used.shared_bytes > SHARED_MEMORY[target]:
                problems.append(f"shared memory over {SHARED_MEMORY[target]}")
            if case.hot and used.spilled_bytes and not ignore_spills:
                problems.append("spills")
            if table.get(kernel.content_key, used) != used:
                problems.append(f"{known} says otherwise: delete it and run `make kernels`")
            found = {"triton": triton.__version__, "key": kernel.content_key, "problem": ", ".join(problems)}
            yield row | used._asdict() | found


def show(row: dict) -> None:
    name = f"{row['operation']} {row['case']}{' (hot)' if row['hot'] else ''}"
    if "kernel" in row:
        used = (
            f"{row['registers']:4d} registers {row['spilled_bytes']:5d} spilled {row['shared_bytes']:7d} shared "
            f"{row['num_warps']:2d} warps {row['matrix_instruction'] or '-':5s} loops of {row['loops'] or '-'}"
        )
        print(f"{row['target']:6s} {name:60s} {row['kernel']:44s} {used} {row['problem']}".rstrip(), flush=True)
    else:
        print(f"{row['target']:6s} {name:60s} {row['problem']}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument(
        "--hot-only", action="store_true", help="only what carries the usual work or fills shared memory"
    )
    parser.add_argument("--ignore-spills", action="store_true", help="say how much is spilled, but do not mind")
    parser.add_argument("--triton", metavar="VERSION", help="a Triton version other than the installed one")
    parser.add_argument("--csv", type=Path, help="a file for the rows of this run and no others")
    parser.add_argument("--known", type=Path, help="rows of an earlier run: their kernels are not compiled again")
    parser.add_argument("--recompile", type=int, default=0, help="cases of each operation and target that are, though")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.triton:
        return run_with(arguments.triton)
    # Read by Triton when a kernel is decorated: interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    import triton  # not at the top: the other Triton has its own process

    print(f"triton {triton.__version__}", flush=True)
    found = []
    for operation in arguments.operations:
        for target in arguments.targets:
            for row in rows(
                operation,
                target,
                arguments.hot_only,
                arguments.ignore_spills,
                arguments.known,
                arguments.recompile,
            ):
                show(row)
                found.append(row)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows({key: value for key, value in row.items() if key in COLUMNS} for row in found)
    problems = sum(bool(row["problem"]) for row in found)
    print(f"{len(found)} kernels, {problems} with a problem")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
