"""Runs tests/test_smoke.py at the lower ends of the version ranges in pyproject.toml.

    make compat                                          the oldest transformers, with the torch of constraints.txt
    python scripts/compat.py --oldest-torch              the oldest torch as well
    python scripts/compat.py --python python3.12         with another interpreter

The environments are built under .cache/compat, once per combination, and used again.

The oldest torch is asked for by name because the public index has only its CUDA build, which brings several GB along;
where pip knows of a CPU wheel of that version (`PIP_FIND_LINKS`, `PIP_EXTRA_INDEX_URL`) it takes that one.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache/compat"


def lower_end(package: str) -> str:
    """The oldest version of `package` that pyproject.toml allows, as a full version number."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        match = re.fullmatch(rf"{package}>=([\d.]+)(,.*)?", requirement)
        if match:
            return match[1] + ".0" * (2 - match[1].count("."))
    raise ValueError(f"pyproject.toml has no dependency of the form {package}>=version")


def pinned(package: str) -> str:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{package}=="):
            return line.partition("==")[2]
    raise ValueError(f"constraints.txt has no line {package}==version")


def run(*command: str | Path, **options) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def environment(python: str, versions: dict[str, str]) -> Path:
    """The interpreter of a virtual environment that holds these versions, built if it is not there yet."""
    tag = subprocess.run(
        [python, "-c", "import sys; print('{}.{}'.format(*sys.version_info))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    folder = CACHE / "-".join([f"python{tag}", *(f"{name}{version}" for name, version in versions.items())])
    interpreter = folder / "bin/python"
    finished = folder / ".installed"
    if not finished.exists():
        run(python, "-m", "venv", "--clear", folder)
        # Without constraints.txt: the point is to leave its versions. What is not named comes as new as it can be,
        # which is what somebody gets who installs into an environment with an old transformers.
        wanted = [f"{name}=={version}" for name, version in versions.items()]
        run(interpreter, "-m", "pip", "install", "--editable", ROOT, "pytest", "pytest-timeout", *wanted)
        finished.touch()
    return interpreter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter to build the environments with")
    parser.add_argument("--oldest-torch", action="store_true", help="also with the oldest torch (see above)")
    arguments = parser.parse_args()

    combinations = [{"transformers": lower_end("transformers"), "torch": pinned("torch")}]
    if arguments.oldest_torch:
        combinations.append({"transformers": lower_end("transformers"), "torch": lower_end("torch")})
    for versions in combinations:
        try:
            interpreter = environment(arguments.python, versions)
            # The versions stated are the versions tested, whatever pip made of them.
            variables = os.environ | {f"EXPECTED_{name.upper()}": version for name, version in versions.items()}
            smoke = ROOT / "tests/test_smoke.py"
            run(interpreter, "-m", "pytest", "-p", "no:cacheprovider", smoke, cwd=ROOT, env=variables)
        except subprocess.CalledProcessError as error:
            print(f"FAILED with {versions}: {Path(str(error.cmd[0])).name} ended with {error.returncode}")
            return 1
        print(f"passed with {versions} on {interpreter}")
    if not arguments.oldest_torch:
        print(f"not tried: torch {lower_end('torch')} (add --oldest-torch where that version can be installed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
