"""What hf_efficient/remote_code.py writes and refuses, tried on a toy package; tests/test_remote_code.py has ours."""

import ast
import importlib
import itertools
import json
import os
import sys

import pytest
from helpers import subprocess_without_package
from toy_package import CONFIGURATION, FILES, MODELING, write_toy_package


@pytest.fixture
def toy(tmp_path, monkeypatch, request):
    """Writes a toy package under a name of its own and gives its remote_code module and its table row."""
    names = (f"toy_house_{number}" for number in itertools.count())
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(changes=None, name=None):
        name = name or next(name for name in names if not (tmp_path / name).exists())
        # Not registered with transformers: many toys share one model type.
        changes = {"__init__.py": "__version__ = '1.2.3'\n"} | (changes or {})
        write_toy_package(tmp_path, name, changes)
        importlib.invalidate_caches()
        registry = importlib.import_module(f"{name}.registry")
        return importlib.import_module(f"{name}.remote_code"), registry.ARCHITECTURES["toy_house"]

    yield make
    for name in set(sys.modules) - before:
        if name.startswith("toy_house_"):
            del sys.modules[name]


def test_only_what_is_needed_is_written_and_only_imports_change(toy):
    remote_code, architecture = toy()
    files = remote_code.travelling(architecture)[1]
    assert sorted(files) == [
        "configuration_model_card.py",
        "configuration_self_contained.py",
        "configuration_toy.py",
        "kernels_backend.py",
        "kernels_scale.py",
        "kernels_scale_api.py",
        "modeling_blocks.py",
        "modeling_toy.py",
    ]
    first, _, rest = files["modeling_toy.py"].partition("\n")
    assert first.startswith("# toy_house_0 1.2.3 (Apache-2.0), modeling/toy.py;")
    expected = MODELING.replace("from ..configuration.toy import", "from .configuration_toy import")
    expected = expected.replace("from ..kernels.scale import", "from .kernels_scale import")
    assert rest == expected.replace("from .blocks import", "from .modeling_blocks import")
    assert files["kernels_scale.py"].splitlines()[1:] == ["from .kernels_scale_api import scale"]
    assert (
        files["configuration_toy.py"]
        .partition("\n")[2]
        .startswith(CONFIGURATION.replace("from .self_contained", "from .configuration_self_contained"))
    )


def test_what_is_written_is_what_transformers_looks_for(toy, tmp_path):
    from transformers.dynamic_module_utils import get_relative_import_files

    remote_code, architecture = toy()
    files = remote_code.travelling(architecture)[1]
    (tmp_path / "flat").mkdir()
    for name, text in files.items():
        ast.parse(text)
        (tmp_path / "flat" / name).write_text(text)
    # From the configuration alone and from the model alone, transformers comes upon every file.
    for root in ("configuration_toy.py", "modeling_toy.py"):
        found = {os.path.basename(path) for path in get_relative_import_files(tmp_path / "flat" / root)}
        assert found | {root} == set(files)


REFUSED = {
    "absolute import of ours": ("from {package}.modeling.blocks import double", "use a relative import"),
    "import of ours": ("import {package}.modeling.blocks", "use a relative import"),
    "the package itself": ("from . import blocks", "is not followed by transformers"),
    "third-party": ("import scipy", "would make every checkpoint require scipy"),
    "third-party in a function": ("def f():\n    import scipy.linalg", "would make every checkpoint require scipy"),
    "third-party behind suppress": (
        "import contextlib\nwith contextlib.suppress(ImportError):\n    from scipy import linalg",
        "would make every checkpoint require scipy",
    ),
    "a missing module": ("from .nowhere import double", "modeling.nowhere is not a module of this package"),
    "a namespace folder": ("from ..kernels import scale", "kernels is not a module of this package"),
    "a module as a name": ("from ..kernels.scale import api", "api is a module of kernels.scale"),
    "out of the package": ("from ...elsewhere import thing", "leaves the package"),
    "import text in a docstring": ('"""\nfrom .blocks_of_old import double\n"""', "takes this text for an import"),
    "not at the start of a line": ("x = 1; from .blocks import double", "must start a line"),
    "broken line": ("from .blocks \\\n    import double", "must start a line|must have the form"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cannot_travel_and_says_where(toy, case, tmp_path):
    line, message = REFUSED[case]
    # The model's own (indented) import of blocks would satisfy transformers in place of the one under test.
    changed = MODELING.replace("from .blocks import double  #", "double = float  #") + "\n\n"
    start = changed.count("\n") + 1
    remote_code, architecture = toy({"modeling/toy.py": changed + line.format(package="toy_house_0") + "\n"})
    with pytest.raises(remote_code.RemoteCodeError, match=message) as raised:
        remote_code.travelling(architecture)[1]
    reported = str(raised.value).partition("modeling/toy.py:")[2].partition(":")[0]
    assert "must start a line" in str(raised.value) or start <= int(reported) <= start + line.count("\n")


def test_two_files_of_one_flat_name_are_refused(toy):
    remote_code, architecture = toy(
        {
            "kernels/scale_api.py": "def other():\n    pass\n",
            "modeling/blocks.py": "from ..kernels.scale_api import other\n\n\n" + FILES["modeling/blocks.py"],
        }
    )
    with pytest.raises(remote_code.RemoteCodeError, match="would both be kernels_scale_api.py"):
        remote_code.travelling(architecture)[1]


@pytest.mark.parametrize(
    "statement", ["try:\n    import scipy\nexcept ImportError:\n    scipy = None", "import safetensors"]
)
def test_optional_and_always_present_packages_are_accepted(toy, statement):
    remote_code, architecture = toy({"modeling/blocks.py": f"{statement}\n{FILES['modeling/blocks.py']}"})
    assert statement in remote_code.travelling(architecture)[1]["modeling_blocks.py"]


def test_nothing_is_written_when_the_code_cannot_travel(toy, tmp_path):
    remote_code, architecture = toy({"modeling/blocks.py": "import scipy\n"})
    with pytest.raises(remote_code.RemoteCodeError):
        architecture.config_class()().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_file_changed_between_two_saves_is_read_again(toy, tmp_path, monkeypatch):
    """Its text is made once for all saves, but only while the file stays as it is."""
    remote_code, architecture = toy()
    parsed, parse = [], ast.parse
    monkeypatch.setattr(remote_code.ast, "parse", lambda *arguments: parsed.append(arguments) or parse(*arguments))
    files = remote_code.travelling(architecture)[1]
    assert len(parsed) == len(files) and remote_code.travelling(architecture)[1] == files
    assert len(parsed) == len(files)

    blocks = tmp_path / "toy_house_0/modeling/blocks.py"
    blocks.write_text(blocks.read_text() + "LATER = 1\n")
    changed = remote_code.travelling(architecture)[1]
    assert changed == files | {"modeling_blocks.py": files["modeling_blocks.py"] + "LATER = 1\n"}
    assert len(parsed) == len(files) + 1


def test_a_failed_write_leaves_what_was_there(toy, tmp_path, monkeypatch):
    remote_code, architecture = toy()
    folder = tmp_path / "saved"
    config = architecture.config_class()()
    config.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.write_text("# of an older version")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    write, written = remote_code.Path.write_bytes, []

    def full_disk(path, data):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(remote_code.Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        config.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_in_place_of_the_folder_is_named(toy, tmp_path):
    _, architecture = toy()
    (tmp_path / "saved").write_text("precious")
    with pytest.raises(NotADirectoryError, match="must be a folder, got the file .*saved"):
        architecture.config_class()().save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "precious"


def test_auto_map_names_every_head_and_keeps_what_was_there(toy, tmp_path):
    _, architecture = toy()
    config = architecture.config_class()()
    config.auto_map = {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None], "AutoModel": "old.Model"}
    config.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["auto_map"] == {
        "AutoTokenizer": ["tokenization_mine.MineTokenizer", None],
        "AutoConfig": "configuration_toy.ToyConfig",
        "AutoModel": "modeling_toy.ToyModel",
        "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM",
        "AutoModelForMaskedLM": "modeling_toy.ToyForCausalLM",
    }


def test_somebodys_subclass_is_saved_without_our_code_and_with_a_warning(toy, tmp_path, caplog):
    _, architecture = toy()

    class TheirConfig(architecture.config_class()):
        pass

    with caplog.at_level("WARNING"):
        TheirConfig().save_pretrained(tmp_path / "saved")
    assert "TheirConfig is not a configuration of toy_house_" in caplog.text
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["config.json"]


def test_saving_again_from_remote_code_forgets_the_repository_of_origin(toy, tmp_path):
    """transformers writes "repository--file.Class" for code of another repository; a saved folder has the code."""
    _, architecture = toy()
    architecture.config_class()().save_pretrained(tmp_path / "saved")
    subprocess_without_package(
        """
import json, sys
from pathlib import Path
from transformers import AutoConfig
source, target = map(Path, sys.argv[1:])
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
config.auto_map = {name: f"someone/origin--{value}" for name, value in config.auto_map.items()}
config.auto_map["AutoTokenizer"] = ["someone/origin--tokenization_x.XTokenizer", None]
config.save_pretrained(target)
saved, original = (json.loads((folder / "config.json").read_text())["auto_map"] for folder in (target, source))
assert saved.pop("AutoTokenizer") == ["tokenization_x.XTokenizer", None]
assert saved == original, saved
code = lambda folder: {path.name: path.read_text() for path in folder.glob("*.py")}
assert code(source) == code(target)
""",
        tmp_path / "saved",
        tmp_path / "again",
    )
