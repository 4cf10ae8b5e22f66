"""Checkpoints of every version there has been load: under the package's present code, and as the code they brought."""

import json
import shutil

import pytest
import torch
import transformers
from helpers import ROOT, subprocess_without_package
from safetensors.torch import load_file

import hf_efficient
from hf_efficient.registry import ARCHITECTURES


CHECKPOINTS = sorted(path.parent for path in (ROOT / "tests/checkpoints").glob("*/config.json"))

CHECK = """
import torch
from safetensors.torch import load_file

def check(model, folder):
    expected = load_file(f"{folder}/expected.safetensors")
    logits = expected.pop("logits")
    with torch.no_grad():
        got = model.eval().double()(**expected).logits
    # In float64: another machine, or a later torch, adds up in another order.
    torch.testing.assert_close(got, logits, rtol=1e-9, atol=1e-9)
"""
exec(CHECK)


def test_there_is_one_of_every_architecture():
    assert {json.loads((path / "config.json").read_text())["model_type"] for path in CHECKPOINTS} == {*ARCHITECTURES}


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_an_old_checkpoint_loads_under_the_present_code(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__.startswith("hf_efficient.")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert set(load_file(folder / "model.safetensors")) <= set(model.state_dict())
    check(model, folder)  # noqa: F821  (defined above, for both sides)


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_each_file_says_where_it_comes_from(folder, tmp_path):
    shutil.unpack_archive(folder / "code.tar.xz", tmp_path, filter="data")
    version = folder.name.rpartition("-")[2]
    files = list(tmp_path.glob("*.py"))
    assert files
    for path in files:
        assert path.read_text().startswith(f"# hf_efficient {version} (Apache-2.0), "), path.name


@pytest.mark.slow
def test_old_checkpoints_load_with_the_code_they_brought(tmp_path):
    for folder in CHECKPOINTS:
        target = shutil.copytree(folder, tmp_path / folder.name)
        shutil.unpack_archive(target / "code.tar.xz", target, filter="data")
    subprocess_without_package(
        CHECK
        + """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    check(model, folder)
""",
        *(tmp_path / folder.name for folder in CHECKPOINTS),
    )


def test_a_broken_weight_goes_red():
    """The comparison sees a change of one weight."""
    folder = CHECKPOINTS[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[3, 1] += 1e-4
    with pytest.raises(AssertionError):
        check(model, folder)  # noqa: F821


def test_the_version_is_that_of_the_newest_checkpoint_or_later():
    newest = max(tuple(map(int, path.name.rpartition("-")[2].split("."))) for path in CHECKPOINTS)
    assert newest <= tuple(map(int, hf_efficient.__version__.split(".")))
