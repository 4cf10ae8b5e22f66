"""Makes transformers' own common model tests importable as the package `transformers_tests`.

The wheel of transformers carries no tests, its sdist on PyPI carries the shared mixins (`tests/test_*.py`) but not the
helper modules that they import. So the sdist of exactly the installed version is downloaded once, its tests are
unpacked under `.cache/transformers_tests/<version>/`, and the missing helper modules are put beside them: empty mixins
for what cannot be had, and our own `distributed_testing_utils.py` for the process launcher.

It is a package on disk rather than a set of modules made in memory because the tensor-parallel and FSDP tests start
processes of their own, which import the test functions by name.
"""

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock


HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
CACHE = REPOSITORY / ".cache" / "transformers_tests"
PACKAGE = "transformers_tests"

# What the sdist's files import and it does not hold. An empty mixin adds no tests; docs/conformance.md says so.
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        '    "return_dict": False,\n'
        '    "output_hidden_states": True,\n'
        '    "dtype": "float16",\n'
        '    "chunk_size_feed_forward": 5,\n'
        '    "architectures": ["SomeModel"],\n'
        '    "id2label": {0: "only"},\n'
        '    "label2id": {"only": 0},\n'
        '    "problem_type": "regression",\n'
        "}\n"
    ),
    "distributed_testing_utils.py": (HERE / "distributed_testing_utils.py").read_text(encoding="utf-8"),
}


class FetchError(RuntimeError):
    """The sdist could not be had; the message says what was tried and what to do."""


def ensure_upstream() -> Path:
    """The folder to put on `sys.path` so that `import transformers_tests` works; fetched on the first call."""
    version = importlib.metadata.version("transformers")
    folder = CACHE / version
    folder.mkdir(parents=True, exist_ok=True)
    # pytest-xdist's workers arrive here at the same moment.
    with FileLock(folder / "fetch.lock"):
        package = folder / PACKAGE
        if not (package / "test_modeling_common.py").exists():
            _unpack_tests(_download_sdist(version, folder), package)
        for name, text in STAND_INS.items():
            path = package / name
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    return folder


def _download_sdist(version: str, folder: Path) -> Path:
    existing = folder / f"transformers-{version}.tar.gz"
    if existing.exists():
        return existing
    with tempfile.TemporaryDirectory(dir=folder) as target:
        command = [sys.executable, "-m", "pip", "download", f"transformers=={version}"]
        command += ["--no-deps", "--no-binary", "transformers", "--dest", target, "--quiet"]
        # pip asks every sdist for its metadata. With setuptools at hand that takes two seconds; the isolated build
        # environment, for where setuptools is not there or too old, takes twenty.
        for isolation in (["--no-build-isolation"], []):
            result = subprocess.run([*command, *isolation], capture_output=True, text=True, check=False)
            found = list(Path(target).glob("transformers-*.tar.gz"))
            if result.returncode == 0 and len(found) == 1:
                return found[0].rename(existing)
        raise FetchError(
            f"tests/conformance runs transformers' own tests, which only its sdist on PyPI carries, and "
            f"{' '.join(command)!r} did not deliver transformers-{version}.tar.gz. Give pip access to an index, "
            f"or put that file at {existing}, or leave these tests out with --ignore=tests/conformance.\n"
            f"pip said:\n{result.stdout}{result.stderr}"
        )


def _unpack_tests(sdist: Path, package: Path) -> None:
    """Writes the sdist's `tests/*.py` to `package`, all or nothing."""
    with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
        staging = Path(scratch) / PACKAGE
        staging.mkdir()
        with tarfile.open(sdist) as archive:
            for member in archive:
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    (staging / parts[2]).write_bytes(archive.extractfile(member).read())
        if not (staging / "test_modeling_common.py").exists():
            raise FetchError(f"{sdist} holds no tests/test_modeling_common.py: is it an sdist of transformers?")
        shutil.rmtree(package, ignore_errors=True)
        staging.rename(package)
