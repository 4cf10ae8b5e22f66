"""Associative recall in a long sequence: the few tokens that matter stand anywhere among thousands that do not.

    f f v f k3 v7 f f v … f k1 v2 f v … f q3          →  7

Most tokens are filler: `f`, of several kinds, and values `v` that belong to nothing. Scattered among them stand a few
keys, each with its value right behind it; the last token asks for one of the keys, by a token of its own. The answer
is the value behind that key.
"""

from typing import NamedTuple

import torch
from torch import Tensor


FILLERS, KEYS, VALUES, PAIRS = 64, 16, 16, 8
FIRST_VALUE = FILLERS
FIRST_KEY = FILLERS + VALUES
FIRST_QUERY = FIRST_KEY + KEYS
VOCABULARY = FIRST_QUERY + KEYS
CHANCE = 1 / VALUES


class RecallBatch(NamedTuple):
    """Attributes:
    input_ids: `[B, N]`, int64.
    answers: `[B]`, int64, the value (from 0) behind the key that is asked for.
    places: `[B, PAIRS]`, int64, where the keys stand; the first is the one that is asked for.
    """

    input_ids: Tensor
    answers: Tensor
    places: Tensor


def draw_batch(rows: int, length: int, generator: torch.Generator) -> RecallBatch:
    """`rows` sequences of `length` tokens (at least `2 * PAIRS + 2`), keys and values at even and odd places."""
    if length < 2 * PAIRS + 2:
        raise ValueError(f"length must be at least {2 * PAIRS + 2} to hold {PAIRS} pairs, got {length}")
    input_ids = torch.randint(FIRST_KEY, (rows, length), generator=generator)
    places = 2 * torch.rand(rows, length // 2 - 1, generator=generator).topk(PAIRS).indices
    keys = torch.rand(rows, KEYS, generator=generator).topk(PAIRS).indices
    values = torch.randint(VALUES, (rows, PAIRS), generator=generator)
    input_ids.scatter_(1, places, FIRST_KEY + keys)
    input_ids.scatter_(1, places + 1, FIRST_VALUE + values)
    input_ids[:, -1] = FIRST_QUERY + keys[:, 0]
    return RecallBatch(input_ids, values[:, 0], places)
