"""Writes README.md's table of what is supported from the registry and the classes themselves; `--check` only compares.

python scripts/support_table.py [--check]
"""

import argparse
import sys
from pathlib import Path

from transformers.generation import GenerationMixin

from hf_efficient.registry import ARCHITECTURES


README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- support table: written by scripts/support_table.py -->", "<!-- end of support table -->"


def table() -> str:
    """The table as Markdown: one row for each Auto class of each architecture."""
    yes = {True: "yes", False: "—"}
    rows = [
        "| model type | Auto class | class | `generate()` | gradient checkpointing | `torch.compile(fullgraph)` |",
        "|---|---|---|---|---|---|",
    ]
    for model_type, architecture in ARCHITECTURES.items():
        for auto_class, model in architecture.model_classes().items():
            cells = [f"`{model_type}`", f"`{auto_class}`", f"`{model.__name__}`"]
            flags = [
                issubclass(model, GenerationMixin),
                model.supports_gradient_checkpointing,
                model._can_compile_fullgraph,
            ]
            rows.append("| " + " | ".join([*cells, *(yes[flag] for flag in flags)]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if README.md is not up to date")
    check = parser.parse_args().check
    before, rest = README.read_text().split(START)
    current, after = rest.split(END)
    wanted = f"\n{table()}\n"
    if current == wanted:
        return
    if check:
        sys.exit("README.md: the support table is not up to date; run scripts/support_table.py")
    README.write_text(before + START + wanted + END + after)


if __name__ == "__main__":
    main()
