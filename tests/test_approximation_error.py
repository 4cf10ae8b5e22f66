"""scripts/approximation_error.py: the errors fall as theory has them, and the files hold what was measured."""

import csv

import pytest
import torch
from load_script import load_script

from hf_efficient.kernels.linear_attention import linear_attention


script = load_script("approximation_error")


def test_errors_fall_with_the_number_of_features():
    rows = script.measure(seeds=3, scales=[0.25], feature_counts=[64, 1024])
    errors = {(row["feature_map"], row["features"]): row["median"] for row in rows}
    for name in script.MAPS:
        # The error of an average of independent estimates: a quarter for sixteen times as many.
        assert 0.1 < errors[name, 1024] / errors[name, 64] < 0.4, name
    assert errors["hyperbolic", 1024] < errors["softmax", 1024]
    assert errors[script.MEAN, 64] == pytest.approx(0.0625, abs=0.01)  # s² · sqrt(d) / sqrt(d): the scores' own spread
    assert errors["softmax", 1024] < errors[script.MEAN, 1024]


def test_optimal_features_have_the_smaller_variance():
    """At moderate norms; far beyond them no number of features of this size helps either map."""
    rows = script.measure(seeds=5, scales=[0.5], feature_counts=[256])
    errors = {row["feature_map"]: row["median"] for row in rows}
    assert errors["optimal_positive"] < errors["softmax"]


def test_optimal_features_estimate_the_same_attention():
    """Unbiased: with very many features the output is that of softmax attention."""
    torch.manual_seed(0)
    query, key, value = (0.5 * torch.randn(1, 1, 50, script.HEAD_DIM, dtype=torch.float64) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    projection = script.draw_projection(100_000, script.HEAD_DIM, seed=0, layer_idx=0, draw=0).double()
    # Without the floor: it is relative to the sum of all features, hence a bias that grows with their number.
    feature_map = script.optimal_positive_features(projection, query, key)._replace(epsilon=0.0)
    output = linear_attention(query, key, value, feature_map).output
    assert (output - exact).norm() / exact.norm() < 0.03


def test_files(tmp_path, capsys):
    rows_file, figure = tmp_path / "rows.csv", tmp_path / "figures/error.png"
    arguments = ["--seeds", "1", "--scales", "0.5", "--features", "64", "128"]
    script.main([*arguments, "--csv", str(rows_file), "--figure", str(figure)])
    with rows_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (len(script.MAPS) + 2)
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in script.MAPS) and "s = 0.5" in printed
