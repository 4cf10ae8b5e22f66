"""How many floating point operations a call takes, as `torch.utils.flop_counter` wants to know it.

Counted as torch counts its own attention: two for each multiplication of a product, for the pairs of a query and a key
that the window leaves visible; five products backward for two forward. Masks and lengths are values, which a counter
does not look at: hidden keys count.
"""

from .operands import UNLIMITED


def visible_pairs(length: int, keys: int, left: int, right: int) -> int:
    """Pairs of a row i of `length` and a key j of `keys` with `p - left ≤ j ≤ p + right` at `p = i + keys - length`.

    `left` and `right` as in `Options`. O(1): rows cut off at an end of the keys are sums of arithmetic series.
    """
    first = keys - length
    # Σ_i max(0, min(keys, p + right + 1)) - Σ_i max(0, min(keys, p - left)), both over p = first … keys - 1.
    stop = keys * length if right == UNLIMITED else _clamped_sum(first + right + 1, length, keys)
    start = 0 if left == UNLIMITED else _clamped_sum(first - left, length, keys)
    return stop - start


def _clamped_sum(first: int, count: int, limit: int) -> int:
    """`Σ min(max(x, 0), limit)` for x = first, first + 1, …, `count` of them."""

    def up_to(x: int) -> int:
        """The sum over all integers below x, of which only those above zero add to it."""
        inside = min(max(x - 1, 0), limit)
        return inside * (inside + 1) // 2 + max(x - 1 - limit, 0) * limit

    return up_to(first + count) - up_to(first)


def _products(query, key, value, memory_key, left, right) -> int:
    """Multiplications of one product with the keys and one with the values."""
    batch, heads, length, size = query
    pairs = visible_pairs(length, key[2], left, right)
    if memory_key is not None:
        pairs += length * memory_key[-2]
    return batch * heads * pairs * (size + value[3])


def forward_flops(query, key, value, *rest, out_shape=None, **kwargs) -> int:
    """Of `hf_efficient::flash_attention_forward`, whose arguments come with shapes in the place of tensors."""
    memory_key, left, right = rest[5], rest[10], rest[11]
    return 2 * _products(query, key, value, memory_key, left, right)


def backward_flops(grad_output, grad_lse, output, lse, query, key, value, *rest, out_shape=None, **kwargs) -> int:
    """Of `hf_efficient::flash_attention_backward`: logits again, dv, dw, dq and dk."""
    memory_key, left, right = rest[5], rest[10], rest[11]
    size, width = query[3], value[3]
    products = 2 * _products(query, key, value, memory_key, left, right)
    return products * (3 * size + 2 * width) // (size + width)
