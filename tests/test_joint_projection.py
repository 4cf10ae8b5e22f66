"""Several linear layers as one product: what the layers give, whatever happens to them between two steps."""

import copy
import gc
import pickle
import types

import pytest
import torch
from helpers import assert_within_budget
from torch import nn

from hf_efficient import PerformerConfig, PerformerForCausalLM
from hf_efficient.modeling import few_rows, joint_projection
from hf_efficient.modeling.joint_projection import project_jointly


SIZES = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def make_layers(bias=False, outputs=(6, 6, 10)):
    torch.manual_seed(0)
    return tuple(nn.Linear(8, size, bias=bias) for size in outputs)


def one_by_one(layers, rows):
    return torch.cat([layer(rows) for layer in layers], dim=-1)


def assert_joint(layers, rows, cache):
    torch.testing.assert_close(project_jointly(layers, rows, cache), one_by_one(layers, rows))


@pytest.fixture
def made(monkeypatch):
    """The layers whose weights were copied, each time."""
    seen, joined = [], joint_projection._joined

    def watched(layers):
        seen.append(layers)
        return joined(layers)

    monkeypatch.setattr(joint_projection, "_joined", watched)
    return seen


def new_cache():
    return types.SimpleNamespace()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("count", [1, 3, 16])
@torch.no_grad()
def test_the_layers_own_results(made, count, bias):
    layers, rows, cache = make_layers(bias), torch.randn(count, 8), new_cache()
    for _ in range(3):
        result = project_jointly(layers, rows, cache)
        oracle = one_by_one([copy.deepcopy(layer).double() for layer in layers], rows.double())
        assert_within_budget(result, oracle, one_by_one(layers, rows), "product")
    assert len(made) == 1


def write(layers):
    layers[1].weight.mul_(2)


def replace_the_parameter(layers):
    layers[1].weight = nn.Parameter(torch.randn(6, 8))


def replace_the_numbers(layers):
    layers[1].weight.data = torch.randn(6, 8)


def load(layers):
    layers[2].load_state_dict({"weight": torch.randn(10, 8)})


def give_a_bias(layers):
    for layer in layers:
        layer.bias = nn.Parameter(torch.randn(layer.out_features))


CHANGES = [write, replace_the_parameter, replace_the_numbers, load, give_a_bias]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_noticed_between_two_steps(made, change):
    layers, rows, cache = make_layers(), torch.randn(1, 8), new_cache()
    assert_joint(layers, rows, cache)
    change(layers)
    assert_joint(layers, rows, cache)
    assert len(made) == 2


@torch.no_grad()
def test_a_change_that_torch_does_not_count_is_noticed_with_the_next_cache(made):
    layers, rows = make_layers(bias=True), torch.randn(1, 8)
    for name in ("weight", "bias"):
        assert_joint(layers, rows, new_cache())
        version = getattr(layers[2], name)._version
        getattr(layers[2], name).data.add_(1)  # as averages of weights are often kept
        assert getattr(layers[2], name)._version == version
    assert_joint(layers, rows, new_cache())
    assert len(made) == 3
    assert_joint(layers, rows, new_cache())
    assert len(made) == 3


@torch.no_grad()
def test_two_generations_at_a_time_share_the_copy(made):
    layers, rows, caches = make_layers(), torch.randn(1, 8), (new_cache(), new_cache())
    for _ in range(3):
        for cache in caches:
            assert_joint(layers, rows, cache)
    copied = copy.deepcopy(caches[0])
    assert_joint(layers, rows, pickle.loads(pickle.dumps(copied)))
    assert len(made) == 1


class Doubled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


def hook(layers):
    layers[1].register_forward_hook(lambda module, inputs, output: output + 1)
    return layers


def hook_before(layers):
    layers[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layers


def wrap(layers):
    layers[1].forward = lambda states: states
    return layers


def use_another(layers):
    return layers[0], Doubled(8, 6, bias=False), layers[2]


def give_one_a_bias(layers):
    layers[1].bias = nn.Parameter(torch.randn(6))
    return layers


def make_double(layers):
    return layers[0], layers[1].double(), layers[2]


def make_in_inference_mode(layers):
    with torch.inference_mode():
        return make_layers()


OTHERS = [hook, hook_before, wrap, use_another, give_one_a_bias, make_double, make_in_inference_mode]


@pytest.mark.parametrize("warm", [False, True], ids=["at once", "in between"])
@pytest.mark.parametrize("change", OTHERS)
@torch.no_grad()
def test_layers_that_are_more_than_their_weights_are_called(change, warm):
    layers, rows, cache = make_layers(), torch.randn(1, 8), new_cache()
    if warm:
        assert project_jointly(layers, rows, cache) is not None
    assert project_jointly(change(layers), rows, cache) is None


@torch.no_grad()
def test_where_layers_are_called(monkeypatch):
    layers, rows, cache = make_layers(), torch.randn(2, 8), new_cache()
    assert project_jointly(layers, rows, cache) is not None
    with torch.enable_grad():
        assert project_jointly(layers, rows, cache) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project_jointly(layers, rows, cache) is None
    assert project_jointly(layers, rows.double(), cache) is None
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output)
    assert project_jointly(layers, rows, cache) is None
    handle.remove()
    monkeypatch.setattr(few_rows, "LARGE", 8 * 6 * 2 + 1)
    assert project_jointly(layers[:2], rows, cache) is not None
    for either in (cache, new_cache()):
        assert project_jointly(layers[:2], torch.randn(3, 8), either) is None
    assert project_jointly(layers, rows, new_cache()) is None  # the third of them is larger


@torch.no_grad()
def test_a_compiler_sees_the_layers():
    layers, rows, cache = make_layers(), torch.randn(1, 8), new_cache()
    assert project_jointly(layers, rows, cache) is not None
    compiled = torch.compile(lambda rows: project_jointly(layers, rows, cache), fullgraph=True, backend="eager")
    assert compiled(rows) is None


@torch.no_grad()
def test_the_copy_is_the_layers_and_goes_with_them():
    layers, rows = make_layers(), torch.randn(1, 8)
    before = len(joint_projection._JOINTS)
    assert project_jointly(layers, rows, new_cache()) is not None
    assert len(joint_projection._JOINTS) == before + 1
    for layer in (copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))):
        assert vars(layer).keys() == vars(nn.Linear(8, 6, bias=False)).keys()
    del layers, layer
    gc.collect()
    assert len(joint_projection._JOINTS) == before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_generation_is_what_it_is_layer_by_layer(made, monkeypatch, bias, rows, mode):
    torch.manual_seed(0)
    model = PerformerForCausalLM(PerformerConfig(**SIZES, attention_bias=bias)).eval()
    tokens = torch.randint(3, 32, (rows, 20))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with mode():
        joint = model.generate(tokens, **options)
        assert len(made) == 2
        with monkeypatch.context() as patch:
            patch.setattr(few_rows, "LARGE", 1)
            patch.setattr(torch._C, "has_mkl", False)
            single = model.generate(tokens, **options)
    torch.testing.assert_close(torch.stack(joint.logits), torch.stack(single.logits), rtol=1e-4, atol=1e-5)


def test_what_was_trained_since_is_generated_with(made):
    """Also by an average of weights that is kept through `.data`."""
    torch.manual_seed(0)
    model, tokens = PerformerForCausalLM(PerformerConfig(**SIZES)), torch.randint(3, 32, (2, 20))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step():
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    def average():
        for parameter in model.parameters():
            parameter.data.mul_(1.5)

    for change in (step, average):
        model.eval().generate(tokens, **options)
        model.train()
        change()
        here = model.eval().generate(tokens, **options)
        new = PerformerForCausalLM(model.config).eval()
        new.load_state_dict(model.state_dict())
        there = new.generate(tokens, **options)
        torch.testing.assert_close(torch.stack(here.logits), torch.stack(there.logits), rtol=0, atol=0)
    assert made


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "starts anew"])
def test_behind_other_tokens_the_numbers_are_compared(made, goes_on):
    torch.manual_seed(0)
    model, tokens = PerformerForCausalLM(PerformerConfig(**SIZES)).eval(), torch.randint(3, 32, (1, 20))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        model(tokens[:, :1], past_key_values=cache)
        model.model.layers[0].self_attn.q_proj.weight.data.add_(1)
        if not goes_on:
            cache.reset()
        model(tokens, past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)
    assert len(made) == 3
