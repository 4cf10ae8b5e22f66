"""Measures launch configurations on this machine's GPU and writes the fastest into kernels/<op>/launch_table.py.

    python scripts/tune_kernels.py soft_topk                   every row of this GPU's architecture
    python scripts/tune_kernels.py flash_attention --dry-run   print what would change

Nobody has to run this: the tables that ship work everywhere, and no kernel tunes itself at its first call. For each
row the neighbours of its configuration are tried (every block size halved and doubled, 2 to 16 warps, 1 to 5 stages),
the best is kept and its neighbours are tried in turn, until none is faster by more than the noise. A configuration
that does not compile, does not fit or changes the result is dropped. Where the GPU has no table of its own, the rows
of its nearest architecture are the ones that change.
"""

import argparse
import ast
import importlib
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from kernel_workloads import WORKLOADS

from hf_efficient.kernels.backend import gpu_architecture
from hf_efficient.kernels.launch_config import LaunchConfig


ROOT = Path(__file__).resolve().parent.parent
WARPS, STAGES = (2, 4, 8, 16), (1, 2, 3, 4, 5)
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 8192
WORTHWHILE = 0.98  # of the time so far: less is noise


def neighbours(config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Configurations that differ from this one in a single choice."""
    for name, size in config.blocks.items():
        for other in (size // 2, size * 2):
            if SMALLEST_BLOCK <= other <= LARGEST_BLOCK:
                yield config._replace(blocks=config.blocks | {name: other})
    for field, values in (("num_warps", WARPS), ("num_stages", STAGES)):
        position = values.index(getattr(config, field))
        for value in values[max(position - 1, 0) : position + 2]:
            if value != getattr(config, field):
                yield config._replace(**{field: value})


def descend(start: LaunchConfig, cost: Callable[[LaunchConfig], float]) -> tuple[LaunchConfig, float, float]:
    """The best configuration that single steps reach from `start`, its cost, and the cost of `start`.

    `cost` gives infinity for what cannot run. Every configuration is measured once.
    """
    known = {_identity(start): cost(start)}
    best, lowest = start, known[_identity(start)]
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best):
            if _identity(candidate) in known:
                continue
            known[_identity(candidate)] = cost(candidate)
            if known[_identity(candidate)] < WORTHWHILE * lowest:
                best, lowest, improved = candidate, known[_identity(candidate)], True
                break
    return best, lowest, known[_identity(start)]


def _identity(config):
    return (*sorted(config.blocks.items()), config.num_warps, config.num_stages)


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call on the current GPU, after three calls to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def cost_of(rows: dict, key: tuple[int, int], workload: Callable[[], list], measure=milliseconds):
    """The cost function of one row: puts a configuration in the table, runs the op, compares what comes out."""
    expected = [tensor.detach().clone() for tensor in workload()]

    def cost(config: LaunchConfig) -> float:
        rows[key] = config
        try:
            results = workload()
            same = all(
                torch.allclose(result.float(), target.float(), rtol=2e-2, atol=2e-2 * _largest(target))
                for result, target in zip(results, expected, strict=True)
            )
            return measure(workload) if same else math.inf
        except Exception as error:  # whatever Triton raises for a configuration that does not fit
            print(f"    {config}: {type(error).__name__}", flush=True)
            return math.inf

    return cost


def _largest(tensor):
    return tensor.float().abs().max().item() if tensor.numel() else 0.0


def tune(operation: str, architecture: str, measure=milliseconds, device: str = "cuda") -> dict[str, dict]:
    """Replace the rows of this architecture by faster ones, in memory. Gives the tables that changed, by name."""
    module = importlib.import_module(f"hf_efficient.kernels.{operation}.launch_table")
    changed = {}
    for name, table in sorted(vars(module).items()):
        if not name.isupper():
            continue
        for key in sorted(table[architecture]):
            start = table[architecture][key]
            workload = WORKLOADS[operation](name, *key, device)
            best, lowest, before = descend(start, cost_of(table[architecture], key, workload, measure))
            table[architecture][key] = best
            if best != start:
                changed[name] = table
            print(f"{operation} {name} {key}: {before:.3f} -> {lowest:.3f} ms  {best}", flush=True)
    return changed


def rewrite(source: str, tables: dict[str, dict]) -> str:
    """The source of a launch table with new literals for these tables, everything else as it was."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        name = getattr(targets[0], "id", None)
        if name in tables:
            head = "".join(lines[node.lineno - 1 : node.end_lineno]).partition("= ")[0]
            lines[node.lineno - 1 : node.end_lineno] = [f"{head}= {literal(tables[name])}\n"]
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "-"],
        input="".join(lines),
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return formatted.stdout


def literal(table: dict) -> str:
    """A table as Python source, one architecture after the other."""
    architectures = []
    for architecture, rows in table.items():
        configs = [
            f"{key}: LaunchConfig({config.blocks}, {config.num_warps}, {config.num_stages}),"
            for key, config in sorted(rows.items())
        ]
        architectures.append(f'"{architecture}": {{{" ".join(configs)}}},')
    return "{" + " ".join(architectures) + "}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="+", choices=sorted(WORKLOADS))
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_kernels.py measures on a GPU, and none is available")
    for operation in arguments.operations:
        tables = tune(operation, gpu_architecture())
        if tables and not arguments.dry_run:
            path = ROOT / f"kernels/{operation}/launch_table.py"
            text = rewrite(path.read_text(), tables)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(text)
            unfinished.replace(path)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
