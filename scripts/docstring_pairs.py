"""Functions of the Python standard library and the first paragraphs of their docstrings: (source, target) pairs.

The source is the function without its docstring, and behind it the rest of the file it stands in, as far as
`MAX_CHARACTERS` reaches, so that long inputs have something to offer: imports, the class around it, its callers. Each
file is on one side of the split only, and a held-out pair whose target also occurs in training is left out (the
standard library repeats itself: `posixpath` and `ntpath` explain the same functions in the same words).
"""

import ast
import textwrap
import warnings

from datasets import Dataset
from text_sources import hold_out_by_name


MAX_CHARACTERS = 1 << 15
FILE_MARK = "\n\n# The rest of {name}:\n\n"


def first_paragraph(docstring: str) -> str:
    """Its lines joined by single spaces."""
    return " ".join(docstring.strip().split("\n\n")[0].split())


def functions_of(name: str, text: str) -> list[dict[str, str]]:
    """Rows (name, source, target) of the functions in a file that have a docstring and do something."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources have invalid escapes; they are not ours to mend
            tree = ast.parse(text)
    except SyntaxError:
        return []
    lines, rows = text.splitlines(keepends=True), []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        target = first_paragraph(ast.get_docstring(node) or "")
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        first, last = node.body[0].lineno - 1, node.body[0].end_lineno
        # A docstring that shares its line with code cannot be taken out by lines.
        if not target or node.body[1].lineno <= last or not lines[first].lstrip().startswith(('"', "'", "r", "R")):
            continue
        code = textwrap.dedent("".join([*lines[start:first], *lines[last : node.end_lineno]]))
        source = code + FILE_MARK.format(name=name)
        for line in (*lines[:start], *lines[node.end_lineno :]):
            if len(source) > MAX_CHARACTERS:
                break
            source += line
        rows.append({"name": name, "source": source[:MAX_CHARACTERS], "target": target})
    return rows


def docstring_splits(documents: list[tuple[str, str]], percentage: float) -> tuple[Dataset, Dataset]:
    """Training and held-out pairs of (path, text) files, held out by file (see the top of this file)."""
    held_out = hold_out_by_name([name for name, _ in documents], percentage)
    train, validation = [], []
    for name, text in documents:
        (validation if name in held_out else train).extend(functions_of(name, text))
    known = {row["target"] for row in train}
    return Dataset.from_list(train), Dataset.from_list([row for row in validation if row["target"] not in known])
