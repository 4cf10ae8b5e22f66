"""Several linear layers as one product: what the layers give, whatever happens to them between two steps."""

import copy
import gc
import pickle
import types
import weakref

import pytest
import torch
from helpers import assert_within_budget
from torch import nn

from hf_efficient import PerformerConfig, PerformerForCausalLM
from hf_efficient.modeling import few_rows, joint_projection
from hf_efficient.modeling.joint_projection import IN_VAIN, JointProjection


SIZES = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def make_layers(bias=False, outputs=(6, 6, 8)):
    torch.manual_seed(0)
    return tuple(nn.Linear(8, size, bias=bias) for size in outputs)


def one_by_one(layers, rows):
    return torch.cat([layer(rows) for layer in layers], dim=-1)


def assert_joint(joint, layers, rows, cache):
    torch.testing.assert_close(joint(layers, rows, cache), one_by_one(layers, rows))


def new_cache():
    return types.SimpleNamespace(joint_stamp=None)


@pytest.fixture
def made(monkeypatch):
    """The layers whose weights were copied, each time."""
    seen, make_copy = [], joint_projection._Copy.of

    def watched(layers):
        seen.append(layers)
        return make_copy(layers)

    monkeypatch.setattr(joint_projection._Copy, "of", watched)
    return seen


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("count", [0, 1, 3, 16])
@torch.no_grad()
def test_the_layers_own_results(made, count, bias):
    layers, rows, cache, joint = make_layers(bias), torch.randn(count, 8), new_cache(), JointProjection()
    oracle = one_by_one([copy.deepcopy(layer).double() for layer in layers], rows.double())
    for _ in range(3):
        assert_within_budget(joint(layers, rows, cache), oracle, one_by_one(layers, rows), "product")
    assert len(made) == 1


def write(layers):
    layers[1].weight.mul_(2)


def replace_the_parameter(layers):
    layers[1].weight = nn.Parameter(torch.randn(6, 8))


def replace_the_numbers(layers):
    layers[1].weight.data = torch.randn(6, 8)


def load(layers):
    layers[2].load_state_dict({"weight": torch.randn(8, 8)})


def give_a_bias(layers):
    for layer in layers:
        layer.bias = nn.Parameter(torch.randn(layer.out_features))


@torch.inference_mode()
def write_in_inference_mode(layers):
    layers[1].weight.mul_(2)


CHANGES = [write, write_in_inference_mode, replace_the_parameter, replace_the_numbers, load, give_a_bias]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_noticed_between_two_steps(made, change):
    layers, rows, cache, joint = make_layers(), torch.randn(1, 8), new_cache(), JointProjection()
    assert_joint(joint, layers, rows, cache)
    change(layers)
    assert_joint(joint, layers, rows, cache)
    assert len(made) == 2


@torch.no_grad()
def test_a_change_that_torch_does_not_count_is_noticed_with_the_next_cache(made):
    layers, rows, joint = make_layers(bias=True), torch.randn(1, 8), JointProjection()
    for name in ("weight", "bias"):
        assert_joint(joint, layers, rows, new_cache())
        version = getattr(layers[2], name)._version
        getattr(layers[2], name).data.add_(1)  # as averages of weights are often kept
        assert getattr(layers[2], name)._version == version
    assert_joint(joint, layers, rows, new_cache())
    assert len(made) == 3
    assert_joint(joint, layers, rows, new_cache())
    assert len(made) == 3


@pytest.mark.parametrize("broken", [False, True], ids=["numbers", "not a number"])
@torch.no_grad()
def test_two_generations_at_a_time_share_the_copy(made, broken):
    layers, rows, joint = make_layers(), torch.randn(1, 8), JointProjection()
    if broken:
        layers[0].weight[0, 0] = torch.nan
    caches = new_cache(), new_cache()
    for _ in range(3):
        for cache in caches:
            result = joint(layers, rows, cache)
            torch.testing.assert_close(result, one_by_one(layers, rows), equal_nan=True)
    for another in (copy.deepcopy(caches[0]), pickle.loads(pickle.dumps(caches[0]))):
        assert joint(layers, rows, another) is not None
    assert len(made) == 1


@torch.no_grad()
def test_weights_that_are_others_in_every_step_are_not_copied_for_ever(made):
    layers, rows, cache, joint = make_layers(), torch.randn(1, 8), new_cache(), JointProjection()
    for step in range(IN_VAIN + 3):
        layers[0].weight.add_(1)
        assert (joint(layers, rows, cache) is None) is (step >= IN_VAIN)
    assert len(made) == IN_VAIN
    cache.joint_stamp = None  # another sequence, in which they are others only once in a while
    for _ in range(2 * IN_VAIN):
        layers[0].weight.add_(1)
        for _ in range(2):
            assert_joint(joint, layers, rows, cache)


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


def replace_by_one_of_the_same_weight(layers):
    other = Doubled(8, 6, bias=False)
    other.weight = layers[1].weight
    return layers[0], other, layers[2]


def transpose(layers):
    layers[2].weight.data = layers[2].weight.data.t()
    return layers


OTHERS = [replace_by_one_of_the_same_weight, transpose]
OTHERS += [hook, hook_before, wrap, use_another, give_one_a_bias, make_double, make_in_inference_mode]


@pytest.mark.parametrize("warm", [False, True], ids=["at once", "in between"])
@pytest.mark.parametrize("change", OTHERS)
@torch.no_grad()
def test_layers_that_are_more_than_their_weights_are_called(change, warm):
    layers, rows, cache, joint = make_layers(), torch.randn(1, 8), new_cache(), JointProjection()
    if warm:
        assert joint(layers, rows, cache) is not None
    assert joint(change(layers), rows, cache) is None


@torch.no_grad()
def test_where_layers_are_called(monkeypatch):
    layers, rows, cache, joint = make_layers(), torch.randn(2, 8), new_cache(), JointProjection()
    assert joint(layers, rows, cache) is not None
    with torch.enable_grad():
        assert joint(layers, rows, cache) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert joint(layers, rows, cache) is None
    assert joint(layers, rows.double(), cache) is None
    assert joint(layers, rows, types.SimpleNamespace()) is None  # of an older copy of this code
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output)
    assert joint(layers, rows, cache) is None
    handle.remove()
    monkeypatch.setattr(few_rows, "LARGE", 2 * 8 * 8 + 1)  # more than two rows of the largest of them
    for either in (cache, new_cache()):
        assert joint(layers, rows, either) is not None
        assert joint(layers, torch.randn(3, 8), either) is None
    monkeypatch.setattr(few_rows, "LARGE", 8 * 8)
    assert joint(layers, rows, new_cache()) is None


@torch.no_grad()
def test_a_compiler_sees_the_layers():
    layers, rows, cache, joint = make_layers(), torch.randn(1, 8), new_cache(), JointProjection()
    assert joint(layers, rows, cache) is not None
    compiled = torch.compile(lambda rows: joint(layers, rows, cache), fullgraph=True, backend="eager")
    assert compiled(rows) is None


@torch.no_grad()
def test_the_copy_is_the_models_alone():
    model, tokens = PerformerForCausalLM(PerformerConfig(**SIZES)).eval(), torch.randint(3, 32, (1, 20))
    names = model.state_dict().keys()

    def copies(model):
        return [layer.self_attn.joint_projection._copy for layer in model.model.layers]

    model.generate(tokens, max_new_tokens=3)
    assert None not in copies(model) and model.state_dict().keys() == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copies(other) == [None, None]
    assert copies(model.double()) == [None, None]
    # It keeps nobody alive.
    model.float().generate(tokens, max_new_tokens=3)
    left = weakref.ref(model)
    del model, other
    gc.collect()
    assert left() is None


@torch.no_grad()
def test_a_step_that_is_not_plain_compares_nothing(monkeypatch):
    """With so little under the features, every step goes through `linear_attention`."""
    config = PerformerConfig(**SIZES, feature_epsilon=1e-12)
    model, tokens, compared = PerformerForCausalLM(config).eval(), torch.randint(3, 32, (1, 20)), []
    monkeypatch.setattr(joint_projection._Copy, "equals", lambda known, layers: compared.append(layers) or True)
    for _ in range(2):
        model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert len(compared) == 2  # each layer once, at the second generation


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
            patch.setattr(JointProjection, "__call__", lambda *arguments: None)
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
    assert (
        len(made) == 2 * (2 * 2 + 2) - 2
    )  # two layers, each before and after a change and anew; once before is after


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
