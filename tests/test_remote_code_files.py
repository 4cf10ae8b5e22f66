"""The files that a saved model takes along: all it needs and nothing else, each readable beside its original."""

import re

import pytest
from helpers import ROOT

from hf_efficient import __version__
from hf_efficient.registry import ARCHITECTURES
from hf_efficient.remote_code import travelling


classes = pytest.mark.parametrize(
    ("model_type", "reference"),
    [
        (model_type, reference)
        for model_type, row in ARCHITECTURES.items()
        for reference in dict.fromkeys([*row.models.values(), *row.others])
    ],
    ids=lambda value: value.rpartition(":")[2],
)
IMPORT = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)
TAIL = "\n\ndef _files_to_copy_along():"


@classes
def test_exactly_what_the_class_needs_travels(model_type, reference):
    architecture = ARCHITECTURES[model_type]
    module, _, class_name = reference.partition(":")
    models, files = travelling(architecture, [class_name])
    needed, to_do = set(), [module.replace(".", "_"), architecture.config.partition(":")[0].replace(".", "_")]
    while to_do:
        name = to_do.pop()
        if name not in needed:
            needed.add(name)
            to_do += IMPORT.findall(files[f"{name}.py"].partition(TAIL)[0])
    assert {f"{name}.py" for name in needed} == set(files)
    assert (reference in models.values()) or reference in architecture.others
    assert {other.partition(":")[0].replace(".", "_") for other in models.values()} <= needed


def test_a_head_for_text_takes_no_code_for_images_along():
    for model_type, class_name in (("x_transformer", "XTransformerForCausalLM"), ("colt5", "CoLT5ForCausalLM")):
        models, files = travelling(ARCHITECTURES[model_type], [class_name])
        assert "AutoModelForCausalLM" in models and not [name for name in files if "image" in name]
    models, files = travelling(ARCHITECTURES["x_transformer"], ["XTransformerForImageTextToText"])
    assert "modeling_x_transformer_images.py" in files and "AutoModelForImageClassification" in models


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_file_is_its_original_but_for_imports_and_says_which_it_is(model_type):
    for name, text in travelling(ARCHITECTURES[model_type])[1].items():
        first, _, rest = text.partition("\n")
        said = re.fullmatch(r"# hf_efficient (\S+) \(Apache-2\.0\), (\S+\.py); written by save_pretrained, .*", first)
        assert said and said[1] == __version__, f"{name}: {first}"
        original = (ROOT / said[2]).read_text(encoding="utf-8")
        if name.startswith("configuration_") and TAIL in rest:
            rest = rest.partition(TAIL)[0]
        here, there = rest.split("\n"), original.split("\n")
        assert len(here) == len(there), name
        for line, origin in zip(here, there, strict=True):
            both_imports = re.match(r"\s*from \.", line) and re.match(r"\s*from \.", origin)
            assert line == origin or both_imports, f"{name}: {line!r} is not {origin!r}"


@classes
def test_what_travels_stays_small(model_type, reference):
    """`pytest -s` prints it; the limit is a little above what the largest takes."""
    _, files = travelling(ARCHITECTURES[model_type], [reference.rpartition(":")[2]])
    size = sum(map(len, files.values()))
    print(f"{reference.rpartition(':')[2]}: {len(files)} files, {size:,} characters")
    assert len(files) <= 68 and size <= 450_000
