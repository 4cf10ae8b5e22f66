"""The folders are one package: as wheel, editable install and plain checkout, also beside Hugging Face's kernels."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, run_python
from process_with_torch import TORCH


SHIPPED = ("configuration", "modeling", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SITE_PACKAGES = sysconfig.get_path("purelib")

# Prints where the package is, having used all parts of it and what transformers does with `kernels`.
USE = """
import sys
from pathlib import Path
import hf_efficient
from hf_efficient.registry import ARCHITECTURES
from hf_efficient.kernels.backend import resolve_backend
import transformers.models.llama.modeling_llama
from transformers import AutoConfig, AutoModel
for model_type, architecture in ARCHITECTURES.items():
    config = AutoConfig.for_model(model_type)
    assert type(config) is architecture.config_class()
    assert type(config) in AutoModel._model_mapping
import hf_efficient.remote_code
assert hf_efficient.remote_code.travelling(architecture)
print(Path(hf_efficient.__file__).parent.parent)
"""
# With any package called kernels installed, `import kernels` finds that one.
KERNELS = """
import kernels
print(kernels.__file__)
"""
# `in_a_fork` runs code as another process would that was started the same way, but in another folder or without some
# entry of the path: each imports transformers and ours anew. What they have in common is imported once.
IN_A_FORK = (
    f"""
import os, sys, traceback
{TORCH}
"""
    + """
def in_a_fork(code, folder=".", without=None):
    assert not {"transformers", "kernels"} & {*sys.modules}
    child = os.fork()
    if not child:
        try:
            os.chdir(folder)
            sys.path[:] = [entry for entry in sys.path if entry != without]
            exec(code, {})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:  # also an exit: what follows is the other process's
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
"""
)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout, so that no test of installing leaves files in it."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for folder in ("hf_efficient", *SHIPPED):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture
def installed_kernels(tmp_path):
    """A stand-in for Hugging Face's kernels of a version that transformers accepts and imports from."""
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels/__init__.py").write_text(
        "def __getattr__(name):\n"
        "    if name[0].isupper():\n        return type(name, (), {'__init__': lambda self, *args, **kwargs: None})\n"
        "    if name.startswith('__'):\n        raise AttributeError(name)\n"
        "    return lambda *args, **kwargs: lambda decorated: decorated\n"
    )
    (site / "kernels-0.18.2.dist-info").mkdir()
    (site / "kernels-0.18.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    return site


def folders_with_code():
    yield "hf_efficient"
    for folder in ("hf_efficient", *SHIPPED):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / "hf_efficient" if folder == "hf_efficient" else ROOT)
            yield ".".join(["hf_efficient", *inside.parts])


def test_every_folder_with_code_is_listed():
    assert sorted(set(folders_with_code())) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_constraints_pin_every_dependency_exactly():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    # flash-attn is compiled against the machine's CUDA; nothing here installs it.
    asked = [
        *PROJECT["project"]["dependencies"],
        *(row for extra in extras if extra != "flash-attn" for row in extras[extra]),
    ]
    normal = {name.lower().replace("_", "-") for name in pins}
    for requirement in asked:
        name = requirement.split(";")[0].strip()
        for separator in "[<>=~":
            name = name.split(separator)[0]
        assert name == "hf-efficient" or name.lower().replace("_", "-") in normal, f"constraints.txt lacks {name}"
    assert "+" not in "".join(pins.values()), "a build suffix ties the constraints to one machine's wheels"


def test_a_plain_checkout_works_from_its_root(checkout, installed_kernels):
    alone = f"in_a_fork({USE!r}, without={str(installed_kernels)!r})"
    environment = {"PYTHONPATH": str(installed_kernels)}
    output = run_python("-c", IN_A_FORK + alone + USE + KERNELS, cwd=checkout, environment=environment)
    assert output.split() == [str(checkout), str(checkout), str(installed_kernels / "kernels/__init__.py")]


def test_an_init_file_in_kernels_is_what_shadows(checkout, installed_kernels):
    """Shows that the test above would notice."""
    (checkout / "kernels/__init__.py").touch()
    output = run_python("-c", KERNELS, cwd=checkout, environment={"PYTHONPATH": str(installed_kernels)})
    assert output.strip() == str(checkout / "kernels/__init__.py")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pytest", "python -m pytest"])
def test_a_plain_checkout_works_under_pytest(checkout, installed_kernels, way):
    (checkout / "tests").mkdir()
    for file in (
        "conftest.py",
        "helpers.py",
        "matrix_page.py",
        "matrix_recorder.py",
        "triton_interpreter.py",
        "warm_process.py",
    ):
        shutil.copy(ROOT / "tests" / file, checkout / "tests")
    test_alone = f"def test_alone():\n    in_a_fork({USE!r}, without={str(installed_kernels)!r})\n\n\n"
    test_with_kernels = f"def test_with_kernels():\n    exec({USE + KERNELS!r}, {{}})\n"
    # The second way differs by the path alone: once, with other kernels installed, will do.
    tests, command = [test_with_kernels], [sys.executable, "-m", "pytest"]
    if way == "pytest":
        tests, command = [test_alone, test_with_kernels], [Path(sys.executable).with_name("pytest")]
    (checkout / "tests/test_use.py").write_text(f"import helpers\n{IN_A_FORK}\n\n{''.join(tests)}")
    output = run_python(
        "-c",
        "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)",
        *command,
        "-rP",
        "-p",
        "no:cacheprovider",
        cwd=checkout,
        environment={"PYTHONPATH": str(installed_kernels), "PYTEST_ADDOPTS": None},
    )
    assert f"{len(tests)} passed" in output
    assert output.splitlines().count(str(checkout)) == len(tests)
    assert str(installed_kernels / "kernels/__init__.py") in output.split()


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def environment_beside(folder):
    """A new virtual environment that sees the packages of this one, but not what .pth files add to it."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(f"{SITE_PACKAGES}\n")
    return python, site


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_works_elsewhere(checkout, installed_kernels, tmp_path):
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, checkout)
    (wheel,) = tmp_path.glob("hf_efficient-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_efficient").rglob("*.py")}
    for folder in SHIPPED:
        expected |= {f"hf_efficient/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    assert names == expected

    python, site = environment_beside(tmp_path / "environment")
    pip("--python", python, "install", "--no-deps", wheel)
    forks = "".join(f"in_a_fork({USE!r}, {str(cwd)!r})\n" for cwd in (checkout, installed_kernels))
    path = "print(len(hf_efficient.__path__))"
    printed = run_python("-c", IN_A_FORK + forks + USE + path, cwd=tmp_path, python=python).split()
    # In the checkout's root the checkout is what one means, installed or not.
    assert printed == [str(checkout), str(site), str(site), "1"]


@pytest.mark.slow
def test_the_editable_install_works_inside_and_outside_of_the_checkout(checkout, installed_kernels, tmp_path):
    python, _ = environment_beside(tmp_path / "environment")
    pip("--python", python, "install", "--no-deps", "--no-build-isolation", "--editable", checkout)
    # A module added after the installation is found without installing again.
    (checkout / "modeling/added_later.py").write_text("HERE = True\n")
    with_kernels, site = USE + KERNELS, str(installed_kernels)
    code = IN_A_FORK + (
        f"in_a_fork({USE!r}, {str(checkout)!r}, without={site!r})\n"
        f"in_a_fork({with_kernels!r}, {str(checkout)!r})\n"
        f"in_a_fork({USE!r}, without={site!r})\n"
        f"{with_kernels}from hf_efficient.modeling.added_later import HERE"
    )
    printed = run_python("-c", code, cwd=tmp_path, python=python, environment={"PYTHONPATH": site}).split()
    place, kernels = str(checkout), str(installed_kernels / "kernels/__init__.py")
    assert printed == [place, place, kernels, place, place, kernels]
