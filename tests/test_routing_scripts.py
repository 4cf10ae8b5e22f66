"""What the scripts around CoLT5's routers count and draw. Run: pytest tests/test_routing_scripts.py"""

import csv

import pytest
import torch
from colt5_models import SIZES
from load_script import load_script
from transformers import BertConfig, BertModel, ByT5Tokenizer

from hf_efficient import CoLT5Config, CoLT5ForCausalLM, CoLT5ForConditionalGeneration


plot_routing = load_script("plot_routing")
recall_experiment = load_script("recall_experiment")
recall_figure = load_script("recall_figure")
recall_task = load_script("recall_task")
upcycling_curve = load_script("upcycling_curve")

TEXT = "def naïve(x):\n    return x + 1  # café\n" * 4


def checkpoint(model_class, folder, **options):
    torch.manual_seed(0)
    config = CoLT5Config(**{**SIZES, "vocab_size": 384, **options})
    model_class(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return config


@pytest.mark.parametrize(
    ("model_class", "options"),
    [
        (CoLT5ForConditionalGeneration, {"num_key_value_sets": 2, "num_heavy_attention_heads": 2}),
        (CoLT5ForCausalLM, {"is_encoder_decoder": False, "is_decoder": True, "routing_window": 16}),
    ],
    ids=["conditional", "causal"],
)
def test_routing_is_drawn_as_the_model_decides(model_class, options, tmp_path, capsys):
    config = checkpoint(model_class, tmp_path / "model", **options)
    (tmp_path / "text.py").write_text(TEXT, encoding="utf-8")
    words = ("--model_name_or_path", tmp_path / "model", "--text_file", tmp_path / "text.py", "--max_length", 100)
    figure = tmp_path / "figures" / "routing.png"
    decisions = plot_routing.main([*map(str, words), "--num_tokens", "60", "--output", str(figure)])
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    assert len(decisions) == len(printed) == 3 * config.num_hidden_layers
    ids = torch.tensor(ByT5Tokenizer()(TEXT)["input_ids"][:100])
    outputs = model_class.from_pretrained(tmp_path / "model").eval()
    outputs = outputs(
        ids[None],
        output_router_logits=True,
        **({"decoder_input_ids": ids[None, :1]} if config.is_encoder_decoder else {}),
    )
    routings = outputs.encoder_router_logits if config.is_encoder_decoder else outputs.router_logits
    for decision, routing, line in zip(decisions, routings, printed, strict=True):
        expected, routed = torch.zeros(100), torch.zeros(100, dtype=torch.bool)
        for route in range(routing.indices.shape[1]):
            for place, index in enumerate(routing.indices[0, route].tolist()):
                if routing.mask is None or routing.mask[0, route, place]:
                    routed[index] = True
                    expected[index] = max(expected[index], routing.scores[0, route, place])
        assert torch.allclose(decision.scores, expected) and torch.equal(decision.routed, routed)
        assert 0 < decision.routed.sum() < 100
        assert line.startswith(f"layer {decision.layer}, {decision.role}: {int(decision.routed.sum())} of 100 tokens")


def test_tokens_stand_in_their_cells():
    tokenizer = ByT5Tokenizer()
    ids = tokenizer("ab\nnaïve", add_special_tokens=False)["input_ids"]
    lines, cells = plot_routing.token_cells(tokenizer, ids, width=4)
    assert lines == ["ab", "naïv", "e"]
    assert cells[:2] == [[(0, 0, 1)], [(0, 1, 1)]] and cells[-1] == [(2, 0, 1)]
    assert len(cells) == len(ids) == 9 and cells[5:7].count([]) == 1  # ï is two bytes


def test_a_model_without_routers_is_refused():
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises((ValueError, TypeError), match="must have routers, got BertModel|output_router_logits"):
        plot_routing.router_decisions(model, torch.arange(5))


def test_recall_asks_for_what_stands_behind_the_key():
    batch = recall_task.draw_batch(50, 64, torch.Generator().manual_seed(0))
    first_key, first_query = recall_task.FIRST_KEY, recall_task.FIRST_QUERY
    for ids, answer, places in zip(*batch, strict=True):
        asked = ids[-1] - first_query
        keys = [place for place in range(63) if ids[place] >= first_key]
        assert sorted(places.tolist()) == keys and len(keys) == recall_task.PAIRS
        (place,) = [place for place in keys if ids[place] - first_key == asked]
        assert place == places[0] and ids[place + 1] - recall_task.FIRST_VALUE == answer
    values = (batch.input_ids >= recall_task.FIRST_VALUE) & (batch.input_ids < first_key)
    assert values.sum() > 50 * recall_task.PAIRS + 100  # values that belong to no key distract
    with pytest.raises(ValueError, match="length must be at least 18 to hold 8 pairs, got 17"):
        recall_task.draw_batch(1, 17, torch.Generator())


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_recall_bookkeeping(tmp_path, capsys):
    """A few steps of both runs; a second call finds them done, another seed is added."""
    stages, words = ((32, 2, 1e-3), (64, 2, 1e-3)), ["--folder", str(tmp_path)]
    recall_experiment.main(["--seeds", "0", *words], stages)
    table, positions = (read(tmp_path / name) for name in recall_experiment.FILES)
    assert [(row["routing"], row["step"], row["length"], row["final"]) for row in table] == [
        (routing, *rest)
        for routing in ("learned", "static")
        for rest in (("2", "32", "0"), ("4", "64", "0"), ("4", "64", "1"))
    ]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in table)
    assert all(row["needle_routed"] == "1.0000" for row in table if row["length"] == "32")  # everything is routed
    chosen = {(row["routing"], row["layer"], row["role"]) for row in positions}
    assert len(chosen) == 2 * 2 * 3 and len(positions) == 12 * recall_experiment.ROUTED
    static = [
        int(r["position"]) for r in positions if (r["routing"], r["layer"], r["role"]) == ("static", "2", "keys")
    ]
    assert static == list(range(1, 64, 2))  # evenly spaced, the last token among them
    capsys.readouterr()
    recall_experiment.main(["--seeds", "0", "1", "--routing", "static", *words], stages)
    assert capsys.readouterr().out.startswith("static routing, seed 1: accuracy 0.")
    assert len(read(tmp_path / "colt5_recall.csv")) == 9
    curves = recall_figure.accuracy_curves(read(tmp_path / "colt5_recall.csv"))
    finals = [float(row["accuracy"]) for row in read(tmp_path / "colt5_recall.csv") if row["final"] == "1"]
    assert [length for length, *_ in curves["static"]] == [32, 64]
    assert curves["learned"][1][1:] == (finals[0],) * 3 and curves["static"][1][3] == max(finals[1:])
    recall_figure.main([*words, "--figure", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_upcycling_bookkeeping(tmp_path, monkeypatch, capsys):
    """A few steps: each model is measured at each step, and the upcycled one begins where the T5 ended, or near."""
    text_sources = load_script("text_sources")
    documents = [(name, text[:3000]) for name, text in text_sources.standard_library_documents()[:24]]
    monkeypatch.setattr(text_sources, "standard_library_documents", lambda: documents)
    monkeypatch.setattr(upcycling_curve, "SIZES", {**upcycling_curve.SIZES, "num_layers": 1, "num_decoder_layers": 1})
    monkeypatch.setattr(upcycling_curve, "BLOCK_SIZE", 128)
    sizes = ("--train_blocks", "40", "--held_out_blocks", "4", "--output_dir", str(tmp_path))
    files = ("--csv", str(tmp_path / "rows.csv"), "--figure", str(tmp_path / "figure.png"))
    rows = upcycling_curve.main(["--steps", "8", "--fine_tune_steps", "2", "--eval_steps", "1", *sizes, *files])
    found = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row["step"])
    assert found == {
        upcycling_curve.ORIGINAL: [0, 2, 4, 6, 8],
        **{name: [0, 1, 2] for name in (*upcycling_curve.UPCYCLED.values(), upcycling_curve.SCRATCH)},
    }
    assert [row["model"] for row in read(tmp_path / "rows.csv")] == [row["model"] for row in rows]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    at_start = {row["model"]: float(row["bits_per_hidden_byte"]) for row in rows if row["step"] == 0}
    assert at_start[upcycling_curve.UPCYCLED["zero"]] < at_start[upcycling_curve.SCRATCH]
    assert len(capsys.readouterr().out.splitlines()) >= 4
