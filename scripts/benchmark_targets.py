"""The ratios that the project promises, computed from benchmark rows. Each is a comparison within one process."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmark_measure import Row


BOTH = ("forward", "forward+backward")


@dataclass
class Target:
    """`value(rows)` gives the figure, None where a row is missing; it passes at or above (below) `bound`."""

    text: str
    value: Callable[["Rows"], float | None]
    bound: float
    at_most: bool = False

    def verdict(self, rows: "Rows") -> tuple[float | None, str]:
        value = self.value(rows)
        if value is None:
            return None, "not measured"
        passed = value <= self.bound if self.at_most else value >= self.bound
        return value, "pass" if passed else "MISS"


class Rows:
    """Rows of one allocator setting, found by what they measured."""

    def __init__(self, rows: list[Row], allocator: str):
        self.found = {row.key[:4]: row for row in rows if row.allocator == allocator}

    def ratio(self, name, mode, length, numerator, denominator, field="median", other_length=None):
        """`field` of one provider over that of another."""
        above = self.found.get((name, numerator, mode, length))
        below = self.found.get((name, denominator, mode, other_length or length))
        values = [getattr(row, field) if row else None for row in (above, below)]
        return None if None in values or not values[1] else values[0] / values[1]

    def field(self, name, mode, length, provider, field, unit):
        """`field` of one row, in units of so much."""
        row = self.found.get((name, provider, mode, length))
        value = getattr(row, field) if row else None
        return None if value is None else value / unit


def _attention_targets():
    causal, both_ways = "linear_attention_causal", "linear_attention_bidirectional"
    peer = "performer-pytorch"
    for mode, bound in zip(BOTH, (7, 15), strict=True):
        yield Target(
            f"causal {mode} at 4k: times faster than {peer}",
            lambda rows, mode=mode: rows.ratio(causal, mode, 4096, peer, "ours"),
            bound,
        )
    for mode in BOTH:
        yield Target(
            f"causal {mode} at 4k: {peer}'s peak memory over ours",
            lambda rows, mode=mode: rows.ratio(causal, mode, 4096, peer, "ours", "peak_mib"),
            20,
        )
    for length, bound in ((4096, 1), (16384, 4)):
        for mode in BOTH:
            yield Target(
                f"causal {mode} at {length // 1024}k: times faster than SDPA",
                lambda rows, mode=mode, n=length: rows.ratio(causal, mode, n, "sdpa", "ours"),
                bound,
            )
    for mode in BOTH:
        yield Target(
            f"causal {mode}: time at 16k over time at 4k",
            lambda rows, mode=mode: rows.ratio(f"{causal}_growth", mode, 16384, "ours", "ours", other_length=4096),
            4.4,
            at_most=True,
        )
    for length in (4096, 16384):
        for kind, features in (("", "softmax"), ("-relu", "ReLU")):
            for mode in BOTH:
                yield Target(
                    f"bidirectional {mode} at {length // 1024}k, {features} features: times faster than {peer}",
                    lambda rows, mode=mode, n=length, kind=kind: rows.ratio(
                        both_ways, mode, n, peer + kind, "ours" + kind
                    ),
                    1.5,
                )
    for mode in BOTH:
        yield Target(
            f"bidirectional {mode} at 16k: times faster than SDPA",
            lambda rows, mode=mode: rows.ratio(both_ways, mode, 16384, "sdpa", "ours"),
            10,
        )


def _decoding_targets():
    speed = "tokens_per_second"
    for mode, length, bound in (("64+192", 256, 30), ("64+448", 512, 30)):
        yield Target(
            f"generate {mode}: times faster than performer-pytorch",
            lambda rows, mode=mode, n=length: rows.ratio("generate", mode, n, "ours", "performer-pytorch", speed),
            bound,
        )
        yield Target(
            f"generate {mode}: times faster than cached GPT-2",
            lambda rows, mode=mode, n=length: rows.ratio("generate", mode, n, "ours", "gpt2", speed),
            1,
        )
    for batch in (1, 4):
        yield Target(
            f"generate 64+64 at GPT-2's width, {batch} at a time: times faster than cached GPT-2",
            lambda rows, b=batch: rows.ratio("generate_wide", f"{b} × 64+64", 128, "ours", "gpt2", speed),
            1,
        )
    steps = "64 steps"
    yield Target(
        "decode: tokens/s at 16k context over tokens/s at 128",
        lambda rows: rows.ratio("decode", steps, 16384, "ours", "ours", speed, other_length=128),
        0.9,
    )
    yield Target(
        "decode: GPT-2's cache over ours at 16k context, in bytes",
        lambda rows: rows.ratio("decode", steps, 16384, "gpt2", "ours", "cache_bytes"),
        10,
    )
    for length in (4096, 16384):
        yield Target(
            f"decode at {length // 1024}k context: times faster than GPT-2",
            lambda rows, n=length: rows.ratio("decode", steps, n, "ours", "gpt2", speed),
            1,
        )


def _softmax_targets():
    mode = "forward+backward"
    for option, text in (("alibi", "ALiBi"), ("t5", "T5's bias"), ("softcap", "a soft clamp")):
        yield Target(
            f"softmax attention with {text}, {mode} at 4k: time over plain SDPA's",
            lambda rows, option=option: rows.ratio(f"flash_attention_{option}", mode, 4096, "ours", "sdpa-plain"),
            1.5,
            at_most=True,
        )
    yield Target(
        f"softmax attention in a window of ±127, {mode} at 4k: times faster than SDPA with a mask",
        lambda rows: rows.ratio("flash_attention_window", mode, 4096, "sdpa-bias", "ours"),
        4,
    )


def _routing_targets():
    for length, name in ((32768, "32k"), (262144, "262k"), (1048576, "1M")):
        for mode, bound in zip(BOTH, (2, 2.5), strict=True):
            yield Target(
                f"soft_topk {mode} of {name} logits: time over torch.topk's",
                lambda rows, mode=mode, n=length: rows.ratio("soft_topk", mode, n, "ours", "torch.topk"),
                bound,
                at_most=True,
            )
        yield Target(
            f"soft_topk forward+backward of {name} logits: times faster than 50 iterations of colt5-attention",
            lambda rows, n=length: rows.ratio("soft_topk", "forward+backward", n, "colt5-attention-50", "ours"),
            5,
        )


def paper_flops(length: int, width: int = 768) -> float:
    """Floating point operations of a CoLT5 layer after section 3.4 of its paper, two for each multiplication.

    The paper counts the widths alone, not the products inside the windows of the light attention.
    """
    return 2 * (7.25 * length * width**2 + length**2 * width / 84)


def _routed_layer_targets():
    layer, length, peer = "colt5_layer", 16384, "colt5-attention"
    for mode in BOTH:
        for text, other, own, bound in (
            ("a dense layer of its heavy widths", "dense-sdpa", "ours", 8),
            ("CoLT5-attention's block of the same heavy widths", peer, "ours", 1.5),
            ("CoLT5-attention's block of the same light widths too", peer, "ours-peer-widths", 1.5),
            ("LongT5's local layer", "longt5-local", "ours", 2),
            ("LongT5's transient-global layer", "longt5-transient", "ours", 2),
        ):
            yield Target(
                f"CoLT5 layer, {mode} of 16k tokens: times faster than {text}",
                lambda rows, mode=mode, other=other, own=own: rows.ratio(layer, mode, length, other, own),
                bound,
            )
        yield Target(
            f"CoLT5 layer, {mode} of 16k tokens: peak memory over that of CoLT5-attention's block",
            lambda rows, mode=mode: rows.ratio(layer, mode, length, "ours-peer-widths", peer, "peak_mib"),
            1,
            at_most=True,
        )
    yield Target(
        "CoLT5's Base encoder, forward of 64k tokens: GiB at the peak",
        lambda rows: rows.field("colt5_base_encoder", "forward", 65536, "ours", "peak_mib", 1024),
        8,
        at_most=True,
    )
    yield Target(
        "CoLT5 layer of 16k tokens: counted FLOPs over the paper's formula, which leaves the windows out",
        lambda rows: rows.field("colt5_paper_layer", "forward", length, "ours", "gflops", paper_flops(length) / 1e9),
        1.05,
        at_most=True,
    )


def _perceiver_targets():
    name, both, peer = "perceiver_flash_features", "forward+backward", "perceiver-pytorch"
    for other, own in ((peer, "ours"), ("transformers", "ours-converted")):
        for field, bound, text in (("median", 1.6, "times faster than"), ("peak_mib", 3, "times less memory than")):
            yield Target(
                f"Perceiver, {both} over 64k inputs: {text} {other}",
                lambda rows, other=other, own=own, field=field: rows.ratio(name, both, 65536, other, own, field),
                bound,
            )
    for length, times in ((65536, 16), (262144, 64)):
        yield Target(
            f"Perceiver, {both} over {times} times as many inputs as {peer}'s 4k: memory over {peer}'s",
            lambda rows, length=length: rows.ratio(name, both, length, "ours", peer, "peak_mib", other_length=4096),
            1,
            at_most=True,
        )
    yield Target(
        f"cross-attention in chunks, {both} over 131k inputs: time over that of reading them at once",
        lambda rows: rows.ratio("perceiver_flash_chunks", both, 131072, "ours", "ours-at-once"),
        1.4,
        at_most=True,
    )
    yield Target(
        f"cross-attention in chunks, {both} over 1,048,576 inputs of 64: GiB above the input",
        lambda rows: rows.field("perceiver_flash_chunks", both, 1048576, "ours", "peak_mib", 1024),
        2,
        at_most=True,
    )


def _x_transformer_targets():
    mode = "forward+backward"
    yield Target(
        "decoder, training step at 4k: time over x-transformers with flash",
        lambda rows: rows.ratio("x_transformer_plain", mode, 4096, "ours", "x-transformers-flash"),
        1,
        at_most=True,
    )
    for option, text in (("alibi", "ALiBi"), ("t5", "T5's bias"), ("softclamp", "clamped scores")):
        yield Target(
            f"decoder with {text}, training step at 4k: times faster than x-transformers",
            lambda rows, option=option: rows.ratio(f"x_transformer_{option}", mode, 4096, "x-transformers", "ours"),
            4,
        )
    for text, own, peer, bound in (
        ("decoder, generate 64+256: times faster than x-transformers", "ours", "x-transformers", 1.3),
        (
            "decoder composed as Llama, generate 64+256: times faster than transformers' Llama",
            "ours-as-llama",
            "llama",
            1,
        ),
    ):
        yield Target(
            text,
            lambda rows, own=own, peer=peer: rows.ratio(
                "x_transformer_generate", "64+256", 320, own, peer, "tokens_per_second"
            ),
            bound,
        )


TARGETS = [
    *_attention_targets(),
    *_decoding_targets(),
    *_softmax_targets(),
    *_routing_targets(),
    *_routed_layer_targets(),
    *_perceiver_targets(),
    *_x_transformer_targets(),
]


def report(rows: list[Row], targets: list[Target] | None = None) -> list[tuple[str, str, str, str, str]]:
    """(target, bound, figure, verdict, allocator) for every target, per allocator setting that has rows."""
    lines = []
    for allocator in dict.fromkeys(row.allocator for row in rows):
        of_setting = Rows(rows, allocator)
        for target in TARGETS if targets is None else targets:
            value, verdict = target.verdict(of_setting)
            if value is None and allocator != "default":
                continue  # the second setting repeats only what it can change
            bound = f"{'≤' if target.at_most else '≥'} {target.bound:g}"
            lines.append((target.text, bound, "" if value is None else f"{value:.2f}", verdict, allocator))
    return lines
