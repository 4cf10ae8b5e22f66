"""soft_topk inside torch: operators, compiler, export, autocast, a second definition; and what it refuses.

Run: pytest tests/test_soft_topk_integration.py -k rejects
"""

import importlib.util
import sys

import pytest
import torch
from helpers import ROOT
from soft_topk_cases import METHODS, gradients, make_rows, temperatures

from hf_efficient.kernels.soft_topk import selection, soft_topk
from hf_efficient.kernels.soft_topk.autograd import soft_topk_exact, soft_topk_exact_operator


every_method = pytest.mark.parametrize("method", METHODS)


def operator_arguments(method, masked, requires_grad, backend="eager"):
    logits, k, mask, _ = make_rows(3, 70)
    tensors = [t.requires_grad_(requires_grad) for t in (logits, k)]
    setting = 0.3 if method == "exact" else temperatures(5, 0.3)
    return (*tensors, mask if masked else None, setting, 9, backend)


def operators(method):
    name = "soft_topk_exact" if method == "exact" else "soft_topk_descent"
    return getattr(torch.ops.hf_efficient, name).default, getattr(torch.ops.hf_efficient, f"{name}_backward").default


@every_method
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "inference"])
def test_opcheck_forward(method, masked, requires_grad):
    torch.library.opcheck(operators(method)[0], operator_arguments(method, masked, requires_grad))


@every_method
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
def test_opcheck_backward(method, masked):
    forward, backward = operators(method)
    logits, k, mask, setting, selected, backend = operator_arguments(method, masked, False)
    saved = forward(logits, k, mask, setting, selected, backend)[2:]
    inputs = (logits, mask) if method == "exact" else (logits, k, mask)
    # It has no derivative of its own, which is what test_autograd_registration looks for.
    torch.library.opcheck(
        backward,
        (torch.randn_like(logits), *inputs, *saved, setting, backend),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_way_without_an_operator_gives_the_same(dtype, masked):
    """Eager code goes around the operator, for speed: to the bit the same outputs and gradients, and as many."""
    logits, k, mask, weights = make_rows(3, 70, dtype)
    options = (mask if masked else None, 0.3, 9, "eager")
    results = []
    for function in (soft_topk_exact, soft_topk_exact_operator):
        leaves = [tensor.clone().requires_grad_() for tensor in (logits, k)]
        outputs = function(*leaves, *options)
        assert [output.requires_grad for output in outputs] == [True, False, False, False]
        grads = torch.autograd.grad(outputs[0], leaves, weights.to(dtype))
        results.append((*outputs, *grads, *function(logits, k, *options)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    assert "soft_topk_exact" not in type(soft_topk_exact(*leaves, *options)[0].grad_fn).__name__


@every_method
def test_compiles_to_one_graph(method):
    """Forward and backward, without a break, for several lengths without a third compilation; nothing is unrolled.

    Without generating code, which takes most of the time and which `test_a_second_definition…` does for both methods.
    """
    torch.compiler.reset()
    nodes = []

    def count(graph, _):
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    def route(logits, k, mask, weights=None):
        return soft_topk(logits, k, mask=mask, method=method, eps=0.3, num_selected=9, sorted_by="logit")

    for columns in (70, 150, 200):
        logits, k, mask, weights = make_rows(3, columns)
        compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
        expected = gradients(route, logits, k, weights, mask=mask)
        for actual, wanted in zip(gradients(compiled, logits, k, weights, mask=mask), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
        assert torch.equal(compiled(logits, k, mask).indices, route(logits, k, mask).indices)
        torch.compile(route, fullgraph=True, backend=count)(logits, k, mask)
    assert len(nodes) <= 2 and max(nodes) < 60, nodes
    torch.compiler.reset()


def test_whole_number_of_k_compiles():
    torch.compiler.reset()
    route = torch.compile(lambda logits: soft_topk(logits, 5), fullgraph=True)
    logits = torch.randn(2, 3, 40)
    for actual, wanted in zip(route(logits), soft_topk(logits, 5), strict=True):
        torch.testing.assert_close(actual, wanted)
    torch.compiler.reset()


def test_exports():
    class Router(torch.nn.Module):
        def forward(self, logits, mask):
            output = soft_topk(logits, 5, mask=mask)
            return output.scores, output.indices

    columns = torch.export.Dim("columns", min=6, max=4096)
    shapes = {"logits": {1: columns}, "mask": {1: columns}}
    logits, _, mask, _ = make_rows(2, 70)
    program = torch.export.export(Router(), (logits, mask), dynamic_shapes=shapes)
    for n in (70, 333):
        logits, _, mask, _ = make_rows(2, n)
        for actual, wanted in zip(program.module()(logits, mask), Router()(logits, mask), strict=True):
            assert torch.equal(actual, wanted)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_changes_nothing(method, dtype):
    logits, k, mask, weights = make_rows(3, 70, dtype)

    def route(logits, k):
        return soft_topk(logits, k, mask=mask, method=method, eps=0.1)

    def route_in_autocast(logits, k):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return route(logits, k)

    expected, actual = (gradients(f, logits, k, weights) for f in (route, route_in_autocast))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_second_definition_in_the_process_is_harmless():
    """A checkpoint brings its own copy of the code, which defines the operators anew."""
    folder = ROOT / "kernels"
    try:
        sys.modules["copied"] = type(sys)("copied")
        sys.modules["copied"].__path__ = [str(folder)]
        spec = importlib.util.spec_from_file_location(
            "copied.soft_topk",
            folder / "soft_topk" / "__init__.py",
            submodule_search_locations=[str(folder / "soft_topk")],
        )
        copy = importlib.util.module_from_spec(spec)
        sys.modules["copied.soft_topk"] = copy
        spec.loader.exec_module(copy)
        assert copy.soft_topk is not soft_topk
        logits, k, mask, weights = make_rows(3, 70)
        for method in METHODS:
            results = []
            for function in (soft_topk, copy.soft_topk):

                def route(logits, k, function=function, method=method):
                    return function(logits, k, mask=mask, method=method)

                results += [gradients(f, logits, k, weights) for f in (route, torch.compile(route, fullgraph=True))]
            for other in results[1:]:
                for actual, wanted in zip(other, results[0], strict=True):
                    torch.testing.assert_close(actual, wanted)
    finally:
        for name in [n for n in sys.modules if n == "copied" or n.startswith("copied.")]:
            del sys.modules[name]
        torch.compiler.reset()


REJECTED = {
    "no dimension": ({"logits": torch.tensor(1.0)}, r"logits must have shape \[..., N\] .*, got \(\)"),
    "empty rows": ({"logits": torch.randn(2, 0)}, r"logits must have shape .*, got \(2, 0\)"),
    "integer logits": ({"logits": torch.ones(2, 9).long()}, "logits must be floating point, got torch.int64"),
    "complex logits": ({"logits": torch.ones(2, 9).cfloat()}, "logits must be floating point, got torch.complex64"),
    "negative k": ({"k": -1}, "k must be a number, finite and not negative, or a tensor, got -1"),
    "infinite k": ({"k": float("inf")}, "k must be a number, finite and not negative.*got inf"),
    "k that is no number": ({"k": float("nan")}, "k must be a number, finite.*got nan"),
    "k as text": ({"k": "3"}, "k must be a number.*got '3'"),
    "k as a flag": ({"k": True}, "k must be a number.*got True"),
    "k for other rows": (
        {"k": torch.ones(3)},
        r"k must be a number or a tensor of shape \(2,\) or \(\), got \(3,\)",
    ),
    "k with one axis too many": ({"k": torch.ones(2, 1)}, r"k must be .* got \(2, 1\)"),
    "boolean k": ({"k": torch.ones(2).bool()}, "k must be integer or floating point, got torch.bool"),
    "k on another device": ({"k": torch.ones(2, device="meta")}, "k must be on cpu, got meta"),
    "unknown method": ({"method": "sinkhorn"}, "method must be one of 'exact', 'coordinate_descent', got 'sinkhorn'"),
    "unknown order": ({"sorted_by": "score"}, "sorted_by must be one of 'position', 'logit', got 'score'"),
    "eps of zero": ({"eps": 0.0}, "eps must be finite and above zero, got 0.0"),
    "negative eps": ({"eps": -1}, "eps must be finite and above zero, got -1"),
    "eps that is no number": ({"eps": float("nan")}, "eps must be finite and above zero, got nan"),
    "eps_init of zero": ({"eps_init": 0}, "eps_init must be finite and above zero, got 0"),
    "rising temperature": ({"eps_decay": 1.5}, "eps_decay must not be above 1, got 1.5"),
    "eps_decay of zero": ({"eps_decay": 0.0}, "eps_decay must be finite and above zero, got 0.0"),
    "no iterations": ({"n_iters": 0}, "n_iters must be an integer of at least 1, got 0"),
    "half an iteration": ({"n_iters": 2.5}, "n_iters must be an integer of at least 1, got 2.5"),
    "mask of another length": ({"mask": torch.ones(2, 8).bool()}, r"mask must have shape \(2, 9\), got \(2, 8\)"),
    "mask of one row": ({"mask": torch.ones(9).bool()}, r"mask must have shape \(2, 9\), got \(9,\)"),
    # The additive masks of softmax attention are zero where a key counts: read as flags they would mean the opposite.
    "additive mask": ({"mask": torch.zeros(2, 9)}, "mask must be bool.*got torch.float32"),
    "mask on another device": ({"mask": torch.ones(2, 9, device="meta").bool()}, "mask must be on cpu, got meta"),
    "more indices than logits": ({"num_selected": 10}, "num_selected must be an integer from 0 to N = 9, got 10"),
    "negative number of indices": ({"num_selected": -1}, "num_selected must be an integer from 0 to N = 9, got -1"),
    "unknown backend": ({"backend": "cuda"}, "backend must be one of 'auto', 'triton', 'eager', got 'cuda'"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name):
    change, message = REJECTED[name]
    call = {"logits": torch.randn(2, 9), "k": 3}
    soft_topk(**call)
    with pytest.raises(ValueError, match=message):
        soft_topk(**call | change)


def test_double_precision_stays_double():
    logits, k, mask, _ = make_rows(3, 70, torch.float64)
    for method in METHODS:
        output = soft_topk(logits, k, mask=mask, method=method)
        assert output.scores.dtype == output.threshold.dtype == torch.float64
    halves = soft_topk(logits.half(), 5)
    assert halves.scores.dtype == torch.float16 and halves.threshold.dtype == torch.float32


@pytest.mark.parametrize("many", [1, 10**6], ids=["torch", "numpy"])
def test_results_are_where_the_logits_are(many, monkeypatch):
    """Whatever device tensors are made on by default."""
    monkeypatch.setattr(selection, "MANY_THREADS", many)
    logits = torch.randn(2, 40, requires_grad=True)
    with torch.device("meta"):
        output = soft_topk(logits, 5)
        output.scores.backward(torch.ones(2, 40, device="cpu"))
    assert {part.device.type for part in (*output, logits.grad)} == {"cpu"}


def test_thresholds_near_the_largest_number_are_numbers():
    lowest = torch.finfo(torch.bfloat16).min
    logits = torch.tensor([[1.0, lowest, lowest, lowest], [3e38, 2e38, 1.0, 0.0]])
    threshold = soft_topk(logits, torch.tensor([2.0, 1.0])).threshold
    assert threshold.tolist() == pytest.approx([lowest, 3e38], rel=1e-6)
