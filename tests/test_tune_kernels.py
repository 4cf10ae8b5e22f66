"""scripts/tune_kernels.py: the search finds what is faster, drops what is wrong, and writes a table that is Python."""

import math

import pytest
import torch
from load_script import load_script

from hf_efficient.kernels.launch_config import LaunchConfig


tuner = load_script("tune_kernels")
START = LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 16}, 4, 2)


def test_the_search_walks_to_the_fastest_configuration():
    measured = []

    def cost(config):
        measured.append(config)
        return (
            abs(math.log2(config.blocks["BLOCK_M"] / 128))
            + abs(math.log2(config.blocks["BLOCK_N"] / 64))
            + abs(config.num_stages - 4)
            + 1
        )

    best, lowest, before = tuner.descend(START, cost)
    assert best == LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64}, 4, 4)
    assert (lowest, before) == (1, 7)
    assert len({tuner._identity(config) for config in measured}) == len(measured)


def test_noise_moves_nothing():
    assert tuner.descend(START, lambda config: 1.0 if config == START else 0.99)[0] == START


def test_neighbours_differ_in_one_choice():
    found = list(tuner.neighbours(START))
    assert START not in found and len(found) == 3 + 2 + 2  # BLOCK_N = 8 is below the smallest tile
    assert {config.num_warps for config in found} == {2, 4, 8} and {config.num_stages for config in found} == {1, 2, 3}


def test_a_configuration_that_fails_or_lies_costs_infinity():
    rows = {(16, 64): START}

    def workload():
        if rows[16, 64].num_warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return [torch.full((4,), 2.0 if rows[16, 64].num_warps == 2 else 1.0)]

    cost = tuner.cost_of(rows, (16, 64), workload, measure=lambda call: 3.0)
    assert cost(START) == 3.0
    assert cost(START._replace(num_warps=8)) == math.inf
    assert cost(START._replace(num_warps=2)) == math.inf


SOURCE = '''"""Chosen configurations."""

from ..launch_config import LaunchConfig, LaunchTable


# Why these.
FORWARD: LaunchTable = {
    "sm_90": {(16, 64): LaunchConfig({"BLOCK_M": 32}, 4, 2)},
}
BACKWARD = {"sm_90": {(16, 64): LaunchConfig({"BLOCK_M": 16}, 4, 1)}}
'''


def test_only_the_table_that_changed_is_rewritten():
    changed = {"FORWARD": {"sm_90": {(16, 64): LaunchConfig({"BLOCK_M": 128}, 8, 3), (32, 64): START}}}
    text = tuner.rewrite(SOURCE, changed)
    before, after = SOURCE.split("FORWARD"), text.split("FORWARD")
    assert after[0] == before[0]
    assert text.splitlines()[-1] == SOURCE.splitlines()[-1]
    names = {"LaunchConfig": LaunchConfig, "LaunchTable": dict}
    exec(text.replace("from ..launch_config import LaunchConfig, LaunchTable", ""), names)
    assert names["FORWARD"] == changed["FORWARD"]


def test_without_a_gpu_the_script_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune_kernels.py", "soft_topk"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures on a GPU, and none is available"):
        tuner.main()
