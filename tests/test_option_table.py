"""The table of options at equal budget: its page is made of its rows, and says no more than they show."""

import pytest
from helpers import ROOT
from load_script import load_script


option_table = load_script("option_table")


def test_the_page_is_what_the_rows_say():
    rows = option_table.read_rows(ROOT / "docs/benchmarks/x_transformer_options.csv")
    assert option_table.page(rows) == (ROOT / "docs/x_transformer_options.md").read_text(encoding="utf-8")
    assert {row["option"] for row in rows} == set(option_table.OPTIONS)
    assert len({(row["tokens"], row["steps"]) for row in rows}) == 1


def test_a_difference_is_claimed_only_outside_its_interval():
    baseline = {"0": 3.0, "1": 3.1, "2": 3.2}
    clear = {seed: score - 0.5 - 0.001 * int(seed) for seed, score in baseline.items()}
    assert option_table.compared(clear, baseline)[1] == "better"
    assert option_table.compared(baseline, clear)[1] == "worse"
    noisy = {"0": 2.9, "1": 3.2, "2": 3.0}
    assert option_table.compared(noisy, baseline)[1] == "no difference shown"
    assert option_table.compared({"0": 2.0}, baseline)[1] == "one seed"


@pytest.mark.parametrize("option", option_table.OPTIONS)
def test_every_option_is_a_valid_model_of_about_the_same_size(option):
    plain, changed = (option_table.build_model(name, 384) for name in (option_table.BASELINE, option))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (plain, changed)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.1
