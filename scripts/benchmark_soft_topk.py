"""The router's choice, soft_topk, beside torch.topk and CoLT5-attention's: one row of logits, k = n / 16."""

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from benchmark_measure import Row, peak_memory, peer_version, summary, time_rounds
from torch import Tensor

from hf_efficient.kernels.soft_topk import soft_topk


MODES = ("forward", "forward+backward")
EPS = 0.1
ITERATIONS = 50
PEER = "colt5-attention"
# Calls take so many rows of logits in turn. Of one that it sees over and over a processor learns the branches of a
# selection: torch.topk of 32,768 such logits took 0.10 to 0.40 ms, of others 0.41 to 0.44 (two cores of an EPYC). Of a
# million logits no row stays in a cache so.
ROWS = 8


def measure(length: int, repeats: int, peers: bool = True) -> Iterator[Row]:
    """Rows of all providers at this length, a multiple of 16."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, 1, length)
    functions = providers(length // 16, peers)
    for mode in MODES:
        calls = {name: _call(function, logits, mode) for name, function in functions.items()}
        times = time_rounds(calls, repeats)
        for name, call in calls.items():
            yield Row(
                name="soft_topk",
                provider=name,
                mode=mode,
                length=length,
                **summary(times[name]),
                peak_mib=peak_memory(call),
                error=_residual(functions[name], logits[0], length // 16) if name != "torch.topk" else None,
                error_length=length,
                sizes=f"1 row, k {length // 16}, eps {EPS}",
                peer={"ours": "", "ours-descent": "", "torch.topk": "torch's own"}.get(name, peer_version(PEER)),
            )


def providers(k: int, peers: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of the logits: scores, or what torch.topk chooses. Ours choose positions as well."""
    found = {
        "ours": lambda logits: soft_topk(logits, k, eps=EPS).scores,
        "ours-descent": lambda logits: (
            soft_topk(logits, k, eps=EPS, method="coordinate_descent", n_iters=ITERATIONS).scores
        ),
        "torch.topk": lambda logits: torch.topk(logits, k, dim=-1).values,
    }
    if peers:
        from colt5_attention import coor_descent

        found[f"{PEER}-{ITERATIONS}"] = lambda logits: coor_descent(logits, k=k, n_iters=ITERATIONS, eps=EPS)
        found[f"{PEER}-20"] = lambda logits: coor_descent(logits, k=k, n_iters=20, eps=EPS)
    return found


def _residual(function, logits, k) -> float:
    """How far the scores are from a sum of k, as a share of k: coordinate descent stops on the way there."""
    with torch.no_grad():
        return abs(function(logits).double().sum().item() - k) / k


def _call(function, logits, mode):
    """A call without arguments, which takes the next of the rows of `logits`, `[ROWS, 1, length]`."""
    if mode == "forward":
        rows = cycle(logits)

        def forward():
            with torch.no_grad():
                function(next(rows))

        return forward
    leaves = cycle([row.clone().requires_grad_() for row in logits])
    gradient = torch.randn_like(function(logits[0]))

    def forward_and_backward():
        leaf = next(leaves)
        leaf.grad = None
        function(leaf).backward(gradient)

    return forward_and_backward
