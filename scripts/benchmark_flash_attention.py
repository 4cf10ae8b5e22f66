"""Softmax attention with biases, windows and clamps beside SDPA: plain, and with what it needs an N×M tensor for."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from benchmark_measure import Row, peak_memory, summary, time_rounds
from torch import Tensor

from hf_efficient.kernels.flash_attention import flash_attention, t5_distance_bias
from hf_efficient.kernels.flash_attention.distance_bias import t5_bucket_of_distance


HEADS, HEAD_DIM, BUCKETS, MAX_DISTANCE, CAP, WINDOW = 8, 64, 32, 128, 50.0, 127
MODES = ("forward", "forward+backward")
OPTIONS = ("alibi", "t5", "softcap", "window")
# Three N×M tensors of 8 heads, as many for the gradients: 12 GiB at 8,192.
DENSE_LIMIT = 4096


def measure(length: int, repeats: int) -> Iterator[Row]:
    """Rows of all options at this length. All are causal but the window, which is ±127 as in CoLT5's light branch."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM) for _ in range(3)]
    table = torch.randn(BUCKETS, HEADS)
    for option in OPTIONS:
        for mode in MODES:
            calls = {n: _call(f, inputs, table, mode) for n, f in providers(option, length).items()}
            times = time_rounds(calls, repeats)
            for name, call in calls.items():
                yield Row(
                    name=f"flash_attention_{option}",
                    provider=name,
                    mode=mode,
                    length=length,
                    **summary(times[name]),
                    peak_mib=peak_memory(call),
                    sizes=f"B1 H{HEADS} d{HEAD_DIM}",
                    peer="" if name == "ours" else "torch's own",
                )


def providers(option: str, length: int) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Functions of query, key, value and T5's table (which only one option reads, with a gradient)."""
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    causal = option != "window"
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    hidden = distance > 0 if causal else distance.abs() > WINDOW

    def ours(query, key, value, table):
        options = {
            "alibi": lambda: {"alibi_slopes": slopes},
            "t5": lambda: {"distance_bias": t5_distance_bias(table, bidirectional=False, max_distance=MAX_DISTANCE)},
            "softcap": lambda: {"softcap": CAP},
            "window": lambda: {"window": WINDOW},
        }[option]()
        return flash_attention(query, key, value, causal=causal, **options)

    def plain(query, key, value, table):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    def dense(query, key, value, table):
        if option == "softcap":
            logits = CAP * torch.tanh(query @ key.mT * HEAD_DIM**-0.5 / CAP)
            return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value
        bias = torch.zeros(())
        if option == "alibi":
            bias = -slopes[:, None, None] * distance.abs()
        elif option == "t5":
            buckets = t5_bucket_of_distance(BUCKETS, False, MAX_DISTANCE)
            bias = table[buckets[distance.clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]].permute(2, 0, 1)
        mask = bias.masked_fill(hidden, -torch.inf)[None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    found = {"ours": ours, "sdpa-plain": plain}
    if length <= DENSE_LIMIT:
        found["dense" if option == "softcap" else "sdpa-bias"] = dense
    return found


def _call(attend, inputs, table, mode):
    if mode == "forward":

        def forward():
            with torch.no_grad():
                attend(*inputs, table)

        return forward
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, table)]

    def forward_and_backward():
        for leaf in leaves:
            leaf.grad = None
        attend(*leaves).sum().backward()

    return forward_and_backward
