"""What the flash attention tests share: the formula written once more, row by row, and the options they all run."""

import torch

from hf_efficient.kernels.flash_attention.operands import UNLIMITED, Operands, Options


BATCH, HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM = 2, 4, 2, 8, 5

# What is learned, and so has a gradient.
DIFFERENTIABLE = (
    "query",
    "key",
    "value",
    "alibi_slopes",
    "distance_bias",
    "memory_key",
    "memory_value",
    "sinks",
)


def option_values(name: str, length: int, keys: int) -> dict:
    """The arguments of one option, by its name in `OPTIONS`."""
    b, h, g, d, v = BATCH, HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM
    return {
        "scale": lambda: {"scale": 0.7},
        "causal": lambda: {"causal": True},
        "window": lambda: {"window": 3},
        "one-sided window": lambda: {"window": (5, None)},
        "window ahead": lambda: {"window": (2, 4)},
        "window of itself": lambda: {"window": 0},
        "mask": lambda: {"key_mask": torch.rand(b, keys) > 0.4},
        "row without keys": lambda: {"key_mask": torch.arange(b)[:, None].expand(b, keys)},
        "lengths": lambda: {
            "key_lengths": torch.tensor([keys, keys // 2]),
            "query_lengths": torch.tensor([max(length - 1, 0), length // 2]),
        },
        "key lengths": lambda: {"key_lengths": torch.tensor([keys // 3, keys])},
        "no length": lambda: {"key_lengths": torch.tensor([0, keys]), "query_lengths": torch.tensor([length, 0])},
        "alibi": lambda: {"alibi_slopes": torch.rand(h)},
        "alibi per row": lambda: {"alibi_slopes": torch.rand(b, h)},
        "distance bias": lambda: {"distance_bias": torch.randn(h, 2 * 4 + 1)},
        "wide distance bias": lambda: {"distance_bias": torch.randn(h, 2 * (length + keys) + 1)},
        "shared distance bias": lambda: {"distance_bias": torch.randn(1, 2 * 3 + 1)},
        "one distance": lambda: {"distance_bias": torch.randn(h, 1)},
        "softcap": lambda: {"softcap": 1.5},
        "memory": lambda: {"memory_key": torch.randn(g, 3, d), "memory_value": torch.randn(g, 3, v)},
        "memory per row": lambda: {"memory_key": torch.randn(b, g, 2, d), "memory_value": torch.randn(b, g, 2, v)},
        "sinks": lambda: {"sinks": torch.randn(h)},
        "dropout": lambda: {"dropout_p": 0.3, "dropout_seed": 12345678901},
    }[name]()


OPTIONS = (
    "scale", "causal", "window", "one-sided window", "window ahead", "window of itself", "mask", "row without keys",
    "lengths", "key lengths", "no length", "alibi", "alibi per row", "distance bias", "wide distance bias",
    "shared distance bias", "one distance", "softcap", "memory", "memory per row", "sinks", "dropout",
)  # fmt: skip

# Every option alone, and those that meet in one formula together.
COMBINATIONS = {
    "plain": (),
    **{name: (name,) for name in OPTIONS},
    "causal alibi": ("causal", "alibi"),
    "one-sided window alibi": ("one-sided window", "alibi"),
    "causal window alibi per row": ("causal", "window", "alibi per row"),
    "causal window": ("causal", "window"),
    "causal window distance bias": ("causal", "window", "distance bias"),
    "causal mask": ("causal", "mask"),
    "causal lengths": ("causal", "lengths"),
    "causal key lengths alibi": ("causal", "key lengths", "alibi"),
    "decoder": ("causal", "mask", "alibi", "distance bias", "softcap", "memory", "sinks"),
    "clamped distance bias": ("distance bias", "softcap"),
    "alibi decoder": ("causal", "mask", "alibi", "distance bias", "memory", "sinks"),
    "decoder with dropout": ("causal", "window", "distance bias", "softcap", "memory", "sinks", "dropout"),
    "encoder": ("window ahead", "lengths", "alibi per row", "wide distance bias", "softcap", "memory per row"),
    "encoder with dropout": ("mask", "shared distance bias", "sinks", "dropout"),
    "no length but memory": ("no length", "memory", "sinks"),
    "row without keys but sinks": ("row without keys", "sinks"),
}


def make_call(combination: str, length: int = 11, keys: int = 13, dtype=torch.float32, key_heads: int = KEY_HEADS):
    """Query, key, value and options as keyword arguments of `flash_attention`."""
    call = {
        "query": torch.randn(BATCH, HEADS, length, HEAD_DIM),
        "key": torch.randn(BATCH, key_heads, keys, HEAD_DIM),
        "value": torch.randn(BATCH, key_heads, keys, VALUE_DIM),
    }
    for name in COMBINATIONS[combination]:
        call |= option_values(name, length, keys)
    return in_dtype(call, dtype)


def in_dtype(call: dict, dtype) -> dict:
    """The same call with its floating tensors in another dtype."""
    return {n: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for n, t in call.items()}


def operands_of(
    query, key, value, *, scale=None, causal=False, window=None, softcap=None, dropout_p=0.0, dropout_seed=None, **rest
) -> tuple[Operands, Options]:
    """The inside form of a call, put together without the code of `api.py`."""
    left, right = window if isinstance(window, tuple) else (window, window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options = Options(
        scale,
        UNLIMITED if left is None else left,
        0 if causal else (UNLIMITED if right is None else right),
        softcap or 0.0,
        dropout_p,
    )
    mask, slopes = rest.pop("key_mask", None), rest.pop("alibi_slopes", None)
    memory = [rest.pop(name, None) for name in ("memory_key", "memory_value")]
    operands = Operands(
        query,
        key,
        value,
        None if mask is None else mask.bool(),
        rest.pop("key_lengths", None),
        rest.pop("query_lengths", None),
        slopes[None] if slopes is not None and slopes.ndim == 1 else slopes,
        rest.pop("distance_bias", None),
        *(m[None] if m is not None and m.ndim == 3 else m for m in memory),
        rest.pop("sinks", None),
        torch.tensor([dropout_seed], device=query.device) if dropout_p else None,
    )
    assert not rest, f"unknown options: {sorted(rest)}"
    return operands, options


def definition(
    query, key, value, *, scale=None, causal=False, window=None, key_mask=None, key_lengths=None, query_lengths=None,
    alibi_slopes=None, distance_bias=None, softcap=None, memory_key=None, memory_value=None, sinks=None,
    dropout_p=0.0, dropout_seed=None,
):  # fmt: skip
    """The docstring of `flash_attention` read out, one logit after the other: output and lse, as float64."""
    batch, heads, length, _ = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    left, right = window if isinstance(window, tuple) else (window, window)
    output = query.new_zeros(batch, heads, length, value.shape[3])
    lse = query.new_full((batch, heads, length), -torch.inf)
    for b in range(batch):
        rows = length if query_lengths is None else int(query_lengths[b])
        columns = keys if key_lengths is None else int(key_lengths[b])
        for h in range(heads):
            slopes = None if alibi_slopes is None else (alibi_slopes if alibi_slopes.ndim == 1 else alibi_slopes[b])
            for i in range(rows):
                position = i + columns - rows
                logits, values, numbers = [], [], []
                slots = 0 if memory_key is None else memory_key.shape[-2]
                for r in range(slots):
                    own = memory_key if memory_key.ndim == 3 else memory_key[b]
                    logits.append((query[b, h, i] * own[h // groups, r]).sum() * scaling(scale, query))
                    own = memory_value if memory_value.ndim == 3 else memory_value[b]
                    values.append(own[h // groups, r])
                    numbers.append(r)
                for j in range(columns):
                    distance = j - position
                    if causal and distance > 0:
                        continue
                    if left is not None and distance < -left or right is not None and distance > right:
                        continue
                    if key_mask is not None and not key_mask[b, j]:
                        continue
                    logit = (query[b, h, i] * key[b, h // groups, j]).sum() * scaling(scale, query)
                    if slopes is not None:
                        logit = logit - slopes[h] * abs(distance)
                    if distance_bias is not None:
                        radius = distance_bias.shape[1] // 2
                        table = distance_bias[h if distance_bias.shape[0] > 1 else 0]
                        logit = logit + table[radius + max(-radius, min(radius, distance))]
                    logits.append(logit)
                    values.append(value[b, h // groups, j])
                    numbers.append(slots + j)
                if softcap is not None:
                    logits = [softcap * torch.tanh(logit / softcap) for logit in logits]
                denominator = logits if sinks is None else [*logits, sinks[h]]
                if not denominator:
                    continue
                lse[b, h, i] = torch.logsumexp(torch.stack(denominator), 0)
                for logit, own, number in zip(logits, values, numbers, strict=True):
                    keep = 1.0
                    if dropout_p:
                        hashed = dropout_hash(dropout_seed, b * heads + h, i, number)
                        keep = (hashed >> 8 >= round(dropout_p * 2**24)) / (1 - dropout_p)
                    output[b, h, i] += keep * torch.exp(logit - lse[b, h, i]) * own
    return output, lse


def scaling(scale, query):
    return query.shape[-1] ** -0.5 if scale is None else scale


def dropout_hash(seed: int, batch_head: int, row: int, column: int) -> int:
    """The hash of `operands.py` in Python's integers."""

    def mix(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    seed %= 2**64
    key = mix(mix(seed % 2**32 ^ 0x9E3779B9) ^ seed >> 32)
    return mix(mix(mix(key ^ batch_head) ^ row) ^ column * 0x9E3779B9 % 2**32)
