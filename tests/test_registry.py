"""The table of architectures, the lazy public names, and the registration with transformers' Auto classes."""

import ast
import importlib
import json
import pickle
import sys

import pytest
import transformers
from helpers import ROOT, run_python
from process_with_torch import run_python_with_torch
from toy_package import write_toy_package
from transformers import PreTrainedModel

import hf_efficient
from hf_efficient.registry import ARCHITECTURES


architectures = pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))


@architectures
def test_each_row_names_classes_that_fit_together(model_type):
    architecture = ARCHITECTURES[model_type]
    config_class = architecture.config_class()
    assert config_class.model_type == model_type
    assert set(architecture.models) >= {"AutoModel"}
    for auto_class, model_class in architecture.model_classes().items():
        assert model_class.config_class is config_class, f"{auto_class} gives {model_class}"


@architectures
def test_the_auto_classes_give_our_models(model_type):
    architecture = ARCHITECTURES[model_type]
    config = transformers.AutoConfig.for_model(model_type)
    assert type(config) is architecture.config_class()
    for auto_class, model_class in architecture.model_classes().items():
        mapping = getattr(transformers, auto_class)._model_mapping
        assert mapping[type(config)] is model_class


@architectures
def test_every_model_class_is_in_the_table_and_public(model_type):
    architecture = ARCHITECTURES[model_type]
    for reference in (architecture.config, *architecture.models.values(), *architecture.others):
        module, _, name = reference.partition(":")
        assert name in hf_efficient.__all__
        assert name in dir(hf_efficient)
        value = getattr(hf_efficient, name)
        assert value.__module__ == f"hf_efficient.{module}"
    references = [reference.split(":") for reference in (*architecture.models.values(), *architecture.others)]
    defined = {
        name
        for module in {importlib.import_module(f"hf_efficient.{module}") for module, _ in references}
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    }
    listed = {name for _, name in references}
    # The body of an encoder–decoder has no Auto class of its own: AutoModel gives the single stack.
    inner = ("PreTrainedModel", "EncoderDecoderModel", "ImageTextModel", "ImageTextEncoder", "ContinuousModel")
    inner += ("CoLT5ImageEncoder",)
    assert {name for name in defined if not name.endswith(inner)} == listed


def test_type_checkers_see_exactly_the_public_names():
    tree = ast.parse((ROOT / "hf_efficient/__init__.py").read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    seen = {
        f"{statement.module}:{alias.asname}"
        for statement in guarded[0].body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == {row for a in ARCHITECTURES.values() for row in (a.config, *a.models.values(), *a.others)}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'hf_efficient' has no attribute 'PerformerForWeather'"):
        _ = hf_efficient.PerformerForWeather


def test_reloading_the_package_is_harmless():
    mapping = transformers.AutoModel._model_mapping
    before = dict(mapping._extra_content)
    importlib.reload(hf_efficient)
    assert mapping._extra_content == before
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_WatchingFinder"]


def imported_modules(code):
    return set(json.loads(run_python("-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")))


def test_importing_the_package_imports_neither_torch_nor_triton_nor_transformers():
    modules = imported_modules("import hf_efficient, hf_efficient.registry; dir(hf_efficient)")
    assert not modules & {"torch", "triton", "transformers", "numpy"}


def test_importing_the_package_after_transformers_imports_only_its_own_modules():
    before = imported_modules("import transformers")
    after = imported_modules("import transformers, hf_efficient")
    others = {name for name in after - before if name.partition(".")[0] != "hf_efficient"}
    assert not {name for name in others if name.partition(".")[0] in {"torch", "triton", "transformers"}}


def test_importtime_shows_no_triton():
    """The command of the issue: python -X importtime -c 'import hf_efficient'."""
    output = run_python(
        "-c",
        "import subprocess, sys\n"
        "command = [sys.executable, '-X', 'importtime', '-c', 'import transformers, hf_efficient']\n"
        "print(subprocess.run(command, capture_output=True, text=True, check=True).stderr)",
    )
    assert "hf_efficient.registry" in output
    assert "triton" not in output


def test_importing_the_package_adds_at_most_half_a_second():
    code = """
import time
import transformers
start = time.perf_counter()
import hf_efficient
print(time.perf_counter() - start)
"""
    # The best of several: other work on the machine only ever adds time.
    assert min(float(run_python("-c", code)) for _ in range(3)) <= 0.5


IMPORT_ORDERS = {
    "package first": "import hf_efficient",
    "auto classes first": "from transformers import AutoModel, AutoConfig\nimport hf_efficient",
    # These import modeling_auto from the middle of modules that our models import in turn.
    "amid modeling_layers": "import hf_efficient\nimport transformers.modeling_layers",
    "amid the trainer": "import hf_efficient\nfrom transformers import Trainer",
    "amid our model": "from hf_efficient.modeling.performer import PerformerModel",
    "in a thread": (
        "import hf_efficient, threading\n"
        "def work():\n    import transformers.modeling_layers\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "[thread.start() for thread in threads]\n[thread.join() for thread in threads]"
    ),
}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_models_are_registered_in_whatever_order_things_are_imported(order):
    check = """
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from hf_efficient.registry import ARCHITECTURES
for model_type, architecture in ARCHITECTURES.items():
    assert type(AutoConfig.for_model(model_type)) is architecture.config_class()
    assert AutoModel._model_mapping[architecture.config_class()] is architecture.model_classes()["AutoModel"]
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_WatchingFinder"]
"""
    run_python_with_torch("-c", IMPORT_ORDERS[order] + check)


def test_watched_modules_keep_their_loader_and_source(tmp_path):
    run_python_with_torch(
        "-c",
        "import hf_efficient, inspect\nfrom transformers.models.auto import modeling_auto\n"
        "assert type(modeling_auto.__loader__).__name__ == 'SourceFileLoader', modeling_auto.__loader__\n"
        "assert type(modeling_auto.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "assert 'AutoModelForCausalLM' in inspect.getsource(modeling_auto)",
    )


def test_a_process_that_only_unpickles_a_config_knows_the_architecture(tmp_path):
    """Spawned ranks do: without the registration they hung in distributed tests."""
    target = tmp_path / "config.pickle"
    target.write_bytes(pickle.dumps(hf_efficient.PerformerConfig()))
    run_python_with_torch(
        "-c",
        f"import pickle\nconfig = pickle.load(open({str(target)!r}, 'rb'))\n"
        "from transformers import AutoModel\nassert type(config) in AutoModel._model_mapping",
    )


def test_a_model_that_cannot_be_imported_is_reported_where_it_matters(tmp_path):
    write_toy_package(tmp_path, "broken_house", {"modeling/toy.py": "import a_package_nobody_has\n"})
    output = run_python_with_torch(
        "-c",
        "import broken_house\n"
        "try:\n    import transformers.models.auto.modeling_auto\n"
        "except ImportError as error:\n    print(error)",
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert "broken_house could not register its models" in output
    assert "a_package_nobody_has" in output
