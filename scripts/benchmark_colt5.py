"""A routed encoder layer beside a dense one, CoLT5-attention's, LongT5's and T5's of the same widths; a whole encoder.

Heavy widths are everybody's: model 512, 8 heads of 64, an inner width of 2,048 with one matrix in front of GELU. The
light branch has the paper's share of them, Base's 4 heads of ±127 tokens and an eighth of the inner width; a second
row of ours has CoLT5-attention's own light widths, 8 heads of ±64, and is what its block is compared with.
"""

from collections.abc import Callable, Iterator

import torch
from benchmark_measure import Row, peak_memory, peer_version, summary, time_rounds, typical_peak_memory
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_efficient import CoLT5Config, CoLT5EncoderModel
from hf_efficient.modeling.colt5_layers import CoLT5EncoderLayer
from hf_efficient.modeling.feed_forward import FeedForward
from hf_efficient.modeling.routed_block import RoutedTransformerBlock
from hf_efficient.modeling.routed_feed_forward import FeedForwardShape


WIDTH, HEADS, HEAD_DIM, INNER = 512, 8, 64, 2048
LIGHT_HEADS, LIGHT_INNER, RADIUS = 4, 256, 127
PEER_RADIUS = 64  # what CoLT5-attention's window of 128 sees to either side
MODES = ("forward", "forward+backward")
PEER = "colt5-attention"
# A layer of T5 holds heads × N × N numbers of position bias, 8 GiB at 16k; a dense one takes half a minute at 32k.
T5_LIMIT, DENSE_LIMIT = 4096, 16384
# What only ours and CoLT5-attention run at, forward.
FORWARD_ONLY = 65536
# The longest calls, seconds each, are repeated less often.
PATIENCE, FEWER_REPEATS = 3.0, 3

Layer = Callable[[Tensor], Tensor]


class DenseLayer(nn.Module):
    """Softmax attention by SDPA and a feed-forward, each behind a norm and added: nothing is routed."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv_proj = nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.mlp = FeedForward(FeedForwardShape(WIDTH, INNER, "gelu", gated_feed_forward=False))

    def forward(self, hidden_states: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.attention_norm(hidden_states)).unflatten(-1, (3, HEADS, HEAD_DIM))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        hidden_states = hidden_states + self.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


def measure(length: int, repeats: int, peers: bool = True) -> Iterator[Row]:
    """Rows of every layer that can work at this length, k = n / 16 queries and feed-forward tokens, n / 8 keys."""
    torch.manual_seed(0)
    tokens = torch.randn(1, length, WIDTH)
    layers = {name: make() for name, make in providers(length, peers).items()}
    for mode in MODES[: 1 if length >= FORWARD_ONLY else 2]:
        calls = {name: _call(layer, tokens, mode) for name, layer in layers.items()}
        for name, samples in _in_turns(calls, repeats).items():
            yield Row(
                name="colt5_layer",
                provider=name,
                mode=mode,
                length=length,
                **summary(samples),
                peak_mib=typical_peak_memory(calls[name]),
                gflops=counted_flops(layers[name], tokens, mode) / 1e9 if name.startswith("ours") else None,
                sizes=f"B1 d{WIDTH} heavy H{HEADS} d{HEAD_DIM} inner {INNER}, n/16 and n/8 routed",
                peer=_peer(name),
            )


def measure_base(length: int) -> Iterator[Row]:
    """The whole encoder of the paper's Base on one row, forward: once, for its memory."""
    torch.manual_seed(0)
    model = CoLT5EncoderModel(CoLT5Config()).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, length))

    def forward():
        with torch.no_grad():
            model(ids)

    samples = []
    peak = peak_memory(lambda: samples.extend(time_rounds({"ours": forward}, 1)["ours"]))
    yield Row(
        name="colt5_base_encoder",
        provider="ours",
        mode="forward",
        length=length,
        **summary(samples),
        peak_mib=peak,
        sizes="12 layers, d768, 12 heads",
    )


def measure_operations(length: int) -> Iterator[Row]:
    """The layer that the paper's formula is about: a quarter of T5.1.1's heads light, three quarters heavy."""
    torch.manual_seed(0)
    config = CoLT5Config(num_light_attention_heads=3, num_heavy_attention_heads=9, dropout_rate=0.0)
    layer, tokens = _WithBias(CoLT5EncoderLayer(config)), torch.randn(1, length, config.hidden_size)
    forward = _call(layer, tokens, "forward")
    yield Row(
        name="colt5_paper_layer",
        provider="ours",
        mode="forward",
        length=length,
        **summary(time_rounds({"ours": forward}, 1)["ours"]),
        peak_mib=peak_memory(forward),
        gflops=counted_flops(layer, tokens) / 1e9,
        sizes="B1 d768, 3 light and 9 heavy heads, inner 1024 and 8192",
    )


def providers(length: int, peers: bool) -> dict[str, Callable[[], Layer]]:
    """What can compute a layer at this length, each to be made when it is wanted."""
    found = {"ours": _ours, "ours-peer-widths": _ours_of_peer_widths}
    if length <= DENSE_LIMIT:
        found["dense-sdpa"] = DenseLayer
    if peers:
        found[PEER] = lambda: _colt5_attention(length)
        if length <= DENSE_LIMIT:
            found["longt5-local"] = lambda: _longt5("local", length)
            found["longt5-transient"] = lambda: _longt5("transient-global", length)
        if length <= T5_LIMIT:
            found["t5"] = lambda: _t5(length)
    return found


def counted_flops(layer: Callable, tokens: Tensor, mode: str = "forward") -> int:
    """What torch's counter finds: products of matrices and attention, in our own operation by its registered formula.

    With gradients on, since without them our operation runs without being one to the counter; and SDPA written out,
    whose fused form on CPUs it does not know.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = layer(tokens.detach().requires_grad_())
        if mode != "forward":
            output.sum().backward()
    return counter.get_total_flops()


class _WithBias(nn.Module):
    """A layer of the encoder with the position bias that it shares with the others of its stack."""

    def __init__(self, layer: CoLT5EncoderLayer):
        super().__init__()
        heads = layer.self_attn.light_attn.q_proj.out_features // HEAD_DIM
        self.layer, self.bias = layer, nn.Parameter(torch.randn(heads, 257))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.layer(hidden_states, None, self.bias, None)


def _ours() -> Layer:
    config = CoLT5Config(
        hidden_size=WIDTH,
        num_light_attention_heads=LIGHT_HEADS,
        num_heavy_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        light_intermediate_size=LIGHT_INNER,
        heavy_intermediate_size=INNER,
        light_attention_radius=RADIUS,
        hidden_act="gelu",
        gated_feed_forward=False,
        dropout_rate=0.0,
    )
    return _WithBias(CoLT5EncoderLayer(config))


def _ours_of_peer_widths() -> Layer:
    return RoutedTransformerBlock(
        WIDTH,
        attention={"light_heads": HEADS, "heavy_heads": HEADS, "radius": PEER_RADIUS},
        feed_forward={
            "light_intermediate_size": LIGHT_INNER,
            "heavy_intermediate_size": INNER,
            "hidden_act": "gelu",
            "gated": False,
            "bias": True,
        },
    )


def _colt5_attention(length: int) -> Layer:
    from colt5_attention import ConditionalRoutedTransformerBlock

    return ConditionalRoutedTransformerBlock(
        WIDTH,
        num_heavy_attn_tokens_q=length // 16,
        num_heavy_attn_tokens_kv=length // 8,
        num_heavy_ff_tokens=length // 16,
        light_window_size=2 * PEER_RADIUS,
        light_ff_mult=LIGHT_INNER / WIDTH,
        heavy_ff_mult=INNER / WIDTH,
        use_flash_attn=True,
    )


class _WithGivenBias(nn.Module):
    """A layer of T5 or LongT5 that is handed its position bias, as all but the first of a stack are."""

    def __init__(self, block: nn.Module, length: int, mask: Tensor | None = None):
        super().__init__()
        self.block, self.mask = block.eval(), mask
        with torch.no_grad():
            self.bias = block(torch.zeros(1, length, WIDTH), attention_mask=mask)[1]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.block(hidden_states, attention_mask=self.mask, position_bias=self.bias)[0]


def _longt5(kind: str, length: int) -> Layer:
    from transformers import LongT5Config
    from transformers.models.longt5.modeling_longt5 import LongT5Block

    config = LongT5Config(**_t5_sizes(), encoder_attention_type=kind, local_radius=RADIUS)
    # Transient-global attention adds up its biases only where there is a mask.
    mask = None if kind == "local" else torch.ones(1, length)
    return _WithGivenBias(LongT5Block(config, has_relative_attention_bias=True), length, mask)


def _t5(length: int) -> Layer:
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Block

    config = T5Config(**_t5_sizes())
    config._attn_implementation = "sdpa"
    return _WithGivenBias(T5Block(config, has_relative_attention_bias=True), length)


def _t5_sizes() -> dict:
    return {"d_model": WIDTH, "num_heads": HEADS, "d_kv": HEAD_DIM, "d_ff": INNER, "feed_forward_proj": "gelu"}


def _call(layer: Layer, tokens: Tensor, mode: str) -> Callable[[], None]:
    if mode == "forward":

        def forward():
            with torch.no_grad():
                layer(tokens)

        return forward
    leaf = tokens.clone().requires_grad_()

    def forward_and_backward():
        leaf.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(leaf).sum().backward()

    return forward_and_backward


def _in_turns(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """As `time_rounds`, in which calls that take longer than `PATIENCE` are made `FEWER_REPEATS` times."""
    times = time_rounds(calls, min(repeats, FEWER_REPEATS))
    quick = {name: call for name, call in calls.items() if min(times[name]) <= 1e3 * PATIENCE}
    if repeats > FEWER_REPEATS:
        for name, samples in time_rounds(quick, repeats - FEWER_REPEATS).items():
            times[name] += samples
    return times


def _peer(name: str) -> str:
    if name.startswith("ours"):
        return ""
    if name == "dense-sdpa":
        return "torch's own"
    return peer_version(PEER if name == PEER else "transformers")
