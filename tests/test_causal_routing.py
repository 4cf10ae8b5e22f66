"""Causal conditional attention: no future anywhere, its rule, and a cache that changes nothing."""

import pytest
import torch
from routed_blocks import autoregressive_attention, close, masks, soft_scores, states

from hf_efficient.modeling.causal_router import TIE_MARGIN
from hf_efficient.modeling.routed_cache import RoutedStateLayer
from hf_efficient.modeling.token_router import RouterOptions


CAUSAL = {
    "one set": {},
    "two sets": {"num_key_value_sets": 2},
    "null tokens": {"null_query_token": True, "null_key_value": True},
    "no rotary": {"rotary_base": None},
    "fractions": {"num_routed_queries": 0.5, "num_routed_keys": 0.25},
    "straight through": {"router_options": RouterOptions(straight_through=True)},
}

causal = pytest.mark.parametrize("options", CAUSAL.values(), ids=CAUSAL)


@causal
def test_b6_causal_to_the_bit(options):
    """B6: in the original a later token can push an earlier one out of its window's heavy queries."""
    block, tokens = autoregressive_attention(**options), states()
    with torch.no_grad():
        before = block(tokens)
        for t in (1, 7, 8, 20, 39):
            changed = tokens.clone()
            changed[:, t] = states(3, 1, seed=t)[:, 0]
            after = block(changed)
            assert torch.equal(before[:, :t], after[:, :t])
            assert (before[:, t] != after[:, t]).any()


@causal
@pytest.mark.parametrize("split", [[1] * 40, [7, 1, 1, 9, 1, 21], [40]], ids=str)
def test_autoregressive_attention_in_pieces(options, split):
    block, tokens, past = autoregressive_attention(**options), states(), RoutedStateLayer()
    mask = 1 - masks(6, 0, 11)  # on the left
    with torch.no_grad():
        pieces, end = [], 0
        for piece in tokens.split(split, dim=1):
            end += piece.shape[1]
            pieces.append(block(piece, mask[:, :end], past=past))
            past.count(piece)
        whole = block(tokens, mask)
        close(torch.cat(pieces, dim=1)[mask == 1], whole[mask == 1])
        for row, start in enumerate((6, 0, 11)):
            close(whole[row, start:], block(tokens[row : row + 1, start:])[0])
    routed = past.filled.sum(-1).amax().item()
    assert past.keys.shape[3] <= min(40, block.heavy_attn.key_value_router.limit(4) * 7) and routed <= 30


def test_causal_routing_keeps_to_its_rule():
    """A token is routed if fewer than k of the W - 1 before it have a logit as large, up to the limit."""
    router = autoregressive_attention().heavy_attn.q_router
    for tokens in (states(2), states(1)[:, :1] * torch.arange(1, 41)[:, None] ** 0.1 + states(1) * 1e-3):
        routing, _ = router(tokens, 3)
        for row, logits in enumerate(routing.logits[:, 0].detach()):
            expected, used = [], 0
            for t in range(40):
                used = 0 if t % 8 == 0 else used
                window = logits[max(t - 7, 0) : t + 1]
                if (window[:-1] > window[-1] - TIE_MARGIN).sum() < 3:
                    used += 1
                    if used <= 4:
                        expected.append((t, soft_scores(window, 9 / 8 * 3, 1.0)[-1] if len(window) > 3 else 1.0))
            mask = routing.mask[row, 0]
            assert routing.indices[row, 0][mask].tolist() == [t for t, _ in expected]
            close(routing.scores[row, 0][mask], torch.tensor([float(s) for _, s in expected], dtype=torch.float64))
            assert (routing.scores[row, 0][~mask] == 0).all()
