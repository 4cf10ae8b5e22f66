"""By name: what CoLT5-attention gets wrong (B1 to B10), and routed blocks do not. B6 is in test_causal_routing.py."""

import pytest
import torch
from routed_blocks import (
    WIDTH,
    attention,
    autoregressive_attention,
    close,
    cross_attention,
    feed_forward,
    image_attention,
    masks,
    one_sequence,
    states,
)

from hf_efficient.kernels.soft_topk import soft_topk
from hf_efficient.modeling.differentiable_topk import topk
from hf_efficient.modeling.token_router import RouterOptions, TokenRouter


@one_sequence
def test_b1_samples_do_not_influence_each_other(make):
    """B1: with several sets of keys the original gathers them from other samples."""
    block, tokens = make(), states()
    with torch.no_grad():
        together = block(tokens)
        for row in range(3):
            close(together[row : row + 1], block(tokens[row : row + 1]))
        close(block(tokens.flip(0)), together.flip(0))


def test_b2_b3_cross_attention_runs_and_samples_are_independent():
    """B2, B3: the original's cross-attention names a variable that does not exist, and cannot route in blocks."""
    block, tokens, memories = cross_attention(num_key_value_sets=2), states(), states(3, 100, seed=1)
    mask = masks(100, 61, 100, total=100)
    with torch.no_grad():
        together = block(tokens, memories, context_mask=mask)
        for row, length in enumerate((100, 61, 100)):
            close(together[row], block(tokens[row : row + 1], memories[row : row + 1, :length])[0])
    routed = (together != 0).any(-1).sum(-1)
    assert routed.tolist() == [5, 5, 5]


def test_b4_more_heavy_tokens_than_places():
    """B4: the original's image attention fails once every place of a window is routed."""
    maps = states(2, 64).view(2, 8, 8, WIDTH)
    for in_windows in (False, True):
        block = image_attention(num_routed_queries=1024, num_routed_keys=1024, heavy_in_windows=in_windows)
        assert block(maps).shape == maps.shape
    tokens = states(2, 10)
    close(attention(num_routed_queries=99, num_routed_keys=10)(tokens).isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_b5_the_router_gets_a_gradient_at_every_width(width):
    """B5: from width 256 on the original's scores saturate, are chosen by their ties, and have no gradient at all."""
    torch.manual_seed(0)
    router = TokenRouter(width)
    tokens = torch.randn(1, 4096, width)
    routing = router(tokens, 256)
    assert 0.9 < routing.logits.std() < 1.1
    assert (routing.scores < 1).sum() > 200
    best = routing.logits[0, 0].topk(256).indices
    assert set(best.tolist()) == set(routing.indices[0, 0].tolist())
    (routing.scores * torch.randn(1, 1, 256)).sum().backward()
    assert router.routing_vectors.grad.norm() > 1e-2


@pytest.mark.parametrize("length", [1, 9, 13, 40])
def test_b7_padding_is_not_attended(length):
    """B7: the original's windows attend to the zeros that fill the last one; here no length is special."""
    block, tokens = attention(), states(2)
    with torch.no_grad():
        whole = block.light_attn(tokens)
        cut = block.light_attn(tokens[:, :length])
        reach = max(length - 4, 0) if length < 40 else 40
        close(cut[:, :reach], whole[:, :reach])
        close(block.light_attn(tokens, masks(length, 40).bool())[:1, :length], cut[:1])


@one_sequence
def test_b8_fully_masked_rows_are_finite(make):
    """B8: the original's kernel returns inf for such a row."""
    block, tokens = make(), states().requires_grad_()
    output = block(tokens, masks(40, 0, 12))
    if make is not feed_forward and block.heavy_attn.null_query_token is None:
        assert (output[1] == 0).all()
    output.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (tokens, *block.parameters()))


def test_b9_topk_does_not_choose_masked_values():
    values = torch.tensor([[5.0, 1.0, 9.0, 3.0], [7.0, 7.0, 7.0, torch.inf]], requires_grad=True)
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    found = topk(values, 2, mask=mask)
    assert found.values.tolist() == [[5.0, 3.0], [7.0, 0.0]]
    assert found.indices[0].tolist() == [0, 3] and found.gates.tolist() == [[1, 1], [1, 0]]
    found.values.sum().backward()
    assert values.grad.isfinite().all() and values.grad[0, 2] == 0


@pytest.mark.parametrize("normalization", ["rms", "none", "cosine"])
def test_b9_masked_tokens_are_never_routed(normalization):
    """B9, in a router: not even where fewer are left than have a place, and however large their logits are."""
    router = TokenRouter(WIDTH, 2, RouterOptions(normalization=normalization)).double()
    mask = masks(40, 5, 0).flip(1).bool()
    with torch.no_grad():
        tokens = torch.where(mask[..., None], states(), 1e3 * router.routing_vectors[0])
        routing = router(tokens, 9, mask)
    assert routing.mask.sum(-1).tolist() == [[9, 9], [5, 5], [0, 0]]
    for row in range(3):
        assert mask[row, routing.indices[row][routing.mask[row]]].all()
    assert (routing.scores[~routing.mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_b9_scores_of_half_precision_sum_to_what_they_should(dtype):
    """B9: the original's descent runs in the dtype of its input and drifts (26.7 for 27.3 in bfloat16)."""
    router = TokenRouter(WIDTH).to(dtype)
    tokens = states(1, 256).to(dtype)
    routing = router(tokens, 256)
    assert routing.logits.dtype == routing.scores.dtype == torch.float32
    scores = soft_topk(routing.logits, 27.0, eps=0.1).scores
    assert abs(scores.double().sum().item() / 27 - 1) < 1e-5


def test_b10_keys_of_a_causal_block_are_projected_once():
    """B10: the original routes and projects the whole past anew for each of its windows."""
    block, rows = autoregressive_attention(), []
    block.heavy_attn.k_proj.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[1]))
    block(states())
    assert rows == [block.heavy_attn.key_value_router.room(4, 40, has_past=False)] and rows[0] <= 40
