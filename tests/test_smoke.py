"""The shortest way through everything, for environments at the ends of the version ranges (scripts/compat.py).

Every head of the registry is built, run forward and backward, generated from, saved, and loaded by a process that has
only transformers.
"""

import copy
import importlib.metadata
import json
import os

import pytest
import torch
from helpers import subprocess_without_package
from tiny_heads import HEADS


REGISTERED = [name for name, head in HEADS.items() if head.auto_class]
GENERATING = [name for name in REGISTERED if HEADS[name].generates]


def make(head):
    torch.manual_seed(0)
    return HEADS[head].model_class(HEADS[head].config()).eval()


@pytest.mark.parametrize("package", ["transformers", "torch"])
def test_the_versions_are_those_that_were_asked_for(package):
    expected = os.environ.get(f"EXPECTED_{package.upper()}")
    if expected is None:
        pytest.skip("only scripts/compat.py asks for certain versions")
    assert importlib.metadata.version(package).partition("+")[0] == expected


@pytest.mark.parametrize("head", REGISTERED)
def test_forward_and_backward(head):
    """Every parameter gets a finite gradient, of the loss where there is one; and a step makes the loss smaller."""
    row, model = HEADS[head], make(head)
    inputs = row.inputs() | row.labels()

    def loss():
        output = model(**inputs)
        return output.loss if row.learns else output.last_hidden_state.square().mean()

    before = loss()
    before.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert loss() < before


@pytest.mark.parametrize("head", GENERATING)
def test_cached_generation_equals_uncached(head):
    row, model = HEADS[head], make(head).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in row.inputs().items()}
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**inputs, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **options))


@pytest.mark.parametrize("head", GENERATING)
@torch.no_grad()
def test_a_cache_goes_by_either_name(head):
    """`past_key_values`, or `cache` as transformers says from 5.24 on."""
    inputs, model = HEADS[head].inputs(), make(head)
    decoder = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    cache = model(**inputs, use_cache=True).past_key_values
    following = {name: value for name, value in inputs.items() if name != "attention_mask"} | {
        decoder: inputs[decoder][:, :1]
    }
    logits = [model(**following, **{name: copy.deepcopy(cache)}).logits for name in ("past_key_values", "cache")]
    assert torch.equal(*logits) and not torch.equal(logits[0], model(**following).logits)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(**following, past_key_values=cache, cache=cache)


@pytest.mark.parametrize("head", [name for name in GENERATING if not HEADS[name].model_class._is_stateful])
def test_a_checkpointed_layer_is_given_no_cache(head):
    """It would be filled a second time when the layer is computed again."""
    row, model = HEADS[head], make(head).train()
    inputs = {name: value for name, value in row.inputs().items() if name != "attention_mask"}
    cache = model(**inputs, use_cache=True).past_key_values
    seen = cache.get_seq_length()
    model.gradient_checkpointing_enable()
    model(**inputs, **row.labels(), past_key_values=cache).loss.backward()
    assert cache.get_seq_length() == seen


IN_THE_OTHER_PROCESS = """
import json, sys, torch, transformers
from pathlib import Path
# All folders have one name: those with the same code are then one module for transformers, imported once.
for saved in sorted(Path(sys.argv[1]).glob("*/saved")):
    inputs, expected = torch.load(saved / "expected")
    model = getattr(transformers, (saved / "auto_class").read_text()).from_pretrained(saved, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected), saved
    model.save_pretrained(saved.with_name("again"))
"""


@torch.no_grad()
def test_saved_models_load_without_the_package(tmp_path):
    models = {name: make(name) for name in REGISTERED}
    for name, model in models.items():
        saved = tmp_path / name / "saved"
        model.save_pretrained(saved)
        (saved / "auto_class").write_text(HEADS[name].auto_class)
        torch.save((HEADS[name].inputs(), model(**HEADS[name].inputs())[0]), saved / "expected")
    subprocess_without_package(IN_THE_OTHER_PROCESS, tmp_path)
    for name, model in models.items():
        again = tmp_path / name / "again"
        code = {path.name: path.read_bytes() for path in (tmp_path / name / "saved").glob("*.py")}
        assert code and code == {path.name: path.read_bytes() for path in again.glob("*.py")}, name
        loaded = HEADS[name].model_class.from_pretrained(again).eval()
        assert torch.equal(loaded(**HEADS[name].inputs())[0], model(**HEADS[name].inputs())[0]), name
        assert set(json.loads((again / "config.json").read_text())["auto_map"]) > {"AutoConfig"}, name
