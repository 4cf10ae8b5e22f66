"""What the GPU benchmarks compute: each operation by each provider, with its operations and bytes."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmark_measure import peer_version
from torch import Tensor

from hf_efficient.kernels.flash_attention import flash_attention, t5_distance_bias
from hf_efficient.kernels.linear_attention import FeatureMap, linear_attention
from hf_efficient.kernels.soft_topk import soft_topk
from hf_efficient.modeling.random_features import draw_projection


@dataclass
class Work:
    """One computation by one provider.

    `function(*inputs)` gives a tensor; `operations` and `bytes` are the least that a forward pass needs, 0 if unsaid.
    """

    name: str
    provider: str
    length: int
    function: Callable[..., Tensor]
    inputs: list[Tensor]
    operations: float = 0
    bytes: float = 0
    sizes: str = ""
    peer: str = ""
    differentiable: bool = True

    @property
    def dtype(self) -> str:
        return str(self.inputs[0].dtype).removeprefix("torch.")

    def prepare(self, backward: bool) -> Callable[[], object]:
        """A call of the forward pass, or of both."""
        if not backward:
            return torch.no_grad()(lambda: self.function(*self.inputs))
        leaves = [tensor.detach().clone().requires_grad_() for tensor in self.inputs]
        gradient = torch.ones_like(self.function(*leaves))

        def both():
            for leaf in leaves:
                leaf.grad = None
            self.function(*leaves).backward(gradient)

        return both


def on_gpu(device: torch.device) -> bool:
    """Whether the real sizes are meant; elsewhere everything is tiny and eager, to see that it runs."""
    return device.type == "cuda"


def _sizes(device, **full):
    limits = {"B": 2, "H": 2, "D": 16, "M": 16}
    return full if on_gpu(device) else {name: min(size, limits[name]) for name, size in full.items()}


def _backend(device):
    return "triton" if on_gpu(device) else "eager"


def _qkv(device, dtype, length, *, B, H, D):
    return [torch.randn(B, H, length, D, device=device, dtype=dtype) for _ in range(3)]


def favor(length: int, device: torch.device) -> Iterator[Work]:
    """Causal FAVOR+ with the features inside, beside softmax attention: B4 H16 d64 m256 in bfloat16."""
    size = _sizes(device, B=4, H=16, D=64, M=256)
    features = size.pop("M")
    inputs = _qkv(device, torch.bfloat16, length, **size)
    projection = draw_projection(features, size["D"], seed=0, layer_idx=0, draw=0).to(device)
    feature_map = FeatureMap("exponential", projection, None, size["D"] ** -0.25, 1e-6)
    rows = size["B"] * size["H"] * length
    common = {"sizes": f"B{size['B']} H{size['H']} d{size['D']} m{features}", "inputs": inputs, "length": length}
    yield Work(
        "linear_attention_causal",
        "ours",
        function=lambda q, k, v: linear_attention(q, k, v, feature_map, causal=True, backend=_backend(device)).output,
        operations=8.0 * rows * size["D"] * features,
        bytes=4.0 * rows * size["D"] * 2,
        **common,
    )
    yield Work(
        "linear_attention_causal",
        "sdpa",
        function=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        operations=2.0 * rows * length * size["D"],
        bytes=4.0 * rows * size["D"] * 2,
        peer="torch's own",
        **common,
    )


def plain_linear(length: int, device: torch.device) -> Iterator[Work]:
    """Causal linear attention of given features: B1 H96 D128, as other libraries publish it at 8,192."""
    size = _sizes(device, B=1, H=96, D=128)
    inputs = _qkv(device, torch.bfloat16, length, **size)
    feature_map = FeatureMap("relu", None, None, 1.0, 1e-3)
    rows = size["B"] * size["H"] * length
    yield Work(
        "linear_attention_plain",
        "ours",
        length,
        lambda q, k, v: linear_attention(q, k, v, feature_map, causal=True, backend=_backend(device)).output,
        inputs,
        operations=4.0 * rows * size["D"] ** 2,
        bytes=4.0 * rows * size["D"] * 2,
        sizes=f"B{size['B']} H{size['H']} d{size['D']}",
    )


def routing(length: int, device: torch.device) -> Iterator[Work]:
    """Soft top-k of k = n/16 over 16 rows."""
    rows = 16 if on_gpu(device) else 2
    logits = torch.randn(rows, length, device=device)
    k = length // 16
    common = {"sizes": f"rows {rows} k {k}", "inputs": [logits], "length": length}
    for method in ("exact", "coordinate_descent"):
        yield Work(
            "soft_topk",
            "ours" if method == "exact" else "ours-coordinate-descent",
            function=lambda s, method=method: soft_topk(s, k, method=method, backend=_backend(device)).scores,
            bytes=4.0 * 2 * rows * length,
            **common,
        )
    yield Work("soft_topk", "torch.topk", function=lambda s: s.topk(k).values, peer="torch's own", **common)
    if on_gpu(device):
        from colt5_attention.triton_coor_descent import triton_coor_descent

        if length <= 131072:  # its kernel holds a row in one program
            yield Work(
                "soft_topk",
                "colt5-attention",
                function=lambda s: triton_coor_descent(s, n_iters=50, k=k, eps=0.1, checkpoint_segments=10),
                peer=peer_version("colt5-attention"),
                **common,
            )


def softmax(length: int, device: torch.device, only: tuple[str, ...] = ()) -> Iterator[Work]:
    """Our softmax kernel beside SDPA, plain and with what SDPA can only do with an N×M bias: B4 H16 d64."""
    size = _sizes(device, B=4, H=16, D=64)
    inputs = _qkv(device, torch.bfloat16, length, **size)
    heads, rows = size["H"], size["B"] * size["H"] * length
    slopes = 2.0 ** -torch.arange(1, heads + 1, device=device)
    table = torch.randn(32, heads, device=device)
    bias = t5_distance_bias(table, bidirectional=False)
    window = min(255, length // 2)
    options = {
        "causal": {},
        "alibi": {"alibi_slopes": slopes},
        "t5": {"distance_bias": bias},
        "softcap": {"softcap": 50.0},
        "window": {"window": (window, 0)},
    }
    for name, chosen in options.items():
        if only and name not in only:
            continue
        seen = min(length, 2 * (window + 1)) if name == "window" else length
        common = {"sizes": f"B{size['B']} H{heads} d{size['D']}", "inputs": inputs, "length": length}
        common |= {"operations": 2.0 * rows * seen * size["D"], "bytes": 4.0 * rows * size["D"] * 2}
        yield Work(
            f"flash_attention_{name}",
            "ours",
            function=lambda q, k, v, o=chosen: flash_attention(q, k, v, causal=True, backend=_backend(device), **o),
            **common,
        )
        if name == "causal":
            yield Work(
                f"flash_attention_{name}",
                "sdpa",
                function=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                peer="torch's own",
                **common,
            )
        elif name != "softcap" and length <= 8192:  # SDPA has no soft clamp; a longer bias is larger than the rest
            mask = _materialised(name, length, slopes, bias, window, inputs[0].dtype)
            yield Work(
                f"flash_attention_{name}",
                "sdpa-bias",
                function=lambda q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
                peer="torch's own",
                **common,
            )


def _materialised(name, length, slopes, bias, window, dtype) -> Tensor:
    """`[1, H, N, N]`: what SDPA needs for the same result."""
    position = torch.arange(length, device=slopes.device)
    distance = position[None] - position[:, None]
    mask = torch.zeros(1, len(slopes), length, length, dtype=dtype, device=slopes.device)
    if name == "alibi":
        mask -= slopes[:, None, None] * distance.abs()
    elif name == "t5":
        radius = bias.shape[1] // 2
        mask += bias[:, distance.clamp(-radius, radius) + radius]
    hidden = (distance > 0) | ((distance < -window) if name == "window" else False)
    return mask.masked_fill_(hidden, -torch.inf)


def long_window(length: int, device: torch.device) -> Iterator[Work]:
    """The window alone, where nothing quadratic is done any more."""
    yield from (work for work in softmax(length, device, ("window",)) if work.provider == "ours")


WORK = (favor, plain_linear, routing, softmax, long_window)
# What has lengths of its own, whatever is asked for.
LENGTHS = {routing: (32768, 262144, 1048576), long_window: (65536,)}


def lengths_of(works: Callable, lengths: list[int], device: torch.device) -> list[int]:
    """The lengths of one kind of work."""
    return list(LENGTHS.get(works, lengths)) if on_gpu(device) else lengths


def first_calls(operation: str, device: str) -> tuple[float, float]:
    """Milliseconds of an operation's forward pass and of its backward pass, as a user meets them first."""
    device = torch.device(device)
    length = 32768 if operation == "soft_topk" else 1024
    works = {"linear_attention": favor, "soft_topk": routing, "flash_attention": softmax}[operation](length, device)
    work = next(works)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in work.inputs]
    output, forward = _timed(lambda: work.function(*leaves), device)
    _, backward = _timed(output.sum().backward, device)
    return forward, backward


def _timed(call, device):
    wait = torch.cuda.synchronize if on_gpu(device) else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return result, 1e3 * (time.perf_counter() - start)
