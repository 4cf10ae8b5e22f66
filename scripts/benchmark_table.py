"""Makes the tables of the docs and the README from the measured rows, so that no figure is typed.

    python scripts/benchmark_table.py docs/benchmarks/soft_topk.csv                 prints the tables
    python scripts/benchmark_table.py ROWS.csv MORE.csv --document docs/benchmarks.md   writes them between the markers

The markers are the lines `<!-- benchmarks: begin -->` and `<!-- benchmarks: end -->`.
"""

import argparse
import csv
import sys
from pathlib import Path

from benchmark_gpu_targets import GPU_TARGETS
from benchmark_measure import Row
from benchmark_targets import report


BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
TITLES = {
    "linear_attention_causal": "Causal attention",
    "linear_attention_causal_growth": "Causal attention, lengths in turns",
    "linear_attention_bidirectional": "Bidirectional attention",
    "generate": "`generate`, greedy",
    "generate_wide": "`generate`, greedy, as wide as GPT-2",
    "decode": "Decoding step by step",
    "flash_attention_alibi": "Causal softmax attention with ALiBi",
    "flash_attention_t5": "Causal softmax attention with T5's bias",
    "flash_attention_softcap": "Causal softmax attention with a soft clamp",
    "flash_attention_window": "Softmax attention in a window of ±127",
    "soft_topk": "Soft top-k",
    "colt5_layer": "A layer of CoLT5 and of what it stands in for",
    "colt5_base_encoder": "The encoder of CoLT5's Base",
    "colt5_paper_layer": "The layer of the paper's formula",
    "perceiver_flash_features": "Perceiver over features",
    "perceiver_flash_language": "language-perceiver, logits of all inputs",
    "perceiver_flash_chunks": "Cross-attention in chunks, whole model",
    "x_transformer_plain": "Training step of a decoder",
    "x_transformer_alibi": "Training step with ALiBi",
    "x_transformer_t5": "Training step with T5's bias",
    "x_transformer_softclamp": "Training step with clamped scores",
    "x_transformer_memory": "Training step of XTransformer by option",
    "x_transformer_generate": "`generate` of a decoder, greedy and cached",
    "linear_attention_plain": "Causal linear attention of given features",
    "flash_attention_causal": "Causal softmax attention",
    "linear_attention_first_call": "First call of linear_attention, nothing compiled before",
    "soft_topk_first_call": "First call of soft_topk",
    "flash_attention_first_call": "First call of flash_attention",
    "copy": "A copy of as many bytes",
    "product": "A square product of this width in bfloat16",
    "train": "Training step of a causal LM of GPT-2's smallest size",
    "encoder": "Base encoders, forward and backward",
    "perceiver": "Perceivers, forward and backward",
}
GPU_TITLES = {"flash_attention_window": "Causal softmax attention in a window of 255"}
CALLS = "_calls"


def markdown_table(header: list[str], lines: list[tuple]) -> str:
    """A table whose columns line up, the first to the left and the others to the right."""
    cells = [header, *[[str(cell) for cell in line] for line in lines]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]

    def joined(line):
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join([joined(cells[0]), joined(rule), *map(joined, cells[1:])])


def tables(rows: list[Row]) -> str:
    """Every table, with the line that says where its figures come from."""
    parts, on_gpu = [], any(row.name == "copy" for row in rows)
    for name, allocator in dict.fromkeys((row.name, row.allocator) for row in rows):
        own = [row for row in rows if (row.name, row.allocator) == (name, allocator)]
        speed = own[0].tokens_per_second is not None
        unit = "tokens/s" if speed else "ms (peak MiB)"
        heap = "" if allocator == "default" else ", heap kept"
        called = ", called one by one" if name.endswith(CALLS) else ""
        title, place = (
            TITLES.get(name.removesuffix(CALLS), name),
            own[0].device if on_gpu else f"{own[0].threads} threads",
        )
        parts.append(f"**{title}**{called}, {unit}, {', '.join(filter(None, (own[0].sizes, place)))}{heap}")
        columns = list(dict.fromkeys((row.mode, row.length) for row in own))
        found = {(row.provider, row.mode, row.length): row for row in own}
        # A first call is of no particular length.
        header = ["", *[f"{mode} {_short(length)}" if length else mode for mode, length in columns]]
        lines = [
            (provider, *[_cell(found.get((provider, *column))) for column in columns])
            for provider in dict.fromkeys(row.provider for row in own)
        ]
        parts.append(markdown_table(header, lines))
    parts.append("**Targets**")
    parts.append(
        markdown_table(
            ["target", "bound", "figure", "verdict", "allocator"], report(rows, GPU_TARGETS if on_gpu else None)
        )
    )

    def distinct(field):
        return ", ".join(dict.fromkeys(getattr(row, field) for row in rows))

    days = ", ".join(dict.fromkeys(row.date[:10] for row in rows))
    versions = f"torch {distinct('torch')}, transformers {distinct('transformers')}, commit {distinct('commit')}"
    parts.append(
        f"Measured {days} on {distinct('device')}, {versions}, by `scripts/benchmark.py`; medians, spreads and errors "
        "are in the CSV files."
    )
    return "\n\n".join(parts)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.tokens_per_second is not None:
        return f"{row.tokens_per_second:.0f}"
    memory = "" if row.peak_mib is None else f" ({row.peak_mib:.0f})"
    digits = 0 if row.median >= 10 else 1 if row.median >= 1 or not row.roofline else 2
    return f"{row.median:.{digits}f}{memory}"


def _short(length: int) -> str:
    if length >= 2**20 and length % 2**20 == 0:
        return f"{length // 2**20}M"
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="CSV files that scripts/benchmark.py wrote")
    parser.add_argument("--document", type=Path, help="Markdown file with the two marker lines")
    arguments = parser.parse_args()
    rows = []
    for path in arguments.rows:
        with path.open(newline="") as file:
            rows += [Row.from_text(texts) for texts in csv.DictReader(file)]
    text = tables(rows)
    if arguments.document is None:
        print(text)
        return
    document = arguments.document.read_text()
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{arguments.document} needs the lines {BEGIN} and {END}, in that order")
    arguments.document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
