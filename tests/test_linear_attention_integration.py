"""linear_attention inside torch: operators, compiler, export, autocast, a second definition; and what it refuses.

Run: pytest tests/test_linear_attention_integration.py -k rejects
"""

import importlib.util
import sys

import pytest
import torch
from helpers import ROOT
from linear_attention_cases import (
    assert_equal_in_double,
    doubled,
    empty_state,
    make_inputs,
    make_map,
    random_mask,
    reference,
)

from hf_efficient.kernels import backend as backend_module
from hf_efficient.kernels.linear_attention import FeatureMap, LinearAttentionState, linear_attention


causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def forward_arguments(name, causal, masked, requires_grad, length=140):
    query, key, value = make_inputs(name, length, batch=1, heads=2)
    feature_map = make_map(name, 8)
    state = reference(*make_inputs(name, 5, batch=1, heads=2), feature_map)[1]
    leaves = (query, key, value, state.key_value, state.key_sum, feature_map.projection, feature_map.bias)
    for tensor in leaves:
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    mask = random_mask(1, length) if masked else None
    function, projection, bias, *options = feature_map
    return (query, key, value, *state, mask, projection, bias, function, *options, causal, requires_grad)


@causal_or_not
@pytest.mark.parametrize("name, masked", [("softmax", True), ("optimal-positive", False), ("relu-of-inputs", True)])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "inference"])
def test_opcheck_forward(name, masked, causal, requires_grad):
    operator = torch.ops.hf_efficient.linear_attention_forward.default
    torch.library.opcheck(operator, forward_arguments(name, causal, masked, requires_grad))


@causal_or_not
@pytest.mark.parametrize("name, masked", [("softmax", True), ("optimal-positive", False), ("relu-of-inputs", True)])
def test_opcheck_backward(name, masked, causal):
    arguments = [
        a.detach() if isinstance(a, torch.Tensor) else a for a in forward_arguments(name, causal, masked, True)
    ]
    query, key, value, _, _, log_scale, mask, projection, bias, *options, _ = arguments
    outputs = torch.ops.hf_efficient.linear_attention_forward(*arguments)
    gradients = [torch.randn_like(t) for t in outputs[:3]]
    wanted = (projection is not None, bias is not None)
    saved = (query, key, value, log_scale, mask, projection, bias)
    operator = torch.ops.hf_efficient.linear_attention_backward.default
    # It has no derivative of its own, which is what test_autograd_registration looks for.
    torch.library.opcheck(
        operator,
        (*gradients, *saved, *outputs, *options, *wanted),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def outputs_and_gradients(function, inputs, **options):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    output, state = function(*leaves, **options)
    loss = output.square().sum() + state.key_value.sum() + state.key_sum.sum()
    return [output.detach(), *(t.detach() for t in state), *torch.autograd.grad(loss, leaves)]


@causal_or_not
def test_compiles_to_one_graph(causal):
    """Forward and backward, without a break, for two lengths without a third compilation; nothing is unrolled."""
    torch.compiler.reset()
    feature_map = make_map("softmax", 8)
    nodes = []

    def count(graph, _):
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    def attend(query, key, value, mask):
        return linear_attention(query, key, value, feature_map, causal=causal, mask=mask)

    for length in (70, 150, 300):
        inputs, mask = make_inputs("softmax", length), random_mask(2, length)
        # test_performer_training.py generates code around it.
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        expected = outputs_and_gradients(attend, inputs, mask=mask)
        for actual, wanted in zip(outputs_and_gradients(compiled, inputs, mask=mask), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        # What the backward pass keeps has a symbolic shape too.
        torch.compile(attend, fullgraph=True, backend=count)(*(t.requires_grad_() for t in inputs), mask)
    assert len(nodes) <= 2 and max(nodes) < 60, nodes
    torch.compiler.reset()


def test_exports():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("projection", torch.randn(24, 8))

        def forward(self, query, key, value, mask):
            feature_map = FeatureMap("exponential", self.projection, None, 8**-0.25, 1e-6)
            return linear_attention(query, key, value, feature_map, causal=True, mask=mask).output

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {2: length} for name in ("query", "key", "value")} | {"mask": {1: length}}
    module = Attention()
    arguments = (*make_inputs("softmax", 70), random_mask(2, 70))
    program = torch.export.export(module, arguments, dynamic_shapes=shapes)
    for n in (70, 333):
        arguments = (*make_inputs("softmax", n), random_mask(2, n))
        assert torch.equal(program.module()(*arguments), module(*arguments))


@causal_or_not
@pytest.mark.parametrize("length", [1, 70])
def test_autocast_changes_nothing(causal, length):
    """Under autocast the sums stay in float32, whatever the model around them does."""
    feature_map = make_map("softmax", 8)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs("softmax", length, dtype=dtype)

        def attend(query, key, value):
            return linear_attention(query, key, value, feature_map, causal=causal)

        def attend_in_autocast(*tensors):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return attend(*tensors)

        expected, actual = (outputs_and_gradients(f, inputs) for f in (attend, attend_in_autocast))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            state = linear_attention(*inputs, feature_map, causal=causal).state
            read = linear_attention(inputs[0], None, None, feature_map, state=state).output
        with torch.no_grad():
            assert torch.equal(read, linear_attention(inputs[0], None, None, feature_map, state=state).output)


def test_a_second_definition_in_the_process_is_harmless():
    """A checkpoint brings its own copy of the code, which defines the operators anew."""
    folder = ROOT / "kernels"
    names = {"copied": folder, "copied.linear_attention": folder / "linear_attention"}
    try:
        sys.modules["copied"] = type(sys)("copied")
        sys.modules["copied"].__path__ = [str(folder)]
        spec = importlib.util.spec_from_file_location(
            "copied.linear_attention",
            folder / "linear_attention" / "__init__.py",
            submodule_search_locations=[str(folder / "linear_attention")],
        )
        copy = importlib.util.module_from_spec(spec)
        sys.modules["copied.linear_attention"] = copy
        spec.loader.exec_module(copy)
        assert copy.linear_attention is not linear_attention
        inputs, feature_map = make_inputs("softmax", 70), make_map("softmax", 8)
        exact = reference(*doubled(*inputs, feature_map), causal=True)[0]
        for function, maps in ((linear_attention, FeatureMap), (copy.linear_attention, copy.FeatureMap)):
            attend = torch.compile(lambda *t, f=function, m=maps: f(*t, m(*feature_map), causal=True), fullgraph=True)
            for call in (attend, lambda *t, f=function, m=maps: f(*t, m(*feature_map), causal=True)):
                results = outputs_and_gradients(call, inputs)
                torch.testing.assert_close(results[0].double(), exact, rtol=1e-4, atol=1e-5)
    finally:
        for name in [n for n in sys.modules if n in names or n.startswith("copied.")]:
            del sys.modules[name]
        torch.compiler.reset()


def test_double_precision_stays_double():
    inputs, feature_map = make_inputs("softmax", 70, dtype=torch.float64), make_map("softmax", 8)
    output, state = linear_attention(*inputs, feature_map, causal=True)
    assert output.dtype == torch.float64 and all(part.dtype == torch.float64 for part in state)
    assert_equal_in_double(output, reference(*inputs, feature_map, causal=True)[0], "output")


@causal_or_not
def test_nothing_to_attend_from(causal):
    """No query rows: an empty output, and a state that still counts the keys."""
    query, key, value = make_inputs("softmax", 0, keys=0 if causal else 9)
    output, state = linear_attention(query, key, value, make_map("softmax", 8), causal=causal)
    assert output.shape == (2, 3, 0, 5)
    assert state.key_sum.any() != causal


def good():
    query, key, value = make_inputs("softmax", 9)
    return {"query": query, "key": key, "value": value, "feature_map": make_map("softmax", 8)}


def state_for(call):
    return empty_state(call["query"], call["value"], call["feature_map"])


def with_map(**changes):
    return lambda call: {"feature_map": call["feature_map"]._replace(**changes)}


def with_state(field, change):
    return lambda call: {"state": state_for(call)._replace(**{field: change(getattr(state_for(call), field))})}


REJECTED = {
    "query of three dimensions": (lambda c: {"query": c["query"][0]}, r"query must have shape .*, got \(3, 9, 8\)"),
    "integer query": (lambda c: {"query": c["query"].long()}, "query must be floating point, got torch.int64"),
    "key of another dtype": (lambda c: {"key": c["key"].half()}, "key must be like query, torch.float32.*float16"),
    "value on another device": (lambda c: {"value": c["value"].to("meta")}, "value must be like query.*got.*meta"),
    "another number of heads": (
        lambda c: {"key": c["key"][:, :2]},
        r"key must start with \(2, 3\), got \(2, 2, 9, 8\)",
    ),
    "key of another size": (lambda c: {"key": c["key"][..., :5]}, "key must have size 8 like query, got 5"),
    "values of another length": (
        lambda c: {"value": c["value"][:, :, :5]},
        "value must have length 9 like key, got 5",
    ),
    "causal with fewer keys": (
        lambda c: {"causal": True, "key": c["key"][:, :, :4], "value": c["value"][:, :, :4]},
        "causal attention needs as many keys as queries, 9, got 4",
    ),
    "key alone": (lambda c: {"value": None}, "key and value must be given together"),
    "nothing to read": (lambda c: {"key": None, "value": None}, "a state must be given"),
    "causal reading": (
        lambda c: {"key": None, "value": None, "state": state_for(c), "causal": True},
        "causal must be False",
    ),
    "mask of another length": (
        lambda c: {"mask": torch.ones(2, 8).bool()},
        r"mask must have shape \(2, 9\), got \(2, 8\)",
    ),
    "mask without keys": (
        lambda c: {"key": None, "value": None, "state": state_for(c), "mask": torch.ones(2, 9).bool()},
        "mask must be None without key",
    ),
    # The additive masks of softmax attention are zero where a key counts: read as flags they would mean the opposite.
    "additive mask": (lambda c: {"mask": torch.zeros(2, 9)}, "mask must be bool or integer.*got torch.float32"),
    "mask on another device": (
        lambda c: {"mask": torch.ones(2, 9).bool().to("meta")},
        "mask must be on cpu, got meta",
    ),
    "unknown function": (with_map(function="tanh"), "feature_map.function must be one of .*'relu'.*, got 'tanh'"),
    "projection of another size": (
        with_map(projection=torch.randn(24, 7)),
        r"feature_map.projection must have shape \[features, 8\], got \(24, 7\)",
    ),
    "bias of another size": (with_map(bias=torch.randn(23)), r"feature_map.bias must have shape \(24,\), got \(23,\)"),
    "projection on another device": (
        with_map(projection=torch.empty(24, 8, device="meta")),
        "feature_map.projection must be floating point on cpu, got torch.float32 on meta",
    ),
    "integer bias": (
        with_map(bias=torch.ones(24).long()),
        "feature_map.bias must be floating point on cpu, got torch.int64 on cpu",
    ),
    "negative epsilon": (with_map(epsilon=-1e-3), "feature_map.epsilon must not be negative, got -0.001"),
    "state of another size": (
        with_state("key_value", lambda t: t[:, :, :20]),
        r"state.key_value must have shape \(2, 3, 24, 5\), got \(2, 3, 20, 5\)",
    ),
    "sums of another size": (
        with_state("key_sum", lambda t: t[:, :, :20]),
        r"state.key_sum must have shape \(2, 3, 24\), got \(2, 3, 20\)",
    ),
    "scale of another size": (
        with_state("log_scale", lambda t: t[:, :1]),
        r"state.log_scale must have shape \(2, 3\), got \(2, 1\)",
    ),
    # A state in bfloat16 would lose a key per few hundred: sums need the digits.
    "state in half precision": (
        with_state("key_sum", lambda t: t.half()),
        "state.key_sum must be torch.float32 on cpu, got torch.float16 on cpu",
    ),
    "unknown backend": (lambda c: {"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'eager', got 'cuda'"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    change, message = REJECTED[name]
    call = good()
    linear_attention(**call)
    call |= change(call)
    with pytest.raises(ValueError, match=message):
        linear_attention(**call)


def test_auto_backend_is_eager(monkeypatch):
    decisions = []

    def spy(*arguments, **options):
        decisions.append(backend_module.resolve_backend(*arguments, **options))
        return decisions[-1]

    module = sys.modules["hf_efficient.kernels.linear_attention.api"]
    monkeypatch.setattr(module, "resolve_backend", spy)
    automatic, explicit = (linear_attention(**good(), backend=b).output.shape for b in ("auto", "eager"))
    assert decisions == ["eager", "eager"] and automatic == explicit


def test_state_is_a_plain_tuple_of_tensors():
    """Caches move, reorder and offload it without knowing what it is."""
    state = linear_attention(**good()).state
    moved = LinearAttentionState(*(t.index_select(0, torch.tensor([1, 1])) for t in state))
    again = linear_attention(**good(), state=moved).output
    assert torch.isfinite(again).all()
