"""Runs tests/test_smoke.py (every head: forward, backward, generate, save, load elsewhere) at the ends of the ranges.

    make compat                                     oldest with oldest, newest with newest
    python scripts/compat.py --torch pinned         both ends of transformers with the torch of constraints.txt
    python scripts/compat.py --python python3.13    with another interpreter

The ends are those of pyproject.toml; the newest version is the newest that pip would install. The environments are
built under .cache/compat, once per combination, and used again.

The public index has only CUDA builds of torch for Linux, which bring several GB along; where pip knows of a CPU wheel
(`PIP_FIND_LINKS`, `PIP_EXTRA_INDEX_URL`) it takes that one. `--torch pinned` goes without.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache/compat"


def requirement(package: str) -> str:
    """The line of pyproject.toml about a dependency, such as "torch>=2.11"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        if re.match(rf"{package}\b", line):
            return line
    raise ValueError(f"pyproject.toml has no dependency {package}")


def lower_end(package: str) -> str:
    """The oldest version of `package` that pyproject.toml allows, as a full version number."""
    match = re.fullmatch(rf"{package}>=([\d.]+)(,.*)?", requirement(package))
    if not match:
        raise ValueError(f"pyproject.toml has no dependency of the form {package}>=version")
    return match[1] + ".0" * (2 - match[1].count("."))


def upper_end(package: str, python: str) -> str:
    """The newest version that pip, as it is set up here, would install for this interpreter."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    report = subprocess.run(
        [*command, "--report", "-", requirement(package)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(report)["install"][0]["metadata"]["version"].partition("+")[0]


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


def passes(python: str, versions: dict[str, str]) -> bool:
    """Whether the smoke set is green with these versions."""
    try:
        interpreter = environment(python, versions)
        # The versions stated are the versions tested, whatever pip made of them.
        variables = os.environ | {f"EXPECTED_{name.upper()}": version for name, version in versions.items()}
        smoke = ROOT / "tests/test_smoke.py"
        run(interpreter, "-m", "pytest", "-p", "no:cacheprovider", smoke, cwd=ROOT, env=variables)
    except subprocess.CalledProcessError as error:
        print(f"{Path(str(error.cmd[0])).name} ended with {error.returncode}")
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter to build the environments with")
    parser.add_argument("--torch", choices=("ends", "pinned"), default="ends", help="which torch (see above)")
    arguments = parser.parse_args()

    combinations = []
    for end in (lower_end, lambda package: upper_end(package, arguments.python)):
        torch = end("torch") if arguments.torch == "ends" else pinned("torch")
        combinations.append({"transformers": end("transformers"), "torch": torch})
    results = {str(versions): passes(arguments.python, versions) for versions in combinations}
    for versions, passed in results.items():
        print(f"{'passed' if passed else 'FAILED'} with {versions} on {arguments.python}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
