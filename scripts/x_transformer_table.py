"""Writes the flag table of docs/x_transformer.md from the table that the converter reads; `--check` only compares.

python scripts/x_transformer_table.py [--check]
"""

import argparse
import sys
from pathlib import Path

from hf_efficient.conversion.x_transformers_continuous import CONTINUOUS_FLAGS
from hf_efficient.conversion.x_transformers_images import IMAGE_FLAGS
from hf_efficient.conversion.x_transformers_options import LAYER_FLAGS, WRAPPER_FLAGS, Flag


PATH = Path(__file__).resolve().parent.parent / "docs" / "x_transformer.md"
START, END = "<!-- flag table: written by scripts/x_transformer_table.py -->", "<!-- end of flag table -->"

TABLES = {
    "`TransformerWrapper`": WRAPPER_FLAGS,
    "`Encoder`, `Decoder`": LAYER_FLAGS,
    "`ViTransformerWrapper`": IMAGE_FLAGS,
    "`ContinuousTransformerWrapper`": CONTINUOUS_FLAGS,
}


def row(flag: Flag) -> str:
    place = f"`{flag.where}`" if flag.where else "—"
    return f"| `{flag.name}` | {flag.fields or '—'} | {place} | {flag.cached} | {flag.form} |"


def table() -> str:
    """Tables as Markdown: the flags that convert, and those that are refused with the reason."""
    lines = []
    for title, flags in TABLES.items():
        lines += [
            "",
            f"### {title}",
            "",
            "| flag | field here | computed in | cacheable | attention |",
            "|---|---|---|---|---|",
        ]
        lines += [row(flag) for flag in flags if not flag.refused and flag.fields]
    reasons: dict[str, list[str]] = {}
    for flag in (flag for flags in TABLES.values() for flag in flags):
        if flag.refused and f"`{flag.name}`" not in reasons.setdefault(flag.refused, []):
            reasons[flag.refused].append(f"`{flag.name}`")
    lines += ["", "### Refused unless they have their default", "", "| why | flags |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(names)} |" for reason, names in reasons.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 if the document is not up to date")
    check = parser.parse_args().check
    before, rest = PATH.read_text(encoding="utf-8").split(START)
    current, after = rest.split(END)
    wanted = f"\n{table()}\n"
    if current == wanted:
        return
    if check:
        sys.exit(f"{PATH.name}: the flag table is not up to date; run scripts/x_transformer_table.py")
    PATH.write_text(before + START + wanted + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
