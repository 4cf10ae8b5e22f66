"""The router of conditional computation: which tokens of a sequence go down the heavy path, and how much they count.

A routed layer computes `X + light(X) + s · heavy(X)` (CoLT5, arXiv 2303.09752, section 3.1): a cheap branch for every
token, a costly one for the k tokens with the largest logits, whose output is weighted with the soft top-k scores
(`kernels/soft_topk`). The scores are what gives the router a gradient.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.soft_topk import soft_topk
from .routing_logits import routing_logits


class RouterOptions(NamedTuple):
    """How logits become scores. The defaults are the paper's, but for `method` (see `kernels/soft_topk`).

    Attributes:
        score_ratio: the scores sum to this times the number of routed tokens, so that some that are just not chosen
            compete for a place (section 3.1 of the paper has 9/8).
        temperature: ε of the soft top-k.
        method: `"exact"`, or `"coordinate_descent"` for the paper's iterations, to which the other three belong.
        num_iterations: of coordinate descent.
        initial_temperature, temperature_decay: ε-scaling of CoDA (arXiv 2304.04947).
        straight_through: count every routed token fully (1 forward, the gradient of the score backward).
        normalization: what of a token the router sees: `"rms"`: the token over its root mean square, so that logits
            have unit variance at initialisation whatever the width; `"none"`: the token as it is, with which they grow
            with the width until the scores saturate and the gradient is exactly zero; `"cosine"`: the cosine of token
            and routing vector, times 8.
        static: route evenly spaced positions, whatever they hold: the paper's control (section 4.4). No parameters.
    """

    score_ratio: float = 9 / 8
    temperature: float = 1.0
    method: str = "exact"
    num_iterations: int = 50
    initial_temperature: float | None = None
    temperature_decay: float = 1.0
    straight_through: bool = False
    normalization: str = "rms"
    static: bool = False


COSINE_SCALE = 8.0
EPSILON = 1e-6  # of the root mean square: a token of zeros has a gradient too
DEFAULT_OPTIONS = RouterOptions()


@dataclass
class Routing:
    """What a router decided, for each of its R routes. K is the room for routed tokens: at least every row's number.

    Attributes:
        logits: `[B, R, N]`, float32 or float64.
        indices: `[B, R, K]`, int64, positions of the routed tokens, each at most once.
        scores: `[B, R, K]`, like the logits; their weights in [0, 1], 0 where `mask` is False.
        mask: `[B, R, K]`, bool, which places hold a routed token; None for all of them.
    """

    logits: Tensor
    indices: Tensor
    scores: Tensor
    mask: Tensor | None


def tokens_for(num_tokens: int | float, length: int | Tensor) -> int | Tensor:
    """How many tokens of `length` are routed: an int is a number of tokens, a float a fraction of them, rounded up.

    `length` is a number, or an int64 tensor with one length for each row. Longer rows never route fewer tokens.
    """
    if isinstance(length, Tensor):
        if isinstance(num_tokens, float):
            return (num_tokens * length.double()).ceil().long()
        return length.clamp(max=num_tokens)
    return math.ceil(num_tokens * length) if isinstance(num_tokens, float) else min(num_tokens, length)


def check_num_tokens(name: str, num_tokens: int | float) -> None:
    """A number of tokens of at least 1, or a fraction in (0, 1].

    Raises:
        ValueError: otherwise.
    """
    number = isinstance(num_tokens, int) and not isinstance(num_tokens, bool) and num_tokens >= 1
    if not number and not (isinstance(num_tokens, float) and 0 < num_tokens <= 1):
        raise ValueError(
            f"{name} must be a number of tokens (an int of at least 1) or a fraction of the sequence (a float above 0 "
            f"and at most 1.0), got {num_tokens!r}"
        )


def check_mask(name: str, mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """`mask` `[B, N]` as bool, True at real tokens.

    Raises:
        ValueError: a mask of another shape than the first two axes of `hidden_states`.
    """
    if mask is None:
        return None
    if mask.shape != hidden_states.shape[:2]:
        expected = tuple(hidden_states.shape[:2])
        raise ValueError(f"{name} must have shape {expected} (batch, length), got {tuple(mask.shape)}")
    return mask.to(torch.bool)


class TokenRouter(nn.Module):
    """Chooses tokens by their product with a learned vector.

    Rows of a batch and routes of a row are independent of each other, and the choice is by logits, never by scores
    (of which many are exactly 1). Of a padded row as many tokens are routed as of the row without its padding.

    Args:
        hidden_size: C.
        num_routes: R, how many sets of tokens are chosen, each with a vector of its own.
        options: see `RouterOptions`.
    """

    def __init__(self, hidden_size: int, num_routes: int = 1, options: RouterOptions = DEFAULT_OPTIONS):
        super().__init__()
        self.hidden_size, self.num_routes, self.options = hidden_size, num_routes, options
        if options.static:
            self.register_parameter("routing_vectors", None)
        else:
            self.routing_vectors = nn.Parameter(torch.randn(num_routes, hidden_size) * hidden_size**-0.5)

    def forward(self, hidden_states: Tensor, num_tokens: int | float, mask: Tensor | None = None) -> Routing:
        """Route `hidden_states` `[B, N, C]`.

        Args:
            num_tokens: how many, or which fraction of the real tokens: see `tokens_for`.
            mask: `[B, N]`, bool, True at real tokens. Others are never routed, and count nothing.
        """
        length = hidden_states.shape[1]
        capacity = tokens_for(num_tokens, length)
        options = self.options
        if mask is None:
            logits = (
                self._static_logits(hidden_states, capacity, None) if options.static else self.logits(hidden_states)
            )
            scores, indices, _ = self._soft_topk(logits, min(options.score_ratio * capacity, length), None, capacity)
            return Routing(logits, indices, self._weights(scores.gather(-1, indices)), None)
        lengths = mask.sum(dim=-1, keepdim=True)
        counts = tokens_for(num_tokens, lengths)
        logits = self._static_logits(hidden_states, counts, mask) if options.static else self.logits(hidden_states)
        expanded = mask[:, None].expand(logits.shape)
        sums = torch.minimum(options.score_ratio * counts, lengths).to(logits.dtype).expand(logits.shape[:2])
        scores, indices, _ = self._soft_topk(logits, sums, expanded, capacity)
        # The best of a row come first, so its places are filled from the left.
        chosen = (torch.arange(capacity, device=indices.device) < counts[..., None]) & expanded.gather(-1, indices)
        weights = self._weights(scores.gather(-1, indices))
        return Routing(logits, indices, torch.where(chosen, weights, 0), chosen)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """`[B, R, N]` in at least float32: lower precision would make ties, which are decided by position."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            tokens, vectors = hidden_states, self.routing_vectors
            if self.options.normalization == "cosine":
                dtype = torch.promote_types(tokens.dtype, torch.float32)
                tokens, vectors = nn.functional.normalize(tokens.to(dtype), dim=-1), vectors.to(dtype)
                vectors = nn.functional.normalize(vectors, dim=-1) * COSINE_SCALE
            return routing_logits(tokens, vectors, EPSILON if self.options.normalization == "rms" else None)

    def _static_logits(self, hidden_states: Tensor, counts: int | Tensor, mask: Tensor | None) -> Tensor:
        """1 at `counts` evenly spaced real tokens, 0 elsewhere."""
        batch, length = hidden_states.shape[:2]
        if mask is None:
            position, lengths = torch.arange(length, device=hidden_states.device)[None], length
        else:
            position, lengths = (mask.cumsum(-1) - 1).clamp(min=0), mask.sum(dim=-1, keepdim=True).clamp(min=1)
        chosen = (position + 1) * counts // lengths > position * counts // lengths
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        return chosen.to(dtype)[:, None].expand(batch, self.num_routes, length)

    def _soft_topk(self, logits, sums, mask, capacity):
        options = self.options
        return soft_topk(
            logits,
            sums,
            method=options.method,
            eps=options.temperature,
            mask=mask,
            num_selected=capacity,
            sorted_by="position" if mask is None else "logit",
            n_iters=options.num_iterations,
            eps_init=options.initial_temperature,
            eps_decay=options.temperature_decay,
        )

    def _weights(self, scores: Tensor) -> Tensor:
        if self.options.static:
            return torch.ones_like(scores)
        return scores + (1 - scores).detach() if self.options.straight_through else scores


def gather_tokens(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """The tokens of `hidden_states` `[B, N, C]` at `indices` `[B, K]`: `[B, K, C]`."""
    return hidden_states.gather(1, indices[..., None].expand(-1, -1, hidden_states.shape[-1]))


def add_tokens(output: Tensor, tokens: Tensor, routing: Routing) -> Tensor:
    """`output` `[B, N, C]` with `tokens` `[B, K, C]`, the routed ones of a single route, added in place.

    Places without a routed token add nothing, even if what stands there is not a number.
    """
    if routing.mask is not None:
        tokens = torch.where(routing.mask[:, 0, :, None], tokens, 0)
    indices = routing.indices[:, 0, :, None].expand(-1, -1, output.shape[-1])
    return output.scatter_add_(1, indices, tokens.to(output.dtype))
