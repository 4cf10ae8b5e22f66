"""The ratios and times that the project promises on one H200, computed from the rows of `docs/benchmarks/gpu.csv`."""

from collections.abc import Iterator

from benchmark_targets import BOTH, Rows, Target


FAVOR, PLAIN, DENSE, WINDOW = (
    "linear_attention_causal",
    "linear_attention_plain",
    "flash_attention_causal",
    "flash_attention_window",
)
LONG = 16384
# A block of 128 rows with a window of 255 keys sees six tiles of 64 keys, in place of all before it.
WINDOW_KEYS = 6 * 64
FIRST_CALLS = {
    "": ("forward",),
    " of its backward pass": ("backward",),
    " and the first backward pass together": ("forward", "backward"),
}


def _attention() -> Iterator[Target]:
    for mode, length in zip(BOTH, (2048, 4096), strict=True):
        yield _faster(f"FAVOR+ {mode} at {length // 1024}k: times faster than SDPA", FAVOR, mode, length, "sdpa", 1)
    for mode, bound in zip(BOTH, (5, 4), strict=True):
        yield _faster(f"FAVOR+ {mode} at 16k: times faster than SDPA", FAVOR, mode, LONG, "sdpa", bound)
    for mode in BOTH:
        yield _share(f"FAVOR+ {mode} at 16k: share of the roofline", FAVOR, mode, LONG)
    for mode, bound in zip(BOTH, (0.5, 1.6), strict=True):
        yield Target(
            f"linear attention {mode} at 8k, 96 heads of 128: ms",
            lambda rows, mode=mode: rows.field(PLAIN, mode, 8192, "ours", "median", 1),
            bound,
            at_most=True,
        )


def _softmax() -> Iterator[Target]:
    for mode in BOTH:
        yield _faster(f"softmax attention {mode} at 8k: rate over SDPA's", DENSE, mode, 8192, "sdpa", 0.7)
    for option in ("alibi", "t5", "window"):
        for mode in BOTH:
            name = f"flash_attention_{option}"
            yield _faster(
                f"{option} {mode} at 8k: times faster than SDPA with a bias", name, mode, 8192, "sdpa-bias", 3
            )
    yield Target("window of 255 at 64k: rate of a visited tile over that of causal attention at 16k", _tile_rate, 0.5)


def _tile_rate(rows: Rows) -> float | None:
    dense, window = (rows.found.get((name, "ours", "forward", n)) for name, n in ((DENSE, LONG), (WINDOW, 65536)))
    if dense is None or window is None:
        return None
    return (65536 * WINDOW_KEYS / window.median) / (LONG * (LONG / 2) / dense.median)


def _routing() -> Iterator[Target]:
    for length in (32768, 262144, 1048576):
        yield _share(
            f"soft_topk forward+backward of {length:,} logits: share of the copy bandwidth",
            "soft_topk",
            BOTH[1],
            length,
        )
    yield _faster(
        "soft_topk forward+backward of 32,768, called: times faster than CoLT5-attention's kernel",
        "soft_topk_calls",
        BOTH[1],
        32768,
        "colt5-attention",
        10,
    )
    for operation in ("linear_attention", "soft_topk", "flash_attention"):
        for what, modes in FIRST_CALLS.items():
            yield Target(
                f"{operation}: seconds of the first call{what}",
                lambda rows, n=f"{operation}_first_call", modes=modes: _seconds(rows, n, modes),
                10,
                at_most=True,
            )


def _seconds(rows: Rows, name: str, modes: tuple[str, ...]) -> float | None:
    parts = [rows.field(name, mode, 0, "ours", "median", 1e3) for mode in modes]
    return None if None in parts else sum(parts)


def _models() -> Iterator[Target]:
    for text, name, length, peer, bound in (
        ("Performer's training at 16k: tokens/s over GPT-2's", "train", LONG, "gpt2", 1.5),
        ("CoLT5-base encoder at 16k: tokens/s over LongT5-base's", "encoder", LONG, "longt5", 2.5),
        ("Perceiver at 64k: inputs/s over perceiver-pytorch's", "perceiver", 4 * LONG, "perceiver-pytorch", 2.5),
    ):
        yield Target(
            text,
            lambda rows, n=name, x=length, p=peer: rows.ratio(n, BOTH[1], x, "ours", p, "tokens_per_second"),
            bound,
        )


def _faster(text, name, mode, length, peer, bound) -> Target:
    return Target(text, lambda rows: rows.ratio(name, mode, length, peer, "ours"), bound)


def _share(text, name, mode, length) -> Target:
    return Target(text, lambda rows: rows.field(name, mode, length, "ours", "roofline", 1), 0.5)


GPU_TARGETS = [*_attention(), *_softmax(), *_routing(), *_models()]
