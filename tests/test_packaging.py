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


@pytest.mark.parametrize("with_kernels", [False, True], ids=["alone", "with-kernels"])
def test_a_plain_checkout_works_from_its_root(checkout, installed_kernels, with_kernels):
    environment = {"PYTHONPATH": str(installed_kernels) if with_kernels else None}
    output = run_python("-c", USE + KERNELS * with_kernels, cwd=checkout, environment=environment)
    place, *kernels = output.split()
    assert Path(place) == checkout
    assert kernels == [str(installed_kernels / "kernels/__init__.py")] * with_kernels


def test_an_init_file_in_kernels_is_what_shadows(checkout, installed_kernels):
    """Shows that the test above would notice."""
    (checkout / "kernels/__init__.py").touch()
    output = run_python("-c", KERNELS, cwd=checkout, environment={"PYTHONPATH": str(installed_kernels)})
    assert output.strip() == str(checkout / "kernels/__init__.py")


@pytest.mark.slow
@pytest.mark.parametrize("with_kernels", [False, True], ids=["alone", "with-kernels"])
@pytest.mark.parametrize("way", ["pytest", "python -m pytest"])
def test_a_plain_checkout_works_under_pytest(checkout, installed_kernels, way, with_kernels):
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
    body = (USE + KERNELS * with_kernels).replace("\n", "\n    ")
    (checkout / "tests/test_use.py").write_text(f"import helpers\n\n\ndef test_use():\n    {body}\n")
    command = [sys.executable, "-m", "pytest"] if "-m" in way else [Path(sys.executable).with_name("pytest")]
    output = run_python(
        "-c",
        "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)",
        *command,
        "-rP",
        "-p",
        "no:cacheprovider",
        cwd=checkout,
        environment={"PYTHONPATH": str(installed_kernels) if with_kernels else None, "PYTEST_ADDOPTS": None},
    )
    assert "1 passed" in output
    assert str(checkout) in output.split()
    assert (str(installed_kernels / "kernels/__init__.py") in output.split()) == with_kernels


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
    for cwd in (tmp_path, checkout.parent / "site"):
        assert run_python("-c", USE, cwd=cwd, python=python).strip() == str(site)
    # In the checkout's root the checkout is what one means, installed or not.
    assert run_python("-c", USE, cwd=checkout, python=python).strip() == str(checkout)
    assert (
        run_python("-c", "import hf_efficient; print(len(hf_efficient.__path__))", cwd=tmp_path, python=python)
        == "1\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("with_kernels", [False, True], ids=["alone", "with-kernels"])
def test_the_editable_install_works_inside_and_outside_of_the_checkout(
    checkout, installed_kernels, tmp_path, with_kernels
):
    python, _ = environment_beside(tmp_path / "environment")
    pip("--python", python, "install", "--no-deps", "--no-build-isolation", "--editable", checkout)
    environment = {"PYTHONPATH": str(installed_kernels) if with_kernels else None}
    for cwd in (tmp_path, checkout):
        output = run_python("-c", USE + KERNELS * with_kernels, cwd=cwd, python=python, environment=environment)
        assert output.split()[0] == str(checkout)
        assert output.split()[1:] == [str(installed_kernels / "kernels/__init__.py")] * with_kernels
    # A module added after the installation is found without installing again.
    (checkout / "modeling/added_later.py").write_text("HERE = True\n")
    run_python("-c", "from hf_efficient.modeling.added_later import HERE", cwd=tmp_path, python=python)
