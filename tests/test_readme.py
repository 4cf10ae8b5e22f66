"""The README does what it says: its Python runs in order against a small Hub, its commands run, its table is true."""

import re
import subprocess

import pytest
from helpers import ROOT, run_python, run_warm_python
from hub_stub import running_hub


README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
SCRIPTS = [line for line in COMMANDS if line.startswith("python scripts/")]


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path):
    (tmp_path / "notes.txt").write_text("To do: water the plants.\nTo do: read the paper.\n" * 20)
    with running_hub() as hub:
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        printed = run_python("-c", "\n".join(PYTHON), cwd=tmp_path, environment=environment)
        assert "To do: " in printed
        pushed = hub.files("me/notes-performer")
        assert {"model.safetensors", "config.json", "modeling_performer.py", "tokenizer_config.json"} <= set(pushed)


def test_make_targets_exist():
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_script_commands_run(tmp_path):
    assert len(SCRIPTS) == 2
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for command in SCRIPTS:
        arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', command)][1:]
        run_python(*arguments, cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)}, timeout=600)
    assert (tmp_path / "outputs" / "first" / "model.safetensors").is_file()


def test_every_command_is_run_by_a_test():
    known = [*SCRIPTS, *(line for line in COMMANDS if line.startswith("make "))]
    assert known and set(known) == {line for line in COMMANDS if line.strip()}


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_support_table_is_up_to_date():
    run_warm_python(ROOT / "scripts" / "support_table.py", "--check")
