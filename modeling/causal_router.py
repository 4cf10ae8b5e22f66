"""A router that may know the past only, so that what it decides for a token never changes afterwards."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.soft_topk import soft_topk
from .token_router import DEFAULT_OPTIONS, RouterOptions, Routing, TokenRouter, tokens_for


# Tokens that repeat themselves in like surroundings have logits that differ by rounding errors, which are others in a
# cached step. A token has to be better than an earlier one by this, on logits of about unit variance.
TIE_MARGIN = 1e-3


@dataclass
class RouterHistory:
    """What a causal router has to remember of the last `window - 1` tokens (H of them so far).

    Attributes:
        logits: `[B, R, H]`, at least float32.
        eligible: `[B, R, H]`, bool: was the token among the largest of its window?
        mask: `[B, H]`, bool, real tokens.
        seen: `[B, H]`, int64, how many real tokens there were up to and including each.
    """

    logits: Tensor
    eligible: Tensor
    mask: Tensor
    seen: Tensor

    def last(self, count: int) -> "RouterHistory":
        """The last `count` tokens, copied, so that the rest is not kept alive."""
        start = max(self.mask.shape[1] - count, 0)
        return self.map(lambda t: t[..., start:].clone())

    def map(self, function) -> "RouterHistory":
        """`function` applied to every tensor."""
        return RouterHistory(*(function(t) for t in (self.logits, self.eligible, self.mask, self.seen)))


class CausalTokenRouter(TokenRouter):
    """Routes a token if its logit is among the k largest of the last W tokens, itself included.

    A top-k of a whole sequence, or of a window that reaches ahead, lets a later token push out an earlier one: such a
    model is not causal and cannot be cached. Here a decision needs the W - 1 logits before the token and is final. For
    logits in random order k of W tokens are routed on average; a hard limit holds whatever the logits are: of each
    stretch of W tokens, counted from the first real one, no more than `ceil(score_ratio * k)` are routed, the first
    ones. Ties go to the earlier token, and a difference below `TIE_MARGIN` is one.

    It trains as the other router does: the weight of a routed token is its own entry in the soft top-k of these W
    logits, whose gradient pulls its logit up and those it competes with down where the heavy branch helps, and the
    other way round where it does not.

    Args:
        hidden_size, num_routes, options: as in `TokenRouter`.
        window: W.
    """

    def __init__(
        self, hidden_size: int, num_routes: int = 1, options: RouterOptions = DEFAULT_OPTIONS, *, window: int = 128
    ):
        super().__init__(hidden_size, num_routes, options)
        if options.static:
            raise ValueError("a causal router must look at its tokens, got RouterOptions(static=True)")
        self.window = window

    def limit(self, num_tokens: int | float) -> int:
        """How many tokens of a stretch of W can be routed at most."""
        return min(math.ceil(self.options.score_ratio * tokens_for(num_tokens, self.window)), self.window)

    def room(self, num_tokens: int | float, length: int, has_past: bool) -> int:
        """How many of `length` tokens in a row can be routed at most."""
        stretches = -(-length // self.window)
        if has_past:
            stretches = (length - 2) // self.window + 2
        return min(length, self.limit(num_tokens) * stretches)

    def forward(
        self,
        hidden_states: Tensor,
        num_tokens: int | float,
        mask: Tensor | None = None,
        past: RouterHistory | None = None,
    ) -> tuple[Routing, RouterHistory]:
        """Route `hidden_states` `[B, N, C]`, the tokens behind those of `past`; with the history of all of them.

        Args:
            num_tokens: k, or the fraction of W that it is.
            mask: `[B, N]`, bool, True at real tokens.
        """
        batch, length = hidden_states.shape[:2]
        new_logits = self.logits(hidden_states)
        if mask is None:
            mask = hidden_states.new_ones(batch, length, dtype=torch.bool)
        logits, real, before = new_logits, mask, 0
        if past is not None:
            logits, real = torch.cat([past.logits, logits], dim=-1), torch.cat([past.mask, real], dim=-1)
            before = past.seen[:, -1:]
        seen = mask.cumsum(-1) + before

        # The window that ends at each token: [B, R, N, W] and [B, 1, N, W].
        lacking = (self.window - 1 - (logits.shape[-1] - length), 0)
        windows = torch.nn.functional.pad(logits, lacking).unfold(-1, self.window, 1)
        visible = torch.nn.functional.pad(real, lacking).unfold(-1, self.window, 1)[:, None]
        count = tokens_for(num_tokens, self.window)
        larger = (windows[..., :-1] > windows[..., -1:] - TIE_MARGIN) & visible[..., :-1]
        eligible = (larger.sum(dim=-1) < count) & mask[:, None]

        all_eligible = eligible if past is None else torch.cat([past.eligible, eligible], dim=-1)
        total = torch.nn.functional.pad(all_eligible.cumsum(-1), (1, 0))
        # Where the token's stretch began; further back than the history reaches nothing is eligible.
        place = torch.arange(logits.shape[-1] - length, logits.shape[-1], device=logits.device)
        start = (place - (seen - 1).clamp(min=0) % self.window).clamp(min=0)[:, None].expand(eligible.shape)
        rank = total[..., -length:] - total.gather(-1, start)
        routed = eligible & (rank <= self.limit(num_tokens))

        scores = self._scores(windows, visible, count)
        indices = (~routed).to(torch.uint8).argsort(dim=-1, stable=True)
        indices = indices[..., : self.room(num_tokens, length, past is not None)]
        chosen = routed.gather(-1, indices)
        weights = torch.where(chosen, self._weights(scores.gather(-1, indices)), 0)
        all_seen = seen if past is None else torch.cat([past.seen, seen], dim=-1)
        history = RouterHistory(logits.detach(), all_eligible, real, all_seen)
        return Routing(new_logits, indices, weights, chosen), history

    def _scores(self, windows: Tensor, visible: Tensor, count: int) -> Tensor:
        """`[B, R, N]`: the last entry of the soft top-k of each window."""
        options = self.options
        return soft_topk(
            windows.contiguous(),
            min(options.score_ratio * count, self.window),
            method=options.method,
            eps=options.temperature,
            mask=visible.expand(windows.shape),
            num_selected=0,
            n_iters=options.num_iterations,
            eps_init=options.initial_temperature,
            eps_decay=options.temperature_decay,
        ).scores[..., -1]
