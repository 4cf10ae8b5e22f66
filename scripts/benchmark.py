"""Speed, memory and error of our operations and models beside SDPA, GPT-2 and the peer libraries.

    make bench                                       everything, then the targets
    python scripts/benchmark.py --only causal        a part of it: one of those in PARTS
    python scripts/benchmark.py --quick              tiny sizes, to see that it runs; writes nothing
    python scripts/benchmark.py --report             the targets from the rows on disk, without measuring
    python scripts/benchmark.py --device cuda        the operations and models on a GPU (`make gpu` calls it)

All providers run in one process, on the same tensors, in turns. Rows go to docs/benchmarks/ as they come:
performer.csv, flash_attention.csv, soft_topk.csv, colt5.csv, perceiver_flash.csv, x_transformer.csv, and gpu.csv for
those of a GPU.

glibc returns every block above 32 MiB to the system when it is freed, so large intermediates are page-faulted anew at
each use. That favours whoever allocates little, and users can switch it off; the attention rows are therefore measured
a second time with the heap kept (`allocator` = "kept-heap", MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised).

No figure is printed for an operation whose tests are red: they run first, unless these very sources passed before.
"""

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import benchmark_gate
import torch
from benchmark_measure import ROOT, Row, provenance
from benchmark_table import markdown_table
from benchmark_targets import report


# What can be measured, and the tests that have to be green for it.
PARTS = {
    "causal": ["linear_attention"],
    "growth": ["linear_attention"],
    "bidirectional": ["linear_attention"],
    "generate": ["linear_attention", "performer"],
    "generate-wide": ["linear_attention", "performer"],
    "decode": ["linear_attention", "performer"],
    "flash": ["flash_attention"],
    "topk": ["soft_topk"],
    "colt5": ["colt5"],
    "perceiver": ["perceiver_flash"],
    "perceiver-chunks": ["perceiver_flash"],
    "perceiver-language": ["perceiver_flash"],
    "x-transformer": ["flash_attention", "x_transformer"],
}
FOLDER = ROOT / "docs/benchmarks"
# Rows whose names begin so have a file of that name.
OPERATION_FILES = ("flash_attention", "soft_topk", "colt5", "perceiver_flash", "x_transformer")
OTHER_FILE = "performer"
GPU_LENGTHS = (2048, 4096, 8192, 16384)
FLASH_LENGTHS = (2048, 4096, 8192)
TOPK_LENGTHS = (32768, 262144, 1048576)
LAYER_LENGTHS = (4096, 16384, 65536)
PERCEIVER_LENGTHS = (4096, 16384, 65536)
LANGUAGE_LENGTHS = (2048, 8192, 32768)
CHUNKED_LENGTH, MILLION = 131072, 1048576
GROWTH_LENGTHS = (4096, 16384)
KEPT_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
SETTINGS = {"default": {}, "kept-heap": KEPT_HEAP}
# Quadratic work at 16k takes minutes, allocates little, and is the same under both settings.
KEPT_HEAP_LENGTHS = (1024, 4096)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--lengths", nargs="+", type=int, help="of attention (default: 1024 4096 16384) and layers")
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 4096, 16384], help="of the decode rows")
    parser.add_argument("--repeats", type=int, default=5, help="calls per row, at least")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--output", type=Path, help="one CSV file for all rows; default: those in docs/benchmarks")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no peers: only shows that it runs")
    parser.add_argument("--report", action="store_true", help="no measurement, only the targets of the rows on disk")
    # What a run under another allocator is told; glibc reads its variables when a process starts.
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.layer_lengths = arguments.lengths or LAYER_LENGTHS
    arguments.lengths = arguments.lengths or list((1024, 4096, 16384) if arguments.device == "cpu" else GPU_LENGTHS)
    for name in ("repeats", "threads"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    for name in ("lengths", "contexts"):
        if min(getattr(arguments, name)) < 4:
            parser.error(f"--{name} must be at least 4, got {min(getattr(arguments, name))}")
    return arguments


def complete(rows: Iterable[Row], common: dict) -> Iterator[Row]:
    """The rows with what they have in common, each printed as it comes."""
    for row in rows:
        for name, value in common.items():
            setattr(row, name, value)
        print(
            f"{row.name:30} {row.provider:22} {row.mode:16} {row.length:6} {row.median:11.3f} ms"
            f"  {'' if row.peak_mib is None else f'{row.peak_mib:8.1f} MiB'}"
            f"  {'' if row.roofline is None else f'{100 * row.roofline:5.1f} % of the roofline'}".rstrip(),
            flush=True,
        )
        yield row


def measure_gpu(arguments) -> None:
    """All rows of the GPU, each written as soon as it is there."""
    if not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    from benchmark_gpu import measure

    benchmark_gate.require_green(["linear_attention", "soft_topk", "flash_attention"], on_gpu=True)
    device = torch.device("cuda")
    common = provenance("default", arguments.threads) | {"device": torch.cuda.get_device_name(device)}
    output = arguments.output or FOLDER / "gpu.csv"
    for row in complete(measure(device, arguments.lengths, arguments.repeats), common):
        write_rows(output, merged(read_rows(output) if output.exists() else [], [row]))
    print(f"\nrows in {output}")


def measure(arguments) -> None:
    """All rows of this process, which runs under one allocator setting; written work by work, length by length."""
    from benchmark_colt5 import measure as measure_layers
    from benchmark_colt5 import measure_base
    from benchmark_colt5 import measure_operations as measure_layer_operations
    from benchmark_flash_attention import measure as measure_softmax
    from benchmark_models import WIDE, measure_decoding, measure_generation, measure_wide_generation
    from benchmark_operations import measure as measure_operation
    from benchmark_operations import measure_growth
    from benchmark_soft_topk import measure as measure_topk

    torch.set_num_threads(arguments.threads)
    common = provenance(arguments.setting, arguments.threads)

    def collect(new_rows):
        write_all(arguments.output, list(complete(new_rows, common)))

    quick = arguments.quick
    for part in ("causal", "bidirectional"):
        for length in arguments.lengths if part in arguments.only else ():
            if arguments.setting == "default" or length in KEPT_HEAP_LENGTHS:
                names = ["ours", "sdpa"] if quick else None
                collect(measure_operation(length, part == "causal", arguments.repeats, names))
    if arguments.setting == "default":
        if "growth" in arguments.only:
            collect(measure_growth(arguments.lengths if quick else GROWTH_LENGTHS, 3 * arguments.repeats))
        if "flash" in arguments.only:
            for length in arguments.lengths if quick else FLASH_LENGTHS:
                collect(measure_softmax(length, arguments.repeats))
        if "topk" in arguments.only:
            for length in arguments.lengths if quick else TOPK_LENGTHS:
                collect(measure_topk(length, arguments.repeats, peers=not quick))
        if "colt5" in arguments.only:
            for length in arguments.layer_lengths:
                collect(measure_layers(length, arguments.repeats, peers=not quick))
                collect(measure_layer_operations(length))
            if max(arguments.layer_lengths) == max(LAYER_LENGTHS):
                collect(measure_base(max(LAYER_LENGTHS)))
        measure_perceivers(arguments, collect)
        if "x-transformer" in arguments.only:
            measure_x_transformers(arguments, collect)
        if "generate" in arguments.only:
            for new_tokens in (8,) if quick else (192, 448):
                collect(measure_generation(8 if quick else 64, new_tokens, arguments.repeats, peers=not quick))
        if "generate-wide" in arguments.only:
            sizes = (WIDE._replace(width=64, layers=1, heads=2),) if quick else ()
            collect(measure_wide_generation(8 if quick else 64, 8 if quick else 64, arguments.repeats, *sizes))
        if "decode" in arguments.only:
            collect(measure_decoding(arguments.contexts, arguments.repeats))


def measure_perceivers(arguments, collect) -> None:
    """The rows of PerceiverFlash, which run under the default setting only."""
    from benchmark_perceiver import measure_chunks, measure_features, measure_language

    quick, repeats = arguments.quick, arguments.repeats
    if "perceiver" in arguments.only:
        for length in arguments.lengths if quick else PERCEIVER_LENGTHS:
            collect(measure_features(length, repeats, quick))
    if "perceiver-chunks" in arguments.only:
        collect(measure_chunks(max(arguments.lengths) if quick else CHUNKED_LENGTH, repeats))
        if not quick:
            collect(measure_features(4 * max(PERCEIVER_LENGTHS), 1, only="ours"))
            collect(measure_chunks(MILLION, 1, whole=False))
    if "perceiver-language" in arguments.only:
        for length in arguments.lengths if quick else LANGUAGE_LENGTHS:
            collect(measure_language(length, repeats, quick))


def measure_x_transformers(arguments, collect) -> None:
    """The rows of XTransformer, which run under the default setting only."""
    import benchmark_x_transformer as part

    quick, repeats = arguments.quick, arguments.repeats
    collect(part.measure_training(["plain"], 64 if quick else 4096, repeats, peers=not quick))
    biased = [option for option in part.OPTIONS if option != "plain"]
    collect(part.measure_training(biased, 64 if quick else 4096, 1, peers=not quick))
    collect(part.measure_memory(128 if quick else 8192))
    collect(part.measure_generation(*(8, 8) if quick else (64, 256), repeats, peers=not quick))


def run_setting(setting: str, output: Path | None) -> None:
    """A fresh process per allocator setting, with the arguments of this one."""
    command = [sys.executable, *sys.argv, "--setting", setting]
    command += [] if output is None else ["--output", str(output)]
    print(f"\nallocator: {setting}", flush=True)
    subprocess.run(command, env=os.environ | SETTINGS[setting], check=True)


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [Row.from_text(texts) for texts in csv.DictReader(file)]


def write_rows(path: Path, rows: list[Row]) -> None:
    """The whole file at once, so that a crash leaves the old rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            rounded = {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in asdict(row).items()}
            writer.writerow({n: "" if v is None else v for n, v in rounded.items()})
    unfinished.replace(path)


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """New rows take the place of old ones that measured the same; others stay, with their own date and commit."""
    return list(({row.key: row for row in old} | {row.key: row for row in new}).values())


def output_of(row: Row) -> Path:
    """The file that a row belongs to."""
    return FOLDER / f"{next((name for name in OPERATION_FILES if row.name.startswith(name)), OTHER_FILE)}.csv"


def write_all(output: Path | None, rows: list[Row]) -> None:
    """Put new rows among the old ones, of `output` or else of the files they belong to."""
    for path in dict.fromkeys(output or output_of(row) for row in rows):
        new = [row for row in rows if (output or output_of(row)) == path]
        write_rows(path, merged(read_rows(path) if path.exists() else [], new))


def main():
    arguments = parse_arguments()
    if arguments.device == "cuda":
        measure_gpu(arguments)
        return
    if arguments.setting:
        measure(arguments)
        return
    output = arguments.output
    if not arguments.report:
        ops = list(dict.fromkeys(op for part in arguments.only for op in PARTS[part]))
        benchmark_gate.require_green(ops, quick=arguments.quick)
        if arguments.quick:
            sys.argv += ["--lengths", "64", "128", "--contexts", "16", "32", "--repeats", "1"]
            if output is None:
                output = ROOT / ".cache/benchmark/quick.csv"
                output.parent.mkdir(parents=True, exist_ok=True)
                output.unlink(missing_ok=True)
        # Only the attention rows have something to gain from a kept heap.
        attention = {"causal", "bidirectional"} & set(arguments.only)
        for setting in ["default"] + (["kept-heap"] if attention and not arguments.quick else []):
            run_setting(setting, output)
    files = [output or FOLDER / f"{name}.csv" for name in (OTHER_FILE, *OPERATION_FILES)]
    rows = [row for file in dict.fromkeys(files) if file.exists() for row in read_rows(file)]
    print("\n" + markdown_table(["target", "bound", "figure", "verdict", "allocator"], report(rows)))


if __name__ == "__main__":
    main()
