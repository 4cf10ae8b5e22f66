"""scripts/demo.py in seconds instead of minutes. Run: pytest tests/test_demo.py"""

import copy
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from load_script import load_script

import hf_efficient


demo = load_script("demo")
demo_load = load_script("demo_load")
muon_adamw = load_script("muon_adamw")
text_sources = load_script("text_sources")
time_budget = load_script("time_budget")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index, (_, text) in enumerate(text_sources.standard_library_documents()[20:50]):
        (folder / f"{index}.py").write_text(text[:3000], encoding="utf-8")
    return folder


def shrink(monkeypatch):
    monkeypatch.setattr(
        demo, "MODEL", {**demo.MODEL, "hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 1}
    )
    monkeypatch.setattr(demo, "BLOCK_SIZE", 64)


@pytest.mark.slow
def test_the_whole_demo(corpus, tmp_path, monkeypatch, capfd):
    shrink(monkeypatch)
    words = ["--minutes", "0.05", "--text_folder", str(corpus), "--output_dir", str(tmp_path / "out")]
    status = demo.main([*words, "--max_new_tokens", "16"])
    shown = capfd.readouterr().out
    assert "import hf_efficient: ModuleNotFoundError" in shown
    assert "logits equal those of the training process to the bit" in shown
    for name in ("zlib", "byte bigram", "byte trigram", "this Performer"):
        assert name in shown
    assert "logits equal to the bit: yes" in shown
    below = "below a byte bigram" in shown and "): yes" in shown.split("below a byte bigram")[1].splitlines()[0]
    assert status == (0 if below else 1)  # three seconds may or may not be enough
    checkpoint = tmp_path / "out" / "checkpoint"
    assert not [path for path in checkpoint.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]

    # A second run replaces the first one's checkpoint, and nothing of anybody else's.
    assert demo.prepare_folder(str(tmp_path / "out")) == checkpoint and not checkpoint.exists()
    checkpoint.mkdir()
    (checkpoint / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="must not hold a checkpoint folder of other origin"):
        demo.prepare_folder(str(tmp_path / "out"))


def test_other_logits_are_noticed(capsys):
    config = hf_efficient.PerformerConfig(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = hf_efficient.PerformerForCausalLM(config).eval()
    input_ids = torch.arange(10)[None]
    logits = model(input_ids=input_ids).logits.detach()
    demo_load.require_equal_logits(model, input_ids, logits)
    assert "to the bit" in capsys.readouterr().out
    changed = logits.clone()
    changed[0, 3, 7] = torch.nextafter(changed[0, 3, 7], torch.tensor(torch.inf))
    with pytest.raises(SystemExit, match="differ from those of the training process by up to"):
        demo_load.require_equal_logits(model, input_ids, changed)
    with pytest.raises(SystemExit, match="have shape"):
        demo_load.require_equal_logits(model, input_ids, logits[:, :5])


def test_optimizer_gives_every_parameter_to_one_of_two():
    config = hf_efficient.PerformerConfig(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = hf_efficient.PerformerForCausalLM(config)
    optimizer = muon_adamw.MuonAdamW(model, lr=1e-3, matrix_lr=2e-3, weight_decay=0.1)
    owned = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(owned) == sorted(map(id, model.parameters()))
    matrices = {id(parameter) for parameter in muon_adamw.hidden_matrices(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in matrices}
    assert names and all("layers" in name and name.endswith("proj.weight") for name in names)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 5e-4, 5e-4]
    assert scheduler.get_last_lr() == [1e-3, 5e-4, 5e-4]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True) if new.any())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())

    twin = muon_adamw.MuonAdamW(copy.deepcopy(model), lr=1e-3, matrix_lr=2e-3)
    twin.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in twin.param_groups] == [1e-3, 5e-4, 5e-4]
    with pytest.raises(ValueError, match="matrix_lr must be above 0, got 0"):
        muon_adamw.MuonAdamW(model, lr=1e-3, matrix_lr=0)


def test_the_other_process_proves_that_the_package_is_gone():
    code = "import demo_load; demo_load.hide_package('json'); import json"
    script = f"import sys; sys.path.append({str(ROOT / 'scripts')!r}); {code}"
    finished = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert finished.returncode == 1
    assert "was to be hidden" in finished.stderr or "ModuleNotFoundError: No module named 'json'" in finished.stderr


def test_learning_rate_comes_down_with_the_clock(monkeypatch):
    factors = [time_budget.learning_rate_factor(spent / 100) for spent in range(101)]
    peak = factors.index(max(factors))
    assert 0 < peak < 10 and max(factors) == pytest.approx(1, abs=0.01)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 < factors[-1] < 0.1 and factors[0] > 0
    now = [100.0]
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: now[0])
    clock = time_budget.Clock(60)
    assert clock.spent == 0
    clock.start()
    now[0] = 130.0
    assert clock.spent == 0.5
    now[0] = 1000.0
    assert clock.spent == 1
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        time_budget.Clock(0)
