"""The attention operations, ours and others', on the same tensors: times, memory, error."""

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmark_measure import Row, peer_version, summary, time_rounds, typical_peak_memory
from torch import Tensor

from hf_efficient.kernels.linear_attention import FeatureMap, LinearAttentionState, linear_attention
from hf_efficient.kernels.linear_attention.reference import linear_attention_reference
from hf_efficient.modeling.random_features import draw_projection


BATCH, HEADS, HEAD_DIM, FEATURES = 1, 8, 64, 266
MODES = ("forward", "forward+backward")
# Quadratic in float64: the error is measured on a prefix of at most this length.
ERROR_LENGTH = 1024
# The peers' time in the causal form grows faster than their length: 23 s a call at 8,192.
PEER_CAUSAL_LIMIT = 4096


@dataclass
class Provider:
    """One implementation of attention: `attend(query, key, value)`, and the same in float64 to judge it by."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    exact: Callable[[Tensor, Tensor, Tensor], Tensor]
    peer: str = ""


def measure(length: int, causal: bool, repeats: int, names: list[str] | None = None) -> Iterator[Row]:
    """Rows of all providers at this length; `names` restricts which."""
    op = "linear_attention_causal" if causal else "linear_attention_bidirectional"
    torch.manual_seed(0)
    inputs = [torch.randn(BATCH, HEADS, length, HEAD_DIM) for _ in range(3)]
    chosen = {n: make() for n, make in providers(causal, length).items() if names is None or n in names}
    errors = {name: _error(provider, inputs) for name, provider in chosen.items()}
    for mode in MODES:
        calls = {name: _call(provider, inputs, mode) for name, provider in chosen.items()}
        times = time_rounds(calls, repeats)
        for name, call in calls.items():
            yield Row(
                name=op,
                provider=name,
                mode=mode,
                length=length,
                **summary(times[name]),
                peak_mib=typical_peak_memory(call),
                error=errors[name],
                error_length=min(length, ERROR_LENGTH),
                sizes=f"B{BATCH} H{HEADS} d{HEAD_DIM} m{FEATURES}",
                peer=chosen[name].peer,
            )


def measure_growth(lengths: list[int], repeats: int) -> Iterator[Row]:
    """Our causal form at these lengths, in turns: how their times compare is what is asked."""
    calls = {}
    for length in lengths:
        torch.manual_seed(0)
        inputs = [torch.randn(BATCH, HEADS, length, HEAD_DIM) for _ in range(3)]
        provider = providers(True, length)["ours"]()
        calls |= {(mode, length): _call(provider, inputs, mode) for mode in MODES}
    for (mode, length), samples in time_rounds(calls, repeats).items():
        yield Row(
            name="linear_attention_causal_growth",
            provider="ours",
            mode=mode,
            length=length,
            **summary(samples),
            sizes=f"B{BATCH} H{HEADS} d{HEAD_DIM} m{FEATURES}",
        )


def providers(causal: bool, length: int) -> dict[str, Callable[[], Provider]]:
    """What can compute this attention at this length, each to be made when it is wanted."""
    projection = draw_projection(FEATURES, HEAD_DIM, seed=0, layer_idx=0, draw=0)
    softmax = FeatureMap("exponential", projection, None, HEAD_DIM**-0.25, 1e-6)
    relu = FeatureMap("relu", projection, None, HEAD_DIM**-0.25, 1e-3)
    found = {
        "ours": lambda: _ours(softmax, causal),
        "ours-relu": lambda: _ours(relu, causal),
        "sdpa": lambda: _sdpa(causal),
    }
    if not causal or length <= PEER_CAUSAL_LIMIT:
        found["performer-pytorch"] = lambda: _performer_pytorch(causal, generalized=False)
        found["performer-pytorch-relu"] = lambda: _performer_pytorch(causal, generalized=True)
    return found


def _sdpa(causal):
    def attend(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    return Provider(attend, attend, "torch's own")


def _ours(feature_map, causal):
    def exact(query, key, value):
        state = LinearAttentionState.empty(BATCH, HEADS, FEATURES, HEAD_DIM, dtype=torch.float64)
        return linear_attention_reference(query, key, value, feature_map, None, state, causal)[0]

    return Provider(lambda q, k, v: linear_attention(q, k, v, feature_map, causal=causal).output, exact)


def _performer_pytorch(causal, generalized):
    from performer_pytorch import FastAttention

    # It says on standard output that its CUDA extension is missing; its causal form runs without.
    with contextlib.redirect_stdout(io.StringIO()):
        attention = FastAttention(HEAD_DIM, nb_features=FEATURES, causal=causal, generalized_attention=generalized)
    double = copy.deepcopy(attention).double()
    return Provider(attention, double, peer_version("performer-pytorch"))


def _call(provider, inputs, mode):
    if mode == "forward":

        def forward():
            with torch.no_grad():
                provider.attend(*inputs)

        return forward
    leaves = [t.detach().clone().requires_grad_() for t in inputs]

    def forward_and_backward():
        for leaf in leaves:
            leaf.grad = None
        provider.attend(*leaves).sum().backward()

    return forward_and_backward


def _error(provider, inputs):
    """Largest error of the output on a prefix over the largest output, judged by the provider's own formula."""
    prefix = [t[:, :, :ERROR_LENGTH] for t in inputs]
    with torch.no_grad():
        exact = provider.exact(*(t.double() for t in prefix))
        error = ((provider.attend(*prefix).double() - exact).abs().max() / exact.abs().max()).item()
    return error if math.isfinite(error) else None
