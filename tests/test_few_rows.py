"""Linear layers of few rows on a CPU: the layer's own result, divided where that is allowed and nowhere else."""

import pytest
import torch
from helpers import assert_within_budget
from torch import nn

from hf_efficient import (
    CoLT5Config,
    CoLT5ForCausalLM,
    PerceiverFlashConfig,
    PerceiverFlashForCausalLM,
    PerformerConfig,
    PerformerForCausalLM,
    XTransformerConfig,
    XTransformerForCausalLM,
)
from hf_efficient.modeling import few_rows
from hf_efficient.modeling.few_rows import FEW, project
from hf_efficient.modeling.zero_linear import ZeroLinear


@pytest.fixture
def divided(monkeypatch):
    """The numbers of blocks of the products that were divided, on a machine that has three threads and MKL."""
    seen, multiply = [], few_rows._multiply

    def watched(left, right, summand):
        seen.append(len(left))
        return multiply(left, right, summand)

    monkeypatch.setattr(few_rows, "_multiply", watched)
    monkeypatch.setattr(torch._C, "has_mkl", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(few_rows, "LARGE", 1)
    monkeypatch.setattr(few_rows, "LEAST", 1)
    return seen


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("sizes", [(40, 96), (96, 40), (48, 48), (48, 95)], ids=str)
@pytest.mark.parametrize("leading", [(1,), (1, 1), (2, 1), (3, 1), (FEW, 1), (2, 5), ()], ids=str)
@torch.no_grad()
def test_the_layers_own_result(divided, leading, sizes, bias):
    inputs, outputs = sizes
    layer, states = nn.Linear(inputs, outputs, bias=bias), torch.randn(*leading, inputs)
    result = project(layer, states)
    assert divided == [3]
    assert result.shape == (*leading, outputs) and result.is_contiguous()
    oracle = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert_within_budget(result, oracle, layer(states), "product")


@torch.no_grad()
def test_strides_do_not_matter(divided):
    layer, states = nn.Linear(40, 96), torch.randn(2, 4, 40)
    for view in (states[:, -1:], states.transpose(0, 1), states[..., :1].expand(2, 4, 40)):
        torch.testing.assert_close(project(layer, view), layer(view))
    assert len(divided) == 3


class Doubled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


def hooked():
    layer = nn.Linear(8, 6)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def hooked_before():
    layer = nn.Linear(8, 6)
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return layer


def wrapped():
    """As accelerate's `add_hook_to_module` does it."""
    layer = nn.Linear(8, 6)
    plain = layer.forward
    layer.forward = lambda states: plain(states) - 1
    return layer


def sparse():
    layer = nn.Linear(8, 6, bias=False)
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr(), requires_grad=False)
    return layer


def biased_by_a_buffer():
    layer = nn.Linear(8, 6)
    bias = layer.bias.detach()
    del layer.bias
    layer.register_buffer("bias", bias)
    return layer


def biased_as_one():
    layer = nn.Linear(8, 6)
    layer.bias = nn.Parameter(torch.ones(1))
    return layer


def transposed():
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(torch.randn(8, 6).t())
    return layer


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))


OTHERS = [hooked, hooked_before, wrapped, sparse, biased_by_a_buffer, biased_as_one, transposed, parametrized]


@pytest.mark.parametrize("make", [lambda: Doubled(8, 6), nn.Identity, *OTHERS])
@torch.no_grad()
def test_a_layer_that_is_more_than_its_weight_is_called(divided, make):
    layer, states = make(), torch.randn(1, 8)
    torch.testing.assert_close(project(layer, states), layer(states), rtol=0, atol=0)
    assert not divided


@torch.no_grad()
def test_what_is_not_divided(divided, monkeypatch):
    layer, states = nn.Linear(8, 6), torch.randn(1, 8)
    with torch.enable_grad():
        assert project(layer, states).requires_grad
    project(layer, torch.randn(FEW + 1, 8))
    assert project(layer, torch.randn(0, 8)).shape == (0, 6)
    project(layer.bfloat16(), states.bfloat16())
    layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(layer, states).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # as the layer says it
        project(layer, torch.randn(2, 4))
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: 7 * output)
    torch.testing.assert_close(project(layer, states), 7 * layer.forward(states), rtol=0, atol=0)
    handle.remove()
    monkeypatch.setattr(few_rows, "LARGE", 8 * 6 * 2)
    project(layer, states)
    assert not divided
    project(layer, torch.randn(2, 8))
    assert divided == [3]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    project(layer, torch.randn(2, 8))
    monkeypatch.setattr(torch._C, "has_mkl", False)
    project(layer, torch.randn(2, 8))
    assert divided == [3]


@torch.no_grad()
def test_blocks_are_not_cut_too_small(divided, monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST", 3)
    project(nn.Linear(8, 6), torch.randn(1, 8))
    project(ZeroLinear(8, 9), torch.randn(1, 8))  # a subclass that starts from other weights is one as well
    project(nn.Linear(8, 5), torch.randn(1, 8))
    assert divided == [2, 3]


@torch.no_grad()
def test_a_graph_is_one_for_any_number_of_rows(divided):
    """What is traced with many rows runs with few: no tracer sees the sizes compared."""
    layer = nn.Linear(8, 6)

    class Projection(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, states):
            return project(self.layer, states)

    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(Projection(), (torch.randn(20, 8),), dynamic_shapes={"states": {0: rows}})
    few = torch.randn(2, 8)
    torch.testing.assert_close(program.module()(few), layer(few))
    torch.testing.assert_close(torch.fx.symbolic_trace(Projection())(few), layer(few))
    assert not divided


@torch.no_grad()
def test_a_compiler_sees_the_layer(divided):
    layer, states = nn.Linear(8, 6), torch.randn(1, 8)
    compiled = torch.compile(lambda states: project(layer, states), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(states), layer(states), rtol=0, atol=0)
    assert not divided


@pytest.fixture
def written_out(monkeypatch):
    """The sizes of the weights whose products were written out, on a machine with two threads whose MKL is slow."""
    seen, write_out = [], few_rows._written_out

    def watched(row, weight, bias):
        seen.append(tuple(weight.shape))
        return write_out(row, weight, bias)

    monkeypatch.setattr(few_rows, "_written_out", watched)
    monkeypatch.setattr(few_rows, "_reads_slowly", lambda: True)
    monkeypatch.setattr(torch._C, "has_mkl", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return seen


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("leading", [(1,), (1, 1), ()], ids=str)
@torch.no_grad()
def test_a_single_row_is_written_out(written_out, leading, bias):
    layer, states = nn.Linear(256, 300, bias=bias), torch.randn(*leading, 256)
    result = project(layer, states)
    assert written_out == [(300, 256)] and result.shape == (*leading, 300)
    oracle = nn.functional.linear(states.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert_within_budget(result, oracle, layer(states), "product")


@torch.no_grad()
def test_what_is_not_written_out(written_out, monkeypatch):
    layer, row = nn.Linear(256, 256), torch.randn(1, 256)
    project(layer, torch.randn(2, 256))  # two rows
    project(nn.Linear(256, 255), row)  # a small weight
    project(nn.Linear(256, 2048), row)  # a large one
    for owner, name, other in (
        (few_rows, "_reads_slowly", lambda: False),
        (torch, "get_num_threads", lambda: 1),
        (torch._C, "has_mkl", False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            project(layer, row)
    assert not written_out
    project(layer, row)
    assert written_out == [(256, 256)]


@pytest.mark.parametrize("text, slow", [("vendor_id\t: AuthenticAMD", True), ("vendor_id\t: GenuineIntel", False)])
def test_whose_processor_it_is(monkeypatch, text, slow):
    monkeypatch.setattr(few_rows.Path, "read_text", lambda path, errors: text)
    assert few_rows._reads_slowly.__wrapped__() is slow

    def fail(path, errors):
        raise FileNotFoundError(path)

    monkeypatch.setattr(few_rows.Path, "read_text", fail)
    monkeypatch.setattr(few_rows.platform, "processor", lambda: text)
    assert few_rows._reads_slowly.__wrapped__() is slow


SIZES = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
MODELS = {
    "performer": lambda: PerformerForCausalLM(PerformerConfig(**SIZES, gated_feed_forward=True)),
    "performer with softmax": lambda: PerformerForCausalLM(
        PerformerConfig(**SIZES, layer_types=["full_attention", "linear_attention"])
    ),
    "x_transformer": lambda: XTransformerForCausalLM(XTransformerConfig(**SIZES, gated_feed_forward=True)),
    "colt5": lambda: CoLT5ForCausalLM(CoLT5Config(**SIZES, is_decoder=True)),
    "perceiver_flash": lambda: PerceiverFlashForCausalLM(
        PerceiverFlashConfig(vocab_size=32, hidden_size=32, num_attention_heads=2, is_decoder=True, num_latents=16)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_every_decoder_is_divided(divided, monkeypatch, name):
    torch.manual_seed(0)
    direct, forward = [], nn.Linear.forward

    def counted(layer, states):
        if states.numel() // states.shape[-1] <= FEW:
            direct.append(layer)
        return forward(layer, states)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    monkeypatch.setattr(few_rows, "_LINEAR", counted)
    model, tokens = MODELS[name]().eval(), torch.randint(3, 32, (2, 20))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with_blocks = model.generate(tokens, **options)
    assert len(divided) >= 5 * (2 * 6 + 1) and not direct
    monkeypatch.setattr(few_rows, "LARGE", 2**62)
    before = len(divided)
    without = model.generate(tokens, **options)
    assert len(divided) == before
    torch.testing.assert_close(torch.stack(with_blocks.logits), torch.stack(without.logits), rtol=1e-4, atol=1e-5)
