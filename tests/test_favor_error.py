"""scripts/favor_error.py writes the rows and the figure it announces."""

import csv

import pytest
from load_script import load_script


pytest.importorskip("matplotlib")


def test_rows_and_figure(tmp_path, capsys):
    script = load_script("favor_error")
    words = ["--seeds", "1", "--features", "16", "256", "--sharpness", "1"]
    script.main([*words, "--csv", str(tmp_path / "rows.csv"), "--figure", str(tmp_path / "figure.png")])
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"BERT", "GPT-2", "Llama"}
    assert {row["feature_map"] for row in rows} == {"softmax", "hyperbolic", "optimal_positive", "uniform"}
    errors = {(row["model"], row["feature_map"], row["features"]): float(row["median"]) for row in rows}
    for model in ("BERT", "GPT-2", "Llama"):
        assert 0 < errors[model, "softmax", "256"] < errors[model, "softmax", "16"]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "Llama, sharpness 1: 16: " in capsys.readouterr().out
