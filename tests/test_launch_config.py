"""The choice of a launch configuration: kernels/launch_config.py."""

import pytest

from hf_efficient.kernels import launch_config
from hf_efficient.kernels.launch_config import LaunchConfig, choose_config


SMALL, LARGE, SINGLE = (LaunchConfig({"BLOCK_N": n}, 4, 2) for n in (64, 32, 16))
TABLE = {"sm_80": {(16, 128): LARGE, (16, 64): SMALL, (32, 64): SINGLE}}


@pytest.fixture(autouse=True)
def architecture(monkeypatch):
    monkeypatch.setattr(launch_config, "gpu_architecture", lambda: "sm_80")


@pytest.mark.parametrize(
    ("bits", "size", "expected"),
    [(16, 1, SMALL), (16, 64, SMALL), (16, 65, LARGE), (16, 128, LARGE), (32, 48, SINGLE)],
)
def test_the_least_sufficient_row_is_taken(bits, size, expected):
    assert choose_config(TABLE, bits, size) is expected


@pytest.mark.parametrize(("bits", "size", "largest"), [(16, 129, 128), (32, 65, 64), (64, 8, 0)])
def test_a_size_beyond_the_table_is_refused(bits, size, largest):
    with pytest.raises(ValueError, match=f"at most {largest} for elements of {bits} bits, got {size}"):
        choose_config(TABLE, bits, size)


def test_a_launch_gets_blocks_and_options():
    assert SMALL.keywords() == {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
