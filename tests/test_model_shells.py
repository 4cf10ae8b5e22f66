"""No model is a copy of another: what two of them share stands in one place (heads.py, encoder_decoder.py, …).

Two classes are compared statement by statement, with docstrings, formatting and the architectures' names aside. What
counts is what stands in runs of several equal statements, as a part of the shorter class.
"""

import ast
import difflib
import itertools
import re

import pytest
from helpers import ROOT

from hf_efficient.registry import ARCHITECTURES


SHORTEST = 8  # statements of a class that is worth comparing
RUN = 3  # equal statements in a row that are no accident
LIMIT = 0.5  # of the shorter class; a head that is written out again is above 0.6

# "Performer" of "PerformerConfig", and so on.
PREFIXES = sorted((row.config.rpartition(":")[2].removesuffix("Config") for row in ARCHITECTURES.values()), key=len)


def statements(node: ast.AST) -> list[str]:
    """The statements of a class, one string for each, whatever their formatting."""
    for part in ast.walk(node):
        if isinstance(part, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part) is not None:
            part.body = part.body[1:] or [ast.Pass()]
    text = ast.unparse(node)
    for prefix in reversed(PREFIXES):
        text = re.sub(rf"{prefix}(?=[A-Z])", "", text)
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_shell(node: ast.AST) -> bool:
    """A class of a model, by its name or that of a base."""
    if not isinstance(node, ast.ClassDef):
        return False
    return any(re.search(r"PreTrainedModel$|Head$|Body$|Stack$|HeadOnBody$", ast.unparse(base)) for base in node.bases)


def shells() -> dict[str, list[str]]:
    found = {}
    for path in sorted((ROOT / "modeling").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if is_shell(node) or (isinstance(node, ast.ClassDef) and path.stem in ("heads", "encoder_decoder")):
                found[f"{path.stem}.{node.name}"] = statements(node)
    return found


def copied(first: list[str], second: list[str]) -> float:
    """The part of the shorter class that stands in the other too."""
    matcher = difflib.SequenceMatcher(a=first[1:], b=second[1:], autojunk=False)  # the lines `class …:` aside
    equal = sum(block.size for block in matcher.get_matching_blocks() if block.size >= RUN)
    return equal / max(min(len(first), len(second)) - 1, 1)


def test_no_model_is_copied_from_another():
    classes = {name: lines for name, lines in shells().items() if len(lines) > SHORTEST}
    assert len(classes) > 20
    pairs = {
        f"{first} ~ {second}": round(part, 2)
        for first, second in itertools.combinations(classes, 2)
        if (part := copied(classes[first], classes[second])) > LIMIT
    }
    assert not pairs, f"these classes repeat each other; let them share what is the same: {pairs}"


@pytest.mark.parametrize(
    "head", ["TokenClassificationHead", "SequenceClassificationHead", "CausalLMHead", "Seq2SeqLMHead", "MaskedLMHead"]
)
def test_a_head_written_out_again_is_seen(head):
    """A copy under another name, with another docstring, an `__init__` of its own, and a line more."""
    path = ROOT / "modeling" / ("encoder_decoder.py" if head == "Seq2SeqLMHead" else "heads.py")
    classes = ast.parse(path.read_text(encoding="utf-8")).body
    copy = next(node for node in classes if isinstance(node, ast.ClassDef) and node.name == head)
    copy.name, copy.bases = "PerformerForSomething", [ast.Name("PerformerPreTrainedModel")]
    copy.body[0] = ast.parse("'Says something else.'").body[0]
    copy.body.insert(
        1,
        ast.parse(
            "def __init__(self, config):\n    super().__init__(config)\n    self.model = PerformerModel(config)\n"
            "    self.post_init()"
        ).body[0],
    )
    forward = next(node for node in copy.body if isinstance(node, ast.FunctionDef) and node.name == "forward")
    forward.body.insert(-1, ast.parse("print(labels)").body[0])
    assert copied(statements(copy), shells()[f"{path.stem}.{head}"]) > 0.6 > LIMIT
