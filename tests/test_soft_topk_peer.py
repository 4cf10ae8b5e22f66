"""soft_topk's coordinate descent is that of CoLT5-attention, forward and backward, ε-scaling included.

Run: pytest tests/test_soft_topk_peer.py
"""

import pytest
import torch
from colt5_attention import topk as peer_topk
from colt5_attention.coor_descent import coor_descent
from soft_topk_cases import make_rows

from hf_efficient.kernels.soft_topk import soft_topk


SCHEDULES = {
    "paper": {"n_iters": 50, "eps": 1.0},
    "router": {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7},
    "topk": {"n_iters": 20, "eps": 0.1},
    "one step": {"n_iters": 1, "eps": 0.5},
    "low start": {"n_iters": 7, "eps": 0.5, "eps_init": 0.1, "eps_decay": 0.5},
    "unfinished decay": {"n_iters": 3, "eps": 0.01, "eps_init": 2.0, "eps_decay": 0.9},
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def both(logits, k, weights, mask, schedule):
    for function in (
        lambda s, k: coor_descent(s, k=k, mask=mask, **schedule),
        lambda s, k: soft_topk(s, k, mask=mask, method="coordinate_descent", **schedule).scores,
    ):
        leaves = logits.clone().requires_grad_(), k.clone().requires_grad_()
        scores = function(*leaves)
        yield scores.detach(), *torch.autograd.grad((scores * weights).sum(), leaves)


@every_schedule
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equal_in_double(name, masked):
    logits, k, mask, weights = make_rows(5, 200, torch.float64, spread=3)
    expected, actual = both(logits, k, weights, mask if masked else None, SCHEDULES[name])
    for part, wanted, found in zip(("scores", "logits", "k"), expected, actual, strict=True):
        error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error < 1e-12, f"{part}: {error:.2e}"


@every_schedule
def test_equal_in_single_precision(name):
    logits, k, mask, weights = make_rows(5, 500)
    expected, actual = both(logits, k, weights, mask, SCHEDULES[name])
    for wanted, found in zip(expected, actual, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * wanted.abs().max().item())


def test_the_peers_topk_is_built_on_it():
    """Its values, indices, soft scores and gates, from ours; there the mask is not looked at in the hard choice."""
    logits = torch.randn(3, 64, dtype=torch.float64)
    values, indices, soft, gates = peer_topk(logits, 8, eps=0.5)
    output = soft_topk(
        logits, 9.0, method="coordinate_descent", n_iters=20, eps=0.5, num_selected=8, sorted_by="logit"
    )
    assert torch.equal(output.indices, indices)
    assert torch.equal(logits.gather(-1, output.indices), values)
    torch.testing.assert_close(output.scores.gather(-1, indices), soft)
    assert torch.equal(gates, torch.ones_like(gates))
