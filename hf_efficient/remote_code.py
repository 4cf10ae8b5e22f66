"""Writes a model's code next to its weights, so that a checkpoint loads where this package is not installed.

transformers loads such code (`trust_remote_code=True`) from one flat folder and finds the files a module needs by
looking for lines of the form `from .name import ...`. So the modules that a configuration and its models need are
collected by following their relative imports, and each is written under its path with `_` for `/`:

    modeling/performer.py                 -> modeling_performer.py
    kernels/linear_attention/api.py       -> kernels_linear_attention_api.py
    kernels/linear_attention/__init__.py  -> kernels_linear_attention.py

A written file is the original, byte for byte, but for the import statements, a first line that says where it comes
from, and, in the configuration's file, a last function that names the models' modules.
"""

import ast
import logging
import os
import re
import sys
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .registry import ARCHITECTURES, Architecture


logger = logging.getLogger(__name__)

# What every machine that runs transformers with torch has (transformers requires numpy). Anything else is optional and
# has to stand in a `try`.
REQUIRED_PACKAGES = sys.stdlib_module_names | {"huggingface_hub", "numpy", "safetensors", "torch", "transformers"}

# How transformers finds the files of a checkpoint, docstrings and comments included (dynamic_module_utils.py).
_SEEN_BY_TRANSFORMERS = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", re.MULTILINE)
_STATEMENT = re.compile(rb"from\s*\.[.\s]*[\w.]+\s+import\b")


class RemoteCodeError(ValueError):
    """A module of this package is written in a way that cannot travel with a checkpoint."""


class _Module(NamedTuple):
    name: str  # relative to the package: "kernels.linear_attention.api"
    path: Path

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def flat_name(self) -> str:
        return self.name.replace(".", "_")


def write_code(config, save_directory: str | os.PathLike) -> None:
    """Write the code of `config` and of all its models into `save_directory`, and `config.auto_map` to match.

    Nothing is written unless everything can be: all files are made before the first is put in place, and each
    replaces its predecessor at once.

    Raises:
        RemoteCodeError: the code cannot travel; says which line of which file and why.
        NotADirectoryError: `save_directory` is a file.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None or type(config) is not architecture.config_class():
        # Somebody's subclass: its code is theirs to ship, and ours alone would load as something else.
        logger.warning(
            "%s is not a configuration of %s: without its code, %s will load only where the class is registered",
            type(config).__name__,
            __package__,
            save_directory,
        )
        return
    models, files = travelling(architecture, getattr(config, "architectures", None) or ())
    if os.path.isfile(save_directory):
        raise NotADirectoryError(f"save_directory must be a folder, got the file {os.fspath(save_directory)!r}")
    os.makedirs(save_directory, exist_ok=True)
    _write_all(files, Path(save_directory))
    ours = set(auto_map(architecture, architecture.models).values())
    others = {
        auto_class: reference
        for auto_class, reference in (getattr(config, "auto_map", None) or {}).items()
        if not (isinstance(reference, str) and reference.rpartition("--")[2] in ours)
    }
    config.auto_map = others | auto_map(architecture, models)


def auto_map(architecture: Architecture, models: dict[str, str]) -> dict[str, str]:
    """Auto class -> "file.Class", for the configuration and these models (Auto class -> reference) of it."""
    references = {"AutoConfig": architecture.config} | models
    return {auto_class: reference.replace(".", "_").replace(":", ".") for auto_class, reference in references.items()}


def travelling(architecture: Architecture, class_names=()) -> tuple[dict[str, str], dict[str, str]]:
    """What a saved model of one of these classes takes along: models (Auto class -> reference), files (name -> text).

    That is the files which it needs, and the other models that stand in them: so a pretrained body can be loaded with
    another head. For a class that the table does not know, or none, it is everything.
    """
    everything = [*architecture.models.values(), *architecture.others]
    own = [reference for reference in everything if reference.rpartition(":")[2] in class_names]
    config_module = architecture.config.partition(":")[0]
    roots = [config_module, *dict.fromkeys(reference.partition(":")[0] for reference in own or everything)]

    texts: dict[str, str] = {}  # by the module's name
    origins: dict[str, str] = {}
    to_do = roots
    while to_do:
        module = _find(to_do.pop())
        if origins.setdefault(module.flat_name, module.name) != module.name:
            raise RemoteCodeError(f"{origins[module.flat_name]} and {module.name} would both be {module.flat_name}.py")
        if module.name in texts:
            continue
        texts[module.name], needed = _flatten_module(module, module.path.read_bytes())
        to_do.extend(needed)

    models = {
        auto_class: reference
        for auto_class, reference in architecture.models.items()
        if reference.partition(":")[0] in texts
    }
    texts[config_module] += _name_the_models(dict(reference.split(":") for reference in models.values()))
    return models, {f"{name.replace('.', '_')}.py": text for name, text in texts.items()}


def _find(name: str) -> _Module:
    spec = find_spec(f"{__package__}.{name}")
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise RemoteCodeError(f"{__package__}.{name} is no module with a source file")
    return _Module(name, Path(spec.origin))


# A model's code is parsed for its first checkpoint; those after it find every module as it was.
@cache
def _flatten_module(module: _Module, source: bytes) -> tuple[str, tuple[str, ...]]:
    """The text of one module for the flat folder, and the names of the modules it needs."""
    tree = ast.parse(source, module.path)
    line_starts = [0]
    for line in source.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))

    replacements: list[tuple[int, int, bytes]] = []
    needed: list[str] = []
    for node, guarded in _imports(tree):
        if isinstance(node, ast.Import) or node.level == 0:
            _check_absolute(module, node, guarded)
            continue
        target = _target(module, node)
        start = line_starts[node.lineno - 1] + node.col_offset
        statement = _STATEMENT.match(source, start)
        if statement is None:
            raise _error(module, node.lineno, "a relative import must have the form `from ..module import name`")
        replacements.append((start, statement.end(), f"from .{target.flat_name} import".encode()))
        needed.append(target.name)

    for start, end, replacement in sorted(replacements, reverse=True):
        source = source[:start] + replacement + source[end:]
    text = _origin(module) + source.decode()
    _check_what_transformers_sees(module, text, needed)
    return text, tuple(needed)


def _imports(node: ast.AST, guarded: bool = False):
    """Every import statement below `node`, and whether transformers regards it as optional."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, guarded
        else:
            yield from _imports(child, guarded or isinstance(child, ast.Try))


def _check_absolute(module: _Module, node: ast.Import | ast.ImportFrom, guarded: bool) -> None:
    names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    for name in names:
        package = name.partition(".")[0]
        if package == __package__:
            raise _error(module, node.lineno, f"imports {name} by its full name; use a relative import")
        if package not in REQUIRED_PACKAGES and not guarded:
            raise _error(module, node.lineno, f"would make every checkpoint require {package}; import it in a `try`")


def _target(module: _Module, node: ast.ImportFrom) -> _Module:
    """The module a relative import names."""
    if node.module is None:
        raise _error(module, node.lineno, "`from . import name` is not followed by transformers; name the module")
    package = module.name.split(".") if module.is_package else module.name.split(".")[:-1]
    if node.level > len(package) + 1:
        raise _error(module, node.lineno, "the relative import leaves the package")
    name = ".".join([*package[: len(package) - node.level + 1], node.module])
    try:
        target = _find(name)
    except (RemoteCodeError, ModuleNotFoundError) as error:
        raise _error(module, node.lineno, f"{name} is not a module of this package") from error
    if target.is_package:
        for alias in node.names:
            if (target.path.parent / f"{alias.name}.py").exists():
                raise _error(module, node.lineno, f"{alias.name} is a module of {name}; import its contents instead")
    return target


def _check_what_transformers_sees(module: _Module, text: str, needed: list[str]) -> None:
    expected = {name.replace(".", "_") for name in needed}
    for match in _SEEN_BY_TRANSFORMERS.finditer(text):
        if (match[1] or match[2]) not in expected:
            line = text.count("\n", 0, match.end())  # the first line of the flat file is not in the original
            raise _error(module, line, "transformers takes this text for an import; word it differently")
    missing = expected - {match[1] or match[2] for match in _SEEN_BY_TRANSFORMERS.finditer(text)}
    if missing:
        raise _error(module, 1, f"the import of {missing.pop()} must start a line and not be broken before `import`")


def _origin(module: _Module) -> str:
    version = import_module(__package__).__version__
    path = module.name.replace(".", "/") + ("/__init__.py" if module.is_package else ".py")
    return f"# {__package__} {version} (Apache-2.0), {path}; written by save_pretrained, to be edited there.\n"


def _name_the_models(model_classes: dict[str, str]) -> str:
    lines = [
        "\n\ndef _files_to_copy_along():",
        "    # Never called. transformers copies a module together with those named in lines like these, so that a",
        "    # configuration loaded from a checkpoint and saved by itself still brings the code of its models.",
    ]
    for module, name in model_classes.items():
        lines.append(f"    from .{module.replace('.', '_')} import {name}  # noqa: F401")
    return "\n".join(lines) + "\n"


def _write_all(files: dict[str, str], folder: Path) -> None:
    # The temporary folder is inside the target: os.replace is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".code-") as temporary:
        for name, text in files.items():
            (Path(temporary) / name).write_bytes(text.encode())
        for name in files:
            os.replace(Path(temporary) / name, folder / name)


def _error(module: _Module, line: int, problem: str) -> RemoteCodeError:
    return RemoteCodeError(f"{module.path}:{line}: {problem}")
