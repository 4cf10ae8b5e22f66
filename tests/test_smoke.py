"""The shortest way through everything, for environments at the ends of the version ranges (scripts/compat.py)."""

import importlib.metadata
import os

import pytest
import torch
from helpers import subprocess_without_package

import hf_efficient


TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def model():
    return hf_efficient.PerformerForCausalLM(hf_efficient.PerformerConfig(**TINY)).eval()


@pytest.mark.parametrize("package", ["transformers", "torch"])
def test_the_versions_are_those_that_were_asked_for(package):
    expected = os.environ.get(f"EXPECTED_{package.upper()}")
    if expected is None:
        pytest.skip("only scripts/compat.py asks for certain versions")
    assert importlib.metadata.version(package).partition("+")[0] == expected


def test_loss_falls_in_a_few_steps(model):
    model.train()
    tokens = torch.arange(24).reshape(2, 12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_cached_generation_equals_uncached(model):
    prompt = torch.arange(10).reshape(2, 5)
    arguments = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(prompt, use_cache=True, **arguments)
    assert cached.shape == (2, 11)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **arguments))


@torch.no_grad()
def test_a_saved_model_loads_without_the_package(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    tokens = torch.arange(12).reshape(1, 12)
    torch.save(model(input_ids=tokens).logits, tmp_path / "logits.pt")
    subprocess_without_package(
        """
import sys, torch
from transformers import AutoModelForCausalLM
folder, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert torch.equal(model(input_ids=torch.arange(12).reshape(1, 12)).logits, torch.load(logits))
model.save_pretrained(folder + "_again")
""",
        tmp_path / "saved",
        tmp_path / "logits.pt",
    )
    code = {path.name: path.read_bytes() for path in (tmp_path / "saved").glob("*.py")}
    assert code and code == {path.name: path.read_bytes() for path in (tmp_path / "saved_again").glob("*.py")}
    again = hf_efficient.PerformerForCausalLM.from_pretrained(tmp_path / "saved_again").eval()
    assert torch.equal(again(input_ids=tokens).logits, torch.load(tmp_path / "logits.pt"))
