"""Reads and writes docs/matrix.md: `make matrix` runs the tests of the matrix and writes what they say."""

import re
from pathlib import Path

from hf_efficient.registry import ARCHITECTURES


PATH = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"
CONFORMANCE = PATH.with_name("conformance.md")
TRAINING, PIPELINES = "test_trainer_contract.py", "test_pipelines.py"
REMOTE, HUB, GENERATION = "test_remote_code.py", "test_hub.py", "test_generation_contract.py"

# Column: the file of its tests.
COLUMNS = {
    "Trainer": TRAINING,
    "resume": TRAINING,
    "checkpointing": TRAINING,
    "bf16": TRAINING,
    "compile": TRAINING,
    "pipeline": PIPELINES,
    "remote code": REMOTE,
    "Hub round trip": HUB,
}
GENERATION_COLUMNS = {
    "greedy, sampling": GENERATION,
    "beams": GENERATION,
    "padding": GENERATION,
    "prompt lookup": GENERATION,
    "assistant": GENERATION,
    "continued": GENERATION,
    "chunked prefill": GENERATION,
    "static": GENERATION,
    "offloaded": GENERATION,
    "quantised": GENERATION,
    "inputs_embeds": GENERATION,
    "several tokens": GENERATION,
    "group, contrastive": GENERATION,
}
HEADING = """# What every head is held to

Written by `make matrix` from what the tests say; a run of all tests fails where this page says otherwise, so a cell
that is green stays green.

- **yes**: all tests of the cell pass. **yes, some refused**: they pass, and for some options a `ValueError` (or
  transformers itself) says clearly that it does not go. **refused**: it never goes, and says so.
- **no**: a test of the cell fails. **—**: there is no test, because there is nothing to test or nobody has written it;
  the notes say which.

A column's title leads to its tests. *transformers' tests* are counted by test class; [conformance.md](conformance.md)
says why each one skips itself or fails. *remote code* and *Hub round trip* are tests of all heads at once: pushed,
pulled by commit into an empty cache without hf_efficient, equal to the bit, then once more offline.
"""
NOTES = """
## Why not everything is a yes

- A model without a loss (`…Model`, `…Encoder`) has nothing to train by itself. One that no Auto class gives is part of
  others, in whose code it travels.
- transformers 5 has no pipeline for question answering, summarisation and translation any more, and none for time
  series; `CoLT5Model`, an encoder–decoder, gets no decoder inputs from the pipeline of features, as T5's does not.
- *prompt lookup, assistant*: the latents of a Perceiver AR belong to one window, so tokens cannot be taken back.
- *chunked prefill*: of an encoder–decoder's target transformers cuts the encoder's mask as well, which we refuse, but
  for a known defect: where patches stand in front of the encoder's tokens they make up for what was cut. Memory tokens
  that meet a bias, a window or a shift have to be reached by the first chunk.
- *offloaded*: keys and values that grow are moved by CUDA streams, and transformers says that there is no CUDA; caches
  of constant size work anywhere.
- *quantised*: transformers quantises the cache of decoders whose layers are all plain full attention.
- *group, contrastive*: transformers 5 keeps group beam search, constrained beam search, contrastive search and DoLa in
  repositories of their own and asks for `trust_remote_code=True`.
"""


def head_of(parameters: dict) -> str:
    """The class name that a test's parameters are about."""
    if "head" in parameters:
        return parameters["head"]
    if "asked" in parameters:
        return parameters["asked"][0]
    return ARCHITECTURES[parameters["model_type"]].models[parameters["auto_class"]].rpartition(":")[2]


class MatrixPage:
    """docs/matrix.md, or a page like it."""

    path = PATH

    def read(self) -> dict[tuple[str, str], str]:
        """The cells that tests decide about, but for those without any."""
        cells, columns = {}, []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            values = [value.strip() for value in line.strip("|").split("|")] if line.startswith("|") else []
            if values and values[0] == "head":
                columns = [re.sub(r"\[(.*)\]\(.*\)", r"\1", value) for value in values]
            elif values and set(values[0]) != {"-"}:
                for column, value in zip(columns[1:], values[1:], strict=True):
                    if value != "—" and column in COLUMNS | GENERATION_COLUMNS:
                        cells[values[0].strip("`"), column] = value
        return cells

    def write(self, cells: dict[tuple[str, str], str]) -> None:
        self.path.write_text(render(cells), encoding="utf-8")


def common_tests() -> dict[str, str]:
    """By model class: how many of transformers' common tests pass, as docs/conformance.md counts them."""
    cells = {}
    row = r"^\| (\w+) \| (.*) \| \d+ \| (\d+) \| (\d+) \| (\d+) \|$"
    for case, models, passing, skipped, failing in re.findall(row, CONFORMANCE.read_text(encoding="utf-8"), re.M):
        text = f"{case}: {passing} pass, {skipped} skip" + (f", **{failing} fail**" if failing != "0" else "")
        for model in re.findall(r"`(\w+)`", models):
            cells[model] = "<br>".join(filter(None, [cells.get(model), text]))
    return cells


def render(cells: dict[tuple[str, str], str]) -> str:
    from tiny_heads import HEADS  # it imports every model, which conftest.py need not wait for

    own = {"Auto class": None, "transformers' tests": CONFORMANCE.name}
    generating = {name: head for name, head in HEADS.items() if head.generates}
    static = {(name, "Auto class"): f"`{head.auto_class}`" if head.auto_class else "—" for name, head in HEADS.items()}
    static |= {(name, "transformers' tests"): text for name, text in common_tests().items()}
    return "\n".join(
        [
            HEADING,
            *_table(HEADS, own | COLUMNS, cells | static),
            "",
            "## Generation",
            "",
            "Each mode equals the same call with `use_cache=False`, for every variant of tests/generation_heads.py.",
            "",
            *_table(generating, GENERATION_COLUMNS, cells),
            NOTES,
        ]
    )


def _table(heads, columns: dict[str, str | None], cells) -> list[str]:
    titles = [_title(column, file) for column, file in columns.items()]
    rows = [["head", *titles], ["---"] * (len(columns) + 1)]
    rows += [[f"`{head}`", *(cells.get((head, column), "—") for column in columns)] for head in heads]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _title(column: str, file: str | None) -> str:
    if file is None:
        return column
    return f"[{column}]({file if file.endswith('.md') else '../tests/' + file})"
