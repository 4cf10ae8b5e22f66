"""soft_topk inside torch.func and tracers: what works is exact, and what has no derivative says so.

Run: pytest tests/test_soft_topk_transforms.py
"""

import pytest
import torch
from soft_topk_cases import METHODS, gradients, make_rows
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from hf_efficient.kernels.soft_topk import soft_topk


@pytest.fixture(params=METHODS)
def route(request):
    """Scores of one method, at a temperature at which some saturate."""
    return lambda logits, k, mask=None: soft_topk(logits, k, mask=mask, method=request.param, eps=0.1).scores


def loss_of(route, weights):
    return lambda logits, k, mask=None: (route(logits, k, mask) * weights).sum()


def test_gradients_are_autograds(route):
    logits, k, mask, weights = make_rows(3, 70)
    _, *expected = gradients(lambda *inputs: (route(*inputs, mask),), logits, k, weights)
    actual = grad(loss_of(route, weights), argnums=(0, 1))(logits, k, mask)
    for found, wanted in zip(actual, expected, strict=True):
        assert wanted.abs().max() > 0 and torch.equal(found, wanted)
    # Every row of the Jacobian is a backward pass: a batch of them is one.
    jacobian = jacrev(route)(logits[0], 5)
    assert torch.equal(jacobian, torch.autograd.functional.jacobian(lambda row: route(row, 5), logits[0]))


def test_batches_of_calls_are_the_calls(route):
    logits, k, mask, weights = make_rows(6, 70)
    logits, mask, weights = (tensor.view(2, 3, 70) for tensor in (logits, mask, weights))
    k = k.view(2, 3)
    expected = torch.stack([route(*call) for call in zip(logits, k, mask, strict=True)])
    assert torch.equal(vmap(route)(logits, k, mask), expected)
    assert torch.equal(vmap(vmap(route))(logits, k, mask), expected)
    turned = (logits.permute(1, 2, 0), k.T, mask.transpose(0, 1))
    assert torch.equal(vmap(route, in_dims=(2, 1, 1))(*turned), expected)
    shared = torch.stack([route(call, k[0], mask[0]) for call in logits])
    assert torch.equal(vmap(route, in_dims=(0, None, None))(logits, k[0], mask[0]), shared)
    # Gradients of each call by itself.
    per_call = vmap(lambda w, *call: grad(loss_of(route, w))(*call))(weights, logits, k, mask)
    for index, found in enumerate(per_call):
        assert torch.equal(found, grad(loss_of(route, weights[index]))(logits[index], k[index], mask[index]))


def test_no_second_derivative_and_none_forwards(route):
    logits, k, _, weights = make_rows(3, 70)
    loss = loss_of(route, weights)
    with pytest.raises(NotImplementedError, match="soft_topk has a first derivative only"):
        grad(lambda logits: grad(loss)(logits, k).square().sum())(logits)
    logits.requires_grad_()
    (once,) = torch.autograd.grad(loss(logits, k), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="backward through hf_efficient.soft_topk_.*_backward"):
        (once.square().sum() + logits.sum()).backward()
    logits = logits.detach()
    with pytest.raises(NotImplementedError, match="implement the jvp"):
        jvp(lambda logits: route(logits, k), (logits,), (weights,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="implement the jvp"):
        route(forward_ad.make_dual(logits, weights), k)


def test_traces_are_one_operator_and_hold_for_other_numbers(route):
    logits, k, _, weights = make_rows(3, 70)
    loss = loss_of(route, weights)
    for function, operators in ((lambda *inputs: route(*inputs), 1), (lambda *inputs: grad(loss)(*inputs), 2)):
        graph = make_fx(function)(logits, k)
        names = [str(node.target) for node in graph.graph.nodes if "hf_efficient" in str(node.target)]
        assert len(names) == operators, names
        others = make_rows(3, 70)[:2]
        assert torch.equal(graph(*others), function(*others))


def test_transforms_compile(route):
    logits, k, _, weights = make_rows(3, 70)
    for function in (grad(loss_of(route, weights)), vmap(route)):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(logits, k), function(logits, k))
    torch.compiler.reset()
