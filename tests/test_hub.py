"""push_to_hub and loading from the Hub, over HTTP, with the Hub of tests/hub_stub.py."""

import json

import pytest
from helpers import run_python, subprocess_without_package
from hub_stub import running_hub


pytestmark = pytest.mark.slow

PUSH = """
import sys, torch, hf_efficient
from transformers import AutoModelForCausalLM
config = hf_efficient.PerformerConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
model = hf_efficient.PerformerForCausalLM(config).eval()
model.push_to_hub("me/tiny")
config.push_to_hub("me/config")
torch.save(model(input_ids=torch.arange(8)[None]).logits, sys.argv[1])
"""
LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
assert torch.equal(model(input_ids=torch.arange(8)[None]).logits, torch.load(sys.argv[1]))
assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)
"""
PUSH_AGAIN = """
model.push_to_hub("me/again")
AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=True).push_to_hub("me/config-again")
"""


def test_a_pushed_model_loads_elsewhere_and_can_be_pushed_on_from_there(tmp_path):
    with running_hub() as hub:
        run_python("-c", PUSH, tmp_path / "logits", environment=hub.environment(tmp_path / "writer"))
        pushed = hub.files["me/tiny"]
        assert {name.rpartition(".")[2] for name in pushed} - {"md", "gitattributes"} == {"py", "json", "safetensors"}
        code = {name: data for name, data in pushed.items() if name.endswith(".py")}
        assert "modeling_performer.py" in code
        assert {name: data for name, data in hub.files["me/config"].items() if name.endswith(".py")} == code

        reader = hub.environment(tmp_path / "reader")
        subprocess_without_package(LOAD + PUSH_AGAIN, tmp_path / "logits", "me/tiny", environment=reader)
        auto_map = json.loads(pushed["config.json"])["auto_map"]
        for repository in ("me/again", "me/config-again"):
            again = hub.files[repository]
            assert {name: data for name, data in again.items() if name.endswith(".py")} == code
            assert json.loads(again["config.json"])["auto_map"] == auto_map

        other = hub.environment(tmp_path / "other")
        subprocess_without_package(LOAD, tmp_path / "logits", "me/again", environment=other)
        before = len(hub.requests)
        offline = other | {"HF_HUB_OFFLINE": "1"}
        subprocess_without_package(LOAD, tmp_path / "logits", "me/again", environment=offline)
        assert hub.requests[before:] == []
