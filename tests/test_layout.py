"""The rules of CONTRIBUTING.md that a program can check, read off the source files."""

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT


SHIPPED = ("configuration", "modeling", "kernels")
MAY_IMPORT = {
    "configuration": {"configuration"},
    "modeling": {"modeling", "configuration", "kernels"},
    "kernels": {"kernels"},
}
# With one of these names a file can be taken for the package of that name, or says nothing about what it holds.
BANNED_NAMES = {"triton", "einops", "torch", "numpy", "kernels", "transformers", "utils", "utils2", "misc", "common"}
# An architecture is one file, read from top to bottom, so these two may be longer than everything else.
LINE_LIMITS = {"modeling": 600, "configuration": 600}
LINE_LIMIT = 400


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.is_file())


def identify(path):
    return str(path.relative_to(ROOT))


ALL = python_files("hf_efficient", *SHIPPED, "scripts", "tests")
all_files = pytest.mark.parametrize("path", ALL, ids=identify)
shipped_files = pytest.mark.parametrize("path", python_files(*SHIPPED), ids=identify)
modeling_files = pytest.mark.parametrize("path", python_files("modeling"), ids=identify)
configuration_files = pytest.mark.parametrize("path", python_files("configuration"), ids=identify)
kernel_folders = pytest.mark.parametrize(
    "folder", sorted(path.parent for path in (ROOT / "kernels").glob("*/__init__.py")), ids=identify
)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), path)


def our_imports(path):
    """Each import of the project's own code: (line, level, top-level folder)."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            parts = [*base, *(node.module or "").split(".")]
            yield node.lineno, node.level, parts[0]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.partition(".")[0] in {"hf_efficient", "scripts", "tests", *SHIPPED}:
                    yield node.lineno, 0, name


@pytest.mark.parametrize("folder", SHIPPED)
def test_the_three_folders_are_no_packages_of_their_own(folder):
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py would make `import {folder}` at the root find this folder; with kernels/ that hides "
        "Hugging Face's package"
    )


def test_there_is_no_tests_kernels_folder():
    assert not (ROOT / "tests/kernels").exists(), "pytest would take it for Hugging Face's kernels"


@all_files
def test_file_name(path):
    assert path.stem not in BANNED_NAMES, f"{identify(path)}: name the file for what stands in it"


@all_files
def test_length(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = LINE_LIMITS.get(path.relative_to(ROOT).parts[0], LINE_LIMIT)
    assert lines <= limit, f"{identify(path)} has {lines} lines, the limit is {limit}: split it by role"


@shipped_files
def test_shipped_code_imports_ours_by_relative_from_imports_only(path):
    for line, level, _ in our_imports(path):
        assert level, f"{identify(path)}:{line}: write `from ..module import name`, the form that can travel"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module, f"{identify(path)}:{node.lineno}: `from . import x` is not followed by transformers"


@shipped_files
def test_arrows_point_one_way(path):
    folder = path.relative_to(ROOT).parts[0]
    for line, _, target in our_imports(path):
        assert target in MAY_IMPORT[folder], f"{identify(path)}:{line}: {folder}/ must not import {target}/"


@pytest.mark.parametrize("path", python_files("hf_efficient"), ids=identify)
def test_the_package_does_not_import_scripts_or_tests(path):
    for line, level, target in our_imports(path):
        outside = not level and target.partition(".")[0] in {"scripts", "tests"}
        assert not outside, f"{identify(path)}:{line}: arrows point from scripts to the package"


@kernel_folders
def test_a_kernel_folder_has_its_roles(folder):
    names = {path.stem for path in folder.glob("*.py")}
    assert {"__init__", "api", "reference"} <= names, f"{identify(folder)}: __init__, api and reference are a must"
    assert ("triton_forward" in names) <= ("autograd" in names), f"{identify(folder)}: autograd.py joins the launchers"


@kernel_folders
def test_only_the_launcher_files_name_triton_as_a_module(folder):
    for path in folder.glob("*.py"):
        if path.stem.startswith("triton_"):
            continue
        for node in ast.walk(tree_of(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert "triton" not in names, f"{identify(path)}:{node.lineno}: ask kernels/backend.py instead"


def triton_imports(tree, guarded=False):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.partition(".")[0] == "triton" for name in names):
            yield node.lineno, guarded
        yield from triton_imports(node, guarded or isinstance(node, ast.Try))


@shipped_files
def test_triton_is_optional(path):
    for line, guarded in triton_imports(tree_of(path)):
        assert guarded, f"{identify(path)}:{line}: outside of `try` this makes every checkpoint require Triton"


@modeling_files
def test_modeling_files_leave_the_choice_of_backend_to_the_ops(path):
    found = re.search(r"triton", path.read_text(encoding="utf-8"), re.IGNORECASE)
    assert not found, f"{identify(path)} mentions Triton"


@modeling_files
def test_modeling_files_read_configs_as_they_are(path):
    for node in ast.walk(tree_of(path)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1):
            continue
        subject = ast.unparse(node.args[0])
        if node.func.id == "getattr" and len(node.args) == 3:
            assert not re.search(r"\bconfig$", subject), (
                f"{identify(path)}:{node.lineno}: a default belongs into the configuration"
            )
        if node.func.id == "isinstance":
            about_configs = re.search(r"\bconfig$", subject) or "Config" in ast.unparse(node.args[1])
            assert not about_configs, (
                f"{identify(path)}:{node.lineno}: remote code may hold two copies of a config class; "
                "compare model_type"
            )


@configuration_files
def test_configuration_files_keep_their_annotations(path):
    for node in ast.walk(tree_of(path)):
        future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        assert not future, f"{identify(path)}:{node.lineno}: string annotations switch @strict's type checks off"


def test_the_checks_see_files():
    """A moved folder must not turn the checks above into checks of nothing."""
    folders = {path.relative_to(ROOT).parts[0] for path in ALL}
    assert {"hf_efficient", "scripts", "tests", *SHIPPED} <= folders
    assert Path(__file__) in ALL
